"""``slimming inspect``: list the prunable groups of a model and what they cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from slimming.core.groups import Anatomy, Group
    from slimming.counting.model_cost import Cost

DESCRIPTION = """\
List the prunable groups of units of a model, the parameters and multiply-adds that are removed with each, and the
parts of the model that are not covered. MODEL is a timm name, transformers:NAME (whose config is downloaded; or a local
directory), torchvision:NAME, or a checkpoint directory: a classifier, an encoder, a detector, a segmenter or another
model that takes images. Weights are not downloaded, and nothing is trained.

  slimming inspect deit_small_patch16_224
  slimming inspect vit_tiny_patch16_224 --model.arguments img_size=64,patch_size=8 --json
  slimming inspect transformers:PekingU/rtdetr_v2_r18vd
  slimming inspect torchvision:ssdlite320_mobilenet_v3_large
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.cli.flags import add_common_options

    parser.add_argument("model", metavar="MODEL", help="name of a model, or a checkpoint directory")
    add_common_options(parser, "--model.arguments")
    parser.add_argument("--groups", action="store_true", help="list every group with its units and limits")
    parser.add_argument("--json", action="store_true", help="print JSON with all groups")


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    import json

    from slimming.cli.models import open_named
    from slimming.cli.output import echo
    from slimming.masks.attachment import describe, prunable
    from slimming.pruning.costs import cost
    from slimming.runs.setup import check_input

    model = open_named(arguments.model, vars(arguments)["model.arguments"], device="meta")
    check_input(model)
    anatomy, groups, costs = prunable(model).anatomy, describe(model), cost(model)
    if arguments.json:
        values = as_json(arguments.model, anatomy, groups, costs)
        print(json.dumps({**values, "outputs": outputs_of(model, anatomy)}, indent=1))
        return
    _print(arguments.model, anatomy, groups, costs, each=arguments.groups)
    shown = [f"{output['name']} {output['shape']}" for output in outputs_of(model, anatomy)]
    echo(f"outputs that count in scores: {', '.join(shown) or 'none; give score a loss'}")


def as_json(name: str, anatomy: Anatomy, groups: tuple[Group, ...], costs: Cost) -> dict[str, Any]:
    """Return the content of the tables and all groups as plain values."""
    return {
        "model": name,
        "family": anatomy.structure.family,
        "input": list(anatomy.input_shape),
        "params": costs.params,
        "macs": costs.macs,
        "memory_bytes": costs.memory_bytes,
        "kinds": totals_by_kind(anatomy, groups),
        "groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "size": group.size,
                "minimum": group.limits.minimum,
                "heads": list(group.limits.parts),
                "params": costs.groups[group.name].params,
                "macs": costs.groups[group.name].macs,
            }
            for group in groups
        ],
        "uncovered": list(anatomy.uncovered),
        "inferred": list(anatomy.inferred),
    }


def outputs_of(model: nn.Module, anatomy: Anatomy) -> list[dict[str, Any]]:
    """Return name, shape for one image, and kind of the outputs that count in scores; empty if there are none."""
    import torch

    from slimming.core.calibration import CalibrationBatch
    from slimming.core.modules import in_evaluation
    from slimming.errors import ConfigError
    from slimming.models.prunable import read_as
    from slimming.scoring.outputs import OutputReader

    batch = CalibrationBatch.of(model, read_as(model, anatomy).examples(batch=2)[0])
    reader = OutputReader()
    with in_evaluation(model), torch.no_grad():
        try:
            named = reader.read(model, batch)
        except ConfigError:
            return []
    kinds = reader.kinds(model, named)
    return [{"name": name, "shape": list(tensor.shape[1:]), "kind": kinds[name]} for name, tensor in named.items()]


def totals_by_kind(anatomy: Anatomy, groups: tuple[Group, ...]) -> dict[str, dict[str, int]]:
    """Return, for each kind, the number of groups and units, and the params and MACs of all of them together."""
    from slimming.core.groups import keep_all
    from slimming.counting.model_cost import together

    whole = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    result: dict[str, dict[str, int]] = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        members = [group for group in groups if group.kind == kind]
        cost = together(anatomy, whole, [group.name for group in members])
        units = sum(group.size for group in members)
        result[kind] = {"groups": len(members), "units": units, "params": cost.params, "macs": cost.macs}
    return result


