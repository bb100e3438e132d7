"""Accuracy at a budget: ours in one shot and after a search, against Torch-Pruning, random and uniform cuts.

    python benchmarks/accuracy.py --cifar10 DIR --imagenette DIR --vit DIR --work DIR [--only vgg16-cifar10] [--seeds 3]

DIR of --cifar10 holds CIFAR-10 as train.parquet and test.parquet (name any re-encoding with --note), that of
--imagenette Imagenette, whose images are scaled to 128 pixels, that of --vit what `recipes/dense.py cifar10` leaves.
EuroSAT is the embedded subset with the demo's model. The CNNs, of a quarter of the usual width, are trained here;
`--dense 1` with another --work trains them once more, and adds their rows.

All methods start from the same dense model and see the same calibration images; those of Torch-Pruning that need
gradients get the labels too, ours in one shot do not. Budgets of MACs are met by the same count (Torch-Pruning's
ratio is bisected); those of one kind are shares of its units that stay. Cuts of CNNs by Torch-Pruning are also judged
with the running statistics of their BatchNorms taken anew over the calibration images, which any user would do. Then
some cuts are retrained alike, distilled from the dense model. Finished rows are kept, so that a call that was stopped
goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimming
from common import parser, store, table
from network_slimming import vgg
from peers import theirs
from slimming.core.budget import Budget
from slimming.counting.measured import count
from slimming.demo import HERE
from slimming.masks.attachment import prunable
from slimming.training.batches import calibration_batches

MACS = (0.8, 0.6, 0.5, 0.4, 0.3)
KEEP = (0.7, 0.5, 0.3)
OURS = (
    "one-shot", "one-shot, no compensation", "one-shot, no rotation", "one-shot, no scarcity", "one-shot, fisher",
    "search", "search, a tenth of the steps", "paper", "network-slimming",
)  # fmt: skip
CRITERIA = ("magnitude", "taylor", "hessian", "random")
RETRAINED = (0.5, 0.3)
RETRAINED_METHODS = (
    "one-shot", "one-shot, no scarcity", "search", "search, a tenth of the steps", "paper", "network-slimming",
    "magnitude, per layer", "taylor, global", "hessian, global", "random, per layer",
    "magnitude, per layer, BatchNorm anew", "taylor, global, BatchNorm anew", "hessian, global, BatchNorm anew",
    "random, per layer, BatchNorm anew",
)  # fmt: skip
VGG16 = (16, 16, 0, 32, 32, 0, 64, 64, 64, 0, 128, 128, 128, 0, 128, 128, 128)
"""Widths of its convolutions, 0 for a pooling."""
EMBEDDED = HERE / "assets"


@dataclass(frozen=True)
class Case:
    """A dense model, its images, and how it is trained if it is trained here."""

    make: Callable[[], nn.Module]
    data: str
    epochs: tuple[float, ...]
    """After which the cut models are judged, each trained anew."""
    train: slimming.TrainConfig | None = None
    normalisation: dict[str, Any] = dataclasses.field(default_factory=dict)
    retrain: dict[str, Any] = dataclasses.field(default_factory=lambda: {"lr": 2e-4})


def resnet18() -> nn.Module:
    """ResNet-18 for 32-pixel images, with a quarter of its width: a stem of 3 x 3 and no pooling behind it."""
    model: Any = timm.create_model(
        "resnet18", num_classes=10, channels=(16, 32, 64, 128), pretrained_cfg_overlay={"input_size": (3, 32, 32)}
    )
    model.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def larger_resnet18() -> nn.Module:
    """ResNet-18 for 128-pixel images, with a quarter of its width."""
    return timm.create_model(
        "resnet18", num_classes=10, channels=(16, 32, 64, 128), pretrained_cfg_overlay={"input_size": (3, 128, 128)}
    )


def recipe(directory: Path, stem: str) -> nn.Module:
    """What `recipes/dense.py` left."""
    options = dict(json.loads((directory / f"{stem}.json").read_text())["model"])
    model = timm.create_model(options.pop("name"), **options)
    model.load_state_dict(load_file(directory / f"{stem}.safetensors"))
    return model


def cases(settings: Any) -> dict[str, Case]:
    """By name."""
    plain = {"optimizer": "nesterov", "weight_decay": 5e-4}
    cnn: Any = {
        "data": str(settings.cifar10),
        "epochs": (1.0,),
        "train": slimming.TrainConfig(epochs=settings.cnn_epochs, lr=0.1, batch_size=128, eval_every=0, **plain),
        "normalisation": {"mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)},
        "retrain": plain | {"lr": 0.01},
    }
    longer: Any = {
        "data": str(settings.imagenette),
        "epochs": (1.0,),
        "train": dataclasses.replace(cnn["train"], epochs=2 * settings.cnn_epochs),
        "retrain": cnn["retrain"],
    }
    return {
        "vit-cifar10": Case(lambda: recipe(settings.vit, "model"), str(settings.cifar10), (0.1, 1.0)),
        "vit-eurosat": Case(lambda: recipe(EMBEDDED, "dense"), str(EMBEDDED / "eurosat"), (0.3, 1.0, 3.0)),
        "vgg16-cifar10": Case(lambda: vgg(VGG16), **cnn),
        "resnet18-cifar10": Case(resnet18, **cnn),
        "resnet18-imagenette": Case(larger_resnet18, **longer),
    }


class Subject:
    """One dense model with its images, and what its rows need."""

    def __init__(self, name: str, case: Case, settings: Any) -> None:
        self.name, self.settings, self.work = name, settings, settings.work / name
        self.epochs, self.retrain = () if settings.no_retraining else case.epochs, case.retrain
        torch.manual_seed(settings.seed + settings.dense)
        self.dense = case.make()
        config = slimming.DataConfig(
            source=case.data, augment="light", val_limit=settings.test_images, **case.normalisation
        )
        self.data = slimming.open_data(config, self.dense)
        still = slimming.open_data(dataclasses.replace(config, augment="none"), self.dense)
        self.still = still
        if case.train is not None:
            weights = self.work / "dense.safetensors"
            if not weights.exists():
                slimming.train(
                    self.dense, self.data, case.train, directory=self.work / "dense", resume=True, title=name
                )
                save_file({key: value.contiguous() for key, value in self.dense.state_dict().items()}, weights)
            self.dense.load_state_dict(load_file(weights))
        self.dense.eval()
        self.shape = prunable(self.dense).anatomy.input_shape
        self.macs = count(self.dense, self.shape).macs
        val: Any = self.data.val
        self.tested, self.top1 = len(val), self.judge(self.dense)

    def judge(self, model: nn.Module) -> float:
        """Top-1 on the test images."""
        return slimming.evaluate(model, self.data.val, batch_size=500)["top1"]

    @cache  # noqa: B019
    def calibration(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The images that one-shot methods see, with labels for those that need them."""
        found = calibration_batches(self.still, self.settings.images, seed=seed)
        return [(batch.images, batch.labels) for batch in found]

    @property
    def kinds(self) -> dict[str, tuple[str, ...] | None]:
        """What is cut in each part of the table."""
        if any(group.kind == "mlp" for group in slimming.describe(self.dense)):
            return {"all": None, "mlp": ("mlp",), "attention": ("head_dim",), "tokens": ("token",)}
        return {"all": None}

    @cache  # noqa: B019
    def ours(self, method: str, kinds: tuple[str, ...] | None, seed: int) -> tuple[Any, nn.Module, list[torch.Tensor]]:
        """Scores, the model to cut, and the images to compensate with."""
        images = [batch for batch, _ in self.calibration(seed)]
        if method.startswith("one-shot"):
            how = "fisher" if "fisher" in method else "compensated"
            rotate = "no rotation" not in method
            found = slimming.score(self.dense, images, how=how, kinds=kinds, rotate=rotate, seed=seed)
            return found, found.model, [] if "no compensation" in method else images
        if kinds is not None:  # one search serves every budget
            return self.ours(method, None, seed)
        own = method in ("paper", "network-slimming")
        preset = slimming.preset(method if own else "default")
        steps = self.settings.search_steps // (10 if "a tenth" in method else 1)
        train = {"steps": steps, "batch_size": 128, "warmup_epochs": 0.0, "eval_every": 0}
        train |= {"mixup": 0.0, "cutmix": 0.0, "seed": seed}
        if method == "network-slimming":  # from trained weights, in few steps: a smaller rate, a larger penalty
            train["lr"] = 0.01
            preset = dataclasses.replace(preset, penalty={"channel": 1e-3})
        config = dataclasses.replace(preset, train=dataclasses.replace(preset.train, **train))
        place = self.work / f"{method}-{seed}".replace(", ", "-").replace(" ", "-")
        result = slimming.search(copy.deepcopy(self.dense), self.data, config, directory=place, resume=True)
        return result, result.model, [] if own else images

    def cut(self, method: str, kinds: tuple[str, ...] | None, budget: float, seed: int) -> tuple[nn.Module, float]:
        """The model cut to the budget, and the seconds that it took."""
        torch.manual_seed(seed)
        began = time.perf_counter()
        if method in OURS:
            scored, model, images = self.ours(method, kinds, seed)
            wanted = Budget(macs=budget) if kinds is None else Budget(keep=dict.fromkeys(kinds, budget))
            layout = slimming.Layout(scarcity=0.0) if "no scarcity" in method else None
            small = slimming.cut(model, slimming.plan(scored, wanted, layout=layout), images=images)
        else:
            small = theirs(self, method, kinds, budget, seed)
        return small.eval(), time.perf_counter() - began


