"""The losses, by hand, and what tasks leave on the models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.errors import ConfigError
from slimming.training.config import TrainConfig
from slimming.training.distillation import DistilTask, MatchLoss, relation_error
from slimming.training.loop import fit
from slimming.training.optimisation import make_mixup
from slimming.training.tasks import ClassificationTask, LossTask, PenaltyTask

from .tiny import make_model, open_tiny, tiny_config, write_data

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 2, 1, 0])


class Fixed(nn.Module):
    """Gives the same output whatever the images are."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def logits(seed: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_classification() -> None:
    one, two = logits(1), logits(2)
    by_hand = -one.log_softmax(1)[range(4), LABELS].mean()
    smooth = 0.9 * by_hand - 0.1 * one.log_softmax(1).mean()
    torch.testing.assert_close(ClassificationTask().loss(Fixed(one), images(), LABELS)["loss"], by_hand)
    torch.testing.assert_close(ClassificationTask(0.1).loss(Fixed(one), images(), LABELS)["loss"], smooth)
    soft = logits(3).softmax(1)
    unsmoothed = -(soft * one.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ClassificationTask(0.1).loss(Fixed(one), images(), soft)["loss"], unsmoothed)
    both = ClassificationTask().loss(Fixed(one, two), images(), LABELS)["loss"]
    torch.testing.assert_close(both, (by_hand + F.cross_entropy(two, LABELS)) / 2)


def test_distillation_by_hand() -> None:
    student, teacher = logits(1), logits(2)
    task = DistilTask(Fixed(teacher), alpha=0.3, temperature=2.0)
    found = task.loss(Fixed(student), images(), LABELS)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean() * 4
    torch.testing.assert_close(found["teacher"], divergence)
    torch.testing.assert_close(found["loss"], 0.7 * F.cross_entropy(student, LABELS) + 0.3 * divergence)
    second = logits(3)
    apart = task.loss(Fixed(second, student), images(), LABELS)
    torch.testing.assert_close(apart["teacher"], divergence)
    torch.testing.assert_close(apart["labels"], F.cross_entropy(second, LABELS))


@pytest.mark.parametrize("pool", ["first", "mean"], ids=str)
def test_features(pool: str) -> None:
    student, teacher = make_model(1), make_model(2)
    task = DistilTask(teacher, features=("blocks.0", "blocks.1"), feature_weight=3.0, pool=pool)
    task.start(student, CPU)
    found = task.loss(student, images(), LABELS)
    task.stop()
    by_hand = []
    for index in (0, 1):
        outputs = [
            m.forward_intermediates(images(), indices=[index], return_prefix_tokens=True) for m in (student, teacher)
        ]  # type: ignore[operator]
        tokens = [torch.cat([prefix, grid.flatten(2).mT], 1) for _, [(grid, prefix)] in outputs]
        pooled = [t[:, 0] if pool == "first" else t.mean(1) for t in tokens]
        by_hand.append(F.mse_loss(*pooled))
    torch.testing.assert_close(found["features"], torch.stack(by_hand).mean())
    total = 0.5 * found["labels"] + 0.5 * found["teacher"] + 3.0 * found["features"]
    torch.testing.assert_close(found["loss"], total)
    for model in (student, teacher):
        assert not any(module._forward_hooks for module in model.modules())


def test_features_of_a_student_with_fewer_tokens() -> None:
    class Fewer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3]

    student, teacher = make_model(1), make_model(1)
    blocks = student.get_submodule("blocks")
    blocks[0] = nn.Sequential(Fewer(), blocks[0])  # type: ignore[index, operator]
    task = DistilTask(teacher, features=("blocks.1",))
    task.start(student, CPU)
    assert math.isfinite(task.loss(student, images(), LABELS)["features"].item())
    task.stop()


