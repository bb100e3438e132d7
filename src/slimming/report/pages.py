"""Write the report of a run, or a comparison of several runs, as one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from slimming.errors import CheckpointError
from slimming.report import explorer, figures, rendering, rows, theme
from slimming.report.charts import Figure
from slimming.report.curves import read_log
from slimming.report.explored import Explored
from slimming.report.model import RESULTS as RESULTS_FILE
from slimming.report.model import Results, Search, parse
from slimming.report.numbers import duration, percent, scale
from slimming.report.stamps import write_stamped

RESULTS, REPORT, TABLE = "results.json", "report.html", "table.md"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy of a page, which does not allow it to load anything."""


@dataclass
class Page:
    """A page that is being rendered: templates add charts to it, and it collects their data for the script."""

    explored: Sequence[Explored] = ()
    drawn: dict[str, Any] = field(default_factory=dict)

    def add(self, figure: Figure) -> str:
        """Add a chart and return the id of its element."""
        name = f"chart-{len(self.drawn)}"
        self.drawn[name] = figure.spec()
        return name

    def svg(self, figure: Figure) -> Markup:
        """Return a chart as SVG, which is shown until the script replaces it, or without JavaScript."""
        return Markup(rendering.svg(figure))

    def write(self, template: str, path: Path, *, budgets: int, **content: Any) -> Path:
        """Render a template and write the page."""
        text = rendering.render(
            template,
            page=self,
            policy=POLICY,
            colours={mode: theme.variables(budgets, mode) for mode in ("light", "dark")},
            sans=theme.FONT,
            budgets=budgets,
            explorer=explorer.content(self.explored) if self.explored else None,
            **content,
        )
        return write_stamped(path, text)

    def data(self) -> dict[str, Any]:
        """Return the data of the script: charts, and the plans of the explorer."""
        found: dict[str, Any] = {"charts": self.drawn}
        if self.explored:
            found["explorer-charts"] = explorer.specs(self.explored)
            found["explorer-data"] = [explorer.packed(run) for run in self.explored]
        return found

    def script(self) -> Markup:
        """Return the libraries and programs of the page."""
        names = ["page.js", *(["explorer.js"] if self.explored else [])]
        texts = [(Path(__file__).parent / "templates" / name).read_text("utf-8") for name in names]
        return Markup("\n".join((rendering.chart_script(), '"use strict";\n(() => {', *texts, "})();")))


def read_results(directory: Path) -> Results:
    """Read and check the results of a run.

    Raises:
        CheckpointError: they are missing, truncated, damaged, without a budget, or of a newer format.

    >>> read_results(Path("no/such/run"))
    Traceback (most recent call last):
    slimming.errors.CheckpointError: no/such/run holds no results.json. Give the directory of a finished run.
    """
    source = directory / RESULTS
    if not source.is_file():
        raise CheckpointError(f"{directory} holds no {RESULTS}. Give the directory of a finished run.")
    return parse(RESULTS_FILE.read_values(source), str(source))


def write_report(run_directory: Path, output: Path | None = None, explored: Explored | None = None) -> Path:
    """Write the report of a run as one HTML file that opens without a server or a network.

    Args:
        run_directory: directory with ``results.json`` and the logs that it names.
        output: path of the file; by default ``report.html`` in the run's directory.
        explored: plans for the explorer; None omits the explorer.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: the results are missing, truncated, damaged, without a budget, or of a newer format.
        OutputError: the file exists and is not of slimming, the place is not writable, or the disk is full.
    """
    run_directory = Path(run_directory)
    results = read_results(run_directory)
    search = results.search or Search()
    searched = read_log(run_directory, search.log, search.log_sha256)
    read = {row.name: read_log(run_directory, row.log, row.log_sha256) for row in results.rows}
    logs = {name: log for name, log in read.items() if log is not None and log.lines}
    named = {search.log: searched, **{row.log: logs.get(row.name) for row in results.rows}}
    return Page([explored] if explored is not None else []).write(
        "report.html",
        run_directory / REPORT if output is None else Path(output),
        budgets=len(results.rows),
        results=results,
        search=search,
        summary=_summary(results),
        table=rows.budget_table(results),
        notes=rows.notes(results),
        figures=figures,
        searching=figures.searching(searched, results.metric),
        retraining=figures.retraining(results, logs),
        missing=[path for path, log in named.items() if path is not None and log is None],
        settings=_settings(results),
        percent=percent,
        duration=duration,
    )


def write_comparison(runs: Sequence[Results], explored: Sequence[Explored], output: Path) -> Path:
    """Write a self-contained HTML file that compares several runs.

    Args:
        runs: results of the finished runs, for tables and charts.
        explored: plans for the explorer; may be of fewer runs.
        output: path of the file.

    Raises:
        OutputError: the file exists and is not of slimming, the place is not writable, or the disk is full.
    """
    names = list(dict.fromkeys([*(run.name for run in explored), *(run.name for run in runs)]))
    return Page(explored).write(
        "comparison.html",
        output,
        budgets=max([len(runs), *(len(run.rows) for run in runs)]),
        title=" · ".join(names) if len(names) < 4 else f"{len(names)} runs",
        several=max(len(explored), len(runs)) if len(names) > 1 else 0,
        runs=[(run, rows.budget_table(run), rows.notes(run)) for run in runs],
        accuracy=figures.compared(runs),
    )


def write_table(results: Results, path: Path) -> Path:
    """Write the table of budgets as Markdown, for a README, a pull request or a paper's draft.

    Raises:
        OutputError: the file exists and is not of slimming, the place is not writable, or the disk is full.
    """
    return write_stamped(path, rendering.render("table.md", results=results, table=rows.budget_table(results)))


def _summary(results: Results) -> str:
    """A summary of the run in one or two sentences."""
    dense, budgets = results.dense, results.rows
    params = scale([dense.params])
    many = "one budget" if len(budgets) == 1 else f"{len(budgets)} budgets"
    start = "One search, cut" if results.search and results.search.log else "Cut"
    start += f" to {many}, from {params.show(dense.params)} {params.unit} parameters"
    metric = results.metric
    start += "." if dense.metric is None else f" and {metric.show(dense.metric)} {metric.name}."
    smallest = min(budgets, key=lambda row: row.macs)
    parts = [f"has {percent(smallest.macs / dense.macs)} of the MACs"]
    if smallest.speedup:
        size, speed = min(smallest.speedup.items())
        parts.append(f"runs {speed.median:.2f} times as fast at batch {size}")
    if smallest.metric is not None:
        parts.append(f"reaches {results.metric.show(smallest.metric)}")
    *first, last = parts
    return f"{start} The smallest model {', '.join(first)}{' and ' if first else ''}{last}."


def _settings(results: Results) -> list[tuple[str, list[tuple[str, str]], bool]]:
    """Blocks of settings: title, names with values, and whether the block is open at first."""
    model = {key: value for key, value in asdict(results.model).items() if key != "classes"}
    origin = {"created": results.created, "model": model, "data": results.data}
    origin |= {} if results.seed is None else {"seed": results.seed}
    place = {
        **(results.machine or {}),
        **{f"version of {key}": value for key, value in (results.versions or {}).items()},
    }
    blocks = {"Provenance": origin, "Machine and versions": place, "Settings": results.settings or {}}
    return [(title, found, title != "Settings") for title, entries in blocks.items() if (found := list(_flat(entries)))]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names with their values as text."""
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from _flat(entry, f"{prefix}{key}.")
        elif entry != "":
            yield f"{prefix}{key}", entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
