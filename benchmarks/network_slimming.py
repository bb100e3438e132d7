"""Network Slimming's table at small scale: VGG, pre-activation ResNet and DenseNet on CIFAR-10 (ICCV 2017, table 1).

    python benchmarks/network_slimming.py --data DIR --work DIR [--only vgg]

DIR of the data holds CIFAR-10 as train.parquet and test.parquet (name any re-encoding with --note). The networks
are those of the paper, shallower and narrower, trained from scratch: once plainly (the error before) and once with
the L1 penalty on the scales of their BatchNorms (preset `network-slimming`), which is the search. Each share of the
channels is cut from that one search, by |γ| as in the paper and by our default score, and fine-tuned on labels. The
VGG goes on for more passes. Subgradients shrink a scale step by step, and there are 53 times fewer steps here than in
the paper, so the penalty's weight is the paper's times --penalty-scale.

--work keeps the states of the trainings, so that a call that was stopped goes on; finished rows are kept too.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from common import parser, store, table
from slimming.training.batches import validation_batches
from slimming.training.samples import Data

CUTS = {"vgg": (0.5, 0.7), "resnet": (0.4, 0.6), "densenet": (0.4, 0.7)}
"""Shares of the channels that go, as in table 1 of the paper."""
PENALTY = {"vgg": 1e-4, "resnet": 1e-5, "densenet": 1e-5}


class Net(nn.Sequential):
    """Feature layers, then average pooling and a linear classifier, for images (B, 3, 32, 32)."""

    img_size = 32

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)  # section 4.3


def _conv(inside: int, outside: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)


class Bottleneck(nn.Module):
    """A pre-activation bottleneck block."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        inner = outside // 4
        layers = []
        for a, b, size, step in ((inside, inner, 1, 1), (inner, inner, 3, stride), (inner, outside, 1, 1)):
            layers += [nn.BatchNorm2d(a), nn.ReLU(), _conv(a, b, size, step)]
        self.body = nn.Sequential(*layers)
        self.skip = _conv(inside, outside, 1, stride) if inside != outside or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add the body to the skip."""
        return self.skip(x) + self.body(x)


class Growing(nn.Module):
    """A layer of a dense block: its channels are put behind those that come in."""

    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(inside), nn.ReLU(), _conv(inside, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Join new channels to the old."""
        return torch.cat([x, self.body(x)], 1)


