"""Select columns of the tables that an attention module is given, such as those of rotary positions.

One table serves all blocks, and each block may keep other pairs of dimensions. The model makes the whole table, and the
module selects the columns of the pairs that its heads keep.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.groups import Group

COLUMNS = "input_columns"
"""Key of a structure's entry: which entries of the tensors that a module is given are used."""


def columns_entry(group: Group, units: Collection[int]) -> dict[str, Any]:
    """The part of a structure's entry for the inputs of a module whose ``group`` keeps ``units``.

    It is empty if all heads are removed or every column is kept. Columns are those of the whole table, also if an
    earlier cut has left some of them out.
    """
    result = []
    for part in group.inputs:
        kept = sorted({column for unit in units for column in part.index[unit]})
        if kept and len(kept) < len({column for unit in part.index for column in unit}):
            result.append({"path": list(part.path), "dim": part.dim, "index": kept})
    return {COLUMNS: result} if result else {}


def first_units(group: Group, counts: Mapping[str, int]) -> list[int]:
    """Units of ``group``, as many as ``counts`` has and the first of each head, for a module that is timed."""
    parts = group.limits.parts
    each = max(1, counts[group.name] // len(parts))
    return [unit for head in range(len(parts)) for unit in range(sum(parts[:head]), sum(parts[:head]) + each)]


def set_columns_(module: nn.Module, entries: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Make ``module``, whose class selects its inputs, use the columns that its entry of a structure lists."""
    places = []
    for number, entry in enumerate(entries):
        set_index_(module, f"columns_index_{number}", entry["index"], device)
        # With the indices, by which models of equal sizes differ.
        places.append((tuple(entry["path"]), int(entry["dim"]), tuple(entry["index"])))
    module.__dict__["columns_places"] = tuple(places)


def select_columns(module: Any, values: Mapping[int | str, Any]) -> Mapping[int | str, Any]:
    """The arguments of ``module``, by position or keyword, with the columns that it uses."""
    for number, (path, dim, _) in enumerate(module.columns_places):
        index = module._buffers[f"columns_index_{number}"]
        values = replaced_at(values, path, lambda x, d=dim, i=index: x.index_select(d, i))
    return values


def set_index_(module: nn.Module, name: str, index: Sequence[int], device: torch.device) -> None:
    """Give ``module`` a buffer of indices, which is not in the state dict, because the structure holds them."""
    module._buffers.pop(name, None)
    module.register_buffer(name, torch.tensor(list(index), dtype=torch.int64, device=device), persistent=False)


def replaced_at(value: Any, path: Sequence[int | str], change: Any) -> Any:
    """``value``, a nested tuple, list or mapping, with what is at ``path`` changed; absent or None is left."""
    if not path:
        return change(value) if isinstance(value, Tensor) else value
    key, *rest = path
    if isinstance(value, Mapping):
        return {**value, key: replaced_at(value[key], rest, change)} if key in value else value
    if not isinstance(value, (tuple, list)) or not isinstance(key, int) or key >= len(value):
        return value
    items = list(value)
    items[key] = replaced_at(items[key], rest, change)
    return tuple(items) if isinstance(value, tuple) else items
