"""Compute norms with statistics that have no gradients, so that gradients tell apart the entries that a norm mixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LENGTHS = (torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm)


class DetachedNorms(TorchFunctionMode):
    """While it is active, the statistics of norms over the last dimensions are constants for autograd.

    Attributes:
        lengths: whether anything was divided by a length (L2 norm), as queries and keys in cosine attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths = False

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.normalize or func in _LENGTHS:
            self.lengths = True
            return _normalized(*args, **kwargs) if func is functional.normalize else func(*args, **kwargs).detach()
        if func in (functional.layer_norm, functional.rms_norm):
            return _standardised(func, args, kwargs)
        return func(*args, **kwargs)


def _normalized(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps).detach()


def _standardised(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The result of a norm, as a constant multiple of its input plus a constant, times its weight, plus its bias."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    if func is functional.rms_norm:
        names = ("input", "normalized_shape", "weight", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    x = given["input"]
    plain = func(**given).detach()
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    mean = x.mean(dims, keepdim=True) if func is functional.layer_norm else torch.zeros_like(x[..., :1])
    centred = (x - mean).detach()
    factor = torch.where(centred == 0, torch.ones_like(centred), plain / centred)
    result = plain + factor * (x - x.detach())
    result = result if weight is None else result * weight
    return result if bias is None else result + bias
