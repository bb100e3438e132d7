"""What a search step costs over a plain training step.

    python benchmarks/search_overhead.py

Cases, timed in turn within one run: the plain step; the same step of a second plain model, whose ratio should be
1, so that what it misses says how far the others can be trusted; slimming's masks on attention and MLP; the same
with tokens; and, for comparison, masks that multiply the activations, as in ViT-Slim's published code (coupled q,
k and v after the projection; hidden units after the activation; tokens after each norm), written here with
hooks. A step is forward, cross-entropy, penalty, backward, the masks' score statistics, and AdamW. The input
is random. Kept for backward: bytes of the tensors that autograd holds after the forward pass, weights included;
they are counted, and the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from common import Spread, interleaved, parser, ratios, table, write

LIMITS = {"weights: attention + MLP": 1.03, "weights: attention + MLP + tokens": 1.10, "weights: all kinds": 1.05}


@dataclass(frozen=True)
class Step:
    """A training step, and the bytes that its forward pass keeps for backward."""

    run: Callable[[], None]
    kept: int


def build(settings: argparse.Namespace) -> nn.Module:
    torch.manual_seed(settings.seed)
    return timm.create_model(settings.model, num_classes=settings.classes).train()


def on_activations(model: nn.Module, *, tokens: bool) -> list[nn.Parameter]:
    """Hang masks on the activations of every block; returns their parameters."""
    masks: list[nn.Parameter] = []

    def scale(module: nn.Module, shape: tuple[int, ...], repeat: int = 1, *, is_token: bool = False) -> None:
        mask = nn.Parameter(torch.full(shape, 3.0 if is_token else 1.0))
        masks.append(mask)

        def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
            if is_token:
                factor = torch.tanh(mask)
                ones = factor.new_ones(output.shape[1] - factor.numel())
                return output * torch.cat([ones, factor]).view(1, -1, 1)
            return (output.unflatten(-1, (repeat, -1)) * mask).flatten(-2)

        module.register_forward_hook(hook)

    positions = model.patch_embed.num_patches
    for block in model.blocks:
        scale(block.attn.qkv, (block.attn.qkv.out_features // 3,), repeat=3)
        scale(block.mlp.act, (block.mlp.fc1.out_features,))
        for norm in (block.norm1, block.norm2) if tokens else ():
            scale(norm, (positions,), is_token=True)
    return masks


def step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Sequence[nn.Parameter] = (),
    penalty: Callable[[], Tensor] | None = None,
    collect: Callable[[], None] | None = None,
) -> Step:
    """One training step of ``model``, and what its forward pass keeps."""
    own = {id(mask) for mask in masks}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in own]
    groups = [{"params": weights, "weight_decay": 1e-3}, {"params": list(masks), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups if masks else groups[:1], lr=1e-6)

    def forward() -> Tensor:
        loss = F.cross_entropy(model(images), labels)
        return loss if penalty is None else loss + penalty()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss: Any = forward()
        loss.backward()
        if collect is not None:
            collect()
        optimizer.step()

    return Step(run, kept_bytes(forward))


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of all storages that autograd keeps for backward."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()  # alive, so that no storage takes the place of another
    del loss
    return sum(seen.values())


def cases(settings: argparse.Namespace) -> dict[str, Step]:
    plain = build(settings)
    size = plain.patch_embed.img_size
    images = torch.randn(settings.batch, 3, *size)
    labels = torch.randint(settings.classes, (settings.batch,))
    expected = plain.eval()(images).detach()
    found = {"plain": step(plain.train(), images, labels), "plain, once more": step(build(settings), images, labels)}
    for name, kinds in (
        ("weights: attention + MLP", ("head_dim", "mlp")),
        ("weights: attention + MLP + tokens", ("head_dim", "mlp", "token")),
        ("weights: all kinds", ("head_dim", "mlp", "token", "block", "width")),
    ):
        model = build(settings)
        masks = slimming.attach(model, [g for g in slimming.describe(model) if g.kind in kinds])
        # A step is only worth timing if it trains the same function.
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-3, atol=1e-4)
        found[name] = step(model.train(), images, labels, list(masks.values()), masks.penalty, masks.collect)
    for name, tokens in (
        ("activations: attention + MLP", False),
        ("activations: attention + MLP + tokens", True),
    ):
        model = build(settings)
        hung = on_activations(model, tokens=tokens)
        if not tokens:
            torch.testing.assert_close(model.eval()(images), expected, rtol=1e-3, atol=1e-4)
        found[name] = step(model.train(), images, labels, hung, lambda hung=hung: 1e-4 * torch.cat(hung).abs().sum())
    return found


def main() -> None:
    arguments = parser(__doc__, rounds=30)
    arguments.add_argument("--model", default="deit_small_patch16_224")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--classes", type=int, default=1000)
    settings = arguments.parse_args()

    steps = cases(settings)
    runs = {name: each.run for name, each in steps.items()}
    seconds = interleaved(runs, rounds=settings.rounds, threads=settings.threads)
    rows = []
    for name, measured in seconds.items():
        step_ms = Spread.of([1e3 * value for value in measured])
        ratio = ratios(measured, seconds["plain"])
        limit = LIMITS.get(name)
        verdict = None if limit is None else ratio.median <= limit
        kept = steps[name].kept / steps["plain"].kept
        row = {"case": name, "step_ms": step_ms, "over_plain": ratio, "limit": limit, "held": verdict, "kept": kept}
        rows.append(row)
    cells = [
        [
            row["case"],
            row["step_ms"].text(0),
            row["over_plain"].text(),
            row["limit"] or "",
            _word(row["held"]),
            f"{row['kept']:.3f}",
        ]
        for row in rows
    ]
    markdown = table(["masks on", "step, ms", "over the plain step", "limit", "held", "kept for backward"], cells)
    write("search_overhead", settings=settings, rows=rows, markdown=markdown)


def _word(held: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[held]


if __name__ == "__main__":
    main()
