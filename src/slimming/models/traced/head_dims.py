"""Find the QK and V dimensions inside attention heads, and prove on each attention module that they can be cut.

`slimming.models.traced.dimension_rows` says which rows and columns belong to each dimension. Which attributes of the
module hold sizes of its heads, and whether its forward computes the scale of the logits from them, is tried out: the
first choice with which the cut module gives the outputs of the masked one is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from slimming.core.copies import copied
from slimming.core.example_inputs import ExampleCall
from slimming.core.formulas import Dim, Ratio
from slimming.core.groups import Group, Limits, Scale, Slices
from slimming.models.family import Kept
from slimming.models.separate import SeparateLinear
from slimming.models.traced.attention_runs import record
from slimming.models.traced.channels import BATCH_NORM, CONV
from slimming.models.traced.dimension_rows import Dimensions, query_key_dimensions, scores_of, value_dimensions
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Attributes, Heads, head_group, head_slices, size_at, weight_span
from slimming.models.traced.resize import Separate, cut_copy, layer_sizes
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
_SMALLER = 0.3
"""Factor of random weights when gradients are computed, so that no softmax and no activation is saturated."""
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
        separate: name of a projection -> its `slimming.core.groups.LayerSizes.separate`, as for ``attributes``.
        uncovered: attention modules whose QK or V cannot be cut, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    attributes: tuple[Attributes, Attributes] = field(default_factory=lambda: ({}, {}))
    free_heads: set[str] = field(default_factory=set)
    head_scales: dict[str, tuple[str, str]] = field(default_factory=dict)
    separate: tuple[Separate, Separate] = field(default_factory=lambda: ({}, {}))
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
        separate: path of the projection that makes values, the number of its equal parts, and which of them is V, if the
            sizes of QK and V may differ although the host assumes one; None if not.
        switch: path of an attribute that is set to True, so that the projection is called as a module; empty if none.
        any_basis: the roles whose dimensions can be replaced by linear combinations of them.
    """

    dims: Mapping[str, Dimensions] = field(default_factory=dict)
    tied: bool = False
    per_head: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    scales: tuple[str, ...] = ()
    scaled: str | None = None
    free_heads: bool = False
    separate: tuple[str, int, int] | None = None
    switch: str = ""
    any_basis: tuple[str, ...] = ()


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
            known[key] = _decided(module, row, call)
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
    for attributes, separate, heads in zip(result.attributes, result.separate, (None, f"{name}.heads"), strict=True):
        attributes.update(_attributes(name, choice, heads))
        separate.update(_separate(name, choice, heads))
    if choice.free_heads:
        result.free_heads.add(name)
    if choice.scaled is not None:
        result.head_scales[name] = (f"{name}.qk", choice.scaled)


def _decided(module: nn.Module, row: Heads, call: Pass) -> _Found:
    """`_found`, with the dimensions of batch and tokens exchanged if queries and keys have no effect otherwise."""
    found = _found(module, row, call)
    if found.decided:
        return found

    def exchanged(leaf: Any) -> Any:
        return leaf.transpose(0, 1) if isinstance(leaf, torch.Tensor) and leaf.dim() == 3 else leaf

    other = _found(module, row, _mapped(call, exchanged))
    return other if other.choice.dims and other.decided else found


def _mapped(call: Pass, change: Callable[[Any], Any]) -> Pass:
    return Pass(ExampleCall(*tree_map(change, (call.call.args, dict(call.call.kwargs)))))


