"""What exports and 8 bits do to a dense and a slim model: accuracy, size and speed, each alone and both together.

    python benchmarks/exports.py --work DIR [--no-compile]

The demo's dense model, and the same cut to half its multiply-adds in one shot, on the embedded EuroSAT images. Files
come from `slimming.export`; beside them, 8 bits by torchao, in eager PyTorch and under `torch.compile`. All forms of
both models are timed in turns within one process, at batch 1; ratios are over the dense model in eager PyTorch, round
by round.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import slimming
from accuracy import EMBEDDED, recipe
from common import Spread, interleaved, machine, parser, ratios, store, table, versions
from slimming.benchmarking.runtimes import prepare
from slimming.exporting.targets import TARGETS
from slimming.models.hosts import name_classes
from slimming.training.batches import validation_batches

Run = Callable[[Tensor], Tensor]
HEADER = ("model", "form", "size, MB", "top-1", "same class as PyTorch", "largest difference", "speed-up")


def quantised(model: nn.Module) -> nn.Module:
    """A copy whose linear layers have weights in 8 bits, and read what they read in 8 bits."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    found = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(found, Int8DynamicActivationInt8WeightConfig())
    return found


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, as they are stored."""

    def size(tensor: Tensor) -> int:
        if is_traceable_wrapper_subclass(tensor):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    return sum(size(tensor) for tensor in (*model.parameters(), *model.buffers()))


def models(settings: Any) -> dict[str, nn.Module]:
    """Dense and slim, kept below the work directory."""
    names = tuple(json.loads((EMBEDDED / "dense.json").read_text())["classes"])
    found = {"dense": recipe(EMBEDDED, "dense").eval()}
    name_classes(found["dense"], names)
    place = settings.work / "slim"
    if not place.exists():
        images = slimming.load_images(str(EMBEDDED / "eurosat"), found["dense"], 256, seed=settings.seed)
        scored = slimming.score(found["dense"], images, seed=settings.seed)
        plan = slimming.plan(scored, slimming.Budget(macs=0.5))
        slimming.save(slimming.cut(scored.model, plan, images=scored.images), place)
    found["slim"] = slimming.load(place)
    name_classes(found["slim"], names)
    return found


def judged(run: Run, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, np.ndarray]:
    """Top-1, and all logits."""
    logits = np.concatenate([run(images).numpy() for images, _ in batches])
    labels = np.concatenate([labels.numpy() for _, labels in batches])
    return float((logits.argmax(1) == labels).mean()), logits


def main() -> None:
    """Export, judge, time, write."""
    arguments = parser(__doc__, rounds=20)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--images", type=int, default=256, help="to compare files on, half of them for ranges")
    arguments.add_argument("--test-images", type=int, default=1000)
    arguments.add_argument("--no-compile", action="store_true")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    source = str(EMBEDDED / "eurosat")
    rows: dict[str, dict[str, Any]] = {}
    cases: dict[str, Run] = {}
    with torch.inference_mode(False), torch.no_grad():
        both = models(settings)
        config = slimming.DataConfig(source=source, augment="none", val_limit=settings.test_images)
        val = slimming.open_data(config, both["dense"]).val
        batches = [(batch.images, batch.labels) for batch in validation_batches(val, 100)]
        for name, model in both.items():
            exact, logits = judged(model, batches)
            forms: dict[str, tuple[Run, int]] = {"PyTorch": (model, stored_bytes(model))}
            for target, (run, size) in exported(name, model, source, settings).items():
                forms[target] = (run, size)
            small = quantised(model)
            forms["PyTorch, torchao int8"] = (small, stored_bytes(small))
            for form, (run, size) in forms.items():
                top1, found = (exact, logits) if form == "PyTorch" else judged(run, batches)
                rows[f"{name}/{form}"] = row(name, form, size, top1, found, logits)
                cases[f"{name}/{form}"] = run
                print(rows[f"{name}/{form}"], file=sys.stderr, flush=True)
        measure(rows, cases, settings)
        if not settings.no_compile:
            compiled(both, rows, cases, batches)
            measure(rows, cases, settings)


def exported(name: str, model: nn.Module, source: str, settings: Any) -> dict[str, tuple[Run, int]]:
    """Every target's file, run, and its size."""
    images = slimming.load_images(source, model, settings.images, seed=settings.seed)
    place = settings.work / f"{name}-files"
    if not place.exists():
        made = slimming.export(model, place, to=list(TARGETS), images=images)
        print([asdict(one) for one in made], file=sys.stderr, flush=True)
    found = {}
    for target in TARGETS.values():
        files = target.files(place, "model")
        run = target.open(files[0])
        found[target.name] = (
            lambda x, run=run: torch.from_numpy(np.asarray(run(x.numpy()))),
            sum(file.stat().st_size for file in files),
        )
    return found


def compiled(
    both: dict[str, nn.Module], rows: dict[str, dict[str, Any]], cases: dict[str, Run], batches: list[Any]
) -> None:
    """Add both models under `torch.compile`, whole and in 8 bits."""
    image = batches[0][0][:1]
    for name, model in both.items():
        for form, module in (("compile", model), ("compile, torchao int8", quantised(model))):
            run = prepare(module, image, "compile")
            found, logits = run(image).numpy(), model(image).numpy()
            plain = rows[f"{name}/{'PyTorch' if form == 'compile' else 'PyTorch, torchao int8'}"]
            rows[f"{name}/{form}"] = {
                **row(name, form, plain["bytes"], plain["top1"], found, logits),
                "agreement": plain["agreement"],
            }
            cases[f"{name}/{form}"] = run


def row(name: str, form: str, size: int, top1: float, found: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """What was found of one form of one model."""
    return {
        "model": name,
        "form": form,
        "bytes": size,
        "top1": top1,
        "agreement": float((found.argmax(1) == logits.argmax(1)).mean()),
        "relative": float(np.abs(found - logits).max() / np.abs(logits).max()),
    }


def measure(rows: dict[str, dict[str, Any]], cases: dict[str, Run], settings: Any) -> None:
    """Time all forms, and write what there is."""
    image = torch.zeros(1, 3, 64, 64)
    work = {key: (lambda run=run: run(image)) for key, run in cases.items()}
    seconds = interleaved(work, rounds=settings.rounds, threads=settings.threads, number=3)
    for key, found in rows.items():
        found["latency_ms"] = asdict(Spread.of([1e3 * value for value in seconds[key]]))
        found["speedup"] = asdict(ratios(seconds["dense/PyTorch"], seconds[key]))
    order = sorted(rows.values(), key=lambda found: found["model"])
    lines = [
        [
            found["model"],
            found["form"],
            f"{found['bytes'] / 1e6:.2f}",
            f"{found['top1']:.1%}",
            f"{found['agreement']:.1%}",
            f"{found['relative']:.0e}" if found["relative"] else "0",
            Spread(**found["speedup"]).text(2),
        ]
        for found in order
    ]
    where = machine(settings.threads)
    note = (
        f"The demo's model (EuroSAT, 64×64), dense and cut to half its multiply-adds in one shot, without training; "
        f"{settings.test_images} validation images. Speed-up at batch 1 over the dense model in eager PyTorch, median "
        f"(quartiles) of {settings.rounds} rounds in turns, {where['cpu']}, {settings.threads} threads, on a machine "
        f"that did other work too; PyTorch {versions()['torch']}. Forms under compile take top-1 from the same model "
        "uncompiled; their difference is that of one image."
    )
    store("exports", settings, table(HEADER, lines) + f"\n{note}\n", rows=order)


if __name__ == "__main__":
    main()
