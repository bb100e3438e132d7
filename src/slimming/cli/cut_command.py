"""``slimming cut``: cut a model to budgets or by a plan, and save the slim checkpoints."""

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
    """The model to cut, calibration images for the compensation, the plans by name, and their provenance."""

IMAGES = 512
DESCRIPTION = """\
Cut a model to one or more budgets. For each budget, DIR contains a directory with the name of the budget, with
plan.json and the slim checkpoint cut/ for slimming train, eval and bench. SOURCE is the directory of slimming search
or slimming run. With --one-shot, SOURCE is a model without a search, by name or checkpoint; its units are scored in
minutes from 128 to 512 unlabelled images; it may be a detector, a segmenter or another model that takes images, whose
outputs count. With --plan, SOURCE may be any checkpoint.

  slimming cut deit_small_patch16_224 --one-shot --data photos/ --budget macs=0.6 --output runs/cut
  slimming cut transformers:detector/ --one-shot --data photos/ --budget macs=0.7 --output runs/detector
  slimming cut runs/search --data photos/ --budget macs=0.5 --budget keep.mlp=0.7,keep.head_dim=0.7 --output runs/cut
  slimming cut runs/search --budget macs=1.2e9,params=12e6 --output runs/cut
  slimming cut runs/search --budget latency_ms=12 --latency-table laptop.json --output runs/cut
  slimming cut runs/dense/model --plan plan.json --output runs/cut
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.cli.flags import add_common_options, add_flags
    from slimming.core.layout import Layout

    parser.add_argument(
        "source", metavar="SOURCE", help="directory of a search or run, or a checkpoint; with --one-shot, any model"
    )
    add_common_options(parser, "--budget")
    parser.add_argument("--one-shot", action="store_true", help="score the units without a search")
    parser.add_argument("--data", metavar="IMAGES", help="calibration images: a folder of images, with or without "
                        "class folders, or other data as in data.source; labels are not used. The remaining weights "
                        "are refitted to compensate for the removed units (needed with --one-shot)")  # fmt: skip
    parser.add_argument("--images", type=int, metavar="N", help="number of calibration images (default: 512)")
    parser.add_argument("--model.checkpoint", metavar="FILE",
                        help="with --one-shot: local weights, if SOURCE is a name")  # fmt: skip
    add_common_options(parser, "--model.arguments")
    parser.add_argument("--plan", metavar="FILE", help="a plan.json, instead of budgets")
    parser.add_argument("--output", metavar="DIR", required=True, help="an empty or new directory")
    parser.add_argument("--latency-table", metavar="FILE", help="file of slimming latency-table, for budgets of "
                        "latency=SHARE or latency_ms=TIME")  # fmt: skip
    parser.add_argument("--solver", metavar="NAME",
                        help="nested or exact (default: nested if this comes within 1 %% of one limit, else "
                             "exact)")  # fmt: skip
    add_flags(parser, Layout, "layout", "as in the search")


def execute(arguments: argparse.Namespace) -> None:
    """Run the command: make all plans first, then write all files with one atomic rename."""
    from slimming.cli.output import output_directory
    from slimming.core.files import atomic_directory

    output = Path(arguments.output)
    with output_directory(output):
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
    from slimming.cli.output import echo
    from slimming.core.plain_text import without_places
    from slimming.pruning.costs import cost
    from slimming.pruning.cutting import cut

    dense = cost(model)
    for name, chosen in plans.items():
        small = cut(model, chosen, images=images).eval()
        chosen.save(partial / name / "plan.json")
        save(small, partial / name / "cut", {**without_places(record), "plan": chosen.to_dict()})
        slim = cost(small)
        echo(
            f"{output / name}: {slim.params / dense.params:.1%} of the params, "
            f"{slim.macs / dense.macs:.1%} of the MACs"
            + (f", {chosen.solution['latency_ms']:.3g} ms by the table" if "latency_ms" in chosen.solution else "")
        )
        if chosen.note:
            echo(f"{name}: {chosen.note}")


def _one_shot(arguments: argparse.Namespace) -> Cut:
    """Score the units of a model without a search, and plan."""
    import dataclasses

    from slimming.cli.output import echo
    from slimming.core.layout import Layout
    from slimming.errors import ConfigError
    from slimming.planning.budgeting import plans
    from slimming.runs.config import ModelConfig
    from slimming.runs.results import versions
    from slimming.runs.setup import check_input, check_takes_images, open_model
    from slimming.scoring.one_shot import score

    if arguments.plan:
        raise ConfigError("--one-shot makes a plan itself; drop it or --plan.")
    if arguments.data is None:
        raise ConfigError("--one-shot needs images: give --data with a folder of them.")
    budgets = _budgets(arguments)
    options = vars(arguments)
    config = ModelConfig(
        name=arguments.source, checkpoint=options["model.checkpoint"], arguments=options["model.arguments"]
    )
    model, notes = open_model(config)
    for note in notes:
        echo(note)
    check_input(model)
    check_takes_images(model)
    images = _images(arguments, model)
    scored = score(model, images, layout=_layout(arguments, Layout()))
    planned = plans(scored, budgets, solver=arguments.solver, latency=arguments.latency_table)
    outputs = [dataclasses.asdict(output) for output in scored.outputs]
    if len(outputs) > 1:
        echo(f"scored on {len(outputs)} outputs: {', '.join(output.name for output in scored.outputs)}")
    one_shot = {"score": scored.how, "images": sum(map(len, images)), "outputs": outputs}
    record = {"source": arguments.source, "one_shot": one_shot}
    named = {budget.name: plan for budget, plan in zip(budgets, planned, strict=True)}
    return scored.model, images, named, {**record, "versions": versions()}


def _searched(arguments: argparse.Namespace) -> Cut:
    """Load a search and plan, or load a checkpoint and the plan of ``--plan``."""
    from slimming.cli.models import load_checkpoint
    from slimming.core.files import json_values
    from slimming.core.pruning_plan import Plan
    from slimming.errors import CheckpointError, ConfigError
    from slimming.planning.budgeting import plans
    from slimming.runs.results import versions
    from slimming.searching.mask_search import load_search, search_directory

    source = Path(arguments.source)
    directory = search_directory(source)
    _check_unused(arguments, "without --one-shot", ("--model.checkpoint", "--model.arguments"))
    if arguments.plan:
        layout = (f"--layout.{name}" for name in ("equal_heads", "equal_qkv", "multiple", "scarcity"))
        _check_unused(arguments, "with --plan", (*layout, "--solver", "--latency-table"))
    if arguments.data is None:
        _check_unused(arguments, "without --data", ("--images",))
    if arguments.plan:
        if arguments.budgets:
            raise ConfigError("Give --budget (once or more), or --plan.")
        loaded = Plan.load(arguments.plan)
        model = load_search(directory).model if directory is not None else load_checkpoint(arguments.source)
        named, record = {"plan": loaded}, {"source": str(source), "versions": versions()}
    else:
        budgets = _budgets(arguments)
        if directory is None:
            raise CheckpointError(
                f"{source} holds no finished search. Give a directory that slimming search wrote, or --one-shot with "
                "--data to cut a model without a search."
            )
        result = load_search(directory)
        layout = _layout(arguments, result.config.layout)
        record = {"source": str(source), "search": json_values(result.config), "versions": versions()}
        planned = plans(result, budgets, layout=layout, solver=arguments.solver, latency=arguments.latency_table)
        _print_layout_costs(result, budgets, layout, planned, arguments)
        model, named = result.model, {budget.name: plan for budget, plan in zip(budgets, planned, strict=True)}
    images = _images(arguments, model) if arguments.data is not None else []
    return model, images, named, record


def _images(arguments: argparse.Namespace, model: nn.Module) -> list[Tensor]:
    from slimming.runs.setup import load_images

    return load_images(arguments.data, model, IMAGES if arguments.images is None else arguments.images)


def _check_unused(arguments: argparse.Namespace, when: str, flags: Sequence[str]) -> None:
    """Check that flags without an effect are not given.

    Raises:
        ConfigError: one of them is given.
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
        raise ConfigError("A budget is given twice; remove one of them.")
    return budgets


