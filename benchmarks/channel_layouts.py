"""How fast a layer of a CNN may shrink, and in what steps: top-1 straight after a cut in one shot, for each layout.

    python benchmarks/channel_layouts.py --cifar10 DIR --work DIR [--only vgg16-cifar10] [--scarcity 0 2] [--multiple 1]

The CNNs, images and scores are those of `accuracy.py`, which trains the dense models into DIR of --work where they are
not there; nothing but the layout differs between rows. Finished rows are kept.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

import slimming
from accuracy import MACS, Subject, cases
from common import parser, store, table
from slimming.counting.measured import count
from slimming.errors import BudgetError

CNNS = ("vgg16-cifar10", "resnet18-cifar10")
SCARCITY = (0.0, 1.0, 2.0, 3.0)
MULTIPLES = (8, 1)


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--cifar10", type=Path, required=True)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--only", nargs="+", default=CNNS)
    arguments.add_argument("--scarcity", nargs="+", type=float, default=SCARCITY)
    arguments.add_argument("--multiple", nargs="+", type=int, default=MULTIPLES)
    arguments.add_argument("--images", type=int, default=512, help="for calibration")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "channel_layouts.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rows, dense = known.get("rows", {}), known.get("dense", {})
    rest = {"vit": Path(), "imagenette": Path(), "dense": 0, "cnn_epochs": 15.0, "test_images": 10000}
    all_of_them = Namespace(**vars(settings), **rest, no_retraining=True)
    for name in settings.only:
        subject = Subject(name, cases(all_of_them)[name], all_of_them)
        dense[name] = {"top1": subject.top1, "images": subject.tested}
        for multiple in settings.multiple:
            for scarcity in settings.scarcity:
                layout = slimming.Layout(scarcity=scarcity, multiple=multiple)
                for budget in MACS:
                    key = f"{name}/{multiple}/{scarcity:g}/{budget}"
                    if key not in rows:
                        rows[key] = row(subject, layout, budget, settings.seed)
                        print(key, rows[key], file=sys.stderr, flush=True)
                        write(settings, rows, dense)


def row(subject: Subject, layout: slimming.Layout, budget: float, seed: int) -> dict[str, Any]:
    """The model cut with this layout, judged."""
    scored, model, images = subject.ours("one-shot", None, seed)
    try:
        plan = slimming.plan(scored, slimming.Budget(macs=budget), layout=layout)
    except BudgetError as error:
        return {"error": str(error)}
    small = slimming.cut(model, plan, images=images).eval()
    return {"macs": count(small, subject.shape).macs / subject.macs, "top1": subject.judge(small)}


def write(settings: Namespace, rows: dict[str, Any], dense: dict[str, Any]) -> None:
    """Write the rows and one table per model."""
    text = ""
    for name, own in dense.items():
        found: dict[tuple[str, str], list[str]] = {}
        for key, each in rows.items():
            model, multiple, scarcity, _ = key.split("/")
            if model == name:
                cell = f"{each['top1']:.1%}" if "top1" in each else "out of reach"
                found.setdefault((multiple, scarcity), []).append(cell)
        lines = [[*layout, *cells] for layout, cells in found.items()]
        text += f"{name} (dense {own['top1']:.1%} of {own['images']:,} test images)\n\n"
        text += table(["multiple", "scarcity", *(f"{share:.0%}" for share in MACS)], lines) + "\n"
    note = "Top-1 straight after the cut in one shot, by shares of the MACs. One seed."
    store("channel_layouts", settings, f"{note}\n\n{text}", rows=rows, dense=dense)


if __name__ == "__main__":
    main()
