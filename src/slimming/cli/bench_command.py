"""``slimming bench``: what models cost, measured in turns."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = """\
Count and time one or more models, in turns; the first is the one that the others are compared with, usually the
dense model. MODEL is a checkpoint directory, or a name as in inspect (made with random weights, which do not change
the time).

  slimming bench runs/dense/model runs/demo/macs-0.50/slim
  slimming bench deit_tiny_patch16_224 deit_small_patch16_224 --bench.batch_sizes 1,8
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.benchmarking.config import BenchConfig
    from slimming.cli.flags import add_common_options, add_flags

    parser.add_argument("models", nargs="+", metavar="MODEL", help="directories or names, dense first")
    add_common_options(parser, "--device", "--threads", "--json")
    add_flags(parser, BenchConfig, "bench")


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    import json

    from slimming.benchmarking.config import BenchConfig
    from slimming.benchmarking.timing import machine
    from slimming.cli.flags import flag_values
    from slimming.cli.models import choose_device, open_named, set_threads
    from slimming.cli.settings import build
    from slimming.errors import ConfigError
    from slimming.masks.attachment import prunable
    from slimming.pruning.costs import cost
    from slimming.runs.results import measure_all

    config = build(BenchConfig, flag_values(arguments, BenchConfig, "bench"), "bench")
    device = choose_device(arguments.device)
    if len(set(arguments.models)) < len(arguments.models):
        raise ConfigError("A model is given twice; take one of them out.")
    set_threads(arguments.threads)
    models = {name: open_named(name).to(device).eval() for name in arguments.models}
    shapes = {name: prunable(model).anatomy.input_shape for name, model in models.items()}
    for name, shape in shapes.items():
        if shape != shapes[arguments.models[0]]:
            raise ConfigError(
                f"{name} takes images of {shape}, {arguments.models[0]} of {shapes[arguments.models[0]]}."
            )
    timed = measure_all(models, shapes[arguments.models[0]], config)
    found = {}
    for name, model in models.items():
        cost_of = cost(model)
        counts = {"params": cost_of.params, "macs": cost_of.macs, "memory_bytes": cost_of.memory_bytes}
        found[name] = {**counts, **timed[name]}
    if arguments.json:
        print(json.dumps({"machine": machine(), "models": found}, indent=1))
        return
    _print(found, config.batch_sizes, config.runtime)


def _print(found: dict[str, dict[str, Any]], batch_sizes: tuple[int, ...], runtime: str) -> None:
    from rich.table import Table

    from slimming.benchmarking.timing import machine
    from slimming.cli.output import console, echo, format_count

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("params", "MACs", "memory"):
        table.add_column(title, justify="right")
    for size in batch_sizes:
        table.add_column(f"ms at batch {size}\n(quartiles)", justify="right")
        table.add_column("speed-up", justify="right")
    for name, row in found.items():
        cells = [name, format_count(row["params"]), format_count(row["macs"]), format_count(row["memory_bytes"], "B")]
        for size in batch_sizes:
            one, ratio = row["latency_ms"][str(size)], row["speedup"][str(size)]
            cells += [f"{one['median']:.2f} ({one['p25']:.2f}-{one['p75']:.2f})", f"{ratio['median']:.2f}"]
        table.add_row(*cells)
    console().print(table)
    here = machine()
    where = f"{here['gpu'] or here['cpu']}, {here['threads']} threads, {runtime}"
    echo(f"measured here: {where}; speed-up over the first model")
