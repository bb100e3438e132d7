"""Render templates, and draw charts as SVG for a page and as SVG and PNG files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import altair as alt
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from slimming.core.files import atomic_write_bytes
from slimming.core.plain_text import markdown, markdown_code
from slimming.errors import OutputError
from slimming.report import figures, theme
from slimming.report.charts import Figure
from slimming.report.model import Layer, Results, Width
from slimming.report.numbers import NBSP, THIN
from slimming.report.stamps import write_stamped

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The Vega-Lite version of Altair's specifications; vl-convert contains several versions."""
SNIPPET = "window.vegaEmbed = vegaEmbed;"
DOTS_PER_PIXEL = 3
INTERACTIVE = ("data", "datasets", "$schema", "config", "name", "params", "opacity")
"""Keys that are omitted when a chart becomes part of an image file: data is inlined, the others serve pages only."""
CHANNELS = ("stroke", "fill", "shape", "strokeDash")
"""Scales that are independent for each chart of an image file, so that each chart has a legend."""


@lru_cache(1)
def environment() -> Environment:
    """Return Jinja's environment: texts are escaped in HTML, and an undefined name is an error."""
    made = Environment(
        loader=PackageLoader("slimming.report"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    made.filters |= {"plain": plain, "cell": cell, "code": markdown_code}
    return made


def plain(text: str) -> str:
    """Return a text with plain spaces instead of non-breaking spaces."""
    return text.replace(NBSP, " ").replace(THIN, " ")


def cell(text: str) -> str:
    """Return a text escaped for a cell of a Markdown table."""
    return markdown(plain(str(text)))


def render(name: str, /, **content: Any) -> str:
    """Render a template of ``report/templates``."""
    return environment().get_template(name).render(content)


@lru_cache(1)
def chart_script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, from the installed vl-convert."""
    import vl_convert

    return vl_convert.javascript_bundle(SNIPPET, vl_version=VEGA_LITE).replace("</script", "<\\/script")


def svg(figure: Figure) -> str:
    """Return a figure as SVG, with the CSS colour variables of a page."""
    return _svg(json.dumps(figure.spec()))


@lru_cache(512)
def _svg(spec: str) -> str:
    import vl_convert

    drawn = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    return re.sub("<[^>]*>", _shortened, drawn)


def _shortened(tag: re.Match[str]) -> str:
    """An SVG tag without redundant attributes and with numbers rounded to visible precision."""
    text = re.sub(r' (aria-hidden|pointer-events|opacity|stroke-miterlimit)="(true|none|1|10)"', "", tag[0])
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)


def files(figures: Sequence[Figure], budgets: int, *, down: bool = False) -> dict[str, bytes]:
    """Return one image of several figures with their titles, on white: file suffix -> content.

    Args:
        figures: figures to draw side by side.
        budgets: number of budgets that have a colour in the figures.
        down: draw the figures below one another instead.
    """
    import vl_convert

    specs = [{**figure.spec(), "title": figure.title} for figure in figures]
    parts = [_inlined(spec, spec["datasets"]) for spec in specs]
    shared = {param["name"]: param for spec in specs for param in spec.get("params", ()) if "value" in param}
    whole = {"params": list(shared.values()), "vconcat" if down else "hconcat": parts, "spacing": 30, "padding": 12,
             "resolve": {"scale": dict.fromkeys(CHANNELS, "independent")},
             "config": {**theme.config(), "background": "white"}}  # fmt: skip
    drawn = vl_convert.vegalite_to_svg(theme.on_paper(json.dumps(whole), budgets), vl_version=VEGA_LITE)
    return {"svg": drawn.encode(), "png": vl_convert.svg_to_png(drawn, scale=DOTS_PER_PIXEL)}


def _inlined(spec: Any, data: Mapping[str, Any]) -> Any:
    """A part of a specification with inline data instead of data names, and without interactive keys."""
    if isinstance(spec, list):
        return [_inlined(one, data) for one in spec]
    if not isinstance(spec, dict):
        return spec
    named = {key: value for key, value in spec.items() if key not in INTERACTIVE}
    given = spec.get("data", {})
    own = {"data": {"values": data[given["name"]]} if given.get("name") in data else given} if given else {}
    return {**{key: _inlined(value, data) for key, value in named.items()}, **own}


def kept_picture(layers: Sequence[Layer], widths: Sequence[Width]) -> bytes | None:
    """Return a PNG of the units that a slim model keeps, for viewers without SVG; None if all units are kept."""
    parts = figures.structure(layers, widths, "this model")
    tokens = figures.tokens(layers, "this model", ())
    parts.pop("tokens", None)
    found = [part for part in parts.values() if any(one["share"] < 1 for one in part.data["units"])]
    found += [tokens] if tokens else []
    return files(found, 0)["png"] if found else None


def write_figures(results: Results, directory: Path) -> list[Path]:
    """Write the figures of a run into ``directory``, each as SVG and as PNG.

    Args:
        results: the run.
        directory: output directory; figures of slimming in it are replaced, other files are kept.

    Returns:
        Paths of the files ``structure``, ``accuracy`` and ``tokens``, as far as the run has data for them.

    Raises:
        OutputError: a file of the same name is not of slimming, the place is not writable, or the disk is full.
    """
    maps = [replace(figure, title=row.label) for row in results.rows
            if (figure := figures.tokens(row.layers or (), row.label, results.images or (), others=False))]  # fmt: skip
    written = []
    drawn = {"structure": figures.depth(results), "accuracy": figures.accuracy(results), "tokens": maps}
    for name, found in drawn.items():
        if not found:
            continue
        svg, png = directory / f"{name}.svg", directory / f"{name}.png"
        if png.exists() and not svg.exists():
            raise OutputError(f"{png} exists and was not written by slimming; it is kept. Choose another directory.")
        content = files(found, len(results.rows), down=name == "tokens")
        # The SVG has a stamp, which stands for the PNG beside it too.
        written.append(write_stamped(svg, content["svg"].decode()))
        atomic_write_bytes(png, content["png"])
        written.append(png)
    return written
