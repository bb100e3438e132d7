"""Search, cut and retrain on real images, for one small model each of several architectures and hosts.

    python benchmarks/architectures.py --work DIR [--data DIR] [--only swin]

Every model is trained from scratch on EuroSAT, saved, and handed to `slimming.run` as a user would hand over a
pretrained one: one search, three budgets, retraining distilled from the dense model. The models are scaled down so
that the whole takes about an hour and a half on one core; what counts is that the same few lines take all of them
through, and what each loses. --work keeps everything, so that a call that was stopped goes on; DIR/NAME/run holds
the run of each model with its report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import slimming
from common import FIRST_ORDER, parser, store, table
from slimming.demo import HERE

BUDGETS = (0.7, 0.5, 0.3)
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


def dinov2_of_transformers() -> nn.Module:
    """DINOv2 as transformers has it."""
    import transformers

    config = transformers.Dinov2Config(
        image_size=64, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=3, num_labels=10,
        layerscale_value=1.0,
    )  # fmt: skip
    return transformers.Dinov2ForImageClassification(config)


def of_timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    """A constructor of a model of timm for ten classes of 64-pixel images."""
    return lambda: timm.create_model(
        name, num_classes=10, pretrained_cfg_overlay={"input_size": (3, 64, 64), "crop_pct": 1.0}, **arguments
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "swin": of_timm(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=48, depths=(2, 2, 2), num_heads=(2, 4, 8)
    ),
    "eva02": of_timm("eva02_tiny_patch14_224", **VIT),
    "dinov2": of_timm("vit_small_patch14_dinov2", **VIT, init_values=1.0),
    "dinov2 of transformers": dinov2_of_transformers,
    "siglip": of_timm("vit_base_patch16_siglip_224", **VIT),
    "mobilevit": of_timm("mobilevit_xxs"),
    "resnet": of_timm("resnet18", channels=(24, 48, 96, 192)),
    "densenet": of_timm("densenet121", growth_rate=16, block_config=(3, 4, 6)),
}
"""VGG with BatchNorm is in `network_slimming`."""


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, default=HERE / "assets" / "eurosat")
    arguments.add_argument("--note", default="EuroSAT, the embedded subset")
    arguments.add_argument("--work", type=Path, required=True, help="directory for the runs")
    arguments.add_argument("--only", choices=sorted(MODELS), help="one model")
    arguments.add_argument("--dense-steps", type=int, default=600)
    arguments.add_argument("--search-steps", type=int, default=100)
    arguments.add_argument("--retrain-steps", type=int, default=80)
    arguments.add_argument("--batch", type=int, default=64)
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "architectures.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for name in [settings.only] if settings.only else MODELS:
        if name not in rows:
            rows[name] = one(name, settings)
            write(settings, rows)


def one(name: str, settings: Any) -> dict[str, Any]:
    """Train, save, run; the numbers of one row."""
    place = settings.work / name.replace(" ", "-")
    images = slimming.DataConfig(source=str(settings.data), augment="light")
    common = {"batch_size": settings.batch, "eval_every": 0, "seed": settings.seed}
    if not (place / "dense").exists():
        torch.manual_seed(settings.seed)
        model = MODELS[name]()
        config = slimming.TrainConfig(steps=settings.dense_steps, lr=1e-3, **common)
        slimming.train(
            model, slimming.open_data(images, model), config, directory=place / "training", resume=True, title="dense"
        )
        slimming.save(model, place / "dense")
    config = slimming.RunConfig(
        name=name,
        model=slimming.ModelConfig(name=str(place / "dense")),
        data=images,
        search=slimming.SearchConfig(
            **FIRST_ORDER, train=slimming.TrainConfig(steps=settings.search_steps, lr=5e-4, **common)
        ),
        budgets=tuple(slimming.Budget(macs=share) for share in BUDGETS),
        retrain=slimming.TrainConfig(steps=settings.retrain_steps, lr=5e-4, **common),
        bench=slimming.BenchConfig(batch_sizes=(1, 32)),
        note=settings.note,
    )
    found = slimming.run(config, place / "run", log=lambda text: print(name, text, file=sys.stderr, flush=True))
    model = slimming.load(place / "dense")
    searched, val = slimming.load_search(place / "run" / "search"), slimming.open_data(images, model).val
    for row in found["rows"]:  # the same plan without compensation
        plan = slimming.Plan.load(place / "run" / slimming.Budget(**row["budget"]).name / "plan.json")
        row["top1_plain"] = slimming.evaluate(slimming.cut(searched.model, plan), val)["top1"]
    kinds = sorted({group.kind for group in slimming.describe(model)})
    keep = ("macs", "params", "memory_bytes", "top1_plain", "top1_cut", "top1", "latency_ms", "speedup", "budget")
    dense, *slim = ({key: row[key] for key in keep if key in row} for row in (found["dense"], *found["rows"]))
    return {"class": type(model).__name__, "kinds": kinds, "dense": dense, "budgets": slim}


def write(settings: Any, rows: dict[str, Any]) -> None:
    """Write the rows and the table."""
    header = ["model", "kinds", "params", "MACs", "top-1", *(f"{share:.0%}" for share in BUDGETS)]
    lines = []
    for name, row in rows.items():
        dense, found = row["dense"], row["budgets"]
        cells = [" → ".join(f"{entry[key]:.1%}" for key in ("top1_plain", "top1_cut", "top1")) for entry in found]
        cost = [f"{dense['params'] / 1e6:.2f} M", f"{dense['macs'] / 1e6:.0f} M"]
        lines.append([name, ", ".join(row["kinds"]), *cost, f"{dense['top1']:.1%}", *cells])
    text = (
        f"{settings.note}. Each model trained from scratch for {settings.dense_steps} steps of "
        f"{settings.batch} images, searched for {settings.search_steps}, retrained for {settings.retrain_steps} at "
        "each budget (share of the MACs): top-1 straight after the cut without compensation → with it → after "
        "retraining. "
        f"Seed {settings.seed}, one run; 1,000 held-out images, so a difference below 2 points says little.\n\n"
    )
    store("architectures", settings, text + table(header, lines), rows=rows)


if __name__ == "__main__":
    main()
