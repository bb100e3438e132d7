"""A search inside Lightning's Trainer: a callback, and nothing else of the Trainer changes."""

from __future__ import annotations

from typing import Any, Protocol

from slimming.errors import MissingExtraError

try:
    from lightning.pytorch import Callback
except ImportError as missing:
    raise MissingExtraError("This needs an extra: pip install 'slimming[lightning]'.") from missing


class Masks(Protocol):
    """What a search needs of `slimming.attach`'s masks."""

    def before_step(self) -> None:
        """Add the penalty's gradient, and note the gradients."""


class SearchCallback(Callback):
    """Adds the penalty of the masks to each step of a Trainer, and notes the gradients for the scores.

    Args:
        masks: what `slimming.attach` gave for the module's model, before ``configure_optimizers``.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """After the gradients of the loss are there (and unscaled), before they are clipped."""
        self.masks.before_step()
