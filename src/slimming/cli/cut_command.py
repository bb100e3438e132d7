"""``slimming cut``: from a search (or a plan) to slim checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimming.plan import Budget, Layout, Plan
    from slimming.searching import SearchResult

DESCRIPTION = """\
Cut a searched model to one or more budgets. Each gets a directory of its own name in DIR, with plan.json and the
slim checkpoint cut/, ready for slimming train, eval and bench. SOURCE is what slimming search or run wrote; with
--plan it may be any checkpoint.

  slimming cut runs/search --budget macs=0.5 --budget keep.mlp=0.7,keep.head_dim=0.7 --output runs/cut
  slimming cut runs/search --budget macs=1.2e9,params=12e6 --output runs/cut
  slimming cut runs/search --budget macs=0.5 --compensate photos/ --output runs/cut
  slimming cut runs/search --budget latency_ms=12 --latency-table laptop.json --output runs/cut
  slimming cut runs/dense/model --plan plan.json --output runs/cut
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.cli.flags import add_budget

    parser.add_argument(
        "source", metavar="SOURCE", help="directory of a search, of a run, or (with --plan) a checkpoint"
    )
    add_budget(parser)
    parser.add_argument("--plan", metavar="FILE", help="a plan.json, in place of budgets")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="a directory that is empty or does not exist yet"
    )
    parser.add_argument("--layout.equal_heads", dest="equal_heads", metavar="true|false",
                        help="one size for all heads of a layer (default: as searched)")  # fmt: skip
    parser.add_argument("--layout.equal_qkv", dest="equal_qkv", metavar="true|false",
                        help="one size for QK and V of a head (default: as searched)")  # fmt: skip
    parser.add_argument("--layout.multiple", dest="multiple", metavar="N",
                        help="sizes are multiples of this (default: as searched)")  # fmt: skip
    parser.add_argument("--latency-table", metavar="FILE", help="what slimming latency-table wrote, for budgets of "
                        "latency=SHARE or latency_ms=TIME")  # fmt: skip
    parser.add_argument("--solver", metavar="NAME",
                        help="nested or exact (default: nested for one limit, exact for several)")  # fmt: skip
    parser.add_argument("--compensate", metavar="IMAGES", help="images as in data.source, whose labels are not used: "
                        "what goes is predicted from what stays (default: no compensation)")  # fmt: skip
    parser.add_argument("--compensate-images", type=int, default=256, metavar="N",
                        help="how many of them (default: 256)")  # fmt: skip


def execute(arguments: argparse.Namespace) -> None:
    """Do it: all plans first, then all files in one rename."""
    import shutil
    import tempfile

    from slimming.cli.output import made
    from slimming.errors import OutputError
    from slimming.io import explain

    output = Path(arguments.output)
    with made(output):
        model, plans, record = _plans(arguments)
        partial = output
        try:
            partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
            _write(model, plans, record, _images(arguments, model), partial, output)
            partial.chmod(0o755)
            partial.replace(output)
        except OSError as error:
            raise explain(error, output) from error
        except OutputError as error:
            # The disk filled up: the message shall name the place that the user knows.
            raise OutputError(str(error).replace(str(partial), str(output))) from error
        finally:
            if partial != output:
                shutil.rmtree(partial, ignore_errors=True)


def _images(arguments: argparse.Namespace, model: nn.Module) -> list[Tensor]:
    """The images for compensation."""
    from slimming.errors import ConfigError
    from slimming.pipeline import open_data
    from slimming.training.batches import calibration_images
    from slimming.training.config import DataConfig

    if arguments.compensate is None:
        return []
    if arguments.compensate_images < 1:
        raise ConfigError(f"--compensate-images is {arguments.compensate_images}; it must be at least 1.")
    data = open_data(DataConfig(source=arguments.compensate, augment="none"), model)
    return calibration_images(data, arguments.compensate_images)


def _write(
    model: nn.Module,
    plans: dict[str, Plan],
    record: dict[str, object],
    images: list[Tensor],
    partial: Path,
    output: Path,
) -> None:
    from slimming.api import cost, cut
    from slimming.checkpoint import save
    from slimming.cli.output import say

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


def _plans(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Plan], dict[str, object]]:
    """The model to cut, the plans by name, and where they come from."""
    from slimming.api import plans
    from slimming.cli.flags import parse_pairs
    from slimming.cli.models import load_checkpoint, search_directory
    from slimming.cli.settings import build
    from slimming.errors import CheckpointError, ConfigError
    from slimming.plan import Budget, Plan
    from slimming.results import plain, versions
    from slimming.searching import load_search

    source = Path(arguments.source)
    found = search_directory(source)
    if bool(arguments.budget) == bool(arguments.plan):
        raise ConfigError("Give --budget (once or more), or --plan.")
    budgets = [build(Budget, parse_pairs(text, "--budget")) for text in arguments.budget]
    if len({budget.name for budget in budgets}) < len(budgets):
        raise ConfigError("A budget is given twice; take one of them out.")
    if arguments.plan:
        given = Plan.load(arguments.plan)
        model = load_search(found).model if found is not None else load_checkpoint(source)
        return model, {"plan": given}, {"source": str(source), "versions": versions()}
    if found is None:
        raise CheckpointError(f"{source} holds no finished search. Give a directory that slimming search wrote.")
    result = load_search(found)
    layout = _layout(arguments, result.config.layout)
    table = arguments.latency_table
    record = {"source": str(source), "search": plain(result.config), "versions": versions()}
    made = plans(result, budgets, layout=layout, solver=arguments.solver, latency=table)
    _say_layout_costs(result, budgets, layout, made, arguments)
    return result.model, {budget.name: one for budget, one in zip(budgets, made, strict=True)}, record


def _say_layout_costs(
    result: SearchResult, budgets: Sequence[Budget], layout: Layout, made: Sequence[Plan], arguments: argparse.Namespace
) -> None:
    """Say what score is lost for the sizes that the layout asks for, budget by budget."""
    from slimming.api import plans
    from slimming.cli.output import say
    from slimming.plan import FREE, Layout

    for budget, chosen in zip(budgets, made, strict=True):
        if not budget.limits:
            continue
        # Memory and time have no formula for heads of several sizes.
        whole = budget.memory_bytes is not None or any("latency" in metric for metric in budget.limits)
        free = Layout(multiple=1) if whole else FREE
        if free == layout:
            continue
        (other,) = plans(result, [budget], layout=free, solver=arguments.solver, latency=arguments.latency_table)
        lost, least = chosen.solution["lost_score"], other.solution["lost_score"]
        sizes = "heads of one size, each any" if whole else "any sizes"
        what = "of loss are expected" if result.sensitivity else "of score go"
        say(f"{budget.name}: {lost:.3g} {what} with this layout, {least:.3g} with {sizes}")


def _layout(arguments: argparse.Namespace, base: Layout) -> Layout:
    from slimming.cli.flags import parse_flag
    from slimming.cli.settings import build
    from slimming.plan import Layout

    given = {
        "equal_heads": (bool, arguments.equal_heads),
        "equal_qkv": (bool, arguments.equal_qkv),
        "multiple": (int, arguments.multiple),
    }
    values = {name: parse_flag(hint, text, name) for name, (hint, text) in given.items() if text is not None}
    return build(Layout, values, "layout", base)
