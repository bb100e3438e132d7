"""The table of budgets on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimming.report.model import parse
from slimming.report.numbers import NBSP
from slimming.report.rows import NONE, ONE_SHOT, budget_table

if TYPE_CHECKING:
    from rich.console import Console


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print the measurements of all budgets: the dense model first, medians above their quartiles.

    Args:
        results: the content of ``results.json``.
        console: output console; 100 columns suffice for two batch sizes.

    Raises:
        CheckpointError: an entry is missing or malformed.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    found = budget_table(parse(results))
    shown = [place for place, column in enumerate(found.columns) if column.part != ONE_SHOT]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_lines=False)
    table.add_column("budget", style="bold", min_width=6)
    for column in (found.columns[place] for place in shown):
        head = "\n".join(part for part in (column.name, column.part.replace("the ", ""), column.unit) if part)
        table.add_column(head.replace("after cut", "cut"), justify="right", no_wrap=True)
    for line in found.lines:
        cells = [line.cells[place] for place in shown]
        # Plain spaces, so that the search of a terminal finds the text; only the first cell may be wrapped.
        texts = [Text.assemble(cell.text, (f"\n{cell.below.replace(NBSP, ' ')}", "dim")) if cell.below
                 else Text(cell.text) for cell in cells]  # fmt: skip
        table.add_row(line.label.replace(NBSP, " "), *texts)
    console.print(table)
    place = next((place for place, column in enumerate(found.columns) if column.part == ONE_SHOT), None)
    if place is not None:
        shots = [f"{line.label} {line.cells[place].text} %" for line in found.lines if line.cells[place].text != NONE]
        console.print(f"cut in one shot, without search or training: {', '.join(shots)}".replace(NBSP, " "))
