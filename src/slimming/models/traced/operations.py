"""What each operation costs, from one forward pass: multiply-adds as products of sizes that groups change."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimming.core.formulas import Dim, Operation
from slimming.core.groups import Group
from slimming.counting.operations import MacCounter, unfused
from slimming.models.traced.channels import CONV
from slimming.models.traced.resize import tensor_dims


def operations(
    model: nn.Module, example: Any, groups: Sequence[Group], each: Collection[str] = ()
) -> tuple[Operation, ...]:
    """One operation per module that owns parameters or multiplies matrices.

    Args:
        model: the model.
        example: what its forward takes.
        groups: its groups.
        each: names of layers that run once per head.
    """
    dims = tensor_dims(groups, {name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    macs: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (name, weight), count in macs_by_weight(model, example).items():
        macs[name][weight] = count
    heads = {group.site: group for group in groups if group.kind == "head"}
    sizes = {group.name: group.size for group in groups}
    result = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {}
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                # A scalar is an empty product.
                own[parameter_name] = dims[f"{name}.{parameter_name}" if name else parameter_name]
        # A weight that is standardised or made of others first is known by its module alone.
        known = f"{name}.weight" if isinstance(module, (nn.Linear, *CONV)) else ""
        counts = {weight or known: count for weight, count in macs.get(name, {}).items() if count}
        if not own and not counts:
            continue
        result.append(
            Operation(
                name=name or "model",
                macs=tuple(_product(name, *one, dims, sizes, heads, each) for one in counts.items()),
                params=tuple(own.values()),
            )
        )
    return tuple(result)


def _product(
    name: str,
    weight: str,
    count: int,
    dims: Mapping[str, tuple[Dim, ...]],
    sizes: Mapping[str, int],
    heads: Mapping[str, Group],
    each: Collection[str],
) -> tuple[Dim, ...]:
    """The multiply-adds of a module with one weight, or between other tensors, as a product."""
    rows_and_columns = dims.get(weight, ())[:2]
    changing = any(dim.groups for dim in rows_and_columns)
    if rows_and_columns and name not in each and (changing or weight == f"{name}.weight"):
        full = math.prod(dim.value(sizes) for dim in rows_and_columns)
        return (Dim(fixed=count // full), *rows_and_columns)
    around = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)] if name else []
    owner = next((heads[one] for one in [name, *around] if one in heads), None)
    if owner is not None and count % owner.size == 0:
        return (Dim(fixed=count // owner.size), Dim(groups=((owner.name, 1),)))
    return (Dim(fixed=count),)


@torch.no_grad()
def macs_by_weight(model: nn.Module, example: Any) -> dict[tuple[str, str], int]:
    """Multiply-adds of one forward pass by the innermost module that does them and the parameter that takes part.

    The parameter's name is empty where two other tensors are multiplied.
    """
    stack = [""]
    named = [(name, weight) for name, weight in model.named_parameters() if weight.dim() > 1]
    weights = {weight.untyped_storage().data_ptr(): name for name, weight in named}
    found: defaultdict[tuple[str, str], int] = defaultdict(int)

    def note(args: Sequence[Any], macs: int) -> None:
        places = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        found[stack[-1], next((weights[place] for place in places if place in weights), "")] += macs

    with _tracked(model, stack), unfused(), MacCounter(note):
        if isinstance(example, dict):
            model(**example)
        else:
            model(example)
    return dict(found)


@contextmanager
def _tracked(model: nn.Module, stack: list[str]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
