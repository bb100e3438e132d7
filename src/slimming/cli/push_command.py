"""``slimming push``: upload a model to the Hugging Face hub."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Upload a saved model to the Hugging Face hub, with a model card made from its provenance, so that slimming, timm and
transformers can load it by name. With --to the files are written to a directory instead, and nothing is uploaded.

  slimming push runs/demo/macs-0.50/slim me/demo-half
  slimming push runs/demo/macs-0.50/slim me/demo-half --to demo-half
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument("model", metavar="MODEL", help="directory of a checkpoint")
    parser.add_argument("repository", metavar="OWNER/NAME", nargs="?", help="repository; created if it does not exist")
    parser.add_argument("--to", metavar="DIRECTORY", help="write the files to this directory and upload nothing")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument(
        "--license", metavar="NAME", help="license of the weights for the model card, such as apache-2.0"
    )


def execute(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from slimming.cli.models import load_checkpoint
    from slimming.cli.output import echo
    from slimming.publishing.publish import push_to_hub

    load_checkpoint(arguments.model)  # checks that it is a checkpoint
    destination = push_to_hub(
        arguments.model,
        arguments.repository,
        to=arguments.to,
        private=arguments.private,
        license=arguments.license,
    )
    echo(f"written: {destination}" if arguments.to else f"pushed: {destination}")
