"""The results of a run as plain data, for ``results.json`` and the provenance of checkpoints."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from slimming.benchmarking.config import BenchConfig
from slimming.benchmarking.timing import machine, paired_times, speedup, summary
from slimming.core.budget import Budget
from slimming.core.example_inputs import ExampleCall
from slimming.core.files import FORMAT, json_values
from slimming.core.groups import Anatomy, Group, resolve
from slimming.core.kinds import KINDS
from slimming.core.metric import TOP1, Metric
from slimming.core.plain_text import without_places
from slimming.core.pruning_plan import Plan
from slimming.models.prunable import PrunableModel
from slimming.planning.sensitivity import Sensitivity
from slimming.pruning.costs import cost
from slimming.runs.config import RunConfig
from slimming.searching.mask_search import SearchResult
from slimming.training.samples import Data, ImageDataset

HISTOGRAM_BINS = 30
EXAMPLE_IMAGES = 4


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages on which results depend."""
    names = ("slimming", "torch", "timm", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def measure_all(
    models: Mapping[str, nn.Module], example: Sequence[int] | ExampleCall, config: BenchConfig
) -> dict[str, dict[str, Any]]:
    """Return latency and speed-up over the first model by batch size, of all models, which are measured alternately."""
    reference = next(iter(models))
    timed: dict[str, dict[str, Any]] = {name: {"latency_ms": {}, "speedup": {}} for name in models}
    for size in config.batch_sizes:
        times = paired_times(models, example, size, runs=config.runs, seconds=config.seconds, runtime=config.runtime)
        for name, values in times.items():
            timed[name]["latency_ms"][str(size)] = summary(values).to_dict()
            timed[name]["speedup"][str(size)] = speedup(times[reference], values)
    return timed


def entry_of(metric: Metric, stage: str = "") -> str:
    """Return the entry of a table row in which a value of the metric is, see `slimming.report.model.Row`."""
    return f"{'top1' if metric == TOP1 else 'metric'}{stage}"


def dense_entry(
    model: nn.Module, value: float | None, timed: Mapping[str, Any], metric: Metric = TOP1
) -> dict[str, Any]:
    """Return the table row of the dense model."""
    return {"name": "dense", **costs_of(model), "latency_ms": timed["latency_ms"], entry_of(metric): value}


def row_entry(
    budget: Budget,
    model: nn.Module,
    dense: Anatomy,
    plan: Plan,
    values: tuple[float, float],
    seconds: Mapping[str, float],
    metric: Metric = TOP1,
) -> dict[str, Any]:
    """Return the table row of one budget, without latencies; ``values`` are after the cut and after retraining."""
    return {
        "name": budget.name,
        "budget": budget.to_dict(),
        **costs_of(model),
        entry_of(metric, "_cut"): values[0],
        entry_of(metric): values[1],
        "seconds": dict(seconds),
        **widths_of(dense, plan),
        "layers": layers_of(dense, plan),
        **({"plan_note": plan.note} if plan.note else {}),
        "checkpoint": f"{budget.name}/slim",
        "log": f"{budget.name}/log.jsonl",
    }


def widths_of(anatomy: Anatomy, plan: Plan) -> dict[str, Any]:
    """Return the kept share of each embedding width, for models whose width can be pruned."""
    widths = [
        {"name": group.name, "kept": len(plan.kept.get(group.name, range(group.size))), "of": group.size}
        for group in anatomy.groups
        if group.kind == "width"
    ]
    return {"widths": widths} if widths else {}


def layers_of(anatomy: Anatomy, plan: Plan) -> list[dict[str, Any]]:
    """Return the kept units of each block under ``plan``, with heads in the order of the dense model."""
    kept = resolve(anatomy, plan.kept)
    rows = grid_of(anatomy)
    layers: dict[str, dict[str, Any]] = {}
    with_dimensions = {group.site for group in anatomy.groups if group.kind == "head_dim"}
    for group in anatomy.groups:
        if KINDS[group.kind].on_request:
            continue  # a removed branch is visible from its inner units, which are removed with it
        layer = layers.setdefault(_layer_of(group), {})
        if group.role in ("qk", "v"):
            heads = layer.setdefault("heads", [{"qk": n, "v": n, "of": n} for n in group.limits.parts])
            counts = [0] * len(heads)
            for unit in kept[group.name]:
                counts[group.part_of_unit[unit]] += 1
            for head, count in zip(heads, counts, strict=True):
                head[group.role] = count
        elif group.kind == "mlp":
            layer["mlp"] = {"kept": len(kept[group.name]), "of": group.size}
        elif group.kind == "channel":
            layer["channels"] = {"kept": len(kept[group.name]), "of": group.size}
        elif group.kind == "head" and group.site not in with_dimensions:
            layer["whole_heads"] = {"kept": len(kept[group.name]), "of": group.size}
        elif group.token is not None:
            layer["tokens"] = {
                "grid": rows,
                "kept": [group.token.positions[unit] for unit in kept[group.name]],
            }
    for layer in layers.values():
        for head in layer.get("heads", []):
            head["qk"] = head["qk"] if head["v"] else 0
    return [{"name": name, **layer} for name, layer in layers.items()]


def _layer_of(group: Group) -> str:
    """The name under which reports show a group: its block in a Vision Transformer, else its module."""
    if group.kind == "channel":
        return group.site
    return group.name.split(".attn")[0].split(".mlp")[0].removesuffix(".tokens")


def grid_of(anatomy: Anatomy) -> list[int]:
    """Return rows and columns of the patch grid, from the number of positions and the aspect ratio of the image."""
    sites = [group.token for group in anatomy.groups if group.token is not None]
    if not sites:
        return [0, 0]
    count = max(sites[0].positions) + 1
    _, height, width = anatomy.input_shape
    rows = round((count * height / width) ** 0.5)
    return [rows, count // rows]


def provenance(
    config: RunConfig, result: SearchResult, plan: Plan, metrics: Mapping[str, float], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the provenance of a slim model, for its checkpoint; ``inputs`` are those of `recorded_inputs`."""
    digest = hashlib.sha256()
    for name in sorted(result.scores):
        digest.update(name.encode() + result.scores[name].numpy().tobytes())
    return {
        "base": without_places(result.anatomy.structure.base),
        "data": without_places(json_values(config.data)),
        "settings": without_places(json_values(config)),
        "inputs": dict(inputs),
        "plan": plan.to_dict(),
        "scores_sha256": digest.hexdigest(),
        "metrics": dict(metrics),
        "versions": versions(),
        "created": now(),
    }


def results_of(
    config: RunConfig,
    dense: PrunableModel,
    data: Data,
    dense_row: dict[str, Any],
    rows: list[dict[str, Any]],
    result: SearchResult,
    seconds: float,
    metric: Metric = TOP1,
) -> dict[str, Any]:
    """Return the content of ``results.json``."""
    anatomy = dense.anatomy
    return {
        "format": FORMAT,
        "slimming": version("slimming"),
        "created": now(),
        "name": config.name,
        "seed": config.search.train.seed,
        "model": {
            "name": without_places(config.model.name),
            "family": anatomy.structure.family,
            "input": list(anatomy.input_shape),
            "classes": list(data.classes),
        },
        "data": {
            "source": without_places(config.data.source),
            "train_images": _length(data.train),
            "val_images": _length(data.val),
            "note": config.note,
        },
        "machine": machine(),
        "versions": versions(),
        "settings": without_places(json_values(config)),
        "dense": dense_row,
        "rows": rows,
        "search": {
            "log": "search/log.jsonl",
            "seconds": seconds,
            "masks": _histograms(result),
            "sensitivity": _sensitivity_points(result.sensitivity),
        },
        "images": examples(data),
        **described(metric),
    }


def described(metric: Metric) -> dict[str, Any]:
    """Return the entry of a metric in ``results.json``; empty for top-1, the default."""
    return {} if metric == TOP1 else {"metric": dataclasses.asdict(metric)}


def _sensitivity_points(sensitivity: Sensitivity | None) -> dict[str, Any]:
    """The measurements of each kind; empty if sensitivity was not measured."""
    curves = {} if sensitivity is None else sensitivity.curves
    return {kind: [{"kept": kept, "loss": loss} for kept, loss in curve] for kind, curve in curves.items()}


def now() -> str:
    """Return the time as text."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _length(images: Any) -> int | None:
    return len(images) if isinstance(images, ImageDataset) else None


def costs_of(model: nn.Module) -> dict[str, int]:
    """Return the costs of a model as the entries of a table row."""
    total_cost = cost(model)
    return {"params": total_cost.params, "macs": total_cost.macs, "memory_bytes": total_cost.memory_bytes}


def _histograms(result: SearchResult) -> dict[str, Any]:
    """Histogram of the mask factors of each kind, and their values by group."""
    histograms: dict[str, Any] = {}
    factors = {group.name: result.masks.factor(group).detach().float().cpu() for group in result.masks.groups}
    for kind in dict.fromkeys(group.kind for group in result.masks.groups):
        of_kind = {group.name: factors[group.name] for group in result.masks.of_kind(kind)}
        values = torch.cat(list(of_kind.values()))
        low, high = float(values.min()), float(values.max())
        if high - low < 1e-6:
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(values, HISTOGRAM_BINS, low, high)
        histograms[kind] = {
            # In float64: in float32 the edges of a narrow range would coincide.
            "edges": torch.linspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64).tolist(),
            "counts": [int(count) for count in counts],
            "by_layer": {name: [round(v, 4) for v in factor.tolist()] for name, factor in of_kind.items()},
        }
    return histograms


def examples(data: Data) -> list[dict[str, str]]:
    """Return `EXAMPLE_IMAGES` preprocessed validation images of different classes, as PNG."""
    if not isinstance(data.val, ImageDataset):
        return []
    entries: list[dict[str, str]] = []
    seen: set[int] = set()
    for index, label in enumerate(data.val.labels.tolist()):
        if label in seen:
            continue
        seen.add(label)
        entries.append({"label": data.classes[label], "png": _png(data.val[index].image)})
        if len(entries) == EXAMPLE_IMAGES:
            break
    return entries


def _png(image_CHW: Tensor) -> str:
    """A normalised image as base64 PNG, rescaled to the range 0 to 255."""
    low, high = image_CHW.min(), image_CHW.max()
    return picture(((image_CHW - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8))


def picture(image_CHW: Tensor) -> str:
    """Return a uint8 image as base64 PNG."""
    pixels = image_CHW.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
