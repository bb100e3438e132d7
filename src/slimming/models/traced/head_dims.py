"""Find the QK and V dimensions inside attention heads, and prove on each attention module that they can be cut.

`slimming.models.traced.dimension_rows` says which rows and columns belong to each dimension. Which attributes of the
module hold sizes of its heads, and whether its forward computes the scale of the logits from them, is tried out: the
first choice with which the cut module gives the outputs of the masked one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from slimming.core.copies import copied
from slimming.core.example_inputs import ExampleCall
from slimming.core.groups import Group, Slices
from slimming.models.family import Kept
from slimming.models.traced.attention_runs import record
from slimming.models.traced.channels import BATCH_NORM
from slimming.models.traced.detached_norms import DetachedNorms
from slimming.models.traced.dimension_rows import (
    HEAD_NORMS,
    NORM_OVER_HEADS,
    Dimensions,
    query_key_dimensions,
    scores_of,
    value_dimensions,
)
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.head_sizes import (
    HeadSizes,
    attributes_of,
    choices,
    groups_of,
    separate_choices,
    separate_of,
)
from slimming.models.traced.heads import Attributes, Heads, head_group, head_slices, weight_span
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
FEWEST = 3
"""Fewest dimensions of a head of which single ones can be removed."""
_SMALLER = 0.3
"""Factor of random weights when gradients are computed, so that no softmax and no activation is saturated."""


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


class _Found(NamedTuple):
    """What was found for one module.

    Attributes:
        choice: the choice that passes its proof.
        reasons: role -> why it cannot be cut.
        decided: whether queries and keys have an effect in the example, so that the proof says something about them.
    """

    choice: HeadSizes
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
                choice, reasons = HeadSizes(), {"qk": _UNDECIDED, "v": _UNDECIDED}
        if choice.dims:
            _add(result, name, module, choice)
        for role, reason in reasons.items():
            result.uncovered.append(f"{name} {role.upper()} dimensions: {reason}")
    return result


def _add(result: HeadDims, name: str, module: nn.Module, choice: HeadSizes) -> None:
    """Add what was found for one module to ``result``."""
    result.groups.extend(groups_of(name, module, choice))
    for attributes, separate, heads in zip(result.attributes, result.separate, (None, f"{name}.heads"), strict=True):
        attributes.update(attributes_of(name, choice, heads))
        separate.update(separate_of(name, choice, heads))
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


def _varied(call: Pass) -> Callable[[Any], Any]:
    """`_small`, with gradients for what the module is given beside the sequence, such as a rotary table."""
    main = call.call.main

    def varied(leaf: Any) -> Any:
        small = _small(leaf)
        if leaf is main or not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return small
        return small.detach().clone().requires_grad_(True)

    return varied


def _found(module: nn.Module, row: Heads, call: Pass) -> _Found:
    """The choice for ``module`` that passes its proof, and why a part of its heads cannot be cut."""
    slices = head_slices(PART, module, row)
    if isinstance(slices, str):
        return _Found(HeadSizes(), {"qk": slices, "v": slices})
    slices = tuple(replace(part, tensor=part.tensor.removeprefix(f"{PART}.")) for part in slices)
    spans = [weight_span(module, path) for path in (row.output, *row.other_outputs)]
    outputs = {span.tensor for span in spans if span is not None}  # not the layers that mix heads
    slices = tuple(part for part in slices if part.side == "produces" or part.tensor in outputs)
    dims, reasons = _dimensions(module, row, slices, call)
    tries: list[tuple[dict[str, Dimensions], bool]] = []
    if len(dims) == 2:
        tries += [(dims, False)]
        tries += [(dims, True)] if dims["qk"].parts == dims["v"].parts else []
    if len(dims) == 2 and dims["qk"].width > 1:
        tries = tries[:1]
    tries += [({role: dims[role]}, False) for role in ("v", "qk") if role in dims]
    heads = len(slices[0].index)
    for roles, tied in tries:
        failure = "no attribute holds the size of its heads"
        for choice in (*choices(module, row, roles, tied, heads), *separate_choices(module, row, roles, heads)):
            proved, reason = _proved(module, row, choice, call)
            if proved is not None:
                others = {role: reasons.get(role, failure) for role in ("qk", "v") if role not in roles}
                proved = replace(proved, any_basis=_roles_of_any_basis(module, proved, call))
                return _Found(proved, others, _has_effect(module, proved, call))
            failure = reason
        for role in roles:
            reasons.setdefault(role, failure)
    return _Found(HeadSizes(), reasons)


@torch.no_grad()
def _roles_of_any_basis(module: nn.Module, choice: HeadSizes, call: Pass) -> tuple[str, ...]:
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


def _has_effect(module: nn.Module, choice: HeadSizes, call: Pass) -> bool:
    """Whether the output of ``module`` depends on its queries and keys."""
    groups = [group for group in groups_of(PART, module, choice) if group.role == "qk"]
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
        run = record(part, _mapped(call, _varied(call)))
    except RuntimeError as error:
        # Such as an operation in place on a view of a parameter, which is allowed without gradients only.
        reason = f"its module does not run with gradients ({str(error).splitlines()[0]})"
        return {}, {"qk": reason, "v": reason}
    dims: dict[str, Dimensions] = {}
    reasons: dict[str, str] = {}
    scores = scores_of(part, run)
    for role, dimensions in (("qk", query_key_dimensions), ("v", value_dimensions)):
        found = dimensions(part, run, slices, scores)
        if found == NORM_OVER_HEADS:
            found = _through_norms(part, slices, call)
        if isinstance(found, str):
            reasons[role] = found
        elif found.parts[0] < FEWEST:
            reasons[role] = f"its heads have {found.parts[0]} dimensions"
        else:
            dims[role] = found
    return dims, reasons


def _through_norms(part: nn.Module, slices: Sequence[Slices], call: Pass) -> Dimensions | str:
    """The dimensions of QK where norms over the dimensions of a head are in between, or why there are none."""
    detached = DetachedNorms()
    run = record(part, _mapped(call, _varied(call)), detached)
    found = query_key_dimensions(part, run, slices, scores_of(part, run))
    if isinstance(found, str):
        return NORM_OVER_HEADS
    owners = dict.fromkeys(each.tensor.rpartition(".")[0] for each in found.slices)
    norms = tuple(name for name in owners if isinstance(part.get_submodule(name), HEAD_NORMS))
    return replace(found, norms=norms, normalised=True, direct=False)


def _proved(module: nn.Module, row: Heads, choice: HeadSizes, call: Pass) -> tuple[HeadSizes | None, str]:
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


def _failure(module: nn.Module, row: Heads, choice: HeadSizes, call: Pass) -> str | None:
    """Why ``module`` cannot be cut by ``choice``, with whole heads or without; None if it can."""
    reason = _difference(module, choice, call, head_group(PART, module, row))
    if reason is not None and choice.dims_alike:
        # What is shared by the dimensions of all heads may have entries for each head that are not cut.
        reason = _difference(module, choice, call, "")
    return reason


def _difference(module: nn.Module, choice: HeadSizes, call: Pass, found: tuple[Group, Attributes] | str) -> str | None:
    """How ``module`` cut by ``choice`` differs from the masked one; ``found`` is what `head_group` gives."""
    holder = SingleModule(module)
    groups = groups_of(PART, module, choice)
    attributes: list[Attributes] = [attributes_of(PART, choice, None)]
    separate = [separate_of(PART, choice, None)]
    if not isinstance(found, str):
        group, of_heads = found
        groups = [group, *groups]
        attributes = [of_heads, *attributes, attributes_of(PART, choice, group.name)]
        separate.append(separate_of(PART, choice, group.name))
    scales = {} if choice.scaled is None else {PART: (f"{PART}.qk", choice.scaled)}
    sizes = layer_sizes(holder, groups, attributes, {PART} if choice.free_heads else (), scales, separate)

    def cut(model: nn.Module, groups: Sequence[Group], kept: Kept) -> nn.Module:
        return cut_copy(model, groups, kept, sizes)

    # Two plans: sizes that a forward infers can fit one by chance.
    reason = cut_difference(holder, groups, [call], cut) or cut_difference(holder, groups, [call], cut, seed=1)
    if reason is None and choice.separate is not None and "qk" in choice.dims:
        # With equal sizes of QK and V, the projection is that of the host.
        equal = [replace(g, limits=replace(g.limits, same_as=f"{PART}.v")) if g.role == "qk" else g for g in groups]
        reason = cut_difference(holder, equal, [call], cut)
    return reason
