"""``slimming search``: one search, from which models of all budgets can be cut."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Train weights and soft masks together, once. slimming cut then cuts models of any number of budgets from the result.
If it is interrupted, the same command resumes it. search.score and search.sensitivity may be changed after the
training, which is then not repeated.

  slimming search config.yaml --output runs/search
  slimming search --model.name deit_tiny_patch16_224 --data.source flowers/ --search.preset paper
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    from slimming.cli.configs import SearchCommandConfig, add_config_options

    add_config_options(parser, SearchCommandConfig)


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from functools import partial

    from slimming.cli.configs import SearchCommandConfig, read_config
    from slimming.cli.output import echo, is_main_process, print_settings, run_directory
    from slimming.cli.run_command import output_path
    from slimming.runs.files import missing_result
    from slimming.runs.inputs import check_named_inputs
    from slimming.runs.setup import open_start
    from slimming.searching.mask_search import RECORD, is_scored, search
    from slimming.training.evaluation import evaluate
    from slimming.training.resume import STATE_FILE

    config, notes = read_config(SearchCommandConfig, arguments)
    directory = output_path(arguments, "search")
    with run_directory(directory, config, "search"):
        if is_main_process():
            fresh = not any((directory / name).exists() for name in (STATE_FILE, RECORD))
            check_named_inputs(directory, config.model, config.data, fresh=fresh)
        if not missing_result(directory) and is_scored(directory, config.search):
            echo(f"{directory} holds the finished search already; nothing to do.")
            return
        print_settings("search", config, directory, notes)
        model, data, messages = open_start(config.model, config.data, config.search.train.seed)
        for message in messages:
            echo(message)
        evaluate_model = partial(
            evaluate,
            images=data.val,
            batch_size=min(256, config.search.train.images_per_pass),
            workers=config.search.train.workers,
        )
        result = search(model, data, config.search, directory=directory, resume=True, evaluate=evaluate_model)
        if is_main_process():
            result.save(directory)
        echo(f"search: done, top-1 of the masked model {100 * result.metrics['top1']:.1f} %")
        echo(f"next: slimming cut {directory} --budget macs=0.5 --output DIR")
