"""Which outputs of a model count: in scores, in matching, in training and in evaluation."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from slimming.cli import main as slimming_command
from slimming.errors import ConfigError, NonFiniteLossError
from slimming.training.distillation import MatchLoss
from slimming.training.samples import Data

Pair = namedtuple("Pair", ["label", "box"])


@dataclass
class Detected:
    scores: Tensor
    boxes: Tensor
    count: int = 1


def transformers_output(scores: Tensor, boxes: Tensor) -> Any:
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    return DetrObjectDetectionOutput(logits=scores, pred_boxes=boxes)  # type: ignore[arg-type]


WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda scores, boxes: (scores, boxes),
    "list": lambda scores, boxes: [scores, boxes],
    "named tuple": Pair,
    "dict": lambda scores, boxes: {"scores": scores, "boxes": boxes},
    "nested": lambda scores, boxes: {"heads": ({"scores": scores}, [boxes, None])},
    "dataclass": Detected,
    "transformers": transformers_output,
}
NAMES = {
    "tuple": ["0", "1"], "list": ["0", "1"], "named tuple": ["label", "box"], "dict": ["scores", "boxes"],
    "nested": ["heads.0.scores", "heads.1.0"], "dataclass": ["scores", "boxes"],
    "transformers": ["logits", "pred_boxes"],
}  # fmt: skip


class TwoHeads(nn.Module):
    """A small net with a branch for classes and a branch for boxes, of 24 units each."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.labels = nn.Sequential(nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 5))
        self.boxes = nn.Sequential(nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 4))
        self.give = give

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.give(self.labels(x), 100 * self.boxes(x))


def model_giving(give: Callable[[Tensor, Tensor], Any]) -> Any:
    torch.manual_seed(0)
    model: Any = TwoHeads(give).eval()
    model.pretrained_cfg = {"input_size": (3, 16, 16)}
    return model


