"""Candidates of groups that are plain data: their sizes, their order, and what goes together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planning.tiny import anatomy_of, head_dims, mlp
from slimming.core.layout import FREE, Layout
from slimming.planning.candidates import Candidate, CandidatePool, all_candidates, removal_order


@pytest.mark.parametrize(
    ("size", "multiple", "bundle"), [(32, 8, 8), (16, 8, 4), (8, 8, 2), (6, 8, 1), (7, 2, 1), (4, 4, 1)], ids=str
)
def test_multiples_are_halved_until_four_sizes_are_left(size: int, multiple: int, bundle: int) -> None:
    candidates = all_candidates([mlp("m", size)], {"m": torch.arange(float(size))}, Layout(multiple=multiple))
    assert [len(candidate.units) for candidate in candidates] == [bundle] * (size // bundle - 1)


def test_every_candidate_needs_a_price() -> None:
    one = Candidate(units=(("a", 0),), score=1.0, value=1.0, chain=("a", 0))
    with pytest.raises(ValueError, match="shorter"):
        removal_order([one, one], [1.0])


def test_each_head_loses_all_its_queries_but_the_last_on_their_own() -> None:
    qk, v = head_dims("qk", (4, 3)), head_dims("v", (4, 3))
    scores = {"a.qk": torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 1.0, 2.0]), "a.v": torch.ones(7)}
    candidates = all_candidates([qk, v], scores, FREE)
    alone = [c.units for c in candidates if c.chain[0] == "a.qk"]
    assert alone == [((("a.qk", unit)),) for unit in (3, 2, 1, 4, 5)]


def test_a_head_that_goes_with_its_last_value_takes_its_queries_along() -> None:
    qk, v = head_dims("qk", (3, 3)), head_dims("v", (2, 2))
    scores = {"a.qk": torch.arange(6.0), "a.v": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    pool = CandidatePool(anatomy_of(qk, v), all_candidates([qk, v], scores, FREE))
    last = next(i for i, c in enumerate(pool.candidates) if ("a.v", 1) in c.units)
    assert set(pool.candidates[last].units) == {("a.v", 1), ("a.qk", 0), ("a.qk", 1), ("a.qk", 2)}
    removed = np.zeros(len(pool.candidates), dtype=bool)
    removed[last] = True
    gone = {pool.candidates[index].units for index in np.flatnonzero(~pool.remaining(removed))}
    assert gone == {pool.candidates[last].units, (("a.qk", 0),), (("a.qk", 1),)}
    assert pool.kept(removed)["a.qk"].tolist() == [False] * 3 + [True] * 3
    # While a query of the head is kept, so is the candidate that takes the whole head.
    queries = [i for i, c in enumerate(pool.candidates) if c.units in ((("a.qk", 0),), (("a.qk", 1),))]
    assert {(query, last) for query in queries} <= set(pool.precedence(range(len(pool.candidates))))


def test_without_shared_units_each_candidate_goes_alone() -> None:
    groups = mlp("m", 4), mlp("n", 3)
    scores = {"m": torch.arange(4.0), "n": torch.arange(3.0)}
    pool = CandidatePool(anatomy_of(*groups), all_candidates(groups, scores, FREE))
    removed = np.array([True, False, False, True, False])
    assert pool.remaining(removed).tolist() == (~removed).tolist()
    assert pool.counts(pool.kept(removed)) == {"m": 3, "n": 2}
    assert pool.prices({"m": 2.0, "n": 5.0}).tolist() == [2.0, 2.0, 2.0, 5.0, 5.0]
