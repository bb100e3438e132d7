"""How cut models are best retrained: each alone or several at once, from what, how fast, how long, averaged or not.

    python benchmarks/retraining.py --work DIR [--eurosat DIR] [--seeds 3] [--only NAME …]

The dense start is the demo's model; the images are the embedded subset of EuroSAT, or all of it where --eurosat holds
train.parquet and test.parquet. Per seed everything starts from one scoring in one shot, kept in --work. Ways to serve
several budgets get the same number of steps in all. Everything else is one cut to the smallest budget, with one thing
changed at a time. Finished rows are kept, so a call that was stopped goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimming
from accuracy import EMBEDDED, recipe, spread
from common import parser, store, table
from slimming.core.pruning_plan import Plan
from slimming.searching.mask_search import RECORD
from slimming.training.batches import calibration_images

SHARES = (0.3, 0.2, 0.1)
"""Of the MACs: budgets that are trained for. Those halfway between are cut from the shared weights without."""
WAYS = ("each on its own", "together", "progressive")
LAST = "blocks.5"
LEARN: dict[str, slimming.DistilConfig | None] = {
    "labels only": None,
    "logits": slimming.DistilConfig(),
    "logits, features": slimming.DistilConfig(features=(LAST,)),
    "logits, relations of QKV": slimming.DistilConfig(relations=(f"{LAST}.attn.qkv",)),
    "logits, relations of tokens": slimming.DistilConfig(relations=(LAST,)),
    "logits, features, relations of QKV": slimming.DistilConfig(features=(LAST,), relations=(f"{LAST}.attn.qkv",)),
}
RATES, LENGTHS = (1e-4, 5e-4, 2e-3), (0.5, 1.0, 4.0)
"""Learning rates, and lengths as multiples of the usual one."""
DECAYS = (0.9, 0.98, 0.995)
PARTS = ("ways", "learn", "rates", "averages")


class Bench:
    """The dense model, the images, and what one seed starts from."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.shares = sorted(settings.shares, reverse=True)
        self.between = [round((one + other) / 2, 4) for one, other in zip(self.shares, self.shares[1:], strict=False)]
        self.dense = recipe(EMBEDDED, "dense").eval()
        source = str(settings.eurosat or EMBEDDED / "eurosat")
        config = slimming.DataConfig(source=source, augment="overhead", val_limit=settings.val_limit)
        self.data = slimming.open_data(config, self.dense)
        self.still = slimming.open_data(dataclasses.replace(config, augment="none"), self.dense)

    def judge(self, model: nn.Module) -> float:
        """Top-1 on the validation images."""
        return slimming.evaluate(model, self.data.val, batch_size=250)["top1"]

    @cache  # noqa: B019
    def images(self, seed: int) -> list[torch.Tensor]:
        """What scores and cuts see."""
        return calibration_images(self.still, self.settings.images, seed=seed)

    @cache  # noqa: B019
    def start(self, seed: int) -> slimming.SearchResult:
        """The scores in one shot that everything of this seed starts from."""
        place = self.settings.work / f"scored-{seed}"
        if not (place / RECORD).exists():
            train = slimming.TrainConfig(steps=0, seed=seed)
            config = slimming.SearchConfig(train=train, images=self.settings.images)
            slimming.search(copy.deepcopy(self.dense), self.still, config).save(place)
        return slimming.load_search(place)

    @cache  # noqa: B019
    def plan(self, share: float, seed: int) -> Plan:
        """The plan of one budget; all of them come from one order."""
        return slimming.plan(self.start(seed), slimming.Budget(macs=share), solver="nested")

    def cut(self, share: float, seed: int) -> nn.Module:
        """The compensated cut."""
        return slimming.cut(self.start(seed).model, self.plan(share, seed), images=self.images(seed))

    def config(self, seed: int, length: float = 1.0, lr: float = 5e-4, **options: Any) -> slimming.TrainConfig:
        """A training of ``length`` times the usual steps."""
        steps = max(1, round(self.settings.steps * length))
        return slimming.TrainConfig(steps=steps, lr=lr, batch_size=64, eval_every=0, seed=seed, **options)

    def alone(self, seed: int, share: float, learn: str = "logits", **options: Any) -> dict[str, float]:
        """One cut, retrained on its own: top-1 of its weights, and of their average where there is one."""
        small, distil = self.cut(share, seed), LEARN[learn]
        teacher = self.dense if distil is not None else None
        history = slimming.train(small, self.data, self.config(seed, **options), teacher, distil=distil)
        row = {"top1": self.judge(small)}
        return row if history.averaged is None else row | {"averaged": self.judge(history.averaged)}

    def together(self, seed: int) -> dict[str, float]:
        """One training for all budgets: share -> top-1, also of budgets that it was not for."""
        plans, config = [self.plan(share, seed) for share in self.shares], self.config(seed, len(self.shares))
        shared = slimming.train_slimmable(self.start(seed), self.data, plans, config, self.dense)
        cuts = {share: slimming.cut(shared.model, self.plan(share, seed)) for share in (*self.shares, *self.between)}
        return {str(share): self.judge(small) for share, small in cuts.items()}

    def progressive(self, seed: int) -> dict[str, float]:
        """One budget after the other: share -> top-1."""
        plans, images = [self.plan(share, seed) for share in self.shares], self.images(seed)
        start = self.start(seed)
        found = slimming.train_progressive(start, self.data, plans, self.config(seed), self.dense, images=images)
        return {str(share): self.judge(small) for share, small in zip(self.shares, found, strict=True)}

    def jobs(self, seed: int, parts: Any) -> dict[str, Any]:
        """Every row of the parts that were asked for: its key -> what makes it. Parts share rows."""
        found: dict[str, Any] = {}
        smallest = self.shares[-1]
        if "ways" in parts:
            for share in (*self.shares, *self.between):
                found[f"cut/{share}"] = lambda share=share: {"top1": self.judge(self.cut(share, seed))}
                found[f"alone/{share}"] = lambda share=share: self.alone(seed, share)
            found["together"] = lambda: self.together(seed)
            found["progressive"] = lambda: self.progressive(seed)
        if "learn" in parts:
            for learn in LEARN:
                key = f"alone/{smallest}" if learn == "logits" else f"learn/{learn}"
                found[key] = lambda learn=learn: self.alone(seed, smallest, learn)
        if "rates" in parts:
            for lr, length in ((lr, length) for lr in RATES for length in LENGTHS):
                found[rate_key(smallest, lr, length)] = lambda lr=lr, length=length: self.alone(
                    seed, smallest, lr=lr, length=length
                )
        if "averages" in parts:
            for decay in DECAYS:
                found[f"average/{decay}"] = lambda decay=decay: self.alone(seed, smallest, ema=decay)
        return found