def _small(leaf: Any) -> Any:
    """A tensor with a mean square of at most 1, unless it has infinite values, as masks do."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or not bool(leaf.isfinite().all()):
        return leaf
    return leaf / max(1.0, float(leaf.square().mean().sqrt()))


def _found(module: nn.Module, row: Heads, call: Pass) -> _Found:
    """The choice for ``module`` that passes its proof, and why a part of its heads cannot be cut."""
    slices = head_slices(PART, module, row)
    if isinstance(slices, str):
        return _Found(_Choice(), {"qk": slices, "v": slices})
    slices = tuple(replace(part, tensor=part.tensor.removeprefix(f"{PART}.")) for part in slices)
    spans = [weight_span(module, path) for path in (row.output, *row.other_outputs)]
    outputs = {span.tensor for span in spans if span is not None}  # not the layers that mix heads
    slices = tuple(part for part in slices if part.side == "produces" or part.tensor in outputs)
    dims, reasons = _dimensions(module, row, slices, call)
    tries: list[tuple[dict[str, Dimensions], bool]] = []
    if len(dims) == 2:
        tries += [(dims, False)]
        tries += [(dims, True)] if dims["qk"].parts == dims["v"].parts else []
    tries += [({role: dims[role]}, False) for role in ("v", "qk") if role in dims]
    heads = len(slices[0].index)
    for roles, tied in tries:
        failure = "no attribute holds the size of its heads"
        for choice in (*_choices(module, row, roles, tied, heads), *_separate_choices(module, row, roles, heads)):
            proved, reason = _proved(module, row, choice, call)
            if proved is not None:
                others = {role: reasons.get(role, failure) for role in ("qk", "v") if role not in roles}
                proved = replace(proved, any_basis=_roles_of_any_basis(module, proved, call))
                return _Found(proved, others, _has_effect(module, proved, call))
            failure = reason
        for role in roles:
            reasons.setdefault(role, failure)
    return _Found(_Choice(), reasons)


@torch.no_grad()
def _roles_of_any_basis(module: nn.Module, choice: _Choice, call: Pass) -> tuple[str, ...]:
    """The roles for which ``module`` gives the same output after a rotation of the dimensions in its heads."""
    roles: list[str] = []
    for role, dims in choice.dims.items():
        if not dims.direct:
            continue
        turned, size = copied(module), dims.parts[0]
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        turn = torch.linalg.qr(matrix)[0]
        for part in dims.slices:
            tensor = turned.get_parameter(part.tensor).data.movedim(part.dim, 0)
            for start in range(0, sum(dims.parts), size):
                places = [part.index[unit][0] for unit in range(start, start + size)]
                tensor[places] = torch.einsum("ij,j...->i...", turn, tensor[places])
        if output_difference(call.outputs(module), call.outputs(turned)) is None:
            roles.append(role)
    return tuple(roles)


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
    for parameter in part.parameters():
        parameter.data.mul_(_SMALLER)
    if row.free_heads and not has_free_heads(part):
        part.__class__ = free_heads_class(type(part)) or type(part)
    for inner in part.modules():
        for buffer in inner.buffers(recurse=False) if not isinstance(inner, BATCH_NORM) else ():
            if buffer.is_floating_point():
                buffer.requires_grad_(True)
    try:
        run = record(part, _mapped(call, _small))
    except RuntimeError as error:
        # Such as an operation in place on a view of a parameter, which is allowed without gradients only.
        reason = f"its module does not run with gradients ({str(error).splitlines()[0]})"
        return {}, {"qk": reason, "v": reason}
    dims: dict[str, Dimensions] = {}
    reasons: dict[str, str] = {}
    scores = scores_of(part, run)
    for role, dimensions in (("qk", query_key_dimensions), ("v", value_dimensions)):
        found = dimensions(part, run, slices, scores)
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


def _separate_choices(module: nn.Module, row: Heads, dims: Mapping[str, Dimensions], heads: int) -> Iterator[_Choice]:
    """Choices with another size for V than for QK, where the host assumes one."""
    if set(dims) != {"v"}:
        return
    size = dims["v"].parts[0]
    rows = {part.tensor: part.index[0][0] for part in dims["v"].slices if part.side == "produces" and part.dim == 0}
    path = next((name for name, _ in module.named_modules() if f"{name}.weight" in rows), None)
    layer = None if path is None else module.get_submodule(path)
    if path is None or type(layer) not in (nn.Linear, SeparateLinear):
        return
    if isinstance(layer, SeparateLinear):
        starts = [heads * sum(layer.head_sizes[:part]) for part in range(len(layer.head_sizes))]
        separate = (path, len(starts), starts.index(rows[f"{path}.weight"]))
    else:
        separate = (path, len(layer.weight) // (size * heads), rows[f"{path}.weight"] // (size * heads))
    _, totals = _numbers(module, row, dims, heads)
    listed = {path: total for path, total in totals.items() if path in row.sizes}
    switches = [name for name, value in vars(module).items() if value is False and "separate" in name]
    can_rewrite = has_free_heads(module) or free_heads_class(type(module)) is not None
    for free_heads in (True,) if row.free_heads and can_rewrite else (False,):
        for switch in ("", *switches):
            for multiples in (listed, totals, {}):
                yield _Choice(dims=dims, totals=multiples, free_heads=free_heads, separate=separate, switch=switch)


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
    separate = [_separate(PART, choice, None)]
    found = head_group(PART, module, row)
    if not isinstance(found, str):
        group, of_heads = found
        groups = [group, *groups]
        attributes = [of_heads, *attributes, _attributes(PART, choice, group.name)]
        separate.append(_separate(PART, choice, group.name))
    scales = {} if choice.scaled is None else {PART: (f"{PART}.qk", choice.scaled)}
    sizes = layer_sizes(holder, groups, attributes, {PART} if choice.free_heads else (), scales, separate)

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

    for path, role in choice.per_head.items():
        put(path, _size(name, choice, role, heads))
    for path, (role, multiple) in choice.totals.items():
        put(path, Dim(groups=((f"{name}.{role}", multiple),)))
    if choice.switch:
        put(choice.switch, Dim(fixed=1))
    if choice.scaled is not None:
        for path in choice.scales:
            put(path, replace(_size(name, choice, "qk", heads), inverse_root=True))
    return attributes


def _size(name: str, choice: _Choice, role: str, heads: str | None) -> Ratio:
    """The number of dimensions of a head; ``heads`` is the group of the heads, if they can be cut."""
    count = len(choice.dims[role].parts)
    return Ratio(
        total=Dim(groups=((f"{name}.{role}", 1),)),
        parts=Dim(fixed=count) if heads is None else Dim(groups=((heads, 1),)),
    )


def _separate(name: str, choice: _Choice, heads: str | None) -> Separate:
    """The sizes of heads in the projection that makes values, see `_size`."""
    if choice.separate is None:
        return {}
    path, count, place = choice.separate
    found = choice.dims["v"]
    dense = Dim(fixed=found.parts[0])
    other = _size(name, choice, "qk", heads) if "qk" in choice.dims else dense
    number = Dim(fixed=len(found.parts)) if heads is None else Dim(groups=((heads, 1),))
    parts = [_size(name, choice, "v", heads) if part == place else other for part in range(count)]
    return {f"{name}.{path}": (number, other, *parts)}


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
            any_basis=role in choice.any_basis,
        )
        for role, slices in roles.items()
    ]


def _named(name: str, slices: Sequence[Slices]) -> tuple[Slices, ...]:
    return tuple(replace(part, tensor=f"{name}.{part.tensor}") for part in slices)


def _scales(name: str, module: nn.Module, slices: Sequence[Slices], role: str) -> tuple[Scale, ...]:
    """The tensors that a mask scales: the columns that read values, or what makes queries or keys last."""
    side = {"v": "consumes", "qk": "query", "key": "key"}[role]
    parameters = dict(module.named_parameters())
    chosen = [part for part in slices if part.side == side and part.tensor.removeprefix(f"{name}.") in parameters]
    norms = [
        part
        for part in chosen
        if isinstance(module.get_submodule(part.tensor.removeprefix(f"{name}.").rpartition(".")[0]), BATCH_NORM)
    ]
    return tuple(Scale(tensor=part.tensor, dim=part.dim, index=part.index) for part in norms or chosen)
