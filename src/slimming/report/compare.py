"""One page over several runs: their budgets in one explorer, one chart and one table each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimming.core.files import atomic_write_text, read_json
from slimming.errors import CheckpointError
from slimming.report import table
from slimming.report.explored import Explored
from slimming.report.explorer import explorer_section
from slimming.report.markup import Content, Html, figure, join, tag
from slimming.report.model import Results, Row, parse
from slimming.report.numbers import percent, scale
from slimming.report.page import RESULTS, document
from slimming.report.palette import budget_colour, dash
from slimming.report.plot import Axis, Point, Series, chart, legend


def read_results(directory: Path) -> Results:
    """Read and check the results of a run.

    Raises:
        CheckpointError: they are missing, truncated, damaged, without a budget, or of a newer format.
    """
    source = directory / RESULTS
    if not source.is_file():
        raise CheckpointError(f"{directory} holds no {RESULTS}; give the directory of a finished slimming run.")
    return parse(read_json(source), str(source))


def write_comparison(runs: Sequence[Results], explored: Sequence[Explored], output: Path) -> Path:
    """Write one HTML file over several runs; like the report of one, it needs nothing else.

    Args:
        runs: what was measured, for tables and charts; runs that are not finished have none.
        explored: the plans of the explorer; may be fewer.
        output: the file.

    Raises:
        OutputError: the place is not writable, or the disk is full.
    """
    names = list(dict.fromkeys([*(run.name for run in explored), *(run.name for run in runs)]))
    title = " · ".join(names) if len(names) < 4 else f"{len(names)} runs"
    counted = (
        f"{max(len(explored), len(runs))} runs" if len(explored) + len(runs) > 2 or len(names) > 1 else "One search"
    )
    header = tag(
        "header",
        tag("p", "slimming report", class_="kicker"),
        tag("h1", title),
        tag("p", f"{counted} in one page. Latency compares only where it was measured on one machine.",
            class_="summary") if len(names) > 1 else None,
    )  # fmt: skip
    sections = [
        explorer_section(explored) if explored else None,
        _accuracy(runs) if runs else None,
        *(_budgets(run, place) for place, run in enumerate(runs)),
    ]
    budgets = max([len(runs), *(len(run.rows) for run in runs)])
    text = document(title, [header], sections, "Written by slimming", None, explored, budgets=budgets)
    atomic_write_text(output, text)
    return output


def _accuracy(runs: Sequence[Results]) -> Html:
    """Top-1 of every run against multiply-adds and parameters, one line per run."""
    panels: list[Content] = []
    for name, read in (("MACs", lambda row: row.macs), ("parameters", lambda row: row.params)):
        unit = scale(read(row) for run in runs for row in (run.dense, *run.rows))
        series = []
        for place, run in enumerate(runs):
            known = sorted((row for row in (run.dense, *run.rows) if row.top1 is not None), key=read)
            points = [_point(run, row, read(row) / unit.factor) for row in known]
            if points:
                colour, line = budget_colour(place), dash(place)
                series.append(Series(name=run.name, points=points, colour=colour, dash=line, marker="disc"))
        if not series:
            continue
        told = "; ".join(p.tip for one in series for p in one.points if p.tip)
        x = Axis(title=f"{unit.unit}{'MACs for one image' if name == 'MACs' else ' parameters'}", low=0.0)
        drawing = chart(series, x, Axis(title="Top-1, %"), label=f"Top-1 accuracy against {name}. {told}.")
        panels.append(figure(join(drawing, legend(series)), title=f"Accuracy against {name}"))
    content = tag("div", panels, class_="panels") if panels else tag("p", "No accuracy was measured in these runs.")
    lead = "Dense models and retrained budgets, one line per run."
    return tag("section", tag("h2", "Accuracy against cost"), tag("p", lead, class_="lead"), content, id="accuracy")


def _point(run: Results, row: Row, x: float) -> Point:
    top1 = row.top1 or 0.0
    return Point(x=x, y=100 * top1, tip=f"{run.name}, {row.label}: {percent(top1, 1)}")


def _budgets(run: Results, place: int) -> Html:
    images = " × ".join(map(str, run.input_shape))
    lead = join(tag("code", str(run.model.get("name", ""))), f", input {images}, data ",
                tag("code", str(run.data.get("source", ""))))  # fmt: skip
    return tag(
        "section",
        tag("h2", run.name),
        tag("p", lead, class_="lead"),
        table.budget_table(run),
        table.table_notes(run),
        id=f"run-{place}-budgets",
    )
