"""How much of a cut in MACs becomes a cut in time.

    python benchmarks/realised_speed.py                                  DeiT-S, eager and ONNX Runtime
    python benchmarks/realised_speed.py --models swin_tiny_patch4_window7_224 --runtimes compile --batches 1

Dense against cut, in PyTorch and in ONNX Runtime, all cases of one model, runtime and batch size timed in turns; rows
of other models, runtimes and batch sizes that are there already stay. Speed depends
on sizes alone, so the weights are random and the scores are drawn: per group a level, per unit a factor, both
log-normal, so that layers and heads come out uneven as after a search. ``converted`` is the measured speed-up over the
ratio of MACs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

import slimming
from common import Spread, interleaved, parser, ratios, table, write
from slimming.benchmarking.runtimes import RUNTIMES, prepare
from slimming.core.layout import FREE
from slimming.masks.attachment import prunable

EVEN = slimming.Layout()
LAYOUTS = {
    "default": (EVEN, ("head_dim", "mlp", "token"), 0.95),
    "default, no tokens": (EVEN, ("head_dim", "mlp"), 0.95),
    "uneven heads, multiples of 16": (slimming.Layout(equal_heads=False, multiple=16), ("head_dim", "mlp"), 0.9),
    "uneven heads, multiples of 8": (slimming.Layout(equal_heads=False), ("head_dim", "mlp"), 0.9),
    "uneven heads, any size": (FREE, ("head_dim", "mlp"), 0.9),
}
HEADER = ("model", "runtime", "batch", "MACs asked", "layout", "GMACs", "latency, ms", "speed-up", "converted", "aim")


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
    every = slimming.describe(masked)
    if not any(group.kind == "head_dim" for group in every):
        kinds = tuple("head" if kind == "head_dim" else kind for kind in kinds)
    masks = slimming.attach(masked, [group for group in every if group.kind in kinds])
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
    name: str, dense: nn.Module, slims: Sequence[Slim], batch: int, runtime: str, settings: argparse.Namespace
) -> list[dict[str, Any]]:
    images = torch.randn(batch, *prunable(dense).anatomy.input_shape)
    models = {"dense": dense, **{each.name: each.model for each in slims}}
    head = {"model": name, "runtime": runtime, "batch": batch}
    torch.set_num_threads(settings.threads)
    cases: dict[str, Callable[[], object]] = {
        case: partial(prepare(model, images, runtime), images) for case, model in models.items()
    }
    number = max(1, 8 // batch)
    with torch.inference_mode():
        seconds = interleaved(cases, rounds=settings.rounds, threads=settings.threads, number=number)
    dense_macs = slimming.cost(dense).macs
    rows: list[dict[str, Any]] = [{**head, "layout": "dense", "macs": dense_macs, "latency_ms": _ms(seconds["dense"])}]
    for each in slims:
        speedup = ratios(seconds["dense"], seconds[each.name])
        macs_ratio = dense_macs / each.macs
        converted = Spread(*(getattr(speedup, key) / macs_ratio for key in ("median", "p25", "p75")), speedup.runs)
        goal = LAYOUTS[each.layout][2]
        rows.append(
            {
                **head,
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
    start = [row["model"].split("_patch")[0], row["runtime"], row["batch"], row.get("budget_macs", ""), row["layout"]]
    start += [f"{row['macs'] / 1e9:.2f}", Spread(**row["latency_ms"]).text(1)]
    if row["layout"] == "dense":
        return [*start, "1.000", "", ""]
    held = f"{row['goal']:.2f}: {'yes' if row['held'] else 'no'}"
    return [*start, Spread(**row["speedup"]).text(2), Spread(**row["converted"]).text(2), held]


def _of_call(row: dict[str, Any], settings: argparse.Namespace) -> bool:
    """Whether this call measures ``row`` anew."""
    wanted = (settings.models, settings.runtimes, settings.batches)
    return all(row[key] in values for key, values in zip(("model", "runtime", "batch"), wanted, strict=True))


def main() -> None:
    arguments = parser(__doc__, rounds=20)
    arguments.add_argument("--models", nargs="+", default=["deit_small_patch16_224"])
    arguments.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    arguments.add_argument("--runtimes", nargs="+", default=["eager", "onnxruntime"], choices=RUNTIMES)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    settings = arguments.parse_args()
    torch.manual_seed(settings.seed)

    file = settings.output / "realised_speed.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    rows = [row for row in rows if not _of_call(row, settings)]
    for name in settings.models:
        dense = timm.create_model(name).eval()
        by_dimension = any(group.kind == "head_dim" for group in slimming.describe(dense))
        layouts = settings.layouts if by_dimension else ["default"]
        slims = [slim(dense, budget, layout, settings.seed) for budget in settings.budgets for layout in layouts]
        for runtime, batch in itertools.product(settings.runtimes, settings.batches):
            found = measure(name, dense, slims, batch, runtime, settings)
            rows += [{k: asdict(v) if isinstance(v, Spread) else v for k, v in row.items()} for row in found]
            markdown = table(HEADER, [_cells(row) for row in rows])
            write("realised_speed", settings=settings, rows=rows, markdown=markdown)


if __name__ == "__main__":
    main()