def methods(kinds: tuple[str, ...] | None, transformer: bool) -> Iterator[str]:
    """Which methods can cut these kinds."""
    for method in OURS:
        other = ("network-slimming", "one-shot, no scarcity") if transformer else ("paper", "one-shot, no rotation")
        if method not in other:
            yield method
    if kinds != ("token",):
        other = ", width too" if transformer else ", BatchNorm anew"
        for reach in ("", other) if kinds is None else ("",):
            for criterion in CRITERIA:
                yield from (
                    f"{criterion}, per layer{reach}",
                    *([f"{criterion}, global{reach}"] * (criterion != "random")),
                )


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--cifar10", type=Path, required=True)
    arguments.add_argument("--imagenette", type=Path, required=True)
    arguments.add_argument("--vit", type=Path, required=True)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--note", default="CIFAR-10 as JPEG of quality 95, EuroSAT and Imagenette as subsets")
    arguments.add_argument("--only", nargs="+")
    arguments.add_argument("--methods", nargs="+")
    arguments.add_argument("--parts", nargs="+", help="all, mlp, attention, tokens")
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--images", type=int, default=512, help="for calibration")
    arguments.add_argument("--hessian-batches", type=int, default=4, help="of the calibration images")
    arguments.add_argument("--test-images", type=int, default=10000)
    arguments.add_argument("--search-steps", type=int, default=240)
    arguments.add_argument("--cnn-epochs", type=float, default=15.0)
    arguments.add_argument("--dense", type=int, default=0, help="which dense CNNs; each number has its own --work")
    arguments.add_argument("--no-retraining", action="store_true")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "accuracy.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rows, dense = known.get("rows", {}), known.get("dense", {})
    for name, case in cases(settings).items():
        if settings.only and name not in settings.only:
            continue
        subject = Subject(name, case, settings)
        top1 = {**dense.get(name, {}).get("top1", {}), str(settings.dense): subject.top1}
        dense[name] = {"top1": top1, "macs": subject.macs, "images": subject.tested}
        for seed, (part, kinds) in ((seed, item) for seed in range(settings.seeds) for item in subject.kinds.items()):
            for method in methods(kinds, "vit" in name):
                if method not in (settings.methods or [method]) or part not in (settings.parts or [part]):
                    continue
                for budget in MACS if kinds is None else KEEP:
                    run = f"{seed}" if settings.dense == 0 else f"{seed} of dense {settings.dense}"
                    fill(rows, subject, f"{name}/{part}/{method}/{budget}/{run}", method, kinds, budget, seed)
                    write(settings, rows, dense)


