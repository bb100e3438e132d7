"""Tiny jobs that write directories, and the content of such a directory as far as it must not depend on luck."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from PIL import Image

import slimming

TIMES = ("seconds", "images_per_second", "created", "median", "p25", "p75", "machine", "sha256")
"""Parts of the names of values that differ from call to call: times, and checksums of files with times."""


@dataclass(frozen=True)
class Job:
    """A command whose output directory is attacked.

    Attributes:
        name: name of the command in the table.
        words: the command line without ``--output``.
    """

    name: str
    words: tuple[str, ...]

    def into(self, directory: Path) -> list[str]:
        """Return the command line that writes to ``directory``."""
        return [*self.words, "--output", str(directory)]


def make_jobs(root: Path) -> dict[str, Job]:
    """Write images, a dense model, a search and settings below ``root``; return the jobs by name."""
    rng = np.random.default_rng(0)
    for split, label in ((split, label) for split in ("train", "val") for label in ("ant", "bee")):
        folder = root / "data" / split / label
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    slimming.save(timm.create_model("test_vit", img_size=32, num_classes=2), root / "dense")
    train = {"steps": 2, "batch_size": 4, "workers": 0, "checkpoint_seconds": 0, "log_every": 1}
    search = {"images": 8, "sensitivity": 8, "kinds": ["mlp", "head_dim"], "train": train}
    data = {"source": str(root / "data"), "augment": "none"}
    model = {"name": str(root / "dense")}
    bench = {"runs": 1, "seconds": 0.001, "batch_sizes": [1]}
    settings: dict[str, dict[str, Any]] = {
        "run": {
            "model": model,
            "data": data,
            "search": {**search, "sensitivity": 0},
            "budgets": [{"macs": 0.7}],
            "retrain": train,
            "compensate": 8,
            "bench": bench,
        },
        "search": {"model": model, "data": data, "search": search},
        "train": {"model": model, "data": data, "train": train},
    }
    jobs = {}
    for name, values in settings.items():
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), "utf-8")
        jobs[name] = Job(name, (name, str(path)))
    return jobs


def content(directory: Path) -> dict[str, Any]:
    """Return what ``directory`` holds: name of each file -> its checksum, or its values without times.

    Hidden files are left out, of which only a lock may stay.
    """
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text("utf-8")))
        elif path.suffix in (".safetensors", ".yaml"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        else:
            found[name] = path.stat().st_size > 0
    return found


def hidden(directory: Path) -> list[str]:
    """Return the names of hidden files and directories below ``directory``."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob(".*"))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: entry for key, entry in value.items() if not any(part in key for part in TIMES)}
        return {key: _timeless(entry) for key, entry in kept.items() if key not in ("path", "directory")}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value
