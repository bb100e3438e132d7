"""``slimming latency-table``: measure the layers of a model on this device."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Measure the parts of a model (attention, MLPs, or single layers) at a grid of sizes on this device, and write the
latency table for budgets of latency. An unfinished table is continued. MODEL is a name as in slimming inspect or a
checkpoint directory; its weights do not matter. merge combines tables that were measured with the same settings.

  slimming latency-table build deit_small_patch16_224 --output laptop.json
  slimming latency-table build deit_small_patch16_224 --batch-size 16 --threads 4 --output server.json
  slimming latency-table merge one.json other.json --output both.json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.cli.flags import add_common_options

    parser.add_argument("action", choices=("build", "merge"), help="measure a table, or merge several")
    parser.add_argument("inputs", nargs="+", metavar="MODEL|FILE", help="the model to measure, or tables to merge")
    parser.add_argument("--output", metavar="FILE", required=True, help="file of the table")
    add_common_options(parser, "--model.arguments")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per forward pass (default: 1)")
    parser.add_argument("--kinds", metavar="A,B", help="kinds of units that plans remove, such as mlp,width "
                        "(default: the kinds of a search)")  # fmt: skip
    parser.add_argument("--uneven-heads", action="store_true", help="for plans with heads of different sizes")
    add_common_options(parser, "--device", "--threads")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="float32, bfloat16 or float16")
    parser.add_argument(
        "--runtime", default="eager", metavar="NAME", help="eager, compile or onnxruntime (default: eager)"
    )


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from slimming.cli.models import choose_device, open_named, set_threads
    from slimming.cli.output import echo
    from slimming.errors import ConfigError, nearest
    from slimming.planning.latency_measurement import build_latency_table
    from slimming.planning.latency_table import LatencyTable

    if arguments.action == "merge":
        table, *others = (LatencyTable.load(path) for path in arguments.inputs)
        for other in others:
            table = table.merged(other)
        if Path(arguments.output).exists():
            LatencyTable.load(arguments.output)  # another file is refused, and kept
        table.save(arguments.output)
        echo(f"{arguments.output}: {len(table.points)} points")
        return
    import torch

    if len(arguments.inputs) != 1:
        raise ConfigError("Give exactly one model to build a table for.")
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}; it must be at least 1.")
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if arguments.dtype not in types:
        raise ConfigError(f"--dtype is {arguments.dtype!r}; give {', '.join(types)}.{nearest(arguments.dtype, types)}")
    set_threads(arguments.threads)
    options = vars(arguments)["model.arguments"]
    model = open_named(arguments.inputs[0], options).to(choose_device(arguments.device), types[arguments.dtype])
    table = build_latency_table(
        model,
        batch_size=arguments.batch_size,
        runtime=arguments.runtime,
        kinds=arguments.kinds.split(",") if arguments.kinds is not None else None,
        uneven_heads=arguments.uneven_heads,
        path=arguments.output,
        log=echo,
    )
    echo(
        f"{arguments.output}: {len(table.points)} points; the dense model takes {table.calibration:.3f} times the sum "
        "of its parts"
        + (f"; sizes in multiples of {table.multiple} are fast here" if table.multiple is not None else "")
    )