def fill(
    rows: dict[str, Any],
    subject: Subject,
    key: str,
    method: str,
    kinds: tuple[str, ...] | None,
    budget: float,
    seed: int,
) -> None:
    """Make one row, or what is missing of it."""
    row = rows.setdefault(key, {})
    again = subject.epochs if kinds is None and budget in RETRAINED and method in RETRAINED_METHODS else ()
    if "error" in row or ("top1" in row and all(str(epochs) in row["retrained"] for epochs in again)):
        return
    try:
        small, seconds = subject.cut(method, kinds, budget, seed)
    except (slimming.errors.SlimmingError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return
    row |= {"macs": count(small, subject.shape).macs / subject.macs, "top1": subject.judge(small), "seconds": seconds}
    row.setdefault("retrained", {})
    print(key, row, file=sys.stderr, flush=True)
    for epochs in again:
        if str(epochs) not in row["retrained"]:
            model = copy.deepcopy(small)
            config = slimming.TrainConfig(
                epochs=epochs, batch_size=128, warmup_epochs=0.1 * epochs, eval_every=0, seed=seed, **subject.retrain
            )  # fmt: skip
            slimming.train(model, subject.data, config, teacher=subject.dense)
            row["retrained"][str(epochs)] = subject.judge(model.eval())


def write(settings: Any, rows: dict[str, Any], dense: dict[str, Any]) -> None:
    """Write the rows and the tables."""
    text = ""
    for name, own in dense.items():
        parts = dict.fromkeys(key.split("/")[1] for key in rows if key.startswith(f"{name}/"))
        for part in parts:
            found: dict[str, dict[str, list[Any]]] = {}
            for key, row in rows.items():
                model, kinds, method, budget, _ = key.split("/")
                if (model, kinds) == (name, part):
                    found.setdefault(method, {}).setdefault(budget, []).append(row)
            budgets = [str(budget) for budget in (MACS if part == "all" else KEEP)]
            lines = [
                [method, *(cell(of.get(b, []), float(b) if part == "all" else None) for b in budgets)]
                for method, of in found.items()
            ]
            what = "of the MACs" if part == "all" else f"of the {part} units"
            start = ", ".join(f"{top1:.1%}" for top1 in own["top1"].values())
            text += f"{name}, {what}: top-1 straight after the cut (dense {start})\n\n"
            text += table(["method", *(f"{float(budget):.0%}" for budget in budgets)], lines) + "\n"
            text += retrained(name, found)
    tested = ", ".join(f"{name} {own['images']:,}" for name, own in dense.items())
    note = f"{settings.note}. Means over seeds, with ranges. Test images: {tested}; a difference below "
    note += f"{margin(dense):.0%} says little."
    store("accuracy", settings, f"{note}\n\n{text}", rows=rows, dense=dense)


def margin(dense: dict[str, Any]) -> float:
    """Two standard errors of the accuracy on the fewest images."""
    return max(2 * (p * (1 - p) / own["images"]) ** 0.5 for own in dense.values() for p in own["top1"].values())


def retrained(name: str, found: dict[str, dict[str, list[Any]]]) -> str:
    """The table of cuts that were retrained; nothing where none was."""
    some = [row["retrained"] for of in found.values() for rows in of.values() for row in rows if row.get("retrained")]
    epochs = sorted({key for each in some for key in each}, key=float)
    lines = [
        [
            method,
            f"{float(budget):.0%}",
            *(spread([row.get("retrained", {}).get(e) for row in of[budget]]) for e in epochs),
        ]
        for budget in map(str, RETRAINED)
        for method, of in found.items()
        if any(row.get("retrained") for row in of.get(budget, []))
    ]
    header = ["method", "MACs", *(f"{float(e):g} epochs" for e in epochs)]
    return f"{name}, after retraining\n\n" + table(header, lines) + "\n" if lines else ""


def cell(rows: list[dict[str, Any]], budget: float | None) -> str:
    """Top-1, and the share of the MACs where it is off ``budget`` by more than 1 %; "fails" where no cut came out."""
    if rows and all("error" in row for row in rows):
        return "fails"
    macs = [row["macs"] for row in rows if "macs" in row]
    off = budget is not None and bool(macs) and abs(statistics.mean(macs) / budget - 1) > 0.01
    return spread([row.get("top1") for row in rows]) + (f" at {statistics.mean(macs):.1%}" if off else "")


def spread(values: list[float | None]) -> str:
    """Mean and range of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    around = f" ({min(there):.1%}–{max(there):.1%})" if len(there) > 1 else ""
    return f"{statistics.mean(there):.1%}{around}"


if __name__ == "__main__":
    main()
