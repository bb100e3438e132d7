"""The paper's pictures: what stays per attention head, per MLP and per block's tokens, layer by layer."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

from PIL import Image

from slimming.report.markup import Html, figure, join, svg, tag
from slimming.report.model import Kept, Layer, Picture, Results, Row, Tokens
from slimming.report.numbers import percent
from slimming.report.palette import budget_colour, dash, kind_colour, kind_name
from slimming.report.plot import NARROW, Axis, Point, Series, chart, legend

LABELS = 26.0
BAR = 150.0
TILE = 112.0
LARGE = 40_000
"""Images of more letters than this are stored as JPEG."""
OTHERS = 3
"""Images beside the first that show the last block's tokens."""
DEEP = 24
"""Up to this many layers, those without units of a kind have a line too."""


def depth_curves(results: Results) -> Html:
    """Return, per kind of unit, the share that each layer keeps under every budget."""
    kinds: list[tuple[str, Callable[[Layer], Kept | None]]] = [
        ("Query and key dimensions", lambda layer: _total(layer.qk)),
        ("Value dimensions", lambda layer: _total(layer.v)),
        ("Whole heads", lambda layer: layer.heads),
        ("MLP hidden units", lambda layer: layer.mlp),
        ("Channels", lambda layer: layer.channels),
        ("Token positions", lambda layer: layer.tokens.count if layer.tokens else None),
    ]
    panels, shown = [], []
    for title, read in kinds:
        series = [_depth_series(row, index, read) for index, row in enumerate(results.rows)]
        series = [one for one in series if one.points]
        if not series:
            continue
        told = f"{title}: share kept in each layer, one line per budget."
        shown = shown or series
        # All panels share their axes, whichever layers a kind has units in.
        depth = Axis(title="layer", low=-0.3, high=max(len(row.layers) for row in results.rows) - 0.7)
        kept = Axis(title="kept, %", low=0.0, high=104.0)
        drawing = chart(series, depth, kept, label=told, rule=100.0, size=NARROW)
        panels.append(figure(drawing, title=title))
    return join(tag("div", panels, class_="panels narrow"), legend(shown) if shown else None)


def _depth_series(row: Row, index: int, read: Callable[[Layer], Kept | None]) -> Series:
    points = []
    for place, layer in enumerate(row.layers):
        kept = read(layer)
        if kept is not None:
            tip = f"{row.label}, layer {layer.label}: {kept.kept} of {kept.of} ({percent(kept.share)})"
            points.append(Point(x=float(place), y=100 * kept.share, tip=tip))
    return Series(name=row.label, points=points, colour=budget_colour(index), dash=dash(index), marker="dot")


def _total(parts: Sequence[Kept]) -> Kept | None:
    return Kept(kept=sum(p.kept for p in parts), of=sum(p.of for p in parts)) if parts else None


def dimensions(row: Row, *, count_tokens: bool) -> Html:
    """Return what ``row`` keeps per head and per layer, as drawings side by side.

    Args:
        row: the budget.
        count_tokens: draw token counts too; pictures of the positions tell them otherwise.
    """
    layers = row.layers
    parts = []
    for role, title in (("qk", "Query and key dimensions, per head"), ("v", "Value dimensions, per head")):
        heads = [layer.qk if role == "qk" else layer.v for layer in layers]
        if any(heads):
            parts.append(figure(_heads(row, layers, heads, role), title=title))
    bars: list[tuple[str, str, list[Kept | None]]] = [
        ("head", "Whole heads", [layer.heads for layer in layers]),
        ("mlp", "MLP hidden units", [layer.mlp for layer in layers]),
        ("channel", "Channels", [layer.channels for layer in layers]),
        ("token", "Token positions", [layer.tokens.count if layer.tokens else None for layer in layers]),
    ]
    for kind, title, values in bars if count_tokens else bars[:-1]:
        # Layers of another kind have no bar here.
        shown = [(layer, kept) for layer, kept in zip(layers, values, strict=True) if kept or len(layers) <= DEEP]
        if any(values):
            parts.append(figure(_bars(row, shown, kind), title=title))
    if any(kept.kept < kept.of for kept in row.widths.values()):
        one = len(row.widths) == 1
        shown = [(Layer(name=n, label="all" if one else _stage(n)), kept) for n, kept in row.widths.items()]
        parts.append(figure(_bars(row, shown, "width"), title="Embedding width"))
    if not parts:
        return tag("p", "The results do not say what stays in each layer.")
    return tag("div", parts, class_="anatomy")


