"""Train a small dense Vision Transformer from scratch, as the start of the demo and of the benchmarks.

    python recipes/dense.py eurosat --data DIR --out DIR
    python recipes/dense.py cifar10 --data DIR --out DIR

DIR of the data holds train.parquet and test.parquet in the Hugging Face image layout. A recipe that was
stopped goes on where it was when it is called again. It leaves model.safetensors, log.jsonl and model.json,
which says how the model is made and what it reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from slimming.core.files import atomic_json
from slimming.training.config import DataConfig, TrainConfig
from slimming.training.data import open_data
from slimming.training.evaluation import evaluate
from slimming.training.images import ImageSpec
from slimming.training.loop import fit
from slimming.training.tasks import ClassificationTask


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model of timm, its training, and the augmentation of its images."""

    name: str
    model: dict[str, Any]
    normalisation: dict[str, Any]
    train: TrainConfig
    augment: str


RECIPES = {
    "eurosat": Recipe(
        name="vit_tiny_patch16_224",
        model={"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3},
        normalisation={"mean": (0.344, 0.380, 0.408), "std": (0.203, 0.137, 0.116)},
        train=TrainConfig(
            epochs=16,
            batch_size=32,
            lr=1e-3,
            weight_decay=0.05,
            warmup_epochs=1,
            label_smoothing=0.1,
            eval_every=4,
            workers=1,
        ),
        augment="overhead",
    ),
    "cifar10": Recipe(
        name="vit_tiny_patch16_224",
        model={"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3},
        normalisation={"mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)},
        train=TrainConfig(
            epochs=20,
            batch_size=128,
            lr=1e-3,
            weight_decay=0.05,
            warmup_epochs=1,
            label_smoothing=0.1,
            eval_every=1,
            workers=1,
        ),
        augment="light",
    ),
}


def main() -> None:
    """Run the recipe that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, required=True, help="directory of train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, required=True, help="directory for the result")
    parser.add_argument("--epochs", type=float, help="in place of the recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.recipe]
    train(recipe, arguments.data, arguments.out, arguments.epochs or recipe.train.epochs)


def train(recipe: Recipe, source: Path, out: Path, epochs: float) -> None:
    """Train one recipe on the data at ``source`` and leave the result in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(recipe.train, epochs=epochs)
    size = recipe.model["img_size"]
    # crop_pct 1: whole images in evaluation, as in training's light crops.
    overlay = {
        **recipe.normalisation,
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    torch.manual_seed(config.seed)
    make = {**recipe.model, "num_classes": 10, "pretrained_cfg_overlay": overlay}
    model = timm.create_model(recipe.name, **make)
    data = open_data(DataConfig(source=str(source), augment=recipe.augment), ImageSpec.of_model(model), config.seed)
    history = fit(
        model,
        ClassificationTask(config.label_smoothing),
        data,
        config,
        directory=out,
        resume=True,
        evaluate=partial(evaluate, images=data.val),
        title=source.name,
    )
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / "model.safetensors")
    atomic_json(
        out / "model.json",
        {
            "model": {"name": recipe.name, **make},
            "classes": list(data.classes),
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "top1": history.metrics["top1"],
            "val_loss": history.metrics["loss"],
            "data": {"name": source.name, "train_images": len(data.train), "val_images": len(data.val)},
            "augment": recipe.augment,
            "settings": {**dataclasses.asdict(config), "trackers": []},
            "versions": {
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        },
    )


if __name__ == "__main__":
    main()
