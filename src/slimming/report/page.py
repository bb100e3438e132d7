"""The page: its order, its texts, and writing it as one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimming.core.files import atomic_write_text, read_json
from slimming.errors import CheckpointError
from slimming.report import anatomy, table, training
from slimming.report.curves import Log, read_log
from slimming.report.explored import Explored
from slimming.report.explorer import explorer_section, packed_data, picture_ids, scripts
from slimming.report.markup import Content, Html, join, tag
from slimming.report.model import Results, Row, parse
from slimming.report.numbers import THIN, duration, percent, scale
from slimming.report.palette import budget_colour, budget_variables

RESULTS, REPORT = "results.json", "report.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page may load nothing from anywhere; browsers hold it to that."""
CLASSES_SHOWN = 12
MASKS_LEAD = "Above: all units. Below: one line per layer, darker where more of its masks lie."
ALONE_LEAD = (
    "Measured on training images after the search. Budgets of MACs, params, memory or time take from a kind until "
    "more of it would cost more, for what it saves, than more of another."
)


def write_report(run_directory: Path, output: Path | None = None, explored: Explored | None = None) -> Path:
    """Write the report of a run as one HTML file that opens without a server or a network.

    Args:
        run_directory: holds ``results.json`` and the logs that it names.
        output: the file to write; by default ``report.html`` in the run's directory.
        explored: plans to choose from; None leaves the explorer out.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: the results are missing, truncated, damaged, without a budget, or of a newer format.
        OutputError: the place is not writable, or the disk is full.

    >>> write_report(Path("no/such/run"))
    Traceback (most recent call last):
    slimming.errors.CheckpointError: no/such/run holds no results.json. Give the directory of a finished run.
    """
    run_directory = Path(run_directory)
    source = run_directory / RESULTS
    if not source.is_file():
        raise CheckpointError(f"{run_directory} holds no {RESULTS}. Give the directory of a finished run.")
    results = parse(read_json(source), str(source))
    searched = read_log(run_directory, results.search_log)
    read = {row.name: read_log(run_directory, row.log) for row in results.rows}
    logs = {name: log for name, log in read.items() if log is not None and log.lines}
    named = {row.name: row.log for row in results.rows if row.log is not None}
    missing = [path for name, path in named.items() if name not in logs]
    if results.search_log is not None and searched is None:
        missing.insert(0, results.search_log)
    target = run_directory / REPORT if output is None else Path(output)
    atomic_write_text(target, page(results, searched, logs, missing, explored))
    return target


def page(
    results: Results,
    searched: Log | None,
    logs: Mapping[str, Log],
    missing: list[str],
    explored: Explored | None = None,
) -> str:
    """Return the HTML of a report.

    Args:
        results: what the run found.
        searched: the log of the search.
        logs: row name -> log of its retraining.
        missing: logs that results name and that are not there; the page says so.
        explored: plans to choose from, if there are any.
    """
    runs = [explored] if explored is not None else []
    sections = [
        explorer_section(runs) if runs else None,
        _budgets(results),
        _section("accuracy", "Accuracy against cost", None, table.trade_off(results)),
        _what_stays(results),
        _search(results, searched),
        _retraining(results, logs),
        _missing(missing),
        _settings(results),
    ]
    store = anatomy.picture_store(results.images) if _tokens_searched(results) else None
    footer = f"Written by slimming {results.versions.get('slimming', '')} · {results.created}"
    return document(results.name, [_header(results)], sections, footer, store, runs, budgets=len(results.rows))


