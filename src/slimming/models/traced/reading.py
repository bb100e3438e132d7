"""Read a model by tracing it: find groups of units, verify them on the model, and derive its cost formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimming.core.formulas import Dim, Operation
from slimming.core.groups import Group, LayerSizes, TimedLayer
from slimming.errors import UnsupportedModelError
from slimming.models.family import STRUCTURE, Kept, untied_groups
from slimming.models.traced.channels import CONV, channel_groups
from slimming.models.traced.detectors import enlarges_images, small_images
from slimming.models.traced.heads import Attributes
from slimming.models.traced.inferred_heads import infer_heads
from slimming.models.traced.operations import operations
from slimming.models.traced.progress import Progress
from slimming.models.traced.resize import clear_caches_, cut_copy, layer_sizes
from slimming.models.traced.table_reading import layers_per_head, opaque_slices, read_heads, read_hidden
from slimming.models.traced.timed_layers import calls, timed_layers
from slimming.models.traced.verification import outputs, randomise_, verified

WIDTHS = ("hidden_dim", "embed_dim", "num_features", "head_hidden_size")
"""Attributes in which models keep their embedding width, or that of their last stage."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read from a model, see `slimming.core.groups.Anatomy`."""

    groups: tuple[Group, ...]
    operations: tuple[Operation, ...]
    sizes: Mapping[str, LayerSizes]
    uncovered: tuple[str, ...]
    inferred: tuple[str, ...]
    timed_layers: tuple[TimedLayer, ...]


def read_model(model: nn.Module, shape: tuple[int, int, int]) -> Reading:
    """Read a model.

    Args:
        model: the model; it is copied.
        shape: channels, height and width of an image.

    Raises:
        UnsupportedModelError: the model cannot be run, or nothing in it can be cut.
    """
    model_class = type(model)
    model = _random_copy(model)
    example = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    progress = Progress(model_class.__name__)
    with small_images(model):
        idle = _idle_layers(model, example)
        progress.step("looking for attention")
        inferred = infer_heads(model, example)
        heads, hidden = read_heads(model, inferred.rows, inferred.unread), read_hidden(model)
        claimed = {**hidden.claimed, **heads.claimed}
        channels, uncovered_channels = channel_groups(
            model,
            example,
            claimed,
            opaque_slices(model),
            lambda layer: progress.step(f"following the channels of {layer}"),
        )
    channels = apart_from(channels, [group for group in heads.groups if group.site in inferred.rows])
    uncovered = [*inferred.unread.values(), *heads.uncovered, *hidden.uncovered, *uncovered_channels]
    if idle:
        uncovered.append(f"{len(idle)} layers, the first of them {idle[0]}: they do not run for one image")
    groups, tied = untied_groups(model, [*heads.groups, *hidden.groups, *channels])
    uncovered += tied
    attributes = _merged(heads.attributes, hidden.attributes, {"": _width_attributes(model, groups)})
    if not groups:
        raise UnsupportedModelError(
            f"Nothing in this {model_class.__module__}.{model_class.__name__} can be cut: "
            f"{'; '.join(uncovered) or 'it has no layers that slimming reads'}. "
            "docs/add-a-model.md shows how to add a reader."
        )
    model.requires_grad_(False)
    for module in model.modules():
        clear_caches_(module)  # tracing left tensors with a graph in them, which cannot be copied

    def cut(model: nn.Module, groups: Sequence[Group], kept: Kept) -> nn.Module:
        progress.step(f"checking {len(groups)} groups on the model, the last of them {groups[-1].name}")
        return cut_copy(model, groups, kept, layer_sizes(model, groups, attributes, heads.free_heads))

    with small_images(model):
        groups, failed = verified(model, groups, example, cut)
    uncovered += [f"{group.name}: {reason}" for group, reason in failed]
    if not groups:
        raise UnsupportedModelError(f"Nothing in this {model_class.__name__} can be cut: {'; '.join(uncovered)}.")
    groups.sort(key=_module_order(model))
    sizes = layer_sizes(model, groups, attributes, heads.free_heads)
    model.eval()
    if enlarges_images(model):
        model, example = model.float(), example.float()  # counting at this size needs half the time of float64
    progress.step("counting multiply-adds")
    return Reading(
        groups=tuple(groups),
        operations=operations(model, example, groups, layers_per_head(model)),
        sizes=sizes,
        uncovered=tuple(uncovered),
        inferred=tuple(inferred.lines),
        timed_layers=timed_layers(model, calls(model, example, attention_sites(groups)), groups, sizes),
    )


