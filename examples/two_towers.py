"""Cut both towers of CLIP or SigLIP, and retrain them inside transformers' Trainer.

    python examples/scenes.py --output scenes
    python examples/two_towers.py MODEL --data scenes [--macs 0.7] [--steps 500] [--output slim]

MODEL is a name on the hub or a directory with a pair of encoders and its tokenizer. ``--data`` has ``train`` and
``val``, each with ``images`` and COCO annotations in ``annotations.json``, whose categories become captions. The towers
are scored by their embeddings, cut together, and retrained with their own contrastive loss and the dense embeddings.
The cosine between dense and slim embeddings is measured, and the slim model is saved and loaded by `slimming.load`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dense_options import options
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection
from torchvision.transforms.functional import pil_to_tensor, resize
from transformers import AutoModel, AutoTokenizer, TrainingArguments

import slimming
from slimming.training.hf_trainer import DistillingTrainer


class Captioned(Dataset):
    """Images of one size with the names of what is in them."""

    def __init__(self, place: Path, size: int) -> None:
        self.scenes = CocoDetection(str(place / "images"), str(place / "annotations.json"))
        self.size = size

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image, objects = self.scenes[index]
        names = sorted({self.scenes.coco.cats[each["category_id"]]["name"] for each in objects})
        pixels = resize(pil_to_tensor(image), [self.size, self.size]).float() / 255
        return (pixels - 0.45) / 0.225, f"an image of {' and '.join(names)}"


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Score, cut, retrain, measure, save and load."""
    what = "name on the hub, or directory"
    parser = options(__doc__, model=what, size=224, macs=0.7, output="slim-towers", batch=16)
    parser.add_argument("--words", type=int, default=64, help="number of tokens of a caption")
    settings = parser.parse_args(words)
    torch.manual_seed(0)
    train, val = (Captioned(settings.data / split, settings.size) for split in ("train", "val"))
    dense: Any = AutoModel.from_pretrained(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)

    def collate(pairs: Sequence[tuple[Tensor, str]]) -> dict[str, Any]:
        images, captions = zip(*pairs, strict=True)
        words = tokenizer(list(captions), padding="max_length", max_length=settings.words, truncation=True)
        words = {name: torch.tensor(words[name]) for name in ("input_ids", "attention_mask")}
        return {"pixel_values": torch.stack(images), **words, "return_loss": True}

    batches = list(DataLoader(Subset(train, range(settings.scored)), settings.batch, collate_fn=collate))
    dense.example_inputs = collate([train[0]])
    scored = slimming.score(dense, batches, outputs=embeddings, images=settings.scored)
    plan = slimming.plan(scored, slimming.Budget(macs=settings.macs))
    small: Any = slimming.cut(scored.model, plan, images=scored.images)
    checked = list(DataLoader(val, settings.batch, collate_fn=collate))
    found = {"macs": slimming.cost(small).macs / slimming.cost(dense).macs, "cut": cosine(dense, small, checked)}

    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.rate,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        DistillingTrainer(
            model=small, args=arguments, train_dataset=train, data_collator=collate, teacher=dense, outputs=embeddings
        ).train()
    found["retrained"] = cosine(dense, small, checked)
    slimming.save(small, settings.output)
    found["loaded"] = cosine(dense, slimming.load(settings.output), checked)
    print(json.dumps(found, indent=1))
    return found


def embeddings(output: Any) -> tuple[Tensor, Tensor]:
    """The outputs that are scored and compared."""
    return output.image_embeds, output.text_embeds


@torch.no_grad()
def cosine(dense: Any, small: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Mean cosine between the embeddings of the two models."""
    found = []
    for model in (dense.eval(), small.eval()):
        batch_embeddings = [embeddings(model(**batch)) for batch in batches]
        found.append([torch.cat(each) for each in zip(*batch_embeddings, strict=True)])
    return float(torch.cat([F.cosine_similarity(*pair) for pair in zip(*found, strict=True)]).mean())


if __name__ == "__main__":
    main()
