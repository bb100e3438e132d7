"""``slimming search``: one search, from which every budget is read."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Train weights and soft masks together, once. Any number of budgets is cut from the result with slimming cut.
Stopped anywhere, the same command goes on where it was.

  slimming search config.yaml --output runs/search
  slimming search --model.name deit_tiny_patch16_224 --data.source flowers/ --search.preset paper
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from slimming.cli.configs import SearchCommandConfig, add_config_options

    add_config_options(parser, SearchCommandConfig)


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    from functools import partial

    from slimming.cli.configs import SearchCommandConfig, read_config
    from slimming.cli.output import echo, is_main_process, print_settings, run_directory
    from slimming.cli.run_command import output_path
    from slimming.runs.setup import open_start
    from slimming.searching.mask_search import RECORD, search
    from slimming.training.evaluation import evaluate

    config, notes = read_config(SearchCommandConfig, arguments)
    directory = output_path(arguments, "search")
    with run_directory(directory, config, "search"):
        if (directory / RECORD).exists():
            echo(f"{directory} holds the finished search already; nothing to do.")
            return
        print_settings("search", config, directory, notes)
        model, data, replaced = open_start(config.model, config.data, config.search.train.seed)
        for note in replaced:
            echo(note)
        judge = partial(
            evaluate,
            images=data.val,
            batch_size=min(256, config.search.train.images_per_pass),
            workers=config.search.train.workers,
        )
        result = search(model, data, config.search, directory=directory, resume=True, evaluate=judge)
        if is_main_process():
            result.save(directory)
        echo(f"search: done, masked model at top-1 {100 * result.metrics['top1']:.1f} %")
        echo(f"next: slimming cut {directory} --budget macs=0.5 --output DIR")
