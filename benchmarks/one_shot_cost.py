"""What slimming in one shot costs: scores and the compensated cut, as passes of the dense model over the same images.

    python benchmarks/one_shot_cost.py [--model deit_small_patch16_224] [--images 512]

Weights and images are random: what is computed depends on sizes only. Ratios are taken within one run, a forward pass
over the images before and after each piece of work.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

import slimming
from common import parser, store, table
from slimming.masks.attachment import prunable

BATCH = 32


def main() -> None:
    """Time each piece of work between two forward passes, and write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="deit_small_patch16_224")
    arguments.add_argument("--images", type=int, default=512)
    arguments.add_argument("--macs", type=float, default=0.5)
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = timm.create_model(settings.model).eval()
    shape = prunable(model).anatomy.input_shape
    images = [torch.randn(min(BATCH, settings.images - at), *shape) for at in range(0, settings.images, BATCH)]

    def forward() -> None:
        with torch.no_grad():
            for batch in images:
                model(batch)

    rows: list[dict[str, Any]] = []
    budget = slimming.Budget(macs=settings.macs)
    seconds(forward)
    for name, kinds in (("all kinds", None), ("head dimensions, hidden units", ("head_dim", "mlp"))):
        found: dict[str, Any] = {"kinds": name}
        passes = [seconds(forward)[0]]
        spent, scored = seconds(lambda kinds=kinds: slimming.score(copy.deepcopy(model), images, kinds=kinds))
        passes.append(seconds(forward)[0])
        found |= {"score_passes": spent / (sum(passes) / 2), "score_seconds": spent}
        spent, plan = seconds(lambda scored=scored: slimming.plan(scored, budget))
        found |= {"plan_seconds": spent}
        spent, _ = seconds(lambda scored=scored, plan=plan: slimming.cut(scored.model, plan, images=images))
        passes.append(seconds(forward)[0])
        rows.append(found | {"cut_passes": spent / (sum(passes[1:]) / 2), "cut_seconds": spent, "forward": passes})
        write(settings, rows)


def write(settings: Any, rows: list[dict[str, Any]]) -> None:
    """Write the rows and the table."""
    lines = [[row["kinds"], f"{row['score_passes']:.1f}", f"{row['cut_passes']:.1f}"] for row in rows]
    text = (
        f"{settings.model}, {settings.images} images, budget {settings.macs:.0%} of the MACs, {settings.threads} "
        "threads. Unit: one forward pass of the dense model over the same images.\n\n"
    )
    store("one_shot_cost", settings, text + table(["units", "score", "compensated cut"], lines), rows=rows)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long ``work`` takes, and what it gives."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


if __name__ == "__main__":
    main()
