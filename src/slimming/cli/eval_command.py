"""``slimming eval``: evaluate the top-1 accuracy of checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Evaluate the top-1 accuracy of checkpoints on validation images. By default these are the validation images of the
data that the checkpoint was trained on.

  slimming eval runs/demo/macs-0.50/slim
  slimming eval runs/dense/model runs/cut/macs-0.50/cut --data.source flowers/ --data.split_fraction 0.1
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.cli.flags import add_common_options, add_flags
    from slimming.training.config import DataConfig

    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="directories, or hf-hub:OWNER/NAME")
    parser.add_argument("--config", metavar="FILE", help="YAML file with a section data; flags override it")
    parser.add_argument(
        "--batch_size", type=int, default=256, metavar="N", help="images per forward pass (default 256)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="worker processes that read images (default 0)"
    )
    add_common_options(parser, "--device", "--json")
    add_flags(parser, DataConfig, "data")


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    import json

    from slimming.cli.models import choose_device, load_checkpoint
    from slimming.cli.output import echo
    from slimming.models.hosts import classes_of
    from slimming.runs.setup import check_input, open_data
    from slimming.training.evaluation import check_classes_of_model, evaluate

    device = choose_device(arguments.device)
    results = {}
    for name in arguments.checkpoints:
        model = load_checkpoint(name)
        config = _data(arguments, name)
        data = open_data(config, model)
        check_input(model)
        check_classes_of_model(name, model, classes_of(model), data.val)
        results[name] = evaluate(
            model, data.val, batch_size=arguments.batch_size, workers=arguments.workers, device=device
        )
        if not arguments.json:
            metrics = results[name]
            echo(
                f"{name}: top-1 {metrics['top1']:.2%}, loss {metrics['loss']:.4f}, {metrics['images']} images of "
                f"{config.source}"
            )
    if arguments.json:
        print(json.dumps(results, indent=1))


def _data(arguments: argparse.Namespace, name: str) -> Any:
    """Return the data settings of the config file and the flags, or of the checkpoint with the flags."""
    from slimming.checkpoints import hub
    from slimming.cli.configs import EvalCommandConfig, config_from_values, read_config
    from slimming.cli.flags import flag_values
    from slimming.errors import DataError
    from slimming.runs.files import stored_data

    values = flag_values(arguments, EvalCommandConfig)
    if arguments.config is not None or "source" in values.get("data", {}):
        return read_config(EvalCommandConfig, arguments)[0].data
    directory = hub.fetch(name) if hub.is_address(name) else Path(name)
    stored = stored_data(directory)
    if not stored:
        raise DataError(f"{name} does not record the data that it was trained on; give --data.source.")
    return config_from_values(EvalCommandConfig, {"data": {**stored, **values.get("data", {})}}).data
