"""Infer the rows of attention classes that are in no table from one run of the model, and prove them on the module.

A row is used only if the module with half of its heads cut returns what it returns with these heads set to 0, in
float64 with random weights. It is the same proof that rows of the tables pass, so a row needs no confirmation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from torch import nn

from slimming.models.traced.attention_runs import AttentionRun, HeadRows, Run, head_rows, record
from slimming.models.traced.channels import CONV
from slimming.models.traced.free_heads import free_heads_class
from slimming.models.traced.heads import Heads, head_group, innermost
from slimming.models.traced.resize import cut_copy, layer_sizes
from slimming.models.traced.single_modules import PART, SingleModule, first_calls
from slimming.models.traced.tables import heads_of
from slimming.models.traced.verification import Pass, cut_difference

HINT = "docs/add-a-model.md shows how to write its row"


@dataclass(frozen=True, kw_only=True)
class InferredHeads:
    """What was inferred.

    Attributes:
        rows: name of an attention module -> its row.
        lines: for each class, a sentence with the row as it would be registered.
        unread: name of a module whose attention was recognised but is not read -> a sentence with the reason.
    """

    rows: dict[str, Heads] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


def infer_heads(model: nn.Module, forward: Pass, also: AbstractContextManager[None] | None = None) -> InferredHeads:
    """Infer the rows of the attention modules of ``model`` that are in no table.

    Args:
        model: in float64 with random weights that require gradients.
        forward: a forward pass in evaluation mode.
        also: a context in which this pass is run, to record more of it.
    """
    inferred = InferredHeads()
    known = [name for name, module in model.named_modules() if heads_of(module) is not None]
    try:
        run = record(model, forward, also)
    except RuntimeError as error:
        # Such as an operation in place on a view of a parameter, which is allowed without gradients only.
        inferred.unread[""] = f"attention: the model does not run with gradients ({str(error).splitlines()[0]})"
        return inferred
    seen: dict[Any, Heads | str | None] = {}
    lines: dict[str, list[str]] = {}
    for attention in run.attentions:
        if any(f"{attention.inside}.".startswith(f"{name}.") for name in known):
            continue
        owner = _owner(model, attention.inside)
        part = model.get_submodule(owner)
        kind = (type(part), attention.by_head.shape, *((name, each.shape) for name, each in part.named_parameters()))
        if kind in seen:
            site, found = owner, seen[kind]
        else:
            site, found = _inferred(model, run, attention, forward)
            if site == owner:
                seen[kind] = found
        if found is None or any(f"{name}.".startswith(f"{site}.") for name in [*known, *inferred.rows]):
            continue
        name_of_class = type(model.get_submodule(site)).__qualname__
        if isinstance(found, str):
            inferred.unread[site] = f"{site or 'the model'} heads of {name_of_class}: {found}. {HINT}"
        else:
            inferred.rows[site] = found
            lines.setdefault(f"register({name_of_class}, {row_text(found)})", []).append(site)
    inferred.lines.extend(
        f"heads of {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} as with {line}"
        for line, names in lines.items()
    )
    return inferred


def _owner(model: nn.Module, inside: str) -> str:
    """The innermost module around ``inside`` that holds parameters."""
    while inside and next(model.get_submodule(inside).parameters(), None) is None:
        inside = inside.rpartition(".")[0]
    return inside


def _inferred(model: nn.Module, run: Run, attention: AttentionRun, forward: Pass) -> tuple[str, Heads | str | None]:
    """The module of ``attention`` with its row, or why it is not read; no reason if it has no heads."""
    found = head_rows(model, run, attention)
    if not isinstance(found, HeadRows):
        return _owner(model, attention.inside), found
    site = _site(found)
    return site, _proved_row(model, site, found, forward)


def row_text(row: Heads) -> str:
    """``row`` as Python, without the fields that have their default."""
    default = Heads()
    fields = [name for name in row.__dataclass_fields__ if getattr(row, name) != getattr(default, name)]
    if "output" not in fields:
        fields.append("output")
    return f"Heads({', '.join(f'{name}={getattr(row, name)!r}' for name in fields)})"


def _site(found: HeadRows) -> str:
    """The innermost module that holds the layers and computes the attention."""
    return innermost((*found.rows, *found.outputs, f"{found.inside}."))


def _proved_row(model: nn.Module, site: str, found: HeadRows, forward: Pass) -> Heads | str:
    """The row of the module ``site``, or why its heads cannot be cut."""
    module = model.get_submodule(site)
    if not site:
        return "its layers are in the model itself; put the attention into a module of its own"
    prefix = f"{site}."
    named = {name.removeprefix(prefix) for name in (*found.rows, *found.outputs)}
    beside = tuple(f"{name.rpartition('.')[0]}." for name in named if "." in name)  # adapters
    others = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, *CONV)) and name not in named and not name.startswith(beside)
    ]
    if others:
        return f"{type(module).__name__} holds {others[0]} too; put the attention into a module of its own"
    row = _row(module, prefix, found)
    if isinstance(row, str):
        return row
    units = row.count if isinstance(row.count, int) else 0
    call = first_calls(model, [site], forward)[site]
    reason = f"no attribute of {type(module).__name__} holds the number {units}"
    for candidate in _candidates(module, row, found.heads, units):
        failure = _failure(module, candidate, call)
        if failure is None:
            return candidate
        reason = failure
    return reason


def _row(module: nn.Module, prefix: str, found: HeadRows) -> Heads | str:
    """The row without attributes; ``count`` is the number of units."""
    units = _units(found)
    if isinstance(units, str):
        return units
    count = max(units) + 1
    inputs: dict[str, int] = {}
    per_head: dict[str, int] = {}
    layers = dict(module.named_modules())
    for name, by_head in found.rows.items():
        path = name.removeprefix(prefix)
        rows = {row: units[head] for head, used in enumerate(by_head) for row in used}
        if path not in layers:
            owner, _, last = path.rpartition(".")
            parameter = module.get_parameter(path)
            if len(rows) == count == parameter.shape[found.dims[name]]:
                per_head[path] = found.dims[name]
                continue
            if found.dims[name]:
                return f"{path} has several entries per head in dimension {found.dims[name]}"
            # The entries of a norm or a depthwise convolution go together with its statistics and its bias.
            path = owner if last in ("weight", "bias") else path
        ranges = _blocks(rows, count)
        if ranges is None:
            return f"the rows of {path} are not in blocks of heads"
        whole = len(ranges) == 1 and len(rows) == _length(module, path)
        for start, stop, blocks in ranges:
            inputs[path if whole else f"{path}[{start}:{stop}]"] = blocks
    first, *more = (name.removeprefix(prefix) for name in found.outputs)
    return Heads(
        inputs=inputs,
        output=first,
        other_outputs=tuple(more),
        heads_last=not found.contiguous,
        per_head=per_head,
        count=count,
    )


def _length(module: nn.Module, path: str) -> int:
    named = dict(module.named_modules()).get(path)
    return (module.get_parameter(path) if named is None else next(iter(named.parameters()))).shape[0]


def _units(found: HeadRows) -> list[int] | str:
    """The unit of every head: heads that read the same rows, such as those of one key head, are one unit."""
    heads = found.heads
    joined = max(sum(1 for used in by_head if used & by_head[0]) for by_head in found.rows.values())
    if heads % joined or heads == joined:
        return "its heads do not share rows evenly"
    units = [head // joined for head in range(heads)]
    for by_head in found.rows.values():
        owner: dict[int, int] = {}
        for head, used in enumerate(by_head):
            if any(owner.setdefault(row, units[head]) != units[head] for row in used):
                return "its heads do not share rows evenly"
    return units


def _blocks(rows: Mapping[int, int], count: int) -> list[tuple[int, int, int]] | None:
    """Ranges of rows (start, stop, number of equal blocks) in which all units have equal runs in order, or None."""
    order = sorted(rows)
    if order != list(range(order[0], order[0] + len(order))):
        return None
    runs = [(unit, len(list(run))) for unit, run in groupby(order, key=rows.__getitem__)]
    if len(runs) % count:
        return None
    result: list[tuple[int, int, int]] = []
    start, before = order[0], 0
    for block in range(0, len(runs), count):
        units, sizes = zip(*runs[block : block + count], strict=True)
        if units != tuple(range(count)) or len(set(sizes)) != 1:
            return None
        stop = start + sum(sizes)
        if result and sizes[0] == before:
            first, _, blocks = result.pop()
            result.append((first, stop, blocks + 1))
        else:
            result.append((start, stop, 1))
        start, before = stop, sizes[0]
    return result


def _candidates(module: nn.Module, row: Heads, heads: int, units: int) -> Iterator[Heads]:
    """``row`` with the attributes that may depend on the number of heads, the most likely first."""
    numbers = [
        (f"{name}.{attribute}" if name else attribute, value)
        for name, inner in module.named_modules()
        if not isinstance(inner, (nn.Linear, nn.LayerNorm, *CONV))
        for attribute, value in vars(inner).items()
        if type(value) is int and not attribute.startswith("_")
    ]
    counts = [path for path, value in numbers if value in (units, heads) and value > 1]
    by_name = [path for path in counts if "head" in path.rpartition(".")[2].lower()] or counts
    widths = set(_row_lengths(module, row))
    products = [path for path, value in numbers if value in widths and path not in counts]
    for names in dict.fromkeys((tuple(by_name), tuple(counts))):
        first = next((path for path in names if dict(numbers)[path] == units), None)
        counted = replace(row, count=first or units, sizes=tuple(path for path in names if path != first))
        for candidate in (counted, replace(counted, sizes=(*counted.sizes, *products))):
            yield candidate
            if free_heads_class(type(module)) is not None:
                yield replace(candidate, free_heads=True)


def _row_lengths(module: nn.Module, row: Heads) -> Iterator[int]:
    """Numbers of rows that the heads have together: of all layers, of their blocks, and of the output."""
    for path, blocks in row.inputs.items():
        plain, _, within = path.rstrip("]").partition("[")
        start, _, stop = within.partition(":")
        length = int(stop) - int(start) if within else _length(module, plain)
        yield from (length, length // blocks)
    output = module.get_submodule(row.output)
    yield next(weight.shape[1] for weight in output.parameters() if weight.dim() > 1)


def _failure(module: nn.Module, row: Heads, call: Pass) -> str | None:
    """Why the heads of ``module`` cannot be cut by ``row``; None if they can."""
    holder = SingleModule(module)
    found = head_group(PART, module, row)
    if isinstance(found, str):
        return found
    group, attributes = found
    sizes = layer_sizes(holder, [group], [attributes], {PART} if row.free_heads else ())
    return cut_difference(holder, [group], [call], lambda model, groups, kept: cut_copy(model, groups, kept, sizes))
