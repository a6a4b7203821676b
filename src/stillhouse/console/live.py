"""How far a piece of work has come: rich's progress display on a terminal, plain lines elsewhere.

Pieces of work nest: a round of responses is generated while a student is trained. The inner piece then has a
line of its own below the outer one; its last line stays above them.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from stillhouse.console.format import duration, number
from stillhouse.console.text import messages, messages_through

LiveValue = float | int | str
"""A value next to the bar, such as the loss."""


class ProgressMeter(Protocol):
    """What `progress` yields."""

    def advance(self, n: float = 1, **live: LiveValue) -> None:
        """Count `n` more as done and show the newest live values, such as `loss=1.25`."""


@contextlib.contextmanager
def progress(
    title: str,
    total: float | None = None,
    *,
    done: float = 0,
    trace: str = "",
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressMeter]:
    """Show how far a piece of work has come.

    On a terminal: one line with title, bar, count, rate, time left and live values; what does not fit into
    the width is left out. Elsewhere: a plain line about every ten seconds or every tenth of the work,
    whichever comes first but never more than one a second, and a last line at the end.

    Args:
        title: what is done, such as "Training".
        total: how much there is; None if unknown.
        done: what an interrupted run had done before; it does not count into the rate.
        trace: the live value that a terminal also shows as a sparkline, such as "loss".
        console: where to write; standard error by default.
        clock: monotonic seconds.

    Example:
        >>> with progress("Training", total=400) as meter:
        ...     meter.advance(1, loss=1.25)
    """
    console = console or messages()
    kind = _LiveMeter if _is_live(console) else _PlainMeter
    with _display(console, clock) as display, _closing(kind(display, title, total, done, trace)) as meter:
        yield meter


@contextlib.contextmanager
def phase(title: str, *, quiet: bool = False, console: Console | None = None) -> Iterator[None]:
    """Show that something is going on whose length nobody can count, such as loading a model.

    Args:
        title: what is done.
        quiet: leave no line once it is over; for small work that happens again and again.
        console: where to write; standard error by default.
    """
    console = console or messages()
    if _is_live(console):
        kind = _TaskMeter if quiet else _LiveMeter
        with _display(console, time.monotonic) as display, _closing(kind(display, title)):
            yield
        return
    start = time.monotonic()
    yield
    if not quiet:
        console.print(Text(f"{title}: took {duration(time.monotonic() - start)}"), soft_wrap=True)


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


_running: list[_Display] = []
"""The display that is running, if any: a terminal has only one."""


@contextlib.contextmanager
def _display(console: Console, clock: Callable[[], float]) -> Iterator[_Display]:
    """The running display of a terminal; without a terminal one that only counts."""
    if not _is_live(console):
        yield _Display(console, clock)
    elif _running:
        yield _running[0]
    else:
        _running.append(_Display(console, clock))
        try:
            with messages_through(console), _running[0]:
                yield _running[0]
        finally:
            _running.clear()


@contextlib.contextmanager
def _closing(meter: _TaskMeter) -> Iterator[_TaskMeter]:
    ending = "interrupted"
    try:
        yield meter
        ending = ""
    finally:
        meter.close(ending)


class _TaskMeter:
    """Counts a task of rich's, whose fields hold what is shown next to its bar."""

    def __init__(
        self, display: _Display, title: str, total: float | None = None, done: float = 0, trace: str = ""
    ) -> None:
        self.display, self.trace, self.curve = display, trace, _Sparkline()
        self.id = display.add_task(
            title, total=total, depth=len(display.tasks), before=done, live={}, curve=self.curve, ending=None
        )
        self.task = display.tasks[-1]
        display.update(self.id, completed=done)

    def advance(self, n: float = 1, **live: LiveValue) -> None:
        # The dictionary is replaced, not changed: rich's thread may be drawing it.
        self.display.update(self.id, advance=n, live={**self.task.fields["live"], **live})
        value = live.get(self.trace)
        if isinstance(value, int | float) and self.task.total:
            self.curve.add(value, self.task.completed / self.task.total)

    def close(self, ending: str) -> None:
        """Take the task off the display; `ending` is empty if the work ended well."""
        self.display.update(self.id, ending=ending)
        self.display.remove_task(self.id)


class _LiveMeter(_TaskMeter):
    """Leaves its line on the terminal."""

    def close(self, ending: str) -> None:
        self.display.refresh()
        super().close(ending)
        if not self.display.tasks:
            self.display.stop()
        self.display.console.print(self.display.make_tasks_table([self.task]))


