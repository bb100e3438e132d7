"""Which models can lose token positions, and why the others cannot: the rows of the sweep that have attention.

    python -m benchmarks.token_positions                             transformers, torchvision's and timm's encoders
    python -m benchmarks.token_positions --only transformers,beit    some hosts or model files of timm

Models are only read. Each row is read in a process of its own with a time limit.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from benchmarks.coverage import in_process, targets
from torch import nn

import slimming
from slimming.masks.attachment import prunable

FILES = (
    "transformers", "torchvision/vit_b_16", "torchvision/swin_t", "beit", "cait", "convit", "deit", "eva", "levit",
    "mobilevit", "mvitv2", "naflexvit", "pvt_v2", "swin_transformer", "swin_transformer_v2", "tiny_vit", "twins",
    "vision_transformer", "vision_transformer_relpos", "vision_transformer_sam", "volo", "xcit",
)  # fmt: skip
"""Hosts and model files of timm with attention."""


def main() -> None:
    """Print one line per model, and the share that offers tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="hosts, rows or model files of timm, with commas between")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of one model")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    only = tuple(settings.only.split(",")) if settings.only else FILES
    offered: list[bool] = []
    for key, _, make in targets(only, every=False):
        found = in_process(lambda make=make: tokens(make()), settings.seconds)
        offered.append(bool(found.get("tokens")))
        print(f"{key}: {found.get('tokens') or found.get('reason') or found.get('error')}", flush=True)
    print(f"{sum(offered)} of {len(offered)} offer tokens")


def tokens(model: nn.Module) -> dict[str, Any]:
    """The token groups of a model in words, and the reasons why there are none."""
    groups = [group for group in slimming.describe(model) if group.token is not None]
    if not groups:
        reasons = [line for line in prunable(model).anatomy.uncovered if "token positions" in line]
        return {"reason": "no: " + "; ".join(reasons)}
    blocks = f"{groups[0].size} positions in {len(groups)} blocks"
    return {"tokens": f"{blocks}, on request" if groups[0].on_request else blocks}


if __name__ == "__main__":
    main()
