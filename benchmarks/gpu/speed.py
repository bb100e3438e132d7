"""On a GPU: speed and peak memory of slim models, and the throughput of the search.

    python benchmarks/gpu/speed.py                     DeiT-S and ViT-B in bfloat16, some calls of ten minutes
    python benchmarks/gpu/speed.py --device cpu --dtype float32 --models vit_tiny_patch16_224 --batches 1 --seconds 1

Every row is written as soon as it is measured, and rows that are there are kept: a call that was stopped goes on. The
models of a row are timed in turns with the dense one. ``converted`` is the speed-up over the ratio of MACs. A search
step is forward, cross-entropy, penalty, backward, the scores' statistics and AdamW under autocast; GPU-hours are for 50
epochs of ImageNet-1K's 1,281,167 images, which ViT-Slim reports as 43 for DeiT-S.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import slimming
from common import RESULTS, parser, store, table
from realised_speed import LAYOUTS, slim
from slimming.benchmarking.runtimes import prepare
from slimming.benchmarking.timing import paired_times, speedup, summary
from slimming.masks.attachment import prunable

AIM = 0.85
IMAGENET, EPOCHS = 1_281_167, 50
KINDS = {
    "plain": (),
    "attention + MLP": ("head_dim", "mlp"),
    "all kinds": ("head_dim", "mlp", "token", "block", "width"),
}


def main() -> None:
    """Fill the rows that are missing, then write the tables."""
    arguments = parser(__doc__)
    arguments.set_defaults(output=RESULTS / "gpu")
    arguments.add_argument("--models", nargs="+", default=["deit_small_patch16_224", "vit_base_patch16_224"])
    arguments.add_argument("--layouts", nargs="+", default=list(LAYOUTS)[:3], choices=list(LAYOUTS))
    arguments.add_argument("--runtimes", nargs="+", default=["eager", "compile"])
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    arguments.add_argument("--search-batch", type=int, default=128)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--seconds", type=float, default=3.0, help="about how long each model is timed")
    settings = arguments.parse_args()
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. Give --device cpu --dtype float32 to try the script.")
    torch.manual_seed(settings.seed)
    file = settings.output / "speed.json"
    rows: dict[str, Any] = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else {}
    for name in settings.models:
        for row, make in jobs(name, settings):
            if row not in rows:
                rows[row] = make()
                print(row, json.dumps(rows[row]), file=sys.stderr, flush=True)
                write(rows, settings)
    write(rows, settings)


def jobs(name: str, settings: argparse.Namespace) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every row of one model: its key, and what measures it."""
    found: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for runtime in settings.runtimes:
        for batch in settings.batches:
            for budget in settings.budgets:
                for layout in settings.layouts:
                    key = f"speed/{name}/{runtime}/{batch}/{budget}/{layout}"
                    found.append((key, lambda a=(runtime, batch, budget, layout): faster(name, *a, settings)))
    for kinds in KINDS:
        for runtime in settings.runtimes:
            key = f"search/{name}/{runtime}/{kinds}"
            found.append((key, lambda a=(runtime, kinds): step(name, *a, settings)))
    return found


def faster(
    name: str, runtime: str, batch: int, budget: float, layout: str, settings: argparse.Namespace
) -> dict[str, Any]:
    """Dense against slim: time in turns, and the peak of the memory of each."""
    dense = timm.create_model(name).eval()
    small = slim(dense, budget, layout, settings.seed)
    ratio = slimming.cost(dense).macs / small.macs
    shape, dtype = prunable(dense).anatomy.input_shape, getattr(torch, settings.dtype)
    models = {"dense": dense.to(settings.device, dtype), "slim": small.model.to(settings.device, dtype)}
    like = next(dense.parameters())
    x = torch.randn(batch, *shape, device=settings.device, dtype=dtype)
    peaks = {which: peak(model, x) for which, model in models.items()}
    ready = {which: prepare(model, x, runtime) for which, model in models.items()}
    times = paired_times(ready, shape, batch, runs=200, seconds=settings.seconds, like=like)
    gained = speedup(times["dense"], times["slim"])
    return {
        "dense_ms": summary(times["dense"]).to_dict(),
        "slim_ms": summary(times["slim"]).to_dict(),
        "macs_ratio": ratio,
        "speedup": gained,
        "converted": gained["median"] / ratio,
        "peak_bytes": peaks,
    }


@torch.inference_mode()
def peak(model: nn.Module, x: Tensor) -> int | None:
    """Bytes that one eager pass allocates at most, weights of this model included; None on a CPU."""
    if not x.is_cuda:
        return None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x)
    return torch.cuda.max_memory_allocated() - before + weights


def step(name: str, runtime: str, kinds: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Images per second of training steps, and their peak memory."""
    model: Any = timm.create_model(name).to(settings.device).train()
    groups = [group for group in slimming.describe(model) if group.kind in KINDS[kinds]]
    masks = slimming.attach(model, groups) if groups else None
    fast: Any = torch.compile(model) if runtime == "compile" else model
    images = torch.randn(settings.search_batch, 3, *model.patch_embed.img_size, device=settings.device)
    labels = torch.randint(model.num_classes, (settings.search_batch,), device=settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    cuda = images.is_cuda

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(fast(images).float(), labels)
        (loss if masks is None else loss + masks.penalty()).backward()
        if masks is not None:
            masks.collect()
        optimizer.step()

    for _ in range(3):
        once()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < settings.seconds or steps < 3:
        once()
        steps += 1
        if cuda:
            torch.cuda.synchronize()
    rate = steps * settings.search_batch / (time.perf_counter() - began)
    hours = EPOCHS * IMAGENET / rate / 3600
    return {"images_per_s": rate, "gpu_hours": hours, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}


def write(rows: dict[str, Any], settings: argparse.Namespace) -> None:
    """Write the rows so far, and the tables."""
    speeds, searches = [], []
    for key, row in rows.items():
        what, *rest = key.split("/")
        if what == "speed":
            spread, peaks = row["speedup"], row["peak_bytes"]
            speeds.append(
                [
                    *rest,
                    f"{row['dense_ms']['median']:.2f}",
                    f"{row['slim_ms']['median']:.2f}",
                    f"{spread['median']:.2f} ({spread['p25']:.2f}–{spread['p75']:.2f})",
                    f"{row['converted']:.2f}",
                    "yes" if row["converted"] >= AIM else "no",
                    "–" if peaks["dense"] is None else f"{peaks['slim'] / peaks['dense']:.2f}",
                ]
            )
        else:
            plain = rows.get(key.rpartition("/")[0] + "/plain", row)
            over = plain["images_per_s"] / row["images_per_s"]
            memory = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / plain['peak_bytes']:.3f}"
            searches.append([*rest, f"{row['images_per_s']:.0f}", f"{over:.3f}", memory, f"{row['gpu_hours']:.1f}"])
    head = ["model", "runtime", "batch", "MACs asked", "layout", "dense, ms", "slim, ms", "speed-up", "converted"]
    first = table([*head, f"at least {AIM}", "peak memory over dense"], speeds)
    head = ["model", "runtime", "masks on", "images/s", "time over plain", "peak memory over plain"]
    second = table([*head, f"GPU-hours for {EPOCHS} epochs"], searches)
    store("speed", settings, f"{settings.dtype} on {settings.device}.\n\n{first}\nThe search, batch "
          f"{settings.search_batch}, under autocast to bfloat16:\n\n{second}", rows=rows)  # fmt: skip


if __name__ == "__main__":
    main()
