"""HTML and SVG written from Python; every text and every attribute is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"br", "hr", "input", "meta"}
SHAPES = {"circle", "image", "line", "path", "polygon", "rect", "use"}


class Html(str):
    """Text that is markup already; any other string is escaped before it enters a page."""

    __slots__ = ()


Content = str | int | None | Iterable["Content"]


def tag(name: str, /, *children: Content, **attributes: str | int | float | bool | None) -> Html:
    """Return an element.

    Args:
        name: of the element.
        children: markup, text to be escaped, or iterables of them; None is left out.
        attributes: underscores become hyphens and one at the end goes (``class_``); None and False are left
            out, True stands alone.

    >>> tag("p", "a < b", tag("b", 1), class_="note", title='"')
    '<p class="note" title="&quot;">a &lt; b<b>1</b></p>'
    """
    head = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(_text(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inside = join(*children)
    if name in VOID:
        return Html(f"<{name}{head}>")
    if name in SHAPES and not inside:
        return Html(f"<{name}{head}/>")
    return Html(f"<{name}{head}>{inside}</{name}>")


def join(*children: Content) -> Html:
    """Return children one after another, escaped where they are not markup.

    >>> join("&", [Html("<br>"), None])
    '&amp;<br>'
    """
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, (str, int)):
            parts.append(escape(str(child)))
        elif child is not None:
            parts.append(str(join(*child)))
    return Html("".join(parts))


def svg(width: float, height: float, label: str, *children: Content, class_: str | None = None) -> Html:
    """Return a drawing of ``width`` x ``height`` pixels whose content is told by ``label``."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        width=width,
        height=height,
        class_=class_,
        role="img",
        aria_label=label,
    )


def figure(drawing: Content, caption: Content = None, *, title: Content = None, class_: str | None = None) -> Html:
    """Return a figure with a title above and a caption below its drawing."""
    return tag(
        "figure",
        tag("h4", title) if title else None,
        tag("div", drawing, class_="drawing"),
        tag("figcaption", caption) if caption else None,
        class_=class_,
    )


def _text(value: str | int | float) -> str:
    """Coordinates need no more than a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
