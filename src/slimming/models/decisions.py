"""Let a changed model decide as the model that it was made from: which boxes, queries or positions it selects.

Detectors select candidates by their scores. A cut changes the scores, and another order of the candidates would put the
rows of all later layers in another order, so that they could not be compared with those of the dense model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SORTING = (torch.ops.aten.topk, torch.ops.aten.sort)
"""Operations that return values with the indices at which they are."""


class SameDecisions(TorchDispatchMode):
    """Records what the first run selects by floating-point numbers, and selects the same in the next runs.

    Selections are indices, such as those of ``topk``, ``argsort`` and non-maximum suppression, and vectors of truth
    values, such as scores above a threshold. A run takes them in order, as long as it has the same operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Any]] = []
        self.runs = self.at = 0

    def __enter__(self) -> Any:
        """Begin a run."""
        self.runs, self.at = self.runs + 1, 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        chosen = result[1] if func._overloadpacket in _SORTING else result
        if not _selects(func, args, chosen):
            return result
        if self.runs == 1:
            self.recorded.append((func, chosen))
            return result
        known, earlier = self.recorded[self.at] if self.at < len(self.recorded) else (None, None)
        if known is not func:
            self.at = len(self.recorded)  # another course: nothing that follows corresponds
            return result
        self.at += 1
        if chosen is result:
            return (
                earlier
                if func._overloadpacket is torch.ops.torchvision.nms or earlier.shape == result.shape
                else result
            )
        if earlier.shape != chosen.shape:
            return result
        names = [argument.name for argument in func._schema.arguments]
        dim = {**dict(zip(names, args, strict=False)), **(kwargs or {})}.get("dim", -1)
        return args[0].gather(dim, earlier), earlier


def _selects(func: Any, args: Any, chosen: Any) -> bool:
    """Whether an operation computed indices, or a vector of truth values, from floating-point numbers."""
    if not isinstance(chosen, Tensor) or chosen.is_floating_point() or func._schema.is_mutable:
        return False
    if func._overloadpacket is torch.ops.aten._to_copy:  # of numbers that are whole, such as sizes
        return False
    if chosen.dtype == torch.bool and chosen.dim() != 1:  # of activation functions, for example
        return False
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(args))
