"""``slimming push``: a model to the Hugging Face hub."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Put a saved model on the Hugging Face hub, with a model card made from its provenance, so that slimming, timm and
transformers load it by name. With --to it is written to a directory instead, and nothing is sent.

  slimming push runs/demo/macs-0.50/slim me/demo-half
  slimming push runs/demo/macs-0.50/slim me/demo-half --to demo-half
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="directory that slimming wrote")
    parser.add_argument("repository", metavar="OWNER/NAME", nargs="?", help="repository; made if it is not there")
    parser.add_argument("--to", metavar="DIRECTORY", help="write what would be pushed here, and send nothing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the card, such as apache-2.0")


def execute(arguments: argparse.Namespace) -> None:
    """Do it."""
    from slimming.cli.models import load_checkpoint
    from slimming.cli.output import echo
    from slimming.publishing.publish import push_to_hub

    load_checkpoint(arguments.model)  # says what to give where a whole run was given
    place = push_to_hub(
        arguments.model,
        arguments.repository,
        to=arguments.to,
        private=arguments.private,
        license=arguments.license,
    )
    echo(f"written: {place}" if arguments.to else f"pushed: {place}")