class _PlainMeter(_TaskMeter):
    """Prints a line now and then; the same words as on a terminal."""

    seconds = 10.0
    share = 0.1
    at_least = 1.0
    printed, printed_at = 0.0, 0.0

    def advance(self, n: float = 1, **live: LiveValue) -> None:
        super().advance(n, **live)
        total, since = self.task.total, _elapsed(self.task) - self.printed_at
        tenth = bool(total) and _done_here(self.task) - self.printed >= self.share * (total or 0)
        complete = total is not None and self.task.completed >= total
        if not complete and (since >= self.seconds or (tenth and since >= self.at_least)):
            self._print(_time_left(self.task))

    def close(self, ending: str) -> None:
        super().close(ending)
        self._print(f"took {duration(_elapsed(self.task))}" if _rate(self.task) else "", ending)

    def _print(self, time_text: str, ending: str = "") -> None:
        task = self.task
        self.printed, self.printed_at = _done_here(task), _elapsed(task)
        texts = [_count(task) or "0", _rate(task), time_text, *_live_texts(task), ending]
        line = f"{task.description}: {', '.join(filter(None, texts))}"
        self.display.console.print(Text(line), soft_wrap=True)


class _Sparkline:
    """A live value over the whole work, as means over equal shares of it."""

    blocks = "▁▂▃▄▅▆▇█"

    def __init__(self) -> None:
        self.buckets = [(0.0, 0)] * 16

    def add(self, value: float, share_done: float) -> None:
        if math.isfinite(value):
            at = max(0, math.ceil(min(share_done, 1.0) * len(self.buckets)) - 1)
            total, count = self.buckets[at]
            self.buckets[at] = (total + value, count + 1)

    def __str__(self) -> str:
        """A sparkline from the lowest to the highest mean: `█▅▁▃`."""
        means = [total / count for total, count in self.buckets if count]
        if len(means) < 2:
            return ""
        low, high = min(means), max(means)
        scale = (len(self.blocks) - 1) / (high - low) if high > low else 0.0
        return "".join(self.blocks[round((mean - low) * scale)] for mean in means)


class _Display(Progress):
    """Rich's progress display, with each task on one line of as many columns as fit."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._ascii = console.options.ascii_only
        self._spinner = Spinner("line" if self._ascii else "dots")
        super().__init__(
            console=console,
            get_time=clock,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # results in a pipe tear nothing and have to stay there
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Columns that are empty are left out, and while not all fit, the least wanted of them."""
        rows = [self._cells(task) for task in tasks]
        if not rows:
            return Table.grid()
        columns = [name for name in rows[0] if any(row[name] for row in rows)]
        for least_wanted in ("", "curve", "others", "bar", "rate", "first", "time", "count"):
            columns = [name for name in columns if name != least_wanted]
            table = Table.grid(*(Column(no_wrap=True) for _ in columns), padding=(0, 2))
            for row in rows:
                table.add_row(*(row[name] for name in columns))
            needed = Measurement.get(self.console, self.console.options.update(width=10_000), table)
            if needed.maximum <= self.console.width:
                break
        return table

    def _cells(self, task: Task) -> dict[str, RenderableType]:
        ending, live = task.fields["ending"], _live_texts(task)
        going_on = ending is None
        good = not ending and (task.total is None or task.completed >= task.total)
        mark, colour = (("ok" if self._ascii else "✓"), "green") if good else ("-", "yellow")
        if going_on:
            mark, colour = "  " * task.fields["depth"] + str(self._spinner.render(task.get_time())), ""
        return {
            "heading": Text.assemble((mark, colour), " ", (task.description, "bold")),
            "bar": ProgressBar(task.total, task.completed, width=24) if going_on and task.total else "",
            "count": Text(_count(task), style="green"),
            "rate": Text(_rate(task), style="cyan"),
            "time": Text((going_on and _time_left(task)) or duration(_elapsed(task)), style="cyan"),
            "first": Text(", ".join(live[:1])),
            "curve": Text("" if self._ascii else str(task.fields["curve"])),
            "others": Text(", ".join(live[1:])),
            "ending": Text(ending or "", style="yellow"),
        }


def _elapsed(task: Task) -> float:
    return task.elapsed or 0.0


def _done_here(task: Task) -> float:
    """What was done since the work went on, without what an interrupted run had done."""
    return task.completed - float(task.fields["before"])


def _count(task: Task) -> str:
    """`10/40 (25%)`."""
    if task.total is None:
        return f"{task.completed:,.0f}" if task.completed else ""
    share = f" ({task.completed / task.total:.0%})" if task.total else ""
    return f"{task.completed:,.0f}/{task.total:,.0f}{share}"


def _rate(task: Task) -> str:
    """Over the whole time: generation makes single steps too uneven for a short window."""
    made, elapsed = _done_here(task), _elapsed(task)
    if made <= 0 or elapsed <= 0:
        return ""
    rate = made / elapsed
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def _time_left(task: Task) -> str:
    if not _rate(task) or task.remaining is None:
        return ""
    return f"{duration(task.remaining * _elapsed(task) / _done_here(task))} left"


def _live_texts(task: Task) -> list[str]:
    live: dict[str, LiveValue] = task.fields["live"]
    return [f"{name.replace('_', ' ')} {number(value)}" for name, value in live.items()]
