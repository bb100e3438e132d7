"""How far below their limits do plans end? Random scores of small models, budgets of every metric, several layouts.

    python -m benchmarks.plan_gaps [--plans 1001] [--label now] [--only narrow,resnet]

Small models are the hard case: a layer with few channels is cut in steps that are large shares of the whole model.
Rows of another ``--label`` stay in the result file, so that two versions of the package can be compared: run the script
with the older one on PYTHONPATH. The times of latency tables are invented, so that the result does not depend on the
machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from benchmarks.common import parser, store, table
from torch import Tensor, nn

import slimming
from slimming.core.budget import Budget
from slimming.core.completion import complete
from slimming.core.groups import Anatomy
from slimming.core.kinds import KINDS
from slimming.core.layout import FREE, Layout
from slimming.errors import BudgetError, PlanError
from slimming.masks.attachment import prunable
from slimming.planning.budgeting import costs_of
from slimming.planning.candidates import CandidatePool, all_candidates
from slimming.planning.latency_table import LatencyTable
from slimming.planning.scores import HasScores, ScoredModel

NEAR = 0.01
"""A plan is near its limit if it uses at least 99 % of it."""


class NarrowNet(nn.Sequential):
    """A plain CNN of a few narrow layers, as on microcontrollers."""

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        layers: list[nn.Module] = []
        before = 3
        for number, width in enumerate(widths):
            stride = 2 if number % 2 else 1
            layers += [nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def transformers_vit() -> nn.Module:
    """A small ViT of transformers, which is read by tracing."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))


def torchvision_vit() -> nn.Module:
    """A small ViT of torchvision, which is read by tracing."""
    return torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=10)


def small_vit(**changed: Any) -> nn.Module:
    """A small plain ViT of timm."""
    sizes = {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "img_size": 32, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changed})


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "narrow CNN 8-16-16-24": lambda: NarrowNet((8, 16, 16, 24)),
    "narrow CNN 4-8-8-8-16": lambda: NarrowNet((4, 8, 8, 8, 16)),
    "narrow CNN 16-32-64": lambda: NarrowNet((16, 32, 64)),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "resnet18, 16 channels": lambda: timm.create_model("test_resnet", num_classes=10),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "lcnet_035": lambda: timm.create_model("lcnet_035", num_classes=10),
    "test_convnext": lambda: timm.create_model("test_convnext", num_classes=10),
    "test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=10),
    "small ViT": small_vit,
    "test_vit": lambda: timm.create_model("test_vit", num_classes=10),
    "ViT of transformers": transformers_vit,
    "ViT of torchvision": torchvision_vit,
}
LAYOUTS: Mapping[str, Layout] = {
    "default": Layout(),
    "multiples of 4": Layout(multiple=4),
    "multiples of 16": Layout(multiple=16),
    "any size": Layout(multiple=1),
    "uneven heads": Layout(equal_heads=False, multiple=4),
    "free": FREE,
}


@dataclass(frozen=True)
class Scored(HasScores):
    """Random scores as a source of plans."""

    model: ScoredModel

    @property
    def scored(self) -> ScoredModel:
        return self.model


@cache
def anatomy_of(name: str) -> Anatomy:
    """The anatomy of a model of the table."""
    torch.manual_seed(0)
    return prunable(MODELS[name]()).anatomy


@cache
def times_of(name: str) -> LatencyTable | None:
    """A latency table with invented times: a fixed one per layer, and one in proportion to the product of its sizes."""
    anatomy = anatomy_of(name)
    full = {group.name: group.size for group in anatomy.groups}
    axes: dict[tuple[str, str], dict[str, set[int]]] = {}
    for layer in anatomy.timed_layers:
        sizes = axes.setdefault((layer.kind, layer.like), {})
        for axis, dim in layer.axes:
            sizes.setdefault(axis, {1}).add(dim.value(full))
    points = [
        {"kind": kind, "like": like, **dict(zip(sizes, point, strict=True)), "ms": 0.02 + 1e-6 * math.prod(point)}
        for (kind, like), sizes in axes.items()
        for point in itertools.product(*sizes.values())
    ]
    return LatencyTable(setting={"heads": "one size"}, points=tuple(points)) if points else None


