"""What a family is: the reader of one kind of model, and the only code that names its host's classes."""

from __future__ import annotations

import abc
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from slimming.core.groups import Anatomy, Group, Piece, Slices
from slimming.core.structure import Structure
from slimming.errors import UnsupportedModelError

STRUCTURE = "slimming_structure"
"""Attribute of a slim model that holds its structure as plain data."""

ORIGIN = "slimming_origin"
"""Attribute of a model that slimming made: the name and arguments that its host was given."""

FACTORS = ".parametrizations."
"""In the names of masks, and of what they scale."""

Kept = Mapping[str, tuple[int, ...]]


class Timed(NamedTuple):
    """A module to time in place of a piece.

    Attributes:
        module: takes one tensor.
        shape: of that tensor, without the batch.
        copies: how many of the piece run in it.
    """

    module: nn.Module
    shape: tuple[int, ...]
    copies: int = 1


class Family(abc.ABC):
    """Reads one kind of model into plain data, and rebuilds and resizes it."""

    name: ClassVar[str]
    runs_models: ClassVar[bool] = False
    """Whether reading runs the model, which then cannot be on the meta device."""

    @abc.abstractmethod
    def reads(self, model: nn.Module) -> bool:
        """Whether the model is of this family."""

    @abc.abstractmethod
    def read(self, model: nn.Module) -> Anatomy:
        """Read the model.

        Raises:
            UnsupportedModelError: a part has no reader.
        """

    @abc.abstractmethod
    def base(self, model: nn.Module) -> dict[str, Any]:
        """How the host makes this (dense) model again: names and arguments, plain data.

        Raises:
            UnsupportedModelError: no way was found that gives the same modules.
        """

    @abc.abstractmethod
    def build(self, base: Mapping[str, Any]) -> nn.Module:
        """Make the dense model on the meta device.

        Raises:
            CheckpointError: the host does not know the architecture or its arguments.
        """

    def has_memory_formula(self, anatomy: Anatomy, kept: Kept) -> bool:
        """Whether the operations of ``anatomy`` say what is alive while they run when ``kept`` stays."""
        return False

    def piece_module(
        self, model: nn.Module, piece: Piece, sizes: Mapping[str, int], *, uneven_heads: bool = False
    ) -> Timed:
        """A module that does what ``piece`` does at ``sizes``, for timing.

        Args:
            model: the dense model.
            piece: one of its pieces.
            sizes: axis -> size.
            uneven_heads: heads of an attention differ in size, as they do where a plan is free to choose.
        """
        raise UnsupportedModelError(f"Family {self.name} has no pieces to time.")

    @abc.abstractmethod
    def structure(self, anatomy: Anatomy, kept: Kept) -> Structure:
        """The structure that is left when ``kept`` (complete, see `slimming.core.groups.resolve`) stays."""

    @abc.abstractmethod
    def select(self, anatomy: Anatomy, kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the slim model, taken from that of the model that ``anatomy`` describes."""

    @abc.abstractmethod
    def resize_(self, model: nn.Module, structure: Structure) -> None:
        """Give the modules the sizes of ``structure``; the contents of resized parameters are undefined."""


def fill_(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Put the tensors of ``state`` in place of the model's own.

    Modules are told that the tensors are of their own version: some hosts change what comes without one. Parameters
    that several modules share stay shared.
    """
    shared = shared_parameters(model)
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # pyright: ignore
    model.load_state_dict(versioned, strict=strict, assign=True)
    for first, *others in shared:
        for other in others:
            module, _, name = other.rpartition(".")
            setattr(model.get_submodule(module), name, model.get_parameter(first))


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has more than one; masks have, and are not meant."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if FACTORS not in name:
            names[id(parameter)].append(name)
    return [own for own in names.values() if len(own) > 1]


def of_one_name(model: nn.Module, groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """Those of ``groups`` whose tensors have one name each, and why the others stay whole."""
    shared = {name for names in shared_parameters(model) for name in names}
    single = [group for group in groups if not any(one.tensor in shared for one in group.slices)]
    return single, [f"{group.name}: it is shared by several modules" for group in groups if group not in single]


def take(tensor: Tensor, indices: Mapping[int, Sequence[int]]) -> Tensor:
    """Select ``indices[dim]`` along each dimension; the tensor itself where nothing goes.

    Args:
        tensor: any shape.
        indices: dimension -> places to keep.
    """
    for dim, index in indices.items():
        if list(index) != list(range(tensor.shape[dim])):
            tensor = tensor.index_select(dim, torch.tensor(list(index), device=tensor.device))
    return tensor


def linear_like(old: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    """A Linear of another size with the device, dtype, bias, mode and training flags of ``old``."""
    # Made on the meta device first, which spares an initialisation that nobody reads.
    new = nn.Linear(in_features, out_features, bias=old.bias is not None, device="meta", dtype=old.weight.dtype)
    new.to_empty(device=old.weight.device)
    for name, parameter in old.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    new.train(old.training)
    return new


def difference(wanted: nn.Module, made: nn.Module) -> str | None:
    """The first way in which two models differ in modules or parameter shapes, in words."""
    ours, theirs = dict(wanted.named_modules()), dict(made.named_modules())
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"module {name!r} exists in only one of the two"
    for name, module in ours.items():
        if type(module) is not type(theirs[name]) or module.extra_repr() != theirs[name].extra_repr():
            return f"module {name!r} is {_describe(module)}, its host makes {_describe(theirs[name])}"
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    for name, tensor in wanted.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            return f"{name} has shape {tuple(tensor.shape)}, its host makes {shapes.get(name)}"
    return None


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def silence_(tensor: Tensor, slices: Slices, units: Iterable[int]) -> None:
    """Set the slices of ``units`` in ``tensor`` to 0."""
    places = [place for unit in units for place in slices.index[unit]]
    tensor.index_fill_(slices.dim, torch.tensor(places, dtype=torch.int64, device=tensor.device), 0.0)
