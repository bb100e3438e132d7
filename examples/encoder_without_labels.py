"""Slim an image encoder without labels: search and retrain by matching the dense model's embeddings.

    python examples/encoder_without_labels.py [--steps 200]

The encoder is the demo's Vision Transformer without its classifier; the images are the demo's, and their labels are
used at the end only, to see what the embeddings are worth: each validation image takes the class of its nearest
training images. The numbers go to benchmarks/results/encoder_without_labels.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import slimming
from slimming.demo import HERE
from slimming.training.batches import validation_batches
from slimming.training.samples import Data, ImageDataset

ASSETS = HERE / "assets"
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
BUDGETS = (0.7, 0.5, 0.3)


def main() -> None:
    """Search once, cut three budgets, retrain each, and write what the embeddings are worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of the search, and of each retraining")
    parser.add_argument("--images", type=int, default=None, help="training images, all by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    settings = parser.parse_args()

    dense = encoder()
    images = slimming.DataConfig(
        source=str(ASSETS / "eurosat"), augment="overhead", train_limit=settings.images, val_limit=settings.images
    )
    data = slimming.open_data(images, dense)
    plain = slimming.open_data(dataclasses.replace(images, augment="none"), dense)
    train = slimming.TrainConfig(steps=settings.steps, batch_size=32, lr=3e-4, workers=1)
    search = slimming.SearchConfig(train=train)

    matching = slimming.MatchLoss(dense, slimming.calibration_images(plain))
    result = slimming.search(copy.deepcopy(dense), data, search, loss=matching)
    rows = [{"model": "dense", "macs": 1.0, "neighbours": neighbours(dense, plain)}]
    whole = slimming.cost(dense)
    for share in BUDGETS:
        small = slimming.cut(result.model, slimming.plan(result, slimming.Budget(macs=share)))
        before = neighbours(small, plain)
        slimming.train(small, data, train, loss=matching)
        macs = slimming.cost(small).macs / whole.macs
        rows.append({"model": f"{share:.0%}", "macs": macs, "cut": before, "neighbours": neighbours(small, plain)})
    write(rows, settings)


def encoder() -> nn.Module:
    """The demo's dense model, its classifier taken away: images (B, 3, 64, 64) to embeddings (B, 96)."""
    made = json.loads((ASSETS / "dense.json").read_text())["model"]
    name = made.pop("name")
    model = timm.create_model(name, **made)
    model.load_state_dict(load_file(ASSETS / "dense.safetensors"))
    model.reset_classifier(0)
    return model.eval()


def neighbours(model: nn.Module, data: Data, nearest: int = 10) -> float:
    """Share of validation images whose nearest training images, by cosine, are mostly of their class."""
    known, classes = embeddings(model, data.train)
    asked, truth = embeddings(model, data.val)
    votes = F.one_hot(classes[(asked @ known.T).topk(min(nearest, len(known))).indices]).sum(1)
    return float((votes.argmax(1) == truth).float().mean())


@torch.no_grad()
def embeddings(model: nn.Module, images: ImageDataset) -> tuple[Tensor, Tensor]:
    """Embeddings of length 1, shape (images, D), and the classes."""
    model.eval()
    batches = [(F.normalize(model(b.images), dim=1), b.labels) for b in validation_batches(images, 200, 0, 1, 0)]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def write(rows: list[dict[str, Any]], settings: argparse.Namespace) -> None:
    """Write the numbers and their table."""
    record = {
        "name": "encoder_without_labels",
        "steps": settings.steps,
        "seed": 0,
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "slimming": slimming.__version__},
        "rows": rows,
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "encoder_without_labels.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["| encoder | MACs | straight after the cut | retrained |", "| --- | --- | --- | --- |"]
    for row in rows:
        cut = f"{row['cut']:.1%}" if "cut" in row else ""
        lines.append(f"| {row['model']} | {row['macs']:.3f} | {cut} | {row['neighbours']:.1%} |")
    text = (
        f"# encoder_without_labels\n\nShare of validation images whose 10 nearest training images by embedding are "
        f"mostly of their class; {settings.steps} search and retraining steps of 32 images, without labels. One run, "
        "seed 0.\n\n"
    )
    (settings.output / "encoder_without_labels.md").write_text(text + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
