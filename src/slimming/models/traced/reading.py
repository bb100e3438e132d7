"""Read a model by tracing it: find groups of units, verify them on the model, and derive its cost formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slimming.core.copies import clear_caches_, copied
from slimming.core.example_inputs import ExampleCall
from slimming.core.formulas import Dim, Operation
from slimming.core.groups import Group, LayerSizes, TimedLayer
from slimming.core.modules import MODEL_ERRORS
from slimming.errors import UnsupportedModelError
from slimming.models.family import STRUCTURE, Kept
from slimming.models.traced.branches import (
    layers_of_branches,
    read_branches,
    with_removals,
)
from slimming.models.traced.channel_parts import part_attributes
from slimming.models.traced.channels import BATCH_NORM, channel_groups
from slimming.models.traced.courses import Course, course_of, distinct
from slimming.models.traced.detectors import enlarges_images, small_images
from slimming.models.traced.fixed import check_resizable, computed_weights
from slimming.models.traced.head_dims import read_head_dims
from slimming.models.traced.inferred_heads import infer_heads
from slimming.models.traced.mlp import among
from slimming.models.traced.normalisers import norm_layers, normaliser_attributes
from slimming.models.traced.operations import operations
from slimming.models.traced.progress import Progress
from slimming.models.traced.random_statistics import fit_statistics_, with_enough_values
from slimming.models.traced.residuals import Flow
from slimming.models.traced.resize import cut_copy, layer_sizes, tensor_dims
from slimming.models.traced.table_reading import opaque_slices, read_heads, read_hidden
from slimming.models.traced.tied import joined_groups
from slimming.models.traced.timed_layers import calls, timed_layers
from slimming.models.traced.tokens import read_tokens
from slimming.models.traced.unrun import unrun, withheld
from slimming.models.traced.verification import Pass, randomise_
from slimming.models.traced.whole_blocks import verified_with_branches

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
    input_shape: tuple[int, ...]
    timed_layers: tuple[TimedLayer, ...]


@torch.enable_grad()
def read_model(model: nn.Module, candidates: Sequence[Sequence[ExampleCall]]) -> Reading:
    """Read a model.

    Args:
        model: the model; it is copied.
        candidates: lists of example calls, of which the first that the model takes is used.

    Raises:
        UnsupportedModelError: the model cannot be run, or nothing in it can be cut.
    """
    model_class = type(model)
    # After a deep cut nothing may be left to cut, and the model must still have its costs.
    is_slim = any(STRUCTURE in vars(module) for module in model.modules())
    model = _random_copy(model)
    progress = Progress(model_class.__name__)
    with small_images(model):
        passes, courses, uncovered = _passes(model, candidates)
        found = unrun(model, frozenset[int]().union(*(course.storages for course in courses)))
        progress.step("looking for attention")
        flow = Flow()
        inferred = infer_heads(model, passes[0], flow.watching(model))
        computed, hidden, norms = computed_weights(model), read_hidden(model), norm_layers(model)
        heads = read_heads(model, inferred.rows, inferred.unread)
        dims = read_head_dims(model, heads.rows, passes[0])
        claimed = {**hidden.claimed, **heads.claimed, **computed}
        channels, uncovered_channels = channel_groups(
            model,
            distinct(passes, courses),
            claimed,
            opaque_slices(model),
            norms,
            lambda layer: progress.step(f"following the channels of {layer}"),
        )
    channels = _apart_from(channels, [group for group in heads.groups if group.site in inferred.rows])
    uncovered = [
        *inferred.unread.values(),
        *heads.uncovered,
        *dims.uncovered,
        *hidden.uncovered,
        *uncovered_channels,
        *uncovered,
    ]
    groups, tied = joined_groups(model, [*heads.groups, *dims.groups, *hidden.groups, *channels])
    groups, parametrized = _without_computed(groups, computed)
    groups, unrun_modules = withheld(model, groups, found)
    uncovered += [*tied, *parametrized, *unrun_modules]
    attributes = [heads.attributes, {"": _width_attributes(model, groups)}, *dims.attributes]
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}

    def sizes_of(groups: Sequence[Group]) -> dict[str, LayerSizes]:
        rewritten = heads.free_heads | dims.free_heads
        units = [group for group in groups if group.role != "branch"]
        counted = normaliser_attributes(norms.normalisers, tensor_dims(units, shapes))
        of_units = [part_attributes(model, units), among(model, hidden.attributes, units), counted, *attributes]
        sizes = layer_sizes(model, units, of_units, rewritten, dims.head_scales, dims.separate)
        return with_removals(sizes, branches, {group.name for group in groups})

    if not groups and not is_slim:
        raise UnsupportedModelError(
            f"Nothing in this {model_class.__module__}.{model_class.__name__} can be cut: "
            f"{'; '.join(uncovered) or 'it has no layers that slimming reads'}. "
            "docs/add-a-model.md shows how to add a reader."
        )
    model.requires_grad_(False)
    with small_images(model):
        branches = read_branches(model, flow, passes[0])
    del flow
    for module in model.modules():
        clear_caches_(module)  # tracing left tensors with a graph in them

    def cut(model: nn.Module, groups: Sequence[Group], kept: Kept) -> nn.Module:
        progress.step(f"checking {len(groups)} groups on the model, the last of them {groups[-1].name}")
        return cut_copy(model, groups, kept, sizes_of(groups))

    with small_images(model):
        groups, branches, failed = verified_with_branches(model, groups, branches, passes, cut)
        tokens, without_tokens = read_tokens(model, groups, passes, courses[0], cut)
    groups += tokens
    uncovered += branches.uncovered
    uncovered += [f"{group.name}: {reason}" for group, reason in failed]
    uncovered += without_tokens
    if not groups and not is_slim:
        raise UnsupportedModelError(f"Nothing in this {model_class.__name__} can be cut: {'; '.join(uncovered)}.")
    groups.sort(key=_module_order(model))
    sizes = sizes_of(groups)
    units = [group for group in groups if group.role != "branch"]
    model.eval()
    example = passes[0].call.with_batch(1)
    if enlarges_images(model):
        model, example = model.float(), example.to(torch.float32)  # counting at this size needs half the time
    progress.step("counting multiply-adds")
    return Reading(
        groups=tuple(groups),
        operations=operations(model, example, groups, lambda kept: cut_copy(model, groups, kept, sizes)),
        sizes=sizes,
        uncovered=tuple(uncovered),
        inferred=tuple(inferred.lines),
        timed_layers=layers_of_branches(
            timed_layers(model, calls(model, example, attention_sites(groups)), units, sizes), sizes
        ),
        input_shape=example.shape,
    )


def _apart_from(channels: Sequence[Group], heads: Sequence[Group]) -> list[Group]:
    """The groups of ``channels`` that are not the rows or columns of ``heads``, which are cut by heads."""
    taken = {(part.tensor, part.dim) for group in heads for part in group.slices}
    return [group for group in channels if not any((part.tensor, part.dim) in taken for part in group.slices)]


def _without_computed(groups: Sequence[Group], computed: Mapping[str, str]) -> tuple[list[Group], list[str]]:
    """The groups without slices in modules whose weight is computed, and for each of the others the reason."""
    kept: list[Group] = []
    reasons: list[str] = []
    for group in groups:
        inside = next((name for name in computed for part in group.slices if part.tensor.startswith(f"{name}.")), None)
        if inside is None:
            kept.append(group)
        else:
            reasons.append(f"{group.name}: {computed[inside]}")
    return kept, reasons


def attention_sites(groups: Iterable[Group]) -> set[str]:
    """Names of the modules whose heads, or the dimensions in them, are groups."""
    return {group.site for group in groups if group.kind in ("head", "head_dim")}


def _random_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU with random weights; reading does not depend on the weights."""
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        # Buffers such as tables of positions would have no values.
        raise UnsupportedModelError(
            f"This {type(model).__name__} is on the meta device, and is read by running it: make it on the CPU."
        )
    check_resizable(model)
    model = copied(model).cpu().double().eval().requires_grad_(True)
    for module in model.modules():
        module.__dict__.pop(STRUCTURE, None)
    randomise_(model)
    return model


