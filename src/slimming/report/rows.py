"""The table of budgets, shared by the page, the console and the Markdown file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from slimming.core.metric import TOP1
from slimming.report.model import Results, Row, Spread
from slimming.report.numbers import THIN, Scale, decimals, percent, scale

BYTES = ("B", "kB", "MB", "GB", "TB")
NONE = "–"
ONE_SHOT = "in one shot"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of numbers.

    Attributes:
        name: name of the measurement.
        unit: unit of the numbers; may be empty.
        part: distinguishes columns of the same name; empty if there is only one.
    """

    name: str
    unit: str = ""
    part: str = ""

    @property
    def title(self) -> str:
        """The name with its unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number: its measured value, its text, and the text below it."""

    value: float | None = None
    text: str = NONE
    below: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model, the dense model (``index`` None) or that of a budget, with a cell per column."""

    name: str
    label: str
    index: int | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The dense model and one line per budget."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    def groups(self) -> list[tuple[str, list[Column]]]:
        """Adjacent columns with the same title."""
        found: list[tuple[str, list[Column]]] = []
        for column in self.columns:
            if not found or found[-1][0] != column.title:
                found.append((column.title, []))
            found[-1][1].append(column)
        return found


def budget_table(results: Results) -> Table:
    """Return the table of a run: costs, latencies, speed-ups and accuracies."""
    rows, sizes = (results.dense, *results.rows), results.batch_sizes
    units = [scale(row.params for row in rows), scale(row.macs for row in rows),
             scale((row.memory_bytes for row in rows), BYTES)]  # fmt: skip
    times = [Scale("ms", 1.0, decimals(row.latency_ms[size].median for row in rows if size in row.latency_ms))
             for size in sizes]  # fmt: skip
    shots = [ONE_SHOT] if any(row.metric_one_shot is not None for row in rows) else []
    names = ("params", "MACs", "memory")
    columns = [Column(name=name, unit=unit.unit) for name, unit in zip(names, units, strict=True)]
    columns += [Column(name="latency", unit="ms", part=f"batch {size}") for size in sizes]
    columns += [Column(name="speed-up", unit="×", part=f"batch {size}") for size in sizes]
    metric = results.metric
    stages = [*shots, *(["after the cut"] if any(row.metric_cut is not None for row in rows) else []), "retrained"]
    columns += [Column(name=metric.name, unit=metric.unit, part=part) for part in stages]

    def quality(value: float | None, dense: float | None = None) -> Cell:
        if value is None:
            return Cell()
        below = "" if dense is None else metric.change(value, dense)
        return Cell(value=value, text=metric.number(value), below=below)

    def cells(row: Row) -> Iterator[Cell]:
        dense = results.dense
        for unit, own, whole in zip(units, _costs(row), _costs(dense), strict=True):
            yield Cell(value=own, text=unit.show(own), below=percent(own / whole))
        for size, unit in zip(sizes, times, strict=True):
            yield _spread(row.latency_ms.get(size), unit)
        for size in sizes:
            yield Cell(value=1, text="1") if row is dense else _spread(row.speedup.get(size), Scale("×", 1.0, 2))
        if shots:
            yield quality(row.metric_one_shot)
        if "after the cut" in stages:
            yield quality(row.metric_cut)
        yield quality(row.metric, None if row is dense else dense.metric)

    lines = [Line(name=row.name, label=row.label, index=place - 1 if place else None, cells=tuple(cells(row)))
             for place, row in enumerate(rows)]  # fmt: skip
    return Table(columns=tuple(columns), lines=tuple(lines))


def _costs(row: Row) -> tuple[int, int, int]:
    return row.params, row.macs, row.memory_bytes


def _spread(spread: Spread | None, unit: Scale) -> Cell:
    if spread is None:
        return Cell()
    below = f"{unit.show(spread.p25)}–{unit.show(spread.p75)}"
    return Cell(value=spread.median, text=unit.show(spread.median), below=below)


def notes(results: Results) -> list[str]:
    """Return notes that a reader needs to interpret the numbers of the table."""
    found = [
        "One multiply-add is one MAC; MACs and memory are for one image, memory is weights plus the peak of "
        "activations. Shares below are of the dense model.",
        "Latency is that of this machine, not a claim about others: medians, with the quartiles below; dense and "
        "slim models took turns, and the speed-up is the median of the ratio turn by turn.",
    ]
    images, top1 = results.data.get("val_images"), results.dense.top1
    if results.metric != TOP1:
        better = "higher" if results.metric.higher_is_better else "lower"
        counted = f" on {images:,} images".replace(",", THIN) if isinstance(images, int) else ""
        found.append(f"Of {results.metric.name}{counted}, {better} values are better. Differences to dense are below.")
    elif isinstance(images, int) and images > 0 and top1 is not None:
        error = 1.96 * math.sqrt(max(top1 * (1 - top1), 1e-9) / images)
        counted = f"{images:,}".replace(",", THIN)
        found.append(
            f"Top-1 is counted on {counted} validation images: at {percent(top1, 1)} the sampling error is "
            f"±{100 * error:.1f} points (95 % interval). Differences to dense, below, are in points."
        )
    return found
