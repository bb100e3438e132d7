"""What a search step costs over a plain training step.

    python benchmarks/search_overhead.py

Cases, timed in turn within one run: the plain step; the same step of a second plain model, whose ratio should be
1, so that what it misses says how far the others can be trusted; slimming's masks on attention and MLP; the same
with tokens; and, for comparison, masks that multiply the activations, as in ViT-Slim's published code (coupled q,
k and v after the projection; hidden units after the activation; tokens after each norm), written here with
hooks. A step is forward, cross-entropy, penalty, backward, the masks' score statistics, and AdamW. The input
is random. Memory: weights, AdamW's averages, and the most bytes of tensors that are alive at once in a step, for
the small batch that is timed and for a usual one; they are counted, and the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from common import Spread, interleaved, parser, ratios, table, write
from slimming.counting.measured import peak_bytes

MEMORY_LIMIT = 1.05
LIMITS = {"weights: attention + MLP": 1.03, "weights: attention + MLP + tokens": 1.10, "weights: all kinds": 1.05}


Case = Callable[[], "Step"]


@dataclass(frozen=True)
class Step:
    """A training step of a batch of any size, and the parameters that it trains."""

    run: Callable[[int], None]
    trained: Sequence[nn.Parameter]

    def peak(self, batch: int) -> int:
        """Bytes of weights and AdamW's two averages, and the most that the tensors of a step take at once."""
        self.run(1)  # makes the averages
        lasting = 3 * sum(p.numel() * p.element_size() for p in self.trained)
        return lasting + peak_bytes(lambda: self.run(batch))


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
    settings: argparse.Namespace,
    masks: Sequence[nn.Parameter] = (),
    penalty: Callable[[], Tensor] | None = None,
    collect: Callable[[], None] | None = None,
) -> Step:
    """One training step of ``model``."""
    own = {id(mask) for mask in masks}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in own]
    groups = [{"params": weights, "weight_decay": 1e-3}, {"params": list(masks), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups if masks else groups[:1], lr=1e-6)
    size = max(settings.batch, settings.memory_batch)
    images = torch.randn(1, 3, *size_of(model)).expand(size, -1, -1, -1)
    labels = torch.randint(settings.classes, (size,))

    def run(batch: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images[:batch]), labels[:batch])
        (loss if penalty is None else loss + penalty()).backward()
        if collect is not None:
            collect()
        optimizer.step()

    return Step(run, [*weights, *masks])


def size_of(model: nn.Module) -> tuple[int, int]:
    """Pixels that the model takes."""
    embed: Any = model.get_submodule("patch_embed")
    return embed.img_size


def with_masks(settings: argparse.Namespace, kinds: Sequence[str]) -> Step:
    """Ours, on the weights."""
    model = build(settings)
    images = torch.randn(2, 3, *size_of(model))
    expected = model.eval()(images).detach()
    masks = slimming.attach(model, [g for g in slimming.describe(model) if g.kind in kinds])
    # A step is only worth timing if it trains the same function.
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    return step(model.train(), settings, list(masks.values()), masks.penalty, masks.collect)


def with_activation_masks(settings: argparse.Namespace, *, tokens: bool) -> Step:
    """The paper's, on the activations."""
    model = build(settings)
    images = torch.randn(2, 3, *size_of(model))
    expected = model.eval()(images).detach()
    hung = on_activations(model, tokens=tokens)
    if not tokens:
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    return step(model.train(), settings, hung, lambda: 1e-4 * torch.cat(hung).abs().sum())


def cases(settings: argparse.Namespace) -> dict[str, Case]:
    """How each case is made."""
    return {
        "plain": lambda: step(build(settings), settings),
        "plain, once more": lambda: step(build(settings), settings),
        "weights: attention + MLP": lambda: with_masks(settings, ("head_dim", "mlp")),
        "weights: attention + MLP + tokens": lambda: with_masks(settings, ("head_dim", "mlp", "token")),
        "weights: all kinds": lambda: with_masks(settings, ("head_dim", "mlp", "token", "block", "width")),
        "activations: attention + MLP": lambda: with_activation_masks(settings, tokens=False),
        "activations: attention + MLP + tokens": lambda: with_activation_masks(settings, tokens=True),
    }


def main() -> None:
    arguments = parser(__doc__, rounds=30)
    arguments.add_argument("--model", default="deit_small_patch16_224")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--memory-batch", type=int, default=64, help="the usual batch whose memory is counted")
    arguments.add_argument("--classes", type=int, default=1000)
    settings = arguments.parse_args()

    torch.set_num_threads(settings.threads)
    batches = (settings.batch, settings.memory_batch)
    made = cases(settings)
    # One case at a time: several large models beside a large batch need more memory than they tell apart.
    peaks = {name: [make().peak(batch) for batch in batches] for name, make in made.items() if "once" not in name}
    peaks["plain, once more"] = peaks["plain"]
    steps = {name: make() for name, make in made.items()}
    runs = {name: partial(each.run, settings.batch) for name, each in steps.items()}
    seconds = interleaved(runs, rounds=settings.rounds, threads=settings.threads)
    rows = []
    for name, measured in seconds.items():
        ratio, limit = ratios(measured, seconds["plain"]), LIMITS.get(name)
        memory = [peak / plain for peak, plain in zip(peaks[name], peaks["plain"], strict=True)]
        rows.append(
            {
                "case": name,
                "step_ms": Spread.of([1e3 * value for value in measured]),
                "over_plain": ratio,
                "limit": limit,
                "held": None if limit is None else ratio.median <= limit,
                "peak_bytes": dict(zip(map(str, batches), peaks[name], strict=True)),
                "memory_over_plain": dict(zip(map(str, batches), memory, strict=True)),
                "memory_held": None if limit is None else memory[-1] <= MEMORY_LIMIT,
            }
        )
    cells = [
        [
            row["case"],
            row["step_ms"].text(0),
            row["over_plain"].text(),
            f"{row['limit'] or ''} {_word(row['held'])}".strip(),
            *(f"{value:.3f}" for value in row["memory_over_plain"].values()),
            _word(row["memory_held"]),
        ]
        for row in rows
    ]
    head = ["masks on", "step, ms", "over the plain step", "at most", *(f"peak memory, batch {b}" for b in batches)]
    markdown = table([*head, f"at most {MEMORY_LIMIT}"], cells)
    write("search_overhead", settings=settings, rows=rows, markdown=markdown)


def _word(held: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[held]


if __name__ == "__main__":
    main()
