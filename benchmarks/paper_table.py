"""The paper's single-kind and joint tables at small scale: presets `paper` and `default`.

    python benchmarks/paper_table.py --data DIR --dense DIR [--seeds 3]
    python benchmarks/paper_table.py --embedded --note "EuroSAT, embedded subset"

DIR of the data holds CIFAR-10 as train.parquet and test.parquet (name any re-encoding with --note); DIR of the
dense model is what `recipes/dense.py cifar10` leaves. --embedded takes the demo's model and images.

Each (seed, preset, kinds) is searched once, and every keep
ratio is cut from that search and retrained alike, distilled from the dense model. Cells that a previous call
finished are kept, so that the table can be made in pieces.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

import slimming
from common import FIRST_ORDER, parser, store, table
from slimming.core.budget import Budget

EMBEDDED = Path(slimming.__file__).parent / "demo" / "assets"
KINDS = {"attention": ("head_dim",), "MLP": ("mlp",), "attention + MLP": ("head_dim", "mlp")}
RATIOS = (0.8, 0.7, 0.6, 0.5)
PRESETS = ("paper", "default")


def main() -> None:
    """Fill the cells that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, default=EMBEDDED / "eurosat")
    arguments.add_argument("--dense", type=Path, default=EMBEDDED)
    arguments.add_argument("--embedded", action="store_true", help="the demo's model and images")
    arguments.add_argument("--note", default="CIFAR-10, re-encoded JPEG q95")
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--search-steps", type=int, default=240)
    arguments.add_argument("--retrain-steps", type=int, default=150)
    arguments.add_argument("--test-images", type=int, default=10000)
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / f"{name_of(settings)}.json"
    cells = json.loads(file.read_text())["cells"] if file.exists() else {}
    dense, top1, data = open_dense(settings)
    for seed in range(settings.seeds):
        for preset in PRESETS:
            for name, kinds in KINDS.items():
                keys = [f"{seed}/{preset}/{name}/{ratio}" for ratio in RATIOS]
                if all(key in cells for key in keys):
                    continue
                for ratio, cell in one_search(dense, data, settings, seed, preset, kinds):
                    cells[f"{seed}/{preset}/{name}/{ratio}"] = cell
                    write(settings, cells, top1, dense)


def name_of(settings: Any) -> str:
    """The name of the result files."""
    return "paper_table_embedded" if settings.embedded else "paper_table"


def open_dense(settings: Any) -> tuple[torch.nn.Module, float, Any]:
    """The dense model of the recipe, its top-1 on the images used here, and the data."""
    stem = "dense" if settings.embedded else "model"
    made = json.loads((settings.dense / f"{stem}.json").read_text())
    options = dict(made["model"])
    dense = timm.create_model(options.pop("name"), **options)
    dense.load_state_dict(load_file(settings.dense / f"{stem}.safetensors"))
    config = slimming.DataConfig(source=str(settings.data), augment="light", val_limit=settings.test_images)
    data = slimming.open_data(config, dense)
    return dense.eval(), slimming.evaluate(dense, data.val, batch_size=500)["top1"], data


def one_search(dense: Any, data: Any, settings: Any, seed: int, preset: str, kinds: tuple[str, ...]) -> Any:
    """Search once, then give (keep ratio, cell) for each ratio."""
    base = slimming.preset(preset)
    if preset == "default":
        base = dataclasses.replace(base, **FIRST_ORDER)
    # The same length, batch and learning rate for both presets, and no mixing: the dense recipe has none.
    scale = {"batch_size": settings.batch, "steps": settings.search_steps, "lr": 5e-4, "seed": seed}
    train = dataclasses.replace(base.train, **scale, mixup=0.0, cutmix=0.0, eval_every=0)
    config = dataclasses.replace(base, kinds=kinds, train=train)
    model = copy.deepcopy(dense)
    result = slimming.search(model, data, config)
    retrain = slimming.TrainConfig(
        steps=settings.retrain_steps, batch_size=settings.batch, lr=5e-4, warmup_epochs=0.0, eval_every=0, seed=seed
    )
    judge = partial(slimming.evaluate, images=data.val, batch_size=500)
    whole = slimming.cost(dense)
    for ratio in RATIOS:
        plan = slimming.plan(result, Budget(keep=dict.fromkeys(kinds, ratio)))
        small = slimming.cut(result.model, plan)
        cost = slimming.cost(small)
        before = judge(small)["top1"]
        slimming.train(small, data, retrain, teacher=dense)
        cell = {
            "params": cost.params / whole.params,
            "macs": cost.macs / whole.macs,
            "top1_cut": before,
            "top1": judge(small)["top1"],
        }
        print(f"{seed} {preset} {kinds} {ratio}: {cell}", file=sys.stderr, flush=True)
        yield ratio, cell


def write(settings: Any, cells: dict[str, Any], top1: float, dense: torch.nn.Module) -> None:
    """Write all cells so far, and the table of means over seeds."""
    cost = slimming.cost(dense)
    rows = []
    for name in KINDS:
        for ratio in RATIOS:
            row: list[str] = [name, f"{ratio:.0%}"]
            for preset in PRESETS:
                found = [cells[k] for k in cells if k.split("/")[1:] == [preset, name, str(ratio)]]
                row += [_share(found, "macs"), _percent(found, "top1_cut"), _percent(found, "top1")]
            rows.append(row)
    header = ["kinds", "kept"]
    for preset in PRESETS:
        header += [f"{preset}: MACs", "top-1 cut", "top-1 retrained"]
    dense_row = {"params": cost.params, "macs": cost.macs, "top1": top1}
    text = (
        f"Dense: top-1 {top1:.2%}, {cost.params:,} params, {cost.macs / 1e6:.1f} MMACs. "
        f"{settings.note}; {settings.search_steps} search and {settings.retrain_steps} retraining steps of "
        f"{settings.batch} images, learning rate 5e-4, distilled from the dense model. Mean over seeds, with the "
        "range in brackets where there are several; MACs as a share of dense.\n\n"
    )
    store(name_of(settings), settings, text + table(header, rows), dense=dense_row, cells=cells)


def _share(found: list[dict[str, float]], key: str) -> str:
    return f"{statistics.mean(cell[key] for cell in found):.3f}" if found else "–"


def _percent(found: list[dict[str, float]], key: str) -> str:
    if not found:
        return "–"
    values = [100 * cell[key] for cell in found]
    spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
