"""A run as the whole chain would leave it, made up in a moment at any size."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slimming.core.files import seal

CLASSES = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the made-up run is."""

    name: str = "EuroSAT, small ViT"
    model: str = "vit_tiny_demo"
    image: int = 64
    grid: int = 8
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    hidden: int = 512
    params: int = 1_450_000
    macs: int = 98_000_000
    latency: tuple[float, float] = (3.4, 41.0)
    top1: float = 0.951
    budgets: tuple[float, ...] = (0.7, 0.5, 0.3)
    equal_heads: bool = False
    classes: tuple[str, ...] = CLASSES
    epochs: int = 5


DEIT = Shape(
    name="DeiT-S on ImageNet", model="deit_small_patch16_224", image=224, grid=14, layers=12, heads=12, head_dim=32,
    hidden=1536, params=22_050_664, macs=4_608_000_000, latency=(68.0, 1720.0), top1=0.7985,
    budgets=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4), epochs=30,
)  # fmt: skip


def fabricate(directory: Path, shape: Shape | None = None, pictures: list[bytes] | None = None) -> dict[str, Any]:
    """Write results.json and its logs into ``directory``; return the results."""
    shape = shape or Shape()
    draw = random.Random(0)
    results = {
        "format": 1,
        "slimming": "0.1.0",
        "created": "2026-03-01T10:00:00+00:00",
        "name": shape.name,
        "seed": 0,
        "model": {
            "name": shape.model,
            "family": "timm-vit",
            "input": [3, shape.image, shape.image],
            "classes": list(shape.classes),
        },
        "data": {"source": "data/images", "train_images": 2600, "val_images": 1000, "note": ""},
        "machine": {"cpu": "A CPU @ 2.6 GHz", "cores": 2, "threads": 2, "gpu": None, "os": "Linux 6.1"},
        "versions": {"python": "3.11.2", "slimming": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
        "settings": {
            "search": {"kinds": ["head_dim", "mlp", "token"], "train": {"epochs": 5.0, "lr": 1e-4, "ema": None}},
            "budgets": [{"macs": share} for share in shape.budgets],
        },
        "dense": {"name": "dense", **_costs(shape, 1.0, draw), "top1": shape.top1},
        "rows": [_row(shape, share, draw) for share in shape.budgets],
        "search": {
            "log": "search/log.jsonl",
            "seconds": 83.2,
            "masks": _masks(shape, draw),
            "sensitivity": {
                kind: [{"kept": kept, "loss": weight * (1 - kept) ** 3} for kept in (0.9, 0.6, 0.3, 0.05)]
                for kind, weight in {"head_dim": 1.0, "mlp": 0.4, "token": 3.0}.items()
            },
        },
        "images": [
            {"label": label, "png": base64.b64encode(png).decode()}
            for label, png in zip(shape.classes, pictures or _pictures(shape, draw), strict=False)
        ],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(seal(results)), "utf-8")
    _log(directory / "search/log.jsonl", shape, draw, 1.0)
    for row in results["rows"]:
        _log(directory / row["log"], shape, draw, row["budget"]["macs"])
    return results


def _costs(shape: Shape, share: float, draw: random.Random) -> dict[str, Any]:
    times = {size: base * (share**0.9) for size, base in zip(("1", "32"), shape.latency, strict=True)}
    return {
        "params": round(shape.params * (0.15 + 0.85 * share)) + draw.randrange(900),
        "macs": round(shape.macs * share) - draw.randrange(900),
        "memory_bytes": round(shape.params * 4.6 * (0.2 + 0.8 * share)),
        "latency_ms": {size: {**_spread(time, draw), "runs": 30} for size, time in times.items()},
    }


def _spread(value: float, draw: random.Random) -> dict[str, float]:
    return {
        "median": value,
        "p25": value * (1 - draw.uniform(0.005, 0.04)),
        "p75": value * (1 + draw.uniform(0.01, 0.06)),
    }


def _row(shape: Shape, share: float, draw: random.Random) -> dict[str, Any]:
    name = f"macs-{share:.2f}"
    return {
        "name": name,
        "budget": {"macs": share},
        **_costs(shape, share, draw),
        "speedup": {size: _spread(share**-0.9, draw) for size in ("1", "32")},
        "top1_cut": shape.top1 * (1 - 0.9 * (1 - share) ** 1.5),
        "top1": shape.top1 - 0.03 * (1 - share) ** 2 + 0.004 * (share > 0.65),
        "seconds": {"cut": 0.7, "retrain": 41.0 + 10 * share},
        "layers": _layers(shape, share, draw),
        "checkpoint": f"{name}/slim",
        "log": f"{name}/log.jsonl",
    }


def _layers(shape: Shape, share: float, draw: random.Random) -> list[dict[str, Any]]:
    count, middle = shape.grid**2, (shape.grid - 1) / 2
    # What is far from the middle goes first, with some noise: nested over layers and budgets.
    noise = random.Random(7)
    order = sorted(
        range(count),
        key=lambda p: (
            math.hypot(p // shape.grid - middle, p % shape.grid - middle) + noise.uniform(0, 0.35 * shape.grid)
        ),
    )
    layers = []
    for depth in range(shape.layers):
        where = depth / max(1, shape.layers - 1)
        bent = share ** (0.35 + 1.3 * abs(where - 0.4))
        heads = [_head(shape, bent * draw.uniform(0.55, 1.3)) for _ in range(shape.heads)]
        layer: dict[str, Any] = {"name": f"blocks.{depth}", "heads": heads}
        layer["mlp"] = {"kept": max(8, round(shape.hidden * bent / 8) * 8), "of": shape.hidden}
        if depth > 0:
            kept = order[: max(1, round(count * (1 - where * (1 - share) * 0.9)))]
            layer["tokens"] = {"grid": [shape.grid, shape.grid], "kept": sorted(kept)}
        layers.append(layer)
    return layers


def _head(shape: Shape, share: float) -> dict[str, int]:
    kept = min(shape.head_dim, round(shape.head_dim * share / 2) * 2)
    gone = kept < 0.16 * shape.head_dim
    return {"qk": 0 if gone else kept, "v": 0 if gone else min(shape.head_dim, kept + 4), "of": shape.head_dim}


def _masks(shape: Shape, draw: random.Random) -> dict[str, Any]:
    attention = shape.heads * shape.head_dim
    names = {
        "head_dim": [(f"blocks.{i}.attn.{r}", attention) for r in ("qk", "v") for i in range(shape.layers)],
        "mlp": [(f"blocks.{i}.mlp", shape.hidden) for i in range(shape.layers)],
        "token": [(f"blocks.{i}.tokens", shape.grid**2) for i in range(1, shape.layers)],
    }
    found = {}
    for kind, groups in names.items():
        values = {
            name: [
                round(max(0.0, draw.gauss(0.2, 0.1) if draw.random() < 0.4 else draw.gauss(0.85, 0.12)), 4)
                for _ in range(size)
            ]
            for name, size in groups
        }
        top = max(max(own) for own in values.values()) + 1e-6
        counts = [0] * 30
        for own in values.values():
            for value in own:
                counts[int(value / top * 30)] += 1
        found[kind] = {"edges": [top * i / 30 for i in range(31)], "counts": counts, "by_layer": values}
    return found


def _pictures(shape: Shape, draw: random.Random) -> list[bytes]:
    found = []
    for _ in range(4):
        small = Image.new("RGB", (9, 9))
        small.putdata([tuple(draw.randrange(40, 220) for _ in range(3)) for _ in range(81)])
        buffer = io.BytesIO()
        small.resize((shape.image, shape.image), Image.Resampling.BICUBIC).save(buffer, format="PNG")
        found.append(buffer.getvalue())
    return found


def _log(path: Path, shape: Shape, draw: random.Random, share: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, steps = [], 40
    for step in range(1, shape.epochs * steps + 1):
        epoch = step / steps
        rate = math.exp(-2.5 * epoch / shape.epochs)
        task = 0.35 + (0.4 + (1 - share)) * rate + draw.gauss(0, 0.04)
        line = {"step": step, "epoch": epoch, "lr": 1e-4, "loss": task, "images_per_second": 410.0}
        if path.parent.name == "search":
            parts = {"head_dim": 0.02 * rate + 0.01, "mlp": 0.012 * rate + 0.004, "token": 0.006 * rate + 0.004}
            line |= {"task": task, **parts, "loss": task + sum(parts.values())}
        if step % 10 == 0:
            lines.append(line)
        if step % steps == 0:
            top1 = shape.top1 * (1 - 0.12 * (1.1 - share) * rate) + draw.gauss(0, 0.002)
            lines.append({"step": step, "epoch": epoch, "val_top1": top1, "val_loss": 0.3})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def script_data(html: str, name: str) -> Any:
    """What a page gives its script under this name."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def tables(html: str) -> dict[str, list[list[str]]]:
    """The tables beside charts: title -> rows of text."""
    found = {}
    for title, body in re.findall(r"<figure>\n<h4>(.*?)</h4>.*?<tbody>(.*?)</tbody>", html, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", body)
        found[title] = [[unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in rows]
    return found


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run: ``make_run(change, shape)``; ``change`` may edit the results before they are written."""

    def make(change: Callable[[dict[str, Any]], Any] | None = None, shape: Shape | None = None) -> Path:
        directory = tmp_path / "run"
        results = fabricate(directory, shape)
        if change is not None:
            change(results)
            (directory / "results.json").write_text(json.dumps(seal(results)), "utf-8")
        return directory

    return make