def _print(name: str, anatomy: Anatomy, groups: tuple[Group, ...], costs: Cost, *, each: bool) -> None:
    from slimming.cli.output import console, echo, format_count

    shape = " x ".join(map(str, anatomy.input_shape))
    echo(f"{name}: read as {anatomy.structure.family}, images of {shape}")
    echo(
        f"{format_count(costs.params)} params, {format_count(costs.macs)} MACs (multiply-adds), "
        f"{format_count(costs.memory_bytes, 'B')} (weights and peak activations, batch 1)"
    )
    echo("")
    echo("Prunable units by kind. Params and MACs are removed if all units of only this kind are removed; whole heads")
    echo("and the dimensions in them are two views of the same weights.")
    console().print(_kinds_table(anatomy, groups, costs))
    echo("")
    echo("Prunable units by block")
    console().print(_blocks_table(anatomy, groups, costs))
    if each:
        echo("")
        console().print(_groups_table(groups, costs))
    echo("")
    for part in anatomy.uncovered:
        echo(f"not covered: {part}")
    for sentence in anatomy.inferred:
        echo(f"read by what it computes: {sentence}")


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, title in enumerate(columns):
        table.add_column(title, justify="left" if column == 0 else "right", no_wrap=True)
    return table


def _kinds_table(anatomy: Anatomy, groups: tuple[Group, ...], costs: Cost) -> Any:
    table = _table("kind", "groups", "units", "params", "share", "MACs", "share")
    for kind, sums in totals_by_kind(anatomy, groups).items():
        table.add_row(kind, str(sums["groups"]), f"{sums['units']:,}", *_costs(sums["params"], sums["macs"], costs))
    return table


def _blocks_table(anatomy: Anatomy, groups: tuple[Group, ...], costs: Cost) -> Any:
    """Return a table with the sizes of the groups of each block, and what all of them except tokens cost."""
    from slimming.core.groups import keep_all
    from slimming.counting.model_cost import together

    whole = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    by_dimension = {group.site for group in groups if group.kind == "head_dim"}
    blocks: dict[str, list[Group]] = {}
    for group in groups:
        # The width belongs to all blocks.
        if group.kind != "width" and not (group.kind == "head" and group.site in by_dimension):
            blocks.setdefault(_block(group), []).append(group)
    titles = {"qk": "QK", "v": "V", "head": "heads", "mlp": "hidden", "channel": "channels", "token": "tokens"}
    present = {group.role for members in blocks.values() for group in members}
    roles = [role for role in titles if role in present]
    table = _table("block", *(titles[role] for role in roles), "params", "share", "MACs", "share")
    for block, members in blocks.items():
        sizes = ["+".join(_size(group) for group in members if group.role == role) or "-" for role in roles]
        # A whole attention or MLP costs as much as all of its units, so groups of kind block are left out.
        cost = together(anatomy, whole, [group.name for group in members if group.kind not in ("token", "block")])
        table.add_row(block, *sizes, *_costs(cost.params, cost.macs, costs))
    return table


def _block(group: Group) -> str:
    """Return the block of a group: its name up to the attention, the MLP, or the last number."""
    for part in (".attn", ".mlp"):
        if part in group.name:
            return group.name.partition(part)[0]
    parts = group.name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ".".join(parts[:-1]) or group.name


def _groups_table(groups: tuple[Group, ...], costs: Cost) -> Any:
    table = _table("group", "kind", "units", "at least", "params", "share", "MACs", "share")
    for group in groups:
        cost = costs.groups[group.name]
        row = [group.kind, _size(group), str(group.limits.minimum), *_costs(cost.params, cost.macs, costs)]
        table.add_row(group.name, *row)
    return table


def _size(group: Group) -> str:
    parts = group.limits.parts
    if not parts:
        return str(group.size)
    same = len(set(parts)) == 1
    return f"{len(parts)} x {parts[0]}" if same else "+".join(map(str, parts))


def _costs(params: int, macs: int, costs: Cost) -> list[str]:
    from slimming.cli.output import format_count

    return [format_count(params), f"{params / costs.params:.1%}", format_count(macs), f"{macs / costs.macs:.1%}"]