def _stage(name: str) -> str:
    """The stage that an embedding width is of: its name up to the first number."""
    parts = name.split(".")
    return ".".join(parts[: 1 + next((place for place, part in enumerate(parts) if part.isdigit()), 0)])


def _row_height(layers: Sequence[Layer]) -> float:
    return 20.0 if len(layers) <= 16 else 14.0


def _label_width(layers: Sequence[Layer]) -> float:
    return max(LABELS, 7.0 * max(len(layer.label) for layer in layers) + 10)


def _heads(row: Row, layers: Sequence[Layer], heads: Sequence[Sequence[Kept]], role: str) -> Html:
    """A grid of layers by heads; the deeper the colour, the more is kept, and the number is written in."""
    count = max(map(len, heads))
    step, height, left = min(30.0, max(11.0, 312.0 / count)), _row_height(layers), _label_width(layers)
    written = step >= 18 and height >= 16
    parts = [
        tag("text", head, x=left + (head + 0.5) * step, y=11, class_="tick mid")
        for head in range(count)
        if written or head % 4 == 0
    ]
    name = "QK" if role == "qk" else "V"
    for place, (layer, own) in enumerate(zip(layers, heads, strict=True)):
        y = 16 + place * height
        parts.append(tag("text", layer.label, x=left - 6, y=y + height / 2 + 3.5, class_="tick end"))
        for head in range(count if own else 0):
            x = left + head * step
            if head >= len(own) or own[head].kept == 0:
                parts.append(_gone(x, y, step, height, f"layer {layer.label}, head {head}: gone whole"))
                continue
            kept = own[head]
            tip = f"layer {layer.label}, head {head}: {name} {kept.kept} of {kept.of}"
            shade = f"fill:{kind_colour(role)};fill-opacity:{0.1 + 0.9 * kept.share:.2f}"
            box = tag("rect", x=x + 0.75, y=y + 0.75, width=step - 1.5, height=height - 1.5, rx=2, style=shade)
            text = (
                tag("text", kept.kept, x=x + step / 2, y=y + height / 2 + 3.5,
                    class_="cell on" if kept.share > 0.75 else "cell")
                if written else None
            )  # fmt: skip
            parts.append(tag("g", tag("title", tip), box, text))
    most = max(part.of for own in heads for part in own)
    label = f"{name} dimensions kept per layer and head under {row.label}, of {most} each."
    return svg(left + count * step + 2, 20 + len(layers) * height, label, parts)


def _gone(x: float, y: float, step: float, height: float, tip: str) -> Html:
    box = tag("rect", x=x + 1.25, y=y + 1.25, width=step - 2.5, height=height - 2.5, rx=2, class_="gone")
    cross = tag(
        "path",
        d=f"M{x + step / 2 - 3:.1f} {y + height / 2 - 3:.1f}l6 6m0 -6l-6 6",
        class_="cross",
    )
    return tag("g", tag("title", tip), box, cross)


def _bars(row: Row, shown: Sequence[tuple[Layer, Kept | None]], kind: str) -> Html:
    layers = [layer for layer, _ in shown]
    height, left = _row_height(layers), _label_width(layers)
    parts = []
    for place, (layer, kept) in enumerate(shown):
        y = 16 + place * height
        parts.append(tag("text", layer.label, x=left - 6, y=y + height / 2 + 3.5, class_="tick end"))
        if kept is None:
            parts.append(tag("text", "all", x=left, y=y + height / 2 + 3.5, class_="tick"))
            continue
        where = "stage" if kind == "width" else "layer"
        tip = f"{where} {layer.label}: {kept.kept} of {kept.of} ({percent(kept.share)})"
        full = tag("rect", x=left, y=y + 2.5, width=BAR, height=height - 5, rx=2, class_="full")
        bar = tag(
            "rect",
            x=left,
            y=y + 2.5,
            width=BAR * kept.share,
            height=height - 5,
            rx=2,
            style=f"fill:{kind_colour(kind)}",
        )
        number = tag("text", kept.kept, x=left + BAR + 38, y=y + height / 2 + 3.5, class_="tick end")
        parts.append(tag("g", tag("title", tip), full, bar, number))
    most = max(kept.of for _, kept in shown if kept)
    parts.append(tag("text", f"of {most}", x=left + BAR + 38, y=11, class_="tick end"))
    what = kind_name(kind)
    return svg(
        left + BAR + 40,
        20 + len(layers) * height,
        f"{what[0].upper()}{what[1:]} kept per {'stage' if kind == 'width' else 'layer'} under {row.label}.",
        parts,
    )


