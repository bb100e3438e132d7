"""Record what happens in a forward pass: which modules run, and which tensors are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimming.counting.operations import unfused
from slimming.models.traced.verification import Pass


@dataclass(frozen=True)
class Course:
    """What happened in a forward pass.

    Attributes:
        storages: addresses of the storages that operations read.
        modules: names of the modules that ran, in order.
        outputs: shapes of the floating-point outputs without the batch dimension.
        sequences: names of the modules that returned a sequence (B, N, D), in the order in which they ended.
        digest: of all operations with their arguments, and of the values of the outputs. Passes with the same digest
            compute the same, as those of the two modes do in a model without BatchNorm and dropout.
    """

    storages: frozenset[int]
    modules: tuple[str, ...]
    outputs: tuple[tuple[int, ...], ...]
    sequences: tuple[str, ...] = ()
    digest: str = ""


@torch.no_grad()
def course_of(model: nn.Module, forward: Pass) -> Course:
    """Run a forward pass and record what happens. Errors of the model are passed on."""
    modules: list[str] = []
    sequences: list[str] = []

    def returned(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.dim() == 3:
            sequences.append(name)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: modules.append(name)))
        handles.append(module.register_forward_hook(lambda _, args, output, name=name: returned(name, output)))
    reads = _Reads({storage(tensor) for tensor in [*model.parameters(), *model.buffers()]})
    try:
        with unfused(), reads:
            results = forward.outputs(model)
    finally:
        for handle in handles:
            handle.remove()
    shapes = tuple(tuple(result.shape[1:]) for result in results)
    for result in results:
        reads.digest.update(result.contiguous().numpy().tobytes())
    return Course(frozenset(reads.storages), tuple(modules), shapes, tuple(sequences), reads.digest.hexdigest())


class _Reads(TorchDispatchMode):
    """Records the operations and the storages of the tensors that they are given.

    Args:
        owned: the storages of the model's own tensors.
    """

    def __init__(self, owned: Set[int]) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self.digest = hashlib.sha256()
        self._owned = owned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.digest.update(f"{func}".encode())
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                place = storage(leaf)
                self.storages.add(place)
                leaf = (*leaf.shape, *leaf.stride(), place if place in self._owned else "computed")
            self.digest.update(f" {leaf}".encode())
        return func(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    """Address of the storage of ``tensor``."""
    return tensor.untyped_storage().data_ptr()


def distinct(passes: Sequence[Pass], courses: Sequence[Course]) -> list[Pass]:
    """The passes that differ in the modules that run, or in what they return; only these have to be traced."""
    chosen: dict[tuple[Any, ...], Pass] = {}
    for forward, course in zip(passes, courses, strict=True):
        chosen.setdefault((course.modules, course.outputs), forward)
    return list(chosen.values())
