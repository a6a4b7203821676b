"""Progress on a terminal, in a pipe, and in a narrow window."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from stillhouse import console as package
from stillhouse.console import phase, progress
from tests.console.consoles import Clock, pipe, printed, screen, terminal, written


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


def test_a_note_within_a_bar_does_not_tear_it():
    console = terminal()
    with progress("Training", 10, console=console):
        package.note("step 3: validated")
        note, bar = screen(console)
    assert note == "step 3: validated"
    assert "Training  ━" in bar
    package.note("goes to standard error again")
    assert "again" not in written(console)


def test_an_inner_piece_has_a_line_of_its_own_below_and_leaves_one_above():
    console, clock = terminal(), Clock()
    with progress("Training", 10, console=console, clock=clock) as outer:
        outer.advance(4, loss=2.5)
        with phase("Validating", quiet=True, console=console):
            assert [line[:14].rstrip() for line in screen(console)] == ["⠋ Training", "  ⠋ Validating"]
        with progress("Round 1", 3, console=console) as inner:
            inner.advance(3)
        outer.advance(6, loss=1.5)
    assert screen(console) == [
        "✓ Round 1  3/3 (100%)  0 s",
        "✓ Training  10/10 (100%)  0 s  loss 1.5000",
    ]


def test_an_interrupted_bar_says_so_and_leaves_the_terminal_to_messages():
    console = terminal()

    def work() -> None:
        with progress("Training", 10, console=console) as outer, progress("Round 1", 5, console=console):
            outer.advance(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    inner, outer = screen(console)
    assert inner.startswith("- Round 1  0/5 (0%)")
    assert outer.startswith("- Training  2/10 (20%)")
    assert inner.endswith("interrupted")
    assert outer.endswith("interrupted")
    assert written(console).rstrip().count("\x1b[?25h") == 1  # the cursor is shown again
    with progress("Again", 1, console=console) as meter:
        meter.advance()
    assert screen(console)[-1].startswith("✓ Again  1/1 (100%)")


def test_a_phase_says_how_long_it_took_and_a_quiet_one_nothing():
    console = pipe()
    with phase("Loading", console=console):
        pass
    with phase("Validating", quiet=True, console=console):
        pass
    assert written(console) == "Loading: took 0 s\n"


def curve_after(losses: list[float], total: int, width: int = 160) -> str:
    """The sparkline of the last line."""
    console, clock = terminal(width), Clock()
    with progress("Training", total, trace="loss", console=console, clock=clock) as meter:
        for loss in losses:
            meter.advance(1, loss=loss)
    last = printed(console).rstrip().splitlines()[-1]
    return "".join(letter for letter in last if letter in "▁▂▃▄▅▆▇█")


@pytest.mark.parametrize(
    ("losses", "total", "drawn"),
    [([3.0, 2.0, 1.0, 1.5], 4, "█▅▁▃"), ([1.0, 1.0], 2, "▁▁"), ([1.0], 1, ""), ([], 8, ""),
     ([4.0] * 50, 50, "▁" * 16), ([1.0, float("nan"), 2.0], 3, "▁█"), ([1.0, 2.0] * 10, 160, "▁▁"),
     ([3.0, 1.0, 9.0], 2, "▁█")],
)  # fmt: skip
def test_a_traced_value_becomes_a_sparkline_over_the_whole_work(losses, total, drawn):
    assert curve_after(losses, total) == drawn


def test_a_long_course_keeps_its_shape():
    curve = curve_after([abs(step - 2500.0) for step in range(5000)], 5000)
    assert len(curve) == 16
    assert curve[0] == curve[-1] == "█"
    assert curve[7] == curve[8] == "▁"
