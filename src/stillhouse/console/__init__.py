"""What a person sees in the terminal: progress, tables, errors. In a pipe or a log file the same words come
as plain lines.

Results go to standard output, so that they can be piped; progress, notes and errors go to standard error.
"""

from stillhouse.console.live import LiveValue, ProgressMeter, phase, progress
from stillhouse.console.text import (
    MISSING,
    duration,
    messages,
    note,
    number,
    output,
    say,
    show_error,
    table,
    visible,
    warn,
)

__all__ = [
    "MISSING",
    "LiveValue",
    "ProgressMeter",
    "duration",
    "messages",
    "note",
    "number",
    "output",
    "phase",
    "progress",
    "say",
    "show_error",
    "table",
    "visible",
    "warn",
]
