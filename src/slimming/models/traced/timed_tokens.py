"""Tokens of timed layers: which layers run on the tokens of a block, and what they are given after some are removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slimming.core.formulas import Dim
from slimming.core.groups import Group
from slimming.models.token_masks import last_sites
from slimming.models.traced.token_blocks import TABLE, adapt_, token_entries

TOKENS = "tokens"
"""Name of the axis."""


def token_dim(group: Group) -> Dim:
    """The length of the sequence in a block as a function of its token group."""
    assert group.token is not None
    return Dim(fixed=group.token.prefix + group.token.suffix, groups=((group.name, 1),))


def token_groups_of(calls: Iterable[tuple[str, Sequence[int]]], groups: Sequence[Group]) -> list[Group | None]:
    """For each call of a layer, the token group whose sequence it is given, if any.

    Args:
        calls: name of the layer and the shape of its input, in order.
        groups: the groups of the model.
    """
    sites = {f"{group.token.block}.": group for group in groups if group.token is not None}
    last = {group.name for group in last_sites(groups).values()}
    result: list[Group | None] = []
    before: Group | None = None
    for name, shape in calls:
        group = next((group for block, group in sites.items() if f"{name}.".startswith(block)), None)
        if group is None and before is not None and before.name in last:
            group = before  # after the last block
        before = group or before
        fits = group is not None and len(shape) == 3 and shape[1] == token_dim(group).value({group.name: group.size})
        result.append(group if fits else None)
    return result


def with_tokens(leaves: Sequence[Any], batched: Sequence[int], tokens: int, group: Group) -> tuple[Any, ...]:
    """The arguments ``leaves`` of a call with ``tokens`` tokens: the sequence, and tables and masks over its tokens.

    Args:
        leaves: the flattened arguments with all tokens.
        batched: positions of those whose first dimension is the batch.
        tokens: the length of the sequence that is left.
        group: the token group.
    """
    dim = token_dim(group)
    full = dim.value({group.name: group.size})
    sizes = {full - dim.fixed: tokens - dim.fixed, full: tokens}

    def selected(leaf: Any, first: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        places = [place for place in range(first, leaf.dim()) if leaf.shape[place] in sizes]
        is_pairs = leaf.shape[-2:] == (full, full)
        for place in (leaf.dim() - 2, leaf.dim() - 1) if is_pairs else places[:1]:
            leaf = leaf.narrow(place, 0, sizes[leaf.shape[place]])
        return leaf

    return tuple(selected(leaf, int(place in batched)) for place, leaf in enumerate(leaves))


def select_tables_(module: nn.Module, name: str, tokens: int, group: Group) -> None:
    """Make the tables over tokens that ``module``, called ``name`` in the model, computes those of the first tokens."""
    kept: Mapping[str, Sequence[int]] = {group.name: range(tokens - token_dim(group).fixed)}
    for path, entry in token_entries([group], kept).items():
        if TABLE in entry and f"{path}.".startswith(f"{name}."):
            adapt_(module.get_submodule(path[len(name) + 1 :]), entry, next(module.parameters(), None))