def draw_scores(anatomy: Anatomy, dice: random.Random) -> dict[str, Tensor]:
    """Scores of all units of the default kinds: even, or of several magnitudes, per unit and per group."""
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    style, unwanted = dice.choice(("even", "skewed")), dice.choice((("qkv",), ("qk", "v")))
    scores = {}
    for group in anatomy.groups:
        if group.role not in unwanted and not KINDS[group.kind].on_request:
            score = torch.rand(group.size, generator=generator)
            scores[group.name] = score if style == "even" else (3 * score).exp() * 10 ** dice.uniform(-1, 1)
    heads = {anatomy.group(name).site for name in scores if anatomy.group(name).role == "qkv"}
    return {name: score for name, score in scores.items() if not (anatomy.group(name).role == "head" and heads)}


def draw_budget(anatomy: Anatomy, name: str, scores: Mapping[str, Tensor], dice: random.Random) -> Budget:
    """A budget of a random metric that the model and its layout can have."""
    share = lambda: round(dice.uniform(0.15, 0.95), 3)  # noqa: E731
    kind = dice.choice(("macs", "macs", "params", "params", "memory", "latency", "two", "keep"))
    if kind == "keep":
        kinds = sorted({anatomy.group(group).kind for group in scores})
        return Budget(keep={each: share() for each in kinds})
    if kind == "two":
        return Budget(macs=share(), params=share())
    if kind == "latency" and times_of(name) is not None:
        return Budget(latency=share())
    if kind == "memory":
        return Budget(memory_bytes=share())
    return Budget(**{"params" if kind == "params" else "macs": share()})


def below(anatomy: Anatomy, made: slimming.Plan, budget: Budget, latency: LatencyTable | None) -> tuple[float, float]:
    """How far the plan is below its closest limit: as a share of the limit, and in points of the dense model."""
    kept = {name: len(units) for name, units in complete(anatomy, made).items()}
    if budget.keep is not None:
        found = []
        for kind, ratio in budget.keep.items():
            sizes = {name: size for name, size in made.sizes.items() if anatomy.group(name).kind == kind}
            found.append((ratio, sum(kept[name] for name in sizes) / sum(sizes.values())))
        # Every keep ratio is a limit of its own: the worst counts.
        return max(((limit - used) / limit, limit - used) for limit, used in found)
    full = {group.name: group.size for group in anatomy.groups}
    dense, cost = (costs_of(anatomy, counts, table=latency) for counts in (full, kept))
    gaps = [((limit - cost[metric]) / limit, (limit - cost[metric]) / dense[metric])
            for metric, limit in budget.absolute(dense).items()]  # fmt: skip
    return min(gaps)


def another_fits(source: Scored, layout: Layout, made: slimming.Plan, latency: LatencyTable | None) -> bool:
    """Whether the next step of any layer could be kept as well, within all limits."""
    anatomy, budget = source.model.anatomy, Budget(**made.budget)
    groups = [group for group in anatomy.groups if group.name in made.kept]
    pool = CandidatePool(anatomy, all_candidates(groups, source.model.scores, layout))
    removed = np.array([not any(unit in made.kept[name] for name, unit in one.units) for one in pool.candidates])
    last = {candidate.chain: index for index, candidate in enumerate(pool.candidates) if removed[index]}
    whole = {group.name: group.size for group in anatomy.groups}
    limits = {} if budget.keep is not None else budget.absolute(costs_of(anatomy, whole, table=latency))
    before = pool.counts(pool.kept(removed))
    for index in last.values():
        more = removed.copy()
        more[index] = False
        kept = pool.counts(pool.kept(more))
        if kept == before:
            continue
        if budget.keep is None:
            cost = costs_of(anatomy, kept, table=latency)
            fits = all(cost[metric] <= limit for metric, limit in limits.items())
        else:
            fits = True
            for kind, ratio in budget.keep.items():
                sizes = {group.name: group.size for group in groups if group.kind == kind}
                fits &= sum(kept[name] for name in sizes) <= ratio * sum(sizes.values()) + 1e-9
        if fits:
            return True
    return False


