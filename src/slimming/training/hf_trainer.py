"""A search inside transformers' Trainer: a callback, and nothing else of the Trainer changes."""

from __future__ import annotations

from typing import Any, Protocol

from slimming.errors import ConfigError, MissingExtraError

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise MissingExtraError("This needs an extra: pip install 'slimming[transformers]'.") from missing


class Masks(Protocol):
    """What a search needs of `slimming.attach`'s masks."""

    def before_step(self) -> None:
        """Add the penalty's gradient, and note the gradients."""


class SearchCallback(TrainerCallback):
    """Adds the penalty of the masks to each step of a Trainer, and notes the gradients for the scores.

    Args:
        masks: what `slimming.attach` gave for the Trainer's model, before the Trainer was made.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the masks cannot work with.

        Raises:
            ConfigError: fp16 without clipping, where the Trainer never unscales the gradients.
        """
        if args.fp16 and not args.max_grad_norm:
            raise ConfigError(
                "With fp16 and without clipping the Trainer leaves gradients scaled, and the masks would learn from "
                "those: set max_grad_norm (its default is 1.0; a large one clips nothing), or bf16 in place of fp16."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the gradients of the loss are there (and clipped), before the optimiser's step."""
        self.masks.before_step()
