"""Dimensions found by comparing integers that were counted in several copies of a model."""

from __future__ import annotations

import itertools
import random

import pytest

from slimming.core.formulas import Dim, Ratio, evaluate
from slimming.core.groups import Group, Slices, TokenSite
from slimming.models.traced.matching import Matcher, primitive
from slimming.models.traced.sample_cuts import FEWEST, sample_cuts

COUNTS = [
    {"a": 12, "b": 12, "heads": 3, "v": 24, "branch": 1},
    {"a": 7, "b": 11, "heads": 2, "v": 10, "branch": 1},
    {"a": 5, "b": 3, "heads": 3, "v": 9, "branch": 0},
    {"a": 10, "b": 8, "heads": 1, "v": 6, "branch": 1},
]


def units(name: str, weight: int = 1, fixed: int = 0) -> Dim:
    return Dim(fixed=fixed, groups=((name, weight),))


def matcher(*dims: Dim) -> Matcher:
    return Matcher(dims or [units("a"), units("b"), units("heads"), units("v")], COUNTS, ["branch"])


def values(dim: Dim, counts: list[dict[str, int]] = COUNTS) -> tuple[int, ...]:
    return tuple(dim.value(kept) for kept in counts)


def constant(number: int) -> tuple[int, ...]:
    return (number,) * len(COUNTS)


def test_factors_are_dimensions_and_a_number() -> None:
    product = matcher().products([values(units("a", 6)), constant(9), values(units("b"))])
    assert product == ((Dim(fixed=54), units("a"), units("b")),)


def test_a_square_has_one_dimension_twice() -> None:
    tokens = units("a", fixed=1)
    square = tuple(value**2 for value in values(tokens))
    assert matcher(tokens, units("b")).products([square]) == ((Dim(fixed=1), tokens, tokens),)


def test_concatenated_groups_are_one_dimension() -> None:
    both = units("a", 2) + units("b", fixed=4)
    product = matcher(both, units("a"), units("b")).products([values(both), values(units("b"))])
    assert product is not None
    assert [evaluate(product, kept) for kept in COUNTS] == [both.value(kept) * kept["b"] for kept in COUNTS]
    assert matcher(units("a"), units("b")).products([values(both)]) is None


