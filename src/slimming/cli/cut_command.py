"""``slimming cut``: from a search (or a plan) to slim checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimming.core.budget import Budget
    from slimming.core.layout import Layout
    from slimming.core.pruning_plan import Plan
    from slimming.searching.mask_search import SearchResult

    Cut = tuple[nn.Module, list[Tensor], dict[str, Plan], dict[str, object]]
    """The model to cut, images to compensate with, the plans by name, and where they come from."""

IMAGES = 512
DESCRIPTION = """\
Cut a model to one or more budgets. Each gets a directory of its own name in DIR, with plan.json and the slim
checkpoint cut/, ready for slimming train, eval and bench. SOURCE is what slimming search or run wrote. With --one-shot
it is any model, by name or checkpoint, whose units are scored on a few hundred unlabelled images. With --plan it may be
any checkpoint.

  slimming cut deit_small_patch16_224 --one-shot --data photos/ --budget macs=0.6 --output runs/cut
  slimming cut runs/search --data photos/ --budget macs=0.5 --budget keep.mlp=0.7,keep.head_dim=0.7 --output runs/cut
  slimming cut runs/search --budget macs=1.2e9,params=12e6 --output runs/cut
  slimming cut runs/search --budget latency_ms=12 --latency-table laptop.json --output runs/cut
  slimming cut runs/dense/model --plan plan.json --output runs/cut
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.cli.flags import add_common, add_flags
    from slimming.core.layout import Layout

    parser.add_argument(
        "source", metavar="SOURCE", help="directory of a search or run, or a checkpoint; with --one-shot, any model"
    )
    add_common(parser, "--budget")
    parser.add_argument("--one-shot", action="store_true", help="score the units of a model without a search")
    parser.add_argument("--data", metavar="IMAGES", help="a folder of images, in class folders or not, or other data "
                        "as in data.source; labels are not used. The cut then compensates: remaining weights are "
                        "refitted on these images (default: only with --one-shot)")  # fmt: skip
    parser.add_argument("--images", type=int, metavar="N", help="how many of them (default: 512)")
    parser.add_argument("--model.checkpoint", metavar="FILE",
                        help="with --one-shot: local weights, where SOURCE is a name")  # fmt: skip
    add_common(parser, "--model.arguments")
    parser.add_argument("--plan", metavar="FILE", help="a plan.json, in place of budgets")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="a directory that is empty or does not exist yet"
    )
    parser.add_argument("--latency-table", metavar="FILE", help="what slimming latency-table wrote, for budgets of "
                        "latency=SHARE or latency_ms=TIME")  # fmt: skip
    parser.add_argument("--solver", metavar="NAME",
                        help="nested or exact (default: nested for one limit, exact for several)")  # fmt: skip
    add_flags(parser, Layout, "layout", "as searched")


def execute(arguments: argparse.Namespace) -> None:
    """Do it: all plans first, then all files in one rename."""
    from slimming.cli.output import made
    from slimming.core.files import atomic_directory

    output = Path(arguments.output)
    with made(output):
        model, images, plans, record = _one_shot(arguments) if arguments.one_shot else _searched(arguments)
        with atomic_directory(output) as partial:
            _write(model, plans, record, images, partial, output)


def _write(
    model: nn.Module,
    plans: dict[str, Plan],
    record: dict[str, object],
    images: list[Tensor],
    partial: Path,
    output: Path,
) -> None:
    from slimming.checkpoints.checkpoint import save
    from slimming.cli.output import say
    from slimming.pruning.costs import cost
    from slimming.pruning.cutting import cut

    dense = cost(model)
    for name, chosen in plans.items():
        small = cut(model, chosen, images=images).eval()
        chosen.save(partial / name / "plan.json")
        save(small, partial / name / "cut", {**record, "plan": chosen.to_dict()})
        found = cost(small)
        say(
            f"{output / name}: {found.params / dense.params:.1%} of the params, "
            f"{found.macs / dense.macs:.1%} of the MACs"
            + (f", {chosen.solution['latency_ms']:.3g} ms by the table" if "latency_ms" in chosen.solution else "")
        )


def _one_shot(arguments: argparse.Namespace) -> Cut:
    """Score a model that was not searched, and plan."""
    from slimming.cli.output import say
    from slimming.core.layout import Layout
    from slimming.errors import ConfigError
    from slimming.planning.budgeting import plans
    from slimming.runs.config import ModelConfig
    from slimming.runs.results import versions
    from slimming.runs.setup import check_input, open_model
    from slimming.scoring.one_shot import score

    if arguments.plan:
        raise ConfigError("--one-shot makes its own plans; drop it or --plan.")
    if arguments.data is None:
        raise ConfigError("--one-shot needs images: give --data with a folder of them.")
    budgets = _budgets(arguments)
    given = vars(arguments)
    config = ModelConfig(
        name=arguments.source, checkpoint=given["model.checkpoint"], arguments=given["model.arguments"]
    )
    model, notes = open_model(config)
    for note in notes:
        say(note)
    check_input(model)
    images = _images(arguments, model)
    scored = score(model, images, layout=_layout(arguments, Layout()))
    made = plans(scored, budgets, solver=arguments.solver, latency=arguments.latency_table)
    record = {"source": arguments.source, "one_shot": {"score": scored.how, "images": sum(map(len, images))}}
    named = {budget.name: one for budget, one in zip(budgets, made, strict=True)}
    return scored.model, images, named, {**record, "versions": versions()}


