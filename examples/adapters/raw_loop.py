"""A search in a loop of your own, retraining in the same loop.

    python examples/adapters/raw_loop.py [--steps 100]

Five lines are slimming's: attach the masks, add their penalty to the loss, collect between backward and step, plan and
cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import slimming


def main(words: Sequence[str] | None = None) -> None:
    """Search, cut to half of the multiply-adds, retrain, save."""
    settings = common.parser(__doc__).parse_args(words)
    torch.manual_seed(0)
    images, labels, classes = common.images(settings.images)
    model = common.vit(len(classes))
    groups = [group for group in slimming.describe(model) if group.kind in common.KINDS]
    masks = slimming.attach(model, groups)
    train(model, images, labels, settings.steps, masks)
    plan = slimming.plan(masks, slimming.Budget(macs=0.5))
    small = slimming.cut(model, plan)
    train(small, images, labels, settings.steps)
    slimming.save(small, settings.output)
    print(f"{slimming.cost(small).macs / slimming.cost(model).macs:.0%} of the MACs in {settings.output}")


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    masks: slimming.masks.attachment.SoftMasks | None = None,
) -> None:
    """A plain training; with masks, a search."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        if masks is not None:
            loss = loss + masks.penalty()
        optimizer.zero_grad()
        loss.backward()
        if masks is not None:
            masks.collect()
        optimizer.step()


if __name__ == "__main__":
    main()
