"""The report of a run: one HTML file that opens anywhere, and the table that ends a run on the console."""

from slimming.report.console import print_table
from slimming.report.page import write_report

__all__ = ["print_table", "write_report"]