def vgg(widths: tuple[int, ...] = (16, 0, 32, 0, 64, 64, 0, 128, 128, 0, 128, 128)) -> Net:
    """VGG with BatchNorm and one linear layer, VGG-A with a quarter of its width if no widths are given; 0 pools."""
    layers: list[nn.Module] = []
    inside = 3
    for width in widths:
        if width:
            layers += [_conv(inside, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
            inside = width
        else:
            layers.append(nn.MaxPool2d(2))
    return Net(layers, inside)


def resnet() -> Net:
    """A pre-activation ResNet of 20 layers in bottlenecks."""
    layers: list[nn.Module] = [_conv(3, 16, 3)]
    inside = 16
    for outside, first in ((32, 1), (64, 2), (128, 2)):
        for block in range(2):
            layers.append(Bottleneck(inside, outside, first if block == 0 else 1))
            inside = outside
    return Net([*layers, nn.BatchNorm2d(inside), nn.ReLU()], inside)


def densenet() -> Net:
    """A DenseNet of 13 layers, growth 8, transitions that keep the width."""
    layers: list[nn.Module] = [_conv(3, 16, 3)]
    inside = 16
    for stage in range(3):
        for _ in range(3):
            layers.append(Growing(inside, 8))
            inside += 8
        if stage < 2:
            layers += [nn.BatchNorm2d(inside), nn.ReLU(), _conv(inside, inside, 1), nn.AvgPool2d(2)]
    return Net([*layers, nn.BatchNorm2d(inside), nn.ReLU()], inside)


MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
NETS = {"vgg": vgg, "resnet": resnet, "densenet": densenet}


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--work", type=Path, required=True, help="directory for the states of the trainings")
    arguments.add_argument("--note", default="CIFAR-10, re-encoded JPEG q95")
    arguments.add_argument("--only", choices=sorted(NETS), help="one network")
    arguments.add_argument("--epochs", type=float, default=3.0, help="of the plain training and of the search")
    arguments.add_argument("--tune-epochs", type=float, default=1.0, help="of each fine-tuning")
    arguments.add_argument("--penalty-scale", type=float, default=10.0)
    arguments.add_argument("--passes", type=int, default=3, help="of the VGG")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "network_slimming.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}

    images = slimming.DataConfig(source=str(settings.data), augment="none", mean=MEAN, std=STD)
    read = slimming.open_data(images, vgg())
    data = Data(Crops(read.train, settings.seed), list(whole(read.val, 500)), read.classes)
    for name in [settings.only] if settings.only else NETS:
        job = Job(name, data, settings, rows)
        job.plain()
        for share in CUTS[name]:
            job.cut(share)
            job.cut(share, "taylor")
        if name == "vgg":
            job.passes()


class Crops:
    """Training images, decoded once: padded by 4, cropped and mirrored at random, as the paper does.

    One walk through it is an endless row of batches (64, 3, 32, 32); every walk is the same.
    """

    def __init__(self, images: Any, seed: int, batch: int = 64) -> None:
        parts = list(whole(images, 500))
        self.images = F.pad(torch.cat([part for part, _ in parts]), (4, 4, 4, 4))
        self.labels = torch.cat([labels for _, labels in parts])
        self.seed, self.batch = seed, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(self.seed)
        pixels = torch.arange(32)
        while True:
            for chosen in torch.randperm(len(self.images), generator=draw).split(self.batch):
                places = torch.randint(9, (2, len(chosen), 1), generator=draw)
                mirrored = torch.rand(len(chosen), 1, generator=draw) < 0.5
                rows = places[0] + pixels
                columns = places[1] + torch.where(mirrored, pixels.flip(0), pixels)
                crops = self.images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
                yield crops.permute(0, 3, 1, 2).contiguous(), self.labels[chosen]


def whole(images: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in batches."""
    for batch in validation_batches(images, size):
        yield batch.images, batch.labels


class Job:
    """The rows of one network. A row that is there already is not made again."""

    def __init__(self, name: str, data: Any, settings: Any, rows: dict[str, Any]) -> None:
        self.name, self.data, self.settings, self.rows = name, data, settings, rows
        torch.manual_seed(settings.seed)
        self.model = NETS[name]().to(memory_format=torch.channels_last)
        self.whole = slimming.cost(self.model)
        self.work = settings.work / name
        self.searched: nn.Module | None = None

    def plain(self) -> None:
        """The network without penalty and without cut."""
        if (key := f"{self.name}/plain") not in self.rows:
            model = copy.deepcopy(self.model)
            slimming.train(model, self.data, self.training(), directory=self.work / "plain", resume=True)
            self.note(key, model, error=self.error(model))

    def cut(self, share: float, score: str | None = None) -> None:
        """Cut ``share`` of the channels from the search, by |γ| or another score, and fine-tune."""
        if (key := f"{self.name}/{share}" + (f" {score}" if score else "")) not in self.rows:
            result = self.search()
            searched = self.error(result.model)
            small, error = self.tuned(result, share, f"cut-{share}-{score or 'scale'}", score)
            self.note(key, small, searched=searched, **error)

    def passes(self) -> None:
        """Search, cut half of the channels, fine-tune; again and again. The first pass is that of `cut`."""
        names = [f"{self.name}/pass {turn}" for turn in range(2, self.settings.passes + 1)]
        if all(name in self.rows for name in names):
            return
        small = self.tuned(self.search(), 0.5, "cut-0.5-scale")[0]
        for turn, name in enumerate(names, start=2):
            short = self.settings.tune_epochs
            result = slimming.search(
                small, self.data, self.config(short), directory=self.work / f"search-{turn}", resume=True
            )
            searched = self.error(result.model)
            small, error = self.tuned(result, 0.5, f"pass-{turn}")
            self.note(name, small, searched=searched, **error)

    def search(self) -> slimming.SearchResult:
        """Train from scratch with the penalty on all scales."""
        model = copy.deepcopy(self.model)
        config = self.config(self.settings.epochs)
        return slimming.search(model, self.data, config, directory=self.work / "search", resume=True)

    def tuned(
        self, result: slimming.SearchResult, share: float, place: str, score: str | None = None
    ) -> tuple[nn.Module, dict[str, float]]:
        """Cut and fine-tune; the model, and its errors on the way."""
        budget = slimming.Budget(keep={"channel": 1 - share})
        if score is None:
            plan = slimming.plan(result, budget)
        else:
            plan = slimming.plan(result.masks, budget, layout=result.config.layout, score=score)
        # Not channels_last: torch 2.15 crashes there on a CPU, in the gradient of 1 x 1 convolutions of stride 2
        # with 3 channels, which plain nn.Conv2d(3, 46, 1, 2) shows.
        small = slimming.cut(result.model, plan).to(memory_format=torch.contiguous_format)
        before = self.error(small)
        slimming.train(
            small,
            self.data,
            self.training(self.settings.tune_epochs, lr=0.02),
            directory=self.work / place,
            resume=True,
        )
        return small, {"cut": before, "error": self.error(small)}

    def config(self, epochs: float) -> slimming.SearchConfig:
        """The preset, with a penalty for fewer steps."""
        base = slimming.preset("network-slimming")
        weight = PENALTY[self.name] * self.settings.penalty_scale
        return dataclasses.replace(base, penalty={"channel": weight}, train=self.training(epochs))

    def training(self, epochs: float | None = None, lr: float = 0.1) -> slimming.TrainConfig:
        """The paper's training, shorter."""
        base = slimming.preset("network-slimming").train
        steps = self.steps(epochs or self.settings.epochs)
        return dataclasses.replace(base, steps=steps, lr=lr, eval_every=0, log_every=100, seed=self.settings.seed)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs."""
        return int(epochs * len(self.data.train.images)) // self.data.train.batch

    def error(self, model: nn.Module) -> float:
        """Share of the test images that are classified wrongly."""
        return 1 - slimming.evaluate(model, self.data.val, batch_size=500)["top1"]

    def note(self, key: str, model: nn.Module, **errors: float) -> None:
        """Keep a row, and write all."""
        cost = slimming.cost(model)
        self.rows[key] = {"params": cost.params, "macs": cost.macs, **errors}
        print(f"{key}: {self.rows[key]}", file=sys.stderr, flush=True)
        write(self.settings, self.rows)


def write(settings: Any, rows: dict[str, Any]) -> None:
    """Write the rows and the table."""
    lines = []
    for key, row in sorted(rows.items(), key=lambda item: list(NETS).index(item[0].split("/")[0])):
        name, what = key.split("/")
        plain = rows[f"{name}/plain"]
        cells = [f"{row[column]:.2%}" if column in row else "–" for column in ("searched", "cut", "error")]
        share, _, score = what.partition(" ")
        label = what if what[0] == "p" else f"{float(share):.0%} of the channels cut{score and ', by Taylor score'}"
        shares = [f"{1 - row[column] / plain[column]:.1%}" for column in ("params", "macs")]
        lines.append([name, label, *cells, *(["–", "–"] if what == "plain" else shares)])
    header = ["network", "row", "error searched", "error cut", "error fine-tuned", "params cut", "MACs cut"]
    dense = ", ".join(
        f"{key.split('/')[0]} {row['params']:,} params and {row['macs'] / 1e6:.1f} MMACs"
        for key, row in rows.items()
        if key.endswith("plain")
    )
    text = (
        f"{settings.note}. {settings.epochs:g} epochs of plain training and of search from "
        f"scratch, {settings.tune_epochs:g} of fine-tuning, batch 64; later passes search and fine-tune for "
        f"{settings.tune_epochs:g} each and cut half of the channels that are left. Penalty {settings.penalty_scale:g} "
        "times the paper's, for 53 times fewer steps. The error of the row “plain” is "
        f"the one before. Seed {settings.seed}, one run; 10,000 test images, so a difference below 0.9 points says "
        f"nothing. Dense: {dense}.\n\n"
    )
    store("network_slimming", settings, text + table(header, lines), rows=rows)


if __name__ == "__main__":
    main()
