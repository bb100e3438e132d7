"""``slimming export``: files that run without this package."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Write a model in the forms that runtimes take, for any batch size. Each file is compared with the model on real images;
if one does not say what the model says, nothing is written. TARGET is pt2 (torch.export), onnx, onnx-int8-dynamic,
onnx-int8-static, openvino or openvino-fp16. How an image becomes the input, and the names of the classes, lie in each
file and in model.json beside it.

  slimming export runs/demo/macs-0.50/slim --to onnx
  slimming export runs/demo/macs-0.50/slim --to onnx,onnx-int8-static --data photos/ --output photos-onnx
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.cli.flags import add_common_options

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory that slimming wrote, or "
                        "hf-hub:OWNER/NAME")  # fmt: skip
    parser.add_argument("--to", default="onnx", metavar="TARGET,TARGET", help="kinds of files (default: onnx)")
    parser.add_argument("--data", metavar="IMAGES", help="a folder of images, in class folders or not, or other data "
                        "as in data.source, without labels (default: what the checkpoint was trained on)")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="a directory that is empty or does not exist yet "
                        "(default: CHECKPOINT-export; of the hub, NAME-export)")  # fmt: skip
    parser.add_argument("--tolerance", type=float, metavar="X", help="the largest difference of a logit, as a share of "
                        "the largest (default: 1e-5 for pt2, 1e-4 for float32, 1e-2 for float16)")  # fmt: skip
    parser.add_argument("--agreement", type=float, metavar="X", help="the least share of images with the same first "
                        "class (default: 0.95 for 8 bits)")  # fmt: skip
    parser.add_argument("--opset", type=int, default=20, metavar="N", help="version of ONNX's operations (default: 20)")
    add_common_options(parser, "--threads", "--json")


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
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
        place = Path(hub.split(name)[0].rpartition("/")[2])
    else:
        check_checkpoint(Path(name))
        place = Path(name)
    beside = Path(os.path.normpath(place / ".."))
    output = Path(arguments.output or beside / f"{place.resolve().name}-export")
    found = export(
        name,
        output,
        to=targets,
        images=arguments.data,
        tolerance=arguments.tolerance,
        agreement=arguments.agreement,
        opset=arguments.opset,
    )
    if arguments.json:
        print(json.dumps([{**asdict(one), "file": str(one.file)} for one in found], indent=1))
        return
    _print(found)


def _print(found: tuple) -> None:
    from rich.table import Table

    from slimming.cli.output import console, echo, format_count

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    for title in ("size", "largest difference", "same class", "ms at batch 1", "speed-up\n(quartiles)"):
        table.add_column(title, justify="right")
    for one in found:
        same = "-" if one.agreement is None else f"{one.agreement:.1%}"
        ratio = one.speedup
        table.add_row(
            str(one.file),
            format_count(one.bytes, "B"),
            f"{one.relative:.1e}",
            same,
            f"{one.latency_ms:.2f}",
            f"{ratio['median']:.2f} ({ratio['p25']:.2f}-{ratio['p75']:.2f})",
        )
    console().print(table)
    echo(
        f"compared on {found[0].images} images; changed_settings as shares of the largest logit; speed-up over PyTorch"
    )
    echo(f"how an image becomes the input, and the classes: {found[0].file.parent / 'model.json'}")
