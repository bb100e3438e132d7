"""Search inside the Trainer of transformers, with a callback."""

from __future__ import annotations

from typing import Any, Protocol

from slimming.errors import ConfigError, MissingExtraError

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise MissingExtraError("This module needs an extra; run: pip install 'slimming[transformers]'.") from missing


class Masks(Protocol):
    """The method of the masks of `slimming.attach` that the callback calls."""

    def before_step(self) -> None:
        """Add the gradient of the penalty and accumulate the scores from the gradients."""


class SearchCallback(TrainerCallback):
    """Add the penalty of the masks and accumulate the scores in each step of a Trainer.

    Args:
        masks: the masks that `slimming.attach` returned for the model, called before the Trainer is created.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the precision.

        Raises:
            ConfigError: fp16 without gradient clipping, for which the Trainer does not unscale the gradients.
        """
        if args.fp16 and not args.max_grad_norm:
            raise ConfigError(
                "With fp16 and no gradient clipping, the Trainer does not unscale the gradients that the masks need; "
                "set max_grad_norm (1.0 by default; a large value clips nothing), or use bf16 instead of fp16."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the masks after the gradients are computed (and clipped), before the step of the optimizer."""
        self.masks.before_step()
