"""The report of a run: one HTML file that opens anywhere, and the table that ends a run on the console."""

from slimming.report.compare import read_results, write_comparison
from slimming.report.console import print_table
from slimming.report.figures import write_figures
from slimming.report.markdown import write_table
from slimming.report.page import write_report

__all__ = ["print_table", "read_results", "write_comparison", "write_figures", "write_report", "write_table"]
