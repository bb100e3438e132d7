"""What does not run in one mode, or without an argument: traced where a call runs it, left whole where none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

import slimming
from slimming.cli import models as cli_models
from slimming.cli.entry import main
from slimming.core.layout import FREE
from slimming.masks.attachment import prunable
from slimming.models.traced.verification import outputs, randomise_
from slimming.pruning.checks import distance

EXACT = 1e-9


class Body(nn.Module):
    """Two stages that give features of 16 and 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.mid, self.conv2 = nn.Conv2d(16, 20, 3, padding=1), nn.Conv2d(20, 24, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.norm1(self.conv1(x)).relu()
        return low, self.norm2(self.conv2(self.mid(low).relu())).relu()


class Neck(nn.Module):
    """Has an auxiliary head that runs while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = Body(), nn.Sequential(nn.Conv2d(16, 10, 1), nn.BatchNorm2d(10), nn.Conv2d(10, 3, 1))

    def forward(self, x: Tensor) -> Any:
        low, high = self.body(x)
        return (high, self.aux(low)) if self.training else high


class AuxiliaryInside(nn.Module):
    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.fc = Neck(), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        found = self.neck(x)
        if isinstance(found, tuple):
            return self.fc(found[0].mean((2, 3))), found[1]
        return self.fc(found.mean((2, 3)))


class AuxiliaryMode(nn.Module):
    """Runs its auxiliary head as a setting says."""

    image_size = 16

    def __init__(self, aux_mode: str = "eval") -> None:
        super().__init__()
        self.aux_mode = aux_mode
        self.body, self.head, self.aux = Body(), nn.Conv2d(24, 3, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        low, high = self.body(x)
        return (self.head(high), self.aux(low)) if self.aux_mode == "train" else self.head(high)


class Tasks(nn.Module):
    """Chooses its head by an argument."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.heads = nn.ModuleDict({"classes": nn.Linear(24, 5), "depth": nn.Conv2d(16, 1, 1)})

    def forward(self, x: Tensor, task: str = "classes") -> Tensor:
        low, high = self.body(x)
        return self.heads["classes"](high.mean((2, 3))) if task == "classes" else self.heads["depth"](low)


def halved(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The masked and the cut model with half of all offered units, in float64 with random weights."""
    torch.manual_seed(0)
    model = model.double()
    randomise_(model)
    masks = slimming.attach(model)
    budget = slimming.Budget(keep={group.kind: 0.5 for group in masks.groups})
    plan = slimming.plan(masks, budget, layout=FREE)
    masks.apply_(plan)
    return model, slimming.cut(model, plan)


def same(masked: nn.Module, slim: nn.Module, *args: Any, training: bool = False) -> bool:
    """Whether both give the same outputs for a batch of two images."""
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = [outputs(each.train(training), (x, *args)) for each in (masked, slim)] if args else [
        outputs(each.train(training), x) for each in (masked, slim)
    ]  # fmt: skip
    return distance(*found) <= EXACT


def sizes(model: nn.Module) -> dict[str, int]:
    return {group.name: group.size for group in slimming.describe(model)}


ALL = {"body.conv1.channels": 16, "body.mid.channels": 20, "body.conv2.channels": 24}


def test_a_head_that_runs_while_its_module_trains_is_read() -> None:
    model = AuxiliaryInside()
    assert sizes(model) == {**{f"neck.{name}": size for name, size in ALL.items()}, "neck.aux.0.channels": 10}
    masked, slim = halved(model)
    assert same(masked, slim)
    assert same(masked, slim, training=True)
    found = slimming.check(AuxiliaryInside())
    assert found.ok, str(found)
    assert "training" in found.steps[0].detail


def test_what_a_setting_switches_off_keeps_its_input_whole() -> None:
    model = AuxiliaryMode()
    assert sizes(model) == {name: size for name, size in ALL.items() if size != 16}
    (reason,) = [one for one in prunable(model).anatomy.uncovered if one.startswith("aux")]
    assert "no example call uses this module" in reason
    assert "1 group of units that it could read cannot be cut" in reason
    assert "set aux_mode" in reason
    masked, slim = halved(model)
    for each in (masked, slim):
        vars(each)["aux_mode"] = "train"
    assert same(masked, slim)
    assert same(masked, slim, training=True)
    assert slimming.check(AuxiliaryMode()).ok

    assert sizes(AuxiliaryMode("train")) == ALL
    masked, slim = halved(AuxiliaryMode("train"))
    assert same(masked, slim)


def test_what_an_argument_chooses_keeps_its_input_whole_until_a_call_runs_it() -> None:
    model = Tasks()
    assert sizes(model) == {name: size for name, size in ALL.items() if size != 16}
    masked, slim = halved(model)
    assert same(masked, slim, "depth")
    x = torch.zeros(1, 3, 16, 16)
    both = [(x,), {"x": x, "task": "depth"}]
    model = Tasks()
    assert {group.name for group in slimming.describe(model, example_inputs=both)} == set(ALL)
    masked, slim = halved(model)
    assert same(masked, slim)
    assert same(masked, slim, "depth")
    found = slimming.check(Tasks(), example_inputs=both)
    assert found.ok, str(found)
    assert not found.uncovered or "no example call" not in str(found)


def test_inspect_names_the_module_and_the_call_that_runs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_models, "open_named", lambda *_, **__: Tasks().eval())
    main(["inspect", "tasks"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "not covered: heads.depth: no example call uses this module" in printed
    assert "example_inputs=[{'x': image}, {'x': image, 'task': 'depth'}]" in printed


class Spare(Body):
    """Has a layer that nothing runs."""

    image_size = 16

    def __init__(self, spare: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.spare = nn.Linear(24, 5), spare

    def forward(self, x: Tensor) -> Any:
        return self.fc(super().forward(x)[1].mean((2, 3)))


@pytest.mark.parametrize(
    ("spare", "left"),
    [
        (nn.Conv2d(20, 2, 1), {16, 24}),
        (nn.BatchNorm2d(20), {16, 24}),
        (nn.Conv2d(7, 24, 1), set()),
        (nn.Conv2d(3, 24, 1), {16, 20}),
        (nn.Sequential(nn.Conv2d(24, 9, 1), nn.Conv2d(9, 2, 1)), {16, 20}),
        (nn.Sequential(nn.Conv2d(24, 9, 1), nn.Flatten(), nn.Linear(9 * 16, 2)), {16, 20}),
        (nn.Linear(20 * 49, 2), {16, 24}),
        (nn.Conv2d(36, 2, 1), set()),
        (nn.Conv2d(1, 2, 1, bias=False), {16, 20, 24}),
    ],
    ids=[
        *("reads", "norm", "reads a width that is nowhere", "makes", "a chain", "flattens its own"),
        *("flattens", "reads a concatenation", "reads one channel"),
    ],
)
def test_groups_that_an_unrun_layer_could_read_or_add_to_stay_whole(spare: nn.Module, left: set[int]) -> None:
    if not left:
        with pytest.raises(slimming.errors.UnsupportedModelError, match="spare: no example call uses this module"):
            slimming.describe(Spare(spare))
    else:
        assert set(sizes(Spare(spare)).values()) == left


class Prompt(Spare):
    """Adds a parameter to its features if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.mask_token = nn.Parameter(torch.ones(20, 1, 1)), nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x: Tensor, use: bool = False) -> Any:
        low = self.norm1(self.conv1(x)).relu()
        mid = self.mid(low).relu()
        return self.fc(self.norm2(self.conv2(mid + self.prompt if use else mid)).relu().mean((2, 3)))


def test_groups_that_an_unused_parameter_could_be_added_to_stay_whole() -> None:
    assert set(sizes(Prompt()).values()) == {16, 24}
    lines = [line for line in prunable(Prompt()).anatomy.uncovered if "no example call" in line]
    assert [line.partition(":")[0] for line in lines] == ["prompt", "mask_token"]
    x = torch.zeros(1, 3, 16, 16)
    model = Prompt()
    assert {group.size for group in slimming.describe(model, example_inputs=[x, (x, True)])} >= {16, 24}


class MixesInTraining(Spare):
    """Subtracts the mean over some channels in training mode."""

    def forward(self, x: Tensor) -> Any:
        low = self.norm1(self.conv1(x)).relu()
        mid = self.mid(low).relu()
        if self.training:
            mid = mid / (1 + mid.mean(1, keepdim=True))
        return self.fc(self.norm2(self.conv2(mid)).relu().mean((2, 3)))


def test_units_that_something_reads_in_training_stay_whole() -> None:
    model = MixesInTraining()
    assert set(sizes(model).values()) == {16, 24}
    assert any("in training mode" in line for line in prunable(model).anatomy.uncovered)


class Random(Spare):
    """Has every kind of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.path, self.alpha = nn.Dropout2d(0.3), DropPath(0.5), nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Any:
        low = self.alpha(F.dropout(self.norm1(self.conv1(x)).relu(), 0.4, self.training))
        high = self.drop(self.conv2(self.mid(low).relu()))
        return self.fc(self.norm2(high + self.path(high)).relu().mean((2, 3)))


def test_dropout_does_not_disturb_the_proof_in_training() -> None:
    model = Random()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = slimming.check(model)
    assert found.ok, str(found)
    assert "evaluation and training" in found.steps[0].detail
    assert set(sizes(model).values()) == {16, 20, 24}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class NeedsTargets(Spare):
    """Cannot run in training mode without targets."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        if not self.training:
            return super().forward(x)
        if targets is None:
            raise ValueError("targets are missing")
        return F.cross_entropy(super().forward(x), targets)


def test_a_model_that_needs_targets_in_training_says_so() -> None:
    found = slimming.check(NeedsTargets())
    assert found.ok, str(found)
    assert "not tried in training mode" in found.steps[0].detail
    assert "targets are missing" in str(found)
    call = {"x": torch.zeros(2, 3, 16, 16), "targets": torch.tensor([1, 2])}
    found = slimming.check(NeedsTargets(), example_inputs=call)
    assert found.ok, str(found)
    assert "evaluation and training" in found.steps[0].detail
