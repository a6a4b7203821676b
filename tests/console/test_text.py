"""Tables and words on a terminal, in a pipe, and in a narrow window."""

from __future__ import annotations

import pytest
from rich.text import Text

from stillhouse.console import duration, note, number, say, show_error, table, visible, warn
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from tests.console.consoles import pipe, terminal, written


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


def test_control_characters_are_shown_and_not_obeyed():
    assert visible("a\x00b\x1b[2Jc\u202ed\ud800\ttab\nline") == "a␀b␛[2Jc[U+202E]d[U+D800]\ttab\nline"
    console = pipe()
    table(["name\x1b[2J"], [["\x1b]0;title\x07"]], title="[b]t\x1b", console=console)
    assert "\x1b" not in written(console)
    assert "[b]t␛" in written(console)


def test_lines_obey_no_control_characters_either(capsys):
    for print_line in (say, note, warn):
        print_line("a\x1b[2Jb")
    show_error(ConfigError("bad\x1b]0;title\x07.jsonl"))
    captured = capsys.readouterr()
    assert captured.out == "a␛[2Jb\n"
    assert captured.err == "a␛[2Jb\nwarning: a␛[2Jb\nerror: bad␛]0;title␇.jsonl\n"
