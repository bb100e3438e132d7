"""How much of a cut in MACs becomes a cut in time.

    python benchmarks/realised_speed.py

Dense against cut, in PyTorch and in ONNX Runtime, all cases of one runtime and batch size timed in turns. Speed depends
on sizes alone, so the weights are random and the scores are drawn: per group a level, per unit a factor, both
log-normal, so that layers and heads come out uneven as after a search. ``converted`` is the measured speed-up over the
ratio of MACs.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

import slimming
from common import Spread, interleaved, parser, ratios, table, write
from slimming.plan import FREE
from slimming.runtimes import RUNTIMES, prepare

EVEN = slimming.Layout()
LAYOUTS = {
    "default": (EVEN, ("head_dim", "mlp", "token"), 0.95),
    "default, no tokens": (EVEN, ("head_dim", "mlp"), 0.95),
    "uneven heads, multiples of 16": (slimming.Layout(equal_heads=False, multiple=16), ("head_dim", "mlp"), 0.9),
    "uneven heads, multiples of 8": (slimming.Layout(equal_heads=False), ("head_dim", "mlp"), 0.9),
    "uneven heads, any size": (FREE, ("head_dim", "mlp"), 0.9),
}


@dataclass(frozen=True)
class Slim:
    """One cut model and what was asked for."""

    budget: float
    layout: str
    model: nn.Module
    macs: int
    shares: dict[str, float]

    @property
    def name(self) -> str:
        """Its name among the timed cases."""
        return f"{self.budget:.2f} {self.layout}"


def draw_(masks: Any, seed: int) -> None:
    """Give every mask drawn factors, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in masks.values():
            level = 0.3 * torch.randn((), generator=generator)
            mask.copy_((level + 0.5 * torch.randn(mask.shape, generator=generator)).exp())


def slim(dense: nn.Module, budget: float, layout: str, seed: int) -> Slim:
    """Cut ``dense`` to a share of its MACs under one of `LAYOUTS`."""
    wanted, kinds, _ = LAYOUTS[layout]
    masked = copy.deepcopy(dense)
    masks = slimming.attach(masked, [g for g in slimming.describe(masked) if g.kind in kinds])
    draw_(masks, seed)
    plan = slimming.plan(masks, slimming.Budget(macs=budget), layout=wanted, score="mask")
    kept: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for group in masks.groups:
        kept[group.kind] += len(plan.kept.get(group.name, range(group.size)))
        total[group.kind] += group.size
    model = slimming.cut(dense, plan).eval()
    shares = {kind: round(kept[kind] / total[kind], 3) for kind in total}
    return Slim(budget, layout, model, slimming.cost(model).macs, shares)


def measure(
    dense: nn.Module, slims: Sequence[Slim], batch: int, runtime: str, settings: argparse.Namespace
) -> list[dict[str, Any]]:
    images = torch.randn(batch, 3, *dense.patch_embed.img_size)
    models = {"dense": dense, **{each.name: each.model for each in slims}}
    torch.set_num_threads(settings.threads)
    cases: dict[str, Callable[[], object]] = {
        name: partial(prepare(model, images, runtime), images) for name, model in models.items()
    }
    number = max(1, 8 // batch)
    with torch.inference_mode():
        seconds = interleaved(cases, rounds=settings.rounds, threads=settings.threads, number=number)
    dense_macs = slimming.cost(dense).macs
    rows: list[dict[str, Any]] = [
        {"runtime": runtime, "batch": batch, "layout": "dense", "macs": dense_macs, "latency_ms": _ms(seconds["dense"])}
    ]
    for each in slims:
        speedup = ratios(seconds["dense"], seconds[each.name])
        macs_ratio = dense_macs / each.macs
        converted = Spread(*(getattr(speedup, key) / macs_ratio for key in ("median", "p25", "p75")), speedup.runs)
        goal = LAYOUTS[each.layout][2]
        rows.append(
            {
                "runtime": runtime,
                "batch": batch,
                "layout": each.layout,
                "budget_macs": each.budget,
                "kept": each.shares,
                "macs": each.macs,
                "latency_ms": _ms(seconds[each.name]),
                "speedup": speedup,
                "macs_ratio": macs_ratio,
                "converted": converted,
                "goal": goal,
                "held": None if goal is None else converted.median >= goal,
            }
        )
    return rows


def _ms(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e3 * value for value in seconds])


def _cells(row: dict[str, Any]) -> list[object]:
    start = [row["runtime"], row["batch"], row.get("budget_macs", ""), row["layout"], f"{row['macs'] / 1e9:.2f}"]
    if row["layout"] == "dense":
        return [*start, row["latency_ms"].text(1), "1.000", "", ""]
    held = "" if row["goal"] is None else f"{row['goal']:.2f}: {'yes' if row['held'] else 'no'}"
    return [*start, row["latency_ms"].text(1), row["speedup"].text(2), row["converted"].text(2), held]


def main() -> None:
    arguments = parser(__doc__, rounds=20)
    arguments.add_argument("--model", default="deit_small_patch16_224")
    arguments.add_argument("--runtimes", nargs="+", default=["eager", "onnxruntime"], choices=RUNTIMES)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    settings = arguments.parse_args()
    torch.manual_seed(settings.seed)

    dense = timm.create_model(settings.model).eval()
    slims = [slim(dense, budget, layout, settings.seed) for budget in settings.budgets for layout in LAYOUTS]
    pairs = [(runtime, batch) for runtime in settings.runtimes for batch in settings.batches]
    rows = [row for runtime, batch in pairs for row in measure(dense, slims, batch, runtime, settings)]
    header = ["runtime", "batch", "MACs asked", "layout", "GMACs", "latency, ms", "speed-up", "converted", "aim"]
    markdown = table(header, [_cells(row) for row in rows])
    write("realised_speed", settings=settings, rows=rows, markdown=markdown)


if __name__ == "__main__":
    main()
