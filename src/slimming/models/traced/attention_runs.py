"""Recognise attention by what it computes, and find which rows and columns belong to each of its heads.

Attention is a softmax of a product, or `scaled_dot_product_attention`, whose result a layer reads. Gradients say the
rest: the columns of that layer which depend on one head only, and the rows of the layers before it on which these
columns depend. No names of classes, layers or attributes are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten_with_path

from slimming.models.traced.channels import CONV
from slimming.models.traced.verification import Pass

SOFTMAX = (torch.softmax, Tensor.softmax, functional.softmax)
PRODUCTS = (
    *(torch.matmul, torch.bmm, torch.einsum, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm),
)
ROUNDING = 1e-11
"""Gradients below this share of the largest are rounding errors, such as those of a constant added to all logits."""
MIXED = "a layer reads no two heads apart (it has one head, or talking heads or a norm over all heads mix them)"
UNSEPARATED = "no layer makes its queries, keys or values by head"


Path = tuple[int | str, ...]
"""Where a tensor is in arguments: position or keyword, then places in tuples, lists and mappings."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        name: name of the layer in the model.
        read: its input.
        made: its output.
        weight: its weight.
        operation: the node of the autograd graph that made the output.
    """

    name: str
    read: Tensor
    made: Tensor
    weight: Tensor
    operation: Any


@dataclass(frozen=True)
class ProductCall:
    """One product of two tensors, summed over one dimension of each.

    Attributes:
        left: the first tensor.
        left_dim: the dimension of ``left`` that is summed over.
        right: the second tensor.
        right_dim: the dimension of ``right`` that is summed over.
    """

    left: Tensor
    left_dim: int
    right: Tensor
    right_dim: int


@dataclass
class AttentionRun:
    """One attention in a forward pass.

    Attributes:
        inside: name of the innermost module that was running.
        by_head: attention weights, or the result of fused attention.
        scores: the operation before the softmax; None for fused attention.
    """

    inside: str
    by_head: Tensor
    scores: Any = None

    @property
    def head_dims(self) -> list[int]:
        """The dimensions that may be the heads, the usual one first: all but the last two that have several entries."""
        return [dim for dim in range(self.by_head.dim() - 3, -1, -1) if self.by_head.shape[dim] > 1]


@dataclass(eq=False)
class Run(TorchFunctionMode):
    """What happened in a forward pass.

    Attributes:
        running: names of the modules that are running, the innermost last.
        attentions: every attention.
        products: operation -> the product that it computed; None if it sums over more or less than one dimension.
        layers: every call of a layer.
        linears: the identity of a weight -> what a linear function with it read.
        inputs: tensors that the model was given and that require gradients, with their paths in the arguments.
    """

    running: list[str] = field(default_factory=lambda: [""])
    attentions: list[AttentionRun] = field(default_factory=list)
    products: dict[Any, ProductCall | None] = field(default_factory=dict)
    layers: list[LayerCall] = field(default_factory=list)
    linears: dict[int, Tensor] = field(default_factory=dict)
    inputs: list[tuple[Path, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @cached_property
    def made_by(self) -> dict[Any, LayerCall]:
        """Operation -> the layer call whose output it made."""
        return {call.operation: call for call in self.layers}

    @cached_property
    def read_by(self) -> list[tuple[LayerCall, set[Any]]]:
        """Every layer call with the operations between it and the layers before it."""
        return [(call, before(call.read.grad_fn, self.made_by)) for call in self.layers]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.linear:
            read, weight = (*args, *(kwargs or {}).values())[:2]
            self.linears[id(weight)] = read
        if isinstance(out, Tensor) and out.grad_fn is not None:
            if func in PRODUCTS:
                self.products[out.grad_fn] = _product(func, args)
            elif out.dim() > 2 and func is functional.scaled_dot_product_attention:
                self.attentions.append(AttentionRun(self.running[-1], out))
                query, key = (*args, *(kwargs or {}).values())[:2]
                self.products[out.grad_fn] = ProductCall(query, -1, key, -1)
            elif out.dim() > 2 and func in SOFTMAX:
                self.attentions.append(AttentionRun(self.running[-1], out, args[0].grad_fn))
        return out


def _product(func: Any, args: Sequence[Any]) -> ProductCall | None:
    """The product that ``func`` computes of ``args``; None if it sums over more or less than one dimension."""
    if func is torch.einsum:
        equation, *tensors = args
        if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
            tensors = list(tensors[0])
        terms, _, result = str(equation).replace(" ", "").partition("->")
        names = terms.split(",")
        if len(names) != 2 or len(tensors) != 2:
            return None
        summed = [name for name in names[0] if name in names[1] and name not in result and name.isalpha()]
        if len(summed) != 1:
            return None
        dims = [name.index(summed[0]) - (len(name) if "..." in name else 0) for name in names]
        return ProductCall(tensors[0], dims[0], tensors[1], dims[1])
    tensors = [arg for arg in args if isinstance(arg, Tensor)][-2:]
    if len(tensors) < 2 or min(tensor.dim() for tensor in tensors) < 2:
        return None
    return ProductCall(tensors[0], -1, tensors[1], -2)


@dataclass(frozen=True)
class HeadRows:
    """What belongs to the heads of one attention.

    Attributes:
        inside: name of the innermost module that was running.
        heads: the number of query heads.
        rows: name of a layer or parameter -> for each head the indices that only it and heads beside it read.
        dims: name of a parameter of `rows` -> the dimension of these indices; 0 for layers.
        outputs: names of the layers that read the result.
        contiguous: whether the columns of a head in these layers are consecutive, or else every ``heads``-th.
    """

    inside: str
    heads: int
    rows: dict[str, list[frozenset[int]]]
    dims: dict[str, int]
    outputs: tuple[str, ...]
    contiguous: bool


def record(model: nn.Module, forward: Pass, also: AbstractContextManager[None] | None = None) -> Run:
    """Run ``model``, whose parameters must require gradients, once; inside the context ``also``."""
    run = Run(inputs=_given(forward))
    with _hooks(model, run), torch.enable_grad(), also or nullcontext(), run:
        forward.outputs(model)
    return run


def _given(forward: Pass) -> list[tuple[Path, Tensor]]:
    """The tensors in the arguments of ``forward`` that require gradients, with their paths."""
    found: list[tuple[Path, Tensor]] = []
    for first in (forward.call.args, forward.call.kwargs):
        for path, leaf in tree_flatten_with_path(first)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                found.append((tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path), leaf))
    return [(path, leaf) for path, leaf in found if all(type(key) in (int, str) for key in path)]


@contextmanager
def _hooks(model: nn.Module, run: Run) -> Iterator[None]:
    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        run.running.pop()
        is_layer = isinstance(module, nn.Linear) or (isinstance(module, CONV) and module.groups == 1)
        if is_layer and args and isinstance(output, Tensor) and output.grad_fn is not None:
            run.layers.append(LayerCall(name, args[0], output, module.weight, output.grad_fn))

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: run.running.append(name)))
        handles.append(
            module.register_forward_hook(
                lambda module, args, output, name=name: leave(name, module, args, output), always_call=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_rows(model: nn.Module, run: Run, attention: AttentionRun) -> HeadRows | str | None:
    """What belongs to the heads of ``attention``; a reason if they cannot be told apart; None if it is no attention."""
    layers = run.made_by
    if attention.scores is not None and not before(attention.scores, layers) & run.products.keys():
        return None  # a softmax over something else
    readers = [call for call, operations in run.read_by if attention.by_head.grad_fn in operations]
    if not readers or not attention.head_dims:
        return None
    first = readers[0]
    for head_dim in attention.head_dims:
        heads = attention.by_head.shape[head_dim]
        if tuple(first.weight.shape[:2]) == (heads, heads):
            return MIXED
        for contiguous in (True, False):
            found = _by_gradients(model, layers, attention.by_head, head_dim, first, contiguous)
            if found is not None:
                rows, dims = found
                same = tuple(call.name for call in readers if call.read.shape == first.read.shape)
                return HeadRows(attention.inside, heads, rows, dims, same, contiguous) if rows else UNSEPARATED
    return MIXED


def before(node: Any, layers: dict[Any, LayerCall]) -> set[Any]:
    """``node`` and the operations before it, up to and with the layers that made what they read."""
    seen: set[Any] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in layers:
            stack.extend(following for following, _ in node.next_functions)
    return seen


def _by_gradients(
    model: nn.Module,
    layers: dict[Any, LayerCall],
    by_head: Tensor,
    head_dim: int,
    reader: LayerCall,
    contiguous: bool,
) -> tuple[dict[str, list[frozenset[int]]], dict[str, int]] | None:
    """The rows of every head and their dimensions, if each head has columns of its own."""
    x = reader.read if isinstance(model.get_submodule(reader.name), nn.Linear) else reader.read.movedim(1, -1)
    heads, size = by_head.shape[head_dim], x.shape[-1]
    if size % heads:
        return None
    reached = before(reader.read.grad_fn, layers)
    calls = [layers[node] for node in reached if node in layers]
    leaves = {id(node.variable) for node in reached if type(node).__name__ == "AccumulateGrad"}
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in leaves]
    wanted = [by_head, *(call.made for call in calls), *(parameter for _, parameter in parameters)]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(x.shape, generator=generator, dtype=x.dtype) + 0.5
    masks: list[list[Tensor | None]] = []
    for head in range(heads):
        start = head * (size // heads)
        picked = list(range(start, start + size // heads) if contiguous else range(head, size, heads))
        total = (x[..., picked] * weights[..., picked]).sum()
        grads = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
        least = ROUNDING * max(float(gradient.abs().max()) for gradient in grads if gradient is not None)
        grads = [None if gradient is None else gradient * (gradient.abs() > least) for gradient in grads]
        own = _used(grads[0], head_dim)
        if own != {head}:
            return None
        masks.append(list(grads[1:]))
    rows: dict[str, list[frozenset[int]]] = {}
    dims: dict[str, int] = {}
    for position, call in enumerate(calls):
        dim = -1 if isinstance(model.get_submodule(call.name), nn.Linear) else 1
        used = [_used(grads[position], dim) for grads in masks]
        if _are_apart(used):
            rows[call.name], dims[call.name] = used, 0
    for position, (name, parameter) in enumerate(parameters, len(calls)):
        for dim in range(parameter.dim()):
            used = [_used(grads[position], dim) for grads in masks]
            if _are_apart(used):
                rows[name], dims[name] = used, dim
                break
    return rows, dims


def _used(gradient: Tensor | None, dim: int) -> frozenset[int]:
    """The indices along ``dim`` at which ``gradient`` is not 0 everywhere."""
    if gradient is None:
        return frozenset()
    dim %= gradient.dim()
    others = [other for other in range(gradient.dim()) if other != dim]
    used = gradient.abs().sum(others) > 0 if others else gradient != 0
    return frozenset(used.nonzero().flatten().tolist())


def _are_apart(used: Sequence[frozenset[int]]) -> bool:
    """Whether heads use different indices; what all of them share, such as a norm of one head, stays."""
    return all(used) and len(set(used)) > 1
