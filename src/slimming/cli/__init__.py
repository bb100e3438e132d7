"""Command line of slimming, with one module per command."""

from slimming.cli.entry import main

__all__ = ["main"]
