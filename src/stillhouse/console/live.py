"""How far a piece of work has come: one line for each piece on a terminal, plain lines elsewhere.

Pieces of work may lie within each other: while a student is trained, it writes a round of responses. Then
the inner piece has a line of its own below the outer one, and what it has come to stays above them.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live as Display
from rich.spinner import Spinner
from rich.text import Text

from stillhouse.console.text import duration, messages, number, showing

Live = float | int | str
"""A live value beside the bar, such as the loss."""

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_TRACED = 480
"""Points of a traced number that are kept; beyond that, two neighbours become their mean."""


class Meter(Protocol):
    """What `progress` yields."""

    def advance(self, n: float = 1, **live: Live) -> None:
        """Count `n` more as done and show the newest live values, such as `loss=1.25`."""


@contextlib.contextmanager
def progress(
    title: str,
    total: float | None = None,
    *,
    done: float = 0,
    trace: str | None = None,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Meter]:
    """Show how far a piece of work has come.

    On a terminal: a line with title, bar, count, rate, time left and live values, as many of them as fit.
    Elsewhere: a plain line about every ten seconds or every tenth of the work, whichever comes first but
    never more than one a second, and a last line at the end.

    Args:
        title: what is done, such as "training".
        total: how much there is; None where nobody knows.
        done: what an earlier, interrupted run has done; it is not counted into the rate.
        trace: the live value whose course is drawn as a small curve on a terminal, such as "loss".
        console: where to write; standard error by default.
        clock: seconds that only grow.

    Example:
        >>> with progress("training", total=400) as meter:
        ...     meter.advance(1, loss=1.25)
    """
    console = console or messages()
    piece = _Piece(title, total, done, clock, trace)
    if console.is_terminal and not console.is_dumb_terminal:
        with _shown(piece, console):
            yield piece
        return
    meter = _PlainMeter(console, piece)
    ended = "interrupted"
    try:
        yield meter
        ended = ""
    finally:
        meter.close(ended)


@contextlib.contextmanager
def phase(title: str, *, quiet: bool = False, console: Console | None = None) -> Iterator[None]:
    """Show that something is going on whose length nobody can count, such as loading a model.

    Args:
        title: what is done.
        quiet: say nothing where there is no terminal; for small work that happens again and again.
        console: where to write; standard error by default.
    """
    console = console or messages()
    if console.is_terminal and not console.is_dumb_terminal:
        with _shown(_Piece(title, None, 0, time.monotonic, None), console, passing=quiet):
            yield
        return
    start = time.monotonic()
    yield
    if not quiet:
        console.print(Text(f"{title}: took {duration(time.monotonic() - start)}"), soft_wrap=True)


@dataclass
class _Piece:
    """The state of one piece of work; the meter of a terminal."""

    title: str
    total: float | None
    done: float
    clock: Callable[[], float]
    trace: str | None
    live: dict[str, Live] = field(default_factory=dict)
    ended: str | None = None
    """Empty where it ended well."""

    def __post_init__(self) -> None:
        self.before = self.done
        self.started = self.clock()
        self.course: list[float] = []
        self._stride, self._newest = 1, list[float]()

    def advance(self, n: float = 1, **live: Live) -> None:
        self.done += n
        self.live.update(live)
        value = live.get(self.trace) if self.trace else None
        if isinstance(value, int | float):
            self._trace(float(value))

    def _trace(self, value: float) -> None:
        """Every point of the course is the mean of equally many values."""
        self._newest.append(value)
        if len(self._newest) == self._stride:
            self.course.append(sum(self._newest) / self._stride)
            self._newest.clear()
        if len(self.course) >= MOST_TRACED:
            self.course = _thinned(self.course, MOST_TRACED // 2)
            self._stride *= 2

    @property
    def elapsed(self) -> float:
        return self.clock() - self.started

    def counted(self) -> str:
        """`10/40 (25%)`."""
        if self.total is None:
            return f"{self.done:,.0f}" if self.done else ""
        shown = f"{self.done:,.0f}/{self.total:,.0f}"
        return f"{shown} ({self.done / self.total:.0%})" if self.total else shown

    def rate(self) -> float:
        """Over the whole time: generation makes single steps too uneven for a short window."""
        made, elapsed = self.done - self.before, self.elapsed
        return made / elapsed if made > 0 and elapsed > 0 else 0.0

    def time_left(self) -> str:
        rate = self.rate()
        return f"{duration((self.total - self.done) / rate)} left" if rate and self.total is not None else ""

    def live_texts(self) -> list[str]:
        return [f"{name.replace('_', ' ')} {number(value)}" for name, value in self.live.items()]


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of a number in `width` letters at most, from its lowest to its highest value.

    Example:
        >>> sparkline([3.0, 2.0, 1.0, 1.5], 8)
        '█▅▁▃'
    """
    finite = [value for value in values if value - value == 0]  # neither nan nor infinite
    if len(finite) < 2 or width < 1:
        return ""
    few = _thinned(finite, width)
    low, high = min(few), max(few)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in few)


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """At most `most` means over equal runs of neighbours."""
    if len(values) <= most:
        return list(values)
    edges = [index * len(values) // most for index in range(most + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


_pieces: list[_Piece] = []
"""What is being shown, the outermost piece first."""
_displays: list[Display] = []
"""The display that shows them, while there is one: a terminal can have only one."""


@contextlib.contextmanager
def _shown(piece: _Piece, console: Console, passing: bool = False) -> Iterator[None]:
    """Show a piece on a terminal, below those that are shown already; a passing one leaves no line."""
    outermost = not _displays
    _pieces.append(piece)
    if outermost:
        _displays.append(Display(_Lines(), console=console, refresh_per_second=8, transient=True))
        showing(console)
        _displays[0].start()
    _displays[0].refresh()
    piece.ended = "interrupted"
    try:
        yield
        piece.ended = ""
    finally:
        _displays[0].refresh()
        _pieces.remove(piece)
        if outermost:
            _displays.pop().stop()
            showing(None)
        if not passing:
            console.print(_Line(piece, last=True))


class _Lines:
    """All pieces, one below the other."""

    def __init__(self) -> None:
        self.spinner = Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = console.get_time()
        lines = (_Line(piece, depth, self.spinner, now) for depth, piece in enumerate(tuple(_pieces)))
        yield Group(*lines)


@dataclass
class _Line:
    """One piece in one line; what does not fit is left out, the least wanted first."""

    piece: _Piece
    depth: int = 0
    spinner: Spinner | None = None
    now: float = 0.0
    last: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = not options.encoding.lower().startswith("utf")
        for bar, spark, live, rate in _sizes():
            line = self._made(plain, bar, spark, live, rate)
            if cell_len(line.plain) <= options.max_width:
                break
        line.truncate(options.max_width, overflow="ellipsis")
        yield line

    def _made(self, plain: bool, bar: int, spark: int, live: int, rate: bool) -> Text:
        piece = self.piece
        parts = [self._head(plain)]
        if bar and piece.total and not self.last:
            parts.append(_bar(piece.done / piece.total, bar, plain))
        parts.append(Text(piece.counted(), style="green"))
        parts.append(Text(self._time(rate), style="cyan"))
        texts = piece.live_texts()
        if piece.trace in piece.live and not plain:
            at = list(piece.live).index(piece.trace or "")
            texts[at] = f"{texts[at]} {sparkline(piece.course, spark)}".rstrip()
        parts.append(Text(", ".join(texts[:live])))
        if self.last and piece.ended:
            parts.append(Text(piece.ended, style="yellow"))
        return Text("  ").join(part for part in parts if part.plain)

    def _head(self, plain: bool) -> Text:
        if self.last:
            piece = self.piece
            good = not piece.ended and (piece.total is None or piece.done >= piece.total)
            mark = Text(("ok" if plain else "✓") if good else "-", style="green" if good else "yellow")
        elif plain or self.spinner is None:
            mark = Text("*")
        else:
            frame = self.spinner.render(self.now)
            mark = frame if isinstance(frame, Text) else Text("*")
        indent = Text("  " * self.depth)
        return Text.assemble(indent, mark, " ", (self.piece.title, "bold"))

    def _time(self, with_rate: bool) -> str:
        piece = self.piece
        rate = _rate_text(piece.rate()) if with_rate and piece.rate() else ""
        spent = duration(piece.elapsed)
        shown = spent if self.last else piece.time_left() or spent
        return ", ".join(part for part in (rate, shown) if part)


def _sizes() -> Iterable[tuple[int, int, int, bool]]:
    """Letters of bar and curve, how many live values, whether the rate; the richest first."""
    yield from ((24, 24, 9, True), (16, 16, 9, True), (10, 10, 9, True), (10, 8, 1, True), (0, 8, 1, True))
    yield from ((0, 8, 1, False), (0, 0, 1, False), (0, 0, 0, False))


def _bar(share: float, width: int, plain: bool) -> Text:
    full = min(width, int(share * width + 1e-9))
    ink, rest = ("#", "-") if plain else ("━", "━")
    return Text.assemble((ink * full, "bar.complete"), (rest * (width - full), "bar.back"))


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


class _PlainMeter:
    """One line now and then; the same words as on a terminal."""

    seconds = 10.0
    share = 0.1
    at_least = 1.0

    def __init__(self, console: Console, piece: _Piece) -> None:
        self.console, self.piece = console, piece
        self.told, self.told_at = piece.done, piece.started

    def advance(self, n: float = 1, **live: Live) -> None:
        piece = self.piece
        piece.advance(n, **live)
        since = piece.clock() - self.told_at
        tenth = bool(piece.total) and (piece.done - self.told) >= self.share * (piece.total or 0)
        complete = piece.total is not None and piece.done >= piece.total
        if not complete and (since >= self.seconds or (tenth and since >= self.at_least)):
            self._tell()

    def close(self, ended: str) -> None:
        self._tell(ended, last=True)

    def _tell(self, ended: str = "", *, last: bool = False) -> None:
        piece = self.piece
        parts = [piece.counted() or "0"]
        if rate := piece.rate():
            parts += [_rate_text(rate), f"took {duration(piece.elapsed)}" if last else piece.time_left()]
        parts += [*piece.live_texts(), ended]
        told = ", ".join(part for part in parts if part)
        self.console.print(Text(f"{piece.title}: {told}"), soft_wrap=True)
        self.told, self.told_at = piece.done, piece.clock()
