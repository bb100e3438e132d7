"""``slimming demo``: the whole chain on what comes with slimming."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
The whole chain on an embedded Vision Transformer and embedded satellite images (EuroSAT): one search, three
budgets, retraining, measuring, a report. It takes some minutes on two CPU cores and needs no network.

  slimming demo
  slimming demo --output runs/second-demo
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--output", metavar="DIR", default="runs/demo", help="where everything goes (%(default)s)")


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    from slimming import demo
    from slimming.cli.configs import config_from_values
    from slimming.cli.run_command import run_in_directory
    from slimming.runs.config import RunConfig

    run_in_directory(config_from_values(RunConfig, demo.settings()), Path(arguments.output), "demo", [])
