"""Small models of transformers, torchvision and torch: read, cut, save and load, and what stays whole is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import slimming
from slimming.core.budget import Budget
from slimming.core.layout import FREE
from slimming.demo import settings
from slimming.errors import CheckpointError, ConfigError, UnsupportedModelError
from slimming.masks.attachment import prunable, select_kinds
from slimming.models.create import create_dense, create_untrained
from slimming.models.hosts import classes_of, reset_classes_
from slimming.models.layers import SomeHeadsAttention
from slimming.models.traced.verification import outputs
from slimming.pruning.checks import EXACT, distance
from variants import FOLLOWED

try:
    import transformers
except ImportError:
    transformers = None

VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 96}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "num_encoder_blocks": 2}
PVT = {**STAGES, "mlp_ratios": [2, 2], "strides": [4, 2]}
FOUR = {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
CNN = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


@dataclass(frozen=True)
class Hosted:
    """A small model of transformers, by class and configuration, and the kinds of groups that it has."""

    cls: str
    config: str
    arguments: dict[str, Any]
    kinds: set[str] = field(default_factory=lambda: {"head_dim", "head", "mlp"})
    id: str = ""
    image: int = 0

    def make(self) -> nn.Module:
        arguments = {name: value() if callable(value) else value for name, value in self.arguments.items()}
        torch.manual_seed(0)
        model = getattr(transformers, self.cls)(getattr(transformers, self.config)(**arguments)).eval()
        if self.image:
            model.image_size = self.image
        return model


def _swin_four() -> Any:
    return transformers.SwinConfig(**{**SWIN, **FOUR, "num_heads": [2, 2, 4, 4]})


def _resnet() -> Any:
    return transformers.ResNetConfig(**CNN, out_features=["stage4"])


_DETR_SIZES = {"attention_heads": 4, "ffn_dim": 48}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "use_timm_backbone": False}
DETR |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _DETR_SIZES.items()}
TRANSFORMERS = (
    Hosted("ViTForImageClassification", "ViTConfig", {**VIT, **MLP}),
    Hosted("ViTModel", "ViTConfig", {**VIT, **MLP}),
    Hosted("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**VIT, **MLP}),
    Hosted("Dinov2ForImageClassification", "Dinov2Config", VIT),
    Hosted("Dinov2Model", "Dinov2Config", {**VIT, "use_swiglu_ffn": True}, id="Dinov2 SwiGLU"),
    Hosted("Dinov2Backbone", "Dinov2Config", {**VIT, "out_features": ["stage1", "stage2"]}),
    Hosted("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", VIT),
    Hosted("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, **MLP}),
    Hosted("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, **MLP, "use_gated_mlp": True}, id="DINOv3 gated"),
    Hosted("BeitForImageClassification", "BeitConfig", {**VIT, **MLP, "use_relative_position_bias": True}),
    Hosted("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VIT, **MLP}),
    Hosted("SiglipVisionModel", "SiglipVisionConfig", {**VIT, **MLP}),
    Hosted("SwinForImageClassification", "SwinConfig", SWIN),
    Hosted("Swinv2ForImageClassification", "Swinv2Config", SWIN),
    Hosted("PvtForImageClassification", "PvtConfig", {**PVT, "image_size": 32, "sequence_reduction_ratios": [2, 1]}),
    Hosted("PvtV2ForImageClassification", "PvtV2Config", {**PVT, "image_size": 32, "sr_ratios": [2, 1]}),
    Hosted(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**PVT, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "decoder_hidden_size": 24},
        {"head_dim", "head", "mlp", "channel"},
        image=32,
    ),
    Hosted("YolosForObjectDetection", "YolosConfig", {**VIT, **MLP, "image_size": [32, 32], "num_detection_tokens": 5}),
    Hosted(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {
            "backbone_config": _swin_four,
            "hidden_size": 16,
            "pool_scales": [1, 2],
            "auxiliary_channels": 16,
            "auxiliary_in_channels": 96,
        },
        {"head_dim", "head", "mlp", "channel"},
    ),
    Hosted(
        "DetrForObjectDetection",
        "DetrConfig",
        {**DETR, "backbone_config": _resnet},
        {"head_dim", "head", "mlp", "channel"},
        image=64,
    ),
    Hosted("ResNetForImageClassification", "ResNetConfig", CNN, {"channel"}, image=32),
    Hosted(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
        {"mlp"},
    ),
)
needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")


def _vision_transformer(**arguments: Any) -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
    return torchvision.models.VisionTransformer(**{**sizes, **arguments}, num_classes=5)


def _swin(**arguments: Any) -> nn.Module:
    sizes = {"patch_size": [2, 2], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return _sized(torchvision.models.SwinTransformer(**sizes, num_classes=5, **arguments), 32)


def _maxvit() -> nn.Module:
    model = torchvision.models.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )
    return _sized(model, 32)


def _sized(model: Any, size: int) -> nn.Module:
    model.image_size = size
    return model


def _encoder(**arguments: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, **{"batch_first": True, **arguments})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=bool(arguments.get("batch_first", True)))


def _named(name: str, size: int = 64, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: _sized(torchvision.models.get_model(name, num_classes=7, **arguments), size)


TORCH: dict[str, tuple[Callable[[], nn.Module], set[str], str]] = {
    "vision transformer": (_vision_transformer, {"head_dim", "head", "mlp"}, "own"),
    "swin": (_swin, {"head_dim", "head", "mlp"}, "own"),
    "swin v2": (
        lambda: _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        {"head_dim", "head", "mlp"},
        "own",
    ),
    "maxvit": (_maxvit, {"head_dim", "head", "mlp", "channel"}, "own"),
    "encoder": (_encoder, {"head_dim", "head", "mlp"}, "own"),
    "encoder, norm first, no bias": (
        lambda: _encoder(norm_first=True, bias=False, activation="gelu", batch_first=False),
        {"head_dim", "head", "mlp"},
        "own",
    ),
    "resnet18": (_named("resnet18"), {"channel"}, "torchvision"),
    "mobilenet_v3_small": (_named("mobilenet_v3_small"), {"channel", "mlp"}, "torchvision"),
    "mnasnet0_5": (_named("mnasnet0_5"), {"channel"}, "torchvision"),
    "squeezenet1_1": (_named("squeezenet1_1"), {"channel"}, "torchvision"),
}
SLOW: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vgg11_bn", {}),
    ("densenet121", {}),
    ("mobilenet_v2", {}),
    ("efficientnet_b0", {}),
    ("regnet_y_400mf", {}),
    ("convnext_tiny", {}),
    ("googlenet", {"init_weights": False}),
    ("inception_v3", {"init_weights": False}),
    ("shufflenet_v2_x0_5", {}),
)


LONG = {"swin v2", "mnasnet0_5", "resnet18", "UperNetForSemanticSegmentation", "Swinv2ForImageClassification"}
"""Models that take seconds, whose kinds of layers others have too."""
WIDE = {
    *("ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification"),
    *("SwinForImageClassification", "Swinv2ForImageClassification", "PvtForImageClassification"),
    *("PvtV2ForImageClassification", "ConvNextForImageClassification"),
    *("SegformerForSemanticSegmentation", "UperNetForSemanticSegmentation"),
    *("vision transformer", "swin", "swin v2", "maxvit"),
}
"""Models whose embedding width is not their output, and can go."""
FLAT = {
    *("ViTForImageClassification", "ViTModel", "DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification"),
    *("Dinov2 SwiGLU", "Dinov2WithRegistersModel", "DINOv3ViTModel", "DINOv3 gated", "BeitForImageClassification"),
    *("CLIPVisionModelWithProjection", "SiglipVisionModel", "PvtForImageClassification"),
    *("vision transformer", "encoder"),
}
"""Models with blocks that pass one sequence of tokens on."""
WITHOUT_ADDITIONS = {"squeezenet1_1"}
"""Models without residual branches."""
PARTLY_FOLLOWED = {"Dinov2 SwiGLU", "BeitForImageClassification"}


def kinds_by_name(name: str) -> set[str]:
    """The kinds beside those that the tables name."""
    absent = {"width": name not in WIDE, "token": name not in FLAT, "block": name in WITHOUT_ADDITIONS}
    return {kind for kind, is_absent in absent.items() if not is_absent}


@needs_transformers
@pytest.mark.parametrize(
    "hosted",
    [
        pytest.param(
            hosted,
            marks=[
                *([FOLLOWED] if (hosted.id or hosted.cls) in PARTLY_FOLLOWED else []),
                *([pytest.mark.slow] if hosted.cls in LONG else []),
            ],
        )
        for hosted in TRANSFORMERS
    ],
    ids=lambda hosted: hosted.id or hosted.cls,
)
def test_models_of_transformers_keep_the_contract(hosted: Hosted) -> None:
    model = hosted.make()
    found = slimming.check(model)
    assert found.ok, str(found)
    assert set(found.kinds) == hosted.kinds | kinds_by_name(hosted.id or hosted.cls)
    assert prunable(model).anatomy.structure.base["host"] == "transformers"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in TORCH], ids=str
)
def test_models_of_torch_keep_the_contract(name: str) -> None:
    make, kinds, host = TORCH[name]
    model = make().eval()
    found = slimming.check(model)
    assert found.ok, str(found)
    assert set(found.kinds) == kinds | kinds_by_name(name)
    assert prunable(model).anatomy.structure.base["host"] == host


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), SLOW, ids=[name for name, _ in SLOW])
def test_large_models_of_torchvision_keep_the_contract(name: str, arguments: dict[str, Any]) -> None:
    model = _named(name, 96 if name == "inception_v3" else 64, **arguments)().eval()
    found = slimming.check(model)
    assert found.ok, str(found)
    assert prunable(model).anatomy.structure.base["host"] == "torchvision"


def half(model: nn.Module) -> nn.Module:
    """``model`` with half of each kind of units."""
    groups = select_kinds(slimming.describe(model))
    budget = Budget(keep=dict.fromkeys({group.kind for group in groups}, 0.5))
    masks = slimming.attach(model)
    plan = slimming.plan(masks, budget, layout=FREE)
    masks.detach_()
    return slimming.cut(model, plan)


FRESH = """
import sys, torch, slimming
from pathlib import Path
from slimming.models.traced.verification import outputs
torch.set_num_threads(1)
place, *names = Path(sys.argv[1]), *sys.argv[2:]
image = torch.load(place / "image.pt")
for name in names:
    model = slimming.load(place / name)
    torch.save([out.detach() for out in outputs(model, image)], place / f"{name}.pt")
