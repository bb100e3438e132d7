"""The settings that the examples of detectors, segmenters and pairs of encoders share."""

from __future__ import annotations

import argparse
from pathlib import Path


def options(
    description: str | None, *, model: str, size: int, macs: float, output: str, scored: int = 128, batch: int = 8
) -> argparse.ArgumentParser:
    """A parser of them.

    Args:
        description: what the example does.
        model: what the first argument is.
        size: default side of the images in pixels.
        macs: default share of the multiply-adds to keep.
        output: default directory of the slim model.
        scored: default number of images on which units are scored.
        batch: default number of images in a training step.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=model)
    parser.add_argument("--data", type=Path, required=True, help="directory with train and val, as scenes.py writes it")
    parser.add_argument("--size", type=int, default=size, help="side of the images in pixels")
    parser.add_argument("--macs", type=float, default=macs, help="share of the multiply-adds to keep")
    parser.add_argument("--scored", type=int, default=scored, help="images on which units are scored")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser
