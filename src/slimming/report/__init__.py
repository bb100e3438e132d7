"""The report of a run: self-contained pages, image files, and the table of results on the console."""

from slimming.report.console import print_table
from slimming.report.pages import read_results, write_comparison, write_report, write_table
from slimming.report.rendering import kept_picture, write_figures

__all__ = [
    "kept_picture", "print_table", "read_results", "write_comparison", "write_figures", "write_report", "write_table",
]  # fmt: skip
