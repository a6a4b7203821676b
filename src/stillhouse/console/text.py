"""Lines and tables: results to standard output, notes, warnings and errors to standard error."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from stillhouse.errors import StillhouseError

MISSING = "–"

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_live: list[Console] = []
"""The console of a live display, while there is one."""


def output() -> Console:
    """Standard output as rich sees it at this moment."""
    return Console(highlight=False)


def messages() -> Console:
    """Standard error as rich sees it at this moment; during a live display its console."""
    return _live[-1] if _live else Console(stderr=True, highlight=False)


@contextlib.contextmanager
def messages_through(console: Console) -> Iterator[None]:
    """Let messages go through the console of a live display, which they would tear otherwise."""
    _live.append(console)
    try:
        yield
    finally:
        _live.remove(console)


def visible(text: str) -> str:
    """The text with control characters made visible.

    Model text and names from other people's folders may hold escape sequences for the terminal, null bytes,
    or marks that turn the direction of everything that follows. They are shown as `␀`, `␛` or `[U+202E]`;
    tabs and line breaks stay.
    """
    return _HIDDEN.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"[U+{code:04X}]"


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
        title=None if title is None else Text(visible(title)),
        caption=None if caption is None else Text(visible(caption)),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for index, name in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in rows)
        drawn.add_column(
            Text(visible(name)),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
            vertical="top",
        )
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(visible(number(cell))) for cell in row))
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
    """Print one line of result to standard output, never broken and never read as markup.

    Text for programs, such as JSON, goes through `typer.echo` instead, as it is.
    """
    output().print(Text(visible(text)), soft_wrap=True)


def note(text: str) -> None:
    """Print one line about what goes on to standard error."""
    messages().print(Text(visible(text)), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    messages().print(Text.assemble(("warning: ", "bold yellow"), visible(text)), soft_wrap=True)


def show_error(error: StillhouseError) -> int:
    """Print the message of a deliberate error to standard error, without a traceback.

    Returns:
        The exit code: 2 where the user can mend the input, 3 where the environment failed.
    """
    text = visible(str(error))
    gap = "\n" if "\n" in text else " "
    messages().print(Text.assemble(("error:", "bold red"), gap, text), soft_wrap=True)
    return error.exit_code


def _is_number(cell: object) -> bool:
    """True for numbers, dashes and text that starts like a number, such as `57.1 ± 0.3`."""
    if cell is None or isinstance(cell, int | float):
        return True
    text = str(cell).strip().lstrip("+-−±×")
    return text[:1].isdigit() or text in ("", MISSING, "nan", "inf")
