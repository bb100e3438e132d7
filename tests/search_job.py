"""A tiny search as a program of its own, for tests that kill it or start it in several processes.

python tests/search_job.py DATA OUT [--resume]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import timm
import torch

import slimming
from slimming.training.distributed import distributed_state

STEPS = 12


def main(source: str, out: str, resume: bool) -> None:
    """Search, then leave scores and plans in ``OUT``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=2, dynamic_img_size=False)
    data = slimming.open_data(slimming.DataConfig(source=source, augment="light"), model)
    base = slimming.preset("default")
    train = dataclasses.replace(
        base.train, epochs=1, steps=STEPS, batch_size=8, lr=1e-3, eval_every=0, checkpoint_seconds=0
    )
    config = dataclasses.replace(base, train=train, mask_lr=10.0, sensitivity=128)
    result = slimming.search(model, data, config, directory=out, resume=resume)
    if distributed_state().is_main_process:
        # By scores alone: what cutting a kind does is near 0 in a model as small and as young as this one, and differs
        # in digits that no one promises.
        alone = dataclasses.replace(result, sensitivity=None)
        found = {
            "kept": {share: slimming.plan(alone, slimming.Budget(macs=share)).kept for share in (0.7, 0.4)},
            "sensitivity": result.sensitivity.curves if result.sensitivity else {},
        }
        Path(out, "plans.json").write_text(json.dumps(found))
        result.save(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--resume" in sys.argv)
