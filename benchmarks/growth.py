"""How every stage grows with the model: seconds and bytes from ViT-Ti to ViT-g, and the exponent of each.

    python benchmarks/growth.py [--only vit_tiny_patch16_224,...]

Random weights, random masks, half of the multiply-adds; each model in a process of its own, so that its peak of memory
is its own. A stage that grows like the parameters has exponent 1. The search step is one forward and backward pass of
one image with masks, penalty and scores, without an optimiser. ViT-g needs 20 GB. The rows are drawn in growth.svg.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

import slimming
from common import parser, store, table
from slimming.core.budget import Budget

MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
)
STAGES = {
    "attach": "attach, s",
    "step": "search step, s",
    "nested": "plan, s",
    "exact": "plan of two limits, s",
    "cut": "cut, s",
    "save": "save, s",
    "load": "load, s",
    "file": "file, MB",
    "peak": "peak memory, GB",
}


def measure(name: str, threads: int, seed: int) -> dict[str, float]:
    """Seconds and bytes of one model."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model: Any = timm.create_model(name).eval()
    found: dict[str, float] = {"params": sum(p.numel() for p in model.parameters())}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        found[stage] = time.perf_counter() - began
        return result

    masks = timed("attach", lambda: slimming.attach(model))
    for mask in masks.values():
        nn.init.uniform_(mask)
    image, label = (
        torch.randn(1, *model.patch_embed.proj.weight.shape[1:2], *model.patch_embed.img_size),
        torch.tensor([0]),
    )

    def step() -> None:
        loss: Any = F.cross_entropy(model(image), label) + masks.penalty()
        loss.backward()
        masks.collect()

    step()
    timed("step", step)
    model.zero_grad(set_to_none=True)
    plan = timed("nested", lambda: slimming.plan(masks, Budget(macs=0.5), score="mask"))
    timed("exact", lambda: slimming.plan(masks, Budget(macs=0.5, params=0.6), score="mask"))
    small = timed("cut", lambda: slimming.cut(model, plan))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "slim"
        timed("save", lambda: slimming.save(small, path))
        found["file"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        timed("load", lambda: slimming.load(path))
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return found


def alone(name: str, threads: int, seed: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (name, threads, seed))


def exponent(rows: dict[str, dict[str, float]], stage: str) -> float:
    """Slope of log(stage) over log(params), by least squares over the models."""
    pairs = [(math.log(row["params"]), math.log(max(row[stage], 1e-9))) for row in rows.values()]
    x, y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a, _ in pairs)


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", help="models, with commas between")
    settings = arguments.parse_args()
    file = settings.output / "growth.json"
    rows: dict[str, dict[str, float]] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for name in settings.only.split(",") if settings.only else MODELS:
        if name not in rows:
            rows[name] = alone(name, settings.threads, settings.seed)
            print(name, json.dumps(rows[name]), flush=True)
            write(rows, settings)
    write(rows, settings)


def write(rows: dict[str, dict[str, float]], settings: Any) -> None:
    """Write all rows so far, and the table."""
    ordered = dict(sorted(rows.items(), key=lambda item: item[1]["params"]))
    lines = [
        [name, f"{row['params'] / 1e6:.0f} M", *(f"{row[stage]:.3g}" for stage in STAGES)]
        for name, row in ordered.items()
    ]
    if len(rows) > 1:
        lines.append(["exponent", "1", *(f"{exponent(ordered, stage):.2f}" for stage in STAGES)])
    store("growth", settings, table(["model", "params", *STAGES.values()], lines), rows=ordered)
    draw(ordered, settings.output / "growth.svg")


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Seconds of every stage over parameters, both axes logarithmic, with a line that grows like the parameters."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9}
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    params = [row["params"] / 1e6 for row in rows.values()]
    for stage, title in STAGES.items():
        if title.endswith(", s"):
            (line,) = axes.loglog(params, [row[stage] for row in rows.values()], marker="o", ms=3, lw=1.2)
            line.set_label(title.removesuffix(", s"))
    axes.loglog(params, [0.02 * p / params[0] for p in params], c="0.6", ls="--", lw=1, label="like the parameters")
    axes.set(xlabel="parameters, millions", ylabel="seconds")
    axes.grid(visible=True, which="major", lw=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
