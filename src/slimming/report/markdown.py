"""The table of a run as Markdown, for a README, a pull request or a paper's draft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimming.core.files import atomic_write_text
from slimming.report.model import Results, Row, Spread
from slimming.report.numbers import NBSP, THIN, Scale, decimals, percent, scale
from slimming.report.table import BYTES, NONE


def write_table(results: Results, path: Path) -> Path:
    """Write `markdown_table` to ``path``.

    Raises:
        OutputError: the place is not writable, or the disk is full.
    """
    atomic_write_text(path, markdown_table(results))
    return path


def markdown_table(results: Results) -> str:
    """Return the dense model and one line per budget as a Markdown table, with a line on where times were taken."""
    every, sizes = (results.dense, *results.rows), results.batch_sizes
    params, macs = scale(row.params for row in every), scale(row.macs for row in every)
    memory = scale((row.memory_bytes for row in every), BYTES)
    times = {s: Scale("ms", 1.0, decimals(r.latency_ms[s].median for r in every if s in r.latency_ms)) for s in sizes}
    shot = any(row.top1_one_shot is not None for row in every)
    header = ["budget", f"params, {params.unit or '1'}", f"MACs, {macs.unit or '1'}", f"memory, {memory.unit}"]
    header += [f"ms at batch {size}" for size in sizes] + [f"speed-up at batch {size}" for size in sizes]
    header += [*(["top-1 in one shot"] if shot else []), "top-1 after the cut", "top-1 retrained"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in every:
        slim = row is not results.dense
        cells = [row.label, params.show(row.params), macs.show(row.macs), memory.show(row.memory_bytes)]
        cells += [_spread(row.latency_ms.get(size), times[size]) for size in sizes]
        cells += [_spread(row.speedup.get(size), Scale("×", 1.0, 2)) if slim else "1" for size in sizes]
        cells += [_top1(row, row.top1_one_shot)] if shot else []
        lines.append([*cells, _top1(row, row.top1_cut), _top1(row, row.top1)])
    text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    return f"# {_cell(results.name)}\n\n{text}\n\n{_note(results)}\n".replace(NBSP, " ").replace(THIN, " ")


def _spread(spread: Spread | None, unit: Scale) -> str:
    if spread is None:
        return NONE
    return f"{unit.show(spread.median)} ({unit.show(spread.p25)}–{unit.show(spread.p75)})"


def _top1(row: Row, value: float | None) -> str:
    return percent(value, 1) if value is not None else "" if row.label == "dense" else NONE


def _cell(text: str) -> str:
    """A text that neither ends its cell nor its line."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _note(results: Results) -> str:
    machine, parts = results.machine, []
    place: Sequence[object] = [machine.get("gpu") or machine.get("cpu")]
    parts.append(f"Model: {results.model.get('name', '')}. Data: {results.data.get('source', '')}.")
    if results.batch_sizes:
        threads = f", {machine['threads']} threads" if machine.get("threads") else ""
        parts.append(f"Times are medians (quartiles) on {place[0] or 'a machine that was not recorded'}{threads}.")
    return _cell(" ".join(parts))
