"""``slimming train``: train a model, or retrain it with a teacher."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = """\
Train a model on images; with --teacher it is distilled from the outputs of that model. The trained model is saved to
DIR/model. If the training is interrupted, the same command resumes it.

  slimming train --model.name deit_tiny_patch16_224 --data.source flowers/ --train.epochs 20 --output runs/dense
  slimming train --model.name runs/cut/macs-0.50/cut --teacher runs/dense/model --data.source flowers/
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.cli.configs import TrainCommandConfig, add_config_options

    add_config_options(parser, TrainCommandConfig)


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from functools import partial

    from slimming.checkpoints import checkpoint
    from slimming.cli.configs import TrainCommandConfig, config_to_values, read_config
    from slimming.cli.models import load_checkpoint
    from slimming.cli.output import echo, is_main_process, print_settings, run_directory
    from slimming.cli.run_command import output_path
    from slimming.core.plain_text import without_places
    from slimming.retraining.retrain import train
    from slimming.runs.files import missing_in_checkpoint
    from slimming.runs.inputs import check_named_inputs
    from slimming.runs.setup import open_start
    from slimming.training.evaluation import evaluate
    from slimming.training.log import LOG_FILE
    from slimming.training.resume import STATE_FILE

    config, notes = read_config(TrainCommandConfig, arguments)
    directory = output_path(arguments, "train")
    with run_directory(directory, config, "train"):
        if is_main_process():
            fresh = not any((directory / name).exists() for name in (STATE_FILE, "model"))
            check_named_inputs(directory, config.model, config.data, teacher=config.teacher, fresh=fresh)
        if not missing_in_checkpoint(directory / "model") and (directory / LOG_FILE).exists():
            echo(f"{directory / 'model'} is trained already; nothing to do.")
            return
        print_settings("train", config, directory, notes)
        model, data, messages = open_start(config.model, config.data, config.train.seed)
        for message in messages:
            echo(message)
        teacher = load_checkpoint(config.teacher) if config.teacher is not None else None
        if teacher is not None:
            _check_teacher(teacher, model, config.teacher)
        evaluate_model = partial(
            evaluate, images=data.val, batch_size=min(256, config.train.images_per_pass), workers=config.train.workers
        )
        history = train(
            model,
            data,
            config.train,
            teacher,
            distil=config.distil,
            directory=directory,
            resume=True,
            evaluate=evaluate_model,
        )
        if is_main_process():
            record = {
                "settings": without_places(config_to_values(config)),
                "data": without_places(config_to_values(config)["data"]),
                "metrics": history.metrics,
            }
            trained = history.averaged if history.averaged is not None else model
            checkpoint.save_again(trained, directory / "model", record)
        echo(f"trained: top-1 {100 * history.metrics['top1']:.1f} %, model in {directory / 'model'}")


def _check_teacher(teacher: Any, model: Any, name: str | None) -> None:
    from slimming.errors import ConfigError
    from slimming.masks.attachment import prunable
    from slimming.models.hosts import classes_of

    teacher_classes, model_classes = classes_of(teacher), classes_of(model)
    if teacher_classes != model_classes:
        raise ConfigError(
            f"The teacher {name} knows {teacher_classes} classes, the model {model_classes}; give a teacher "
            "that was trained on this data."
        )
    teacher_input, model_input = prunable(teacher).anatomy.input_shape, prunable(model).anatomy.input_shape
    if teacher_input != model_input:
        raise ConfigError(
            f"The teacher {name} takes images of {teacher_input}, the model of {model_input}; give a teacher with the "
            "same input."
        )