def apart_from(channels: Sequence[Group], heads: Sequence[Group]) -> list[Group]:
    """The groups of ``channels`` that are not the rows or columns of ``heads``, which are cut by heads."""
    taken = {(part.tensor, part.dim) for group in heads for part in group.slices}
    return [group for group in channels if not any((part.tensor, part.dim) in taken for part in group.slices)]


def attention_sites(groups: Iterable[Group]) -> set[str]:
    """Names of the modules whose heads are groups."""
    return {group.site for group in groups if group.kind == "head"}


def _random_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU with random weights; reading does not depend on the weights."""
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        # Buffers such as tables of positions would have no values.
        raise UnsupportedModelError(
            f"This {type(model).__name__} is on the meta device, and is read by running it: make it on the CPU."
        )
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(True)
    for module in model.modules():
        module.__dict__.pop(STRUCTURE, None)
    randomise_(model)
    return model


def _idle_layers(model: nn.Module, example: Tensor) -> list[str]:
    """The layers that do not run in a forward pass.

    If some layers, such as auxiliary heads, run in training mode only, the model is left in training mode; its
    submodules stay in evaluation mode.

    Raises:
        UnsupportedModelError: the model does not take the example.
    """
    idle = _not_run(model, example)
    if idle:
        model.training = True
        try:
            idle_in_training = _not_run(model, example)
        except UnsupportedModelError:
            idle_in_training = idle
        if len(idle_in_training) < len(idle):
            return idle_in_training
        model.training = False
    return idle


def _not_run(model: nn.Module, example: Tensor) -> list[str]:
    """The layers with weights that do not run in one forward pass, and whose parent does not run either."""
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: ran.add(module)) for m in model.modules()]
    try:
        with torch.no_grad():
            outputs(model, example)
    except Exception as error:  # hosts raise errors of any class
        first = (str(error).splitlines() or [""])[0]
        raise UnsupportedModelError(
            f"This {type(model).__name__} does not take one image of {tuple(example.shape[1:])} "
            f"({type(error).__name__}: {first}). If it takes another size, say so in its attribute image_size; if it "
            "takes more than an image, wrap it in a module whose forward takes the image."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, *CONV)) and module not in ran and modules[name.rpartition(".")[0]] not in ran
    ]


def _merged(*attributes: Attributes) -> Attributes:
    """The attributes of every module, from all of ``attributes``."""
    result: Attributes = {}
    for by_module in attributes:
        for module, values in by_module.items():
            result[module] = {**result.get(module, {}), **values}
    return result


def _width_attributes(model: nn.Module, groups: Iterable[Group]) -> dict[str, Dim]:
    """The model's attributes that hold an embedding width, if only one group has this size."""
    widths = [group for group in groups if group.kind == "width"]
    result: dict[str, Dim] = {}
    for name in WIDTHS:
        same = [group for group in widths if vars(model).get(name) == group.size]
        if len(same) == 1:
            result[name] = Dim(groups=((same[0].name, 1),))
    return result


def _module_order(model: nn.Module) -> Callable[[Group], tuple[int, str]]:
    """A sort key that puts groups in the order of the model's modules."""
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return lambda group: (order.get(group.site, len(order)), group.name)
