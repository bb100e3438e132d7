"""Texts from files, made safe to show: without control characters, Markdown marks, and places of this machine."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of characters that move the cursor, change the direction of the text, or are not visible."""
ABSOLUTE = re.compile(r"(/|~|file:/|\\\\|[A-Za-z]:[\\/])")


def printable(text: str) -> str:
    r"""Return a text with its control characters escaped, except line breaks and tabs.

    Names of files and classes may contain control sequences, which a terminal would execute.

    >>> print(printable("a\x1b[31mb\u202ec\ud800"))
    a\x1b[31mb\u202ec\ud800
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) not in HIDDEN
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def on_one_line(text: str) -> str:
    r"""Return a text as `printable` does, with its line breaks replaced by spaces.

    >>> on_one_line("size mismatch:\n\tcopying a param")
    'size mismatch: copying a param'
    """
    return printable(re.sub(r"\s*[\n\r\t\v\f\x85\u2028\u2029]\s*", " ", text).strip())


def markdown(text: Any) -> str:
    r"""Return a text for one line of Markdown, such as a cell of a table, that shows its marks instead of using them.

    >>> markdown("a|b\n`c` <i>[d](e)")
    'a\\|b \\`c\\` &lt;i&gt;\\[d\\](e)'
    """
    escaped = re.sub(r"([\\`|*\[\]#])", r"\\\1", on_one_line(str(text)))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(text: Any) -> str:
    r"""Return a text as a code span of Markdown, whatever backticks it contains.

    >>> markdown_code("a`b")
    '`` a`b ``'
    """
    line = on_one_line(str(text)) or " "
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    mark, space = "`" * (longest + 1), " " if "`" in line else ""
    return f"{mark}{space}{line}{space}{mark}"


def without_places(value: Any) -> Any:
    """Return nested values in which absolute paths are replaced by their last component.

    Reports and checkpoints are handed on; the directories of the machine that made them are of no use there.

    >>> without_places({"source": "/home/ada/flowers/", "val": "flowers/val", "files": ["~/a.json"]})
    {'source': 'flowers', 'val': 'flowers/val', 'files': ['a.json']}
    """
    if isinstance(value, Mapping):
        return {key: without_places(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(entry) for entry in value]
    if isinstance(value, str) and ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value
