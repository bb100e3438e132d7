"""Tasks: compute the loss of a model on a batch. The training loop depends only on the `Task` protocol.

Shape suffixes: B batch, C channels, H height, W width, K classes, N tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.modules import train_heads_apart_
from slimming.errors import ConfigError, DataError
from slimming.training.outputs import WAY_OUT, logits_by_head


class Task(Protocol):
    """A loss with its preparation, gradient hook and state."""

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Prepare for training ``model`` on ``device``. Called once, before the first step."""
        ...

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the scalar to minimise as ``"loss"``, with further scalars to log.

        Args:
            model: the model, possibly wrapped for distributed training or compiled; only call it.
            images: (B, C, H, W).
            labels: class numbers (B,), or soft targets (B, K).
        """
        ...

    def before_step(self) -> None:
        """Read the gradients before each optimizer step: accumulated, reduced over processes, not yet clipped."""
        ...

    def stop(self) -> None:
        """Undo `start`, such as by removing hooks. Called after the last step, and if training fails."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume, as tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that `state_dict` returned."""
        ...


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy of logits (B, K); label smoothing is not applied to soft targets (B, K)."""
    smoothing = label_smoothing if labels.ndim == 1 else 0.0
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def check_logits(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Check that logits (B, K) or (B, K, H, W) fit the labels, and K the classes, which are empty if they are unknown.

    Raises:
        ConfigError: there is not one prediction per label.
        DataError: K is not the number of the classes.
    """
    if logits.ndim != 2 and labels.shape not in (logits.shape, logits.shape[:1] + logits.shape[2:]):
        raise ConfigError(
            f"The model gives logits of shape {tuple(logits.shape)}, the labels have shape {tuple(labels.shape)}. "
            f"{WAY_OUT.format('one row of logits per image')}"
        )
    if classes and logits.shape[1] != len(classes):
        shown = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        raise DataError(
            f"The model knows {logits.shape[1]} classes, the data has {len(classes)} ({shown}); give the model a "
            f"classifier for {len(classes)} classes, such as with reset_classifier({len(classes)}) of timm."
        )


Loss = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
"""A custom loss function of the model and a batch: ``(images, labels)`` of slimming's own data, or the batch as a
loader gave it. It returns the scalar to minimise, or a mapping of scalars: ``"loss"`` is minimised, the others are
logged."""


def scalars(result: Any) -> dict[str, Tensor]:
    """Return the result of a custom loss function as a dict with the key ``"loss"``.

    Raises:
        ConfigError: it is not a scalar or a mapping of scalars with the key ``"loss"``.
    """
    losses = dict(result) if isinstance(result, Mapping) else {"loss": result}
    if "loss" not in losses or any(not isinstance(x, Tensor) or x.numel() != 1 for x in losses.values()):
        raise ConfigError(
            "The loss function must return a scalar tensor, or a mapping of scalar tensors with an entry 'loss'."
        )
    return {name: value.reshape(()) for name, value in losses.items()}


class LossTask:
    """A custom loss function as a task.

    Args:
        function: the loss function, see `Loss`.
    """

    def __init__(self, function: Loss) -> None:
        self.function = function

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Do nothing."""

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Task.loss`.

        Raises:
            ConfigError: the function does not return a scalar or a mapping of scalars with the key ``"loss"``.
        """
        return scalars(self.function(model, (images, labels)))

    def before_step(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""


class ClassificationTask:
    """Cross-entropy with label smoothing. In a model with a distillation token, both heads learn the labels.

    Args:
        label_smoothing: share of the target spread over all classes.
        classes: names of the classes of the data; empty if they are unknown.
    """

    def __init__(self, label_smoothing: float = 0.0, classes: Sequence[str] = ()) -> None:
        self.label_smoothing = label_smoothing
        self.classes = classes
        self.student: nn.Module | None = None

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Make a model with a distillation token return the logits of both heads in training."""
        self.student = model
        train_heads_apart_(model, True)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Task.loss`.

        Raises:
            ConfigError: the model does not return logits for the labels.
            DataError: the model has another number of classes than the data.
        """
        logits, second = logits_by_head(model(images))
        check_logits(logits, labels, self.classes)
        loss = classification_loss(logits, labels, self.label_smoothing)
        if second is not None:
            loss = (loss + classification_loss(second, labels, self.label_smoothing)) / 2
        return {"loss": loss}

    def before_step(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Restore the averaged output of both heads."""
        if self.student is not None:
            train_heads_apart_(self.student, False)
        self.student = None

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""


class PenaltyTask:
    """Add penalties to the loss of another task, and read the gradients before each step.

    Args:
        task: the task to extend.
        penalty: returns named scalars; each is added to the loss and logged.
        collect: called before each optimizer step, when the parameters hold the gradients of the whole batch.
        state: tensors that ``collect`` updates in place; they are saved and restored with the run.
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
        """Return the state of the inner task and the tensors of ``state``."""
        return {"task": self.task.state_dict(), "collected": dict(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned into the same tensors."""
        self.task.load_state_dict(state["task"])
        for name, tensor in self.state.items():
            tensor.copy_(state["collected"][name])
