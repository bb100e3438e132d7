"""Distillation losses: logits, features and relations of a teacher, and matching of its embeddings.

Shape suffixes: B batch, C channels, H height, W width, N tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimming.core.modules import in_evaluation, train_heads_apart_
from slimming.errors import ConfigError, nearest
from slimming.training.config import check_distillation
from slimming.training.outputs import BINARY, CLASSES, class_dim, kind_of, logits_by_head, named_outputs
from slimming.training.tasks import check_logits, classification_loss


def relation_error(student_BND: Tensor, teacher_BND: Tensor, heads: int) -> Tensor:
    """Return the divergence between the token relations of two outputs (MiniLMv2, Wang et al. 2021, section 3.1).

    D is split into ``heads`` relation heads of consecutive features. The relations (B, heads, N, N) are the softmax of
    the scaled dot products between tokens in each head. The error is the mean of KL(teacher || student) over images,
    heads and tokens.

    Args:
        student_BND: output of the student.
        teacher_BND: output of the teacher for the same tokens; its D may differ.
        heads: number of relation heads. For a joint projection of queries, keys and values, a multiple of 3 that
            divides D compares the three separately.

    >>> x = torch.randn(2, 5, 24)
    >>> relation_error(x, x, 3).item()
    0.0
    """
    with torch.autocast(student_BND.device.type, enabled=False):  # dot products may overflow in half precision
        student, teacher = _relations(student_BND.float(), heads), _relations(teacher_BND.float(), heads)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def _relations(output_BND: Tensor, heads: int) -> Tensor:
    """Return the logarithm of the relations, (B, heads, N, N)."""
    products = [part @ part.mT / part.shape[-1] ** 0.5 for part in output_BND.tensor_split(heads, dim=-1)]
    return torch.stack(products, 1).log_softmax(-1)


def check_modules(model: nn.Module, who: str, names: Iterable[str]) -> None:
    """Check that ``model`` has modules of these names; ``who`` is its name in messages, such as "teacher".

    Raises:
        ConfigError: a module is missing.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ConfigError(f"The {who} has no module {name!r} to distil.{nearest(name, modules)}")


