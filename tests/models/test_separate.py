"""Projections whose queries, keys and values differ in head size give hosts plain tensors, however they divide them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimming.errors import UnsupportedModelError
from slimming.models.separate import SeparateLinear, separate_

BATCH, TOKENS, HEADS, QK, V = 3, 3, 3, 4, 2
"""As many images, tokens and heads as parts, so that none is taken for the other."""


def projection(*head_sizes: int) -> SeparateLinear:
    torch.manual_seed(0)
    linear: Any = nn.Linear(5, HEADS * sum(head_sizes))
    separate_(linear, HEADS, QK, head_sizes)
    return linear


def expected(linear: SeparateLinear, x: Tensor) -> list[Tensor]:
    """Each part as (B, heads, N, size)."""
    out = nn.functional.linear(x, linear.weight, linear.bias)
    parts = out.split([HEADS * size for size in linear.head_sizes], dim=-1)
    return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]


DIVISIONS: dict[str, Callable[[Any], Any]] = {
    "unbind": lambda y: y.reshape(BATCH, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0),
    "unpacking": lambda y: [*y.view(BATCH, -1, 3, HEADS, QK).permute(2, 0, 3, 1, 4).contiguous()],
    "transposed": lambda y: [
        part.permute(1, 2, 0, 3) for part in y.reshape(BATCH, TOKENS, 3, HEADS, -1).transpose(0, 2).unbind(0)
    ],
    "items": lambda y: [y.reshape((BATCH, TOKENS, 3, HEADS, QK)).permute((2, 0, 3, 1, 4))[part] for part in range(3)],
    "chunks": lambda y: [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in y.chunk(3, dim=-1)],
    "second reshape": lambda y: [
        part.unflatten(0, (BATCH, HEADS))
        for part in y.reshape(BATCH, TOKENS, 3, HEADS, -1)
        .permute(2, 0, 3, 1, 4)
        .reshape(3, BATCH * HEADS, TOKENS, -1)
        .unbind(0)
    ],
}


@pytest.mark.parametrize("divide", DIVISIONS.values(), ids=DIVISIONS)
def test_a_joint_projection_gives_its_parts(divide: Callable[[Any], Any]) -> None:
    linear, x = projection(QK, QK, V), torch.randn(BATCH, TOKENS, 5)
    for part, wanted in zip(divide(linear(x)), expected(linear, x), strict=True):
        assert type(part) is Tensor
        assert torch.equal(part, wanted)


def test_a_projection_to_values_alone_corrects_the_size_of_heads() -> None:
    linear, x = projection(V), torch.randn(BATCH, TOKENS, 5)
    for shape in ((BATCH, TOKENS, -1, QK), (BATCH, TOKENS, HEADS, QK), (BATCH, TOKENS, HEADS, -1)):
        assert torch.equal(linear(x).view(shape).transpose(1, 2), expected(linear, x)[0])


def test_a_bias_of_all_parts_is_added() -> None:
    linear, x, bias = projection(QK, QK, V), torch.randn(BATCH, TOKENS, 5), torch.randn(HEADS * (2 * QK + V))
    y = linear(x)
    y += bias
    parts = y.reshape(BATCH, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.no_grad():
        linear.bias += bias
    for part, wanted in zip(parts, expected(linear, x), strict=True):
        torch.testing.assert_close(part, wanted)


def test_what_would_mix_the_parts_is_refused() -> None:
    y = projection(QK, QK, V)(torch.randn(BATCH, TOKENS, 5))
    for call in (lambda: y.reshape(BATCH, TOKENS, -1), lambda: y.unbind(0), lambda: y.permute(1, 0, 2)):
        with pytest.raises(UnsupportedModelError, match="different sizes"):
            call()


def test_it_is_copied_pickled_and_exported() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = projection(QK, QK, V)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    model, x = Attention(), torch.randn(BATCH, TOKENS, 5)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model.qkv)))(x).parts[2], model.qkv(x).parts[2])
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
