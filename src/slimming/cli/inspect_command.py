"""``slimming inspect``: what can go in a model, without training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimming.core.groups import Anatomy, Group
    from slimming.counting.model_cost import Cost

DESCRIPTION = """\
List what can go in a model: groups of units, the parameters and multiply-adds that go with each, and what is not
covered. MODEL is a timm name, transformers:NAME (its config is fetched; or a local directory), torchvision:NAME, or a
checkpoint directory; weights are not downloaded. Nothing is trained.

  slimming inspect deit_small_patch16_224
  slimming inspect vit_tiny_patch16_224 --model.arguments img_size=64,patch_size=8 --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.cli.flags import add_common_options

    parser.add_argument("model", metavar="MODEL", help="name of a model, or checkpoint directory")
    add_common_options(parser, "--model.arguments")
    parser.add_argument("--groups", action="store_true", help="list every group with its units and limits")
    parser.add_argument("--json", action="store_true", help="print JSON, every group included")


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    import json

    from slimming.cli.models import open_named
    from slimming.masks.attachment import describe, prunable
    from slimming.pruning.costs import cost
    from slimming.runs.setup import check_input

    model = open_named(arguments.model, vars(arguments)["model.arguments"], device="meta")
    check_input(model)
    anatomy, groups, found = prunable(model).anatomy, describe(model), cost(model)
    if arguments.json:
        print(json.dumps(as_json(arguments.model, anatomy, groups, found), indent=1))
        return
    _print(arguments.model, anatomy, groups, found, each=arguments.groups)


def as_json(name: str, anatomy: Anatomy, groups: tuple[Group, ...], found: Cost) -> dict[str, Any]:
    """Everything that the tables show, and every group."""
    return {
        "model": name,
        "family": anatomy.structure.family,
        "input": list(anatomy.input_shape),
        "params": found.params,
        "macs": found.macs,
        "memory_bytes": found.memory_bytes,
        "kinds": by_kind(anatomy, groups),
        "groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "size": group.size,
                "minimum": group.limits.minimum,
                "heads": list(group.limits.parts),
                "params": found.groups[group.name].params,
                "macs": found.groups[group.name].macs,
            }
            for group in groups
        ],
        "uncovered": list(anatomy.uncovered),
    }


def by_kind(anatomy: Anatomy, groups: tuple[Group, ...]) -> dict[str, dict[str, int]]:
    """Groups and units per kind, and the params and MACs that go when all of them go."""
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


def _print(name: str, anatomy: Anatomy, groups: tuple[Group, ...], found: Cost, *, each: bool) -> None:
    from slimming.cli.output import console, echo, format_count

    shape = " x ".join(map(str, anatomy.input_shape))
    echo(f"{name}: read as {anatomy.structure.family}, images of {shape}")
    echo(
        f"{format_count(found.params)} params, {format_count(found.macs)} MACs (one multiply-add is one), "
        f"{format_count(found.memory_bytes, 'B')} (weights and peak activations, batch 1)"
    )
    echo("")
    echo("What can go, by kind. Params and MACs are those that go when all units of the kind go and the rest stays;")
    echo("whole heads and the dimensions in them are two views of the same.")
    console().print(_kinds_table(anatomy, groups, found))
    echo("")
    echo("Block by block")
    console().print(_blocks_table(anatomy, groups, found))
    if each:
        echo("")
        console().print(_groups_table(groups, found))
    echo("")
    for part in anatomy.uncovered:
        echo(f"not covered: {part}")


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, title in enumerate(columns):
        table.add_column(title, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def _kinds_table(anatomy: Anatomy, groups: tuple[Group, ...], found: Cost) -> Any:
    table = _table("kind", "groups", "units", "params", "share", "MACs", "share")
    for kind, sums in by_kind(anatomy, groups).items():
        table.add_row(kind, str(sums["groups"]), f"{sums['units']:,}", *_costs(sums["params"], sums["macs"], found))
    return table


def _blocks_table(anatomy: Anatomy, groups: tuple[Group, ...], found: Cost) -> Any:
    """One line per block: the sizes of its groups, and what goes with all of them but tokens."""
    from slimming.core.groups import keep_all
    from slimming.counting.model_cost import together

    whole = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    by_dimension = {group.site for group in groups if group.kind == "head_dim"}
    blocks: dict[str, list[Group]] = {}
    for group in groups:
        # A width is of many blocks.
        if group.kind != "width" and not (group.kind == "head" and group.site in by_dimension):
            blocks.setdefault(_block(group), []).append(group)
    titles = {"qk": "QK", "v": "V", "head": "heads", "mlp": "hidden", "channel": "channels", "token": "tokens"}
    present = {group.role for members in blocks.values() for group in members}
    roles = [role for role in titles if role in present]
    table = _table("block", *(titles[role] for role in roles), "params", "share", "MACs", "share")
    for block, members in blocks.items():
        shown = ["+".join(_size(group) for group in members if group.role == role) or "-" for role in roles]
        # What goes with a whole attention or MLP is what goes with all its units.
        cost = together(anatomy, whole, [group.name for group in members if group.kind not in ("token", "block")])
        table.add_row(block, *shown, *_costs(cost.params, cost.macs, found))
    return table


def _block(group: Group) -> str:
    """The block that a group is in: its name up to the attention, the MLP, or the last number."""
    for part in (".attn", ".mlp"):
        if part in group.name:
            return group.name.partition(part)[0]
    parts = group.name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ".".join(parts[:-1]) or group.name


def _groups_table(groups: tuple[Group, ...], found: Cost) -> Any:
    table = _table("group", "kind", "units", "at least", "params", "share", "MACs", "share")
    for group in groups:
        own = found.groups[group.name]
        row = [group.kind, _size(group), str(group.limits.minimum), *_costs(own.params, own.macs, found)]
        table.add_row(group.name, *row)
    return table


def _size(group: Group) -> str:
    parts = group.limits.parts
    if not parts:
        return str(group.size)
    same = len(set(parts)) == 1
    return f"{len(parts)} x {parts[0]}" if same else "+".join(map(str, parts))


def _costs(params: int, macs: int, found: Cost) -> list[str]:
    from slimming.cli.output import format_count

    return [format_count(params), f"{params / found.params:.1%}", format_count(macs), f"{macs / found.macs:.1%}"]
