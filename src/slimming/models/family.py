"""Interface of a model family, which reads one kind of model into plain data, and helpers that families share."""

from __future__ import annotations

import abc
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from slimming.core.groups import Anatomy, Group, Scale, Slices, TimedLayer
from slimming.core.structure import Structure
from slimming.errors import UnsupportedModelError

STRUCTURE = "slimming_structure"
"""Attribute of a slim model with its `Structure`."""

ENTRY = "slimming_entry"
"""Attribute of a module that was resized within a larger model, with its entry in the structure's ``layers``; an empty
one if the family of that model keeps none by module."""

BLUEPRINT = "slimming_blueprint"
"""Attribute of a slim model that only its user can make, with the `Blueprint` of what its structure gives."""

ORIGIN = "slimming_origin"
"""Attribute of a model that slimming created with the name and arguments that were passed to its host."""

PARAMETRIZATIONS = ".parametrizations."
"""Part of the names of masks and of the tensors that they scale."""

Kept = Mapping[str, tuple[int, ...]]
"""Group -> its kept units."""


class TimedModule(NamedTuple):
    """A module whose time is measured in place of a layer's.

    Attributes:
        module: takes one tensor.
        shape: shape of that tensor without the batch dimension.
        copies: number of copies of the layer that run in one call.
    """

    module: nn.Module
    shape: tuple[int, ...]
    copies: int = 1


TimedModules = Callable[[TimedLayer, Mapping[str, int]], TimedModule]
"""Gives the module to time for a timed layer and the sizes (axis -> size) that it is timed at."""


