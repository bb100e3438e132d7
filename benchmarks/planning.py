"""How well and how fast plans are made: both solvers, one and several limits, random scores.

    python benchmarks/planning.py [--model deit_base_patch16_224]

Scores are drawn evenly at random, which is harder than scores of a search: every unit is nearly as good as another.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import timm
import torch

import slimming
from common import Spread, parser, table, write
from slimming.core.budget import Budget
from slimming.core.layout import SOLVERS

BUDGETS = (
    Budget(macs=0.5),
    Budget(params=0.5),
    Budget(memory_bytes=0.6),
    Budget(macs=0.5, params=0.6),
    Budget(macs=0.3, params=0.4),
    Budget(macs=0.5, params=0.6, memory_bytes=0.65),
)


def share(masks: Mapping[str, torch.Tensor], plan: slimming.Plan) -> float:
    """The share of the total score that ``plan`` keeps."""
    kept = sum(float(masks[name][list(units)].sum()) for name, units in plan.kept.items())
    return kept / sum(float(mask.sum()) for mask in masks.values())


def main() -> None:
    """Plan, measure, write the table."""
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--model", default="deit_base_patch16_224")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = timm.create_model(settings.model)
    whole = slimming.cost(model)
    masks = slimming.attach(model)
    for mask in masks.values():
        torch.nn.init.uniform_(mask)
    slimming.plan(masks, BUDGETS[0], score="mask", solver="exact")  # imports what it needs
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        for solver in SOLVERS:
            seconds = []
            for _ in range(settings.rounds):
                began = time.perf_counter()
                plan = slimming.plan(masks, budget, score="mask", solver=solver)
                seconds.append(time.perf_counter() - began)
            cost = slimming.cost(model, plan)
            shares = {key: getattr(cost, key) / getattr(whole, key) for key in ("macs", "params", "memory_bytes")}
            kept, gap = share(masks, plan), plan.solution.get("gap")
            rows.append(
                {"budget": budget.name, "solver": solver, **shares, "score": kept, "gap": gap, "s": Spread.of(seconds)}
            )
    many = [Budget(macs=0.2 + 0.008 * number) for number in range(100)]
    began = time.perf_counter()
    slimming.plans(masks, many, score="mask")
    hundred = time.perf_counter() - began
    lines = [
        [
            row["budget"].replace("_", " ").replace("memory bytes", "memory"),
            row["solver"],
            *(f"{row[key]:.2%}" for key in ("macs", "params", "memory_bytes", "score")),
            "–" if row["gap"] is None else f"{row['gap']:.3%}",
            row["s"].text(2),
        ]
        for row in rows
    ]
    header = ["budget", "solver", "MACs", "params", "memory", "score kept", "gap to the bound", "s"]
    text = (
        f"{settings.model}, random scores, default layout.\n\n{table(header, lines)}\n\n"
        f"A hundred budgets of MACs at once, 20 to 99 %, nested: {hundred:.1f} s.\n"
    )
    write("planning", settings=settings, rows=[*rows, {"budgets": len(many), "s": hundred}], markdown=text)


if __name__ == "__main__":
    main()