def pictures(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["fisher", "compensated"], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_units_of_every_branch_have_a_score(way: str, how: str) -> None:
    if way == "transformers":
        pytest.importorskip("transformers")
    scored = slimming.score(model_giving(WAYS[way]), [pictures()], how=how)
    assert [output.name for output in scored.outputs] == NAMES[way]
    labels, boxes = scored.scores["labels.0.hidden"], scored.scores["boxes.0.hidden"]
    assert (boxes > 0).sum() >= 20  # a unit may be dead behind its ReLU
    assert (labels > 0).sum() >= 20
    assert 0.1 < float(boxes.mean() / labels.mean()) < 10  # although the boxes are a hundred times as large
    kept = slimming.plan(scored, slimming.Budget(params=0.5)).kept
    assert len(kept["boxes.0.hidden"]) >= 6
    assert len(kept["labels.0.hidden"]) >= 6


def test_the_scale_of_an_output_does_not_count() -> None:
    def scores(factor: float) -> dict[str, Tensor]:
        model = model_giving(lambda a, b: (a, factor * b))
        return dict(slimming.score(model, [pictures()], how="fisher").scores)

    small, large = scores(1e-3), scores(1e3)
    for name, score in small.items():
        torch.testing.assert_close(score, large[name], rtol=1e-3, atol=1e-9)


@torch.no_grad()
def test_the_record_names_kind_and_scale() -> None:
    scored = slimming.score(model_giving(transformers_output), [pictures()], how="fisher")
    logits, boxes = model_giving(WAYS["tuple"])(pictures())
    p = logits.softmax(1).double()
    divergence = float((p * (p.log() - p.mean(0).log())).sum(1).mean())
    spread = float(boxes.var(0, unbiased=False).sum())
    assert [(output.name, output.kind) for output in scored.outputs] == [
        ("logits", "classes"),
        ("pred_boxes", "values"),
    ]
    assert scored.outputs[0].scale ** 2 == pytest.approx(2 * divergence, rel=1e-3)
    assert scored.outputs[1].scale ** 2 == pytest.approx(spread, rel=1e-3)


def test_a_single_output_has_no_scale() -> None:
    for give in (lambda a, b: a, lambda a, b: {"scores": a, "best": b.argmax(1)}, lambda a, b: (a, a.view_as(a), None)):
        scored = slimming.score(model_giving(give), [pictures()], how="fisher")
        assert [output.scale for output in scored.outputs] == [1]
        assert float(scored.scores["labels.0.hidden"].sum()) > 0


def test_values_on_the_way_do_not_count() -> None:
    def give(scores: Tensor, boxes: Tensor) -> Any:
        return {
            "logits": scores, "pred_boxes": boxes, "hidden_states": (10 * scores, boxes * scores[:, :4]),
            "last_hidden_state": scores * 2, "encoder_attentions": (boxes * 2,), "past_key_values": ((scores * 3,),),
        }  # fmt: skip

    scored = slimming.score(model_giving(give), [pictures()], how="fisher")
    assert [output.name for output in scored.outputs] == ["logits", "pred_boxes"]
    encoder = slimming.score(
        model_giving(lambda a, b: {"last_hidden_state": a, "pooler_output": b, "hidden_states": (a * 2,)}),
        [pictures()],
        how="fisher",
    )
    assert [output.name for output in encoder.outputs] == ["last_hidden_state", "pooler_output"]


def test_constant_outputs_do_not_count() -> None:
    scored = slimming.score(model_giving(lambda a, b: (a, b, torch.ones_like(b))), [pictures()], how="fisher")
    assert [output.name for output in scored.outputs] == ["0", "1"]
    with pytest.raises(ConfigError, match="same for all images; give two images or more"):
        slimming.score(model_giving(lambda a, b: (a, b)), [pictures(1)], how="fisher")


def test_logits_of_queries_take_the_softmax_over_the_last_dimension() -> None:
    """The score of a factor on the logits is half the variance of the logits under the softmax over the classes."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU())
            self.classes = nn.Linear(16, 6 * 3)
            self.num_classes = 2  # and "nothing"

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.classes(self.body(x)).view(len(x), 6, 3)}

    torch.manual_seed(0)
    model: Any = Queries().eval()
    model.pretrained_cfg = {"input_size": (3, 4, 4)}
    x = torch.randn(256, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = slimming.score(model, [x], how="fisher").scores["body.3.hidden"]
    hidden = model.body(x).detach()
    logits = model.classes(hidden).view(-1, 6, 3).detach()
    # d logits / d factor of unit u = hidden[u] * weight[:, u]
    slopes = torch.einsum("bu,qku->bqku", hidden, model.classes.weight.detach().view(6, 3, 16))
    p = logits.softmax(-1)[..., None]
    variance = (p * slopes.square()).sum(2) - (p * slopes).sum(2).square()
    expected = variance.sum(1).mean(0) / 2
    ratio = found.sum() / expected.sum()
    assert 0.85 < float(ratio) < 1.15
    assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.95


def test_a_detector_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"], layer_type="basic"
    )
    config = transformers.DetrConfig(
        backbone_config=backbone, use_pretrained_backbone=False, use_timm_backbone=False, backbone=None,
        num_queries=5, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config).eval()
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scored = slimming.score(model, [images], how="fisher", rotate=False)
    assert [output.name for output in scored.outputs] == ["logits", "pred_boxes"]
    assert [output.kind for output in scored.outputs] == ["classes", "values"]
    boxes = [scores for name, scores in scored.scores.items() if name.startswith("bbox_predictor")]
    assert boxes
    assert all(float(scores.mean()) > 0 for scores in boxes)


def test_a_loss_of_your_own_counts_alone() -> None:
    def boxes_only(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0])[1].square().mean()

    for how in ("fisher", "compensated", "taylor"):
        scored = slimming.score(model_giving(WAYS["tuple"]), [pictures()], how=how, loss=boxes_only)
        assert scored.outputs == ()
        assert float(scored.scores["labels.0.hidden"].abs().sum()) < 1e-3 * float(scored.scores["boxes.0.hidden"].sum())
    with pytest.raises(ConfigError, match="does not use a loss"):
        slimming.score(model_giving(WAYS["tuple"]), [pictures()], how="contribution", loss=boxes_only)


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteLossError, match="outputs are not finite"):
        slimming.score(model_giving(lambda a, b: (a, b / 0)), [pictures()], how="fisher")


@pytest.mark.parametrize(
    "give",
    [lambda a, b: a.argmax(1), lambda a, b: {"count": 3}, lambda a, b: SimpleNamespace(scores=a), lambda a, b: a.sum()],
    ids=["integers", "number", "unknown object", "one number"],
)
def test_a_model_without_outputs_that_count(give: Callable[[Tensor, Tensor], Any]) -> None:
    from slimming.training.outputs import named_outputs

    with pytest.raises(ConfigError, match=r"no floating-point tensor .* Pass your own function as loss"):
        named_outputs(give(torch.randn(4, 5), torch.randn(4, 4)), 4)


@pytest.mark.parametrize("way", ["tuple", "dict", "dataclass"], ids=str)
def test_training_on_labels_needs_known_logits(way: str) -> None:
    images, labels = pictures(8), torch.arange(8) % 5
    data = Data([(images, labels)], [(images, labels)], tuple("abcde"))
    config = slimming.TrainConfig(steps=1, batch_size=8)
    names = ", ".join(rf"{name} \(8, {size}\)" for name, size in zip(NAMES[way], (5, 4), strict=True))
    message = rf"gives 2 outputs \({names}\), none of which is called logits.* Pass your own function as loss"
    for act in (
        lambda model: slimming.train(model, data, config),
        lambda model: slimming.search(model, data, slimming.SearchConfig(train=config)),
        lambda model: slimming.evaluate(model, data.val),
    ):
        with pytest.raises(ConfigError, match=message):
            act(model_giving(WAYS[way]))

    def own(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores, boxes = vars(model(batch[0])).values() if way == "dataclass" else list(model(batch[0]).values())
        return F.cross_entropy(scores, batch[1]) + boxes.square().mean()

    if way == "dict":
        assert slimming.train(model_giving(WAYS[way]), data, config, loss=own).steps == 1


def test_logits_among_other_outputs_are_those_of_the_classes() -> None:
    images, labels = pictures(8), torch.arange(8) % 5
    data = Data([(images, labels)], [(images, labels)], tuple("abcde"))
    model = model_giving(lambda a, b: {"box": b, "logits": a})
    assert slimming.train(model, data, slimming.TrainConfig(steps=1, batch_size=8)).steps == 1
    assert slimming.evaluate(model, data.val)["images"] == 8


def test_logits_of_queries_are_no_classes_of_images() -> None:
    images, labels = pictures(8), torch.arange(8) % 5
    data = Data([(images, labels)], [(images, labels)], tuple("abcde"))
    model = model_giving(lambda a, b: SimpleNamespace(logits=a[:, None].expand(-1, 3, -1)))
    with pytest.raises(ConfigError, match=r"logits of shape \(8, 3, 5\), the labels .*Pass your own function as loss"):
        slimming.train(model, data, slimming.TrainConfig(steps=1, batch_size=8))
    with pytest.raises(ConfigError, match=r"logits of shape \(8, 3, 5\), but top-1 needs one row per image"):
        slimming.evaluate(model, data.val)


@torch.no_grad()
def test_matching_compares_every_output() -> None:
    images = pictures(16)
    teacher, student = model_giving(WAYS["dict"]), model_giving(WAYS["dict"])
    matching = MatchLoss(teacher, [images[:8], images[8:]])
    batch = (images, torch.zeros(16, dtype=torch.int64))
    assert float(matching(student, batch)) == 0
    student.boxes[2].weight.zero_()
    error = float(matching(student, batch))
    assert 0.3 < error < 30  # the boxes are off by their own spread and more; their scale of 100 does not count
    with pytest.raises(ConfigError, match="as boxes, the student none; give a teacher"):
        matching(model_giving(lambda a, b: {"scores": a}), batch)


def test_a_search_scores_every_output_and_records_them() -> None:
    images = pictures(16)
    data = Data([(images, torch.arange(16) % 5)], [], tuple("abcde"))
    config = slimming.SearchConfig(
        train=slimming.TrainConfig(steps=0, batch_size=16), score="fisher", images=16, sensitivity=16
    )
    result = slimming.search(model_giving(transformers_output), data, config)
    assert "logits / " in result.scored_by
    assert "pred_boxes / " in result.scored_by
    assert float(result.scores["boxes.0.hidden"].mean()) > 0
    assert result.sensitivity is not None
    single = slimming.search(model_giving(lambda a, b: a), data, config)
    assert single.scored_by == "fisher"


def test_inspect_names_the_outputs_that_count(capsys: pytest.CaptureFixture[str]) -> None:
    slimming_command(["inspect", "test_vit", "--json"])
    assert json.loads(capsys.readouterr().out)["outputs"] == [{"name": "output", "shape": [1000], "kind": "classes"}]