def _searched(arguments: argparse.Namespace) -> Cut:
    """Plan from a search, or take a plan that is given."""
    from slimming.cli.models import load_checkpoint
    from slimming.core.files import json_values
    from slimming.core.pruning_plan import Plan
    from slimming.errors import CheckpointError, ConfigError
    from slimming.planning.budgeting import plans
    from slimming.runs.results import versions
    from slimming.searching.mask_search import load_search, search_directory

    source = Path(arguments.source)
    found = search_directory(source)
    _refuse(arguments, "without --one-shot", ("--model.checkpoint", "--model.arguments"))
    if arguments.plan:
        layout = (f"--layout.{name}" for name in ("equal_heads", "equal_qkv", "multiple", "scarcity"))
        _refuse(arguments, "with --plan", (*layout, "--solver", "--latency-table"))
    if arguments.data is None:
        _refuse(arguments, "without --data", ("--images",))
    if arguments.plan:
        if arguments.budgets:
            raise ConfigError("Give --budget (once or more), or --plan.")
        given = Plan.load(arguments.plan)
        model = load_search(found).model if found is not None else load_checkpoint(arguments.source)
        named, record = {"plan": given}, {"source": str(source), "versions": versions()}
    else:
        budgets = _budgets(arguments)
        if found is None:
            raise CheckpointError(
                f"{source} holds no finished search. Give a directory that slimming search wrote, or --one-shot with "
                "--data to cut a model without a search."
            )
        result = load_search(found)
        layout = _layout(arguments, result.config.layout)
        record = {"source": str(source), "search": json_values(result.config), "versions": versions()}
        made = plans(result, budgets, layout=layout, solver=arguments.solver, latency=arguments.latency_table)
        _say_layout_costs(result, budgets, layout, made, arguments)
        model, named = result.model, {budget.name: one for budget, one in zip(budgets, made, strict=True)}
    images = _images(arguments, model) if arguments.data is not None else []
    return model, images, named, record


def _images(arguments: argparse.Namespace, model: nn.Module) -> list[Tensor]:
    from slimming.runs.setup import load_images

    return load_images(arguments.data, model, IMAGES if arguments.images is None else arguments.images)


def _refuse(arguments: argparse.Namespace, when: str, flags: Sequence[str]) -> None:
    """Refuse flags that were given in vain.

    Raises:
        ConfigError: one of them was given.
    """
    from slimming.errors import ConfigError

    for flag in flags:
        if getattr(arguments, flag.lstrip("-").replace("-", "_"), None) not in (None, {}):
            raise ConfigError(f"{flag} has no effect {when}; drop it.")


def _budgets(arguments: argparse.Namespace) -> list[Budget]:
    from slimming.cli.settings import build
    from slimming.core.budget import Budget
    from slimming.errors import ConfigError

    if not arguments.budgets:
        raise ConfigError("Give --budget (once or more), or --plan.")
    budgets = [build(Budget, values) for values in arguments.budgets]
    if len({budget.name for budget in budgets}) < len(budgets):
        raise ConfigError("A budget is given twice; take one of them out.")
    return budgets


def _say_layout_costs(
    result: SearchResult, budgets: Sequence[Budget], layout: Layout, made: Sequence[Plan], arguments: argparse.Namespace
) -> None:
    """Say what score is lost for the sizes that the layout asks for, budget by budget."""
    from dataclasses import replace

    from slimming.cli.output import say
    from slimming.core.budget import METRICS
    from slimming.core.layout import FREE, Layout
    from slimming.planning.budgeting import plans

    for budget, chosen in zip(budgets, made, strict=True):
        if not budget.limits:
            continue
        # Memory and time have no formula for heads of several sizes.
        whole = budget.memory_bytes is not None or any(METRICS[metric].timed for metric in budget.limits)
        free = replace(Layout(multiple=1) if whole else FREE, scarcity=layout.scarcity)
        if free == layout:
            continue
        (other,) = plans(result, [budget], layout=free, solver=arguments.solver, latency=arguments.latency_table)
        lost, least = chosen.solution["lost_score"], other.solution["lost_score"]
        sizes = "heads of one size, each any" if whole else "any sizes"
        what = "of loss are expected" if result.sensitivity else "of score go"
        say(f"{budget.name}: {lost:.3g} {what} with this layout, {least:.3g} with {sizes}")


def _layout(arguments: argparse.Namespace, base: Layout) -> Layout:
    from slimming.cli.flags import given
    from slimming.cli.settings import build
    from slimming.core.layout import Layout

    return build(Layout, given(arguments, Layout, "layout"), "layout", base)
