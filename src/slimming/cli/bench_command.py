"""``slimming bench``: count and time models."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = """\
Count the params, MACs and memory of one or more models and time them, alternating between the models. Speed-ups are
relative to the first one, usually the dense model. MODEL is a checkpoint directory, or a name as in slimming inspect
(created with random weights, which do not affect the time).

  slimming bench runs/dense/model runs/demo/macs-0.50/slim
  slimming bench deit_tiny_patch16_224 deit_small_patch16_224 --bench.batch_sizes 1,8
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.benchmarking.config import BenchConfig
    from slimming.cli.flags import add_common_options, add_flags

    parser.add_argument("models", nargs="+", metavar="MODEL", help="directories or names, the dense model first")
    add_common_options(parser, "--device", "--threads", "--json")
    add_flags(parser, BenchConfig, "bench")


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
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
        raise ConfigError("A model is given twice; remove one of them.")
    set_threads(arguments.threads)
    models = {name: open_named(name).to(device).eval() for name in arguments.models}
    shapes = {name: prunable(model).anatomy.input_shape for name, model in models.items()}
    for name, shape in shapes.items():
        if shape != shapes[arguments.models[0]]:
            raise ConfigError(
                f"{name} takes images of {shape}, {arguments.models[0]} of {shapes[arguments.models[0]]}; give models "
                "with the same input."
            )
    timed = measure_all(models, prunable(models[arguments.models[0]]).examples()[0], config)
    measured = {}
    for name, model in models.items():
        costs = cost(model)
        counts = {"params": costs.params, "macs": costs.macs, "memory_bytes": costs.memory_bytes}
        measured[name] = {**counts, **timed[name]}
    if arguments.json:
        print(json.dumps({"machine": machine(), "models": measured}, indent=1))
        return
    _print(measured, config.batch_sizes, config.runtime)


def _print(measured: dict[str, dict[str, Any]], batch_sizes: tuple[int, ...], runtime: str) -> None:
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
    for name, row in measured.items():
        cells = [name, format_count(row["params"]), format_count(row["macs"]), format_count(row["memory_bytes"], "B")]
        for size in batch_sizes:
            latency, speedup = row["latency_ms"][str(size)], row["speedup"][str(size)]
            cells.append(f"{latency['median']:.2f} ({latency['p25']:.2f}-{latency['p75']:.2f})")
            cells.append(f"{speedup['median']:.2f}")
        table.add_row(*cells)
    console().print(table)
    device = machine()
    echo(
        f"measured on {device['gpu'] or device['cpu']}, {device['threads']} threads, {runtime}; speed-up over "
        "the first model"
    )
