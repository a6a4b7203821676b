"""What a person sees in the terminal: progress, tables, errors. In a pipe or a log file the same words come
as plain lines.

Results go to standard output, so that they can be piped; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from stillhouse.errors import StillhouseError

Live = float | int | str
"""A live value beside the bar, such as the loss."""

MISSING = "–"


class Meter(Protocol):
    """What `progress` yields."""

    def advance(self, n: float = 1, **live: Live) -> None:
        """Count `n` more as done and show the newest live values, such as `loss=1.25`."""


def output() -> Console:
    """Standard output as rich sees it at this moment."""
    return Console(highlight=False)


def messages() -> Console:
    """Standard error as rich sees it at this moment."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def progress(
    title: str,
    total: float | None = None,
    *,
    done: float = 0,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Meter]:
    """Show how far a piece of work has come.

    On a terminal: a bar with title, share, count, rate, time left and live values. Elsewhere: a plain line
    about every ten seconds or every tenth of the work, whichever comes first but never more than one a
    second, and a last line at the end.

    Args:
        title: what is done, such as "training".
        total: how much there is; None where nobody knows.
        done: what an earlier, interrupted run has done; it is not counted into the rate.
        console: where to write; standard error by default.
        clock: seconds that only grow.

    Example:
        >>> with progress("training", total=400) as meter:
        ...     meter.advance(1, loss=1.25)
    """
    console = console or messages()
    if console.is_terminal and not console.is_dumb_terminal:
        with _bar(console, done, clock) as bar:
            yield _TerminalMeter(bar, title, total, done)
        return
    meter = _PlainMeter(console, title, total, done, clock)
    ended = "interrupted"
    try:
        yield meter
        ended = ""
    finally:
        meter.close(ended)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    caption: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a table in which no number is ever cut or broken.

    Columns of numbers are set right and keep their width; text columns wrap on a narrow terminal. In a pipe
    the table is as wide as it needs to be. `None` prints as a dash.
    """
    console = console or output()
    drawn = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for index, name in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in rows)
        drawn.add_column(
            Text(name),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
            vertical="top",
        )
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(number(cell)) for cell in row))
    needed = Measurement.get(console, console.options.update(width=100_000), drawn)
    width = max(needed.minimum, min(needed.maximum, console.width)) if console.is_terminal else needed.maximum
    wide = console.width
    console.width = max(width, wide)
    try:
        console.print(drawn, width=width, crop=False, overflow="ignore", no_wrap=True)
    finally:
        console.width = wide


def number(value: object) -> str:
    """A value as people read it: `1,250`, `57.10`, `0.0312`, `1.2e-05`; None is a dash, text stays."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.2f}"
    return f"{value:.4f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds as `8 s`, `2 min 41 s` or `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def say(text: str) -> None:
    """Print one line of result to standard output, never broken and never read as markup."""
    output().print(Text(text), soft_wrap=True)


def note(text: str) -> None:
    """Print one line about what goes on to standard error."""
    messages().print(Text(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    messages().print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def show_error(error: StillhouseError) -> int:
    """Print the message of a deliberate error to standard error, without a traceback.

    Returns:
        The exit code: 2 where the user can mend the input, 3 where the environment failed.
    """
    text = str(error)
    gap = "\n" if "\n" in text else " "
    messages().print(Text.assemble(("error:", "bold red"), gap, text), soft_wrap=True)
    return error.exit_code


def _is_number(cell: object) -> bool:
    """True for numbers, dashes and text that starts like a number, such as `57.1 ± 0.3`."""
    if cell is None or isinstance(cell, int | float):
        return True
    text = str(cell).strip().lstrip("+-−±×")
    return text[:1].isdigit() or text in ("", MISSING, "nan", "inf")


def _live_text(live: dict[str, Live]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in live.items())


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


class _Rate(ProgressColumn):
    """Rate and time left over the whole time: generation makes single steps too uneven for a short window."""

    def __init__(self, done_before: float, clock: Callable[[], float]) -> None:
        super().__init__()
        self.done_before, self.clock, self.started = done_before, clock, clock()

    def render(self, task: Task) -> Text:
        elapsed = self.clock() - self.started
        made = task.completed - self.done_before
        if made <= 0 or elapsed <= 0:
            return Text("")
        rate = made / elapsed
        if task.finished or task.total is None:
            return Text(f"{_rate_text(rate)}, {duration(elapsed)}", style="cyan")
        left = duration((task.total - task.completed) / rate)
        return Text(f"{_rate_text(rate)}, {left} left", style="cyan")


def _bar(console: Console, done: float, clock: Callable[[], float]) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[counted]}", style="green", markup=False),
        _Rate(done, clock),
        TextColumn("{task.fields[live]}", markup=False),
        console=console,
        get_time=clock,
    )


def _counted(done: float, total: float | None) -> str:
    shown = f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"
    return f"{shown} ({done / total:.0%})" if total else shown


class _TerminalMeter:
    def __init__(self, bar: Progress, title: str, total: float | None, done: float) -> None:
        self.bar, self.total, self.done = bar, total, done
        self.live: dict[str, Live] = {}
        self.task = bar.add_task(title, total=total, counted=_counted(done, total), live="")

    def advance(self, n: float = 1, **live: Live) -> None:
        self.done += n
        self.live.update(live)
        self.bar.update(
            self.task,
            completed=self.done,
            counted=_counted(self.done, self.total),
            live=_live_text(self.live),
        )


class _PlainMeter:
    """One line now and then; the same words as the bar."""

    seconds = 10.0
    share = 0.1
    at_least = 1.0

    def __init__(
        self, console: Console, title: str, total: float | None, done: float, clock: Callable[[], float]
    ) -> None:
        self.console, self.title, self.total, self.clock = console, title, total, clock
        self.done = self.before = self.told = done
        self.started = self.told_at = clock()
        self.live: dict[str, Live] = {}

    def advance(self, n: float = 1, **live: Live) -> None:
        self.done += n
        self.live.update(live)
        since = self.clock() - self.told_at
        tenth = bool(self.total) and (self.done - self.told) >= self.share * (self.total or 0)
        complete = self.total is not None and self.done >= self.total
        if not complete and (since >= self.seconds or (tenth and since >= self.at_least)):
            self._tell()

    def close(self, ended: str) -> None:
        self._tell(ended, last=True)

    def _tell(self, ended: str = "", *, last: bool = False) -> None:
        now = self.clock()
        elapsed, made = now - self.started, self.done - self.before
        parts = [_counted(self.done, self.total)]
        if made > 0 and elapsed > 0:
            parts.append(_rate_text(made / elapsed))
            if last:
                parts.append(f"took {duration(elapsed)}")
            elif self.total is not None:
                parts.append(f"{duration((self.total - self.done) * elapsed / made)} left")
        parts += [text for text in (_live_text(self.live), ended) if text]
        self.console.print(Text(f"{self.title}: {', '.join(parts)}"), soft_wrap=True)
        self.told, self.told_at = self.done, now
