"""Losses that learn from a teacher: distillation of logits, features and relations, and matching of embeddings.

Shape suffixes: B batch, C channels, H height, W width, N tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimming.core.modules import in_evaluation, train_heads_apart_
from slimming.errors import ConfigError, nearest
from slimming.training.config import check_distillation
from slimming.training.tasks import both_heads, classification_loss


def relation_error(student_BND: Tensor, teacher_BND: Tensor, heads: int) -> Tensor:
    """Return how far the token-to-token relations of two outputs lie apart (MiniLMv2, Wang et al. 2021, section 3.1).

    A relation is the softmax over tokens of their scaled dot products, (B, heads, N, N): D is split into ``heads``
    parts of consecutive numbers, as many on both sides whatever their D. The error is the mean of
    KL(teacher || student) over images, heads and tokens.

    Args:
        student_BND: an output of the student.
        teacher_BND: the teacher's, of the same tokens; its D may differ.
        heads: parts. A multiple of 3 that divides D compares queries, keys and values of a joint projection apart.

    >>> x = torch.randn(2, 5, 24)
    >>> relation_error(x, x, 3).item()
    0.0
    """
    with torch.autocast(student_BND.device.type, enabled=False):  # products of large outputs leave half precision
        student, teacher = _relations(student_BND.float(), heads), _relations(teacher_BND.float(), heads)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def _relations(output_BND: Tensor, heads: int) -> Tensor:
    """Logarithms of the relations, (B, heads, N, N)."""
    products = [part @ part.mT / part.shape[-1] ** 0.5 for part in output_BND.tensor_split(heads, dim=-1)]
    return torch.stack(products, 1).log_softmax(-1)


def check_modules(model: nn.Module, who: str, names: Iterable[str]) -> None:
    """Check that ``model``, the teacher or the student, has modules of these names.

    Raises:
        ConfigError: it has not.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ConfigError(f"The {who} has no module {name!r} to distil.{nearest(name, modules)}")


class DistilTask:
    """Learning from a teacher's logits beside the labels (Hinton et al. 2015), its features and its relations.

    The loss is ``(1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student)`` at temperature ``T``,
    plus ``feature_weight`` times the mean squared error of the named modules' outputs, plus ``relation_weight``
    times the divergence of their token-to-token relations, see `relation_error`. A model with a distillation token
    learns the labels with its class head and the teacher with its distillation head (Touvron et al. 2021).

    Args:
        teacher: a model of the same classes; put into evaluation mode and never trained.
        alpha: share of the teacher in the loss, 0 to 1.
        temperature: softens both distributions.
        features: names of modules that teacher and student both have, such as ``"blocks.5"``.
        feature_weight: weight of their error.
        pool: what is compared of outputs (B, N, D): ``"first"`` token or the ``"mean"`` over tokens. A
            student that lost tokens still has both.
        relations: names of modules whose outputs (B, N, D) are compared by their relations, such as
            ``"blocks.5.attn.qkv"``; D may differ.
        relation_weight: weight of their divergence.
        relation_heads: parts that D is split into, see `relation_error`.
        places: module in ``relations`` -> places of the teacher's tokens that the student has, where it lost some.
        label_smoothing: as in `ClassificationTask`.
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
    ) -> None:
        check_distillation(alpha, temperature, pool, relation_heads)
        self.teacher = teacher
        self.alpha, self.temperature = alpha, temperature
        self.features, self.feature_weight, self.pool = features, feature_weight, pool
        self.relations, self.relation_weight, self.relation_heads = relations, relation_weight, relation_heads
        self.places = dict(places or {})
        self.label_smoothing = label_smoothing
        self.student: nn.Module | None = None
        self.handles: list[RemovableHandle] = []
        self.seen: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Move the teacher to ``device`` and watch the named modules of both models.

        Raises:
            ConfigError: one of the models has no module of that name.
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
            ConfigError: teacher and student have different numbers of classes or widths of features.
        """
        with torch.no_grad():
            wanted = both_heads(self.teacher(images))[0].float()
        logits, second = both_heads(model(images))
        learner = logits if second is None else second
        if wanted.shape != learner.shape:
            raise ConfigError(f"The teacher knows {wanted.shape[1]} classes, the student {learner.shape[1]}.")
        labelled = classification_loss(logits, labels, self.label_smoothing)
        softened = F.log_softmax(learner.float() / self.temperature, 1)
        target = F.log_softmax(wanted / self.temperature, 1)
        distilled = F.kl_div(softened, target, reduction="batchmean", log_target=True) * self.temperature**2
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
        least = min(student.shape[2], teacher.shape[2])
        if least < self.relation_heads:
            raise ConfigError(
                f"relation_heads is {self.relation_heads}, but {name} gives {least} numbers per token; lower it."
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
                f"{name} gives {tuple(student.shape)} in the student, {tuple(teacher.shape)} in the teacher."
            )
        return F.mse_loss(student, teacher)

    def before_step(self) -> None:
        """Nothing to collect."""

    def stop(self) -> None:
        """Remove the hooks, and let both heads speak together again."""
        if self.student is not None:
            train_heads_apart_(self.student, False)
        self.student = None
        while self.handles:
            self.handles.pop().remove()
        for seen in self.seen.values():
            seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: the teacher does not change."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class MatchLoss:
    """A `Loss` without labels: the mean squared error between the outputs of the model and those of a teacher.

    For encoders, whose output (B, D) or (B, N, D) is an embedding. The error is divided by the variance of the
    teacher's outputs for ``images``, so that 1 is about as bad as predicting their mean, however batches are split.

    Args:
        teacher: put into evaluation mode and never trained.
        images: a few batches (B, C, H, W), such as those of `slimming.load_images`.

    Raises:
        ConfigError: the teacher's outputs are the same for all images.
    """

    def __init__(self, teacher: nn.Module, images: Iterable[Tensor]) -> None:
        self.teacher = teacher
        device = next(teacher.parameters()).device
        with in_evaluation(teacher), torch.no_grad():
            wanted = [both_heads(teacher(batch.to(device)))[0].float() for batch in images]
        self.variance = float(torch.cat(wanted).var(0, unbiased=False).mean()) if wanted else 0.0
        if not self.variance > 0:
            raise ConfigError("The teacher gives the same output for all images; give two or more that differ.")
        teacher.eval()

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The error on ``batch``, whose labels are not used.

        Raises:
            ConfigError: the two outputs differ in shape.
        """
        images, _ = batch
        with torch.no_grad():
            wanted = both_heads(self.teacher.to(images.device)(images))[0].float()
        found = model(images).float()
        if found.shape != wanted.shape:
            raise ConfigError(f"The teacher gives {tuple(wanted.shape)}, the student {tuple(found.shape)}.")
        return F.mse_loss(found, wanted) / self.variance
