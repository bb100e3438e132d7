"""What may have to change in an attention module with the size of its heads, and the groups and sizes that follow.

Which attributes hold sizes of heads is guessed from their values and names; `slimming.models.traced.head_dims` tries
the guesses out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from slimming.core.formulas import Dim, Ratio
from slimming.core.groups import Group, Limits, Scale, Slices
from slimming.models.separate import SeparateLinear
from slimming.models.traced.channels import BATCH_NORM, CONV
from slimming.models.traced.dimension_rows import Dimensions
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Attributes, Heads, size_at
from slimming.models.traced.resize import Separate, is_shared

_PART_OF_NAME = ("dim", "size", "hidden", "key", "val", "width")
"""Words in the names of attributes that hold the size of a head."""


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """The dimensions of an attention module, and what has to change in it with their number; names are relative.

    Attributes:
        dims: role -> its dimensions.
        tied: whether QK and V must keep equally many.
        per_head: path of an attribute -> the role whose number of dimensions per head it holds.
        totals: path of an attribute -> the role whose number in all heads it holds, and of which multiple.
        scales: paths of attributes that hold one over the square root of the QK size of a head.
        scaled: side whose rows are multiplied to preserve the scale of the logits, which the forward computes from the
            size that the heads have, or takes from ``scales``; None if it does neither.
        free_heads: whether the forward is rewritten.
        separate: path of the projection that makes values, the size of heads that the host assumes, the sizes in its
            parts, and the role of each, empty if its size stays, if the sizes of QK and V may differ although the host
            assumes one; None if not.
        switch: path of an attribute that is set to True, so that the projection is called as a module; empty if none.
        any_basis: the roles whose dimensions can be replaced by linear combinations of them.
    """

    dims: Mapping[str, Dimensions] = field(default_factory=dict)
    tied: bool = False
    per_head: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    scales: tuple[str, ...] = ()
    scaled: str | None = None
    free_heads: bool = False
    separate: tuple[str, int, tuple[int, ...], tuple[str, ...]] | None = None
    switch: str = ""
    any_basis: tuple[str, ...] = ()

    @property
    def dims_alike(self) -> bool:
        """Whether all heads must keep the same dimensions."""
        return any(found.alike for found in self.dims.values())


def choices(
    module: nn.Module, row: Heads, dims: Mapping[str, Dimensions], tied: bool, heads: int
) -> Iterator[HeadSizes]:
    """Choices of attributes that may depend on the head size, the most likely first."""
    per_head, totals = _numbers(module, row, dims, heads)
    scales = _scales_of_logits(module, dims["qk"].size) if "qk" in dims else ()
    named = {path: role for path, role in per_head.items() if any(word in path.lower() for word in _PART_OF_NAME)}
    listed = {path: total for path, total in totals.items() if path in row.sizes}
    choices = [(named, listed), (named, totals), (per_head, totals), ({}, listed), ({}, {})]
    can_rewrite = has_free_heads(module) or free_heads_class(type(module)) is not None
    free = [True] if row.free_heads and can_rewrite else [False, True] if can_rewrite else [False]
    done: list[HeadSizes] = []
    for free_heads in free:
        for sizes, multiples in choices:
            choice = HeadSizes(
                dims=dims, tied=tied, per_head=sizes, totals=multiples, scales=scales, free_heads=free_heads
            )
            if choice not in done:
                done.append(choice)
                yield choice


def separate_choices(module: nn.Module, row: Heads, dims: Mapping[str, Dimensions], heads: int) -> Iterator[HeadSizes]:
    """Choices with another size for V than for QK, where the host assumes one."""
    if "v" not in dims:
        return
    places = _parts_of_projection(module, dims, heads)
    if places is None:
        return
    path, assumed, sizes, roles = places
    of_qk = _numbers(module, row, {"qk": dims["qk"]}, heads)[0] if "qk" in dims else {}
    named = {name: role for name, role in of_qk.items() if any(word in name.lower() for word in _PART_OF_NAME)}
    of_v = _numbers(module, row, {"v": dims["v"]}, heads)[1]
    listed = {name: total for name, total in of_v.items() if name in row.sizes}
    scales = _scales_of_logits(module, dims["qk"].size) if "qk" in dims else ()
    switches = [name for name, value in vars(module).items() if value is False and "separate" in name]
    can_rewrite = has_free_heads(module) or free_heads_class(type(module)) is not None
    for free_heads in (True,) if row.free_heads and can_rewrite else (False,):
        for switch in ("", *switches):
            for attributes in (named, {}) if named else ({},):
                for multiples in (listed, of_v, {}):
                    yield HeadSizes(
                        dims=dims,
                        per_head=attributes,
                        totals=multiples,
                        scales=scales,
                        free_heads=free_heads,
                        separate=(path, assumed, sizes, roles),
                        switch=switch,
                    )


def _parts_of_projection(
    module: nn.Module, dims: Mapping[str, Dimensions], heads: int
) -> tuple[str, int, tuple[int, ...], tuple[str, ...]] | None:
    """The projection that makes values, and what `HeadSizes.separate` says about it."""
    first = {
        (part.tensor, part.side): part.index[0][0]
        for found in dims.values()
        for part in found.slices
        if part.side != "consumes" and part.dim == 0
    }
    path = next((name for name, _ in module.named_modules() if (f"{name}.weight", "produces") in first), None)
    layer = None if path is None else module.get_submodule(path)
    if path is None or type(layer) not in (nn.Linear, SeparateLinear):
        return None
    size = dims["v"].size
    equal = (size,) * (len(layer.weight) // (size * heads))
    sizes = layer.head_sizes if isinstance(layer, SeparateLinear) else equal
    starts = [heads * sum(sizes[:part]) for part in range(len(sizes))]
    sides = {"produces": "v", "query": "qk", "key": "qk"}
    of_start = {row: sides[side] for (tensor, side), row in first.items() if tensor == f"{path}.weight"}
    if not of_start.keys() <= set(starts):
        return None
    assumed = layer.assumed_size if isinstance(layer, SeparateLinear) else size
    return path, assumed, sizes, tuple(of_start.get(start, "") for start in starts)


def _numbers(
    module: nn.Module, row: Heads, dims: Mapping[str, Dimensions], heads: int
) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """Attributes that hold the size of a head, and those that hold that of all heads, see `HeadSizes`."""
    paths = {
        f"{name}.{attribute}" if name else attribute
        for name, inner in module.named_modules()
        if not isinstance(inner, (nn.Linear, nn.LayerNorm, *CONV))
        for attribute, value in vars(inner).items()
        if type(value) is int and not attribute.startswith("_")
    }
    per_head: dict[str, str] = {}
    totals: dict[str, tuple[str, int]] = {}
    for path in sorted({*paths, *row.sizes}):
        value, last = size_at(module, path), path.rpartition(".")[2].lower()
        if value is None or path == row.count or last.startswith(("num_", "n_")) or last in ("heads", "groups"):
            continue
        for role in _roles(last, dims):
            size = dims[role].size
            if value == size:
                per_head.setdefault(path, role)
            elif value % (size * heads) == 0 and (path in row.sizes or value // (size * heads) in (1, 2, 3)):
                totals.setdefault(path, (role, value // (size * heads)))
    return per_head, totals


def _scales_of_logits(module: nn.Module, size: int) -> tuple[str, ...]:
    """Paths of the attributes that hold one over the square root of ``size``."""
    return tuple(
        f"{name}.{attribute}" if name else attribute
        for name, inner in module.named_modules()
        for attribute, value in vars(inner).items()
        if type(value) is float and math.isclose(value, size**-0.5, rel_tol=1e-9)
    )


def _roles(name: str, dims: Mapping[str, Dimensions]) -> list[str]:
    """The roles of ``dims`` whose size an attribute called ``name`` may hold, the most likely first."""
    wanted = "qk" if any(word in name for word in ("key", "qk", "query")) else "v"
    return sorted(dims, key=lambda role: role != wanted)


def attributes_of(name: str, choice: HeadSizes, heads: str | None) -> Attributes:
    """The attributes of a module called ``name``; ``heads`` is the group of its heads, if they can be cut."""
    attributes: Attributes = {}

    def put(path: str, value: Dim | Ratio) -> None:
        owner, _, attribute = path.rpartition(".")
        attributes.setdefault(f"{name}.{owner}" if owner else name, {})[attribute] = value

    for path, role in choice.per_head.items():
        put(path, _size(name, choice, role, heads))
    for path, (role, multiple) in choice.totals.items():
        put(path, Dim(groups=((f"{name}.{role}", multiple * choice.dims[role].width),)))
    if choice.switch:
        put(choice.switch, Dim(fixed=1))
    if choice.scaled is not None:
        for path in choice.scales:
            put(path, replace(_size(name, choice, "qk", heads), inverse_root=True))
    return attributes


def _size(name: str, choice: HeadSizes, role: str, heads: str | None) -> Ratio:
    """The number of dimensions of a head; ``heads`` is the group of the heads, if they can be cut."""
    count = len(choice.dims[role].parts)
    return Ratio(
        total=Dim(groups=((f"{name}.{role}", choice.dims[role].width),)),
        parts=Dim(fixed=count) if heads is None else Dim(groups=((heads, 1),)),
    )


def separate_of(name: str, choice: HeadSizes, heads: str | None) -> Separate:
    """The sizes of heads in the projection that makes values, see `_size`."""
    if choice.separate is None:
        return {}
    path, assumed, sizes, roles = choice.separate
    number = Dim(fixed=len(choice.dims["v"].parts)) if heads is None else Dim(groups=((heads, 1),))
    parts = [
        _size(name, choice, role, heads) if role else Dim(fixed=size) for size, role in zip(sizes, roles, strict=True)
    ]
    # The host assumes the size of queries for all.
    host = _size(name, choice, "qk", heads) if "qk" in choice.dims else Dim(fixed=assumed)
    return {f"{name}.{path}": (number, host, *parts)}


def groups_of(name: str, module: nn.Module, choice: HeadSizes) -> list[Group]:
    """The groups of a module called ``name``: QK, V, and both coupled."""
    roles = {role: _named(name, found.slices) for role, found in choice.dims.items()}
    scales = {role: _scales(name, module, slices, role) for role, slices in roles.items()}
    parts = {role: found.parts for role, found in choice.dims.items()}
    if "qk" in roles and choice.dims["qk"].normalised:
        scales["qk"] = (*scales["qk"], *_scales(name, module, roles["qk"], "key"))
    alike = {role: found.alike for role, found in choice.dims.items()}
    if len(roles) == 2 and parts["qk"] == parts["v"]:
        both = roles["qk"] + roles["v"]
        roles["qkv"], parts["qkv"], alike["qkv"] = both, parts["qk"], any(alike.values())
        of_keys = _scales(name, module, roles["qk"], "key")
        scales["qkv"] = (*dict.fromkeys((*scales["qk"], *of_keys)), *scales["v"])
    other = {"qk": "v", "v": "qk"}
    return [
        Group(
            name=f"{name}.{role}",
            kind="head_dim",
            size=sum(parts[role]),
            site=name,
            role=role,
            limits=Limits(
                parts=parts[role],
                equal=True,
                same_as=f"{name}.{other[role]}" if choice.tied and role in other else None,
                alike=alike[role],
            ),
            slices=slices,
            scales=scales[role],
            norms=tuple(f"{name}.{norm}" for norm in choice.dims["qk"].norms)
            if role != "v" and "qk" in choice.dims
            else (),
            inputs=choice.dims[role].inputs if role in choice.dims else (),
            any_basis=role in choice.any_basis,
        )
        for role, slices in roles.items()
    ]


def _named(name: str, slices: Sequence[Slices]) -> tuple[Slices, ...]:
    return tuple(replace(part, tensor=f"{name}.{part.tensor}") for part in slices)


def _scales(name: str, module: nn.Module, slices: Sequence[Slices], role: str) -> tuple[Scale, ...]:
    """The tensors that a mask scales: the columns that read values, or what makes queries or keys last."""
    side = {"v": "consumes", "qk": "query", "key": "key"}[role]
    parameters = dict(module.named_parameters())
    chosen = [
        part
        for part in slices
        if part.side == side and part.tensor.removeprefix(f"{name}.") in parameters and not is_shared(part)
    ]
    norms = [
        part
        for part in chosen
        if isinstance(module.get_submodule(part.tensor.removeprefix(f"{name}.").rpartition(".")[0]), BATCH_NORM)
    ]
    return tuple(Scale(tensor=part.tensor, dim=part.dim, index=part.index) for part in norms or chosen)
