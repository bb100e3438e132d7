"""Draw the pictures of docs/images from committed results and from the demo's model.

    python docs/make_pictures.py

``accuracy.svg`` and ``structure.svg`` are made of ``benchmarks/results`` alone, and a test compares them with it. The
others show the demo's model as it is scored here, in about a minute.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from slimming.report import rendering
from slimming.report.charts import Figure, lines, look
from slimming.report.model import Kept, Layer, Row, Tokens, parse

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
INK, SOFT, GONE = "#1a1d21", "#5d6670", "#e3e6ea"
QK, V, MLP, TOKEN = "#1d61a4", "#a34a00", "#0b7568", "#6b4c9a"
BUDGETS = {0.3: "#0b7568", 0.5: "#4fa79b", 0.7: "#a5d3cc"}
"""Budget -> colour of the units that the model of this budget is the smallest to keep."""
STYLE = f"""svg{{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}}
text{{font-size:12px;fill:{INK}}}.soft,.tick{{font-size:11px;fill:{SOFT}}}.title{{font-size:11px;fill:{SOFT};font-weight:600}}
.head{{font-weight:600}}.mid{{text-anchor:middle}}.end{{text-anchor:end}}
.arrow{{stroke:{SOFT};stroke-width:1.5;fill:none}}"""
METHODS = {
    "one-shot": ("one shot", "#0b7568"),
    "search": ("search", "#1d61a4"),
    "paper": ("the paper's search", "#6b4c9a"),
    "hessian, global": ("Torch-Pruning, hessian", "#a34a00"),
    "taylor, global": ("Torch-Pruning, taylor", "#c98f4e"),
    "magnitude, global": ("Torch-Pruning, magnitude", "#8a8f96"),
    "random, per layer": ("random", "#b9bec4"),
}


class Html(str):
    """Text that is markup already; any other string is escaped before it enters a picture."""


def join(*children: Any) -> Html:
    """Children one after another, escaped where they are not markup; None is left out, lists are opened."""
    parts = [join(*child) if isinstance(child, list | tuple) else child for child in children if child is not None]
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def tag(name: str, /, *children: Any, **attributes: str | int | float | None) -> Html:
    """An element; underscores of attributes become hyphens, and coordinates have two digits."""
    values = {
        key.rstrip("_").replace("_", "-"): f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
        for key, value in attributes.items()
        if value is not None
    }
    head = "".join(f' {key}="{escape(str(value))}"' for key, value in values.items())
    inside = join(*children)
    return Html(f"<{name}{head}>{inside}</{name}>" if inside else f"<{name}{head}/>")


def text(words: str | int, x: float, y: float, class_: str | None = None, **more: str) -> Html:
    """A line of text."""
    return tag("text", words, x=x, y=y, class_=class_, **more)


def box(x: float, y: float, width: float, height: float, colour: str, **more: Any) -> Html:
    """A filled rectangle."""
    return tag("rect", x=x, y=y, width=width, height=height, fill=colour, **more)


def drawing(width: float, height: float, label: str, *parts: Any) -> str:
    """A picture that stands alone: with its style, on white."""
    ground = box(0, 0, width, height, "#fff")
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": float(width), "height": float(height)}
    content = tag("style", Html(STYLE)), ground, *parts
    return tag("svg", *content, xmlns="http://www.w3.org/2000/svg", **size, role="img", aria_label=label) + "\n"


def accuracy() -> str:
    """Top-1 straight after the cut over the MACs that are left, of some methods; means over seeds."""
    content = json.loads((RESULTS / "accuracy.json").read_text("utf-8"))
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, row in content["rows"].items():
        model, part, method, budget, _ = key.split("/")
        if (model, part) == ("vit-cifar10", "all"):
            found[method][budget].append((100 * row["macs"], 100 * row["top1"]))
    dense = 100 * content["dense"]["vit-cifar10"]["top1"]["0"]
    records, styles = [], {}
    for place, (method, (name, colour)) in enumerate(METHODS.items()):
        points = [(mean(x for x, _ in seeds), mean(y for _, y in seeds)) for seeds in found[method].values()]
        styles[name] = look(place, colour)
        records += [{"series": name, "x": x, "y": y} for x, y in sorted([*points, (100.0, dense)])]
    x, y = "multiply-adds left, %", "top-1 straight after the cut, %"
    label = "Top-1 straight after the cut over the multiply-adds that are left, one line per method."
    chart = lines(records, styles, {"series": "method", "x": x, "y": y}, x=x, y=y, x_domain=[28, 101], rule=dense,
                  size=(620, 300))  # fmt: skip
    figure = Figure(title="Dotted: the dense model", told=label, chart=chart, data={"points": records})
    return rendering.files([figure], 0)["svg"].decode() + "\n"


def structure(name: str = "macs-0.30") -> str:
    """What stays of the demo's model under one budget: per layer its heads, hidden units and token positions."""
    results = parse(json.loads((RESULTS / "demo.json").read_text("utf-8")))
    row = next(row for row in results.rows if row.name == name)
    parts = [
        text("attention heads: QK and V dimensions", 60, 20, "title"),
        text("hidden units of the MLP", 352, 20, "title"),
        text("patches that are seen", 560, 20, "title"),
    ]
    layers = row.layers or ()
    for place, layer in enumerate(layers):
        parts.append(layer_picture(layer, place, 34 + 58 * place))
    bottom = 34 + 58 * len(layers)
    parts.append(text(_sentence(row, results.dense), 12, bottom + 14, "soft"))
    label = f"What stays of the demo's Vision Transformer at {name}: heads, hidden units and patches of each layer."
    return drawing(720, bottom + 28, label, parts)


