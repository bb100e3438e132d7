"""Search inside Lightning's Trainer, with a callback."""

from __future__ import annotations

from typing import Any, Protocol

from slimming.errors import MissingExtraError

try:
    from lightning.pytorch import Callback
except ImportError as missing:
    raise MissingExtraError("This module needs an extra; run: pip install 'slimming[lightning]'.") from missing


class Masks(Protocol):
    """The method of the masks of `slimming.attach` that the callback calls."""

    def before_step(self) -> None:
        """Add the gradient of the penalty and accumulate the scores from the gradients."""


class SearchCallback(Callback):
    """Add the penalty of the masks and accumulate the scores in each step of a Trainer.

    Args:
        masks: the masks that `slimming.attach` returned for the model, called before ``configure_optimizers``.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Update the masks after the gradients are computed (and unscaled), before they are clipped."""
        self.masks.before_step()
