"""``slimming report``: write the report of a run again, or one page that compares several runs."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimming.report.explored import Explored

DESCRIPTION = """\
Write the report of a finished run again, and print its table. In the report, a slider selects a budget, and the command
that creates this model can be copied. RUN may also be the directory of a search. Several runs are compared in one page.

  slimming report runs/demo
  slimming report runs/demo --output demo.html --figures figures
  slimming report runs/search --latency-table laptop.json
  slimming report runs/deit-s runs/deit-b --output compared.html
"""
TABLE, PAGE, COMPARED = "table.md", "report.html", "comparison.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument("run", metavar="RUN", nargs="+", help="directory of slimming run or slimming search")
    parser.add_argument("--output", metavar="FILE", help="the HTML file; a file that slimming did not write is kept "
                        "(default: RUN/report.html; comparison.html for several runs)")  # fmt: skip
    parser.add_argument("--figures", metavar="DIR", help="also write figures of the kept units per layer, accuracy "
                        "and tokens as SVG and PNG, and table.md, to DIR")  # fmt: skip
    parser.add_argument("--latency-table", metavar="FILE", help="file of slimming latency-table, to predict latency in "
                        "the explorer (default: the table of the run)")  # fmt: skip


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from slimming.cli.output import console, echo
    from slimming.core.files import exclusive
    from slimming.errors import ConfigError
    from slimming.report import print_table, read_results, write_comparison, write_figures, write_report, write_table
    from slimming.report.model import RESULTS as RESULTS_FILE
    from slimming.report.pages import RESULTS

    runs = [Path(run) for run in arguments.run]
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("A run is given twice; remove one of them.")
    explored = [_explored(run, arguments.latency_table) for run in arguments.run]
    finished = [run for run in runs if (run / RESULTS).exists()]
    if arguments.figures and not finished:
        raise ConfigError("--figures needs a finished slimming run, because a search has no budgets; drop it.")
    results = [read_results(run) for run in finished]
    for run, result in zip(finished, results, strict=True):
        print_table(RESULTS_FILE.read_values(run / RESULTS), console())
        if arguments.figures:
            directory = Path(arguments.figures) / (_unique_name(run, finished) if len(finished) > 1 else "")
            write_figures(result, directory)
            echo(f"figures and {write_table(result, directory / TABLE).name}: {directory}")
    output = Path(arguments.output) if arguments.output else None
    with exclusive(runs[0]) if len(runs) == 1 and output is None else nullcontext():
        if len(runs) == 1 and finished:
            target = write_report(runs[0], output, explored[0])
            if output is None:
                write_table(results[0], runs[0] / TABLE)
        else:
            output = output or (runs[0] / PAGE if len(runs) == 1 else Path(COMPARED))
            target = write_comparison(results, [plans for plans in explored if plans is not None], output)
    echo(f"report: {target}")


def _unique_name(run: Path, runs: list[Path]) -> str:
    """Return the name of the directory of a run, with a number if several runs have the same name."""
    same = [other for other in runs if other.resolve().name == run.resolve().name]
    return run.resolve().name + (f"-{same.index(run) + 1}" if len(same) > 1 else "")


def _explored(run: str, latency_table: str | None) -> Explored | None:
    """Return the plans of a run for the explorer; print a note and return None if the run has no search."""
    from slimming.cli.output import echo
    from slimming.errors import CheckpointError
    from slimming.runs.explore import explore
    from slimming.searching.mask_search import search_directory

    directory = Path(run)
    if search_directory(directory) is None:
        if not (directory / "results.json").exists():
            raise CheckpointError(
                f"{directory} holds no results.json and no search; give the directory of a finished run or search."
            )
        echo(f"{directory} holds no search: its report has no explorer")
        return None
    return explore(run, latency=latency_table)
