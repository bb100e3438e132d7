"""Static figures of a run, ready for a paper or a slide: what stays per layer, accuracy, token positions."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from slimming.core.files import atomic_write_bytes
from slimming.errors import MissingExtraError
from slimming.report.model import Kept, Layer, Results, Tokens
from slimming.report.numbers import NBSP, scale
from slimming.report.palette import budget_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
LOOK = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "svg.hashsalt": "slimming",
    "svg.fonttype": "none",
    "savefig.dpi": 200,
}
DARKENED = 0.2
"""How much of an image's brightness is left where a token is cut."""


def write_figures(results: Results, directory: Path) -> list[Path]:
    """Draw the figures of a run into ``directory``, each as SVG and as PNG.

    Args:
        results: the run.
        directory: where to; files of the same names are replaced.

    Returns:
        The files: ``structure``, ``accuracy`` and ``tokens``, those of which the run has anything.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the place is not writable, or the disk is full.
    """
    with _drawing():
        drawn = {"structure": _structure(results), "accuracy": _accuracy(results), "tokens": _tokens(results)}
        written = []
        for name, figure in drawn.items():
            for kind in FORMATS if figure is not None else ():
                buffer = io.BytesIO()
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(buffer, format=kind, bbox_inches="tight", metadata=metadata)  # pyright: ignore[reportOptionalMemberAccess]
                atomic_write_bytes(directory / f"{name}.{kind}", buffer.getvalue())
                written.append(directory / f"{name}.{kind}")
    return written


@contextmanager
def _drawing() -> Iterator[None]:
    """Matplotlib in this module's look; settings of the process stay as they are."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise MissingExtraError(
            "Figures are drawn with matplotlib, which is not installed: pip install 'slimming[figures]'."
        ) from error
    with rc_context(LOOK):  # pyright: ignore[reportArgumentType]
        yield


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure without a window, and its axes, shape (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _colour(index: int, count: int) -> tuple[float, ...]:
    return tuple(part / 255 for part in budget_rgb(index, count))


def _line(index: int, count: int) -> dict[str, Any]:
    marker, style = MARKERS[index % len(MARKERS)], STYLES[index % len(STYLES)]
    return {"color": _colour(index, count), "marker": marker, "linestyle": style}


def _structure(results: Results) -> Figure | None:
    """The share that each layer keeps, one panel per kind of unit and one line per budget."""
    kinds: list[tuple[str, Callable[[Layer], Kept | None]]] = [
        ("QK dimensions", lambda layer: _total(layer.qk)),
        ("V dimensions", lambda layer: _total(layer.v)),
        ("heads", lambda layer: layer.heads),
        ("MLP hidden units", lambda layer: layer.mlp),
        ("channels", lambda layer: layer.channels),
        ("tokens", lambda layer: layer.tokens.count if layer.tokens else None),
    ]
    there = [(name, read) for name, read in kinds if any(read(one) for row in results.rows for one in row.layers)]
    if not there:
        return None
    figure, axes = _figure(1.0 + 1.9 * len(there), 2.3, 1, len(there))
    for place, (name, read) in enumerate(there):
        panel = axes[0][place]
        for index, row in enumerate(results.rows):
            points = [(at, 100 * kept.share) for at, one in enumerate(row.layers) if (kept := read(one)) is not None]
            x, y = zip(*points, strict=True) if points else ((), ())
            panel.plot(x, y, label=_text(row.label), **_line(index, len(results.rows)))
        panel.set(title=name, xlabel="layer", ylim=(0, 105))
        panel.set_ylabel("kept, %" if place == 0 else "")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(results.rows)))
    return figure


def _total(parts: tuple[Kept, ...]) -> Kept | None:
    return Kept(kept=sum(p.kept for p in parts), of=sum(p.of for p in parts)) if parts else None


def _accuracy(results: Results) -> Figure | None:
    """Top-1 against multiply-adds and parameters."""
    every = (results.dense, *results.rows)
    if all(row.top1 is None and row.top1_cut is None for row in every):
        return None
    figure, axes = _figure(5.6, 2.5, 1, 2)
    hollow = {"linestyle": "", "mfc": "w"}
    for panel, (name, read) in zip(
        axes[0], (("MACs", lambda row: row.macs), ("parameters", lambda row: row.params)), strict=True
    ):
        unit = scale(read(row) for row in every)
        looks = [
            ("retrained", lambda row: row.top1, {"marker": "o", "linestyle": "-", "color": "#1d61a4"}),
            ("after the cut", lambda row: row.top1_cut, {"marker": "o", "color": "#5d6670", **hollow}),
            ("in one shot", lambda row: row.top1_one_shot, {"marker": "s", "color": "#a34a00", **hollow}),
        ]
        for label, top1, look in looks:
            points = sorted((read(row) / unit.factor, 100 * top1(row)) for row in results.rows if top1(row) is not None)
            if points:
                panel.plot(*zip(*points, strict=True), label=label, **look)
        if results.dense.top1 is not None:
            at = read(results.dense) / unit.factor
            panel.plot([at], [100 * results.dense.top1], marker="D", linestyle="", color="#1a1d21", label="dense")
        panel.set(xlabel=f"{unit.unit}{'' if name == 'MACs' else ' '}{name}", xlim=(0, None))
        panel.set_ylabel("top-1, %" if panel is axes[0][0] else "")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _tokens(results: Results) -> Figure | None:
    """The positions that each block sees: one row per budget, one column per block."""
    rows = [row for row in results.rows if any(layer.tokens for layer in row.layers)]
    if not rows:
        return None
    picture = _pixels(results)
    blocks = [place for place, layer in enumerate(rows[0].layers) if any(row.layers[place].tokens for row in rows)]
    figure, axes = _figure(0.7 * len(blocks) + 1, 0.8 * len(rows) + 0.4, len(rows), len(blocks))
    for down, row in enumerate(rows):
        for across, block in enumerate(blocks):
            panel, kept = axes[down][across], row.layers[block].tokens
            panel.imshow(_masked(picture, kept), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
            for side in panel.spines.values():
                side.set_visible(False)
            if down == 0:
                panel.set_title(f"block {row.layers[block].label}", fontsize=7)
        axes[down][0].set_ylabel(_text(row.label), fontsize=7)
    return figure


def _pixels(results: Results) -> Image.Image:
    """The first image of the run; plain grey without any."""
    if not results.images:
        return Image.new("RGB", (224, 224), (200, 204, 210))
    return Image.open(io.BytesIO(base64.b64decode(results.images[0].png))).convert("RGB")


def _masked(picture: Image.Image, kept: Tokens | None) -> Image.Image:
    if kept is None:
        return picture
    grid = Image.new("L", (kept.columns, kept.rows))
    grid.putdata([255 if place in kept.kept else 0 for place in range(kept.rows * kept.columns)])
    dark = picture.point(lambda value: value * DARKENED)
    return Image.composite(picture, dark, grid.resize(picture.size, Image.Resampling.NEAREST))


def _text(label: str) -> str:
    """A label as matplotlib shows it: a dollar would begin a formula."""
    return re.sub(r"([$\\])", r"\\\1", label.replace(NBSP, " "))