def document(
    name: str,
    header: Sequence[Content],
    sections: Sequence[Html | None],
    footer: str,
    store: Content = None,
    explored: Sequence[Explored] = (),
    *,
    budgets: int = 1,
) -> str:
    """Return a whole page.

    Args:
        name: of what it reports.
        header: what stands above its sections.
        sections: those that there are; None is left out.
        footer: the last line.
        store: images that drawings refer to.
        explored: the runs of the explorer, whose plans and images are embedded.
        budgets: how many colours of budgets there are.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name} – slimming report"),
        tag("style", Html(_style(budgets, explorer=bool(explored)))),
    )
    body = tag(
        "body",
        store,
        [
            anatomy.picture_store(run.pictures, picture_ids(place))
            for place, run in enumerate(explored)
            if place or store is None
        ],
        header,
        tag("main", [section for section in sections if section]),
        tag("footer", footer),
        packed_data(explored) if explored else None,
        tag("script", join(Html(_asset("script.js")), scripts() if explored else None)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _style(budgets: int, *, explorer: bool) -> str:
    """The style sheet, with the colours of the budgets and the rules that show the chosen one."""
    light, dark = (budget_variables(budgets, dark=mode) for mode in (False, True))
    chosen = ",".join(f".chooser:has(#choose-{i}:checked) .choice-{i}" for i in range(budgets))
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        + _asset("style.css")
        + (_asset("explorer.css") if explorer else "")
        + "@media screen{@supports selector(:has(*)){"
        + f".choice{{display:none}}{chosen}{{display:block}}}}}}\n"
    )


def _section(name: str, title: str, lead: Content, *content: Content) -> Html:
    return tag("section", tag("h2", title), tag("p", lead, class_="lead") if lead else None, *content, id=name)


def _header(results: Results) -> Html:
    model, data = results.model, results.data
    images = [
        f"{data[key]:,} {word}".replace(",", THIN)
        for key, word in (("train_images", "for training"), ("val_images", "for validation"))
        if isinstance(data.get(key), int)
    ]
    size = " × ".join(map(str, results.input_shape))
    facts = [
        ("Model", [tag("code", str(model.get("name", ""))), f", input {size}"]),
        (
            "Data",
            [
                tag("code", str(data.get("source", ""))),
                *(f", {text}" for text in [" and ".join(images)] if text),
            ],
        ),
        ("Classes", _classes(results.classes)),
        ("Machine", _machine(results.machine)),
    ]
    if data.get("note"):
        facts.insert(2, ("Note", str(data["note"])))
    return tag(
        "header",
        tag("p", "slimming report", class_="kicker"),
        tag("h1", results.name),
        tag("p", _sentence(results), class_="summary"),
        tag("dl", [tag("div", tag("dt", name), tag("dd", content)) for name, content in facts], class_="facts"),
    )


def _sentence(results: Results) -> str:
    """The whole run in a sentence or two."""
    dense, rows = results.dense, results.rows
    params = scale([dense.params])
    many = "one budget" if len(rows) == 1 else f"{len(rows)} budgets"
    start = f"One search, cut to {many}, from {params.show(dense.params)} {params.unit} parameters"
    start += "." if dense.top1 is None else f" and {percent(dense.top1, 1)} top-1."
    smallest = min(rows, key=lambda row: row.macs)
    parts = [f"The smallest model has {percent(smallest.macs / dense.macs)} of the MACs"]
    if smallest.speedup:
        size, speed = next(iter(smallest.speedup.items()))
        parts.append(f"runs {speed.median:.2f} times as fast at batch {size}")
    if smallest.top1 is not None:
        parts.append(f"reaches {percent(smallest.top1, 1)}")
    return f"{start} {_enumerate(parts)}."


def _enumerate(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _classes(names: tuple[str, ...]) -> Content:
    if len(names) <= CLASSES_SHOWN:
        return f"{len(names)}: {', '.join(names)}"
    rest = tag("details", tag("summary", "all names"), tag("p", ", ".join(names)))
    return [f"{len(names)}: {', '.join(names[:CLASSES_SHOWN])} …", rest]


def _machine(machine: Mapping[str, Any]) -> str:
    cores, threads = machine.get("cores"), machine.get("threads")
    parts = [machine.get("gpu"), machine.get("cpu"), f"{cores} cores" if cores else None]
    parts.append(f"{threads} threads" if threads else None)
    return ", ".join(str(part) for part in parts if part) or "not recorded"


def _budgets(results: Results) -> Html:
    return _section("budgets", "Budgets", None, table.budget_table(results), table.table_notes(results))


def _tokens_searched(results: Results) -> bool:
    return any(layer.tokens for row in results.rows for layer in row.layers)


def _what_stays(results: Results) -> Html | None:
    if not any(row.layers for row in results.rows):
        return None
    choices, panels = [], []
    for index, row in enumerate(results.rows):
        dot = tag("span", class_="dot", style=f"background:{budget_colour(index)}")
        choices.append(
            tag(
                "label",
                tag("input", type="radio", name="budget", id=f"choose-{index}", checked=index == 0),
                dot,
                row.label,
            )
        )
        positions = anatomy.tokens(row, results.images)
        panels.append(
            tag(
                "div",
                tag("h3", dot, row.label, tag("small", _costs(row, results.dense))),
                anatomy.dimensions(row, count_tokens=not results.images),
                tag("h4", "Token positions, block by block") if positions else None,
                positions,
                class_=f"choice choice-{index}",
            )
        )
    return _section(
        "stays",
        "What stays",
        "Each budget is read off the same search. Rows are layers from the input on, columns are heads, and a "
        "cross is a head that is gone whole. Darkened cells of an image are token positions that the block no longer "
        "sees.",
        anatomy.depth_curves(results),
        tag(
            "div",
            tag("fieldset", tag("legend", "Budget"), choices, class_="choices"),
            panels,
            class_="chooser",
        ),
    )


def _costs(row: Row, dense: Row) -> str:
    parts = [
        f"{percent(row.params / dense.params)} of the params",
        f"{percent(row.macs / dense.macs)} of the MACs",
    ]
    if row.top1 is not None:
        parts.append(f"top-1 {percent(row.top1, 1)}")
    return ", ".join(parts)


def _search(results: Results, log: Log | None) -> Html | None:
    curves, masks = training.search_curves(log), training.histograms(results)
    alone = training.sensitivity(results)
    if curves is None and masks is None and alone is None:
        return None
    took = "" if results.search_seconds is None else f" It took {duration(results.search_seconds)}."
    return _section(
        "search",
        "Search",
        f"Weights and soft masks train together, once for all budgets.{took}",
        curves,
        tag("h3", "Soft masks at the end of the search") if masks else None,
        tag("p", MASKS_LEAD, class_="lead") if masks else None,
        masks,
        tag("h3", "What cutting one kind alone does") if alone else None,
        tag("p", ALONE_LEAD, class_="lead") if alone else None,
        alone,
    )


def _retraining(results: Results, logs: Mapping[str, Log]) -> Html | None:
    curves = training.retrain_curves(results, logs)
    if curves is None:
        return None
    took = [f"{row.label} {duration(row.seconds['retrain'])}" for row in results.rows if "retrain" in row.seconds]
    return _section("retraining", "Retraining", f"Time: {'; '.join(took)}." if took else None, curves)


def _missing(paths: list[str]) -> Html | None:
    if not paths:
        return None
    names = join([[", " if i else "", tag("code", path)] for i, path in enumerate(paths)])
    text = "Logs that were not there when this was written, so that their curves are left out: "
    return tag("p", text, names, ".", class_="notice")


def _settings(results: Results) -> Html:
    origin = {
        **({} if results.seed is None else {"seed": results.seed}),
        "created": results.created,
        **dict(_flat(results.model, "model.", skip=("classes",))),
        **dict(_flat(results.data, "data.")),
    }
    place = {**dict(_flat(results.machine)), **dict(_flat(results.versions, "version of "))}
    blocks = [
        ("Provenance", origin, True),
        ("Machine and versions", place, True),
        ("Settings", dict(_flat(results.settings)), False),
    ]
    details = [
        tag(
            "details",
            tag("summary", title),
            tag(
                "div",
                tag("table", tag("tbody", map(_setting, entries.items())), class_="settings"),
                class_="scroll",
            ),
            open=opened,
        )
        for title, entries, opened in blocks
        if entries
    ]
    return _section("settings", "Settings and provenance", None, details)


def _setting(entry: tuple[str, Any]) -> Html:
    name, value = entry
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return tag("tr", tag("th", name, scope="row"), tag("td", text))


def _flat(value: Mapping[str, Any], prefix: str = "", skip: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names."""
    for key, entry in value.items():
        if key in skip or entry == "":
            continue
        if isinstance(entry, Mapping) and entry:
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry
