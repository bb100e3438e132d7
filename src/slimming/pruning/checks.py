"""Check that slimming supports a model: cut a random copy of it and compare with the masked copy."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from slimming.checkpoints.checkpoint import load, save
from slimming.core.budget import Budget
from slimming.core.groups import Anatomy, Group, keep_all
from slimming.core.kinds import KINDS
from slimming.core.layout import FREE
from slimming.core.modules import MODEL_ERRORS
from slimming.core.pruning_plan import Plan
from slimming.counting.measured import count
from slimming.counting.model_cost import total
from slimming.errors import SlimmingError
from slimming.masks.attachment import attach, prunable, select_kinds
from slimming.models.prunable import PrunableModel
from slimming.models.traced.verification import outputs, randomise_
from slimming.planning.budgeting import plan
from slimming.pruning.costs import cost
from slimming.pruning.cutting import cut

EXACT = 1e-9
"""Largest relative difference between the outputs of the masked and the cut model, in float64."""
COSTS = 0.005
"""Largest relative difference between a cost by formula and the counted cost."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of one check.

    Attributes:
        name: what was checked.
        held: whether it passed.
        detail: the measured number, or the error.
    """

    name: str
    held: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of `check`.

    Attributes:
        kinds: kind -> number of groups.
        covered_params: share of the parameters that can be removed with some unit.
        covered_macs: share of the multiply-adds that can be removed with some unit.
        steps: results of the single checks in order; the first that fails is the last.
        uncovered: parts that cannot be pruned, each with the reason.
        seconds: total time.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    covered_params: float = 0.0
    covered_macs: float = 0.0
    steps: tuple[Step, ...] = ()
    uncovered: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return bool(self.steps) and all(step.held for step in self.steps)

    def __str__(self) -> str:
        """Return the result as lines of text."""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.kinds.items())
        lines = [f"{kinds or 'no groups'}; covers {self.covered_macs:.0%} of MACs, {self.covered_params:.0%} of params"]
        lines += [f"{'ok  ' if step.held else 'FAIL'} {step.name}: {step.detail}" for step in self.steps]
        return "\n".join([*lines, *(f"stays whole: {reason}" for reason in self.uncovered)])


def check(model: nn.Module, *, keep: float = 0.5, seed: int = 0) -> Check:
    """Check that slimming can prune ``model``; the model is not changed.

    In a float64 copy, weights and statistics are randomised, random masks are attached, and a plan that keeps about
    ``keep`` of the units is applied. The outputs and the input gradient of the masked and the cut model must agree
    within 1e-9, the costs by formula must agree with the counted costs within 0.5 %, and the slim model must give the
    same outputs after saving and loading.

    Args:
        model: any model; the shape of its input is read from it.
        keep: share of the units of each kind to keep.
        seed: seed of weights, masks and images.

    Returns:
        The results; ``ok`` is True if all checks passed. No error is raised for a model that does not pass.

    >>> import timm, slimming
    >>> found = slimming.check(timm.create_model("test_vit"))
    >>> found.ok, round(found.covered_macs, 2)
    (True, 1.0)
    """
    return check_with_trial(model, keep=keep, seed=seed)[0]


def check_with_trial(model: nn.Module, *, keep: float = 0.5, seed: int = 0) -> tuple[Check, Trial | None]:
    """Return the result of `check`, and the trial with the slim model; None if no family reads the model."""
    began = time.perf_counter()
    try:
        read_model = prunable(model)
    except (SlimmingError, *MODEL_ERRORS) as error:
        step = Step(name="reads", held=False, detail=_first_line(error))
        return Check(steps=(step,), seconds=time.perf_counter() - began), None
    anatomy = read_model.anatomy
    kinds = Counter(group.kind for group in anatomy.groups if group.role != "qkv")
    params, macs = covered(anatomy)
    steps: list[Step] = []
    trial = Trial(read_model, keep, seed)
    stages: Sequence[tuple[str, Callable[[], str]]] = (
        ("masked equals cut, forward and backward", trial.exact),
        ("costs by formula are the counted ones", trial.costs),
        ("saves and loads", trial.reload),
    )
    for name, stage in stages:
        try:
            steps.append(Step(name=name, held=True, detail=stage()))
        except (SlimmingError, *MODEL_ERRORS) as error:
            steps.append(Step(name=name, held=False, detail=_first_line(error)))
            break
    result = Check(
        kinds=dict(kinds),
        covered_params=params,
        covered_macs=macs,
        steps=tuple(steps),
        uncovered=anatomy.uncovered,
        seconds=time.perf_counter() - began,
    )
    return result, trial


def _first_line(error: Exception) -> str:
    """The message of a `SlimmingError`, or the class and the first line of the message of another error."""
    if isinstance(error, SlimmingError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def covered(anatomy: Anatomy) -> tuple[float, float]:
    """The shares of parameters and multiply-adds that are removed with all units of all groups."""
    full = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    whole, none = total(anatomy, full), total(anatomy, dict.fromkeys(full, 0))
    return 1 - none.params / whole.params, 1 - none.macs / max(whole.macs, 1)


class Trial:
    """A random plan applied to a copy of a model with random weights.

    Args:
        prunable: the model, which is not changed.
        keep: share of the units of each kind to keep.
        seed: seed of weights, masks and images.
    """

    def __init__(self, prunable: PrunableModel, keep: float = 0.5, seed: int = 0) -> None:
        anatomy = prunable.anatomy
        self.model = copy.deepcopy(prunable.model).cpu().double().eval()
        self.seed, self.keep, self.anatomy = seed, keep, anatomy
        self.generator = torch.Generator().manual_seed(seed)
        # Two images: with one, torch 2.15 can give wrong gradients behind a permuted batch of one head.
        self.image = torch.randn(2, *anatomy.input_shape, generator=self.generator, dtype=torch.float64)
        self.plan: Plan
        self.small: nn.Module

    def exact(self) -> str:
        """Cut the model, and compare outputs and the gradient of the images with those of the masked model."""
        randomise_(self.model, self.seed)
        every = [group for group in self.anatomy.groups if group.role != "qkv"]
        groups: list[Group] = select_kinds(every) + [group for group in every if KINDS[group.kind].on_request]
        masked = copy.deepcopy(self.model)
        masks = attach(masked, groups)
        with torch.no_grad():
            for mask in masks.values():
                mask.copy_(0.3 + 1.2 * torch.rand(mask.shape, generator=self.generator))
        budget = Budget(keep=dict.fromkeys({group.kind for group in groups}, self.keep))
        self.plan = plan(masks, budget, layout=FREE, score="mask")
        masks.apply_(self.plan)
        self.small = cut(masked, self.plan)
        # On copies: some models store tensors with their autograd graph in a forward pass and cannot be copied then.
        dense_result, (of_masked, masked_grad), (of_small, small_grad) = (
            _forward_backward(copy.deepcopy(each), self.image) for each in (self.model, masked, self.small)
        )
        error = max(distance(of_masked, of_small), distance([masked_grad], [small_grad]))
        if not error <= EXACT:
            raise AssertionError(f"they differ by {error:.1e}")
        if not distance(dense_result[0], of_masked) > 1e-6:
            raise AssertionError("the plan does not change the outputs, so that the comparison proves nothing")
        return f"they differ by {error:.1e}"

    def costs(self) -> str:
        """Compare the costs of the plan by formula with the counted costs of the slim model."""
        small = copy.deepcopy(self.small).float()
        counted = count(small, self.anatomy.input_shape)
        formula = cost(copy.deepcopy(self.model).float(), self.plan)
        for name in ("params", "macs", "memory_bytes"):
            by_formula, by_count = getattr(formula, name), getattr(counted, name)
            if abs(by_formula - by_count) > COSTS * by_count:
                raise AssertionError(f"{name} is {by_formula} by formula and {by_count} counted")
        return f"{counted.params:,} params, {counted.macs:,} MACs"

    def reload(self) -> str:
        """Save the slim model, load it, and compare the outputs."""
        with tempfile.TemporaryDirectory() as directory:
            save(self.small, Path(directory) / "slim")
            needs_dense = self.anatomy.structure.base.get("host") == "own"
            loaded = load(Path(directory) / "slim", dense=self.model if needs_dense else None)
        with torch.no_grad():
            error = distance(outputs(copy.deepcopy(self.small), self.image), outputs(loaded, self.image))
        if error > EXACT:
            raise AssertionError(f"outputs differ by {error:.1e} after loading")
        return "the same outputs"


def _forward_backward(model: nn.Module, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs, and the gradient of a fixed function of them with respect to the images."""
    image = image.clone().requires_grad_()
    results = outputs(model, image)
    generator = torch.Generator().manual_seed(1)
    loss = sum(out.square().sum() * torch.rand((), generator=generator, dtype=torch.float64) for out in results)
    assert isinstance(loss, Tensor)
    (grad,) = torch.autograd.grad(loss, image)
    return [out.detach() for out in results], grad


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest value; infinite if shapes differ or nothing is given."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(first, second, strict=True)]
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30) for a, b in pairs)
