"""The one table that a run ends with on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimming.report.model import Row, Spread, parse
from slimming.report.numbers import NBSP, Scale, decimals, percent, scale
from slimming.report.table import BYTES, NONE

if TYPE_CHECKING:
    from rich.console import Console


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print budgets with what was measured: the dense model first, medians above their quartiles.

    Args:
        results: the content of ``results.json``.
        console: where to; 100 columns hold two batch sizes.

    Raises:
        CheckpointError: an entry is missing or malformed.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    found = parse(results)
    every = (found.dense, *found.rows)
    sizes = found.batch_sizes
    units = (
        scale(row.params for row in every),
        scale(row.macs for row in every),
        scale((row.memory_bytes for row in every), BYTES),
    )
    times = {
        size: Scale("ms", 1.0, decimals(row.latency_ms[size].median for row in every if size in row.latency_ms))
        for size in sizes
    }
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_lines=False)
    table.add_column("budget", style="bold", min_width=6)
    heads = [f"{name}\n{unit.unit}" for name, unit in zip(("params", "MACs", "memory"), units, strict=True)]
    heads += [f"latency\nbatch {size}\nms" for size in sizes] + [f"speed-up\nbatch {size}\n×" for size in sizes]
    for head in [*heads, "top-1\nafter\ncut, %", "top-1\nre-\ntrained"]:
        table.add_column(head, justify="right", no_wrap=True)
    for row in every:
        cells = _cells(row, found.dense, units, times)
        # Plain spaces, so that a terminal's search finds what it shows; no cell breaks but the first.
        below = [b.replace(NBSP, " ") for _, b in cells]
        texts = [Text.assemble(a, ("\n" + b, "dim")) if b else Text(a) for (a, _), b in zip(cells, below, strict=True)]
        table.add_row(row.label.replace(NBSP, " "), *texts)
    console.print(table)
    shots = [f"{row.label} {100 * row.top1_one_shot:.1f} %" for row in found.rows if row.top1_one_shot is not None]
    if shots:
        console.print(f"cut in one shot, without search or training: {', '.join(shots)}".replace(NBSP, " "))


def _cells(row: Row, dense: Row, units: tuple[Scale, Scale, Scale], times: dict[int, Scale]) -> list[tuple[str, str]]:
    """The entries of a line: what is shown, and what stands below it."""
    costs = zip(
        (row.params, row.macs, row.memory_bytes),
        (dense.params, dense.macs, dense.memory_bytes),
        units,
        strict=True,
    )
    cells = [(unit.show(own), percent(own / whole)) for own, whole, unit in costs]
    cells += [_spread(row.latency_ms.get(size), unit) for size, unit in times.items()]
    speed = Scale("×", 1.0, 2)
    cells += [("1", "") if row is dense else _spread(row.speedup.get(size), speed) for size in times]
    cells.append((NONE if row.top1_cut is None else f"{100 * row.top1_cut:.1f}", ""))
    cells.append((NONE if row.top1 is None else f"{100 * row.top1:.1f}", ""))
    return cells


def _spread(spread: Spread | None, unit: Scale) -> tuple[str, str]:
    if spread is None:
        return NONE, ""
    return unit.show(spread.median), f"{unit.show(spread.p25)}–{unit.show(spread.p75)}"