def _sentence(row: Row, dense: Row) -> str:
    macs, params = 100 * row.macs / dense.macs, 100 * row.params / dense.params
    return (
        f"Coloured stays, grey is cut. {macs:.0f} % of the multiply-adds, {params:.0f} % of the parameters; "
        f"top-1 {100 * (dense.top1 or 0):.1f} % before, {100 * (row.top1 or 0):.1f} % after retraining."
    )


def layer_picture(layer: Layer, place: int, y: float) -> Html:
    """One layer of `structure`, 50 pixels high."""
    parts = [text(f"layer {place + 1}", 12, y + 22, "soft")]
    for head, (qk, v) in enumerate(zip(layer.per_head("qk"), layer.per_head("v"), strict=True)):
        x = 60 + 92 * head
        parts += [bar(qk, x, y + 4, 84, QK), bar(v, x, y + 22, 84, V)]
    if layer.mlp:
        parts += [bar(layer.mlp, 352, y + 4, 180, MLP, 32)]
    if layer.tokens:
        parts.append(patches(layer.tokens, 560, y))
        count = layer.tokens.count
        parts.append(text(f"{count.kept} of {count.of}", 618, y + 24, "soft"))
    return join(parts)


def bar(kept: Kept, x: float, y: float, width: float, colour: str, height: float = 14) -> Html:
    """A bar as long as what stays, before a grey one as long as what was; the number written in."""
    whole = box(x, y, width, height, GONE)
    stays = box(x, y, width * kept.share, height, colour)
    inside = kept.share > 0.25
    place = x + 5 if inside else x + width * kept.share + 5
    number = text(kept.kept, place, y + height / 2 + 4, style=f"font-size:10px;fill:{'#fff' if inside else INK}")
    return join(whole, stays, number)


def patches(tokens: Tokens, x: float, y: float) -> Html:
    """The grid of patches, those that stay in colour."""
    rows, columns = tokens.grid
    size = 48 / rows
    cells = []
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        colour = TOKEN if index in tokens.kept else GONE
        cells.append(box(x + column * size, y + row * size, size - 0.8, size - 0.8, colour))
    return join(cells)


def budgets(scores: Mapping[str, Sequence[float]], keeps: Mapping[float, Mapping[str, frozenset[int]]]) -> str:
    """The hidden units of every layer in the order of their scores, coloured by the budgets that keep them."""
    parts = [text("hidden units of each MLP, the most needed first", 70, 20, "title")]
    for place, (name, values) in enumerate(scores.items()):
        y = 32 + 26 * place
        order = sorted(range(len(values)), key=lambda unit: -values[unit])
        parts.append(text(f"layer {place + 1}", 12, y + 14, "soft"))
        parts.append(box(70, y, 600, 20, GONE))
        for budget in sorted(keeps, reverse=True):
            kept = keeps[budget][name]
            parts += [box(70 + 600 * a / len(order), y, 600 * (b - a) / len(order), 20, BUDGETS[budget])
                      for a, b in runs([unit in kept for unit in order])]  # fmt: skip
    y = 32 + 26 * len(scores) + 10
    low, *between, high = sorted(keeps)
    words = [(BUDGETS[low], "stays at every budget")]
    words += [(BUDGETS[share], f"stays from {100 * share:.0f} % on") for share in between]
    words.append((BUDGETS[high], f"stays at {100 * high:.0f} % only"))
    for place, (colour, word) in enumerate([*words, (GONE, "goes at every budget")]):
        x = 70 + 152 * place
        parts.append(join(box(x, y, 12, 12, colour), text(word, x + 18, y + 10, "soft")))
    label = "One order of hidden units and three budgets: whatever a small budget keeps, a larger one keeps too."
    return drawing(690, y + 26, label, parts)


def runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Begin and end of every stretch of True.

    >>> runs([True, True, False, True])
    [(0, 2), (3, 4)]
    """
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def cut(kept: frozenset[int], of: int, features: int) -> str:
    """The two matrices of an MLP before and after the cut: rows of the first and columns of the second go."""
    scale = 0.62
    tall, wide, small = of * scale, features * scale, len(kept) * scale
    stretches = runs([unit in kept for unit in range(of)])
    rows = [box(20, 40 + a * scale, wide, (b - a) * scale, MLP) for a, b in stretches]
    columns = [box(130 + a * scale, 40, (b - a) * scale, wide, V) for a, b in stretches]
    before = [
        text(f"fc1: {of} × {features}", 20, 28, "title"),
        text(f"fc2: {features} × {of}", 130, 28, "title"),
        box(20, 40, wide, tall, GONE), box(130, 40, tall, wide, GONE), rows, columns,
        text("a hidden unit: a row of fc1, an entry of its bias,", 130, 125, "soft"),
        text("and a column of fc2. Grey ones go.", 130, 141, "soft"),
    ]  # fmt: skip
    left = 150 + tall + 60
    arrow = tag("path", d=f"M{left - 52:.0f} 70h36m-7 -6l7 6l-7 6", class_="arrow")
    after = [
        text(f"{len(kept)} × {features}", left, 28, "title"),
        text(f"{features} × {len(kept)}", left + 95, 28, "title"),
        box(left, 40, wide, small, MLP), box(left + 95, 40, small, wide, V),
    ]  # fmt: skip
    label = f"An MLP before and after the cut: {len(kept)} of {of} hidden units stay, and the matrices are smaller."
    return drawing(left + 110 + max(small, 60), 40 + tall + 14, label, before, arrow, after)


def stages(facts: Mapping[str, str]) -> str:
    """The way from a model to a smaller one, with the numbers of the demo's model."""
    parts: list[Any] = []
    width, gap = 124, 18
    for place, (name, words) in enumerate(facts.items()):
        x = 10 + place * (width + gap)
        parts.append(box(x, 20, width, 76, "#f2f5f7", rx=6, stroke="#c9d0d6"))
        parts.append(text(name, x + width / 2, 42, "head mid"))
        parts += [text(line, x + width / 2, 62 + 15 * i, "soft mid") for i, line in enumerate(words.split("\n"))]
        if place:
            parts.append(tag("path", d=f"M{x - gap + 2} 58h{gap - 4}m-5 -4l5 4l-5 4", class_="arrow"))
    label = "From a model to a smaller one: " + ", ".join(facts)
    return drawing(20 + len(facts) * (width + gap) - gap, 116, label, parts)


def from_the_model() -> dict[str, str]:
    """The pictures that need the demo's model: it is scored in one shot and planned for three budgets."""
    import slimming
    from slimming.demo import settings

    given = settings()["model"]
    model, _ = slimming.open_model(slimming.ModelConfig(**given))
    images = slimming.load_images(settings()["data"]["source"], model, 128)
    groups = slimming.describe(model)
    scored = slimming.score(model, images)
    plans = slimming.plans(scored, [slimming.Budget(macs=share) for share in BUDGETS])
    half = plans[1]
    keeps = {
        share: {name: frozenset(units) for name, units in plan.kept.items()}
        for share, plan in zip(BUDGETS, plans, strict=True)
    }
    hidden = {name: values.tolist() for name, values in scored.scores.items() if name.endswith("mlp.hidden")}
    name = next(iter(hidden))
    before, after = slimming.cost(model), slimming.cost(scored.model, half)
    return {
        "budgets.svg": budgets(hidden, keeps),
        "cut.svg": cut(keeps[0.5][name], len(hidden[name]), 96),
        "stages.svg": stages(
            {
                "model": f"{before.params / 1e6:.2f} M parameters\n{before.macs / 1e6:.1f} M MACs",
                "groups": f"{len(groups)} groups of\n{sum(group.size for group in groups):,} units",
                "scores": "one number\nfor every unit",
                "plan": f"half the MACs:\n{sum(map(len, half.kept.values())):,} units stay",
                "cut": f"{after.params / 1e6:.2f} M parameters\n{after.macs / 1e6:.1f} M MACs",
            }
        ),
    }


def from_results() -> dict[str, str]:
    """The pictures that committed results are enough for."""
    return {"accuracy.svg": accuracy(), "structure.svg": structure()}


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    for pictures in (from_results, from_the_model):
        for name, picture in pictures().items():
            (IMAGES / name).write_text(picture, "utf-8")
            print(f"docs/images/{name}: {len(picture) / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
