"""Slimmable training: one training for all budgets, whose models share their weights.

A slimmable network (Yu et al., ICLR 2019) can be run at several widths with one set of weights. Here a plan takes the
place of a width, so that all kinds of units can be pruned. Each part of a batch trains one plan: in turn the largest,
the smallest and one between them, which is the sandwich rule of Yu and Huang (ICCV 2019, section 3.1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.argument_types import checked_arguments
from slimming.core.copies import copied
from slimming.core.groups import Group, keep_all
from slimming.core.modules import in_evaluation
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError
from slimming.masks.attachment import attach
from slimming.masks.soft_masks import SoftMasks, attached
from slimming.pruning.costs import cost
from slimming.retraining.config import DistilConfig
from slimming.retraining.retrain import task_of
from slimming.searching.mask_search import SearchResult
from slimming.training.config import TrainConfig
from slimming.training.distributed import agreed, asks_for_fsdp, rank_and_world_size
from slimming.training.images import derive_seed
from slimming.training.inputs import training_inputs
from slimming.training.loop import fit
from slimming.training.samples import Data
from slimming.training.tasks import Loss, Task


@checked_arguments
@agreed()
def train_slimmable(
    result: SearchResult,
    data: Data,
    plans: Sequence[Plan],
    config: TrainConfig | None = None,
    teacher: nn.Module | None = None,
    *,
    distil: DistilConfig | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    loss: Loss | None = None,
    title: str = "together",
) -> SearchResult:
    """Train the searched model so that every plan can be cut from it without further training.

    Each part of a batch trains one plan: with ``config.accumulate=3`` every step trains the largest plan, the smallest
    and one between them; with ``accumulate=1`` they alternate from step to step. A part takes as long as for the dense
    model, regardless of its plan. Plans between the largest and the smallest can be cut too without being trained.
    After a cut, the running statistics of BatchNorms are those of all plans together and should be recalibrated, for
    example with `torch.optim.swa_utils.update_bn`.

    Args:
        result: result of `slimming.search`; it is not changed.
        data: training images, see `slimming.open_data`.
        plans: plans made from ``result``, in any order; nested plans (solver ``"nested"``) share the most weights.
        config: settings of the training.
        teacher: model to distil from, see `slimming.train`.
        distil: settings of the distillation.
        directory: directory for the state and the log.
        resume: resume from the state in ``directory``.
        evaluate: called with the model at its smallest plan every ``config.eval_every`` epochs; the result is written
            to the log.
        loss: custom loss, see `slimming.train`.
        title: name of the progress bar.

    Returns:
        The result with trained weights and all masks at 1. Cut it without images: compensation would undo what the
        training has learned.

    Raises:
        ConfigError: there are no plans, the training to resume had other plans, or ``distil`` compares tokens that are
            only masked; for other causes see `slimming.train`.
        PlanError: a plan was made for another model, or removes units of a group that was not searched.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> few = slimming.TrainConfig(steps=2, batch_size=4)
    >>> result = slimming.search(model, data, slimming.SearchConfig(train=few))
    >>> plans = slimming.plans(result, [slimming.Budget(macs=m) for m in (0.8, 0.5)], solver="nested")
    >>> shared = slimming.train_slimmable(result, data, plans, few)
    >>> small = slimming.cut(shared.model, slimming.plan(shared, slimming.Budget(macs=0.6)))
    """
    if not plans:
        raise ConfigError("Give the plans to train for, such as those of slimming.plans.")
    if asks_for_fsdp() and rank_and_world_size()[1] > 1:
        raise ConfigError(
            "train_slimmable (retraining: together) does not work with sharded weights (FSDP2): every step sets other "
            "weights to 0. Take retraining each or progressive, or do not shard."
        )
    config = config or TrainConfig()
    # Learned factors are folded into the weights first, so that the masks of kept units are 1.
    ones = [dataclasses.replace(plan, fold=False) for plan in plans]
    ones.sort(key=lambda plan: cost(result.model, plan).macs, reverse=True)
    masks = _fresh(result)
    for plan in ones:  # raises before the first step if a plan does not fit
        masks.apply_(plan)
    lost = [g for g in masks.groups if g.kind == "token" and any(len(p.kept[g.name]) < g.size for p in ones)]
    check_tokens(distil if teacher is not None else None, lost)
    target = Path(directory) if directory is not None else None
    models = {"the searched model": result.model, "the teacher": teacher}
    history = fit(
        masks.model,
        SandwichTask(task_of(masks.model, config, teacher, distil, loss, data.classes), masks, ones, config.seed),
        data,
        config,
        directory=target,
        resume=resume,
        evaluate=None if evaluate is None else _at(ones[-1], evaluate),
        title=title,
        inputs=training_inputs(target, models, data),
    )
    if history.averaged is not None:
        masks = _masks_of(history.averaged)
    unmask_(masks)
    # The settings that describe the new masks, with which a saved result is loaded.
    new_config = dataclasses.replace(result.config, fold=False, norms=False, tokens="bias")
    return dataclasses.replace(
        result, model=masks.model, masks=masks, config=new_config, metrics=history.metrics, history=history
    )


def _fresh(result: SearchResult) -> SoftMasks:
    """New masks of 1 that are not trained, on a copy of the searched model with its masks folded into the weights."""
    model = copied(result.model)
    earlier = _masks_of(model)
    groups = earlier.groups
    if result.config.fold:
        earlier.fold_()
    earlier.detach_()
    masks = attach(model, groups)
    for mask in masks.values():
        mask.requires_grad_(False)
    return masks


def _masks_of(model: nn.Module) -> SoftMasks:
    masks = attached(model)
    assert masks is not None
    return masks


def _at(plan: Plan, evaluate: Callable[[nn.Module], dict[str, float]]) -> Callable[[nn.Module], dict[str, float]]:
    """Return ``evaluate`` with the masks of the model set to ``plan``."""

    def evaluate_at_plan(model: nn.Module) -> dict[str, float]:
        _masks_of(model).apply_(plan)
        return evaluate(model)

    return evaluate_at_plan


def check_tokens(distil: DistilConfig | None, lost: Sequence[Group]) -> None:
    """Check that distillation does not compare the outputs of tokens that are masked and missing in the cut models.

    Args:
        distil: settings of the distillation; None without a teacher.
        lost: token groups from which plans remove tokens.

    Raises:
        ConfigError: the outputs of all tokens would be compared.
    """
    compares = distil is not None and (distil.relations or (distil.features and distil.pool == "mean"))
    if compares and lost:
        raise ConfigError(
            f"Plans may remove tokens ({lost[0].name}), which are only masked in one training for all budgets: "
            "distil.relations, and distil.features with pool mean, would compare them too. Drop these, leave tokens "
            "out of search.kinds, or retrain each budget separately (retraining: each)."
        )


class SandwichTask:
    """A task that trains in turn the largest plan, the smallest plan and a random one between them (sandwich rule).

    Args:
        task: the task on which each plan is trained.
        masks: masks of the model, which are set to the plan.
        plans: the plans from the largest to the smallest.
        seed: seed of the random plans.
    """

    def __init__(self, task: Task, masks: SoftMasks, plans: Sequence[Plan], seed: int) -> None:
        self.task, self.masks, self.plans, self.seed, self.calls = task, masks, plans, seed, 0

    def start(self, model: nn.Module, device: torch.device) -> None:
        """See `Task.start`."""
        self.task.start(model, device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Task.loss`."""
        self.masks.apply_(self.plans[self.choice(self.calls)])
        self.calls += 1
        return self.task.loss(model, images, labels)

    def choice(self, call: int) -> int:
        """Return the index of the plan that is trained in this call."""
        between = len(self.plans) - 2
        if between < 1:
            return call % len(self.plans)
        return (0, -1, 1 + derive_seed(self.seed, 3, call) % between)[call % 3]

    def before_step(self) -> None:
        """See `Task.before_step`."""
        self.task.before_step()

    def stop(self) -> None:
        """See `Task.stop`; also sets all masks to 1."""
        unmask_(self.masks)
        self.task.stop()

    def digest(self) -> str:
        """Return a digest of the plans."""
        kept = [sorted((name, list(units)) for name, units in plan.kept.items()) for plan in self.plans]
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of calls, the digest of the plans, and the state of the inner task."""
        return {"task": self.task.state_dict(), "calls": self.calls, "plans": self.digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ConfigError: the state is of other plans.
        """
        if state["plans"] != self.digest():
            raise ConfigError("The training was started for other plans; give the same plans, or another directory.")
        self.task.load_state_dict(state["task"])
        self.calls = state["calls"]


def unmask_(masks: SoftMasks) -> None:
    """Set all masks to 1."""
    sizes = {group.name: group.size for group in masks.groups}
    masks.apply_(Plan(kept=keep_all(masks.groups), sizes=sizes, fold=False))


@torch.no_grad()
def recalibrate_batch_norms_(model: nn.Module, images: Sequence[Tensor]) -> None:
    """Recompute the running statistics of BatchNorms over ``images`` (Yu and Huang, ICCV 2019, section 3.3).

    Args:
        model: a model that was cut from weights that several plans share.
        images: batches of shape (B, C, H, W); without images the model is not changed.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not images:
        return
    like = next(model.parameters())
    momenta = [norm.momentum for norm in norms]
    with in_evaluation(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        try:
            for batch in images:
                model(batch.to(like.device, like.dtype))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
