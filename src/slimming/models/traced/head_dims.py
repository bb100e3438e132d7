"""Find the QK and V dimensions inside attention heads, and prove on each attention module that they can be cut.

`slimming.models.traced.dimension_rows` says which rows and columns belong to each dimension. Which attributes of the
module hold sizes of its heads, and whether its forward computes the scale of the logits from them, is tried out: the
first choice with which the cut module gives the outputs of the masked one is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from slimming.core.copies import copied
from slimming.core.formulas import Dim, Ratio
from slimming.core.groups import Group, Limits, Scale, Slices
from slimming.models.family import Kept
from slimming.models.traced.attention_runs import record
from slimming.models.traced.channels import BATCH_NORM, CONV
from slimming.models.traced.dimension_rows import Dimensions, query_key_dimensions, value_dimensions
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Attributes, Heads, head_group, head_slices, size_at
from slimming.models.traced.resize import cut_copy, layer_sizes
from slimming.models.traced.single_modules import PART, SingleModule, first_calls
from slimming.models.traced.verification import (
    REFUSED,
    Pass,
    cut_difference,
    half,
    masked_outputs,
    output_difference,
)

_UNDECIDED = (
    "the example has one token here, so that queries and keys have no effect; give a larger image as example_inputs"
)
_PART_OF_NAME = ("dim", "size", "hidden", "key", "val", "width")
"""Words in the names of attributes that hold the size of a head."""


@dataclass(frozen=True, kw_only=True)
class HeadDims:
    """What was found.

    Attributes:
        groups: QK, V and both coupled, for every attention module that has them.
        attributes: attributes that depend on the head size if the number of heads is fixed, and if it is not.
        free_heads: names of modules whose forward has to be rewritten.
        head_scales: name of a module -> its `slimming.core.groups.LayerSizes.head_scale`.
        uncovered: attention modules whose QK or V cannot be cut, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    attributes: tuple[Attributes, Attributes] = field(default_factory=lambda: ({}, {}))
    free_heads: set[str] = field(default_factory=set)
    head_scales: dict[str, tuple[str, str]] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The dimensions of an attention module, and what has to change in it with their number; names are relative.

    Attributes:
        dims: role -> its dimensions.
        tied: whether QK and V must keep equally many.
        per_head: path of an attribute -> the role whose number of dimensions per head it holds.
        totals: path of an attribute -> the role whose number in all heads it holds, and of which multiple.
        scales: paths of attributes that hold one over the square root of the QK size of a head.
        scaled: side whose rows are multiplied to preserve the scale of the logits, which the forward computes from the
            size that the heads have, or takes from ``scales``; None if it does neither.
        free_heads: whether the forward is rewritten.
    """

    dims: Mapping[str, Dimensions] = field(default_factory=dict)
    tied: bool = False
    per_head: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    scales: tuple[str, ...] = ()
    scaled: str | None = None
    free_heads: bool = False


class _Found(NamedTuple):
    """What was found for one module.

    Attributes:
        choice: the choice that passes its proof.
        reasons: role -> why it cannot be cut.
        decided: whether queries and keys have an effect in the example, so that the proof says something about them.
    """

    choice: _Choice
    reasons: dict[str, str]
    decided: bool = True


def read_head_dims(model: nn.Module, rows: Mapping[str, Heads], forward: Pass) -> HeadDims:
    """The head dimensions of every attention module.

    Args:
        model: in float64 with random weights.
        rows: name of an attention module -> its row.
        forward: a forward pass in evaluation mode.
    """
    result = HeadDims()
    known: dict[Any, _Found] = {}
    found: dict[str, _Found] = {}
    scaled: dict[type[nn.Module], str | None] = {}
    for name, call in first_calls(model, rows, forward).items():
        module, row = model.get_submodule(name), rows[name]
        if row.why_not is not None:
            continue  # the reason is given for the heads
        shapes = [(path, tensor.shape) for path, tensor in [*module.named_parameters(), *module.named_buffers()]]
        key = (type(module), repr(row), *shapes, *(tensor.shape for tensor in call.call.tensors))
        if key not in known:
            known[key] = _found(module, row, call)
        found[name] = known[key]
        if "qk" in found[name].choice.dims and found[name].decided:
            scaled[type(module)] = found[name].choice.scaled
    for name, (choice, reasons, decided) in found.items():
        module = model.get_submodule(name)
        if "qk" in choice.dims and not decided:
            if type(module) in scaled:
                choice = replace(choice, scaled=scaled[type(module)])
            else:
                choice, reasons = _Choice(), {"qk": _UNDECIDED, "v": _UNDECIDED}
        if choice.dims:
            _add(result, name, module, choice)
        for role, reason in reasons.items():
            result.uncovered.append(f"{name} {role.upper()} dimensions: {reason}")
    return result


def _add(result: HeadDims, name: str, module: nn.Module, choice: _Choice) -> None:
    """Add what was found for one module to ``result``."""
    result.groups.extend(_groups(name, module, choice))
    for attributes, heads in zip(result.attributes, (None, f"{name}.heads"), strict=True):
        attributes.update(_attributes(name, choice, heads))
    if choice.free_heads:
        result.free_heads.add(name)
    if choice.scaled is not None:
        result.head_scales[name] = (f"{name}.qk", choice.scaled)


def _found(module: nn.Module, row: Heads, call: Pass) -> _Found:
    """The choice for ``module`` that passes its proof, and why a part of its heads cannot be cut."""
    slices = head_slices(PART, module, row)
    if isinstance(slices, str):
        return _Found(_Choice(), {"qk": slices, "v": slices})
    slices = tuple(replace(part, tensor=part.tensor.removeprefix(f"{PART}.")) for part in slices)
    dims, reasons = _dimensions(module, row, slices, call)
    tries: list[tuple[dict[str, Dimensions], bool]] = []
    if len(dims) == 2:
        tries += [(dims, False)]
        tries += [(dims, True)] if dims["qk"].parts == dims["v"].parts else []
    tries += [({role: dims[role]}, False) for role in ("v", "qk") if role in dims]
    for roles, tied in tries:
        failure = "no attribute holds the size of its heads"
        for choice in _choices(module, row, roles, tied, len(slices[0].index)):
            proved, reason = _proved(module, row, choice, call)
            if proved is not None:
                others = {role: reasons.get(role, failure) for role in ("qk", "v") if role not in roles}
                return _Found(proved, others, _has_effect(module, proved, call))
            failure = reason
        for role in roles:
            reasons.setdefault(role, failure)
    return _Found(_Choice(), reasons)


def _has_effect(module: nn.Module, choice: _Choice, call: Pass) -> bool:
    """Whether the output of ``module`` depends on its queries and keys."""
    groups = [group for group in _groups(PART, module, choice) if group.role == "qk"]
    holder = SingleModule(module)
    with torch.no_grad():
        masked = masked_outputs(holder, groups, half(groups), call)
        return not groups or output_difference(masked, call.outputs(holder)) is not None


def _dimensions(
    module: nn.Module, row: Heads, slices: Sequence[Slices], call: Pass
) -> tuple[dict[str, Dimensions], dict[str, str]]:
    """Role -> its dimensions, and role -> why they cannot be told apart."""
    part = copied(module).requires_grad_(True)
    if row.free_heads and not has_free_heads(part):
        part.__class__ = free_heads_class(type(part)) or type(part)
    for inner in part.modules():
        for buffer in inner.buffers(recurse=False) if not isinstance(inner, BATCH_NORM) else ():
            if buffer.is_floating_point():
                buffer.requires_grad_(True)
    try:
        run = record(part, call)
    except RuntimeError as error:
        # Such as an operation in place on a view of a parameter, which is allowed without gradients only.
        reason = f"its module does not run with gradients ({str(error).splitlines()[0]})"
        return {}, {"qk": reason, "v": reason}
    dims: dict[str, Dimensions] = {}
    reasons: dict[str, str] = {}
    for role, dimensions in (("qk", query_key_dimensions), ("v", value_dimensions)):
        found = dimensions(part, run, slices)
        if isinstance(found, str):
            reasons[role] = found
        else:
            dims[role] = found
    return dims, reasons


def _choices(
    module: nn.Module, row: Heads, dims: Mapping[str, Dimensions], tied: bool, heads: int
) -> Iterator[_Choice]:
    """Choices of attributes that may depend on the head size, the most likely first."""
    per_head, totals = _numbers(module, row, dims, heads)
    scales = _scales_of_logits(module, dims["qk"].parts[0]) if "qk" in dims else ()
    named = {path: role for path, role in per_head.items() if any(word in path.lower() for word in _PART_OF_NAME)}
    listed = {path: total for path, total in totals.items() if path in row.sizes}
    choices = [(named, listed), (named, totals), (per_head, totals), ({}, listed), ({}, {})]
    can_rewrite = has_free_heads(module) or free_heads_class(type(module)) is not None
    free = [True] if row.free_heads and can_rewrite else [False, True] if can_rewrite else [False]
    done: list[_Choice] = []
    for free_heads in free:
        for sizes, multiples in choices:
            choice = _Choice(
                dims=dims, tied=tied, per_head=sizes, totals=multiples, scales=scales, free_heads=free_heads
            )
            if choice not in done:
                done.append(choice)
                yield choice


def _numbers(
    module: nn.Module, row: Heads, dims: Mapping[str, Dimensions], heads: int
) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """Attributes that hold the size of a head, and those that hold that of all heads, see `_Choice`."""
    paths = {
        f"{name}.{attribute}" if name else attribute
        for name, inner in module.named_modules()
        if not isinstance(inner, (nn.Linear, nn.LayerNorm, *CONV))
        for attribute, value in vars(inner).items()
        if type(value) is int and not attribute.startswith("_")
    }
    per_head: dict[str, str] = {}
    totals: dict[str, tuple[str, int]] = {}
    for path in sorted({*paths, *row.sizes}):
        value, last = size_at(module, path), path.rpartition(".")[2].lower()
        if value is None or path == row.count or last.startswith(("num_", "n_")) or last in ("heads", "groups"):
            continue
        for role in _roles(last, dims):
            size = dims[role].parts[0]
            if value == size:
                per_head.setdefault(path, role)
            elif value % (size * heads) == 0 and (path in row.sizes or value // (size * heads) in (1, 2, 3)):
                totals.setdefault(path, (role, value // (size * heads)))
    return per_head, totals


def _scales_of_logits(module: nn.Module, size: int) -> tuple[str, ...]:
    """Paths of the attributes that hold one over the square root of ``size``."""
    return tuple(
        f"{name}.{attribute}" if name else attribute
        for name, inner in module.named_modules()
        for attribute, value in vars(inner).items()
        if type(value) is float and math.isclose(value, size**-0.5, rel_tol=1e-9)
    )


def _roles(name: str, dims: Mapping[str, Dimensions]) -> list[str]:
    """The roles of ``dims`` whose size an attribute called ``name`` may hold, the most likely first."""
    wanted = "qk" if any(word in name for word in ("key", "qk", "query")) else "v"
    return sorted(dims, key=lambda role: role != wanted)


def _proved(module: nn.Module, row: Heads, choice: _Choice, call: Pass) -> tuple[_Choice | None, str]:
    """``choice``, with the rows that have to be scaled, if ``module`` can be cut by it; else None and the reason."""
    first = ""
    for scaled in ("query", "key", None) if "qk" in choice.dims else (None,):
        scaling = replace(choice, scaled=scaled)
        reason = _failure(module, row, scaling, call)
        if reason is None:
            return scaling, ""
        first = first or reason
        if reason.startswith(REFUSED):
            break
    return None, first


def _failure(module: nn.Module, row: Heads, choice: _Choice, call: Pass) -> str | None:
    """Why ``module`` cannot be cut by ``choice``; None if it can."""
    holder = SingleModule(module)
    groups = _groups(PART, module, choice)
    attributes: list[Attributes] = [_attributes(PART, choice, None)]
    found = head_group(PART, module, row)
    if not isinstance(found, str):
        group, of_heads = found
        groups = [group, *groups]
        attributes = [of_heads, *attributes, _attributes(PART, choice, group.name)]
    scales = {} if choice.scaled is None else {PART: (f"{PART}.qk", choice.scaled)}
    sizes = layer_sizes(holder, groups, attributes, {PART} if choice.free_heads else (), scales)

    def cut(model: nn.Module, groups: Sequence[Group], kept: Kept) -> nn.Module:
        return cut_copy(model, groups, kept, sizes)

    # Two plans: sizes that a forward infers can fit one by chance.
    first = cut_difference(holder, groups, [call], cut)
    return cut_difference(holder, groups, [call], cut, seed=1) if first is None else first


def _attributes(name: str, choice: _Choice, heads: str | None) -> Attributes:
    """The attributes of a module called ``name``; ``heads`` is the group of its heads, if they can be cut."""
    attributes: Attributes = {}

    def put(path: str, value: Dim | Ratio) -> None:
        owner, _, attribute = path.rpartition(".")
        attributes.setdefault(f"{name}.{owner}" if owner else name, {})[attribute] = value

    def size(role: str) -> Ratio:
        count = Dim(fixed=len(choice.dims[role].parts))
        return Ratio(
            total=Dim(groups=((f"{name}.{role}", 1),)), parts=count if heads is None else Dim(groups=((heads, 1),))
        )

    for path, role in choice.per_head.items():
        put(path, size(role))
    for path, (role, multiple) in choice.totals.items():
        put(path, Dim(groups=((f"{name}.{role}", multiple),)))
    if choice.scaled is not None:
        for path in choice.scales:
            put(path, replace(size("qk"), inverse_root=True))
    return attributes


def _groups(name: str, module: nn.Module, choice: _Choice) -> list[Group]:
    """The groups of a module called ``name``: QK, V, and both coupled."""
    roles = {role: _named(name, found.slices) for role, found in choice.dims.items()}
    scales = {role: _scales(name, module, slices, role) for role, slices in roles.items()}
    parts = {role: found.parts for role, found in choice.dims.items()}
    if len(roles) == 2 and parts["qk"] == parts["v"]:
        both = roles["qk"] + roles["v"]
        roles["qkv"], parts["qkv"] = both, parts["qk"]
        scales["qkv"] = (*scales["qk"], *_scales(name, module, roles["qk"], "key"), *scales["v"])
    other = {"qk": "v", "v": "qk"}
    return [
        Group(
            name=f"{name}.{role}",
            kind="head_dim",
            size=sum(parts[role]),
            site=name,
            role=role,
            limits=Limits(
                parts=parts[role],
                equal=True,
                same_as=f"{name}.{other[role]}" if choice.tied and role in other else None,
            ),
            slices=slices,
            scales=scales[role],
            any_basis=role in other and choice.dims[role].direct,
        )
        for role, slices in roles.items()
    ]


def _named(name: str, slices: Sequence[Slices]) -> tuple[Slices, ...]:
    return tuple(replace(part, tensor=f"{name}.{part.tensor}") for part in slices)


def _scales(name: str, module: nn.Module, slices: Sequence[Slices], role: str) -> tuple[Scale, ...]:
    """The tensors that a mask scales: the columns that read values, or the parameters that make queries or keys last."""
    side = {"v": "consumes", "qk": "query", "key": "key"}[role]
    parameters = dict(module.named_parameters())
    chosen = [part for part in slices if part.side == side and part.tensor.removeprefix(f"{name}.") in parameters]
    norms = [
        part
        for part in chosen
        if isinstance(module.get_submodule(part.tensor.removeprefix(f"{name}.").rpartition(".")[0]), BATCH_NORM)
    ]
    return tuple(Scale(tensor=part.tensor, dim=part.dim, index=part.index) for part in norms or chosen)
