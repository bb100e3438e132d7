"""``slimming latency-table``: measure the pieces of a model on this device."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Measure the pieces of a model (attention, MLPs, or single layers) at a grid of sizes, on this device, and write the
table that budgets of latency are planned with. A table that is there already is gone on with.
MODEL is a name as in inspect or a checkpoint directory; its weights do not matter. merge joins tables of one setting.

  slimming latency-table build deit_small_patch16_224 --output laptop.json
  slimming latency-table build deit_small_patch16_224 --batch-size 16 --threads 4 --output server.json
  slimming latency-table merge one.json other.json --output both.json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.cli.flags import add_common_options

    parser.add_argument("action", choices=("build", "merge"), help="what to do")
    parser.add_argument("inputs", nargs="+", metavar="MODEL|FILE", help="one model to build of, or tables to merge")
    parser.add_argument("--output", metavar="FILE", required=True, help="the table")
    add_common_options(parser, "--model.arguments")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per pass (default: 1)")
    parser.add_argument("--kinds", metavar="A,B", help="kinds of units whose number may differ, such as mlp,width "
                        "(default: what a search takes)")  # fmt: skip
    parser.add_argument("--uneven-heads", action="store_true", help="for plans whose heads may differ in size")
    add_common_options(parser, "--device", "--threads")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="float32, bfloat16 or float16")
    parser.add_argument(
        "--runtime", default="eager", metavar="NAME", help="eager, compile or onnxruntime (default: eager)"
    )


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    from slimming.cli.models import choose_device, open_named, set_threads
    from slimming.cli.output import echo
    from slimming.errors import ConfigError, nearest
    from slimming.planning.latency_measurement import build_latency_table
    from slimming.planning.latency_table import LatencyTable

    if arguments.action == "merge":
        table, *others = (LatencyTable.load(path) for path in arguments.inputs)
        for other in others:
            table = table.merged(other)
        table.save(arguments.output)
        echo(f"{arguments.output}: {len(table.points)} points")
        return
    import torch

    if len(arguments.inputs) != 1:
        raise ConfigError("Give one model to build a table of.")
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
        "of its pieces"
        + (f"; sizes in multiples of {table.multiple} are fast here" if table.multiple is not None else "")
    )
