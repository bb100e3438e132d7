"""What the CPU kernel for learned key biases is worth: a search step with it and without, in pairs.

    python benchmarks/key_bias.py

Without it, attention with a bias that needs gradients falls back to the unfused kernel of PyTorch. Times are CPU
seconds of this process on one thread, in turns; memory is the peak of the tensors that a step makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import slimming
from common import machine, parser, ratios, store, table, versions
from slimming.counting.measured import peak_bytes
from slimming.masks import tokens

CASES = (("deit_tiny_patch16_224", 224, 8), ("deit_small_patch16_224", 224, 8), ("deit_small_patch16_224", 384, 4))


def unfused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *rest: Any, **options: Any) -> Tensor:
    """PyTorch's own attention."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **options)


def step_of(name: str, pixels: int, batch_size: int) -> Callable[[], None]:
    """A function that makes one search step."""
    model = timm.create_model(name, img_size=pixels).train()
    masks = slimming.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    images, labels = torch.randn(batch_size, 3, pixels, pixels), torch.randint(0, 1000, (batch_size,))

    def step() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + masks.penalty()).backward()
        masks.collect()
        optimizer.step()

    return step


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(name: str, pixels: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """The row of one case."""
    step, fused = step_of(name, pixels, batch_size), tokens.biased_attention
    kernels: dict[str, Any] = {"with": fused, "without": unfused}
    times: dict[str, list[float]] = {"with": [], "without": []}
    memory = {}
    try:
        for label, kernel in kernels.items():
            tokens.biased_attention = kernel
            step()
            memory[label] = peak_bytes(step)
        for number in range(rounds):
            for label in ("with", "without") if number % 2 else ("without", "with"):
                tokens.biased_attention = kernels[label]
                times[label].append(cpu_seconds(step))
    finally:
        tokens.biased_attention = fused
    return {"model": name, "pixels": pixels, "batch_size": batch_size, "seconds": times, "peak_bytes": memory}


def main() -> None:
    """Measure every case, and write the table."""
    arguments = parser(__doc__, rounds=12)
    arguments.set_defaults(threads=1)
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rows = [measure(*case, settings.rounds) for case in CASES]
    lines = []
    for row in rows:
        spread = ratios(row["seconds"]["without"], row["seconds"]["with"])
        growth = row["peak_bytes"]["without"] / row["peak_bytes"]["with"]
        lines.append([row["model"], row["pixels"], row["batch_size"], spread.text(2), f"{growth:.2f}"])
    header = ["model", "pixels", "batch", "time without / with (median, quartiles)", "peak memory without / with"]
    where, used = machine(settings.threads), versions()
    stack = ", ".join(f"{key} {value}" for key, value in used.items())
    text = f"{table(header, lines)}\n{where['cpu']}, {where['threads']} thread; {stack}; seed {settings.seed}.\n"
    store("key_bias", settings, text, rows=rows)
    print(text)


if __name__ == "__main__":
    main()
