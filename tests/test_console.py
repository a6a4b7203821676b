"""The console on a terminal, in a pipe, and in a narrow window."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from stillhouse.console import duration, number, progress, show_error, table
from stillhouse.errors import ConfigError, EnvironmentFault, Fault


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pipe(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def terminal(width: int = 120) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, highlight=False, _environ={"TERM": "xterm"}
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
    console, clock = pipe(), Clock()
    with progress("training", 1000, console=console, clock=clock) as meter:
        for _ in range(30):
            clock.now += 1.0
            meter.advance(1, loss=1.25, tokens_per_second=1234)
    lines = written(console).splitlines()
    assert lines == [
        "training: 10/1,000 (1%), 1/s, 16 min 30 s left, loss 1.2500, tokens per second 1,234",
        "training: 20/1,000 (2%), 1/s, 16 min 20 s left, loss 1.2500, tokens per second 1,234",
        "training: 30/1,000 (3%), 1/s, 16 min 10 s left, loss 1.2500, tokens per second 1,234",
        "training: 30/1,000 (3%), 1/s, took 30 s, loss 1.2500, tokens per second 1,234",
    ]


def test_plain_lines_come_every_tenth_but_not_more_than_one_a_second():
    console, clock = pipe(), Clock()
    with progress("scoring", 100, console=console, clock=clock) as meter:
        for _ in range(100):
            clock.now += 1 / 16
            meter.advance()
    counts = [line.split()[1] for line in written(console).splitlines()]
    assert counts == [f"{done}/100" for done in (16, 32, 48, 64, 80, 96, 100)]


def test_an_interrupted_piece_of_work_says_so():
    console = pipe()

    def work() -> None:
        with progress("training", 10, console=console, clock=Clock()) as meter:
            meter.advance(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert written(console).splitlines()[-1] == "training: 3/10 (30%), interrupted"


def test_resumed_work_does_not_count_into_the_rate():
    console, clock = pipe(), Clock()
    with progress("training", 100, done=90, console=console, clock=clock) as meter:
        clock.now += 5
        meter.advance(10)
    assert written(console) == "training: 100/100 (100%), 2/s, took 5 s\n"


def test_a_terminal_gets_a_bar_with_live_values():
    console, clock = terminal(), Clock()
    with progress("training", 40, console=console, clock=clock) as meter:
        clock.now += 2
        meter.advance(10, loss=1.5)
    last = Text.from_ansi(written(console)).plain
    for piece in ("training", "10/40 (25%)", "5/s", "6 s left", "loss 1.5000"):
        assert piece in last


def test_a_table_in_a_pipe_is_as_wide_as_it_needs():
    console = pipe(width=30)
    rows = [["student after distillm2 with a long name", 57.125, 1_234_567, None]]
    table(["system", "ROUGE-L", "parameters", "KL"], rows, console=console)
    row = "student after distillm2 with a long name    57.12    1,234,567   –"
    assert [" ".join(line.split()) for line in written(console).splitlines()][-2] == " ".join(row.split())


def test_a_narrow_terminal_folds_text_and_keeps_numbers_whole():
    console = terminal(width=30)
    table(["system", "count"], [["a rather long name that has to be folded", 1_234_567_890]], console=console)
    assert "1,234,567,890" in written(console)
    lines = [Text.from_ansi(line).plain.rstrip() for line in written(console).splitlines()]
    assert max(map(len, lines)) <= 30
    assert "…" not in written(console)


def test_text_is_never_read_as_markup():
    console = pipe()
    table(["path"], [["[bold]data[/bold][0]"]], console=console)
    assert "[bold]data[/bold][0]" in written(console)


def test_errors_go_to_standard_error_with_their_exit_code(capsys):
    long = "objective.alpha: " + "word " * 40
    assert show_error(ConfigError(Fault("a[0]", "wrong"), long)) == 2
    assert show_error(EnvironmentFault("the disk is full")) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error:\n- a[0]: wrong\n- {long}\nerror: the disk is full\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (1250, "1,250"), (57.1, "57.10"), (0.03125, "0.0312"), (1.2e-5, "1.2e-05"), (0.0, "0.0000"),
     (12345.6, "12,346"), (float("nan"), "nan"), (True, "yes"), ("[x]", "[x]")],
)  # fmt: skip
def test_numbers_read_well(value, shown):
    assert number(value) == shown


def test_durations_read_well():
    assert [duration(x) for x in (7.6, 161, 11_100)] == ["8 s", "2 min 41 s", "3 h 05 min"]
