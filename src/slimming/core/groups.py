"""Groups of prunable units, and the anatomy of a whole model, as plain data.

A *unit* is the smallest prunable part: one head dimension, one hidden unit, one token position, one head. A *group* is
an ordered set of units of one kind in one place, with the tensor slices of each unit. A family reads a model into an
`Anatomy`; the later steps use the anatomy and do not look at the model's classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from slimming.core.formulas import Dim, Formulas, Operation, Product, Ratio
from slimming.core.kinds import KINDS
from slimming.core.structure import Structure
from slimming.errors import PlanError, nearest

SIDES = ("produces", "consumes", "query", "key")

Mask = npt.NDArray[np.bool_]
Place = tuple[str, int]
"""A dimension of a tensor."""
_Shared = tuple[Place, npt.NDArray[np.int_], npt.NDArray[np.int_]]
"""A dimension of which several groups have slices, indices along it, and the unit to which each index belongs."""


@dataclass(frozen=True, kw_only=True)
class Slices:
    """The slices of a group's units in one tensor: unit ``u`` has the indices ``index[u]`` along dimension ``dim``.

    Attributes:
        tensor: name of a parameter or buffer.
        dim: dimension of the tensor.
        index: indices of each unit along ``dim``.
        side: role of the slice, one of `SIDES`: it ``"produces"`` or ``"consumes"`` the unit's value. Dimensions of
            queries and keys have a ``"query"`` and a ``"key"`` side instead.
    """

    tensor: str
    dim: int
    index: tuple[tuple[int, ...], ...]
    side: str


@dataclass(frozen=True, kw_only=True)
class InputSlices:
    """The slices of a group's units in a tensor that the module of the group is given, such as a rotary table.

    Attributes:
        path: where the tensor is in the arguments: position or keyword, then places in tuples, lists and mappings.
        dim: dimension of the tensor, counted from the end.
        index: indices of each unit along ``dim``; the same for units of different heads.
    """

    path: tuple[int | str, ...]
    dim: int
    index: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A tensor scaled by a group's soft mask: ``index[u]`` along ``dim`` is multiplied by the mask of unit u."""

    tensor: str
    dim: int
    index: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Constraints on the kept units of one group.

    Attributes:
        minimum: smallest number of units to keep; 0 only if no other part of the model needs one.
        parts: for head dimensions, the number of units of each head, in order; empty for other kinds.
        equal: whether the heads that stay must keep equally many units, because the model's attention module has one
            head size.
        same_as: name of the group that must keep equally many units in each head, because the model's attention module
            has one size for QK and V.
        alike: whether the heads that stay must keep the same units, because they share a table with entries for each,
            or because the host puts heads together unit by unit.
    """

    minimum: int = 1
    parts: tuple[int, ...] = ()
    equal: bool = False
    same_as: str | None = None
    alike: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenInput:
    """A tensor beside the sequence that a module is given and that has one entry per token, such as a rotary table.

    Attributes:
        module: name of the module.
        path: where the tensor is in the arguments: position or keyword, then places in tuples, lists and mappings.
        dims: its dimensions over tokens, counted from the end.
        fixed: whether these dimensions include the tokens that are never removed.
    """

    module: str
    path: tuple[int | str, ...]
    dims: tuple[int, ...]
    fixed: bool


@dataclass(frozen=True, kw_only=True)
class TokenSite:
    """Where the tokens of a group are masked and removed.

    Attributes:
        depth: index of the block; a token that is removed here is missing in all deeper blocks.
        block: name of the block before which tokens are selected.
        attention: name of the attention module that takes the mask as the argument ``attn_mask``. None: every softmax
            over the tokens in the block, and everything that mixes tokens after the last block, gets it without a
            change of the modules; `mean_pool` and `attention_pool` are then None.
        norms: names of the norms whose outputs the mask multiplies in the variant of the paper.
        prefix: number of class, distillation and register tokens at the start, which are never removed.
        positions: patch position of each unit in the grid of the dense model, row by row.
        mean_pool: name of the module whose output is averaged over the tokens after the last block, if any.
        pool_prefix: whether the pooling includes the prefix tokens.
        attention_pool: name of the module that pools by attention after the last block, if any.
        suffix: number of tokens at the end that are never removed, such as those of a detector's boxes.
        sequence: name of the sequence of tokens; a model may have several, such as those of two towers.
        grid: number of patch positions in the dense model; 0 if a family does not need it.
        path: where the sequence is in the arguments of the block, see `TokenInput`.
        inputs: the other inputs over tokens of the block, and for the last block those of later modules.
        tables: names of the modules in the block that compute a table over all pairs of tokens, such as a relative
            position bias.
        returned: whether the model returns the sequence. The slim model returns the tokens that it keeps.
    """

    depth: int
    block: str
    attention: str | None
    norms: tuple[str, ...]
    prefix: int
    positions: tuple[int, ...]
    mean_pool: str | None = None
    pool_prefix: bool = False
    attention_pool: str | None = None
    suffix: int = 0
    sequence: str = ""
    grid: int = 0
    path: tuple[int | str, ...] = (0,)
    inputs: tuple[TokenInput, ...] = ()
    tables: tuple[str, ...] = ()
    returned: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """An ordered set of units of one kind in one place.

    Attributes:
        name: name, unique in the model, for example ``"blocks.0.attn.v"``.
        kind: one of `slimming.core.kinds.KINDS`.
        size: number of units.
        site: name of the module that the group belongs to; the groups of one attention module share it.
        role: ``"qk"``, ``"v"`` or ``"qkv"`` for head dimensions, ``"branch"`` for blocks, else equal to the kind.
        limits: constraints on the kept units.
        slices: the tensor slices of each unit; empty for tokens.
        scales: the tensors that the soft mask scales; empty for tokens.
        token: where tokens are masked and removed; None for other kinds.
        norms: names of the norms that normalise over the units; after pruning, over the kept units.
        inputs: the slices of each unit in tensors that the module `site` is given.
        any_basis: for head dimensions, whether the units of a head can be replaced by linear combinations of them: each
            is one row of its projections, and nothing between these acts on single dimensions.
    """

    name: str
    kind: str
    size: int
    site: str
    role: str
    limits: Limits = field(default_factory=Limits)
    slices: tuple[Slices, ...] = ()
    scales: tuple[Scale, ...] = ()
    token: TokenSite | None = None
    norms: tuple[str, ...] = ()
    inputs: tuple[InputSlices, ...] = ()
    any_basis: bool = False

    def __repr__(self) -> str:
        parts = f", parts={self.limits.parts}" if self.limits.parts else ""
        return f"Group({self.name!r}, kind={self.kind!r}, size={self.size}, minimum={self.limits.minimum}{parts})"

    @property
    def on_request(self) -> bool:
        """Whether units of the group are pruned only if their kind is named: the result would be of another kind."""
        return KINDS[self.kind].on_request or (self.token is not None and self.token.returned)

    @property
    def width(self) -> int:
        """The number of dimensions of queries and keys that are one unit, such as 2 for rotary pairs; else 1."""
        return min((len(part.index[0]) for part in self.slices if part.side in ("query", "key")), default=1)

    @cached_property
    def part_of_unit(self) -> tuple[int, ...]:
        """Index of the head to which each unit belongs; all 0 for kinds without parts."""
        if not self.limits.parts:
            return (0,) * self.size
        return tuple(part for part, size in enumerate(self.limits.parts) for _ in range(size))


@dataclass(frozen=True, kw_only=True)
class Removal:
    """When a whole module is removed, and what takes its place.

    Attributes:
        kept: the module is removed if this is 0.
        returns: what the module in its place returns, see `slimming.models.layers.Removed`.
    """

    kept: Dim
    returns: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """The sizes of one module as functions of the numbers of kept units.

    Attributes:
        tensors: name of a parameter or buffer -> its dimensions.
        attributes: name of an attribute that holds a size -> its value.
        free_heads: whether the module's forward infers the head size from the embedding width, so that this
            expression must be replaced after heads are removed.
        head_scale: name of the group of QK dimensions, and the side of them, ``"query"`` or ``"key"``, whose rows are
            multiplied to preserve the scale of the logits, because the module's forward computes it from the size of
            the heads that it has; None if it does not.
        removals: when the module is removed as a whole; the first that applies.
        spent: name of a parameter -> it is not needed any more if this is 0, although the module stays.
        separate: for a projection, the number of its heads, the size that the host takes them to have, and their size
            in each part of the projection; empty if these are always equal.
        columns: the group whose units have slices in tensors that the module is given, see `Group.inputs`.
    """

    tensors: Mapping[str, tuple[Dim | Ratio, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Dim | Ratio] = field(default_factory=dict)
    free_heads: bool = False
    head_scale: tuple[str, str] | None = None
    removals: tuple[Removal, ...] = ()
    spent: Mapping[str, Dim] = field(default_factory=dict)
    separate: tuple[Dim | Ratio, ...] = ()
    columns: Group | None = None


REST = "rest"
"""Kind of the timed layer for the time that the model takes beyond its other timed layers, see `TimedLayer`."""


@dataclass(frozen=True, kw_only=True)
class TimedLayer:
    """A step of the forward pass whose time is looked up in a latency table.

    Attributes:
        name: name of the module, or of the step if it is not a module.
        kind: type of the step, for example ``"attention"``; `REST` for the time of the model beyond its other layers.
        like: further properties that distinguish layers of one kind; layers with equal kind and ``like`` share
            measurements.
        axes: name -> size that its time depends on.
        alive: a product that is 0 once the layer is removed.
        unless_same: the number of tokens at which the layer does nothing and is left out of the model.
    """

    name: str
    kind: str
    like: str
    axes: tuple[tuple[str, Dim], ...]
    alive: Product = ()
    unless_same: Dim | None = None


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The data about a model that the later steps need, as plain data.

    Attributes:
        groups: all groups that can be pruned, including the coupled alternatives (role ``"qkv"``).
        operations: the operations of the forward pass, for the cost formulas.
        structure: the record from which the model can be rebuilt.
        uncovered: parts that cannot be pruned, each with the reason.
        input_shape: channels, height and width of the input image; for models that take something else, the shape of
            the first tensor without its batch dimension.
        inferred: for each attention class whose heads were found without a table, a sentence with its row.
        sizes: name of a module -> its sizes, for families that resize modules by this table.
        timed_layers: the forward pass, for latency tables; empty if the family cannot time its layers.
    """

    groups: tuple[Group, ...]
    operations: tuple[Operation, ...]
    structure: Structure
    uncovered: tuple[str, ...]
    input_shape: tuple[int, ...]
    inferred: tuple[str, ...] = ()
    sizes: Mapping[str, LayerSizes] = field(default_factory=dict)
    timed_layers: tuple[TimedLayer, ...] = ()

    @cached_property
    def couplings(self) -> Couplings:
        """The units that are removed with others."""
        return Couplings(self.groups)

    @cached_property
    def around(self) -> dict[str, tuple[str, ...]]:
        """Name of a group -> names of the branches that its units are removed with, the outermost first."""
        return branches_around(self.groups)

    @cached_property
    def formulas(self) -> Formulas:
        """The costs of the forward pass."""
        return Formulas(self.operations, [group.name for group in self.groups])

    def group(self, name: str) -> Group:
        """Return the group called ``name``.

        Raises:
            PlanError: the model has no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        names = [group.name for group in self.groups]
        raise PlanError(f"The model has no group {name!r}.{nearest(name, names)}")


def branches_around(groups: Sequence[Group]) -> dict[str, tuple[str, ...]]:
    """Name of a group -> names of the branches that its units are removed with, see `Anatomy.around`."""
    places = {group.name: {(part.tensor, part.dim) for part in group.slices} for group in groups}
    branches = [group.name for group in groups if group.role == "branch"]
    branches.sort(key=lambda name: -len(places[name]))
    result: dict[str, tuple[str, ...]] = {}
    for group in groups:
        own = places[group.name]
        if group.role == "branch":  # one that is a part of another
            result[group.name] = tuple(name for name in branches if own and own < places[name])
        else:
            result[group.name] = tuple(name for name in branches if own & places[name])
    return result


def keep_all(groups: Iterable[Group]) -> dict[str, tuple[int, ...]]:
    """Return the kept units of each group when no unit is removed."""
    return {group.name: tuple(range(group.size)) for group in groups}


def resolve(anatomy: Anatomy, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the kept units of every group, given those of some groups, see `Couplings`.

    Raises:
        PlanError: the model has no such group, or a unit is outside its group.
    """
    check_kept(anatomy.groups, kept)
    sizes = {group.name: group.size for group in anatomy.groups}
    masks = {name: np.isin(np.arange(sizes[name]), np.asarray(units, dtype=int)) for name, units in kept.items()}
    return {name: tuple(np.flatnonzero(mask).tolist()) for name, mask in anatomy.couplings.left(masks).items()}