def test_the_size_of_a_head_is_a_dimension_only_with_the_number_of_heads() -> None:
    size = tuple(kept["v"] // kept["heads"] for kept in COUNTS)
    assert matcher().products([size, values(units("heads", 4)), values(units("b"))]) == (
        (Dim(fixed=4), units("b"), units("v")),
    )
    assert matcher().products([size]) is None


def test_the_size_of_a_head_is_not_taken_for_a_dimension_of_equal_numbers() -> None:
    counts = [{"heads": 4, "v": 8, "a": 2}, {"heads": 1, "v": 1, "a": 1}, {"heads": 3, "v": 3, "a": 1}]
    dims = [units("heads"), units("v"), units("a")]
    assert Matcher(dims, counts).products([(4, 1, 3), (2, 1, 1)]) == ((Dim(fixed=1), units("heads"), units("a")),)
    known = Matcher(dims, counts, ratios=[Ratio(total=units("v"), parts=units("heads"))])
    assert known.ambiguous == [units("a")]
    assert known.products([(4, 1, 3), (2, 1, 1)]) == ((Dim(fixed=1), units("v")),)


def test_what_heads_share_is_a_quotient_where_all_heads_stay() -> None:
    counts = [{"v": 24, "a": 7}, {"v": 12, "a": 3}, {"v": 18, "a": 5}]
    (product,) = Matcher([units("v"), units("a")], counts).products([tuple(kept["v"] // 6 for kept in counts)]) or ()
    assert product == (Dim(fixed=1), Ratio(total=units("v"), parts=Dim(fixed=6)))
    assert evaluate([product], {"v": 30}) == 5


def test_a_fixed_number_may_be_added_to_the_units_of_one_group() -> None:
    assert matcher().products([values(units("a", 3, fixed=5))]) == ((Dim(fixed=1), units("a", 3, fixed=5)),)


def test_what_follows_no_dimension_has_no_product() -> None:
    assert matcher().products([(12, 6, 4, 9)]) is None
    assert matcher().products([tuple(kept["a"] // 2 for kept in COUNTS)]) is None


def test_dimensions_that_are_proportional_in_all_copies_are_not_guessed() -> None:
    counts = [{"a": 4, "b": 8}, {"a": 2, "b": 4}, {"a": 3, "b": 6}]
    alike = Matcher([units("a"), units("b")], counts)
    assert set(alike.ambiguous) == {units("a"), units("b")}
    assert alike.products([(4, 2, 3)]) is None
    assert not matcher().ambiguous
    assert Matcher([units("a")], [{"a": 4}, {"a": 4}]).ambiguous


def test_what_is_absent_without_a_branch_is_multiplied_by_it() -> None:
    present = [True, True, False, True]
    product = matcher().products([(12, 7, 10)], present, "module")
    assert product == ((Dim(fixed=1), units("a"), units("branch")),)
    assert matcher().products([(12, 7, 5)], [True, True, True, False], "module") is None
    assert matcher().products([(12, 7, 5)], [True, True, True, False]) == ((Dim(fixed=1), units("a")),)


def test_what_is_absent_without_several_branches_may_need_one_or_all_of_them() -> None:
    names = [f"block.{number}.{part}.branch" for number in range(2) for part in ("attn", "mlp")]
    choices = list(itertools.product([1, 0], repeat=4))
    counts = [dict(zip(names, alive, strict=True)) for alive in choices]
    found = Matcher([], counts, names)
    for formula in (lambda kept: kept[names[2]] and kept[names[3]], lambda kept: kept[names[2]] or kept[names[3]]):
        present = [bool(formula(kept)) for kept in counts]
        products = found.products([(5,) * sum(present)], present, "block.1.norm")
        assert products is not None
        assert [evaluate(products, kept) for kept in counts] == [5 * there for there in present]


def test_dimensions_are_compared_without_common_divisors() -> None:
    assert primitive(Dim(fixed=6, groups=(("b", 4), ("a", 2)))) == Dim(fixed=3, groups=(("a", 1), ("b", 2)))
    assert primitive(units("a") + units("a")) == units("a")


def group(name: str, size: int, **arguments: object) -> Group:
    settings = {"kind": "channel", "site": name, "role": "channel", **arguments}
    return Group(name=name, size=size, **settings)


@pytest.mark.parametrize("size", [2, 3, 64], ids=["two", "three", "many"])
def test_there_are_as_many_cuts_as_tell_all_groups_apart(size: int) -> None:
    groups = [group(f"layer {number}", size) for number in range(30)]
    cuts, found = sample_cuts(groups, [Dim(groups=((each.name, 1),)) for each in groups])
    assert not found.ambiguous
    assert len(cuts) <= {2: 9, 3: 7, 64: FEWEST}[size]
    assert all(1 <= len(cut[each.name]) <= size for cut in cuts for each in groups)


@pytest.mark.parametrize("seed", range(8), ids=str)
def test_small_groups_in_branches_are_told_apart(seed: int) -> None:
    groups: list[Group] = []
    for number in range(12):
        inside, whole = (
            Slices(tensor=f"weight {number}", dim=0, index=index, side="produces")
            for index in (((0,), (1,)), ((0, 1),))
        )
        groups.append(group(f"layer {number}", 2, slices=(inside,)))
        groups.append(group(f"branch {number}", 1, kind="block", role="branch", slices=(whole,)))
    _, found = sample_cuts(groups, [units(each.name) for each in groups if each.size == 2], seed)
    assert not found.ambiguous


SLIM = (14, 14, 12, 11, 9, 7, 6, 6, 5, 4, 4, 4)
"""Tokens that are left in the blocks of a slim model."""


@pytest.mark.parametrize("sizes", [(16,) * 12, SLIM], ids=["dense", "slim"])
@pytest.mark.parametrize("seed", range(4), ids=str)
def test_tokens_of_blocks_are_told_apart(sizes: tuple[int, ...], seed: int) -> None:
    groups: list[Group] = []
    dice, positions = random.Random(seed), tuple(range(16))
    for depth, size in enumerate(sizes):
        positions = tuple(sorted(dice.sample(positions, size)))
        site = TokenSite(depth=depth, block=str(depth), attention=None, norms=(), prefix=1, positions=positions)
        groups.append(group(f"tokens {depth}", size, kind="token", token=site))
        for part in ("attention", "mlp"):
            inside = Slices(tensor=f"{part} {depth}", dim=0, index=((0, 1),), side="produces")
            groups.append(group(f"{part} {depth}", 1, kind="block", role="branch", slices=(inside,)))
    dims = [units(f"tokens {depth}", fixed=fixed) for depth in range(len(sizes)) for fixed in (0, 1)]
    _, found = sample_cuts(groups, dims, seed)
    assert not found.ambiguous


def test_groups_of_one_unit_need_no_cuts() -> None:
    cuts, found = sample_cuts([group("one", 1), group("other", 1), group("many", 9)], [units("one") + units("many")])
    assert len(cuts) == FEWEST
    assert not found.ambiguous


def test_each_branch_is_removed_once_without_any_other() -> None:
    branches = [group(f"branch {number}", 1, kind="block", role="branch") for number in range(20)]
    cuts, _ = sample_cuts([*branches, group("width", 40)], [])
    for one in branches:
        for other in branches:
            assert one is other or any(not cut[one.name] and cut[other.name] for cut in cuts)