def test_distillation_refuses() -> None:
    with pytest.raises(ConfigError, match="alpha is 2"):
        DistilTask(make_model(), alpha=2)
    with pytest.raises(ConfigError, match="temperature is 0"):
        DistilTask(make_model(), temperature=0)
    with pytest.raises(ConfigError, match=r"pool is 'men'.* Did you mean 'mean'"):
        DistilTask(make_model(), pool="men")
    student, teacher = make_model(), make_model()
    task = DistilTask(teacher, features=("blocks.0", "block.1"))
    with pytest.raises(ConfigError, match=r"teacher has no module 'block\.1'.* Did you mean 'blocks\.1'"):
        task.start(student, CPU)
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
    with pytest.raises(ConfigError, match="teacher knows 5 classes, the student 3"):
        DistilTask(make_model(num_classes=5).eval()).loss(student, images(), LABELS)


def test_penalties_are_added_and_named() -> None:
    one = logits(1)
    task = PenaltyTask(ClassificationTask(), lambda: {"head_dim": torch.tensor(2.0), "mlp": torch.tensor(0.5)})
    found = task.loss(Fixed(one), images(), LABELS)
    assert list(found) == ["loss", "task", "head_dim", "mlp"]
    torch.testing.assert_close(found["loss"], F.cross_entropy(one, LABELS) + 2.5)
    torch.testing.assert_close(found["task"], F.cross_entropy(one, LABELS))


