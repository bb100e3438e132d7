"""What masks keep in memory while they learn, counted, and the gradients of what takes less."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from slimming.counting.measured import peak_bytes
from slimming.masks.parametrization import Factor, Scaled
from slimming.masks.tokens import KeyBiasMask

ALL = ("head_dim", "mlp", "token", "block", "width")


def peak(kinds: tuple[str, ...], batch: int) -> int:
    """Bytes that one forward and backward pass holds at most."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=128, patch_size=8, depth=3, num_classes=10)
    groups = [group for group in slimming.describe(model) if group.kind in kinds]
    penalty = slimming.attach(model, groups).penalty if groups else lambda: torch.zeros(())
    images = torch.randn(batch, 3, 128, 128)
    return peak_bytes(lambda: (model(images).square().sum() + penalty()).backward())


def test_masks_of_all_kinds_keep_one_copy_of_the_weights_that_they_scale() -> None:
    plain, few, every = (peak(kinds, 4) for kinds in ((), ALL[:2], ALL))
    assert plain < few <= 1.1 * plain
    # Tokens, branches and width scale what is scaled anyway, vectors, or attention in the fused kernel.
    assert every <= 1.01 * few


def test_what_masks_keep_does_not_grow_with_the_batch() -> None:
    more = [peak(ALL, batch) - peak((), batch) for batch in (2, 8)]
    assert more[1] <= 1.05 * more[0]


@pytest.mark.parametrize("value_size", [8, 12], ids=lambda size: f"values of {size}")
@pytest.mark.parametrize("alive", [1.0, 0.0], ids=["all", "some gone"])
def test_a_bias_that_learns_has_the_gradients_of_a_mask(value_size: int, alive: float) -> None:
    torch.manual_seed(1)
    given = [torch.randn(2, 3, 5, size, dtype=torch.float64, requires_grad=True) for size in (8, 8, value_size)]
    bias = torch.randn(1, 1, 1, 5, dtype=torch.float64)
    bias[..., 2] = bias[..., 2] if alive else -torch.inf
    bias.requires_grad_()
    ours = F.scaled_dot_product_attention(*given, attn_mask=bias.as_subclass(KeyBiasMask))
    theirs = F.scaled_dot_product_attention(*given, attn_mask=bias)
    wanted = torch.randn_like(theirs)
    assert type(ours) is Tensor
    assert torch.allclose(ours, theirs, atol=1e-12)
    for mine, its in zip(
        torch.autograd.grad(ours, [*given, bias], wanted),
        torch.autograd.grad(theirs, [*given, bias], wanted),
        strict=True,
    ):
        assert torch.allclose(mine, its, atol=1e-11)


def test_a_bias_that_learns_under_autocast_and_by_position() -> None:
    torch.manual_seed(3)
    given = [torch.randn(2, 3, 5, 8, dtype=torch.bfloat16) for _ in range(3)]
    bias = torch.randn(1, 1, 1, 5, requires_grad=True)
    found = []
    for mask in (bias.as_subclass(KeyBiasMask), bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = F.scaled_dot_product_attention(*given, mask, 0.0, False)
        found += torch.autograd.grad(out.float().square().sum(), bias)
        assert out.dtype is torch.bfloat16
    assert torch.allclose(found[0], found[1], atol=0.05 * float(found[1].abs().max()))


def test_a_bias_that_learns_is_an_ordinary_tensor_elsewhere() -> None:
    bias = torch.zeros(1, 1, 1, 5, requires_grad=True).as_subclass(KeyBiasMask)
    assert type(bias + 1.0) is Tensor
    with torch.no_grad():
        assert F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 4), attn_mask=bias).shape == (1, 2, 5, 4)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "learning"])
def test_a_tensor_of_several_masks_has_the_gradients_of_their_product(frozen: bool) -> None:
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64), requires_grad=not frozen)
    rows, columns, halves = (nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in (4, 6, 2))
    scaled = Scaled()
    scaled.add(Factor(rows, 0, [[row] for row in range(4)], 4))
    scaled.add(Factor(columns, 1, [[column] for column in range(6)], 6))
    scaled.add(Factor(halves, 1, [[0, 1, 2], [3, 4]], 6))
    masks: list[Any] = [rows, columns, halves]
    explicit = (
        weight * rows[:, None] * columns * torch.cat([halves.repeat_interleave(torch.tensor([3, 2])), rows.new_ones(1)])
    )
    wanted = torch.randn_like(explicit)
    leaves = masks if frozen else [weight, *masks]
    assert torch.allclose(scaled(weight), explicit)
    for mine, its in zip(
        torch.autograd.grad(scaled(weight), leaves, wanted), torch.autograd.grad(explicit, leaves, wanted), strict=True
    ):
        assert torch.allclose(mine, its)
