"""Derive the cost formulas of a model from one forward pass: MACs as products of sizes that depend on the groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimming.core.example_inputs import ExampleCall
from slimming.core.formulas import Dim, Operation
from slimming.core.groups import Group
from slimming.counting.operations import MacCounter, unfused
from slimming.models.traced.channels import CONV
from slimming.models.traced.resize import tensor_dims


def operations(
    model: nn.Module, call: ExampleCall, groups: Sequence[Group], per_head_layers: Collection[str] = ()
) -> tuple[Operation, ...]:
    """One operation per module that has parameters or multiplies matrices.

    Args:
        model: the model.
        call: one example.
        groups: its groups.
        per_head_layers: names of layers that run once per head.
    """
    dims = tensor_dims(groups, {name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    macs: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (name, weight), count in macs_by_weight(model, call).items():
        macs[name][weight] = count
    heads = {group.site: group for group in groups if group.kind == "head"}
    head_dims: dict[str, dict[str, Group]] = {}
    for each in groups:
        if each.role in ("qk", "v"):
            head_dims.setdefault(each.site, {})[each.role] = each
    sizes = {group.name: group.size for group in groups}
    result = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        params = []
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                # The dimensions of a scalar are an empty product, which is 1.
                params.append(dims[f"{name}.{parameter_name}" if name else parameter_name])
        # A weight that is computed from parameters, as in weight standardisation, is attributed to its layer.
        default = f"{name}.weight" if isinstance(module, (nn.Linear, *CONV)) else ""
        counts = {weight or default: count for weight, count in macs.get(name, {}).items() if count}
        if not params and not counts:
            continue
        result.append(
            Operation(
                name=name or "model",
                macs=tuple(
                    product
                    for weight, count in counts.items()
                    for product in _products(
                        name, weight, count, dims, sizes, heads, head_dims, name in per_head_layers
                    )
                ),
                params=tuple(params),
            )
        )
    return tuple(result)


def _products(
    name: str,
    weight: str,
    count: int,
    dims: Mapping[str, tuple[Dim, ...]],
    sizes: Mapping[str, int],
    heads: Mapping[str, Group],
    head_dims: Mapping[str, Mapping[str, Group]],
    per_head: bool,
) -> list[tuple[Dim, ...]]:
    """The MACs of a module with one weight, or between other tensors, as products.

    Args:
        name: the module.
        weight: the parameter that is multiplied; empty if none is.
        count: the number of MACs in the dense model.
        dims: tensor -> its dimensions as functions of the kept units.
        sizes: group -> its number of units.
        heads: attention module -> the group of its heads.
        head_dims: attention module -> the groups of its QK and V dimensions by role.
        per_head: whether the module runs once per head.
    """
    rows_and_columns = dims.get(weight, ())[:2]
    changing = any(dim.groups for dim in rows_and_columns)
    if rows_and_columns and not per_head and (changing or weight == f"{name}.weight"):
        full = math.prod(dim.value(sizes) for dim in rows_and_columns)
        return [(Dim(fixed=count // full), *rows_and_columns)]
    parents = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)] if name else []
    path = next((parent for parent in [name, *parents] if parent in heads or parent in head_dims), "")
    # Of the products of queries and keys and of weights and values, one half each if the heads have one size.
    inside = head_dims.get(path, {})
    parts = {role: group.limits.parts[0] for role, group in inside.items()}
    whole = sum(parts.values()) * (2 if len(parts) == 1 else 1)
    shares = {inside[role]: count * size // whole for role, size in parts.items()}
    if path in heads:
        shares[heads[path]] = count - sum(shares.values())
    if all(share % group.size == 0 for group, share in shares.items()):
        rest = count - sum(shares.values())
        products = [
            (Dim(fixed=share // group.size), Dim(groups=((group.name, 1),))) for group, share in shares.items() if share
        ]
        return [*products, *([(Dim(fixed=rest),)] if rest else [])]
    return [(Dim(fixed=count),)]


@torch.no_grad()
def macs_by_weight(model: nn.Module, call: ExampleCall) -> dict[tuple[str, str], int]:
    """(Module, parameter) -> MACs of one forward pass between the parameter and another tensor.

    The module is the innermost one that runs. The parameter's name is empty if neither factor is a parameter.
    """
    stack = [""]
    named = [(name, weight) for name, weight in model.named_parameters() if weight.dim() > 1]
    weights = {weight.untyped_storage().data_ptr(): name for name, weight in named}
    result: defaultdict[tuple[str, str], int] = defaultdict(int)

    def record(args: Sequence[Any], macs: int) -> None:
        pointers = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        result[stack[-1], next((weights[pointer] for pointer in pointers if pointer in weights), "")] += macs

    with _module_stack(model, stack), unfused(), MacCounter(record):
        call.run(model)
    return dict(result)


@contextmanager
def _module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are running in ``stack``, innermost last."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
