"""What runs leave behind, on one page: reads run folders only, needs neither torch nor a network."""

from stillhouse.report.page import write_report
from stillhouse.report.record import RunRecord, find_runs, load_run
from stillhouse.report.summary import summary_cells, summary_table

__all__ = ["RunRecord", "find_runs", "load_run", "summary_cells", "summary_table", "write_report"]
