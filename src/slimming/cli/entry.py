"""From the words of a command line to an exit code.

0: done. 2: the user's mistake, in one sentence on stderr. 130: stopped by Ctrl-C, after saving. 1: our mistake.
"""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from slimming.errors import ConfigError, Interrupted, SlimmingError, nearest

COMMANDS = {
    "run": "the whole chain: search, cut every budget, retrain, measure, report",
    "search": "train weights and soft masks together, once for all budgets",
    "cut": "cut a searched model to one or more budgets",
    "train": "train a dense model, or retrain a cut one with a teacher",
    "eval": "top-1 of checkpoints on validation images",
    "bench": "what models cost: params, MACs, memory, measured latency",
    "export": "files for ONNX Runtime, OpenVINO and others, checked against the model",
    "latency-table": "measure the pieces of a model here, for budgets of latency",
    "inspect": "what can go in a model, and what each part costs",
    "push": "put a model on the Hugging Face hub, or write what would be put there",
    "report": "write a run's report again and show its table",
    "demo": "the whole chain on an embedded model and embedded images",
}
REPORT_TO = "This is a mistake of slimming's, not yours. Please report it with the lines above and your command."
OURS, YOURS, STOPPED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (by default that of the process) names, and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    again = shlex.join(["slimming", *words])
    words = [word for word in words if word != "--debug"]
    try:
        with _world_errors():
            return _run(words)
    except Interrupted as error:
        return _fail(error, f"{error} To go on: {again}", STOPPED, debug)
    except KeyboardInterrupt as error:
        return _fail(error, f"Stopped; what was saved before stays. To go on or start again: {again}", STOPPED, debug)
    except SlimmingError as error:
        return _fail(error, f"error: {error}", YOURS, debug)
    except BrokenPipeError:
        sys.stderr.close()
        return OURS
    except Exception as error:
        traceback.print_exception(error)
        return _fail(error, REPORT_TO, OURS, debug=False)


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"slimming {version('slimming')}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        raise ConfigError(f"There is no command {name!r}; commands are {', '.join(COMMANDS)}.{nearest(name, COMMANDS)}")
    try:
        arguments = make_parser(name).parse_args(words[1:])
    except SystemExit as done:  # --help was printed
        return int(done.code or 0)
    if getattr(arguments, "print_config", False):
        from slimming.cli.configs import config_to_yaml, read_config

        config, notes = read_config(arguments.config_class, arguments)
        print("".join(f"# {note}\n" for note in notes) + config_to_yaml(config), end="")
    else:
        command(name).execute(arguments)
    return 0


def command(name: str) -> ModuleType:
    """The module of a command: ``DESCRIPTION``, ``arguments(parser)`` and ``execute(arguments)``."""
    return import_module(f"slimming.cli.{name.replace('-', '_')}_command")


def overview() -> str:
    """What ``slimming --help`` prints."""
    lines = [f"  {name:<13} {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: slimming COMMAND ...",
            "",
            "Turn a pretrained vision model into a family of smaller, really faster ones.",
            "",
            "commands:",
            *lines,
            "",
            "slimming COMMAND --help says more, with an example. First try: slimming demo",
            "Every command takes --debug (show where an error arose); slimming --version.",
            "Exit codes: 0 done, 1 a mistake of slimming's, 2 a mistake in the input, 130 stopped by Ctrl-C.",
        ]
    )


class Parser(argparse.ArgumentParser):
    """Reports mistakes as `ConfigError`, and names the nearest option of an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found as a `ConfigError`."""
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse ``words``; unknown options are found first, before they are mistaken for something else."""
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                options = list(self._option_string_actions)
                raise ConfigError(
                    f"{self.prog} has no option {option}; see {self.prog} --help.{nearest(option, options)}"
                )
        return super().parse_args(words)


def make_parser(name: str) -> Parser:
    """The parser of one command."""
    found = command(name)
    parser = Parser(
        prog=f"slimming {name}",
        description=found.DESCRIPTION,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    found.arguments(parser)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and leaves room for long option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)

    def add_usage(self, usage: str | None, actions: object, groups: object, prefix: str | None = None) -> None:
        """Leave the settings (and --help) out of the usage; they are listed below it."""
        shown = [action for action in actions if action.default is not argparse.SUPPRESS]  # pyright: ignore
        super().add_usage(usage, shown, [], prefix)


def _fail(error: BaseException, line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"slimming: {line}", file=sys.stderr)
    return code


@contextmanager
def _world_errors() -> Iterator[None]:
    """Turn a lack of memory, disk or permission, met anywhere, into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        from slimming.core.files import explain

        raise explain(error, Path(error.filename or "the output")) from error
    except (MemoryError, RuntimeError) as error:
        # torch's own class is told by its name, so that this file does not wait for torch.
        lacking = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not lacking and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(
            "Out of memory. Take a smaller batch (train.batch_size, bench.batch_sizes), a smaller model or "
            "image size, or a machine with more memory."
        ) from error
