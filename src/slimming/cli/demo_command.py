"""``slimming demo``: the whole pipeline on an embedded model and embedded images."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Run the whole pipeline on an embedded Vision Transformer and embedded satellite images (EuroSAT): one search, three
budgets, retraining, measurements, and a report. It takes a few minutes on two CPU cores and needs no network.

  slimming demo
  slimming demo --output runs/second-demo
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument("--output", metavar="DIR", default="runs/demo", help="output directory (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from slimming import demo
    from slimming.cli.configs import config_from_values
    from slimming.cli.run_command import run_in_directory
    from slimming.runs.config import RunConfig

    run_in_directory(config_from_values(RunConfig, demo.settings()), Path(arguments.output), "demo", [])
