"""A search inside Lightning's Trainer.

    python examples/adapters/lightning_trainer.py [--steps 100]

The masks are attached before the module configures its optimiser; the search is a callback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import common
from slimming.training.lightning import SearchCallback


class Classifier(LightningModule):
    """A module as one has it; nothing in it is slimming's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Weight decay would shrink the masks too, so it is 0."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


def main(words: Sequence[str] | None = None) -> None:
    """Search, cut to half of the multiply-adds, retrain, save."""
    settings = common.parser(__doc__).parse_args(words)
    torch.manual_seed(0)
    images, labels, classes = common.images(settings.images)
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    model = common.vit(len(classes))
    masks = common.attach(model)
    trainer(settings.steps, [SearchCallback(masks)]).fit(Classifier(model), loader)
    small = common.finish(model, masks, settings.output)
    trainer(settings.steps, []).fit(Classifier(small), loader)


def trainer(steps: int, callbacks: list[Any]) -> Trainer:
    """A Trainer that keeps nothing but the model."""
    return Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


if __name__ == "__main__":
    main()
