"""A search inside transformers' Trainer, and the retraining of what was cut by another Trainer.

    python examples/adapters/hf_trainer.py [--steps 100]

The model is a small ViT of transformers. The search is a callback; the slim model gets the face of transformers, so
that the Trainer, `save_pretrained` and `pipeline` take it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import common
import slimming
from slimming.training.hf_trainer import SearchCallback


class Pictures(Dataset):
    """Images and labels as the Trainer wants them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main(words: Sequence[str] | None = None) -> None:
    """Search, cut to half of the multiply-adds, retrain, save."""
    settings = common.parser(__doc__).parse_args(words)
    torch.manual_seed(0)
    images, labels, classes = common.images(settings.images)
    small_vit = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes = {"image_size": 64, "patch_size": 8, "num_labels": len(classes)}
    model = ViTForImageClassification(ViTConfig(**small_vit, **sizes))
    data = Pictures(images, labels)

    masks = slimming.attach(model)  # before the Trainer, so that its optimiser has the masks
    fit(model, data, settings.steps, [SearchCallback(masks)])

    small = slimming.cut(model, slimming.plan(masks, slimming.Budget(macs=0.5)))
    slim = slimming.as_transformers(small)
    fit(slim, data, settings.steps, [])
    slim.save_pretrained(settings.output)
    print(f"{slimming.cost(small).macs / slimming.cost(model).macs:.0%} of the MACs in {settings.output}")


def fit(model: Any, data: Pictures, steps: int, callbacks: list[Any]) -> None:
    """Train with the Trainer; nothing is kept but the model. Weight decay would shrink the masks too, so it is 0."""
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            weight_decay=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()


if __name__ == "__main__":
    main()
