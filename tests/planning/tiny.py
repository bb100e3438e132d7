"""A model as plain data, for tests of plans that need no network."""

from __future__ import annotations

from collections.abc import Mapping

from slimming.core.groups import Anatomy, Group, Limits, TimedLayer, TokenSite
from slimming.core.structure import Structure


def anatomy_of(*groups: Group, layers: tuple[TimedLayer, ...] = ()) -> Anatomy:
    """An anatomy with these groups, and nothing to count the costs of."""
    structure = Structure(family="none", base={})
    return Anatomy(
        groups=groups, operations=(), structure=structure, uncovered=(), input_shape=(3, 1, 1), timed_layers=layers
    )


def mlp(name: str, size: int) -> Group:
    return Group(name=name, kind="mlp", size=size, site=name, role="mlp")


def head_dims(role: str, parts: tuple[int, ...]) -> Group:
    """QK or V of the attention `a`."""
    return Group(name=f"a.{role}", kind="head_dim", size=sum(parts), site="a", role=role, limits=Limits(parts=parts))


def tokens(name: str, depth: int, size: int) -> Group:
    site = TokenSite(depth=depth, block=name, attention=name, norms=(), prefix=1, positions=tuple(range(size)))
    return Group(name=name, kind="token", size=size, site=name, role="token", token=site)


def sizes(*groups: Group) -> Mapping[str, int]:
    return {group.name: group.size for group in groups}
