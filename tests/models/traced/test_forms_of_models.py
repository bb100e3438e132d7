"""Models in forms that public code has: each goes the whole way in float64, or is refused with what mends it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import ResNet, resnet
from torchvision.models.feature_extraction import create_feature_extractor

import slimming
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.counting.measured import count
from slimming.errors import UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.models.traced.verification import outputs, randomise_
from slimming.pruning.checks import distance

EXACT = 1e-9


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.image_size = 16
        self.conv1, self.norm1 = nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.norm1(self.conv1(x)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class TwoNames(Net):
    """Its layers are registered once more, as nnU-Net does with the parts of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.all_modules = nn.Sequential(self.conv1, self.norm1)
        self.second = nn.Sequential(self.conv2, self.norm2)


@dataclass
class Scores:
    logits: Tensor
    aside: dict[str, Any]


class InDataclass(Net):
    """Returns a dataclass that torch's trees do not know."""

    def forward(self, x: Tensor) -> Scores:
        logits = super().forward(x)
        return Scores(logits=logits, aside={"classes": logits.argmax(1), "name": "net"})


class ChoosesInEvaluation(Net):
    """Returns logits in training mode and classes in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.training else logits.argmax(1)


class SpaceToDepth(Net):
    """Its first convolution reads a rearranged image."""

    def __init__(self) -> None:
        super().__init__(12)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return super().forward(torch.cat(parts, 1))


class DecoderFirst(nn.Module):
    """Registers a layer of its decoder before the one that reads the image."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.decoder, self.stem = nn.Conv2d(16, 2, 1), nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.stem(x).relu())


class Embedding(Net):
    """Returns embeddings of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=1)


class Volumes(nn.Module):
    """Reads volumes (B, 1, depth, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv3d(1, 8, 3), nn.Conv3d(8, 12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3, 4)))