def picture_store(images: Sequence[Picture], name: str = "picture") -> Html:
    """Return the images, hidden, once each: drawings refer to them by ``name`` and their number."""
    symbols = [
        tag(
            "symbol",
            tag("image", href=_address(image), width=100, height=100, preserveAspectRatio="none"),
            id=f"{name}-{index}",
            viewBox="0 0 100 100",
            preserveAspectRatio="none",
        )
        for index, image in enumerate(images[: OTHERS + 1])
    ]
    return tag("svg", symbols, width=0, height=0, class_="store", aria_hidden="true")


def _address(image: Picture) -> str:
    """The image as it is, or as JPEG where that is much smaller."""
    if len(image.png) < LARGE:
        return f"data:image/png;base64,{image.png}"
    try:
        with Image.open(io.BytesIO(base64.b64decode(image.png))) as opened:
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, format="JPEG", quality=85)
    except OSError:  # a head of a PNG and nothing behind it; browsers show what they can
        return f"data:image/png;base64,{image.png}"
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tokens(row: Row, images: Sequence[Picture]) -> Html | None:
    """Return the positions that each block of ``row`` sees, drawn over an image; None without any."""
    if not any(layer.tokens for layer in row.layers):
        return None
    if not images:
        return tag("p", "The run kept no image of its data to draw the positions over.")
    tiles = [_tile(images[0], 0, layer.tokens, f"block {layer.label}", images[0].label) for layer in row.layers]
    last = row.layers[-1].tokens
    others = [
        _tile(image, index, last, image.label, image.label)
        for index, image in enumerate(images[1 : OTHERS + 1], start=1)
    ]
    parts = [tag("div", tiles, class_="tiles")]
    if others:
        text = "What the last block sees of other images; the positions are the same for every image."
        parts.append(tag("div", tag("p", text), tag("div", others, class_="tiles"), class_="others"))
    return join(parts)


def _tile(image: Picture, index: int, kept: Tokens | None, title: str, label: str) -> Html:
    width, height = TILE, TILE * image.height / max(1, image.width)
    parts = [tag("use", href=f"#picture-{index}", width=width, height=height)]
    told = "all positions"
    if kept is not None:
        parts.append(_cut_cells(kept, width, height))
        told = f"{kept.count.kept} of {kept.count.of} ({percent(kept.count.share)})"
    drawing = svg(width, height, f"{title}: {told} kept, over an image of class {label}", parts)
    return tag("figure", drawing, tag("figcaption", tag("b", title), tag("span", told)), class_="tile")


def _cut_cells(kept: Tokens, width: float, height: float) -> Html:
    """Darken what is cut, neighbours in a row together."""
    across, down = width / kept.columns, height / kept.rows
    way = []
    for r in range(kept.rows):
        start = None
        for c in range(kept.columns + 1):
            cut = c < kept.columns and r * kept.columns + c not in kept.kept
            if cut and start is None:
                start = c
            elif not cut and start is not None:
                way.append(f"M{start * across:.1f} {r * down:.1f}H{c * across:.1f}v{down:.1f}H{start * across:.1f}z")
                start = None
    lines = "".join(f"M{c * across:.1f} 0V{height:.1f}" for c in range(1, kept.columns))
    lines += "".join(f"M0 {r * down:.1f}H{width:.1f}" for r in range(1, kept.rows))
    return join(tag("path", d="".join(way), class_="dark") if way else None, tag("path", d=lines, class_="mesh"))
