"""Find the modules and parameters that no example call uses, and the groups whose units they could read.

What such a module would read cannot be known, since it never ran. It could read every tensor with as many channels as
one of its layers takes or makes, so the groups of these channels are not offered. If a layer takes a number of channels
that occurs nowhere in the model, such as that of a concatenation, no group is offered.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from slimming.core.groups import Group
from slimming.models.traced.channels import CONV
from slimming.models.traced.courses import storage

HARMLESS = ("mask_token",)
"""Parameters that replace masked patches during pretraining only; they are named but keep no group from being cut."""


@dataclass(frozen=True)
class Unrun:
    """A module, or a single parameter, that no example call uses.

    Attributes:
        name: its name.
        what: ``"module"`` or ``"parameter"``.
        reads: channels that its layers take.
        makes: channels that its layers make.
        flattened: those of ``reads`` that may be several positions of fewer channels, as of a Linear after a flatten.
    """

    name: str
    what: str
    reads: frozenset[int]
    makes: frozenset[int]
    flattened: frozenset[int] = frozenset()


def unrun(model: nn.Module, storages: Collection[int]) -> list[Unrun]:
    """The outermost modules none of whose parameters are used, and the other parameters that are not used.

    Args:
        model: the model.
        storages: addresses of the storages that were used.
    """

    def is_used(tensor: Tensor) -> bool:
        return tensor.numel() == 0 or storage(tensor) in storages

    found: list[Unrun] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        parameters = list(module.parameters())
        if name and parameters and not any(map(is_used, parameters)):
            inside = (*inside, f"{name}.")
            found.append(_unrun_module(name, module))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if not is_used(parameter):
                widths = frozenset(size for size in parameter.shape if size > 1)
                found.append(Unrun(f"{name}.{key}" if name else key, "parameter", widths, widths))
    return found


def _unrun_module(name: str, module: nn.Module) -> Unrun:
    reads, makes, flattened = set[int](), set[int](), set[int]()
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            sizes = [*parameter.shape]
            if isinstance(layer, (nn.Linear, *CONV)) and parameter.dim() > 1:
                groups = getattr(layer, "groups", 1)
                # A Linear may read what a layer before it made, flattened.
                if not isinstance(layer, nn.Linear) or not any(sizes[1] % own == 0 for own in makes if own > 1):
                    reads.add(sizes[1] * groups)
                if isinstance(layer, nn.Linear):
                    flattened.add(sizes[1])
                makes.add(sizes[0])
            elif not isinstance(layer, (nn.Linear, *CONV)):
                reads.update(size for size in sizes if size > 1)
                makes.update(size for size in sizes if size > 1)
    return Unrun(name, "module", frozenset(reads), frozenset(makes), frozenset(flattened))


def withheld(model: nn.Module, groups: Sequence[Group], found: Iterable[Unrun]) -> tuple[list[Group], list[str]]:
    """The groups that no unrun module could read, and sentences about the unrun modules.

    Args:
        model: the model.
        groups: its groups.
        found: what `unrun` gives.
    """
    found = list(found)
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    names = tuple(f"{each.name}." for each in found)
    known = {size for name, shape in shapes.items() if not f"{name}.".startswith(names) for size in shape[:2]}
    widths = {group.name: _widths(group, shapes) for group in groups}
    offered, sentences = list(groups), []
    for each in found:
        kept = [] if each.name.rpartition(".")[2] in HARMLESS else _readable(each, groups, widths, known)
        offered = [group for group in offered if group not in kept]
        sentences.append(_sentence(model, each, len(kept)))
    return offered, sentences


def _widths(group: Group, shapes: dict[str, tuple[int, ...]]) -> set[int]:
    """The channels of the tensors in which the units of ``group`` are seen outside the module that they belong to."""
    if group.kind == "head":
        return {group.size}
    return {shapes[part.tensor][part.dim] for part in group.slices if part.tensor in shapes} | {group.size}


def _readable(
    module: Unrun, groups: Sequence[Group], widths: dict[str, set[int]], known: Collection[int]
) -> list[Group]:
    """The groups whose units ``module`` could read, or to which it could add."""
    touched = module.reads | module.makes
    result = [group for group in groups if widths[group.name] & touched]
    for size in module.reads:
        if size == 1 or size in known or size in module.makes:
            continue
        parts = [group for group in groups if any(size % width == 0 for width in widths[group.name])]
        result += parts if size in module.flattened and parts else groups
    return result


def _sentence(model: nn.Module, each: Unrun, count: int) -> str:
    groups = "1 group" if count == 1 else f"{count} groups"
    effect = f", so that {groups} of units that it could read cannot be cut" if count else ""
    return (
        f"{each.name}: no example call uses this {each.what}, in evaluation or in training{effect}. {_way(model, each)}"
    )


def _way(model: nn.Module, each: Unrun) -> str:
    """How to make the module run: by an argument of the model's forward, or by a setting of a module around it."""
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    arguments = [one for one in inspect.signature(model.forward).parameters.values() if one.kind in plain]
    required = [one.name for one in arguments if one.default is inspect.Parameter.empty]
    optional = [one.name for one in arguments if one.default is not inspect.Parameter.empty]
    owners = [each.name.rsplit(".", depth)[0] for depth in range(1, each.name.count(".") + 1)]
    key = next((name for name in owners if isinstance(model.get_submodule(name), nn.ModuleDict)), None)
    value = "..." if key is None else repr(each.name[len(key) + 1 :].partition(".")[0])
    first = ", ".join(f"{name!r}: {'image' if not at else '...'}" for at, name in enumerate(required))
    settings = [
        f"{owner}.{name}" if owner else name
        for owner in [*owners, ""]
        for name, value in vars(model.get_submodule(owner)).items()
        if not name.startswith("_") and name != "training" and type(value) in (bool, str)
    ]
    call = f"{{{first}, {optional[0]!r}: {value}}}" if optional else "(image, ...)"
    ways = [f"Give a call that uses it: describe(model, example_inputs=[{{{first}}}, {call}])"]
    if len(optional) > 1:
        ways.append(f"with another of the arguments {', '.join(optional[1:4])}")
    if settings:
        ways.append(f"set {' or '.join(settings[:3])} so that it is used")
    return ", or ".join([*ways, f"delete the {each.what}"])
