"""Does slimming work on a model? `check` reads it, cuts it at random and holds the result against the masked one."""

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
from slimming.core.pruning_plan import Plan
from slimming.counting.measured import count
from slimming.counting.model_cost import total
from slimming.errors import SlimmingError
from slimming.masks.attachment import attach, prunable, searched
from slimming.models.prunable import PrunableModel
from slimming.models.traced.verification import outputs, randomise_
from slimming.planning.budgeting import plan
from slimming.pruning.costs import cost
from slimming.pruning.cutting import cut

EXACT = 1e-9
"""Largest relative difference between masked and cut, in float64."""
COSTS = 0.005
"""Largest relative difference between a cost by formula and the counted one."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One promise and whether it was kept.

    Attributes:
        name: what was checked.
        held: whether it is so.
        detail: the number that decided, or what went wrong.
    """

    name: str
    held: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """What `check` found.

    Attributes:
        kinds: kind -> number of groups.
        covered_params: share of the parameters that belong to some unit.
        covered_macs: share of the multiply-adds that go with some unit.
        steps: the promises, in the order they were checked; none follows the first that breaks.
        uncovered: what stays whole, each with the reason.
        seconds: time of the whole.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    covered_params: float = 0.0
    covered_macs: float = 0.0
    steps: tuple[Step, ...] = ()
    uncovered: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return bool(self.steps) and all(step.held for step in self.steps)

    def __str__(self) -> str:
        """The check as lines of text."""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.kinds.items())
        lines = [f"{kinds or 'no groups'}; covers {self.covered_macs:.0%} of MACs, {self.covered_params:.0%} of params"]
        lines += [f"{'ok  ' if step.held else 'FAIL'} {step.name}: {step.detail}" for step in self.steps]
        return "\n".join([*lines, *(f"stays whole: {reason}" for reason in self.uncovered)])


def check(model: nn.Module, *, keep: float = 0.5, seed: int = 0) -> Check:
    """Test on a copy of ``model`` whether masks, cuts, costs and checkpoints work for it.

    Weights and statistics are drawn anew on a copy in float64, random masks are attached, and a plan that keeps
    about ``keep`` of the units is applied: masked and cut must agree, forward and backward, within 1e-9; the slim
    model must save and load; its costs by formula must equal the counted ones within 0.5 %.

    Args:
        model: any model; the image it takes is read off it.
        keep: share of the units of each kind that stays.
        seed: of weights, masks and image.

    Returns:
        What was found; it is ``ok`` if all held. Nothing is raised for a model that does not pass.

    >>> import timm, slimming
    >>> found = slimming.check(timm.create_model("test_vit"))
    >>> found.ok, round(found.covered_macs, 2)
    (True, 1.0)
    """
    return examine(model, keep=keep, seed=seed)[0]


def examine(model: nn.Module, *, keep: float = 0.5, seed: int = 0) -> tuple[Check, Trial | None]:
    """Do what `check` does, and give the trial too, with the slim model; None where the model was not read."""
    began = time.perf_counter()
    try:
        found = prunable(model)
    except Exception as error:  # whatever a host raises is what the user wants to read
        step = Step(name="reads", held=False, detail=_first_line(error))
        return Check(steps=(step,), seconds=time.perf_counter() - began), None
    anatomy = found.anatomy
    kinds = Counter(group.kind for group in anatomy.groups if group.role != "qkv")
    params, macs = _covered(anatomy)
    steps: list[Step] = []
    trial = Trial(found, keep, seed)
    stages: Sequence[tuple[str, Callable[[], str]]] = (
        ("masked equals cut, forward and backward", trial.exact),
        ("costs by formula are the counted ones", trial.costs),
        ("saves and loads", trial.reload),
    )
    for name, stage in stages:
        try:
            steps.append(Step(name=name, held=True, detail=stage()))
        except Exception as error:  # whatever a host raises is what the user wants to read
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
    """The message of an error of ours, or the kind of another and the first line of its message."""
    if isinstance(error, SlimmingError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _covered(anatomy: Anatomy) -> tuple[float, float]:
    """The shares of parameters and multiply-adds that go when every group loses all its units."""
    full = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    whole, none = total(anatomy, full), total(anatomy, dict.fromkeys(full, 0))
    return 1 - none.params / whole.params, 1 - none.macs / max(whole.macs, 1)


class Trial:
    """One random plan on one randomly drawn copy."""

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
        """Cut, and hold outputs and the image's gradient against those of the masked model."""
        randomise_(self.model, self.seed)
        every = [group for group in self.anatomy.groups if group.role != "qkv"]
        groups: list[Group] = searched(every) + [group for group in every if KINDS[group.kind].on_request]
        masked = copy.deepcopy(self.model)
        masks = attach(masked, groups)
        with torch.no_grad():
            for mask in masks.values():
                mask.copy_(0.3 + 1.2 * torch.rand(mask.shape, generator=self.generator))
        budget = Budget(keep=dict.fromkeys({group.kind for group in groups}, self.keep))
        self.plan = plan(masks, budget, layout=FREE, score="mask")
        masks.apply_(self.plan)
        self.small = cut(masked, self.plan)
        # On copies: some hosts keep tensors of a forward pass with its graph, and then cannot be copied any more.
        before, (ours, slope), (theirs, other) = (
            _forward_backward(copy.deepcopy(each), self.image) for each in (self.model, masked, self.small)
        )
        error = max(distance(ours, theirs), distance([slope], [other]))
        if not error <= EXACT:
            raise AssertionError(f"they differ by {error:.1e}")
        if not distance(before[0], ours) > 1e-6:
            raise AssertionError("the plan changes nothing, so that this shows nothing")
        return f"they differ by {error:.1e}"

    def costs(self) -> str:
        """Hold the formulas under the plan against the counted forward of the slim model."""
        small = copy.deepcopy(self.small).float()
        found = count(small, self.anatomy.input_shape)
        formula = cost(copy.deepcopy(self.model).float(), self.plan)
        for name in ("params", "macs", "memory_bytes"):
            ours, theirs = getattr(formula, name), getattr(found, name)
            if abs(ours - theirs) > COSTS * theirs:
                raise AssertionError(f"{name} is {ours} by formula and {theirs} counted")
        return f"{found.params:,} params, {found.macs:,} MACs"

    def reload(self) -> str:
        """Save the slim model, load it, and compare outputs."""
        with tempfile.TemporaryDirectory() as directory:
            save(self.small, Path(directory) / "slim")
            own = self.anatomy.structure.base.get("host") == "own"
            loaded = load(Path(directory) / "slim", dense=self.model if own else None)
        with torch.no_grad():
            error = distance(outputs(copy.deepcopy(self.small), self.image), outputs(loaded, self.image))
        if error > EXACT:
            raise AssertionError(f"outputs differ by {error:.1e} after loading")
        return "the same outputs"


def _forward_backward(model: nn.Module, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs, and the image's gradient of a fixed combination of them."""
    image = image.clone().requires_grad_()
    found = outputs(model, image)
    generator = torch.Generator().manual_seed(1)
    loss = sum(out.square().sum() * torch.rand((), generator=generator, dtype=torch.float64) for out in found)
    assert isinstance(loss, Tensor)
    (slope,) = torch.autograd.grad(loss, image)
    return [out.detach() for out in found], slope


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value; infinite where shapes differ, or where there is nothing."""
    pairs = [(one.detach(), other.detach()) for one, other in zip(ours, theirs, strict=True)]
    if not pairs or any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max(float((one - other).abs().max()) / max(float(one.abs().max()), 1e-30) for one, other in pairs)
