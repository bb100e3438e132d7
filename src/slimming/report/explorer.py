"""The explorer: the controls, the empty stage that the script draws on, and the plans, packed into the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimming.report.explored import Costs, Explored, Step
from slimming.report.markup import Content, Html, join, tag
from slimming.report.model import Kept, Layer, Picture

DATA = "explorer-data"
SIDES = (("a", "A"), ("b", "B"))
LIMITS = {"macs": "MACs", "params": "parameters", "latency": "predicted time"}
SCRIPTS = ("explorer.js", "explorer_chart.js", "explorer_structure.js", "explorer_start.js")
SHOWN_IMAGES = 4
NO_SCRIPT = "The explorer needs JavaScript, which this browser does not run here; the rest of the page does without."


def explorer_section(runs: Sequence[Explored]) -> Html:
    """Return the section in which a budget is chosen.

    Args:
        runs: one search each, at least one.
    """
    several = len(runs) > 1
    lead = (
        "Every budget below is a plan that was made of one search beforehand. Move the slider, or click the chart: "
        "structure, costs and the command follow. Accuracy is shown where it was measured; between those points "
        "nobody has trained a model yet."
    )
    tables = [
        tag("div", _side(key, name, runs), class_=f"side side-{key}", id=f"side-{key}", hidden=key == "b")
        for key, name in SIDES
    ]
    views = [
        tag("div", _view(key, name), class_=f"view view-{key}", id=f"view-{key}", hidden=key == "b")
        for key, name in SIDES
    ]
    return tag(
        "section",
        tag("h2", "Choose a budget"),
        tag("p", lead, class_="lead"),
        tag("noscript", tag("p", NO_SCRIPT, class_="notice")),
        tag(
            "div",
            tag("div", tag("div", tables, _options(several), class_="controls"), _frontier(runs), class_="desk"),
            _numbers(),
            tag("p", id="said", class_="said", role="status", aria_live="polite"),
            tag("div", views, class_="views"),
            class_="explorer",
            id="explorer",
            hidden=True,
        ),
        id="explore",
    )


def packed_data(runs: Sequence[Explored]) -> Html:
    """Return the plans as JSON inside a script element that no browser runs."""
    return tag("script", _safe([_packed(run, place) for place, run in enumerate(runs)]), type="application/json",
               id=DATA)  # fmt: skip


def scripts() -> Html:
    """Return the program of the explorer, without its element."""
    texts = [(Path(__file__).parent / name).read_text("utf-8") for name in SCRIPTS]
    return Html('"use strict";\n(() => {\n' + "".join(texts) + "})();\n")


def picture_ids(run: int) -> str:
    """Return what the ids of a run's images begin with; the first run's are those of the whole page."""
    return f"picture-{run}" if run else "picture"


def _side(key: str, name: str, runs: Sequence[Explored]) -> Html:
    """The controls of one budget."""
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.steps))
    choices: list[Content] = []
    if len(runs) > 1:
        options = [
            tag("option", run.name, value=place, selected=place == (1 if key == "b" else 0))
            for place, run in enumerate(runs)
        ]
        choices.append(tag("label", "Run ", tag("select", options, id=f"run-{key}")))
    options = [tag("option", LIMITS[metric], value=metric) for metric in metrics]
    choices.append(tag("label", "Limit ", tag("select", options, id=f"limit-{key}")))
    slider = tag("input", type="range", id=f"slider-{key}", min=0, max=1, step=1, value=0)
    return tag(
        "fieldset",
        tag("legend", tag("span", name, class_="badge"), f" Budget {name}"),
        tag("div", choices, class_="choices-row"),
        tag("label", "Share of the dense model", for_=f"slider-{key}", class_="slider-label"),
        tag(
            "div",
            tag("button", "−", type="button", id=f"less-{key}", aria_label=f"Budget {name}: one step smaller"),
            slider,
            tag("button", "+", type="button", id=f"more-{key}", aria_label=f"Budget {name}: one step larger"),
            tag("output", id=f"share-{key}", for_=f"slider-{key}"),
            class_="slider",
        ),
        tag("div", id=f"goto-{key}", class_="goto", role="group", aria_label=f"Budget {name}: measured budgets"),
    )


def _options(several: bool) -> Html:
    """What concerns both budgets."""
    copies = [
        tag("label", tag("input", type="radio", name="copies", value=value, checked=value == "command"), text)
        for value, text in (("command", "command line"), ("python", "Python"))
    ]
    return join(
        tag("label", tag("input", type="checkbox", id="compare", checked=several), " Two budgets side by side",
            class_="check"),
        tag("fieldset", tag("legend", "A click on the chart copies the"), copies, class_="copies"),
    )  # fmt: skip


def _frontier(runs: Sequence[Explored]) -> Html:
    axes = {"macs": "MACs", "params": "parameters"}
    if any(run.dense.memory_bytes is not None for run in runs):
        axes["memory"] = "memory"
    if any(run.dense.latency_ms is not None for run in runs):
        axes["time"] = "predicted time"
    options = [tag("option", text, value=value) for value, text in axes.items()]
    return tag(
        "figure",
        tag("div", tag("h3", "Frontier"), tag("label", "Cost ", tag("select", options, id="axis")), class_="bar"),
        tag("div", id="frontier", class_="drawing"),
        tag("ul", id="frontier-legend", class_="legend"),
        tag("figcaption", id="frontier-note"),
        class_="frontier",
    )


def _numbers() -> Html:
    head = tag("tr", tag("td"), [tag("th", name, scope="col", id=f"head-{key}") for key, name in SIDES])
    return tag(
        "div",
        tag(
            "table",
            tag("caption", "What the chosen budgets cost"),
            tag("thead", head),
            tag("tbody", id="numbers"),
            class_="numbers",
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label="What the chosen budgets cost",
    )


def _view(key: str, name: str) -> Html:
    """The stage of one budget."""
    copy = [
        tag("button", f"Copy {text}", type="button", id=f"copy-{kind}-{key}")
        for kind, text in (("command", "command"), ("python", "Python"))
    ]
    return join(
        tag("h3", tag("span", name, class_="badge"), " ", tag("span", id=f"title-{key}")),
        tag("div", id=f"structure-{key}", class_="structure"),
        tag("div", id=f"tokens-{key}", class_="token-maps"),
        tag(
            "details", tag("summary", f"What each layer keeps under budget {name}, as a table"),
            tag("div", id=f"table-{key}", class_="scroll", tabindex=0, role="region",
                aria_label=f"What each layer keeps under budget {name}"),
        ),
        tag("h4", f"Make model {name}"),
        tag("pre", tag("code", id=f"command-{key}"), tabindex=0, aria_label=f"Command that makes model {name}"),
        tag("pre", tag("code", id=f"python-{key}"), tabindex=0, aria_label=f"Program that makes model {name}"),
        tag("p", id=f"recipe-note-{key}", class_="lead"),
        tag("div", copy, class_="copy"),
    )  # fmt: skip


def _safe(value: Any) -> Html:
    """JSON that neither ends its element nor is read as markup, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Html(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _packed(run: Explored, place: int) -> dict[str, Any]:
    """The run for the script: each state of a layer once, and plans as numbers of states."""
    states: dict[str, int] = {}
    steps = {metric: [_step(step, states) for step in found] for metric, found in run.steps.items()}
    last = next(iter(run.steps.values()))[-1]
    return {
        "name": run.name,
        "model": run.model,
        "dense": _costs(run.dense),
        "latency": run.latency,
        "labels": [layer.label for layer in last.layers],
        "widths": {name: kept.of for name, kept in last.widths.items()},
        "whole": [_whole(layer) for layer in last.layers],
        "states": [json.loads(state) for state in states],
        "steps": steps,
        "measured": [
            {"label": one.label, **_costs(one.costs), "top1": one.top1, "cut": one.top1_cut,
             "shot": one.top1_one_shot, "limit": one.limit, "share": one.share}
            for one in run.measured
        ],
        "recipe": {"command": run.recipe.command, "python": run.recipe.python, "note": run.recipe.note},
        "pictures": [
            {"id": f"{picture_ids(place)}-{index}", "label": picture.label, "shape": _shape(picture)}
            for index, picture in enumerate(run.pictures[:SHOWN_IMAGES])
        ],
    }  # fmt: skip


def _shape(picture: Picture) -> float:
    return round(picture.height / max(1, picture.width), 4)


def _costs(costs: Costs) -> dict[str, float | None]:
    time = None if costs.latency_ms is None else float(f"{costs.latency_ms:.5g}")
    return {"macs": costs.macs, "params": costs.params, "memory": costs.memory_bytes, "time": time}


def _step(step: Step, states: dict[str, int]) -> dict[str, Any]:
    layers = []
    for layer in step.layers:
        text = json.dumps(_state(layer), separators=(",", ":"))
        layers.append(states.setdefault(text, len(states)))
    found = {"share": step.share, "name": step.name, **_costs(step.costs), "score": round(step.kept_score, 5)}
    return {**found, "layers": layers, **({"widths": [k.kept for k in step.widths.values()]} if step.widths else {})}


def _state(layer: Layer) -> list[Any]:
    """QK per head, V per head, MLP, whole heads, channels, tokens: what stays, or null."""
    tokens = None
    if layer.tokens is not None:
        bits = "".join("1" if p in layer.tokens.kept else "0" for p in range(layer.tokens.count.of))
        tokens = f"{int('1' + bits, 2):x}"
    singles = [None if kept is None else kept.kept for kept in (layer.mlp, layer.heads, layer.channels)]
    return [[k.kept for k in layer.qk] or None, [k.kept for k in layer.v] or None, *singles, tokens]


def _whole(layer: Layer) -> list[Any]:
    """The same of the dense model: sizes, and the rows and columns of the grid of tokens."""
    singles: list[Kept | None] = [layer.mlp, layer.heads, layer.channels]
    grid = None if layer.tokens is None else [layer.tokens.rows, layer.tokens.columns]
    sizes = [None if kept is None else kept.of for kept in singles]
    return [[k.of for k in layer.qk] or None, [k.of for k in layer.v] or None, *sizes, grid]
