"""Count multiply-adds by the formulas of PyTorch's `FlopCounterMode`, and raise on a matrix product without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slimming.errors import ConfigError

PRODUCTS = ("attention", "conv", "einsum", "gru", "lstm", "matmul", "rnn")
"""Operations that have one of these in their name multiply matrices, as do those whose names end in "mm"."""


def _scaled_dot_product(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    scores = torch.Size(query[:-1]).numel() * key[-2]
    return 2 * scores * (query[-1] + value[-1])


def _matrix_vector(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * torch.Size(matrix).numel()


def _linear(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * torch.Size(rows).numel() * weight[0]


def _add_matrix_vector(added: Sequence[int], matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * torch.Size(matrix).numel()


def _lstm(inputs: Sequence[int], rows: Sequence[int], recurrent: Sequence[int], *_: Any, **__: Any) -> int:
    """One layer in one direction, as it runs in float32 on CPUs; in other dtypes it is made of other operations."""
    return 2 * torch.Size(inputs[:-1]).numel() * (torch.Size(rows).numel() + torch.Size(recurrent).numel())


FORMULAS: dict[Any, Callable[..., int]] = {
    # In inference mode, in which operations are not taken apart.
    torch.ops.aten.linear: _linear,
    torch.ops.aten.scaled_dot_product_attention: _scaled_dot_product,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.dot: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.mkldnn_rnn_layer: _lstm,
    # Before PyTorch 2.15 the first has no formula, and those of the others need equal numbers of query and key heads.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_flash_attention: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_efficient_attention: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _scaled_dot_product,
}
"""Formulas that PyTorch's counter lacks: shapes of the arguments -> floating-point operations, two per multiply-add."""


class MacCounter(TorchDispatchMode):
    """Counts the multiply-adds of matrix products and convolutions while it is active.

    A multiply-add counts as one. Element-wise operations, norms and softmax count as none.

    Attributes:
        total: multiply-adds so far.

    Args:
        note: called after each operation that has multiply-adds, with the operation, its arguments and the number.

    Raises:
        ConfigError: raised from the model's forward if an operation looks like a matrix product but has no formula.
    """

    def __init__(self, note: Callable[[Any, Sequence[Any], int], None] = lambda operation, args, macs: None) -> None:
        super().__init__()
        self.total = 0
        self._note = note
        # FlopCounterMode is not entered, only its formulas are used: it registers gradient hooks on inputs of modules,
        # and fails if these are views of parameters made under no_grad, such as the latent of attention pooling.
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation, name = func._overloadpacket, func._overloadpacket.__name__
        if operation in self._formulas:
            macs = self._formulas[operation](*args, **kwargs, out_val=out) // 2
            self.total += macs
            if macs:
                self._note(operation, args, macs)
        elif name.endswith("mm") or any(part in name for part in PRODUCTS):
            raise ConfigError(
                f"The multiply-adds of the operation {name} are not known, so this model cannot be counted. Write the "
                "layer that calls it with other operations, such as torch.matmul."
            )
        return out


@contextmanager
def unfused() -> Iterator[None]:
    """Disable the fast path of `torch.nn.MultiheadAttention`, whose products the dispatcher does not see."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