class Signals(nn.Module):
    """Reads signals (B, 2, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 12, 3)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.norm(self.conv1(x)).relu()).relu().mean(2))


class TwoInputs(Net):
    """Takes an image and a mask by keyword."""

    def forward(self, image: Tensor, *, mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(image * mask)


def graph() -> nn.Module:
    model: Any = fx.symbolic_trace(Net().eval())
    model.image_size = 16
    return model


def feature_extractor() -> nn.Module:
    model: Any = create_feature_extractor(_resnet(), {"layer1": "low", "layer2": "high"})
    model.image_size = 32
    return model


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def given(make: Callable[[], nn.Module], example_inputs: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model: Any = make()
        model.example_inputs = example_inputs
        return model

    return made


FORMS: dict[str, Callable[[], nn.Module]] = {
    "layers with two names": TwoNames,
    "dataclass output": InDataclass,
    "argmax in evaluation": ChoosesInEvaluation,
    "space to depth": SpaceToDepth,
    "decoder first": DecoderFirst,
    "embeddings of length 1": Embedding,
    "graph module": graph,
    "feature extractor": feature_extractor,
    "volumes": given(Volumes, torch.zeros(1, 1, 8, 9, 10)),
    "signals": given(Signals, torch.zeros(2, 2, 20)),
    "two inputs": given(TwoInputs, {"image": torch.zeros(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)}),
}


def example(model: Any) -> Any:
    """Two random inputs of a model."""
    inputs = getattr(model, "example_inputs", None)
    if inputs is None:
        inputs = torch.zeros(1, 3, model.image_size, model.image_size)

    def random(tensor: Tensor) -> Tensor:
        return torch.randn(2, *tensor.shape[1:], dtype=torch.float64)

    return {name: random(each) for name, each in inputs.items()} if isinstance(inputs, dict) else random(inputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_goes_the_whole_way(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FORMS[form]().double()
    randomise_(model)
    call = example(model)
    groups = slimming.describe(model)
    assert len(groups) >= 1

    masks = slimming.attach(model, groups)
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(0.3 + torch.rand(mask.shape, dtype=torch.float64))
    plan = slimming.plan(masks, slimming.Budget(keep={group.kind: 0.5 for group in groups}), layout=FREE, score="mask")
    masks.apply_(plan)
    slim = slimming.cut(model, plan)
    training = form.startswith("argmax")
    for each in (model, slim):
        each.train(training)
    expected = outputs(model, call)
    assert distance(expected, outputs(slim, call)) <= EXACT
    masks.detach_()
    assert distance(outputs(model, call), expected) > 1e-4

    formula = slimming.cost(model, plan)
    assert formula.macs < 0.7 * slimming.cost(model).macs
    if isinstance(call, Tensor):
        counted = count(slim, call.shape[1:])
        assert (formula.params, formula.macs) == (counted.params, counted.macs)

    slimming.save(slim, tmp_path / "slim")
    again = slimming.load(tmp_path / "slim", dense=model).train(training)
    assert torch.equal(outputs(again, call)[0], outputs(slim, call)[0])
    found = slimming.check(model)
    assert found.ok, str(found)


SCORED = ("layers with two names", "dataclass output", "space to depth", "embeddings of length 1", "graph module")


@pytest.mark.parametrize(
    "form", [form for form in SCORED if form not in ("decoder first", "feature extractor")], ids=str
)
def test_a_form_is_scored_and_compensated(form: str) -> None:
    torch.manual_seed(0)
    model = FORMS[form]()
    images = [torch.randn(8, 3, 16, 16)]
    scored = slimming.score(model, images)
    plan = slimming.plan(scored, slimming.Budget(macs=0.6))
    slim = slimming.cut(scored.model, plan, images=scored.images)
    assert slimming.cost(slim).macs <= 0.6 * slimming.cost(model).macs
    dense, found = (outputs(each.eval(), images[0])[0] for each in (model, slim))
    assert found.shape == dense.shape


def test_the_copy_of_a_graph_module_keeps_what_was_set_on_it() -> None:
    model = feature_extractor().eval()
    copied = prunable(model).copy().model
    assert copied.image_size == 32
    assert not copied.training
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(copied(x)["high"], model(x)["high"])


def test_a_copy_of_a_slim_graph_module_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = graph()
    groups = slimming.describe(model, example_inputs=torch.zeros(1, 3, 16, 16))
    plan = Plan(kept={group.name: (0, 1, 2) for group in groups}, sizes={group.name: group.size for group in groups})
    slim = copy.deepcopy(slimming.cut(model, plan))
    assert [group.size for group in slimming.describe(slim)] == [3, 3]
    slimming.save(slim, tmp_path / "slim")
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(slimming.load(tmp_path / "slim", dense=graph())(x), slim.eval()(x))


def test_graph_modules_of_other_graphs_are_read_anew() -> None:
    class Skips(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu() + 1).amax((2, 3)))

    class Returns(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.norm1(self.conv1(x)).relu()
            return x, self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))

    sizes = []
    for cls in (Net, Skips, Returns):
        model: Any = fx.symbolic_trace(cls().eval())
        model.image_size = 16
        sizes.append([group.name for group in slimming.describe(model)])
    assert sizes == [["conv1.channels", "conv2.channels"]] * 2 + [["conv2.channels"]]


@pytest.mark.parametrize("cls", [Volumes, Signals], ids=["volumes", "signals"])
def test_an_input_that_is_no_image_is_asked_for(cls: type[nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"does not read images.*example_inputs=torch.randn\(1, "):
        slimming.describe(cls())


def test_example_inputs_are_kept_with_the_model() -> None:
    model = Volumes()
    groups = slimming.describe(model, example_inputs=torch.zeros(1, 1, 8, 9, 10))
    assert [group.size for group in groups] == [8, 12]
    assert prunable(model).anatomy.input_shape == (1, 8, 9, 10)
    assert slimming.cost(model).macs == count(model, (1, 8, 9, 10)).macs
    found = slimming.check(Signals(), example_inputs=(torch.zeros(1, 2, 20),))
    assert found.ok, str(found)
    assert slimming.attach(TwoInputs(), example_inputs=FORMS["two inputs"]().example_inputs)[
        "conv1.channels"
    ].shape == (16,)
    for wrong in ("image", [], [3], [{"ids": torch.zeros(1, 3, dtype=torch.int64)}]):
        with pytest.raises(slimming.errors.ConfigError, match="example_inputs"):
            slimming.describe(Volumes(), example_inputs=wrong)


class Chooses(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def test_an_output_of_integers_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no floating-point tensor.*argmax"):
        slimming.describe(Chooses())


def _normed(norm: Callable[[nn.Module], object]) -> Net:
    model = Net()
    norm(model.conv2)
    return model


NORMS: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "spectral norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "weight norm as a parametrization": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral norm as a parametrization": (parametrizations.spectral_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "pruned in place": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_a_computed_weight_is_named_with_the_call_that_removes_it(norm: str) -> None:
    apply, removal = NORMS[norm]
    with pytest.raises(UnsupportedModelError, match=rf"weight of conv2.*call torch\.nn\.utils\.\S*{removal}"):
        slimming.describe(_normed(apply))


class Longer(Net):
    """Has a part beside the normed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x).relu())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_rest_of_a_model_with_a_computed_weight_is_cut(norm: str) -> None:
    apply, _ = NORMS[norm]
    model = Longer()
    apply(model.conv2)
    found = slimming.check(model)
    assert found.ok, str(found)
    assert [group.name for group in slimming.describe(model)] == ["stem.channels"]
    assert "apply it again to the slim model" in str(found)


def test_after_the_removal_of_a_weight_norm_all_is_cut() -> None:
    model = _normed(parametrizations.weight_norm)
    nn.utils.parametrize.remove_parametrizations(model.conv2, "weight")
    found = slimming.check(model)
    assert found.ok, str(found)
    assert len(slimming.describe(model)) == 2


def _qat() -> nn.Module:
    model: Any = Net().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


def _fx_qat() -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx

    mapping = get_default_qat_qconfig_mapping("fbgemm")
    return quantize_fx.prepare_qat_fx(Net().train(), mapping, (torch.randn(1, 3, 16, 16),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [_qat, _fx_qat], ids=["eager", "fx"])
def test_a_model_prepared_for_quantization_is_cut_before(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"prepared for quantization.*Cut the model before"):
        slimming.describe(make())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["TorchScript", r"torch\.export"], ids=["script", "export"])
def test_a_program_with_fixed_shapes_is_named(kind: str) -> None:
    model = Net().eval()
    program: Any = (
        torch.jit.trace(model, torch.randn(1, 3, 16, 16))
        if kind == "TorchScript"
        else torch.export.export(model, (torch.randn(1, 3, 16, 16),)).module()
    )
    with pytest.raises(UnsupportedModelError, match=f"{kind}.*give the nn.Module that it was made from"):
        slimming.describe(program)
