"""``slimming report``: the report of a run, written again; or one page over several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimming.report.explored import Explored

DESCRIPTION = """\
Write the report of a finished run again, and show its table. In the report a budget is chosen with a slider, and the
command that makes that model is copied. RUN may also be a search without a run around it; several are compared in one
page.

  slimming report runs/demo
  slimming report runs/demo --output demo.html --figures figures
  slimming report runs/search --latency-table laptop.json
  slimming report runs/deit-s runs/deit-b --output compared.html
"""
TABLE, PAGE, COMPARED = "table.md", "report.html", "comparison.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="RUN", nargs="+", help="directory that slimming run or slimming search wrote")
    parser.add_argument("--output", metavar="FILE", help="the HTML file (default RUN/report.html; comparison.html, "
                        "where there are several)")  # fmt: skip
    parser.add_argument("--figures", metavar="DIR", help="also draw what stays per layer, accuracy and token maps "
                        "there, as SVG and PNG, and write table.md")  # fmt: skip
    parser.add_argument("--latency-table", metavar="FILE", help="what slimming latency-table wrote, to predict times "
                        "in the explorer (default: that of the run)")  # fmt: skip


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    from slimming.cli.output import console, echo
    from slimming.core.files import read_json
    from slimming.errors import ConfigError
    from slimming.report import print_table, read_results, write_comparison, write_figures, write_report, write_table
    from slimming.report.pages import RESULTS

    places = [Path(run) for run in arguments.run]
    if len({place.resolve() for place in places}) < len(places):
        raise ConfigError("A run is given twice; take one of them out.")
    explored = [_explored(run, arguments.latency_table) for run in arguments.run]
    finished = [place for place in places if (place / RESULTS).exists()]
    if arguments.figures and not finished:
        raise ConfigError("--figures needs a finished slimming run; a search alone has no budgets to draw.")
    results = [read_results(place) for place in finished]
    for place, one in zip(finished, results, strict=True):
        print_table(read_json(place / RESULTS), console())
        if arguments.figures:
            directory = Path(arguments.figures) / (_own_name(place, finished) if len(finished) > 1 else "")
            write_figures(one, directory)
            echo(f"figures: {directory}, {write_table(one, directory / TABLE).name} beside them")
    output = Path(arguments.output) if arguments.output else None
    if len(places) == 1 and finished:
        target = write_report(places[0], output, explored[0])
        if output is None:
            write_table(results[0], places[0] / TABLE)
    else:
        output = output or (places[0] / PAGE if len(places) == 1 else Path(COMPARED))
        target = write_comparison(results, [one for one in explored if one is not None], output)
    echo(f"report: {target}")


def _own_name(run: Path, runs: list[Path]) -> str:
    """The name of a run's directory; with its number among several runs of one name."""
    same = [one for one in runs if one.resolve().name == run.resolve().name]
    return run.resolve().name + (f"-{same.index(run) + 1}" if len(same) > 1 else "")


def _explored(run: str, latency_table: str | None) -> Explored | None:
    """The plans of a run; None where it has no search any more, which is said."""
    from slimming.cli.output import echo
    from slimming.errors import CheckpointError
    from slimming.runs.explore import explore
    from slimming.searching.mask_search import search_directory

    place = Path(run)
    if search_directory(place) is None:
        if not (place / "results.json").exists():
            raise CheckpointError(
                f"{place} holds no results.json and no search; give the directory of a finished slimming run or search."
            )
        echo(f"{place} holds no search: its report has no explorer")
        return None
    return explore(run, latency=latency_table)
