"""``slimming run``: the whole chain."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Search once, cut to every budget, retrain each from the dense model, measure, and write a report.
Stopped anywhere, the same command goes on where it was.

  slimming run config.yaml --output runs/flowers
  slimming run --model.name deit_small_patch16_224 --data.source flowers/ --budget macs=0.7 --budget macs=0.5
  slimming run config.yaml --hours 2 --retraining together --output runs/flowers

config.yaml:
  model: {name: deit_small_patch16_224}
  data: {source: flowers/, split_fraction: 0.1}
  search: {preset: default, train: {epochs: 1}}
  budgets: [{macs: 0.7}, {keep: {mlp: 0.5, head_dim: 0.7}}]
  retrain: {epochs: 10}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.cli.jobs import add_job
    from slimming.runs.config import RunConfig

    add_job(parser, RunConfig)


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    from slimming.cli.jobs import read_job
    from slimming.runs.config import RunConfig

    config, notes = read_job(RunConfig, arguments)
    run_into(config, output_of(arguments, "run"), "run", notes)


def output_of(arguments: argparse.Namespace, otherwise: str) -> Path:
    """The output directory: as given, or named after the config file."""
    if arguments.output is not None:
        return Path(arguments.output)
    return Path("runs") / (Path(arguments.config).stem if arguments.config is not None else otherwise)


def run_into(config: Any, directory: Path, command: str, notes: list[str]) -> None:
    """Run the chain in ``directory``, or show what it found there before, and end with the table."""
    from slimming.cli.output import announce, claimed, is_complete, is_main, say
    from slimming.runs.pipeline import run

    results = is_complete(directory, config)
    if results is not None:
        say(f"{directory} is complete; nothing to do. Give another --output to run again.")
    else:
        with claimed(directory, config, command):
            announce(command, config, directory, notes)
            results = run(config, directory, log=say)
    if is_main():
        show(results, directory)


def show(results: dict[str, Any], directory: Path) -> None:
    """Print the one table, and where everything lies."""
    from slimming.cli.output import console, say
    from slimming.report.console import print_table

    say("")
    print_table(results, console())
    say(f"report:  {directory / 'report.html'}")
    say(f"numbers: {directory / 'results.json'}")
