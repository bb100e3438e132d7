"""Multiply-adds of single tensor operations, from their shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slimming.errors import ConfigError


def multiply_adds(name: str, args: Sequence[Any], results: Sequence[Tensor]) -> int:
    """Multiply-adds of one operation of the dispatcher; 0 for what is not a matrix product or a convolution.

    Args:
        name: the operation's name without its overload.
        args: what it was called with.
        results: the tensors that it gave.

    Raises:
        ConfigError: it looks like a matrix product, but there is no formula for it.
    """
    if name in ("mm", "bmm"):
        return args[0].numel() * args[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return args[1].numel() * args[2].shape[-1]
    if name == "linear":
        return args[0].numel() * args[1].shape[0]
    if name in ("mv", "dot"):
        return args[0].numel()
    if name == "addmv":
        return args[1].numel()
    if name == "convolution":
        transposed = args[6]  # each input then goes to as many outputs as each output comes from otherwise
        return (args[0] if transposed else results[0]).numel() * args[1][0].numel()
    if name.startswith("_scaled_dot_product"):
        q, k, v = args[:3]
        return q.numel() * k.shape[-2] + q.numel() // q.shape[-1] * k.shape[-2] * v.shape[-1]
    if name.endswith("mm") or any(word in name for word in ("matmul", "einsum", "conv", "rnn", "lstm", "gru")):
        raise ConfigError(
            f"The multiply-adds of the operation {name} are not known, so this model cannot be counted. Put the layer "
            "that does it into other operations, such as torch.matmul."
        )
    return 0


@contextmanager
def unfused() -> Iterator[None]:
    """Have torch's own attention do its products one by one: the dispatcher sees nothing inside its fused layers."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
