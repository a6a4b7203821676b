"""What a person sees in the terminal: progress, tables, errors. In a pipe or a log file the same words come
as plain lines.

Results go to standard output, so that they can be piped; progress, notes and errors go to standard error.
"""

from stillhouse.console.format import duration, json_text, number, visible
from stillhouse.console.live import LiveValue, ProgressMeter, phase, progress
from stillhouse.console.table import Table, TableCell, TableColumn, make_table, print_table
from stillhouse.console.text import (
    messages,
    note,
    output,
    print_log_records,
    quieten_imports,
    say,
    show_error,
    warn,
)

__all__ = [
    "LiveValue",
    "ProgressMeter",
    "Table",
    "TableCell",
    "TableColumn",
    "duration",
    "json_text",
    "make_table",
    "messages",
    "note",
    "number",
    "output",
    "phase",
    "print_log_records",
    "print_table",
    "progress",
    "quieten_imports",
    "say",
    "show_error",
    "visible",
    "warn",
]
