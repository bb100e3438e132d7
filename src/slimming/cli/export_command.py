"""``slimming export``: export a model to files that run without slimming."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Export a model to the formats of other runtimes, for any batch size. The outputs of each file are compared with those
of the model on real images; if they differ, nothing is written. TARGET is pt2 (torch.export), onnx, onnx-int8-dynamic,
onnx-int8-static, openvino or openvino-fp16. The preprocessing of images and the names of the classes are stored in
each file and in model.json.

  slimming export runs/demo/macs-0.50/slim --to onnx
  slimming export runs/demo/macs-0.50/slim --to onnx,onnx-int8-static --data photos/ --output photos-onnx
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.cli.flags import add_common_options

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory of a checkpoint, or "
                        "hf-hub:OWNER/NAME")  # fmt: skip
    parser.add_argument("--to", default="onnx", metavar="TARGET,TARGET", help="export targets (default: onnx)")
    parser.add_argument("--data", metavar="IMAGES", help="a folder of images, with or without class folders, or other "
                        "data as in data.source; labels are not used (default: those it was trained on)")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="an empty or new directory "
                        "(default: CHECKPOINT-export; NAME-export for the hub)")  # fmt: skip
    parser.add_argument("--tolerance", type=float, metavar="X", help="maximum difference of the logits, as a share of "
                        "the largest logit (default: 1e-5 for pt2, 1e-4 for float32, 1e-2 for float16)")  # fmt: skip
    parser.add_argument("--agreement", type=float, metavar="X", help="minimum share of images with the same predicted "
                        "class (default: 0.95 for 8 bits)")  # fmt: skip
    parser.add_argument("--opset", type=int, default=20, metavar="N", help="ONNX opset version (default: 20)")
    add_common_options(parser, "--threads", "--json")


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    import json
    import os
    from dataclasses import asdict
    from pathlib import Path

    from slimming.checkpoints import hub
    from slimming.cli.models import check_checkpoint, set_threads
    from slimming.exporting.exporter import export
    from slimming.exporting.targets import choose

    name = arguments.checkpoint
    targets = [name for name in arguments.to.split(",") if name]
    choose(targets)
    set_threads(arguments.threads)
    if hub.is_address(name):
        source = Path(hub.split(name)[0].rpartition("/")[2])
    else:
        check_checkpoint(Path(name))
        source = Path(name)
    parent = Path(os.path.normpath(source / ".."))
    output = Path(arguments.output or parent / f"{source.resolve().name}-export")
    exported = export(
        name,
        output,
        to=targets,
        images=arguments.data,
        tolerance=arguments.tolerance,
        agreement=arguments.agreement,
        opset=arguments.opset,
    )
    if arguments.json:
        print(json.dumps([{**asdict(entry), "file": str(entry.file)} for entry in exported], indent=1))
        return
    _print(exported)


def _print(exported: tuple) -> None:
    from rich.table import Table

    from slimming.cli.output import console, echo, format_count

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    for title in ("size", "largest difference", "same class", "ms at batch 1", "speed-up\n(quartiles)"):
        table.add_column(title, justify="right")
    for entry in exported:
        agreement = "-" if entry.agreement is None else f"{entry.agreement:.1%}"
        speedup = entry.speedup
        table.add_row(
            str(entry.file),
            format_count(entry.bytes, "B"),
            f"{entry.relative:.1e}",
            agreement,
            f"{entry.latency_ms:.2f}",
            f"{speedup['median']:.2f} ({speedup['p25']:.2f}-{speedup['p75']:.2f})",
        )
    console().print(table)
    echo(f"compared on {exported[0].images} images; differences relative to the largest logit; speed-up over PyTorch")
    echo(f"preprocessing and classes: {exported[0].file.parent / 'model.json'}")
