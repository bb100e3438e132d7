"""What a slim model kept of the dense one as a PNG, for places that show no SVG, such as a model card on the hub."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from slimming.core.groups import Anatomy, Group
from slimming.report.palette import kind_name

ROW, BAR, LABEL, GAP, TITLE, CELL = 15, 130, 62, 28, 26, 5
INK, SOFT, EMPTY = (38, 43, 49), (93, 102, 112), (232, 234, 238)
COLOURS = {
    "qk": (29, 97, 164),
    "v": (163, 74, 0),
    "head": (163, 74, 0),
    "mlp": (11, 117, 104),
    "channel": (29, 97, 164),
    "token": (107, 76, 154),
    "width": (29, 97, 164),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One layer of a panel: how many units of how many, and which positions of a grid of tokens."""

    label: str
    kept: int
    of: int
    positions: frozenset[int] = field(default_factory=frozenset)


def panels(dense: Anatomy, slim: Anatomy) -> dict[str, list[Line]]:
    """What ``slim`` has of the units of ``dense``, by kind and layer; kinds that are whole everywhere are left out."""
    left = {group.name: group for group in slim.groups}
    with_dimensions = {group.site for group in dense.groups if group.kind == "head_dim"}
    found: dict[str, list[Line]] = {}
    for group in dense.groups:
        kind = group.role if group.role in ("qk", "v") else group.kind
        if kind not in COLOURS or (kind == "head" and group.site in with_dimensions):
            continue
        kept: Group | None = left.get(group.name)
        positions = frozenset(kept.token.positions) if kept is not None and kept.token is not None else frozenset()
        line = Line(label=_label(group), kept=kept.size if kept else 0, of=group.size, positions=positions)
        found.setdefault(kind, []).append(line)
    return {kind: lines for kind, lines in found.items() if any(line.kept < line.of for line in lines)}


def draw(panels: Mapping[str, Sequence[Line]], grid: tuple[int, int]) -> bytes:
    """Return the panels side by side as a PNG on white.

    Args:
        panels: what `panels` gives.
        grid: rows and columns of the positions of tokens.
    """
    drawings = [_panel(kind, lines, grid) for kind, lines in panels.items()]
    if not drawings:
        drawings = [Image.new("RGB", (1, 1), "white")]
    width = sum(drawing.width for drawing in drawings) + GAP * (len(drawings) + 1)
    height = max(drawing.height for drawing in drawings) + 2 * GAP
    whole, x = Image.new("RGB", (width, height), "white"), GAP
    for drawing in drawings:
        whole.paste(drawing, (x, GAP))
        x += drawing.width + GAP
    buffer = io.BytesIO()
    whole.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _label(group: Group) -> str:
    """The numbers in the name of a layer, or the end of its name."""
    return ".".join(re.findall(r"\d+", group.site or group.name)) or (group.site or group.name)[-9:]


def _panel(kind: str, lines: Sequence[Line], grid: tuple[int, int]) -> Image.Image:
    tiled = kind == "token" and grid[0] * grid[1] > 0
    step = grid[0] * CELL + 6 if tiled else ROW
    inner = grid[1] * CELL if tiled else BAR
    title = kind_name(kind)
    width = max(LABEL + inner + 66, 7 * len(title) + 4)
    image = Image.new("RGB", (width, TITLE + step * len(lines)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    pen.text((0, 2), title[0].upper() + title[1:], INK, ImageFont.load_default(13))
    for place, line in enumerate(lines):
        y = TITLE + place * step
        pen.text((LABEL - 8, y + step / 2 - 1), line.label, SOFT, font, anchor="rm")
        if tiled:
            _tile(pen, LABEL, y, line, grid, COLOURS[kind])
        else:
            pen.rectangle((LABEL, y + 2, LABEL + BAR, y + ROW - 3), EMPTY)
            if line.kept:
                pen.rectangle((LABEL, y + 2, LABEL + BAR * line.kept / line.of, y + ROW - 3), COLOURS[kind])
        pen.text((LABEL + inner + 8, y + step / 2 - 1), f"{line.kept}/{line.of}", SOFT, font, anchor="lm")
    return image


def _tile(
    pen: ImageDraw.ImageDraw, x: int, y: int, line: Line, grid: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    for position in range(grid[0] * grid[1]):
        down, across = divmod(position, grid[1])
        left, top = x + across * CELL, y + down * CELL
        fill = colour if position in line.positions else EMPTY
        pen.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill)
