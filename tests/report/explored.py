"""What the explorer shows, made up in a moment at any size and without a model."""

from __future__ import annotations

import random
from pathlib import Path

from slimming.report.explored import Costs, Explored, Recipe, Step
from slimming.report.model import Head, Kept, Layer, Tokens
from slimming.report.pages import read_results

from .conftest import Shape

VIT_B = Shape(
    name="ViT-B", model="vit_base_patch16_224", image=224, grid=14, layers=12, heads=12, head_dim=64, hidden=3072,
    params=86_567_656, macs=17_560_000_000, latency=(190.0, 4800.0), top1=0.81, budgets=(0.8, 0.6, 0.4), epochs=10,
)  # fmt: skip


def explored(run: Path, shape: Shape, *, latency: bool = True, seed: int = 0) -> Explored:
    """The explorer of a run that `fabricate` made."""
    results, draw = read_results(run), random.Random(seed)
    order = {place: draw.sample(range(shape.grid**2), shape.grid**2) for place in range(shape.layers)}
    dense = _costs(shape, 1.0, latency)

    metrics = ["macs", "params", *(["latency"] if latency else [])]
    return Explored(
        name=shape.name,
        place=str(run),
        model=shape.model,
        dense=dense,
        steps={
            metric: tuple(_step(shape, metric, hundredth / 100, order, latency) for hundredth in range(20, 101))
            for metric in metrics
        },
        measured=(results.dense, *results.rows),
        times={row.name: shape.latency[0] * row.limits.get("macs", 1.0) for row in (results.dense, *results.rows)}
        if latency
        else {},
        recipe=Recipe(
            command=(f"slimming cut {run} --budget ", f" --solver nested --output {run}-", ""),
            python=("plan = slimming.plan(result, slimming.Budget(", "))\nslimming.save(small, '", "')"),
        ),
        latency="batch 1, eager, A CPU" if latency else "",
        pictures=results.images,
    )


def _costs(shape: Shape, share: float, latency: bool) -> Costs:
    return Costs(
        params=round(shape.params * (0.15 + 0.85 * share)),
        macs=round(shape.macs * share),
        memory_bytes=round(shape.params * 4.6 * (0.2 + 0.8 * share)),
        latency_ms=shape.latency[0] * share if latency else None,
    )


def _step(shape: Shape, metric: str, share: float, order: dict[int, list[int]], latency: bool) -> Step:
    layers = []
    alive = set(range(shape.grid**2))
    for depth in range(shape.layers):
        depth_share = share ** (0.4 + depth / shape.layers)
        units = 8 * max(1, round(shape.head_dim * depth_share / 8))
        gone = depth == shape.layers - 1 and share < 0.5
        kept = [0 if gone and head == 1 else units for head in range(shape.heads)]
        heads = tuple(Head(qk=one, v=one, of=shape.head_dim) for one in kept)
        count = max(1, round(shape.grid**2 * share ** (0.3 * depth)))
        alive = set(order[depth]) & alive if count >= len(alive) else set(sorted(alive, key=order[0].index)[:count])
        layers.append(
            Layer(
                name=f"blocks.{depth}", label=str(depth), heads=heads,
                mlp=Kept(kept=max(8, round(shape.hidden * depth_share)), of=shape.hidden),
                tokens=Tokens(grid=(shape.grid, shape.grid), kept=frozenset(alive)),
            )
        )  # fmt: skip
    name = f"{metric}-{share:.2f}"
    costs = _costs(shape, share, latency)
    return Step(share=share, name=name, costs=costs, kept_score=1 - (1 - share) ** 3, layers=tuple(layers))