def _passes(
    model: nn.Module, candidates: Sequence[Sequence[ExampleCall]]
) -> tuple[list[Pass], list[Course], list[str]]:
    """The forward passes in evaluation and in training mode, what happens in them, and why there is none in training.

    Raises:
        UnsupportedModelError: the model does not take the example, or its output has no floating-point tensor.
    """
    passes, courses = _evaluation_passes(model, candidates)
    has_batch_norm = any(isinstance(module, BATCH_NORM) for module in model.modules())
    reasons: list[str] = []
    trained: set[str] = set()
    untrained: set[str] = set()
    for call, evaluated in zip([forward.call for forward in passes], list(courses), strict=True):
        training = Pass(with_enough_values(model, call) if has_batch_norm else call, training=True)
        try:
            course = course_of(model, training)
        except MODEL_ERRORS as error:
            untrained.update(evaluated.modules)
            reasons.append(
                f"training mode: the forward raises {type(error).__name__} ({_first_line(error)}), so the groups are "
                "verified in evaluation mode only; give a call that works in both modes as example_inputs"
            )
            continue
        trained.update(course.modules)
        if course.digest != evaluated.digest:
            passes.append(training)
            courses.append(course)
    if not any(course.outputs for course in courses):
        raise UnsupportedModelError(
            f"The output of this {type(model).__name__} has no floating-point tensor, such as logits: it may end in an "
            "argmax or another choice. Give slimming the model without that step, for example in a module whose "
            "forward returns what the step takes."
        )
    # A call without the targets of a detector works in evaluation only; this is no gap if another trains its modules.
    return passes, courses, list(dict.fromkeys(reasons)) if untrained - trained or not trained else []


def _evaluation_passes(
    model: nn.Module, candidates: Sequence[Sequence[ExampleCall]]
) -> tuple[list[Pass], list[Course]]:
    first: Exception | None = None
    for calls_ in candidates:
        passes = [Pass(call.to(torch.float64)) for call in calls_]
        try:
            fit_statistics_(model, passes)
            return passes, [course_of(model, forward) for forward in passes]
        except MODEL_ERRORS as error:
            first = first or error
    what = " and ".join(f"{tuple(call.main.shape[1:])}" for call in candidates[0])
    raise UnsupportedModelError(
        f"This {type(model).__name__} does not take one image of {what} ({type(first).__name__}: "
        f"{_first_line(first)}). If it takes another size, say so in its attribute image_size; if it takes something "
        "else, give an example: slimming.describe(model, example_inputs=...), a tensor, or a tuple or dict of the "
        "arguments of its forward; or wrap it in a module whose forward takes the image."
    ) from first


def _first_line(error: Exception | None) -> str:
    return (str(error).splitlines() or [""])[0]


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
