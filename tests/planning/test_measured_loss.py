"""The measured loss of a kind, distributed over its candidates: how much each gets of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planning.tiny import mlp
from slimming.core.layout import Layout
from slimming.planning.candidates import Candidate, all_candidates
from slimming.planning.sensitivity import Curve, Sensitivity, with_measured_loss

CURVE = ((0.5, 1.0), (0.25, 4.0))


def losses(
    scores: torch.Tensor, curve: Curve = CURVE, *, spread: str = "rank", multiple: int = 1, first: str = "mlp"
) -> list[Candidate]:
    group = mlp("m", len(scores))
    candidates = all_candidates([group], {"m": scores}, Layout(multiple=multiple))
    measured = Sensitivity(curves={first: curve, "mlp": curve}, spread=spread)
    return with_measured_loss(candidates, [group], measured, np.ones(len(candidates)))


def test_a_kind_that_was_measured_but_is_not_planned_changes_nothing() -> None:
    scores = torch.arange(1.0, 9.0)
    assert losses(scores, first="token") == losses(scores)
    assert losses(scores)[0].value < 1.0


def test_the_score_is_the_loss_per_unit() -> None:
    for candidate in losses(torch.arange(1.0, 17.0), multiple=2):
        assert len(candidate.units) == 2
        assert candidate.value == pytest.approx(2 * candidate.score)


def test_a_bundle_loses_what_its_units_lose_one_by_one() -> None:
    single = [candidate.value for candidate in losses(torch.arange(1.0, 17.0))]
    double = [candidate.value for candidate in losses(torch.arange(1.0, 17.0), multiple=2)]
    assert double[:2] == pytest.approx([sum(single[:2]), sum(single[2:4])], rel=1e-3)


def test_the_loss_in_proportion_to_scores_does_not_depend_on_their_unit() -> None:
    scores = torch.arange(1.0, 17.0)
    for factor in (1e-4, 0.1, 100.0):
        found = [candidate.value for candidate in losses(factor * scores, spread="score")]
        assert found == pytest.approx([candidate.value for candidate in losses(scores, spread="score")], rel=1e-4)


def test_a_first_measurement_near_the_dense_model_does_not_add_to_the_loss() -> None:
    curve = ((1 - 1e-3, 1e-3), (0.5, 0.5), (0.0, 1.0))
    found = losses(torch.arange(1.0, 1001.0), curve)
    assert sum(candidate.value for candidate in found) == pytest.approx(1.0, rel=5e-3)
