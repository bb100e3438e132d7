"""What each operation costs, from one forward pass: multiply-adds as products of sizes that groups change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimming.families.traced.channels import CONV
from slimming.families.traced.resize import tensor_dims
from slimming.formulas import Dim, Operation
from slimming.groups import Group
from slimming.macs import multiply_adds, unfused


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
    macs = macs_by_module(model, example)
    heads = {group.site: group for group in groups if group.kind == "head"}
    result = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {}
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                # A scalar is an empty product.
                own[parameter_name] = dims[f"{name}.{parameter_name}" if name else parameter_name]
        count = macs.get(name, 0)
        if not own and not count:
            continue
        result.append(
            Operation(
                name=name or "model",
                macs=(_product(name, module, count, dims, heads, each),) if count else (),
                params=tuple(own.values()),
            )
        )
    return tuple(result)


def _product(
    name: str,
    module: nn.Module,
    count: int,
    dims: Mapping[str, tuple[Dim, ...]],
    heads: Mapping[str, Group],
    each: Collection[str],
) -> tuple[Dim, ...]:
    weight = dims.get(f"{name}.weight")
    if weight is not None and name not in each and isinstance(module, (nn.Linear, *CONV)):
        rows, columns = module.weight.shape[:2]
        return (Dim(fixed=count // (rows * columns)), weight[0], weight[1])
    around = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)] if name else []
    owner = next((heads[one] for one in [name, *around] if one in heads), None)
    if owner is not None and count % owner.size == 0:
        return (Dim(fixed=count // owner.size), Dim(groups=((owner.name, 1),)))
    return (Dim(fixed=count),)


@torch.no_grad()
def macs_by_module(model: nn.Module, example: Any) -> dict[str, int]:
    """Multiply-adds of one forward pass by the innermost module that does them."""
    stack = [""]
    counter = _Counter(stack)
    with _tracked(model, stack), unfused(), counter:
        if isinstance(example, dict):
            model(**example)
        else:
            model(example)
    return dict(counter.macs)


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


class _Counter(TorchDispatchMode):
    """Counts multiply-adds of what passes the dispatcher."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.macs: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.macs[self.stack[-1]] += multiply_adds(func._overloadpacket.__name__, args, tensors)
        return out
