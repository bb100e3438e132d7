"""Count the parameters, multiply-adds and peak memory of one forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimming.core.example_inputs import ExampleCall, image_call
from slimming.core.modules import in_evaluation
from slimming.counting.operations import MacCounter, unfused


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The counted cost of a forward pass at batch size 1.

    Attributes:
        params: elements of all parameters.
        macs: multiply-adds, from the shapes of the dispatched operations.
        memory_bytes: bytes of the parameters plus the peak of the activations, excluding the input.
    """

    params: int
    macs: int
    memory_bytes: int


@torch.no_grad()
def count(model: nn.Module, example: Sequence[int] | ExampleCall) -> Counted:
    """Run one image through ``model`` and count its cost, which checks the formulas of `slimming.cost`.

    Args:
        model: any module, on the CPU or a GPU.
        example: channels, height and width of the image, or the arguments of the call.
    """
    parameter = next(model.parameters())
    call = example if isinstance(example, ExampleCall) else image_call(example)
    call = call.to(parameter.dtype, parameter.device)
    alive, macs = _Alive([*model.parameters(), *model.buffers(), *call.tensors]), MacCounter()
    with in_evaluation(model), unfused(), alive, macs:
        call.run(model)
    params = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Counted(params=params, macs=macs.total, memory_bytes=weights + alive.peak)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak bytes of the tensors created by ``work``, not counting tensors that existed before.

    Temporary memory inside kernels is not counted, so the result is the same on every machine.

    >>> peak_bytes(lambda: torch.zeros(4).exp().sum())
    32
    """
    with _Alive([]) as alive:
        work()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Tracks the storages in memory, except those of the tensors in ``owned``."""

    def __init__(self, owned: Sequence[Tensor]) -> None:
        super().__init__()
        self.owned = {tensor.untyped_storage()._cdata for tensor in owned}
        self.alive: dict[int, int] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            # Views and results of in-place operations have no storage of their own.
            if key not in self.owned and key not in self.alive and key not in given:
                self.alive[key] = storage.nbytes()
                self.total += self.alive[key]
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.total)
        return result

    def _gone(self, key: int) -> None:
        self.total -= self.alive.pop(key, 0)
