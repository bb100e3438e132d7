"""How well a latency table predicts, and what planning for time is worth.

    python benchmarks/latency.py                              the models of MODELS
    python benchmarks/latency.py --only resnet50 [--batch-size 16] [--runtime onnxruntime] [--uneven-heads]

A table of each model is built on this machine (or gone on with), then random plans of all kinds are cut and timed in
turns with the dense model: predicted and measured time, both as shares of dense. Then plans for a share of the MACs
are held against plans for time with the same scores: one that takes the same predicted time (it keeps more of the
score), and one that keeps the same score (it takes less time). A unit's score there is random times what the unit costs
in MACs, so that no kind is cheap for its MACs. Ratios only; the machine's own speed drifts.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import slimming
from common import parser, ratios, table, write
from slimming.benchmarking.runtimes import prepare
from slimming.benchmarking.timing import paired_times
from slimming.core.completion import complete
from slimming.masks.attachment import prunable, select_kinds
from slimming.planning.latency_table import ONE_SIZE, UNEVEN

MODELS = ("deit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50", "mobilenetv3_large_100")

ALONE = ("mlp", "head_dim")
SETS = (ALONE, (*ALONE, "token"), (*ALONE, "token", "block", "width"))
LEAST = {"block": 0.6, "width": 0.6}
SHARES = (0.7, 0.5, 0.3)


def main() -> None:
    """Build, predict, measure, write the tables."""
    arguments = parser(__doc__, rounds=15)
    arguments.add_argument("--only", help="names of timm, with commas between")
    arguments.add_argument("--plans", type=int, default=30)
    arguments.add_argument("--batch-size", type=int, default=1)
    arguments.add_argument("--runtime", default="eager")
    arguments.add_argument("--uneven-heads", action="store_true", help="plans whose heads may differ in size")
    arguments.add_argument("--tables", type=Path, default=Path("build/latency"), help="directory of the tables")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "latency.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    rows = [{"heads": ONE_SIZE, **row} for row in rows]
    for name in settings.only.split(",") if settings.only else MODELS:
        heads = UNEVEN if settings.uneven_heads else ONE_SIZE
        key = {"model": name, "batch": settings.batch_size, "runtime": settings.runtime, "heads": heads}
        rows = [row for row in rows if any(row[part] != value for part, value in key.items())]
        rows.append({**key, **one(name, settings)})
        write("latency", settings=settings, rows=rows, markdown=shown(rows))
        draw(rows, settings.output / "latency.svg")


def one(name: str, settings: Any) -> dict[str, Any]:
    """Build the table of one model, predict and measure."""
    torch.manual_seed(settings.seed)
    dense = timm.create_model(name).eval()
    heads = "-uneven" * settings.uneven_heads
    path = settings.tables / f"{name}-{settings.batch_size}-{settings.runtime}{heads}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    every = slimming.describe(dense)
    by_dimension = any(group.kind == "head_dim" for group in every)
    kinds = (
        {group.kind for group in every} - {"head"} if by_dimension else {group.kind for group in select_kinds(every)}
    )
    known = slimming.build_latency_table(
        dense,
        batch_size=settings.batch_size,
        runtime=settings.runtime,
        kinds=sorted(kinds),
        uneven_heads=settings.uneven_heads,
        path=path,
        log=print,
    )
    seconds = time.perf_counter() - start
    masked = copy.deepcopy(dense)
    masks = slimming.attach(masked, select_kinds(slimming.describe(masked), sorted(kinds)))
    sets = [names for names in SETS if kinds.issuperset(names)] if by_dimension else [tuple(sorted(kinds))]
    scattered = [scatter(number, sets, dense, masked, masks, known, settings) for number in range(settings.plans)]
    shares = SHARES if settings.runtime == "eager" and not settings.uneven_heads else ()
    pairs = [row for share in shares for row in by_time(share, dense, masked, masks, known, settings)]
    return {"points": len(known.points), "seconds": seconds, "plans": scattered, "for time": pairs}


def shown(rows: list[dict[str, Any]]) -> str:
    """One line per model, and the plans of the first."""
    lines, timed = [], []
    for row in rows:
        found = errors(row)
        within = f"{sum(error <= 0.1 for error in found)} of {len(found)}"
        lines.append([row["model"], row["runtime"], row["batch"], row["heads"], row["points"], within,
                      f"{found[len(found) // 2]:.1%}", f"{found[-1]:.1%}"])  # fmt: skip
        for plan in row["for time"]:
            timed.append([row["model"], row["batch"], plan["plan"], f"{plan['macs']:.1%}", f"{plan['score']:.1%}",
                          f"{plan['predicted']:.1%}", percent(plan["measured"])])  # fmt: skip
    plans = [
        [", ".join(plan["kinds"]), f"{plan['macs']:.1%}", f"{plan['predicted']:.1%}", percent(plan["measured"]),
         f"{plan['predicted'] / plan['measured']['median'] - 1:+.1%}"]
        for plan in rows[0]["plans"]
    ]  # fmt: skip
    header = ["model", "runtime", "batch", "heads", "points", "within 10 %", "median error", "largest"]
    columns = ["model", "batch", "plan", "MACs", "score kept", "predicted time", "measured time"]
    return (
        "Random plans, and how far their predicted time is from the measured one. All times are shares of the dense "
        f"model's.\n\n{table(header, lines)}\n"
        f"The plans of {rows[0]['model']}, batch {rows[0]['batch']}, {rows[0]['runtime']}:\n\n"
        f"{table(['kinds', 'MACs', 'predicted time', 'measured time', 'error'], plans)}\n"
        "Plans for MACs, and for time, with the same scores for all kinds (random times a unit's MACs):\n\n"
        f"{table(columns, timed)}"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Every random plan: measured over predicted time, with the lines of 10 % around equality."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "latency", "font.size": 9}
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    ends = (0.15, 1.1)
    axes.plot(ends, ends, c="0.3", lw=0.8)
    for factor in (0.9, 1.1):
        axes.plot(ends, [factor * end for end in ends], c="0.6", lw=0.8, ls="--")
    for row, marker in zip(rows, "osD^vPX*" * len(rows), strict=False):
        predicted = [plan["predicted"] for plan in row["plans"]]
        label = ", ".join([row["model"].split("_patch")[0], f"batch {row['batch']}"] + ["uneven heads"] * uneven(row))
        axes.plot(
            predicted, [plan["measured"]["median"] for plan in row["plans"]], marker, ms=4, alpha=0.7, label=label
        )
    axes.set(xlabel="predicted time, share of dense", ylabel="measured time, share of dense", xlim=ends, ylim=ends)
    axes.grid(visible=True, lw=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def uneven(row: dict[str, Any]) -> bool:
    """Whether heads of the row's plans differ in size."""
    return row["heads"] == UNEVEN


