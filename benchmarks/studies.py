"""What makes a search good: how units are ranked after it, and how it trains; each variant once, everything else alike.

    python benchmarks/studies.py --eurosat DIR --work DIR [--seeds 3] [--only NAME …]

DIR of --eurosat holds EuroSAT as train.parquet and test.parquet. The dense start is the demo's model, which has seen
none of these test images. Every search ends in one masked model; its units are ranked in several ways, each plan is cut
to the same shares of the MACs, and the smallest cut is retrained alike. Finished rows are kept, so a call that was
stopped goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimming
from accuracy import EMBEDDED, recipe, spread
from common import FIRST_ORDER, parser, store, table
from slimming.core.kinds import KINDS
from slimming.counting.model_cost import per_group
from slimming.masks.attachment import prunable, select_kinds
from slimming.masks.soft_masks import attached
from slimming.training.batches import calibration_images
from slimming.training.distillation import DistilTask

SHARES = (0.2, 0.1)
PLAIN, NOTHING = "plain training, no masks", "nothing: one shot"
SEARCHES: dict[str, dict[str, Any]] = {
    "default": {},
    NOTHING: {},
    PLAIN: {},
    "a tenth of the steps": {"steps": 0.1},
    "three times the steps": {"steps": 3.0},
    "no penalty": {"penalty": 0.0},
    "penalty times 10": {"penalty": 10.0},
    "penalty times 100": {"penalty": 100.0},
    "penalty in proportion to MACs": {"penalty": "macs"},
    "masks learn 10 times as fast": {"mask_lr": 10.0},
    "weights frozen, masks 10 times as fast": {"mask_lr": 10.0, "frozen": True},
    "distilled": {"distilled": True},
    "heads turned first": {"rotate": True},
    "QK and V coupled": {"coupled": True},
    "tokens multiply": {"tokens": "multiply"},
    "0/1 instead of folding": {"fold": False},
    "paper": {"preset": "paper"},
}
RANKINGS = ("taylor", "contribution", "mask", "fisher", "compensated", "heads turned, compensated")
"""The first three read the search; the others score the folded model anew, from images without labels."""
FULLY = ("default", "heads turned first")
"""Searches whose cuts are ranked in every way; the others by what they collected and by the last."""


class Bench:
    """The dense model, the images, and one search per variant and seed."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.dense = recipe(EMBEDDED, "dense").eval()
        config = slimming.DataConfig(source=str(settings.eurosat), augment="overhead")
        self.data = slimming.open_data(config, self.dense)
        self.still = slimming.open_data(dataclasses.replace(config, augment="none"), self.dense)
        self.shape = prunable(self.dense).anatomy.input_shape

    def judge(self, model: nn.Module) -> float:
        """Top-1 on the test images."""
        return slimming.evaluate(model, self.data.val, batch_size=300)["top1"]

    @cache  # noqa: B019
    def images(self, seed: int) -> list[torch.Tensor]:
        """What compensation and one-shot scores see."""
        return calibration_images(self.still, self.settings.images, seed=seed)

    def train(self, steps: int, seed: int, **options: Any) -> slimming.TrainConfig:
        """The training that all have in common."""
        return slimming.TrainConfig(
            steps=max(1, steps), batch_size=64, warmup_epochs=0.0, eval_every=0, seed=seed, **options
        )

    def search(self, name: str, seed: int) -> slimming.SearchResult:
        """One variant of the search."""
        asked = SEARCHES[name]
        model = copy.deepcopy(self.dense)
        paper = "preset" in asked
        base = slimming.preset("paper") if paper else dataclasses.replace(slimming.preset("default"), **FIRST_ORDER)
        steps = round(self.settings.search_steps * asked.get("steps", 1.0))
        config = dataclasses.replace(
            base,
            **{key: asked[key] for key in ("coupled", "tokens", "fold", "mask_lr", "rotate") if key in asked},
            penalty=self.penalty(asked["penalty"]) if "penalty" in asked else base.penalty,
            train=self.train(steps, seed, lr=1e-4, schedule="constant", label_smoothing=0.1),
        )
        if asked.get("frozen"):
            model.requires_grad_(False)
        teacher = DistilTask(copy.deepcopy(self.dense).eval()) if asked.get("distilled") else None
        loss = None if teacher is None else lambda model, batch: teacher.loss(model, *batch)
        place = self.settings.work / f"{name.replace(' ', '-').replace('/', '')}-{seed}"
        return slimming.search(model, self.data, config, directory=place, resume=True, loss=loss)

    def penalty(self, asked: float | str) -> dict[str, float]:
        """Weights per kind: the default's times a factor, or what a unit costs in MACs, with the same sum."""
        if isinstance(asked, float):
            return {name: kind.penalty * asked for name, kind in KINDS.items()}
        found = unit_macs(self.dense)
        total = sum(found.values())
        return {kind: sum(KINDS[k].penalty for k in found) * share / total for kind, share in found.items()}

    def fill(self, rows: dict[str, dict[str, Any]], name: str, seed: int) -> None:
        """Every ranking of one search that is missing: its name -> top-1 straight after each cut, and retrained."""
        searched = name not in (NOTHING, PLAIN)
        wanted = RANKINGS if name in FULLY else (("taylor",) * searched + RANKINGS[-1:])
        if all(how in rows for how in wanted):
            return
        model, result = copy.deepcopy(self.dense), None
        if name == PLAIN:
            config = self.train(self.settings.search_steps, seed, lr=1e-4, schedule="constant", label_smoothing=0.1)
            slimming.train(model, self.data, config)
        elif searched:
            result = self.search(name, seed)
            model = copy.deepcopy(result.model)
            masks = attached(model)
            assert masks is not None
            masks.fold_()
            masks.detach_()
        for how in wanted:
            if how not in rows:
                rows[how] = self.one(self.scored(how, model.requires_grad_(True), result, seed), seed)
                print(name, seed, how, rows[how], file=sys.stderr, flush=True)

    def scored(self, how: str, model: nn.Module, result: slimming.SearchResult | None, seed: int) -> Any:
        """The folded model or the search that it is of, with scores."""
        if how in ("fisher", "compensated", RANKINGS[-1]):
            name = how.rpartition(" ")[2]
            return slimming.score(model, self.images(seed), how=name, rotate=how == RANKINGS[-1], seed=seed)
        assert result is not None
        # The paper's search measures nothing else: its own score is the mask.
        if result.config.score == "mask" or how == "taylor":
            return result
        return dataclasses.replace(result, scores=result.masks.scores(how), sensitivity=None)

    def one(self, scored: Any, seed: int) -> dict[str, Any]:
        """Cut to each share; retrain the smallest."""
        row: dict[str, Any] = {"top1": {}}
        small = None
        for share in SHARES:
            plan = slimming.plan(scored, slimming.Budget(macs=share))
            small = slimming.cut(scored.model, plan, images=self.images(seed)).eval()
            row["top1"][str(share)] = self.judge(small)
        assert small is not None
        config = self.train(self.settings.retrain_steps, seed, lr=5e-4)
        slimming.train(small.requires_grad_(True), self.data, config, teacher=self.dense)
        return row | {"retrained": self.judge(small.eval())}


