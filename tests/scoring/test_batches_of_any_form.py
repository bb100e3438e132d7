"""Scores and compensation of models that take more than a tensor of images: dicts, lists of images, targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from slimming.core.example_inputs import ExampleCall
from slimming.errors import ConfigError, DataError
from slimming.models.decisions import SameDecisions


class Segmenter(nn.Module):
    """Two inputs by name, two outputs; the second input scales the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.ReLU())
        self.classes, self.depth = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        x = pixel_values if pixel_mask is None else pixel_values * pixel_mask[:, None]
        x = self.body(x)
        found = {"logits": self.classes(x), "predicted_depth": self.depth(x)[:, 0]}
        return found if labels is None else {"loss": F.cross_entropy(found["logits"], labels), **found}


def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter().eval()


def batch(images: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(images)
    return {
        "pixel_values": torch.randn(images, 3, 8, 8, generator=generator),
        "pixel_mask": torch.ones(images, 8, 8, dtype=torch.int64),
        "labels": torch.randint(4, (images, 8, 8), generator=generator),
    }


def example() -> dict[str, Tensor]:
    return {name: tensor[:1] for name, tensor in batch().items() if name != "labels"}


def test_batches_are_the_arguments_of_the_model() -> None:
    model = segmenter()
    slimming.describe(model, example_inputs=example())
    named = slimming.score(model, [batch()])
    assert [(output.name, output.kind) for output in named.outputs] == [
        ("logits", "values"),
        ("predicted_depth", "values"),
    ]
    plan = slimming.plan(named, slimming.Budget(macs=0.7))
    small = slimming.cut(named.model, plan, images=named.images)
    assert small(**batch())["loss"].shape == ()
    single = segmenter()
    single.image_size = 8  # type: ignore[assignment]
    plain = slimming.score(single, [batch()["pixel_values"]])
    for name, scores in plain.scores.items():
        torch.testing.assert_close(scores, named.scores[name])


def test_a_loss_gets_the_batch_as_it_was_given_one_image_at_a_time() -> None:
    model, seen = segmenter(), []
    slimming.describe(model, example_inputs=example())

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append({name: tensor.shape for name, tensor in batch.items()})
        return model(**batch)["loss"]

    scored = slimming.score(model, [batch()], how="fisher", loss=loss)
    assert len(seen) == 3
    assert seen[0] == {"pixel_values": (1, 3, 8, 8), "pixel_mask": (1, 8, 8), "labels": (1, 8, 8)}
    assert all(float(scores.sum()) > 0 for scores in scored.scores.values())


def test_a_loader_of_images_and_targets_is_read_until_there_are_enough() -> None:
    model = segmenter()
    model.image_size = 8  # type: ignore[assignment]
    read: list[int] = []

    def loader() -> Any:
        for number in range(100):
            read.append(number)
            yield batch()["pixel_values"], batch()["labels"]

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0])["logits"], pair[1])

    scored = slimming.score(model, loader(), images=6, how="fisher", loss=loss)
    assert len(read) == 2
    assert [tuple(images.shape) for images in scored.images] == [(3, 3, 8, 8)] * 2
    assert slimming.cut(scored.model, slimming.plan(scored, slimming.Budget(macs=0.7)), images=scored.images)


def test_outputs_are_chosen_by_a_function_or_by_modules() -> None:
    model = segmenter()
    slimming.describe(model, example_inputs=example())
    chosen = slimming.score(model, [batch()], how="fisher", outputs=lambda out: out["predicted_depth"])
    assert [(output.name, output.scale) for output in chosen.outputs] == [("output", 1.0)]
    modules = slimming.score(model, [batch()], how="fisher", outputs=["depth"])
    assert [output.name for output in modules.outputs] == ["depth"]
    for name, scores in chosen.scores.items():
        torch.testing.assert_close(scores, modules.scores[name])
    with pytest.raises(ConfigError, match="outputs names 'head', which is no module of this Segmenter"):
        slimming.score(model, [batch()], outputs=["head"])
    with pytest.raises(ConfigError, match="does not compare outputs; drop outputs"):
        slimming.score(model, [batch()], how="contribution", outputs=["depth"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "there is none"),
        ([{"pixel_mask": torch.ones(1, 8, 8, dtype=torch.int64)}], "no floating-point tensor"),
        ([{**batch(), "names": ["a", "b", "c"]}], "names.*Give the arguments that the model's forward takes"),
        ([torch.zeros(3, 8, 8)], r"this one has shape \(3, 8, 8\)"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "this is dict"),
    ],
    ids=["nothing", "no image", "an unknown argument", "no batch dimension", "one batch"],
)
def test_batches_that_the_model_does_not_take(given: Any, says: str) -> None:
    model = segmenter()
    slimming.describe(model, example_inputs=example())
    with pytest.raises(DataError, match=says):
        slimming.score(model, given)


def test_calls_are_split_by_image() -> None:
    call = ExampleCall.of(
        {"pixel_values": torch.randn(3, 3, 8, 8), "labels": [{"boxes": torch.ones(n, 4)} for n in (1, 3, 2)]}
    )
    first, last = call.split(2)
    assert (first.size, last.size) == (2, 1)
    assert [len(label["boxes"]) for label in first.kwargs["labels"]] == [1, 3]
    larger = call.with_batch(4)
    assert len(larger.main) == len(larger.kwargs["labels"]) == 4
    images = ExampleCall.of(([torch.randn(3, 8, 9), torch.randn(3, 7, 8)], [{"boxes": torch.ones(3, 4)}] * 2))
    assert [part.main.shape for part in images.split(1)] == [(3, 8, 9), (3, 7, 8)]
    assert images.with_batch(1).size == 1


def test_a_detector_of_torchvision_is_scored_by_what_its_heads_give() -> None:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    body: Any = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
    body.out_channels = 16
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    model = RetinaNet(body, 3, min_size=32, max_size=32, anchor_generator=anchors).eval()
    images = [torch.rand(3, 32, 30), torch.rand(3, 24, 32)]
    slimming.describe(model, example_inputs=(images[:1],))
    scored = slimming.score(model, [(images, "targets")], how="fisher")
    assert {output.name for output in scored.outputs} <= {"head.cls_logits", "head.bbox_regression"}
    assert any(float(scores.sum()) > 0 for scores in scored.scores.values())
    small = slimming.cut(scored.model, slimming.plan(scored, slimming.Budget(macs=0.7)), images=scored.images)
    assert set(small(images)[0]) == {"boxes", "scores", "labels"}


def test_another_model_selects_the_same() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7])
    decisions = SameDecisions()
    with decisions:
        values, chosen = scores.topk(2)
        kept = scores[scores > 0.6]
    with decisions:
        again, same = (1 - scores).topk(2)
        others = (1 - scores)[(1 - scores) > 0.6]
    assert chosen.tolist() == same.tolist() == [1, 3]
    torch.testing.assert_close(again, 1 - values)
    torch.testing.assert_close(others, 1 - kept)