def test_a_distilled_run_does_not_change_the_teacher(tmp_path: Path) -> None:
    data = open_tiny(write_data(tmp_path))
    teacher, student = make_model(1), make_model(2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    history = fit(student, DistilTask(teacher, features=("blocks.1",)), data, tiny_config(steps=4), title=None)
    assert {"labels", "teacher", "features"} <= history.log[0].keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_matching_does_not_depend_on_how_a_batch_is_split() -> None:
    teacher, student = make_model(1, num_classes=0).eval(), make_model(2, num_classes=0).eval()
    shown = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    matching = MatchLoss(teacher, [shown[:4], shown[4:]])
    whole = matching(student, (shown, LABELS))
    parts = [matching(student, (part, LABELS)) for part in shown.split(1)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    mean = teacher(shown).mean(0).detach()
    torch.testing.assert_close(matching(Fixed(mean.expand(6, -1)), (shown, LABELS)).item(), 1.0)
    with pytest.raises(ConfigError, match="two or more that differ"):
        MatchLoss(teacher, [shown[:1]])


def test_a_loss_of_ones_own_is_one_function(tmp_path: Path) -> None:
    def own(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = model(batch[0]).square().mean()
        return {"loss": 2 * found, "half": found}

    history = fit(make_model(1), LossTask(own), open_tiny(write_data(tmp_path)), tiny_config(steps=2), title=None)
    assert all(line["loss"] == pytest.approx(2 * line["half"]) for line in history.log if "half" in line)
    assert any("half" in line for line in history.log)
    for wrong in (lambda model, batch: batch[0], lambda model, batch: {"half": batch[0].mean()}):
        with pytest.raises(ConfigError, match="an entry 'loss'"):
            LossTask(wrong).loss(make_model(1), images(), LABELS)


def test_mixup() -> None:
    assert make_mixup(TrainConfig(), 3, 7) is None
    with pytest.raises(ConfigError, match="make it even"):
        make_mixup(TrainConfig(mixup=0.2), 3, 7)
    mixup = make_mixup(TrainConfig(mixup=0.2, label_smoothing=0.1), 3, 4)
    assert mixup is not None
    _, targets = mixup(images(), LABELS)
    assert targets.shape == (4, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets.min() > 0.03


def test_relations_by_hand() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 12)
    by_hand = []
    for image in range(2):
        for head in range(3):
            one, other = student[image, :, 2 * head : 2 * head + 2], teacher[image, :, 4 * head : 4 * head + 4]
            q, p = (one @ one.T / 2**0.5).softmax(1), (other @ other.T / 4**0.5).softmax(1)
            by_hand.append((p * (p / q).log()).sum(1).mean())
    torch.testing.assert_close(relation_error(student, teacher, 3), torch.stack(by_hand).mean())
    assert relation_error(teacher, teacher, 5).item() == 0
    # Turned features relate alike, as long as every head is turned in itself.
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    assert relation_error(teacher @ turn, teacher, 1).item() == pytest.approx(0, abs=1e-6)
    assert relation_error(teacher @ turn, teacher, 3).item() > 1e-3


def test_relations_of_models_of_other_widths() -> None:
    student, teacher = make_model(1), make_model(2, embed_dim=32, num_heads=4)
    names = ("blocks.0.attn.qkv", "blocks.1")
    task = DistilTask(teacher, relations=names, relation_weight=2.0, relation_heads=3)
    task.start(student, CPU)
    found = task.loss(student, images(), LABELS)
    task.stop()
    assert found["relations"].item() > 0
    torch.testing.assert_close(found["loss"], 0.5 * found["labels"] + 0.5 * found["teacher"] + 2.0 * found["relations"])
    found["loss"].backward()
    assert student.get_parameter("blocks.0.attn.qkv.weight").grad is not None
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
    # Its own teacher relates like itself.
    task = DistilTask(student, relations=names)
    task.start(student.eval(), CPU)
    assert task.loss(student, images(), LABELS)["relations"].item() == pytest.approx(0, abs=1e-6)
    task.stop()


def test_relations_of_the_tokens_that_are_left() -> None:
    class Fewer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, [0, 2, 4]]

    student, teacher = make_model(1).eval(), make_model(1).eval()
    blocks = student.get_submodule("blocks")
    blocks[1] = nn.Sequential(Fewer(), blocks[1])  # type: ignore[index, operator]
    asked = {"relations": ("blocks.1",), "relation_heads": 2}
    task = DistilTask(teacher, **asked)  # type: ignore[arg-type]
    task.start(student, CPU)
    with pytest.raises(ConfigError, match=r"blocks.1 need the same tokens.*\(4, 3, 16\), the teacher \(4, 5, 16\)"):
        task.loss(student, images(), LABELS)
    task.stop()
    found = []
    for places in ([0, 2, 4], [0, 1, 3]):
        task = DistilTask(teacher, **asked, places={"blocks.1": torch.tensor(places)})  # type: ignore[arg-type]
        task.start(student, CPU)
        found.append(task.loss(student, images(), LABELS)["relations"].item())
        task.stop()
    assert found[0] < found[1]


def test_relations_refuse() -> None:
    with pytest.raises(ConfigError, match="relation_heads is 0"):
        DistilTask(make_model(), relation_heads=0)
    task = DistilTask(make_model(), relations=("block.1",))
    with pytest.raises(ConfigError, match=r"teacher has no module 'block\.1'"):
        task.start(make_model(), CPU)
    task = DistilTask(make_model(), relations=("blocks.1",), relation_heads=17)
    student = make_model()
    task.start(student, CPU)
    with pytest.raises(ConfigError, match=r"relation_heads is 17, but blocks.1 gives 16 features"):
        task.loss(student, images(), LABELS)
    task.stop()

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :3], x[:, 3:]

    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, images: Tensor) -> Tensor:
            return self.pair(images.flatten(1))[0]

    task = DistilTask(Paired(), features=("pair",))
    task.start(Paired(), CPU)
    with pytest.raises(ConfigError, match="pair of the teacher gives tuple, not one tensor"):
        task.loss(Paired(), images(), LABELS)
    task.stop()


def test_relations_of_large_outputs_are_finite_in_half_precision() -> None:
    torch.manual_seed(0)
    one, other = 300 * torch.randn(2, 2, 5, 24)
    expected = relation_error(one, other, 3)
    with torch.autocast("cpu", dtype=torch.float16):
        found = relation_error(one, other, 3)
    assert torch.isfinite(expected)
    assert found == expected


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "plain"])
def test_each_head_of_a_model_with_a_distillation_token_has_its_own_lesson(distilled: bool) -> None:
    """The class head learns the labels, the distillation head the teacher; in evaluation they speak together."""
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model: Any = timm.create_model("deit_tiny_distilled_patch16_224", **sizes, num_classes=3)
    teacher = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=3)
    task = DistilTask(teacher, alpha=1.0) if distilled else ClassificationTask()
    task.start(model, torch.device("cpu"))
    assert len(model.train()(torch.randn(2, 3, 16, 16))) == 2
    task.loss(model, torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))["loss"].backward()
    assert model.head_dist.weight.grad.abs().sum() > 0
    assert (model.head.weight.grad.abs().sum() > 0) != distilled
    assert model.eval()(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    task.stop()
    assert model.train()(torch.randn(2, 3, 16, 16)).shape == (2, 3)
