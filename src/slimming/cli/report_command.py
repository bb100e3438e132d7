"""``slimming report``: the report of a run, written again."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Write the report of a finished run again, and show its table.

  slimming report runs/demo
  slimming report runs/demo --output demo.html
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="RUN", help="directory that slimming run wrote")
    parser.add_argument("--output", metavar="FILE", help="the HTML file (default RUN/report.html)")


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    from slimming.cli.output import console, say
    from slimming.errors import CheckpointError
    from slimming.plan import read_json
    from slimming.report import write_report
    from slimming.report.console import print_table

    directory = Path(arguments.run)
    if not (directory / "results.json").exists():
        raise CheckpointError(f"{directory} holds no results.json; give the directory of a finished slimming run.")
    results = read_json(directory / "results.json")
    target = write_report(directory, Path(arguments.output) if arguments.output else None)
    print_table(results, console())
    say(f"report: {target}")