def unit_macs(model: nn.Module) -> dict[str, float]:
    """Kind -> MACs of its units, each as if it went alone."""
    anatomy = prunable(model).anatomy
    costs = per_group(anatomy, {group.name: group.size for group in anatomy.groups})
    found: dict[str, float] = {}
    for group in select_kinds(slimming.describe(model), None):
        found[group.kind] = found.get(group.kind, 0.0) + float(costs[group.name].macs)
    return found


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--eurosat", type=Path, required=True)
    arguments.add_argument("--work", type=Path, required=True, help="directory for the searches")
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--only", nargs="+")
    arguments.add_argument("--images", type=int, default=512, help="for compensation and one-shot scores")
    arguments.add_argument("--search-steps", type=int, default=120)
    arguments.add_argument("--retrain-steps", type=int, default=120)
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "studies.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    bench = Bench(settings)
    top1 = bench.judge(bench.dense)
    for seed in range(settings.seeds):
        for name in settings.only or SEARCHES:
            bench.fill(rows.setdefault(f"{seed}/{name}", {}), name, seed)
            write(rows, settings, top1)


def write(rows: dict[str, Any], settings: Any, dense: float) -> None:
    """Write the rows and the table."""
    lines = []
    for name in SEARCHES:
        own = [rows[key] for key in rows if key.partition("/")[2] == name]
        for how in RANKINGS:
            found = [row[how] for row in own if how in row]
            if found:
                straight = [spread([row["top1"][str(share)] for row in found]) for share in SHARES]
                shown = "mask" if "preset" in SEARCHES[name] and how == "taylor" else how
                lines.append([name, shown, *straight, spread([row["retrained"] for row in found])])
    header = ["search", "ranked by", *(f"cut to {share:.0%}" for share in SHARES), f"{SHARES[-1]:.0%}, retrained"]
    text = (
        f"EuroSAT, 3,900 test images, dense {dense:.1%}. {settings.search_steps} steps of 64 images to search, "
        f"{settings.retrain_steps} to retrain; all cuts are compensated with {settings.images} images.\n\n"
    )
    store("studies", settings, text + table(header, lines), rows=rows, dense=dense)


if __name__ == "__main__":
    main()
