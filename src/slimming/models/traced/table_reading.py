"""Read the attention modules and MLPs that the tables of classes describe, with the slices at their boundaries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from slimming.core.groups import Group
from slimming.models.traced.channels import CONV, OpaqueSlices
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Attributes, Heads, columns, head_group, row_spans
from slimming.models.traced.mlp import Hidden, hidden_group
from slimming.models.traced.tables import heads_of, hidden_of

HEAD_COUNTS = ("num_heads", "heads", "num_attention_heads", "n_heads", "nhead")
"""Names of the attribute with the number of heads, to recognise attention classes that are in no table."""
_BY_HEADS = "they pass through attention, which is cut by heads"
_UNREAD = "they pass through attention whose heads slimming does not read"
_BY_HIDDEN = "they pass through a gated MLP, which is cut by hidden units"


@dataclass(frozen=True, kw_only=True)
class TableReading:
    """What the tables give for a model.

    Attributes:
        groups: heads or hidden units.
        attributes: attributes of modules that depend on the number of units.
        free_heads: names of modules whose forward has to be rewritten, see `slimming.models.traced.free_heads`.
        claimed: names of modules that torch-pruning does not trace inside -> why channels through them are not cut.
        uncovered: modules whose units cannot be cut, with the reason.
        rows: name of an attention module -> its row.
    """

    groups: list[Group] = field(default_factory=list)
    attributes: Attributes = field(default_factory=dict)
    free_heads: set[str] = field(default_factory=set)
    claimed: dict[str, str] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)
    rows: dict[str, Heads] = field(default_factory=dict)


def read_heads(model: nn.Module, inferred: Mapping[str, Heads], unread: Collection[str]) -> TableReading:
    """The heads of every attention module.

    Args:
        model: the model.
        inferred: name of a module -> its row, for modules that are in no table. They are traced inside.
        unread: names of modules whose attention is known not to be readable; the reason is given elsewhere.
    """
    reading = TableReading()
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{path}.") for path, why in reading.claimed.items() if why == _BY_HEADS):
            continue  # inside a module that has a row
        row = inferred.get(name, heads_of(module))
        if row is None:
            if _is_attention(module) and not _has_row(name, module, inferred):
                if not _touches(name, unread):
                    reading.uncovered.append(
                        f"{name} heads: slimming has no reader of the heads of {type(module).__name__}"
                    )
                reading.claimed[name] = _UNREAD
            continue
        if name not in inferred:
            reading.claimed[_join(name, row.inside)] = _BY_HEADS
        reading.rows[name] = row
        found = head_group(name, module, row)
        if row.free_heads and not has_free_heads(module) and free_heads_class(type(module)) is None:
            found = "its forward infers the head size from the embedding width, and slimming cannot rewrite it"
        elif row.free_heads:
            reading.free_heads.add(name)
        if isinstance(found, str):
            reading.uncovered.append(f"{name} heads: {found}")
        else:
            group, attributes = found
            reading.groups.append(group)
            reading.attributes.update(attributes)
    return reading


def read_hidden(model: nn.Module) -> TableReading:
    """The hidden units of every MLP that shares a layer with other units."""
    reading = TableReading()
    for name, module in model.named_modules():
        for row in hidden_of(module):
            reading.claimed[_join(name, row.inside)] = _BY_HIDDEN
            found = hidden_group(name, module, row)
            if isinstance(found, str):
                reading.uncovered.append(f"{name} hidden units: {found}")
                continue
            group, attributes = found
            reading.groups.append(group)
            for path, own in attributes.items():
                known = reading.attributes.setdefault(path, {})
                known.update({key: known[key] + dim if key in known else dim for key, dim in own.items()})
    return reading


def opaque_slices(model: nn.Module) -> dict[str, OpaqueSlices]:
    """The tensors at the inputs and outputs of the modules in the tables, by the innermost module that holds them."""
    result: dict[str, OpaqueSlices] = {}
    for name, module in model.named_modules():
        for row in (heads_of(module), *hidden_of(module)[:1]):
            slices = None if row is None else _opaque_slices(name, module, row)
            if row is None or slices is None:
                continue
            inside = _join(name, row.inside)
            known = result.get(inside, OpaqueSlices())
            result[inside] = OpaqueSlices(
                inputs=known.inputs + slices.inputs,
                outputs=known.outputs + slices.outputs,
                norms=known.norms + slices.norms,
            )
    return result


def _opaque_slices(name: str, module: nn.Module, row: Heads | Hidden) -> OpaqueSlices | None:
    """The tensors at the inputs and outputs of ``module``; None if its row does not give both."""
    apart, tied_paths = (row.other_inputs, row.tied) if isinstance(row, Heads) else ((), ())
    read = [column for path in row.inputs if path not in apart for column in columns(module, path)]
    made = row_spans(module, row.output.partition("[")[0])  # a range is one of its columns
    if not read or not made:
        return None
    # A depthwise convolution has no dimension of its input channels.
    inputs = [(tensor, 1, "consumes") for tensor, length in read if length == read[0][1]]
    modules = dict(module.named_modules())
    layers = (nn.LayerNorm, nn.Linear, *CONV)
    tied = {path: modules[path] for path in tied_paths if isinstance(modules.get(path), layers)}
    for path, layer in tied.items():
        inputs += [(f"{path}.{parameter}", 0, "produces") for parameter, _ in layer.named_parameters()]
        inputs += [] if isinstance(layer, nn.LayerNorm) else [(f"{path}.weight", 1, "consumes")]
    return OpaqueSlices(
        inputs=tuple((_join(name, tensor), dim, side) for tensor, dim, side in inputs),
        outputs=tuple((_join(name, span.tensor), 0) for span in made if span.length == made[0].length),
        norms=tuple(_join(name, path) for path, layer in tied.items() if isinstance(layer, nn.LayerNorm)),
    )


def _join(name: str, path: str) -> str:
    return ".".join(part for part in (name, path) if part)


def _has_row(name: str, module: nn.Module, inferred: Mapping[str, Heads]) -> bool:
    """Whether the module or one inside it has a row, or it is inside one that has."""
    return _touches(name, inferred) or any(heads_of(inner) is not None for inner in module.modules())


def _touches(name: str, others: Collection[str]) -> bool:
    """Whether one of ``others`` is in the module ``name`` or holds it."""
    return any(f"{other}.".startswith(f"{name}.") or (other and f"{name}.".startswith(f"{other}.")) for other in others)


def _is_attention(module: nn.Module) -> bool:
    """Whether the name of the module's class contains attention, and an attribute counts more than one head."""
    has_name = any(word in type(module).__name__.lower() for word in ("attention", "attn", "mhsa"))
    return has_name and any(type(vars(module).get(count)) is int and vars(module)[count] > 1 for count in HEAD_COUNTS)
