"""The command line: one short file per command, thin over the library."""

from slimming.cli.entry import main

__all__ = ["main"]
