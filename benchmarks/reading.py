"""How long reading a traced model takes, and what the cache of readings saves in a session.

    python benchmarks/reading.py

A session is describe, score, plan, cut, cost and save of one model, in one process. Times are CPU seconds of this
process, so that other processes on the machine matter little. ``read`` is the first reading of the architecture,
``from the cache`` the second; the session is run with the cache, and with a cache that is emptied before each reading.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

import slimming
from common import machine, parser, store, table, versions
from slimming.core.budget import Budget
from slimming.models.families import family_of
from slimming.models.traced import Traced


def vit_small() -> nn.Module:
    """ViT-S of transformers, from its configuration."""
    config = transformers.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: timm.create_model(name)
        for name in ("resnet18", "resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224")
    },
    "transformers ViT-S": vit_small,
}


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def session(model: nn.Module) -> None:
    """From a dense model to a saved slim one."""
    slimming.describe(model)
    scores = slimming.score(model, [torch.randn(4, 3, 224, 224)])
    small = slimming.cut(model, slimming.plan(scores, Budget(macs=0.7)))
    slimming.cost(small)
    with tempfile.TemporaryDirectory() as directory:
        slimming.save(small, Path(directory) / "slim")


def measure(name: str) -> dict[str, Any]:
    """The row of one model."""
    model = MODELS[name]().eval()
    family = family_of(model)
    assert isinstance(family, Traced)
    original, reads = family.read, 0

    def counted(model: nn.Module) -> Any:
        nonlocal reads
        reads += 1
        return original(model)

    def without_cache(model: nn.Module) -> Any:
        family.readings.clear()
        return original(model)

    family.readings.clear()
    row: dict[str, Any] = {"model": name}
    row["read_s"], row["cached_s"] = (cpu_seconds(lambda: original(model)) for _ in range(2))
    try:
        vars(family)["read"] = counted
        family.readings.clear()
        row["session_s"] = cpu_seconds(lambda: session(model))
        row["reads"] = reads
        vars(family)["read"] = without_cache
        row["session_without_cache_s"] = cpu_seconds(lambda: session(model))
    finally:
        del vars(family)["read"]
    return row


def main() -> None:
    """Measure every model, and write the table."""
    arguments = parser(__doc__)
    arguments.set_defaults(threads=1)
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rows = []
    for name in MODELS:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    columns = ["model", "read", "from the cache", "readings in a session", "session", "session without the cache"]
    lines = [
        [row["model"], *(f"{row[key]:.2f} s" for key in ("read_s", "cached_s")), row["reads"]]
        + [f"{row[key]:.1f} s" for key in ("session_s", "session_without_cache_s")]
        for row in rows
    ]
    where, used = machine(settings.threads), versions()
    stack = ", ".join(f"{key} {value}" for key, value in used.items())
    place = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    text = f"{table(columns, lines)}\nCPU seconds of one run. {place}; {stack}; seed {settings.seed}.\n"
    store("reading", settings, text, rows=rows)


if __name__ == "__main__":
    main()