def errors(row: dict[str, Any]) -> list[float]:
    """How far off each predicted time was, as a share, from the smallest."""
    return sorted(abs(plan["predicted"] / plan["measured"]["median"] - 1) for plan in row["plans"])


def percent(spread: dict[str, float]) -> str:
    """Median and quartiles as percentages."""
    return f"{spread['median']:.1%} ({spread['p25']:.1%}–{spread['p75']:.1%})"


def scatter(
    number: int, sets: Any, dense: Any, masked: Any, masks: Any, known: slimming.LatencyTable, settings: Any
) -> dict[str, Any]:
    """One random plan: what the table says, and what the clock says."""
    dice = random.Random(settings.seed + number)
    kinds = sets[number % len(sets)]
    keep = {kind: dice.uniform(LEAST.get(kind, 0.35), 1.0) for kind in kinds}
    for group in masks.groups:
        nn.init.uniform_(masks[group.name])
        if settings.uneven_heads and group.limits.parts:
            levels = torch.randn(len(group.limits.parts)).mul(0.5).exp()
            with torch.no_grad():
                masks[group.name].mul_(levels.repeat_interleave(torch.tensor(group.limits.parts)))
    layout = slimming.Layout(equal_heads=not settings.uneven_heads)
    plan = slimming.plan(masks, slimming.Budget(keep=keep), score="mask", layout=layout)
    return {"kinds": kinds, "keep": keep, **judge(plan, dense, masked, known, settings)}


def judge(plan: slimming.Plan, dense: Any, masked: Any, known: slimming.LatencyTable, settings: Any) -> dict[str, Any]:
    """Predicted and measured time of a plan, as shares of dense."""
    anatomy = prunable(dense).anatomy
    small = slimming.cut(masked, plan).eval()
    predicted = known.predict(anatomy, counts(anatomy, plan)) / known.predict(anatomy, counts(anatomy, None))
    x = torch.randn(settings.batch_size, *anatomy.input_shape)
    both = {name: prepare(model, x, settings.runtime) for name, model in (("small", small), ("dense", dense))}
    times = paired_times(both, anatomy.input_shape, settings.batch_size, runs=settings.rounds, seconds=2.0)
    macs = slimming.cost(small).macs / slimming.cost(dense).macs
    return {"macs": macs, "predicted": predicted, "measured": asdict(ratios(times["small"], times["dense"]))}


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

    anatomy = prunable(dense).anatomy
    whole = known.predict(anatomy, counts(anatomy, None))
    by_macs = planned(slimming.Budget(macs=share))
    taken = known.predict(anatomy, counts(anatomy, by_macs)) / whole
    same_time = planned(slimming.Budget(latency=min(1.0, taken)))
    low, high = 0.1, taken
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
