"""``slimming run``: the whole pipeline, from a search to a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Search once, cut to every budget, retrain each slim model with the dense model as teacher, measure, and write a report.
If it is interrupted, the same command resumes it.

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
    """Add the options to ``parser``."""
    from slimming.cli.configs import add_config_options
    from slimming.runs.config import RunConfig

    add_config_options(parser, RunConfig)


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from slimming.cli.configs import read_config
    from slimming.runs.config import RunConfig

    config, notes = read_config(RunConfig, arguments)
    run_in_directory(config, output_path(arguments, "run"), "run", notes)


def output_path(arguments: argparse.Namespace, default_name: str) -> Path:
    """Return ``--output``, or by default a directory in runs/ with the name of the config file or ``default_name``."""
    if arguments.output is not None:
        return Path(arguments.output)
    return Path("runs") / (Path(arguments.config).stem if arguments.config is not None else default_name)


def run_in_directory(config: Any, directory: Path, command: str, notes: list[str]) -> None:
    """Run the pipeline in ``directory`` unless it is complete, and print the results."""
    from slimming.cli.output import echo, is_main_process, print_settings, run_directory
    from slimming.runs.pipeline import finished_results, run

    results = finished_results(directory, config)
    if results is not None:
        echo(f"{directory} is complete; nothing to do. Choose another --output to run again.")
    else:
        with run_directory(directory, config, command):
            print_settings(command, config, directory, notes)
            results = run(config, directory, log=echo)
    if is_main_process():
        print_results(results, directory)


def print_results(results: dict[str, Any], directory: Path) -> None:
    """Print the table of results and the paths of the report and the results."""
    from slimming.cli.output import console, echo
    from slimming.report.console import print_table

    echo("")
    print_table(results, console())
    echo(f"report:  {directory / 'report.html'}")
    echo(f"results: {directory / 'results.json'}")
