"""Search inside the Trainer of transformers, with a callback; and a Trainer that distils from the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimming.errors import ConfigError, MissingExtraError
from slimming.training.distillation import output_difference
from slimming.training.outputs import named_outputs

try:
    from transformers import Trainer, TrainerCallback
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


class DistillingTrainer(Trainer):
    """A Trainer whose loss is the model's own on the labels, plus the difference of its outputs from a teacher's.

    The teacher gets the same inputs without the labels. The difference is that of `output_difference`.

    Args:
        teacher: the model to match, usually the dense model; it is set to evaluation mode and not trained.
        weight: weight of the difference; the loss on the labels has weight 1.
        outputs: which outputs are compared: a function that gets what either model returns and gives tensors, nested in
            tuples, lists or dicts. None compares all that count, see `slimming.training.outputs.named_outputs`. If the
            model selects queries from the image, their order is not the teacher's; compare feature maps instead.
        **options: what `transformers.Trainer` takes.
    """

    def __init__(
        self, *, teacher: nn.Module, weight: float = 1.0, outputs: Callable[[Any], Any] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.weight, self.outputs = weight, outputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, with the outputs of the model on request."""
        loss, found = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.weight and model.training:
            images = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
            with torch.no_grad():
                wanted = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"})
            student, teacher = (named_outputs(self._chosen(each), images) for each in (found, wanted))
            loss = loss + self.weight * output_difference(student, teacher, self._classes)
        return (loss, found) if return_outputs else loss

    def _chosen(self, output: Any) -> Any:
        if self.outputs is not None:
            return self.outputs(output)
        return {name: value for name, value in output.items() if name not in ("loss", "loss_dict")}

    @property
    def _classes(self) -> int:
        return int(getattr(getattr(self.teacher, "config", None), "num_labels", 0))
