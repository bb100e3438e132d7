"""What is trained for: a task turns a model and a batch into a loss; the loop knows nothing else about it.

Shape suffixes: B batch, C channels, H height, W width, K classes, N tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.modules import train_heads_apart_
from slimming.errors import ConfigError


class Task(Protocol):
    """A loss, and what belongs to it."""

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Prepare for training ``model`` on ``device``; called once before the first step."""
        ...

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the scalar to minimise as ``"loss"``, with other scalars to be logged beside it.

        Args:
            model: the model as prepared for this process; call it, do not look into it.
            images: (B, C, H, W).
            labels: class numbers (B,), or soft targets (B, K).
        """
        ...

    def before_step(self) -> None:
        """Look at the gradients of a whole batch: summed over parts and processes, not yet clipped."""
        ...

    def stop(self) -> None:
        """Leave the model as it was, hooks removed; called after the last step, also when training failed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, as plain tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        ...


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy of logits (B, K); soft targets (B, K) are not smoothed again."""
    smoothing = label_smoothing if labels.ndim == 1 else 0.0
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def logits_by_head(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return (class logits, distillation logits or None) of a model's output.

    Args:
        output: logits (B, K); two of them, as timm's distilled models give in training; or an object that holds
            ``logits``, as in transformers and torchvision.

    Raises:
        ConfigError: there are no logits in it.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits, None
    if isinstance(logits, tuple) and len(logits) == 2:
        return logits
    raise ConfigError(
        f"The model gives {type(output).__name__}, not the logits of classes. Wrap it in a module that gives them, or "
        "give a loss of your own."
    )


Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], "Tensor | Mapping[str, Tensor]"]
"""A loss of the user's own: called with the model and a batch ``(images, labels)``, it gives the scalar to minimise, or
several scalars by name: ``"loss"`` is minimised, the others are logged beside it."""


class LossTask:
    """A loss of the user's own as a task.

    Args:
        function: see `Loss`.
    """

    def __init__(self, function: Loss) -> None:
        self.function = function

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Nothing to prepare."""

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Task.loss`.

        Raises:
            ConfigError: the function gives no scalar, or no scalar called ``"loss"``.
        """
        found = self.function(model, (images, labels))
        losses = {"loss": found} if isinstance(found, Tensor) else dict(found)
        if "loss" not in losses or any(not isinstance(one, Tensor) or one.numel() != 1 for one in losses.values()):
            raise ConfigError(
                "The loss function must return a scalar tensor, or a mapping of scalar tensors with an entry 'loss'."
            )
        return {name: one.reshape(()) for name, one in losses.items()}

    def before_step(self) -> None:
        """Nothing to collect."""

    def stop(self) -> None:
        """Nothing to undo."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class ClassificationTask:
    """Cross-entropy with label smoothing; with a distillation token both heads learn the labels."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self.student: nn.Module | None = None

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Let both heads of ``model`` speak for themselves."""
        self.student = model
        train_heads_apart_(model, True)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Task.loss`."""
        logits, second = logits_by_head(model(images))
        loss = classification_loss(logits, labels, self.label_smoothing)
        if second is not None:
            loss = (loss + classification_loss(second, labels, self.label_smoothing)) / 2
        return {"loss": loss}

    def before_step(self) -> None:
        """Nothing to collect."""

    def stop(self) -> None:
        """Let them speak together again."""
        if self.student is not None:
            train_heads_apart_(self.student, False)
        self.student = None

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class PenaltyTask:
    """Another task with extra terms in its loss, and a look at the gradients before each step.

    Args:
        task: the task that is added to.
        penalty: gives named scalars; each is added to the loss and logged.
        collect: called with the gradients of a whole batch in place.
        state: what ``collect`` keeps, as tensors that it changes in place, so that it is saved and resumed.
    """

    def __init__(
        self,
        task: Task,
        penalty: Callable[[], dict[str, Tensor]],
        collect: Callable[[], None] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.task, self.penalty, self.collect = task, penalty, collect
        self.state = {} if state is None else state

    def start(self, model: nn.Module, device: torch.device) -> None:
        """See `Task.start`."""
        self.task.start(model, device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Task.loss`."""
        losses = self.task.loss(model, images, labels)
        terms = self.penalty()
        total = losses["loss"]
        for term in terms.values():
            total = total + term.to(total.device)
        return {**losses, "task": losses["loss"], **terms, "loss": total}

    def before_step(self) -> None:
        """See `Task.before_step`."""
        self.task.before_step()
        if self.collect is not None:
            self.collect()

    def stop(self) -> None:
        """See `Task.stop`."""
        self.task.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner task's state and the collected tensors."""
        return {"task": self.task.state_dict(), "collected": dict(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, into the same tensors."""
        self.task.load_state_dict(state["task"])
        for name, tensor in self.state.items():
            tensor.copy_(state["collected"][name])