def rate_key(share: float, lr: float, length: float) -> str:
    """The row of a learning rate and a length; the usual ones are the row that other parts share."""
    return f"alone/{share}" if (lr, length) == (5e-4, 1.0) else f"rates/{lr:g}/{length:g}"


def main() -> None:
    """Fill the rows that are missing, then write the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--eurosat", type=Path, help="all of EuroSAT, in place of the embedded subset")
    arguments.add_argument("--work", type=Path, required=True, help="directory for the scores")
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="budgets of the MACs")
    arguments.add_argument("--images", type=int, default=512, help="for scores and compensation")
    arguments.add_argument("--steps", type=int, default=120, help="of 64 images, for each budget")
    arguments.add_argument("--val-limit", type=int, help="judge on the first images only")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "retraining.json"
    rows: dict[str, Any] = {}
    if file.exists():
        earlier = json.loads(file.read_text())
        rows, before = earlier["rows"], earlier["settings"]
        changed = [n for n in ("shares", "images", "steps", "val_limit") if before[n] != getattr(settings, n)]
        if changed or earlier["eurosat"] != (settings.eurosat is not None):
            raise SystemExit(f"{file} has rows of other settings ({', '.join(changed) or 'eurosat'}); move it away.")
    bench = Bench(settings)
    dense = bench.judge(bench.dense)
    for seed in range(settings.seeds):
        for name, make in bench.jobs(seed, settings.only).items():
            key = f"{seed}/{name}"
            if key not in rows:
                began = time.monotonic()
                rows[key] = {**make(), "seconds": time.monotonic() - began}
                print(key, rows[key], file=sys.stderr, flush=True)
                write(rows, settings, dense, bench)


def write(rows: dict[str, Any], settings: Any, dense: float, bench: Bench) -> None:
    """Write the rows and the tables."""

    def shown(name: str, value: str = "top1") -> str:
        found = [row[value] for key, row in rows.items() if key.partition("/")[2] == name and value in row]
        return spread(found) if found else ""

    every, smallest = (*bench.shares, *bench.between), bench.shares[-1]
    ways = [
        ["straight after the cut", *(shown(f"cut/{share}") for share in every)],
        [WAYS[0], *(shown(f"alone/{share}") for share in every)],
        *([way, *(shown(way, str(share)) for share in every)] for way in WAYS[1:]),
    ]
    learn = [[name, shown(f"alone/{smallest}" if name == "logits" else f"learn/{name}")] for name in LEARN]
    rates = [[f"{lr:g}", *(shown(rate_key(smallest, lr, length)) for length in LENGTHS)] for lr in RATES]
    averages = [[decay, shown(f"average/{decay}"), shown(f"average/{decay}", "averaged")] for decay in DECAYS]
    lengths = [f"{max(1, round(settings.steps * length))} steps" for length in LENGTHS]
    count = len(bench.data.val)  # type: ignore[arg-type]
    between = " and ".join(f"{100 * share:g}%" for share in bench.between)
    images = f"EuroSAT{'' if settings.eurosat else ', the embedded subset'}, {count:,} validation images"
    parts = [
        f"{images}, dense {dense:.1%}. Everything starts from one scoring in one shot; cuts are compensated with "
        f"{settings.images} images; {settings.steps} steps of 64 images for each budget unless a table says otherwise.",
        f"Several budgets of the MACs, {settings.steps * len(bench.shares)} steps in all. {between} "
        "are cut from the shared weights without having been trained for; alone they have steps of their own.\n\n"
        + table(["retrained", *(f"{100 * share:g}%" for share in every)], ways),
        f"At {100 * smallest:g}%, what it learns from:\n\n" + table(["loss", "top-1"], learn),
        f"At {100 * smallest:g}%, learning rate and length:\n\n" + table(["lr", *lengths], rates),
        f"At {100 * smallest:g}%, averaged weights:\n\n" + table(["decay", "last weights", "average"], averages),
    ]
    text = "\n\n".join(part.rstrip() for part in parts) + "\n"
    store("retraining", settings, text, rows=rows, dense=dense, eurosat=settings.eurosat is not None)


if __name__ == "__main__":
    main()
