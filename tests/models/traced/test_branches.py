"""Whole residual branches and blocks of models that are read by tracing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

import slimming
from slimming.core.copies import copied

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """Self-attention that returns a tuple of its output and its weights, if these are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, wants_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        out = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return out, weights if wants_weights else None


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))


class PreNorm(nn.Module):
    """x + f(norm(x)), with drop path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.drop1 = nn.LayerNorm(WIDTH), Attention(), DropPath(0.2)
        self.norm2, self.mlp, self.drop2 = nn.LayerNorm(WIDTH), mlp(), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.attention(self.norm1(x))[0])
        return x + self.drop2(self.mlp(self.norm2(x)))


class PostNorm(PreNorm):
    """norm(x + f(x)), as in the first transformers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x)[0])
        return self.norm2(x + self.mlp(x))


class NormInBranch(PreNorm):
    """x + norm(f(x)), as in Swin v2."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attention(x)[0])
        return x + self.norm2(self.mlp(x))


class Parallel(PreNorm):
    """x + f(norm(x)) + g(norm(x)), with one norm for both."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return x + self.drop1(self.attention(y)[0]) + self.drop2(self.mlp(y))


class Scaled(PreNorm):
    """LayerScale as parameters of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.gamma1 * self.attention(self.norm1(x))[0])
        return x + self.drop2(self.gamma2 * self.mlp(self.norm2(x)))


class InOneForward(nn.Module):
    """A mixer of tokens whose product is in the forward of the block, so that only the block can be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(16, 16))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + self.out(self.mixer @ self.norm(x)),)


class Tokens(nn.Module):
    """Two blocks over the patches of an image."""

    image_size = 16

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        x: Any = self.patches(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(self.norm(x).mean(1))


class Convolutions(nn.Module):
    """relu(x + f(x)), as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


class Residual(nn.Module):
    """A module around any other that adds its input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def net(*blocks: nn.Module) -> nn.Module:
    stem, head = [nn.Conv2d(3, 8, 3), nn.ReLU()], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    model: Any = nn.Sequential(*stem, *blocks, *head)
    model.image_size = 16
    return model


class DualPath(nn.Module):
    """Two layers read what a third makes; one is added to a part of the stream, the other is put beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(8, 12, 1), nn.Sequential(nn.Conv2d(12, 16, 1), nn.ReLU())
        self.added, self.beside, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        wide = self.wide(x)
        return self.last(torch.cat([x[:, :8] + self.added(wide), x[:, 8:], self.beside(wide)], 1))


def inverted() -> nn.Module:
    wide = (nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6())
    return Residual(*wide, nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))


def both(block: str) -> list[str]:
    return [f"blocks.{number}.{branch}.branch" for number in (0, 1) for branch in block.split()]


MODELS = {
    "pre-norm": (lambda: Tokens(PreNorm), both("attention mlp")),
    "post-norm": (lambda: Tokens(PostNorm), both("attention mlp")),
    "norm in the branch": (lambda: Tokens(NormInBranch), both("attention mlp")),
    "parallel": (lambda: Tokens(Parallel), both("attention mlp")),
    "layer scale": (lambda: Tokens(Scaled), both("attention mlp")),
    "whole block": (lambda: Tokens(InOneForward), ["blocks.0.branch", "blocks.1.branch"]),
    "convolutions": (lambda: net(Convolutions(), Convolutions()), ["2.branch", "3.branch"]),
    "inverted residual": (lambda: net(inverted(), inverted()), ["2.branch", "3.branch"]),
    # Zeros in the place of `added` have the width of `wide`, which fits only if that keeps half of its channels.
    "another width": (lambda: net(DualPath()), []),
}


def branches(model: nn.Module) -> list[str]:
    return [group.name for group in slimming.describe(model) if group.kind == "block"]


def without(model: nn.Module, *names: str) -> nn.Module:
    """The model cut without the branches ``names``."""
    kept = {name: () if name in names else (0,) for name in branches(model)}
    return slimming.cut(model, slimming.Plan(kept=kept, sizes=dict.fromkeys(kept, 1)))


@pytest.mark.parametrize(("make", "names"), MODELS.values(), ids=MODELS)
def test_a_branch_set_to_0_equals_the_branch_removed(make: Any, names: list[str]) -> None:
    torch.manual_seed(0)
    model = make()
    assert branches(model) == names
    found = slimming.check(model)
    # A model of the user's own is loaded with a dense one, which `check` does not have.
    assert all(step.held for step in found.steps[:2]), str(found)


@pytest.mark.parametrize("kind", [kind for kind, (_, names) in MODELS.items() if names], ids=str)
def test_nothing_of_a_removed_branch_is_left(kind: str, tmp_path: Path) -> None:
    make, names = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    small = without(model, *names)
    left = {name.rpartition(".")[0] for name in small.state_dict() if name.startswith(("blocks.", "2.", "3."))}
    norms = [f"blocks.{number}.norm{place}" for number in (0, 1) for place in (1, 2)]
    # A norm after the addition stays, and one that two branches read.
    assert left == set({"post-norm": norms, "parallel": norms[::2]}.get(kind, ()))
    slimming.save(small, tmp_path / "slim")
    again = slimming.load(tmp_path / "slim", dense=make())
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = small.eval()(image)
        for other in (again.eval(), copied(small), _pickled(small)):
            torch.testing.assert_close(other(image), expected, rtol=0, atol=0)
        exported = torch.export.export(small, (image,)).module()(image)
    torch.testing.assert_close(exported, expected)


def test_a_model_without_a_branch_is_cut_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = without(Tokens(Scaled).eval(), "blocks.0.attention.branch")
    assert branches(small) == both("attention mlp")[1:]
    smaller = without(small, "blocks.0.mlp.branch", "blocks.1.attention.branch")
    assert branches(smaller) == ["blocks.1.mlp.branch"]
    assert not [name for name in smaller.state_dict() if name.startswith("blocks.0.")]
    slimming.save(smaller, tmp_path / "slim")
    image = torch.randn(2, 3, 16, 16)
    again = slimming.load(tmp_path / "slim", dense=Tokens(Scaled)).eval()
    torch.testing.assert_close(again(image), smaller(image), rtol=0, atol=0)


def test_what_a_removed_module_lacks_is_said() -> None:
    small: Any = without(Tokens(PreNorm), "blocks.0.attention.branch")
    attention = small.blocks[0].attention
    assert attention.num_heads == HEADS  # settings stay for hosts that read them
    with pytest.raises(AttributeError, match="Attention was cut from this model, so that it has no 'qkv'"):
        attention.qkv  # noqa: B018


def test_a_budget_removes_branches_on_request() -> None:
    torch.manual_seed(0)
    scored = slimming.score(Tokens(PreNorm).eval(), [torch.rand(4, 3, 16, 16)], kinds=["block", "mlp"])
    plan = slimming.plan(scored, slimming.Budget(keep={"block": 0.5, "mlp": 0.5}))
    assert sum(len(units) for name, units in plan.kept.items() if name.endswith(".branch")) == 2
    small = slimming.cut(scored.model, plan)
    assert slimming.cost(scored.model, plan).params == sum(each.numel() for each in small.parameters())


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_attentions_side_by_side_are_no_branches_of_their_own() -> None:
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_18x2_224", num_classes=3, **small)
    assert [group.name for group in slimming.describe(model) if group.kind == "block"] == []
    assert slimming.check(model).ok
