"""Reading a model by tracing: everything that the readers of channels, heads and MLPs find, proved and priced."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.formulas import Dim, Operation
from slimming.core.groups import Group, LayerSizes, Piece
from slimming.errors import UnsupportedModelError
from slimming.models.family import STRUCTURE, Kept, fill_, of_one_name
from slimming.models.traced.channels import CONV, Ends, channel_groups
from slimming.models.traced.free_heads import is_unbound, unbound_class
from slimming.models.traced.heads import Attributes, Heads, columns, head_group, rows
from slimming.models.traced.mlp import Hidden, hidden_group
from slimming.models.traced.operations import operations
from slimming.models.traced.resize import clear_caches_, layer_sizes, layers_after, resize_module_, select
from slimming.models.traced.tables import heads_of, hidden_of
from slimming.models.traced.timed_layers import calls, pieces
from slimming.models.traced.verification import outputs, proven, randomise_

HEAD_COUNTS = ("num_heads", "heads", "num_attention_heads", "n_heads", "nhead")
"""How hosts name the number of heads, to recognise attention that no table knows."""
WIDTHS = ("hidden_dim", "embed_dim", "num_features", "head_hidden_size")
"""How models name their own embedding width, or that of the last stage."""
_BY_HEADS = "they pass through attention, which is cut by heads"
_UNREAD = "they pass through attention whose heads slimming does not read"
_BY_HIDDEN = "they pass through a gated MLP, which is cut by hidden units"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found in a model, see `slimming.core.groups.Anatomy`."""

    groups: tuple[Group, ...]
    operations: tuple[Operation, ...]
    sizes: Mapping[str, LayerSizes]
    uncovered: tuple[str, ...]
    pieces: tuple[Piece, ...]


def read_model(model: nn.Module, shape: tuple[int, int, int]) -> Reading:
    """Find groups, prove them, and count.

    Raises:
        UnsupportedModelError: nothing can be cut.
    """
    trial = _trial(model)
    example = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    asleep = _asleep(trial, example)
    groups, attributes, unbound, claimed, uncovered = _heads(trial)
    hidden, more_attributes, more_claimed, more_uncovered = _hidden(trial)
    for module, values in more_attributes.items():
        attributes[module] = {**attributes.get(module, {}), **values}
    channels, left_out = channel_groups(trial, example, {**more_claimed, **claimed}, _ends(trial))
    uncovered += [*more_uncovered, *left_out]
    if asleep:
        uncovered.append(f"{len(asleep)} layers, the first of them {asleep[0]}: they do not run for one image")
    found, tied = of_one_name(trial, [*groups, *hidden, *channels])
    attributes[""] = {**attributes.get("", {}), **_widths(trial, found)}
    uncovered += tied
    if not found:
        raise UnsupportedModelError(
            f"Nothing in this {type(model).__module__}.{type(model).__name__} can be cut: "
            f"{'; '.join(uncovered) or 'it has no layers that slimming reads'}. "
            "docs/add-a-model.md shows how to add a reader."
        )
    trial.requires_grad_(False)
    for module in trial.modules():
        clear_caches_(module)  # the trace left tensors with a graph there, which cannot be copied
    good, failed = proven(trial, found, example, lambda m, g, k: _cut_copy(m, g, k, attributes, unbound))
    uncovered += [f"{group.name}: {reason}" for group, reason in failed]
    if not good:
        raise UnsupportedModelError(f"Nothing in this {type(model).__name__} can be cut: {'; '.join(uncovered)}.")
    good.sort(key=_in_order(trial))
    sizes = layer_sizes(trial, good, attributes, unbound)
    trial.eval()
    return Reading(
        groups=tuple(good),
        operations=operations(trial, example, good, _each_head(trial)),
        sizes=sizes,
        uncovered=tuple(uncovered),
        pieces=pieces(trial, calls(trial, example, attention_sites(good)), good, sizes),
    )


def attention_sites(groups: Iterable[Group]) -> set[str]:
    """The modules whose heads are groups."""
    return {group.site for group in groups if group.kind == "head"}


def _asleep(model: nn.Module, example: Tensor) -> list[str]:
    """The layers that do not run, after trying to wake those that run in training only, such as auxiliary heads.

    Raises:
        UnsupportedModelError: the model does not take the example.
    """
    asleep = _idle(model, example)
    if asleep:
        model.training = True  # the model alone: its norms and dropouts stay as in evaluation
        try:
            awake = _idle(model, example)
        except UnsupportedModelError:
            awake = asleep
        if len(awake) < len(asleep):
            return awake
        model.training = False
    return asleep


def _idle(model: nn.Module, example: Tensor) -> list[str]:
    """The layers with weights that neither run nor belong to a module that does, in one forward pass."""
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: ran.add(module)) for m in model.modules()]
    try:
        with torch.no_grad():
            outputs(model, example)
    except Exception as error:  # whatever the host raises
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


