"""Choose cuts of a model that tell its dimensions apart, so that formulas can be found by counting."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from slimming.core.formulas import Dim, Ratio
from slimming.core.groups import Couplings, Group, TokenSite
from slimming.models.traced.matching import Matcher

FEWEST, MOST = 4, 24
"""Fewest and most cuts. There are more than the fewest only while two dimensions are proportional in all of them."""

Cut = Mapping[str, tuple[int, ...]]
"""Group -> its kept units."""


def sample_cuts(groups: Sequence[Group], dims: Collection[Dim], seed: int = 0) -> tuple[list[Cut], Matcher]:
    """Cuts in which no two of ``dims`` are proportional, and a matcher for numbers that are counted in them.

    Args:
        groups: the groups of the model.
        dims: the dimensions that occur in the model.
        seed: seed of the cuts.

    Returns:
        The kept units of every group in each cut, without the dense model, which is the first copy of the matcher.
    """
    dice = random.Random(seed)
    couplings = Couplings(groups)
    counts = [{group.name: group.size for group in groups}]
    whole = {group.name: group.size for group in groups if group.size <= max(group.limits.minimum, 1)}
    same = {group.name: min(group.name, group.limits.same_as) for group in groups if group.limits.same_as is not None}
    dims = [_of_changing_groups(dim, whole, same) for dim in dims]
    heads = {group.site: Dim(groups=((group.name, 1),)) for group in groups if group.role == "head"}
    head_dims = [group for group in groups if group.role in ("qk", "v") and group.site in heads]
    # Groups of equal counts have one name here, too.
    totals = {group.name: Dim(groups=((same.get(group.name, group.name), 1),)) for group in head_dims}
    ratios = [Ratio(total=totals[group.name], parts=heads[group.site]) for group in head_dims]
    branches = _branch_cuts([group.name for group in groups if group.role == "branch"], dice)
    cuts: list[Cut] = []
    while True:
        matcher = Matcher(dims, counts, [group.name for group in groups if group.role == "branch"], ratios)
        enough = len(cuts) >= max(FEWEST, len(branches))
        if (enough and not matcher.ambiguous) or len(cuts) == MOST:
            return cuts, matcher
        removed = branches[len(cuts)] if len(cuts) < len(branches) else ()
        sizes = {**_sizes(groups, counts, dice), **dict.fromkeys(removed, 0)}
        masks = {group.name: _mask(group, sizes[group.name]) for group in groups if group.role != "qkv"}
        masks |= _token_masks(groups, dice)
        left = couplings.left(masks)
        cuts.append({name: tuple(np.flatnonzero(mask).tolist()) for name, mask in left.items()})
        counts.append({name: int(mask.sum()) for name, mask in left.items()})


def _of_changing_groups(dim: Dim, whole: Mapping[str, int], same: Mapping[str, str]) -> Dim:
    """``dim`` with its groups that cannot become smaller as fixed numbers, and one name for groups of equal counts."""
    return Dim(
        fixed=dim.fixed + sum(weight * whole.get(name, 0) for name, weight in dim.groups),
        groups=tuple((same.get(name, name), weight) for name, weight in dim.groups if name not in whole),
    )


def _sizes(groups: Sequence[Group], counts: Sequence[Mapping[str, int]], dice: random.Random) -> dict[str, int]:
    """Units to keep of each group, per part; groups that were proportional in all cuts so far get different numbers.

    Only cuts with all branches tell groups apart wherever a branch is there.
    """
    branches = [group.name for group in groups if group.role == "branch"]
    with_all = [kept for kept in counts if all(kept[name] for name in branches)]
    alike: dict[tuple[float, ...], list[Group]] = {}
    for group in groups:
        shares = tuple(kept[group.name] / group.size for kept in with_all)
        alike.setdefault(shares, []).append(group)
    result: dict[str, int] = {}
    for shares, same in alike.items():
        start = dice.random()
        for number, group in enumerate(dice.sample(same, len(same))):
            size = min(group.limits.parts, default=group.size)
            # Products of vectors of one element do not count as products of matrices.
            least = min(size, max(group.limits.minimum, 2 if group.limits.parts else 1, size // 4))
            if set(shares) == {1}:  # it was whole in all of these cuts
                size = max(least, size - 1)
            # Steps of the golden ratio fill an interval evenly, however many there are.
            share = (start + number * 0.618034) % 1
            result[group.name] = least + int(share * (size + 1 - least))
    result |= {g.name: result[min(g.name, g.limits.same_as)] for g in groups if g.limits.same_as is not None}
    return result


def _token_masks(groups: Sequence[Group], dice: random.Random) -> dict[str, np.ndarray]:
    """Masks of the token groups: each block loses some tokens of its own, beside those of the blocks before it.

    They are in any place, and tokens that the next block lacks anyway if there are any: were they always the last ones,
    all blocks would lose the same, and their numbers would move together.
    """
    sequences: dict[str, list[tuple[str, TokenSite]]] = {}
    for group in groups:
        if group.token is not None:
            sequences.setdefault(group.token.sequence, []).append((group.name, group.token))
    masks: dict[str, np.ndarray] = {}
    for sites in sequences.values():
        sites.sort(key=lambda each: each[1].depth)
        stays = dice.choice(sites[-1][1].positions)
        left = set(sites[0][1].positions)
        following = [set(site.positions) for _, site in sites[1:]]
        for (name, site), after in zip(sites, [*following, set[int]()], strict=True):
            left &= set(site.positions)
            own = sorted(left - {stays})
            choices = [position for position in own if position not in after] or own
            number = dice.randrange(max(2, len(site.positions) // (2 * len(sites))))
            left -= set(dice.sample(choices, min(number, len(choices))))
            masks[name] = np.isin(site.positions, sorted(left))
    return masks


def _mask(group: Group, size: int) -> np.ndarray:
    """The first ``size`` units of a group, or of each of its parts."""
    parts = group.limits.parts or (group.size,)
    return np.concatenate([np.arange(part) < size for part in parts]) if group.size else np.zeros(0, dtype=bool)


def _branch_cuts(names: Sequence[str], dice: random.Random) -> list[tuple[str, ...]]:
    """Branches to remove in each cut, so that for any two of them, each is removed once without the other."""
    if not names:
        return []
    length = 2
    while True:
        codes = [code for code in range(2**length) if code.bit_count() == length // 2]
        if len(codes) >= len(names):
            break
        length += 1
    chosen = dice.sample(codes, len(names))
    cuts = [tuple(name for name, code in zip(names, chosen, strict=True) if code >> bit & 1) for bit in range(length)]
    return [(), *cuts]
