"""Count multiply-adds with PyTorch's `FlopCounterMode`, and raise on a product that it has no formula for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slimming.errors import ConfigError

PRODUCTS = ("attention", "conv", "einsum", "gru", "lstm", "matmul", "rnn")
"""Parts of the names of operations that multiply matrices, as all do whose names end in "mm"."""


def _scaled_dot_product(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    *batch, rows, size = query
    scores = rows * key[-2]
    for number in batch:
        scores *= number
    return 2 * scores * (size + value[-1])


def _matrix_vector(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * torch.Size(matrix).numel()


def _add_matrix_vector(added: Sequence[int], matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * torch.Size(matrix).numel()


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.dot: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    # Before PyTorch 2.15 the first has no formula, and those of the others want as many heads of keys as of queries.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_flash_attention: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_efficient_attention: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _scaled_dot_product,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _scaled_dot_product,
}
"""What PyTorch's counter lacks: floating-point operations, two per multiply-add, from the shapes of the arguments."""


class MacCounter(TorchDispatchMode):
    """Counts the multiply-adds of matrix products and convolutions while it is active.

    A multiply-add counts as one. Element-wise operations, norms and softmax count as none.

    Args:
        note: called after each operation with multiply-adds, with its arguments and their number.

    Raises:
        ConfigError: in the model's forward: an operation looks like a matrix product, but there is no formula for it.
    """

    def __init__(self, note: Callable[[Sequence[Any], int], None] = lambda args, macs: None) -> None:
        super().__init__()
        self._note = note
        self._flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)

    @property
    def total(self) -> int:
        """Multiply-adds since it was entered last."""
        return self._flops.get_total_flops() // 2

    def __enter__(self) -> MacCounter:
        self._flops.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._flops.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.total
        out = func(*args, **(kwargs or {}))
        macs, operation = self.total - before, func._overloadpacket
        name = operation.__name__
        if macs:
            self._note(args, macs)
        elif operation not in self._flops.flop_registry and (name.endswith("mm") or any(p in name for p in PRODUCTS)):
            raise ConfigError(
                f"The multiply-adds of the operation {name} are not known, so this model cannot be counted. Put the "
                "layer that does it into other operations, such as torch.matmul."
            )
        return out


@contextmanager
def unfused() -> Iterator[None]:
    """Have torch's own attention do its products one by one: the dispatcher sees nothing inside its fused layers."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
