"""Describe layers of a model that its user replaced, such as a new classifier, as JSON values, and make them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimming.errors import CheckpointError, UnsupportedModelError
from slimming.models.allowed import check_value

LAYERS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    cls.__name__: (cls, arguments)
    for cls, arguments in (
        (nn.Linear, ("in_features", "out_features", "bias")),
        (nn.Conv2d, ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")),
        (nn.BatchNorm1d, ("num_features", "eps", "momentum", "affine", "track_running_stats")),
        (nn.BatchNorm2d, ("num_features", "eps", "momentum", "affine", "track_running_stats")),
        (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
        (nn.AdaptiveAvgPool2d, ("output_size",)),
        (nn.Flatten, ("start_dim", "end_dim")),
        (nn.Dropout, ("p",)),
        (nn.GELU, ("approximate",)),
        (nn.LeakyReLU, ("negative_slope",)),
        (nn.Softmax, ("dim",)),
        *(
            (cls, ())
            for cls in (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.Tanh, nn.Sigmoid)
        ),
        *((cls, ()) for cls in (nn.Hardswish, nn.Hardsigmoid)),
    )
}
"""Classes of layers that a structure can record, and their constructor arguments."""
SEQUENCE = "Sequential"
MOST = 16
"""Replaced layers that one structure records; a model with more differences is another model."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """The classes and settings of all modules of a model, and the shapes of its tensors in the state dict.

    Rates of dropout are left out, because they do not affect what a file holds.
    """

    modules: Mapping[str, str]
    tensors: Mapping[str, tuple[tuple[int, ...], bool]]

    @staticmethod
    def of(model: nn.Module) -> Blueprint:
        """The blueprint of ``model``."""
        return Blueprint(
            modules={name: _described(module) for name, module in model.named_modules()},
            tensors={
                name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in model.state_dict().items()
            },
        )


def _described(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Identity) or "drop" in name.lower() or name == "StochasticDepth":
        return "regularisation"
    return f"{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})"


def replaced_layers(model: nn.Module, made: Blueprint) -> dict[str, Any]:
    """What has to be replaced in the model of blueprint ``made`` to give ``model``, by the names of the modules.

    Raises:
        UnsupportedModelError: a difference cannot be recorded; the message names it.
    """
    wanted = Blueprint.of(model)
    changed = {name for name in wanted.modules.keys() | made.modules.keys() if _differs(name, wanted, made)}
    tops = sorted(name for name in changed if not any(_inside(name, outer) for outer in changed))
    found: dict[str, Any] = {}
    for name in tops:
        description = description_of(model.get_submodule(name)) if name and name in wanted.modules else None
        if description is None or len(found) == MOST:
            raise UnsupportedModelError(_difference(name, wanted, made))
        found[name] = description
    return found


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _differs(name: str, wanted: Blueprint, made: Blueprint) -> bool:
    if wanted.modules.get(name) != made.modules.get(name):
        return True
    return _direct(name, wanted) != _direct(name, made)


def _direct(name: str, blueprint: Blueprint) -> dict[str, Any]:
    """The tensors of the module ``name`` itself."""
    return {key: value for key, value in blueprint.tensors.items() if key.rpartition(".")[0] == name}


def _difference(name: str, wanted: Blueprint, made: Blueprint) -> str:
    is_, was = wanted.modules.get(name, "missing"), made.modules.get(name, "missing")
    what = f"{name or 'the model'!r} is {is_.rpartition('.')[2]}, its structure makes {was.rpartition('.')[2]}"
    if is_ == was:
        here, there = _direct(name, wanted), _direct(name, made)
        tensor = next(key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key))
        what = f"{tensor!r} is {_shape(here.get(tensor))}, its structure makes {_shape(there.get(tensor))}"
    return what


def _shape(found: tuple[tuple[int, ...], bool] | None) -> str:
    return "missing" if found is None else f"of shape {found[0]}"


def description_of(module: nn.Module) -> dict[str, Any] | None:
    """A plain layer of PyTorch, or a sequence of them, as JSON values; None if it cannot be made from them."""
    if type(module) is nn.Sequential:
        parts = {name: description_of(part) for name, part in module.named_children()}
        return None if None in parts.values() else {"class": SEQUENCE, "modules": parts}
    cls, names = LAYERS.get(type(module).__name__, (None, ()))
    if type(module) is not cls:
        return None
    values = {name: getattr(module, name, None) for name in names}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    description = {"class": type(module).__name__, "arguments": arguments}
    try:
        with torch.device("meta"):
            again = _layer(description)
    except CheckpointError:
        return None
    return description if Blueprint.of(again) == Blueprint.of(module) else None


def _layer(description: Any) -> nn.Module:
    """Make a layer from its description.

    Raises:
        CheckpointError: the description is damaged.
    """
    if not isinstance(description, Mapping):
        raise CheckpointError("The structure describes a replaced layer by no mapping; it is damaged.")
    if description.get("class") == SEQUENCE and isinstance(description.get("modules"), Mapping):
        layers = nn.Sequential()
        for name, part in description["modules"].items():
            layers.add_module(str(name), _layer(part))
        return layers
    cls, names = LAYERS.get(str(description.get("class")), (None, ()))
    arguments = description.get("arguments")
    if cls is None or not isinstance(arguments, Mapping) or set(arguments) != set(names):
        raise CheckpointError(
            f"The structure describes the layer {description!r}, which is not known. Upgrade slimming."
        )
    for name, value in arguments.items():
        check_value(cls.__name__, name, value)
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()})
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"The structure describes a {cls.__name__} that cannot be made: {error}.") from error


def replace_layers_(model: nn.Module, replaced: Mapping[str, Any]) -> None:
    """Replace the layers that a structure records; the new ones have undefined weights in the dtype of the model.

    Raises:
        CheckpointError: the record is damaged, or names no place in the model.
    """
    for name, description in replaced.items():
        parent, _, child = name.rpartition(".")
        try:
            model.get_submodule(parent).add_module(child, _layer(description).train(model.training))
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The structure replaces {name!r}, which is no layer of the model: {error}."
            ) from error
