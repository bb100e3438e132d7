"""Slim the backbone of a dense-prediction model with a loss of one's own: here, the colours of grey images.

    python examples/dense_prediction.py [--steps 300]

A ResNet of timm gives feature maps of a grey satellite image, a small decoder of ours predicts the colour of every
pixel. Only the backbone is slimmed; the decoder stays whole and trains on. The loop is plain PyTorch: masks are
attached to ``model.backbone``, their penalty is added to the loss, and ``collect`` looks at the gradients. The
numbers go to benchmarks/results/dense_prediction.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from slimming.demo import HERE
from slimming.training.batches import validation_batches
from slimming.training.samples import ImageDataset

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
BUDGETS = (0.7, 0.5, 0.3)


class Colouring(nn.Module):
    """Grey images (B, 3, H, W), all channels alike, to colours (B, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        # Two maps, at a half and a quarter of the size.
        self.backbone: nn.Module = timm.create_model(
            "resnet10t", features_only=True, out_indices=(0, 1), pretrained_cfg_overlay={"input_size": (3, 64, 64)}
        )
        fine, coarse = self.backbone.feature_info.channels()
        self.coarse, self.fine = nn.Conv2d(coarse, 32, 1), nn.Conv2d(fine, 32, 1)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, grey: Tensor) -> Tensor:
        """Predict what is missing to the colours, and add it."""
        fine, coarse = self.backbone(grey)
        joined = self.fine(fine) + F.interpolate(self.coarse(coarse), scale_factor=2)
        return grey + F.interpolate(self.last(joined.relu()), scale_factor=2, mode="bilinear")


def main() -> None:
    """Train the dense model, search once, cut three budgets, retrain each, and write the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the dense training; half of it for the others")
    parser.add_argument("--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.manual_seed(0)
    model = Colouring()
    images = slimming.DataConfig(source=str(HERE / "assets" / "eurosat"), augment="none")
    data = slimming.open_data(images, model.backbone)
    train, val = tensors(data.train), tensors(data.val)

    fit(model, train, settings.steps)
    rows: list[dict[str, Any]] = [{"model": "dense", "macs": 1.0, "psnr": psnr(model, val)}]
    dense = copy.deepcopy(model)

    # The feature maps that the decoder reads leave the backbone, so their channels are in no group.
    masks = slimming.attach(model.backbone, slimming.describe(model.backbone))
    fit(model, train, settings.steps // 2, masks.penalty, masks.collect)
    whole = slimming.cost(dense.backbone)
    for share in BUDGETS:
        small = copy.deepcopy(model)
        small.backbone = slimming.cut(model.backbone, slimming.plan(masks, slimming.Budget(macs=share)))
        row = {
            "model": f"{share:.0%}",
            "macs": slimming.cost(small.backbone).macs / whole.macs,
            "cut": psnr(small, val),
        }
        fit(small, train, settings.steps // 2)
        rows.append({**row, "psnr": psnr(small, val)})
    write(rows, settings)


def tensors(images: ImageDataset) -> Tensor:
    """All images, (images, 3, 64, 64), normalised."""
    return torch.cat([batch.images for batch in validation_batches(images, 500, 0, 1, 0)])


def fit(
    model: nn.Module,
    images: Tensor,
    steps: int,
    penalty: Callable[[], Tensor] | None = None,
    collect: Callable[[], None] | None = None,
) -> None:
    """Train on random batches of 32."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        colour = images[torch.randint(len(images), (32,), generator=generator)]
        loss = F.mse_loss(model(grey(colour)), colour)
        if penalty is not None:
            loss = loss + 0.02 * penalty()
        optimizer.zero_grad()
        loss.backward()
        if collect is not None:
            collect()
        optimizer.step()


def grey(colour: Tensor) -> Tensor:
    """The mean over channels, three times."""
    return colour.mean(1, keepdim=True).expand(-1, 3, -1, -1)


@torch.no_grad()
def psnr(model: nn.Module, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the range of the images."""
    model.eval()
    error = sum(float(F.mse_loss(model(grey(part)), part, reduction="sum")) for part in images.split(100))
    return 10 * math.log10(float(images.max() - images.min()) ** 2 / (error / images.numel()))


def write(rows: list[dict[str, Any]], settings: argparse.Namespace) -> None:
    """Write the numbers and their table."""
    record = {
        "name": "dense_prediction",
        "steps": settings.steps,
        "seed": 0,
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "slimming": slimming.__version__},
        "rows": rows,
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "dense_prediction.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "| backbone | MACs of the backbone | straight after the cut, dB | retrained, dB |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        cut = f"{row['cut']:.2f}" if "cut" in row else ""
        lines.append(f"| {row['model']} | {row['macs']:.3f} | {cut} | {row['psnr']:.2f} |")
    text = (
        f"# dense_prediction\n\nColours of grey EuroSAT images, PSNR on 1000 held-out ones; {settings.steps} steps of "
        f"dense training, half as many of the search and of each retraining, batches of 32. One run, seed 0.\n\n"
    )
    (settings.output / "dense_prediction.md").write_text(text + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