class DistilTask:
    """Distillation from the logits (Hinton et al. 2015), features and relations of a teacher, together with the labels.

    The loss is ``(1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student)`` at temperature ``T``,
    plus ``feature_weight`` times the mean squared error of the outputs of the modules ``features``, plus
    ``relation_weight`` times the `relation_error` of the outputs of the modules ``relations``. In a model with a
    distillation token, the class head learns the labels and the distillation head the teacher (Touvron et al. 2021).

    Args:
        teacher: a model of the same classes; it is set to evaluation mode and not trained.
        alpha: weight of the teacher in the loss, between 0 and 1.
        temperature: temperature of both distributions.
        features: names of modules of both teacher and student, such as ``"blocks.5"``.
        feature_weight: weight of the error of the features.
        pool: how outputs (B, N, D) are reduced before the features are compared: ``"first"`` token or ``"mean"`` over
            tokens. Both work for a student with fewer tokens.
        relations: names of modules whose outputs (B, N, D) are compared by their relations, such as
            ``"blocks.5.attn.qkv"``; D may differ.
        relation_weight: weight of the error of the relations.
        relation_heads: number of relation heads, see `relation_error`.
        places: for modules in ``relations``, indices of the teacher's tokens that a student with fewer tokens kept.
        label_smoothing: label smoothing factor of the cross-entropy.
        classes: names of the classes of the data; empty if they are unknown.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
        features: tuple[str, ...] = (),
        feature_weight: float = 1.0,
        pool: str = "first",
        relations: tuple[str, ...] = (),
        relation_weight: float = 1.0,
        relation_heads: int = 12,
        places: Mapping[str, Tensor] | None = None,
        label_smoothing: float = 0.0,
        classes: Sequence[str] = (),
    ) -> None:
        check_distillation(alpha, temperature, pool, relation_heads)
        self.teacher = teacher
        self.alpha, self.temperature = alpha, temperature
        self.features, self.feature_weight, self.pool = features, feature_weight, pool
        self.relations, self.relation_weight, self.relation_heads = relations, relation_weight, relation_heads
        self.places = dict(places or {})
        self.label_smoothing = label_smoothing
        self.classes = classes
        self.student: nn.Module | None = None
        self.handles: list[RemovableHandle] = []
        self.seen: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Move the teacher to ``device`` and register forward hooks on the named modules of both models.

        Raises:
            ConfigError: one of the models has no module of a name.
        """
        self.teacher.to(device).eval()
        names = dict.fromkeys((*self.features, *self.relations))
        both = {"teacher": self.teacher, "student": model}
        for who, whole in both.items():
            check_modules(whole, who, names)
        for who, whole in both.items():
            for name in names:
                self.handles.append(whole.get_submodule(name).register_forward_hook(self._watch(who, name)))
        self.student = model
        train_heads_apart_(model, True)

    def _watch(self, who: str, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(f"{name} of the {who} gives {type(output).__name__}, not one tensor; name another.")
            self.seen[who][name] = output.float()

        return hook

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Task.loss`.

        Raises:
            ConfigError: teacher and student differ in their number of classes or in the shape of features.
            DataError: the student has another number of classes than the data.
        """
        with torch.no_grad():
            teacher_logits = logits_by_head(self.teacher(images))[0].float()
        logits, distilled_logits = logits_by_head(model(images))
        student_logits = logits if distilled_logits is None else distilled_logits
        if teacher_logits.shape != student_logits.shape:
            raise ConfigError(
                f"The teacher knows {teacher_logits.shape[1]} classes, the student {student_logits.shape[1]}; give a "
                "teacher with the same classes."
            )
        check_logits(logits, labels, self.classes)
        labelled = classification_loss(logits, labels, self.label_smoothing)
        log_student = F.log_softmax(student_logits.float() / self.temperature, 1)
        log_teacher = F.log_softmax(teacher_logits / self.temperature, 1)
        distilled = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * self.temperature**2
        parts = {"labels": labelled, "teacher": distilled}
        loss = (1 - self.alpha) * labelled + self.alpha * distilled
        if self.features:
            parts["features"] = torch.stack([self._error(name) for name in self.features]).mean()
            loss = loss + self.feature_weight * parts["features"]
        if self.relations:
            parts["relations"] = torch.stack([self._divergence(name) for name in self.relations]).mean()
            loss = loss + self.relation_weight * parts["relations"]
        for seen in self.seen.values():
            seen.clear()
        return {"loss": loss, **parts}

    def _divergence(self, name: str) -> Tensor:
        student, teacher = self.seen["student"][name], self.seen["teacher"][name]
        if name in self.places:
            teacher = teacher[:, self.places[name].to(teacher.device)]
        if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
            raise ConfigError(
                f"Relations of {name} need the same tokens (B, N, D) on both sides; the student has "
                f"{tuple(student.shape)}, the teacher {tuple(teacher.shape)}. Name another module in distil.relations."
            )
        width = min(student.shape[2], teacher.shape[2])
        if width < self.relation_heads:
            raise ConfigError(
                f"relation_heads is {self.relation_heads}, but {name} gives {width} features per token; lower it."
            )
        return relation_error(student, teacher, self.relation_heads)

    def _pooled(self, who: str, name: str) -> Tensor:
        tokens = self.seen[who][name]
        if tokens.ndim == 3:
            return tokens[:, 0] if self.pool == "first" else tokens.mean(1)
        return tokens

    def _error(self, name: str) -> Tensor:
        student, teacher = self._pooled("student", name), self._pooled("teacher", name)
        if student.shape != teacher.shape:
            raise ConfigError(
                f"{name} gives {tuple(student.shape)} in the student, {tuple(teacher.shape)} in the teacher; name a "
                "module with the same shape in both."
            )
        return F.mse_loss(student, teacher)

    def before_step(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Remove the hooks and restore the averaged output of both heads."""
        if self.student is not None:
            train_heads_apart_(self.student, False)
        self.student = None
        while self.handles:
            self.handles.pop().remove()
        for seen in self.seen.values():
            seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: the teacher does not change."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""


def output_difference(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], classes: int = 0) -> Tensor:
    """Return how far the outputs of a student are from those of a teacher on one batch, as the mean over the outputs.

    Logits are compared as predictions: by the Kullback-Leibler divergence per prediction, or by the binary
    cross-entropy above that of the teacher for logits with one entry per class and none for "nothing". Other outputs
    are compared by the mean squared error, divided by the teacher's variance over the batch.

    Args:
        student: outputs by name, see `slimming.training.outputs.named_outputs`.
        teacher: those of the teacher, of the same shapes.
        classes: number of classes of the model; 0 if it has none.

    Raises:
        ConfigError: an output of the teacher is missing in the student, or has another shape there.

    >>> wanted = {"logits": torch.randn(2, 5, 4), "boxes": torch.rand(2, 5, 4)}
    >>> output_difference(wanted, wanted, classes=3).abs().item() < 1e-6
    True
    """
    errors = []
    for name, target in teacher.items():
        output = student.get(name)
        if output is None or output.shape != target.shape:
            found = "none" if output is None else f"{tuple(output.shape)}"
            raise ConfigError(
                f"The teacher gives {tuple(target.shape)} as {name}, the student {found}; choose the outputs to "
                "compare, such as lambda out: out.logits."
            )
        errors.append(_output_error(name, output.float(), target.float(), len(teacher) == 1, classes))
    return torch.stack(errors).mean()


def _output_error(name: str, output: Tensor, target: Tensor, single: bool, classes: int) -> Tensor:
    kind = kind_of(name, target, single=single, classes=classes)
    if kind == BINARY:
        wanted = target.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(target, wanted)
        return F.binary_cross_entropy_with_logits(output, wanted) - entropy
    if kind == CLASSES:
        dim = class_dim(target, classes)
        log_student, log_teacher = output.log_softmax(dim), target.log_softmax(dim)
        return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim).mean()
    return F.mse_loss(output, target) / target.var(unbiased=False).clamp_min(1e-12)


class MatchLoss:
    """A `Loss` without labels: the mean squared error between the outputs of the model and those of a teacher.

    It is meant for encoders, whose output (B, D) or (B, N, D) is an embedding, and for models with other outputs than
    classes. Every output that counts is compared, see `slimming.training.outputs.named_outputs`. The error of each is
    divided by the variance of that output of the teacher for ``images``: predicting its mean gives an error of about 1.
    The loss is the mean over the outputs. The scale does not depend on how batches are split.

    Args:
        teacher: the model to match; it is set to evaluation mode and not trained.
        images: a few batches (B, C, H, W), such as those of `slimming.load_images`.

    Raises:
        ConfigError: the outputs of the teacher are the same for all images, or it has no output that counts.
    """

    def __init__(self, teacher: nn.Module, images: Iterable[Tensor]) -> None:
        self.teacher = teacher
        device = next(teacher.parameters()).device
        with in_evaluation(teacher), torch.no_grad():
            batches = [named_outputs(teacher(batch.to(device)), len(batch)) for batch in images]
        names = batches[0] if batches else ()
        values = {name: torch.cat([batch[name].float() for batch in batches]) for name in names}
        variances = {name: float(value.var(0, unbiased=False).mean()) for name, value in values.items()}
        self.variances = {name: variance for name, variance in variances.items() if variance > 0}
        if not self.variances:
            raise ConfigError("The teacher gives the same output for all images; give two or more that differ.")
        teacher.eval()

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the error on ``batch``; its labels are not used.

        Raises:
            ConfigError: the outputs of the two differ in name or shape.
        """
        images, _ = batch
        with torch.no_grad():
            targets = named_outputs(self.teacher.to(images.device)(images), len(images))
        outputs = named_outputs(model(images), len(images))
        errors = []
        for name, variance in self.variances.items():
            target, output = targets[name].float(), outputs.get(name)
            if output is None or output.shape != target.shape:
                found = "none" if output is None else f"{tuple(output.shape)}"
                raise ConfigError(
                    f"The teacher gives {tuple(target.shape)} as {name}, the student {found}; give a teacher with an "
                    "output of the same shape."
                )
            errors.append(F.mse_loss(output.float(), target) / variance)
        return errors[0] if len(errors) == 1 else torch.stack(errors).mean()
