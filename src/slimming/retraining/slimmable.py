"""One training for every budget: the models of all plans share their weights.

A slimmable network (Yu et al., ICLR 2019) runs at several widths with one set of weights. Here its widths are plans, so
that it is slimmable along every dimension that was searched. Each part of a batch trains one plan: the largest, the
smallest, and one between them in turn, the sandwich rule of Yu and Huang (ICCV 2019, section 3.1).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.groups import Group, keep_all
from slimming.core.modules import in_evaluation
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError
from slimming.masks.attachment import attach
from slimming.masks.soft_masks import SoftMasks, attached
from slimming.pruning.costs import cost
from slimming.retraining.retrain import DistilConfig, task_of
from slimming.searching.mask_search import SearchResult
from slimming.training.config import TrainConfig
from slimming.training.images import derive_seed
from slimming.training.loop import fit
from slimming.training.samples import Data
from slimming.training.tasks import Loss, Task


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
    """Train the searched model so that every plan can be cut out of it and needs no retraining of its own.

    Each part of a batch trains one plan, so ``config.accumulate=3`` has the largest, the smallest and one between them
    in every step, and ``accumulate=1`` takes them in turn, step by step. A part costs what the dense model costs,
    however small its plan. Other plans between the largest and the smallest work too, without being trained for; more
    plans make the training denser. After a cut, running statistics of BatchNorms are those of all plans together:
    `torch.optim.swa_utils.update_bn` takes them anew.

    Args:
        result: what `slimming.search` gave; it stays as it is.
        data: training images, see `slimming.open_data`.
        plans: from that result, in any order; nested ones (solver ``"nested"``) share most.
        config: of the training; this and what follows, but for ``evaluate``, is as for `slimming.train`.
        teacher: to distil from.
        distil: what of the teacher.
        directory: for the state and the log.
        resume: go on from the state there.
        loss: of your own, in place of the labels.
        title: of the training, in its log.
        evaluate: called now and then with the model at its smallest plan; what it returns goes to the log.

    Returns:
        The result with trained weights and every mask at 1: plan, cut and save it like any other, and cut it without
        images, for compensation would undo what the training has done.

    Raises:
        ConfigError: there are no plans, a training under way had others, or ``distil`` compares tokens that masks
            cannot take away; else see `slimming.train`.
        PlanError: a plan is of another model, or cuts a group that was not searched.

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
        raise ConfigError("Give the plans that the training shall serve, such as those of slimming.plans.")
    config = config or TrainConfig()
    # A mask of 1 is what the cut leaves: learned factors are in the weights by then.
    ones = [dataclasses.replace(plan, fold=False) for plan in plans]
    ones.sort(key=lambda plan: cost(result.model, plan).macs, reverse=True)
    masks = _fresh(result)
    for plan in ones:  # so that one that does not fit is met before the first step
        masks.apply_(plan)
    lost = [g for g in masks.groups if g.kind == "token" and any(len(p.kept[g.name]) < g.size for p in ones)]
    check_tokens(distil if teacher is not None else None, lost)
    history = fit(
        masks.model,
        InTurn(task_of(masks.model, config, teacher, distil, loss), masks, ones, config.seed),
        data,
        config,
        directory=Path(directory) if directory is not None else None,
        resume=resume,
        evaluate=None if evaluate is None else _at(ones[-1], evaluate),
        title=title,
    )
    if history.averaged is not None:
        masks = _masks_of(history.averaged)
    open_(masks)
    # What a search that ends with such masks would have had; a saved result is read by it.
    asked = dataclasses.replace(result.config, fold=False, norms=False, tokens="bias")
    return dataclasses.replace(
        result, model=masks.model, masks=masks, config=asked, metrics=history.metrics, history=history
    )


def _fresh(result: SearchResult) -> SoftMasks:
    """Masks of 1 that are not trained, on a copy of the searched model whose own are in its weights."""
    model = copy.deepcopy(result.model)
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
    """Evaluate the model, or the averaged one, at ``plan``."""

    def judge(model: nn.Module) -> dict[str, float]:
        _masks_of(model).apply_(plan)
        return evaluate(model)

    return judge


def check_tokens(distil: DistilConfig | None, lost: Sequence[Group]) -> None:
    """A masked token is still there, with outputs that no cut model has; comparing it would train for nothing.

    Args:
        distil: how the shared weights learn from a teacher, if they do.
        lost: the groups of tokens that plans cut.

    Raises:
        ConfigError: outputs of all tokens would be compared, and some are only masked.
    """
    compares = distil is not None and (distil.relations or (distil.features and distil.pool == "mean"))
    if compares and lost:
        raise ConfigError(
            f"Tokens may go ({lost[0].name}), which one training for all budgets only masks: distil.relations, and "
            "distil.features with pool mean, would compare them too. Drop these, leave tokens out of search.kinds, or "
            "retrain each budget on its own."
        )


class InTurn:
    """A task that takes the largest plan, the smallest one, and one between them in turn.

    Args:
        task: what each of them is trained for.
        masks: of the model, which are set to the plan's.
        plans: from the largest to the smallest.
        seed: of the draws.
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
        """Which plan the part with this number trains."""
        between = len(self.plans) - 2
        if between < 1:
            return call % len(self.plans)
        return (0, -1, 1 + derive_seed(self.seed, 3, call) % between)[call % 3]

    def before_step(self) -> None:
        """See `Task.before_step`."""
        self.task.before_step()

    def stop(self) -> None:
        """See `Task.stop`; every unit takes part again."""
        open_(self.masks)
        self.task.stop()

    def digest(self) -> str:
        """What tells these plans from others."""
        kept = [sorted((name, list(units)) for name, units in plan.kept.items()) for plan in self.plans]
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return whose turn it is, of which plans, and the inner task's state."""
        return {"task": self.task.state_dict(), "calls": self.calls, "plans": self.digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ConfigError: it is of other plans.
        """
        if state["plans"] != self.digest():
            raise ConfigError(
                "The training was started for other plans; go on with the same, or give another directory."
            )
        self.task.load_state_dict(state["task"])
        self.calls = state["calls"]


def open_(masks: SoftMasks) -> None:
    """Let every unit take part, with a factor of 1."""
    sizes = {group.name: group.size for group in masks.groups}
    masks.apply_(Plan(kept=keep_all(masks.groups), sizes=sizes, fold=False))


@torch.no_grad()
def settle_norms_(model: nn.Module, images: Sequence[Tensor]) -> None:
    """Take the running statistics of BatchNorms anew, over ``images`` (Yu and Huang, ICCV 2019, section 3.3).

    Args:
        model: cut out of weights that several plans share.
        images: batches of shape (B, C, H, W); none leaves everything as it is.
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
