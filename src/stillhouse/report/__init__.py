"""What runs leave behind, on one page: reads run folders only, needs neither torch nor a network."""

from stillhouse.report.comparison import print_comparison, summary_table
from stillhouse.report.page import write_report
from stillhouse.report.record import RunRecord, find_runs, load_run, load_runs

__all__ = [
    "RunRecord",
    "find_runs",
    "load_run",
    "load_runs",
    "print_comparison",
    "summary_table",
    "write_report",
]
