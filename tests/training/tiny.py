"""A tiny model and tiny images, shared by the training tests; run as a script it is one training process.

python tests/training/tiny.py DATA OUT KEY=VALUE ...
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from torch import nn

from slimming.training.config import DataConfig, TrainConfig
from slimming.training.data import open_data
from slimming.training.evaluation import evaluate
from slimming.training.images import ImageSpec
from slimming.training.loop import History, fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask

SPEC = ImageSpec(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
CLASSES = ("dark", "bright", "green")


def picture(index: int, label: int, size: int = 20) -> Image.Image:
    """Return an image that tells its class by brightness or colour."""
    noise = np.random.default_rng(index).integers(0, 90, (size, size, 3))
    base = np.array([(0, 0, 0), (160, 160, 160), (0, 160, 0)][label])
    return Image.fromarray((noise + base).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, labels: list[int], first: int = 0, names: tuple[str, ...] | None = CLASSES) -> Path:
    rows = [
        {"bytes": encoded(picture(first + i, max(0, label) % 3)), "path": f"{i}.png"} for i, label in enumerate(labels)
    ]
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_data(folder: Path, train: int = 48, val: int = 18) -> Path:
    """Write train.parquet and test.parquet."""
    write_parquet(folder / "train.parquet", [i % 3 for i in range(train)])
    write_parquet(folder / "test.parquet", [i % 3 for i in range(val)], first=1000)
    return folder


def write_folders(root: Path, per_class: int = 6, classes: tuple[str, ...] = CLASSES) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.png").write_bytes(encoded(picture(10 * label + i, label % 3)))
    return root


def write_tar(path: Path, entries: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_entries(count: int, first: int = 0) -> dict[str, bytes]:
    entries: dict[str, bytes] = {}
    for i in range(first, first + count):
        entries[f"{i:05d}.png"] = encoded(picture(i, i % 3))
        entries[f"{i:05d}.cls" if i % 2 else f"{i:05d}.json"] = (
            str(i % 3) if i % 2 else json.dumps({"label": i % 3})
        ).encode()
    return entries


def make_model(seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes})


def tiny_config(**changes: object) -> TrainConfig:
    start = {"epochs": 2.0, "batch_size": 8, "lr": 3e-3, "log_every": 1, "eval_every": 1.0, "ema": 0.9}
    return TrainConfig(**{**start, **changes})  # type: ignore[arg-type]


def open_tiny(folder: Path, **changes: object) -> Data:
    return open_data(DataConfig(source=str(folder), **changes), SPEC)  # type: ignore[arg-type]


def train(data: Data, config: TrainConfig, out: Path | None, model: nn.Module, **more: object) -> History:
    check = partial(evaluate, images=data.val)
    return fit(model, ClassificationTask(0.1), data, config, directory=out, evaluate=check, title=None, **more)  # type: ignore[arg-type]


def run(folder: Path, out: Path, *settings: str) -> None:
    """Train, or go on, with settings as KEY=VALUE, and leave the weights in final.pt."""
    changes = {key: ast.literal_eval(value) for key, value in (setting.split("=", 1) for setting in settings)}
    model = make_model(proj_drop_rate=changes.pop("drop", 0.0))
    data = open_tiny(folder, augment=changes.pop("augment", "light"))
    history = train(data, tiny_config(**changes), out, model, resume=True)
    assert history.averaged is not None
    torch.save({"model": model.state_dict(), "averaged": history.averaged.state_dict()}, out / "final.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    # A pipeline trains several times in one process, or in one group of processes.
    run(Path(sys.argv[1]), Path(sys.argv[2]) / "again", *sys.argv[3:])
