"""``slimming eval``: evaluate checkpoints: top-1 of classifiers, mAP of detectors, mIoU of segmenters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Evaluate the top-1 accuracy of checkpoints on validation images. By default these are the validation images of the
data that the checkpoint was trained on. With --annotations, evaluate the mean average precision of detectors on a JSON
file of COCO, or the mean intersection over union of segmenters on a folder of masks; --data.source is the folder of the
images.

  slimming eval runs/demo/macs-0.50/slim
  slimming eval runs/dense/model runs/cut/macs-0.50/cut --data.source flowers/ --data.split_fraction 0.1
  slimming eval runs/detector/macs-0.70/cut --data.source coco/val2017 --annotations coco/instances_val2017.json
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
    parser.add_argument(
        "--annotations", metavar="PATH", help="JSON file of COCO, or folder of masks, for the folder data.source"
    )
    add_common_options(parser, "--device", "--json")
    add_flags(parser, DataConfig, "data")


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    import json

    from slimming.cli.models import choose_device, load_checkpoint
    from slimming.cli.output import echo
    from slimming.models.hosts import classes_of
    from slimming.runs.dense import check_classifies
    from slimming.runs.setup import check_input, open_data
    from slimming.training.evaluation import check_classes_of_model, evaluate

    device = choose_device(arguments.device)
    results = {}
    if arguments.annotations is not None:
        _dense(arguments, device)
        return
    for name in arguments.checkpoints:
        model = load_checkpoint(name)
        check_classifies(model)
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


def _dense(arguments: argparse.Namespace, device: Any) -> None:
    """Evaluate detectors and segmenters on annotations."""
    import json

    from slimming.cli.configs import EvalCommandConfig
    from slimming.cli.flags import flag_values
    from slimming.cli.models import load_checkpoint
    from slimming.cli.output import echo
    from slimming.errors import ConfigError
    from slimming.models.transformers_tasks import task_of
    from slimming.runs.dense import DENSE_METRICS, evaluate_dense

    data = flag_values(arguments, EvalCommandConfig).get("data", {})
    if set(data) != {"source"} or arguments.config is not None:
        raise ConfigError(
            "With --annotations, give --data.source, the folder of the images, and no other data settings."
        )
    results = {}
    for name in arguments.checkpoints:
        model = load_checkpoint(name).to(device)
        results[name] = evaluate_dense(model, data["source"], arguments.annotations, batch_size=arguments.batch_size)
        if not arguments.json:
            metric, values = DENSE_METRICS[task_of(model)], results[name]
            others = [
                f"{key} {100 * value:.2f} %" for key, value in values.items() if key not in ("images", metric.key)
            ]
            images = int(values["images"])
            echo(
                f"{name}: {metric.name} {values[metric.key]:.2%}, {', '.join(others)}, {images} images of "
                f"{data['source']}"
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