"""


@needs_transformers
def test_slim_models_of_other_hosts_load_in_a_new_process(tmp_path: Path) -> None:
    made = {"transformers": TRANSFORMERS[0].make(), "torchvision": TORCH["squeezenet1_1"][0]().eval()}
    slims = {name: half(model).double() for name, model in made.items()}
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for name, slim in slims.items():
        slimming.save(slim, tmp_path / name)
    torch.save(image, tmp_path / "image.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path), *slims], check=True)
    for name, slim in slims.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert distance(found, outputs(slim, image)) <= EXACT, name


@needs_transformers
def test_a_slim_model_keeps_its_labels_and_is_read_and_cut_again(tmp_path: Path) -> None:
    model: Any = half(TRANSFORMERS[0].make())
    model.classifier = nn.Linear(48, 3)
    model.config.id2label = {0: "cat", 1: "dog", 2: "hen"}
    slimming.save(model, tmp_path / "slim")
    again: Any = slimming.load(tmp_path / "slim")
    assert again.config.id2label == model.config.id2label
    assert sum(group.kind == "head" for group in slimming.describe(again)) == 2
    assert slimming.check(again).ok


@needs_transformers
def test_a_name_in_a_checkpoint_leads_to_models_only() -> None:
    from slimming.models.traced.rebuild import build

    base = prunable(TRANSFORMERS[0].make()).anatomy.structure.base
    for wrong in ({"name": "pipeline"}, {"config_class": "AutoModel"}, {"name": "Nowhere"}):
        with pytest.raises(CheckpointError, match="there is no"):
            build({**base, **wrong})


@needs_transformers
def test_a_model_that_takes_more_than_an_image_says_so_and_is_read_in_a_wrapper() -> None:
    sizes = {name: size for name, size in (VIT | MLP).items() if name != "image_size"}
    inner = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(num_patches=16, **sizes)).eval()
    with pytest.raises(UnsupportedModelError, match="wrap it in a module"):
        slimming.describe(inner)

    class Patches(nn.Module):
        image_size = 32

        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: Tensor) -> Any:
            patches = nn.functional.unfold(image, 8, stride=8).transpose(1, 2)
            mask = torch.ones(patches.shape[:2], dtype=torch.int64)
            return self.inner(patches, mask, torch.tensor([[4, 4]] * len(image)))

    found = slimming.check(Patches().eval())
    assert found.ok, str(found)
    assert found.kinds["head"] == 3


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_attention_with_some_heads_takes_what_torchs_takes(batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    ours: Any = nn.MultiheadAttention(24, 3, batch_first=batch_first).double()
    theirs = nn.MultiheadAttention(24, 3, batch_first=batch_first).double()
    theirs.load_state_dict(ours.state_dict())
    ours.__class__ = SomeHeadsAttention
    shape = (2, 5, 24) if batch_first else (5, 2, 24)
    x = torch.randn(shape, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    each = torch.randn(6, 5, 5, dtype=torch.float64)
    for masks in ({}, {"attn_mask": causal}, {"key_padding_mask": padding}, {"attn_mask": each}):
        for average in (True, False):
            given = {**masks, "need_weights": need_weights, "average_attn_weights": average}
            for one, other in zip(ours(x, x, x, **given), theirs(x, x, x, **given), strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.allclose(one, other, atol=1e-12)
    single = x[0] if batch_first else x[:, 0]
    assert torch.allclose(ours(single, single, single)[0], theirs(single, single, single)[0], atol=1e-12)


def test_a_cut_encoder_takes_padded_sequences_in_evaluation() -> None:
    model = half(_encoder().eval())
    x = torch.randn(2, 6, 32)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model(x, src_key_padding_mask=padding)
    assert torch.allclose(fast[0], slow[0], atol=1e-5)
    assert torch.allclose(fast[1, :4], slow[1, :4], atol=1e-5)


@pytest.mark.slow
def test_auxiliary_heads_go_with_what_they_read() -> None:
    model: Any = half(_named("googlenet", init_weights=False)().eval()).train()
    assert all(out.shape == (2, 7) for out in model(torch.randn(2, 3, 64, 64)))


def test_models_of_one_class_with_other_strides_have_readings_of_their_own() -> None:
    def net(stride: tuple[int, int]) -> nn.Module:
        layers = nn.Conv2d(3, 8, 3, stride, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.AdaptiveAvgPool2d(1)
        return _sized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2)).eval(), 32)

    whole, half_high, halved = (slimming.cost(net(stride)).macs for stride in ((1, 1), (2, 1), (2, 2)))
    assert whole == 32 * 32 * 9 * (3 * 8 + 8 * 8) + 16
    assert half_high == 16 * 32 * 9 * (3 * 8 + 8 * 8) + 16
    assert halved == 16 * 16 * 9 * (3 * 8 + 8 * 8) + 16


def test_a_second_model_of_torchvision_is_saved_with_its_own_names_and_normalisation(tmp_path: Path) -> None:
    for name, mean in (("cat", (0.1, 0.2, 0.3)), ("dog", (0.4, 0.5, 0.6))):
        model: Any = TORCH["squeezenet1_1"][0]().eval()
        model.pretrained_cfg = {"label_names": [name] * 7, "mean": mean}
        slimming.save(model, tmp_path / name)
        again: Any = slimming.load(tmp_path / name)
        assert again.pretrained_cfg["mean"] == mean
        assert list(again.pretrained_cfg["label_names"]) == [name] * 7


@needs_transformers
@pytest.mark.parametrize("name", ["DeiT", "Levit"], ids=str)
def test_both_classifiers_of_a_model_with_a_distillation_head_are_replaced(name: str) -> None:
    sizes = {**VIT, **MLP} if name == "DeiT" else {"image_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, num_labels=3)
    model: Any = getattr(transformers, f"{name}ForImageClassificationWithTeacher")(config).eval()
    reset_classes_(model, 5)
    size = config.image_size
    assert model(torch.randn(2, 3, size, size)).logits.shape == (2, 5)
    assert classes_of(model) == 5


def test_a_last_layer_that_does_not_give_the_classes_is_not_replaced() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 8))
    model.num_classes = 3
    with pytest.raises(
        UnsupportedModelError, match="has 3 classes, but its last layer '1' has another number of outputs"
    ):
        reset_classes_(model, 5)
    assert model[0].out_features == 3


@needs_transformers
def test_a_checkpoint_in_half_precision_is_opened_in_float32_and_one_of_ones_own_is_judged(tmp_path: Path) -> None:
    TRANSFORMERS[0].make().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    name = f"transformers:{tmp_path}/half"
    assert create_dense(name)[0].dtype == torch.float32
    assert create_untrained(name).dtype == torch.float32
    assert create_dense(name, arguments={"dtype": torch.bfloat16})[0].dtype == torch.bfloat16
    assert next(slimming.load(tmp_path / "half").parameters()).dtype == torch.float32
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    data = slimming.open_data(images, model)
    model.to(torch.bfloat16)
    assert slimming.evaluate(model, data.val)["images"] == 8
    for do in (slimming.train, slimming.search):
        with pytest.raises(ConfigError, match=r"weights are bfloat16.*call model\.float\(\)"):
            do(model, data)