def _trial(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU with drawn weights; reading needs no others."""
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        # Tables of positions would have no values.
        raise UnsupportedModelError(
            f"This {type(model).__name__} is on the meta device, and is read by running it: make it on the CPU."
        )
    trial = copy.deepcopy(model).cpu().double().eval().requires_grad_(True)
    for module in trial.modules():
        module.__dict__.pop(STRUCTURE, None)
    randomise_(trial)
    return trial


def _heads(model: nn.Module) -> tuple[list[Group], Attributes, set[str], dict[str, str], list[str]]:
    """The heads of every attention module that the tables know."""
    groups: list[Group] = []
    attributes: Attributes = {}
    unbound: set[str] = set()
    claimed: dict[str, str] = {}
    uncovered: list[str] = []
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{path}.") for path, why in claimed.items() if why == _BY_HEADS):
            continue  # a module around it has a row that reads it
        spec = heads_of(module)
        if spec is None:
            if _is_attention(module) and all(heads_of(inner) is None for inner in module.modules()):
                uncovered.append(f"{name} heads: slimming has no reader of the heads of {type(module).__name__}")
                claimed[name] = _UNREAD
            continue
        claimed[_path(name, spec.inside)] = _BY_HEADS
        found = head_group(name, module, spec)
        if spec.unbound and not is_unbound(module) and unbound_class(type(module)) is None:
            found = "its forward ties the number of heads to the embedding width"
        elif spec.unbound:
            unbound.add(name)
        if isinstance(found, str):
            uncovered.append(f"{name} heads: {found}")
            continue
        groups.append(found[0])
        attributes |= found[1]
    return groups, attributes, unbound, claimed, uncovered


def _hidden(model: nn.Module) -> tuple[list[Group], Attributes, dict[str, str], list[str]]:
    """The hidden units of every MLP that the tables know."""
    groups: list[Group] = []
    attributes: Attributes = {}
    claimed: dict[str, str] = {}
    uncovered: list[str] = []
    for name, module in model.named_modules():
        spec = hidden_of(module)
        if spec is None:
            continue
        claimed[_path(name, spec.inside)] = _BY_HIDDEN
        found = hidden_group(name, module, spec)
        if isinstance(found, str):
            uncovered.append(f"{name} hidden units: {found}")
        else:
            groups.append(found[0])
            attributes |= found[1]
    return groups, attributes, claimed, uncovered


def _ends(model: nn.Module) -> dict[str, Ends]:
    """What the tables' modules read and make, by the innermost module that has their layers."""
    found: dict[str, Ends] = {}
    for name, module in model.named_modules():
        for spec in (heads_of(module), hidden_of(module)):
            ends = None if spec is None else _end(name, module, spec)
            if spec is None or ends is None:
                continue
            known = found.get(inside := _path(name, spec.inside), Ends())
            found[inside] = Ends(
                into=known.into + ends.into, makes=known.makes + ends.makes, norms=known.norms + ends.norms
            )
    return found


def _end(name: str, module: nn.Module, spec: Heads | Hidden) -> Ends | None:
    """Where channels go into ``module`` and come out, by its row; None if the row does not say it."""
    apart, paths = (spec.apart, spec.tied) if isinstance(spec, Heads) else ((), ())
    reads = [place for path in spec.inputs if path not in apart for place in columns(module, path)]
    makes = [(span.tensor, 0, span.length) for span in rows(module, spec.output)]
    if not reads or not makes:
        return None
    # A depthwise convolution has no dimension of its input.
    into = [(tensor, 1, "consumes") for tensor, length in reads if length == reads[0][1]]
    inside = dict(module.named_modules())
    tied = {path: inside[path] for path in paths if isinstance(inside.get(path), (nn.LayerNorm, nn.Linear, *CONV))}
    for path, layer in tied.items():
        into += [(f"{path}.{own}", 0, "produces") for own, _ in layer.named_parameters()]
        into += [] if isinstance(layer, nn.LayerNorm) else [(f"{path}.weight", 1, "consumes")]
    return Ends(
        into=tuple((_path(name, tensor), dim, side) for tensor, dim, side in into),
        makes=tuple((_path(name, tensor), dim) for tensor, dim, length in makes if length == makes[0][2]),
        norms=tuple(_path(name, path) for path, layer in tied.items() if isinstance(layer, nn.LayerNorm)),
    )


def _widths(model: nn.Module, groups: Iterable[Group]) -> dict[str, Dim]:
    """The attributes by which the model itself knows an embedding width, where it can only be that one."""
    wide = [group for group in groups if group.kind == "width"]
    result: dict[str, Dim] = {}
    for name in WIDTHS:
        same = [group for group in wide if vars(model).get(name) == group.size]
        if len(same) == 1:
            result[name] = Dim(groups=((same[0].name, 1),))
    return result


def _each_head(model: nn.Module) -> set[str]:
    """The layers that run once per head."""
    rows = [(name, heads_of(module)) for name, module in model.named_modules()]
    return {_path(name, path) for name, spec in rows if spec is not None for path in spec.each}


def _path(name: str, path: str) -> str:
    return ".".join(part for part in (name, path) if part)


def _is_attention(module: nn.Module) -> bool:
    """Whether a module's class says that it is attention, and the module that it has heads."""
    named = any(word in type(module).__name__.lower() for word in ("attention", "attn", "mhsa"))
    return named and any(type(vars(module).get(count)) is int and vars(module)[count] > 1 for count in HEAD_COUNTS)


def _cut_copy(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Kept,
    attributes: Attributes,
    unbound: set[str],
) -> nn.Module:
    sizes = layer_sizes(model, groups, attributes, unbound)
    small = copy.deepcopy(model)
    for name, entry in layers_after(sizes, groups, kept).items():
        resize_module_(small.get_submodule(name), entry)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    fill_(small, select(groups, kept, state), strict=False)
    return small.requires_grad_(False)


def _in_order(model: nn.Module) -> Any:
    """A key that sorts groups as the model's modules lie."""
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return lambda group: (place.get(group.site, len(place)), group.name)