class Family(abc.ABC):
    """Reads one kind of model into plain data, builds it again and resizes it."""

    name: ClassVar[str]
    runs_models: ClassVar[bool] = False
    """Whether `read` runs the model, which then cannot be on the meta device."""

    @abc.abstractmethod
    def reads(self, model: nn.Module) -> bool:
        """Whether this family supports ``model``."""

    @abc.abstractmethod
    def read(self, model: nn.Module) -> Anatomy:
        """Read the model.

        Raises:
            UnsupportedModelError: a part of the model is not supported.
        """

    @abc.abstractmethod
    def build(self, base: Mapping[str, Any]) -> nn.Module:
        """Build the dense model, with undefined weights, or on the meta device.

        Args:
            base: `Structure.base` as `read` gives it.

        Raises:
            CheckpointError: the host does not have the architecture or rejects an argument.
        """

    def has_memory_formula(self, anatomy: Anatomy, kept: Kept) -> bool:
        """Whether the operations of ``anatomy`` give the live tensors of the model that is cut to ``kept``."""
        return False

    def timed_modules(self, model: nn.Module, anatomy: Anatomy, *, uneven_heads: bool = False) -> TimedModules:
        """Prepare the timing of ``model``, which happens once for all its timed layers.

        Args:
            model: the dense model in evaluation mode, on the device and in the dtype that are timed.
            anatomy: what `read` returns for it.
            uneven_heads: the heads of an attention layer differ in size, as in plans without equal heads.

        Returns:
            A function that makes the module to time for one of ``anatomy.timed_layers``.

        Raises:
            UnsupportedModelError: the family does not time layers, or not with uneven heads.
        """
        raise UnsupportedModelError(f"Family {self.name} does not time layers.")

    @abc.abstractmethod
    def structure(self, anatomy: Anatomy, kept: Kept) -> Structure:
        """The structure of the model that is cut to ``kept``, complete as `slimming.core.groups.resolve` gives it."""

    @abc.abstractmethod
    def select(self, anatomy: Anatomy, kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the slim model, selected from that of the model that ``anatomy`` describes."""

    @abc.abstractmethod
    def resize_(self, model: nn.Module, structure: Structure) -> None:
        """Resize the modules to ``structure``; the contents of resized parameters are undefined."""


def assign_state_(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Replace the tensors of ``model`` by those of ``state``.

    The version metadata of the model is added, because some hosts convert state dicts without it. Parameters that
    several modules share remain shared, and a module with several names gets the tensors of its first name.
    """
    shared = shared_parameters(model)
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # pyright: ignore
    for alias, first in aliases(model).items():
        if first in versioned:
            versioned[alias] = versioned[first]
    model.load_state_dict(versioned, strict=strict, assign=True)
    tie_(model, shared)


def aliases(model: nn.Module) -> dict[str, str]:
    """The further names of the tensors of modules that are registered under several names -> their first names."""
    names: dict[nn.Module, str] = {}
    result: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.setdefault(module, name)
        if first != name:
            for key in (*module._parameters, *module._buffers):
                result[f"{name}.{key}"] = f"{first}.{key}" if first else key
    return result


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that several modules share, except masks.

    A module that is registered under several names is one module.
    """
    names: defaultdict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            name = f"{module_name}.{key}" if module_name else key
            if parameter is not None and PARAMETRIZATIONS not in name:
                names[id(parameter)].append(name)
    return [found for found in names.values() if len(found) > 1]


def tie_(model: nn.Module, shared: Iterable[Sequence[str]]) -> None:
    """Give all parameters of each list of names in ``shared`` the first of them, see `shared_parameters`.

    Names of modules that were removed since are passed over.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    for names in shared:
        first, *others = [name for name in names if name in present] or [""]
        for other in others:
            module, _, name = other.rpartition(".")
            setattr(model.get_submodule(module), name, present[first])


def untied_groups(model: nn.Module, groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """Those of ``groups`` without shared parameters, and for each of the others the reason why it cannot be cut."""
    shared = {name for names in shared_parameters(model) for name in names}
    untied = [group for group in groups if not any(part.tensor in shared for part in group.slices)]
    return untied, [f"{group.name}: it is shared by several modules" for group in groups if group not in untied]


def select_indices(tensor: Tensor, indices: Mapping[int, Sequence[int]]) -> Tensor:
    """Select ``indices[dim]`` along each dimension; returns the tensor itself if nothing is removed.

    Args:
        tensor: any shape.
        indices: dimension -> indices to keep.
    """
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    for dim, index in indices.items():
        if list(index) != list(range(tensor.shape[dim])):
            tensor = tensor.index_select(dim, torch.tensor(list(index), device=tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


def linear_like(old: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    """A Linear of another size with the device, dtype, bias, mode and ``requires_grad`` of ``old``."""
    # The meta device avoids an initialisation whose values would be overwritten.
    new = nn.Linear(in_features, out_features, bias=old.bias is not None, device="meta", dtype=old.weight.dtype)
    new.to_empty(device=old.weight.device)
    for name, parameter in old.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    new.train(old.training)
    return new


def difference(wanted: nn.Module, made: nn.Module) -> str | None:
    """A sentence about the first difference in modules or tensor shapes; None if there is none.

    Args:
        wanted: the model.
        made: what its host builds.
    """
    modules, made_modules = dict(wanted.named_modules()), dict(made.named_modules())
    for name in sorted(modules.keys() ^ made_modules.keys()):
        return f"module {name!r} exists in only one of the two"
    for name, module in modules.items():
        other = made_modules[name]
        if type(module) is not type(other) or module.extra_repr() != other.extra_repr():
            return f"module {name!r} is {_describe(module)}, its host makes {_describe(other)}"
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    for name, tensor in wanted.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            return f"{name} has shape {tuple(tensor.shape)}, its host makes {shapes.get(name)}"
    return None


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def zero_slices_(tensor: Tensor, slices: Slices | Scale, units: Iterable[int]) -> None:
    """Set the slices of ``units`` in ``tensor`` to 0, except for entries that they share with other units."""
    removed = set(units)
    others = {index for unit, of_unit in enumerate(slices.index) if unit not in removed for index in of_unit}
    indices = {index for unit in removed for index in slices.index[unit]} - others
    tensor.index_fill_(slices.dim, torch.tensor(sorted(indices), dtype=torch.int64, device=tensor.device), 0.0)