def one_plan(number: int, settings: argparse.Namespace, names: Sequence[str]) -> dict[str, Any] | None:
    """Draw and make plan ``number``; None if the drawn budget cannot be reached."""
    dice = random.Random(1_000_003 * settings.seed + number)
    name = names[number % len(names)]
    anatomy = anatomy_of(name)
    scores, layout = draw_scores(anatomy, dice), dice.choice(sorted(LAYOUTS))
    budget = draw_budget(anatomy, name, scores, dice)
    latency = times_of(name) if budget.latency is not None else None
    source = Scored(ScoredModel(anatomy=anatomy, scores=scores, layout=LAYOUTS[layout]))
    row: dict[str, Any] = {"number": number, "model": name, "layout": layout, "budget": budget.to_dict()}
    row["metric"] = "keep" if budget.keep is not None else " and ".join(budget.limits)
    for solver in (None, "nested"):
        began = time.perf_counter()
        try:
            made = slimming.plan(source, budget, solver=solver, latency=latency)
        except (BudgetError, PlanError):  # also a latency table for another layout of heads
            return None
        seconds = time.perf_counter() - began
        gap, points = below(anatomy, made, budget, latency)
        row[solver or "default"] = {
            "below": gap, "points": points, "score": made.solution.get("kept_score"), "s": seconds,
            "solver": made.solution.get("solver"), "note": made.solution.get("note"),
            "fits": gap > NEAR and another_fits(source, LAYOUTS[layout], made, latency),
        }  # fmt: skip
    return row


def summary(rows: Sequence[Mapping[str, Any]], solver: str) -> list[object]:
    """Cells of one line: plans, those below their limit, the worst, seconds."""
    found = [row[solver] for row in rows]
    far = [one for one in found if one["below"] > NEAR]
    scores = [one["score"] for one in found if one["score"] is not None]
    seconds = [one["s"] for one in found]
    return [
        len(found),
        f"{len(far)} ({len(far) / len(found):.1%})",
        sum(one["fits"] for one in far),
        f"{100 * max((one['points'] for one in found), default=0.0):.1f}",
        f"{statistics.fmean(scores):.4f}" if scores else "–",
        f"{1000 * statistics.median(seconds):.0f}, {1000 * max(seconds):.0f}",
    ]


def main() -> None:
    """Draw, plan, write the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--plans", type=int, default=1001)
    arguments.add_argument("--label", default="now", help="name of the rows; other names that are there stay")
    arguments.add_argument("--only", default="", help="parts of names of models")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    names = [name for name in MODELS if any(part in name for part in settings.only.split(","))]
    rows: list[dict[str, Any]] = []
    number = 0
    while len(rows) < settings.plans:
        if (row := one_plan(number, settings, names)) is not None:
            rows.append(row)
            print(f"\r{len(rows)} of {settings.plans}", end="", flush=True)
        number += 1
    target = settings.output / "plan_gaps.json"
    earlier = json.loads(target.read_text("utf-8"))["plans"] if target.exists() else {}
    versions = {**earlier, settings.label: rows}
    header = [
        "version",
        "solver",
        "plans",
        "more than 1 % below",
        "another step fits",
        "worst, points",
        "score kept",
        "ms, largest",
    ]
    lines = [[label, solver, *summary(version, solver)] for label, version in versions.items()
             for solver in ("default", "nested")]  # fmt: skip
    text = [table(header, lines)]
    for key in ("metric", "model", "layout"):
        values = sorted({row[key] for version in versions.values() for row in version})
        lines = []
        for value in values:
            cells: list[object] = [value]
            for version in versions.values():
                of_value = [row for row in version if row[key] == value]
                cells += summary(of_value, "default")[1:4] if of_value else ["–"] * 3
            lines.append(cells)
        heads = [f"{label}: {what}" for label in versions for what in ("> 1 % below", "another fits", "worst, points")]
        text.append(f"By {key}, default solver:\n\n" + table([key, *heads], lines))
    store("plan_gaps", settings, "\n".join(text), plans=versions)
    print("\n" + "\n".join(text))


if __name__ == "__main__":
    main()
