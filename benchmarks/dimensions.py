"""What more dimensions are worth: the demo's model searched over more and more kinds, cut to the same MACs.

    python benchmarks/dimensions.py --work DIR [--seeds 2]

Each set of kinds is searched once per seed from the same dense model, cut to the same shares of the MACs, and retrained
alike on the same images. --work keeps the runs with their reports; finished rows are kept, so a call that was stopped
goes on.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import slimming
from common import FIRST_ORDER, parser, store, table
from slimming import demo
from slimming.cli.configs import config_from_values

SETS = {
    "head dimensions, hidden units": ("head_dim", "mlp"),
    "and tokens": ("head_dim", "mlp", "token"),
    "and blocks": ("head_dim", "mlp", "token", "block"),
    "and width": ("head_dim", "mlp", "token", "width"),
    "all": ("head_dim", "mlp", "token", "block", "width"),
}
VARIANTS = {"": FIRST_ORDER, "by scores alone": FIRST_ORDER | {"sensitivity": 0}, "compensated scores": {}}
"""What weighs kinds against each other: a measurement, first-order scores as they are, or the default search's."""
NAMES = [*SETS, *(f"{name}, {variant}" for variant in list(VARIANTS)[1:] for name in ("and tokens", "all"))]
SHARES = (0.5, 0.3)


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--work", type=Path, required=True, help="directory for the runs")
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--search-steps", type=int, default=60)
    arguments.add_argument("--retrain-steps", type=int, default=60)
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    file = settings.output / "dimensions.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for seed in range(settings.seeds):
        for name in NAMES:
            if (key := f"{seed}/{name}") not in rows:
                rows[key] = one(name, seed, settings)
                write(rows, settings)


def one(name: str, seed: int, settings: Any) -> list[dict[str, Any]]:
    """One run; the numbers of its budgets."""
    known, _, variant = name.rpartition(", ") if name not in SETS else (name, "", "")
    kinds = SETS[known]
    base: slimming.RunConfig = config_from_values(slimming.RunConfig, demo.settings())
    search = dataclasses.replace(base.search.train, steps=settings.search_steps, seed=seed, eval_every=0)
    config = dataclasses.replace(
        base,
        name=name,
        search=dataclasses.replace(
            base.search,
            kinds=kinds,
            train=search,
            **VARIANTS[variant],
        ),
        budgets=tuple(slimming.Budget(macs=share) for share in SHARES),
        retrain=dataclasses.replace(base.retrain, steps=settings.retrain_steps, seed=seed, eval_every=0),
    )
    place = settings.work / f"{seed}-{name.replace(', ', '-').replace(' ', '-')}"
    found = slimming.run(config, place, log=lambda text: print(name, text, file=sys.stderr, flush=True))
    dense = found["dense"]
    return [
        {
            "macs": row["macs"] / dense["macs"],
            "params": row["params"] / dense["params"],
            "top1_cut": row["top1_cut"],
            "top1": row["top1"],
            "speedup": {size: entry["median"] for size, entry in row["speedup"].items()},
            "width": next(iter(row.get("widths", [])), None),
            "gone": sum(
                (layer.get("mlp", {}).get("kept") == 0) + (not any(head["v"] for head in layer.get("heads", [])))
                for layer in row["layers"]
            ),
        }
        for row in found["rows"]
    ]


def write(rows: dict[str, Any], settings: Any) -> None:
    """Write all rows so far, and the table of means over seeds."""
    lines = []
    for name in NAMES:
        own = [runs for key, runs in rows.items() if key.split("/")[1] == name]
        for place, share in enumerate(SHARES) if own else ():
            cells = [run[place] for run in own]

            def mean(key: str, cells: list[Any] = cells) -> str:
                values = [100 * cell[key] for cell in cells]
                spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
                return f"{statistics.mean(values):.1f}{spread}"

            speeds = [f"{statistics.mean(cell['speedup'][size] for cell in cells):.2f}" for size in cells[0]["speedup"]]
            width = "–" if cells[0]["width"] is None else "/".join(str(cell["width"]["kept"]) for cell in cells)
            gone = "/".join(str(cell["gone"]) for cell in cells)
            lines.append(
                [
                    name,
                    f"{share:.0%}",
                    mean("macs"),
                    mean("params"),
                    mean("top1_cut"),
                    mean("top1"),
                    *speeds,
                    width,
                    gone,
                ]
            )
    sizes = list(next(iter(rows.values()))[0]["speedup"])
    header = ["kinds", "budget", "MACs, %", "params, %", "top-1 cut", "top-1 retrained"]
    header += [f"speed-up, batch {size}" for size in sizes] + ["width", "branches gone"]
    text = (
        f"The demo's model and images (EuroSAT, embedded subset); {settings.search_steps} steps of search and "
        f"{settings.retrain_steps} of retraining for each. Means over {settings.seeds} seed(s), ranges in brackets; "
        "1,000 held-out images, so a difference below 2 points says little.\n\n"
    )
    store("dimensions", settings, text + table(header, lines), rows=rows)


if __name__ == "__main__":
    main()