def _print_layout_costs(
    result: SearchResult,
    budgets: Sequence[Budget],
    layout: Layout,
    planned: Sequence[Plan],
    arguments: argparse.Namespace,
) -> None:
    """Print, for each budget, the score that is lost with this layout and without its constraints."""
    from dataclasses import replace

    from slimming.cli.output import echo
    from slimming.core.budget import METRICS
    from slimming.core.layout import FREE, Layout
    from slimming.planning.budgeting import plans

    for budget, chosen in zip(budgets, planned, strict=True):
        if not budget.limits:
            continue
        # There is no formula for the memory and the time of heads of different sizes.
        equal_heads = budget.memory_bytes is not None or any(METRICS[metric].timed for metric in budget.limits)
        free = replace(Layout(multiple=1) if equal_heads else FREE, scarcity=layout.scarcity)
        if free == layout:
            continue
        (unconstrained,) = plans(
            result, [budget], layout=free, solver=arguments.solver, latency=arguments.latency_table
        )
        lost, least = chosen.solution["lost_score"], unconstrained.solution["lost_score"]
        sizes = "equal heads of any size" if equal_heads else "any sizes"
        quantity = "expected increase of the loss" if result.sensitivity else "score lost"
        echo(f"{budget.name}: {quantity} {lost:.3g} with this layout, {least:.3g} with {sizes}")


def _layout(arguments: argparse.Namespace, base: Layout) -> Layout:
    from slimming.cli.flags import flag_values
    from slimming.cli.settings import build
    from slimming.core.layout import Layout

    return build(Layout, flag_values(arguments, Layout, "layout"), "layout", base)
