"""Progress on a terminal, in a pipe, and in a narrow window."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from stillhouse import console as package
from stillhouse.console import phase, progress
from stillhouse.console.live import sparkline
from tests.console.consoles import Clock, pipe, printed, terminal, written


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
    last = printed(console)
    for piece in ("training", "10/40 (25%)", "5/s", "6 s left", "loss 1.5000"):
        assert piece in last


def test_a_narrow_terminal_keeps_one_line_and_drops_the_least_wanted():
    for width in (30, 60, 80, 120):
        console, clock = terminal(width), Clock()
        with progress("Training a student", 40, trace="loss", console=console, clock=clock) as meter:
            for step in range(40):
                clock.now += 2
                meter.advance(1, loss=40.0 - step, tokens_per_second=1234)
        lines = re.split(r"[\r\n]+", printed(console))
        assert max(cell_len(line.rstrip()) for line in lines) <= width
        last = next(line for line in reversed(lines) if line)
        assert ("1,234" in last) == (width == 120)
        assert ("loss 1.0000" in last) == (width >= 60)
        assert "✓ Training a student" in last


def test_what_ends_early_has_no_tick():
    console = terminal()
    with progress("Training", 10, console=console) as meter:
        meter.advance(4)
    last = printed(console).rstrip().splitlines()[-1]
    assert "- Training  4/10 (40%)" in last
    assert "✓" not in last


def test_a_note_within_a_bar_goes_through_its_console():
    console = terminal()
    with progress("Training", 10, console=console):
        package.note("step 3: validated")
    assert "step 3: validated" in written(console)


def test_a_phase_says_how_long_it_took_and_a_quiet_one_nothing():
    console = pipe()
    with phase("Loading", console=console):
        pass
    with phase("Validating", quiet=True, console=console):
        pass
    assert written(console) == "Loading: took 0 s\n"


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [([3.0, 2.0, 1.0, 1.5], 8, "█▅▁▃"), ([1.0, 1.0], 8, "▁▁"), ([1.0], 8, ""), ([], 8, ""),
     ([4.0] * 50, 5, "▁" * 5), ([1.0, float("nan"), 2.0], 8, "▁█"), ([1.0, 2.0], 0, "")],
)  # fmt: skip
def test_a_course_becomes_blocks(values, width, drawn):
    assert sparkline(values, width) == drawn


def test_a_long_course_keeps_its_shape():
    console, clock = terminal(160), Clock()
    with progress("Training", 5000, trace="loss", console=console, clock=clock) as meter:
        for step in range(5000):
            meter.advance(1, loss=abs(step - 2500.0))
    last = printed(console).rstrip().splitlines()[-1]
    curve = [letter for letter in last if letter in "▁▂▃▄▅▆▇█"]
    assert len(curve) == 24
    assert curve[0] == curve[-1] == "█"
    assert curve[12] == "▁"
