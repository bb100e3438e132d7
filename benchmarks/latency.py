"""How well a latency table predicts, and what planning for time is worth.

    python benchmarks/latency.py [--model deit_small_patch16_224] [--table FILE]

A table of the model is built on this machine (or gone on with), then random plans of all kinds are cut and timed in
turns with the dense model: predicted and measured time, both as shares of dense. Then plans for a share of the MACs
are held against plans for time with the same scores: one that takes the same predicted time (it keeps more of the
score), and one that keeps the same score (it takes less time). A unit's score there is random times what the unit costs
in MACs, so that no kind is cheap for its MACs. Ratios only; the machine's own speed drifts.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import slimming
from common import Spread, parser, ratios, table, write
from slimming.api import anatomy_of
from slimming.bench import paired_times
from slimming.cut import complete

ALONE = ("mlp", "head_dim")
SETS = (ALONE, (*ALONE, "token"), (*ALONE, "token", "block", "width"))
LEAST = {"block": 0.6, "width": 0.6}
SHARES = (0.7, 0.5, 0.3)


def main() -> None:
    """Build, predict, measure, write the tables."""
    arguments = parser(__doc__, rounds=15)
    arguments.add_argument("--model", default="deit_small_patch16_224")
    arguments.add_argument("--plans", type=int, default=30)
    arguments.add_argument("--batch-size", type=int, default=1)
    arguments.add_argument("--table", type=Path, default=Path("build/latency.json"))
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    dense = timm.create_model(settings.model).eval()
    known = slimming.build_latency_table(dense, batch_size=settings.batch_size, path=settings.table, say=print)
    masked = copy.deepcopy(dense)
    masks = slimming.attach(masked, [group for group in slimming.describe(masked) if group.kind != "head"])
    for mask in masks.values():
        nn.init.uniform_(mask)
    rows = [scatter(number, dense, masked, masks, known, settings) for number in range(settings.plans)]
    errors = sorted(abs(row["predicted"] / row["measured"].median - 1) for row in rows)
    within = sum(error <= 0.1 for error in errors)
    pairs = [row for share in SHARES for row in by_time(share, dense, masked, masks, known, settings)]
    lines = [
        [", ".join(row["kinds"]), f"{row['macs']:.1%}", f"{row['predicted']:.1%}", percent(row["measured"]),
         f"{row['predicted'] / row['measured'].median - 1:+.1%}"]
        for row in rows
    ]  # fmt: skip
    others = [
        [row["plan"], f"{row['macs']:.1%}", f"{row['score']:.1%}", f"{row['predicted']:.1%}", percent(row["measured"])]
        for row in pairs
    ]
    text = (
        f"{settings.model}, batch {settings.batch_size}, PyTorch eager. The table has {len(known.points)} points. "
        f"Random plans: {within} of {len(rows)} are predicted within 10 %; the median error is "
        f"{errors[len(errors) // 2]:.1%}, the largest {errors[-1]:.1%}. All times are shares of the dense model's.\n\n"
        f"{table(['kinds', 'MACs', 'predicted time', 'measured time', 'error'], lines)}\n"
        "Plans for MACs, and for time, with the same scores for all kinds (random times a unit's MACs):\n\n"
        f"{table(['plan', 'MACs', 'score kept', 'predicted time', 'measured time'], others)}"
    )
    write("latency", settings=settings, rows=[*rows, *pairs], markdown=text)


def percent(spread: Spread) -> str:
    """Median and quartiles as percentages."""
    return f"{spread.median:.1%} ({spread.p25:.1%}–{spread.p75:.1%})"


def scatter(number: int, dense: Any, masked: Any, masks: Any, known: slimming.LatencyTable, settings: Any) -> Any:
    """One random plan: what the table says, and what the clock says."""
    dice = random.Random(settings.seed + number)
    kinds = SETS[number % len(SETS)]
    keep = {kind: dice.uniform(LEAST.get(kind, 0.35), 1.0) for kind in kinds}
    for mask in masks.values():
        nn.init.uniform_(mask)
    plan = slimming.plan(masks, slimming.Budget(keep=keep), score="mask")
    return {"kinds": kinds, "keep": keep, **judge(plan, dense, masked, known, settings)}


def judge(plan: slimming.Plan, dense: Any, masked: Any, known: slimming.LatencyTable, settings: Any) -> dict[str, Any]:
    """Predicted and measured time of a plan, as shares of dense."""
    anatomy = anatomy_of(dense)
    small = slimming.cut(masked, plan).eval()
    predicted = known.predict(anatomy, counts(anatomy, plan)) / known.predict(anatomy, counts(anatomy, None))
    times = paired_times(
        {"small": small, "dense": dense}, anatomy.input_shape, settings.batch_size, runs=settings.rounds, seconds=2.0
    )
    macs = slimming.cost(small).macs / slimming.cost(dense).macs
    return {"macs": macs, "predicted": predicted, "measured": ratios(times["small"], times["dense"])}


def counts(anatomy: Any, plan: slimming.Plan | None) -> Mapping[str, int]:
    """Units that stay in each group."""
    if plan is None:
        return {group.name: group.size for group in anatomy.groups}
    return {name: len(units) for name, units in complete(anatomy, plan).items()}


def by_time(share: float, dense: Any, masked: Any, masks: Any, known: slimming.LatencyTable, settings: Any) -> Any:
    """A plan for MACs, one for the time that it takes, and one for the score that it keeps."""
    dice = torch.Generator().manual_seed(settings.seed)
    costs = slimming.cost(dense).groups
    with torch.no_grad():
        for group in masks.groups:
            mask = masks[group.name]
            mask.copy_(torch.rand(mask.shape, generator=dice) * costs[group.name].macs / group.size)

    def score(plan: slimming.Plan) -> float:
        kept = sum(float(masks[name].detach()[list(units)].sum()) for name, units in plan.kept.items())
        return kept / sum(float(mask.detach().sum()) for mask in masks.values())

    def planned(budget: slimming.Budget) -> slimming.Plan:
        return slimming.plan(masks, budget, score="mask", latency=known)

    anatomy = anatomy_of(dense)
    whole = known.predict(anatomy, counts(anatomy, None))
    by_macs = planned(slimming.Budget(macs=share))
    time = known.predict(anatomy, counts(anatomy, by_macs)) / whole
    same_time = planned(slimming.Budget(latency=min(1.0, time)))
    low, high = 0.1, time
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if score(planned(slimming.Budget(latency=middle))) >= score(by_macs) else (middle, high)
        )
    same_score = planned(slimming.Budget(latency=high))
    names = (f"{share:.0%} of the MACs", "the same time", "the same score")
    for name, plan in zip(names, (by_macs, same_time, same_score), strict=True):
        yield {"plan": name, "score": score(plan), **judge(plan, dense, masked, known, settings)}


if __name__ == "__main__":
    main()