class Couplings:
    """Units of different groups that are removed together.

    A unit is removed when one of its tensor slices is removed completely through another group: the dimensions of a
    head with the head, QK and V with the units of the coupled group, and a head with its last V dimension. A token is
    removed when its position was removed in a shallower block.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._positions = 1 + max((max(g.token.positions, default=0) for g in groups if g.token is not None), default=0)
        users = Counter((slices.tensor, slices.dim) for group in groups for slices in group.slices)
        self._extent: dict[Place, int] = {}
        self._slices: dict[str, list[_Shared]] = {group.name: [] for group in groups}
        for group in groups:
            for slices in group.slices:
                at = (slices.tensor, slices.dim)
                places = np.fromiter(chain.from_iterable(slices.index), dtype=int)
                # A dimension of one group alone couples nothing, nor do entries that are shared by the heads.
                if users[at] > 1 and len(np.unique(places)) == len(places):
                    units = np.repeat(np.arange(group.size), [len(indices) for indices in slices.index])
                    self._slices[group.name].append((at, places, units))
                    self._extent[at] = max(self._extent.get(at, 0), int(places.max(initial=-1)) + 1)

    def left(self, kept: Mapping[str, Mask]) -> dict[str, Mask]:
        """Return the kept units of every group, given those of some groups; masks of shape (size,)."""
        gone = {at: np.zeros(extent, dtype=bool) for at, extent in self._extent.items()}
        by: dict[Place, set[str]] = {at: set() for at in gone}
        whole = {group.name: np.ones(group.size, dtype=bool) for group in self._groups}
        for group in self._groups:
            if group.name in kept:
                self._drop_(gone, by, group, ~kept[group.name])
        for group in self._groups:
            # A head that lost its last V is removed, and so its QK, which would have no effect, is removed too.
            if group.role == "head":
                self._drop_(gone, by, group, ~self._left(gone, by, group, whole[group.name]))
        result: dict[str, Mask] = {}
        present: dict[str, Mask] = {}
        for group in self._groups:
            units = kept.get(group.name, whole[group.name])
            if group.token is None:
                result[group.name] = self._left(gone, by, group, units)
                continue
            positions = np.asarray(group.token.positions, dtype=int)
            here = np.zeros(self._positions, dtype=bool)
            here[positions[units]] = True
            sequence = group.token.sequence
            present[sequence] = here & present.get(sequence, here)
            result[group.name] = present[sequence][positions]
        return result

    def _drop_(self, gone: dict[Place, Mask], by: dict[Place, set[str]], group: Group, units: Mask) -> None:
        """Mark the slices of ``units`` as removed."""
        if units.any():
            for at, places, owners in self._slices[group.name]:
                gone[at][places[units[owners]]] = True
                by[at].add(group.name)

    def _left(self, gone: dict[Place, Mask], by: dict[Place, set[str]], group: Group, units: Mask) -> Mask:
        """The ``units`` that keep at least one index of each of their slices."""
        for at, places, owners in self._slices[group.name]:
            if by[at].difference((group.name,)):  # units that the group itself lost are not in `units`
                units = units & (np.bincount(owners[~gone[at][places]], minlength=group.size) > 0)
        return units


def check_kept(groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> None:
    """Check that ``kept`` names groups of the model, and units of these without repetition.

    Raises:
        PlanError: it does not.
    """
    sizes = {group.name: group.size for group in groups}
    for name, units in kept.items():
        if name not in sizes:
            raise PlanError(
                f"The plan names group {name!r}, which this model does not have: "
                f"it was made for another model.{nearest(name, sizes)}"
            )
        if len(set(units)) != len(units) or (units and not 0 <= min(units) <= max(units) < sizes[name]):
            raise PlanError(
                f"The plan keeps units of {name!r} that are repeated or outside 0..{sizes[name] - 1}: "
                "it is damaged or was made for another model."
            )
