"""Check the entries of a structure before modules are resized to them: a file may say anything.

A cut only makes a model smaller, so every size is bounded by that of the dense model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
from torch import nn

from slimming.core.limits import MOST_IN_RANGE
from slimming.core.records import converted, shown
from slimming.errors import CheckpointError, nearest
from slimming.models.separate import SeparateLinear
from slimming.models.traced.input_columns import COLUMNS
from slimming.models.traced.resize import FREE_HEADS, REMOVED, SEPARATE, SPENT, TENSORS
from slimming.models.traced.token_blocks import TABLE, TOKENS

_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_IN_RANGE)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=MOST_IN_RANGE)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
_Key = Annotated[int, msgspec.Meta(ge=0, le=1000)] | _Name
_Dim = Annotated[int, msgspec.Meta(ge=-8, le=8)]
_ATTRIBUTE = re.compile(r"([A-Za-z][A-Za-z0-9_]{0,99})(?:\[(\d)\])?")
"""A size attribute, or one element of a tuple of sizes, such as ``bias_shape[2]``."""


@dataclass(frozen=True, kw_only=True)
class _Input:
    path: list[_Key]
    dims: list[_Dim]
    fixed: bool


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    path: list[_Key]
    grid: _Size
    prefix: _Count
    suffix: _Count
    incoming: list[_Count]
    positions: list[_Count]
    inputs: list[_Input]


@dataclass(frozen=True, kw_only=True)
class _Table:
    index: list[_Count]
    of: _Size


@dataclass(frozen=True, kw_only=True)
class _Columns:
    path: list[_Key]
    dim: _Dim
    index: Annotated[list[_Count], msgspec.Meta(min_length=1)]


_SCHEMAS: Mapping[str, Any] = {
    TENSORS: dict[str, list[_Size]],
    FREE_HEADS: Literal[True],
    SEPARATE: Annotated[list[_Size], msgspec.Meta(min_length=3, max_length=16)],
    REMOVED: tuple[Literal["one", "tuple", "list"], Annotated[list[list[_Key]], msgspec.Meta(min_length=1)]],
    SPENT: list[str],
    TOKENS: _Tokens,
    TABLE: _Table,
    COLUMNS: list[_Columns],
}


def check_entry(model: nn.Module, name: str, entry: Any) -> None:
    """Check the entry of a structure for the module ``name`` of ``model``, which still has the sizes before the cut.

    Raises:
        CheckpointError: the model has no such module, or the module cannot have what the entry says.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise CheckpointError(
            f"The structure resizes {shown(name)}, which is no module of {type(model).__name__}."
            f"{nearest(name, modules)} Take an intact copy."
        )
    checked = _Entry(name, modules[name])
    content = converted(entry, dict[str, Any], f"The structure of {checked.name}")
    for key, value in content.items():
        if key in _SCHEMAS:
            content[key] = converted({key: value}, dict[str, _SCHEMAS[key]], f"The structure of {checked.name}")[key]
        else:
            checked.size(key, value)
    checked.tensors(content.get(TENSORS, {}), content.get(SPENT, []))
    if SEPARATE in content:
        checked.separate(content[SEPARATE], content.get(TENSORS, {}))
    if REMOVED in content:
        checked.removed(*content[REMOVED])
    if TOKENS in content:
        checked.tokens(content[TOKENS])
    if TABLE in content:
        checked.ascending(content[TABLE].index, range(content[TABLE].of))
    for columns in content.get(COLUMNS, ()):
        checked.ascending(columns.index, range(MOST_IN_RANGE))


class _Entry:
    """Checks of the parts of one entry against its module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = shown(name or "the model"), module

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"The structure of {self.name} is damaged: {what}. Take an intact copy.")

    def size(self, key: str, value: Any) -> None:
        """Check the value of an attribute that holds a size, a switch, or the scale of logits."""
        parts = _ATTRIBUTE.fullmatch(key)
        old: Any = getattr(self.module, parts[1], None) if parts else None
        if parts and parts[2]:
            old = old[int(parts[2])] if type(old) in (tuple, list) and int(parts[2]) < len(old) else None
        if type(old) not in (bool, int, float):
            raise self.damaged(f"its {type(self.module).__name__} has no size {shown(key)}")
        if type(old) is bool:
            fits = value == 1
        elif type(old) is int:
            fits = type(value) is int and 0 < value <= old
        else:
            fits = type(value) is float and 0 < value < math.inf
        if not fits:
            raise self.damaged(f"{key} is {shown(value)}, in the dense model {old}")

    def tensors(self, shapes: Mapping[str, Sequence[int]], spent: Sequence[str]) -> None:
        """Check the shapes of parameters and buffers, and the names of those that are not needed any more."""
        tensors = {**self.module._parameters, **self.module._buffers}
        for name in (*shapes, *spent):
            if tensors.get(name) is None:
                raise self.damaged(f"its {type(self.module).__name__} has no tensor {shown(name)}")
        for name, shape in shapes.items():
            dense = tensors[name].shape
            if len(shape) != len(dense) or any(size > most for size, most in zip(shape, dense, strict=False)):
                raise self.damaged(f"{name} has shape {shown(list(shape))}, in the dense model {list(dense)}")

    def separate(self, sizes: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> None:
        """Check the sizes of heads in the parts of a projection."""
        if not isinstance(self.module, nn.Linear) or type(self.module) not in (nn.Linear, SeparateLinear):
            raise self.damaged(f"a {type(self.module).__name__} has no heads of different sizes")
        heads, _, *parts = sizes
        rows = shapes.get("weight", self.module.get_parameter("weight").shape)[0]
        if heads * sum(parts) != rows:
            raise self.damaged(f"{heads} heads of {sum(parts)} rows are not the {rows} rows of its weight")

    def removed(self, form: str, results: Sequence[Sequence[int | str]]) -> None:
        """Check what takes the place of a module that was removed, see `slimming.models.layers.Removed`."""
        lengths = {"zeros": (2, 3), "input": (2,), "none": (1,)}
        known = all(result and len(result) in lengths.get(str(result[0]), ()) for result in results)
        if not known or any(type(result[2]) is not int for result in results if len(result) == 3):
            raise self.damaged(f"{shown(list(results))} are no results of a removed module")
        if self.name == shown("the model") or (form == "one" and len(results) != 1):
            raise self.damaged("it is removed, but what the model returns in its place is not clear")

    def tokens(self, tokens: _Tokens) -> None:
        """Check the positions of the tokens that a block keeps."""
        self.ascending(tokens.incoming, range(tokens.grid))
        self.ascending(tokens.positions, frozenset(tokens.incoming))

    def ascending(self, positions: Sequence[int], among: Container[int]) -> None:
        """Check that positions ascend and are among others."""
        for before, here in pairwise((-1, *positions)):
            if here <= before or here not in among:
                raise self.damaged(f"position {here} is repeated, out of order, or not among those before the cut")
