"""The difference of a student's outputs from a teacher's: 0 for the same outputs, and told apart by kind."""

from __future__ import annotations

import pytest
import torch

from slimming.errors import ConfigError
from slimming.training.distillation import output_difference

BOXES = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("classes", [3, 4], ids=["softmax with an entry for nothing", "yes or no for each class"])
def test_the_same_outputs_do_not_differ_and_others_do(classes: int) -> None:
    wanted = {"logits": LOGITS, "pred_boxes": BOXES}
    assert output_difference(wanted, wanted, classes).abs() < 1e-6
    for name in wanted:
        other = {**wanted, name: wanted[name].flip(0).requires_grad_()}
        found = output_difference(other, wanted, classes)
        assert found > 0.01
        found.backward()
        assert other[name].grad is not None


def test_a_constant_added_to_logits_of_a_softmax_changes_nothing() -> None:
    wanted, shifted = {"logits": LOGITS}, {"logits": LOGITS + 3}
    assert output_difference(shifted, wanted, 3).abs() < 1e-6
    assert output_difference(shifted, wanted, 4) > 0.1


def test_values_are_measured_by_the_spread_of_the_teacher() -> None:
    wanted, mean = {"boxes": BOXES, "more": BOXES * 100}, {"boxes": BOXES.mean().expand_as(BOXES)}
    mean["more"] = mean["boxes"] * 100
    assert output_difference(mean, wanted) == pytest.approx(1.0)


def test_outputs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose the outputs to compare"):
        output_difference({"logits": LOGITS[:, :2]}, {"logits": LOGITS})
