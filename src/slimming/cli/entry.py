"""Entry point of the command line: parse arguments, run a command, turn errors into exit codes.

Exit codes: 0 success, 1 internal error, 2 error in the input (reported in one sentence on stderr), 130 stopped by
Ctrl-C, 143 stopped by SIGTERM, both after the state of a training was saved.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from slimming.core.interrupts import handled_by, raise_interrupt, signal_of
from slimming.core.plain_text import on_one_line, printable
from slimming.errors import ConfigError, Interrupted, SlimmingError, nearest

COMMANDS = {
    "run": "run the whole pipeline: search, cut to every budget, retrain, measure, report",
    "search": "train weights and soft masks together, once for all budgets",
    "cut": "cut a model to one or more budgets, from a search or in one shot",
    "train": "train a dense model, or retrain a cut one with a teacher",
    "eval": "evaluate the top-1 accuracy of checkpoints on validation images",
    "bench": "count params, MACs and memory of models, and measure their latency",
    "export": "export to ONNX, OpenVINO and others, and compare the files with the model",
    "latency-table": "measure the layers of a model on this device, for budgets of latency",
    "inspect": "list the prunable groups of a model and what they cost",
    "push": "upload a model to the Hugging Face hub, or write its files to a directory",
    "report": "write the report of a run again and print its table",
    "demo": "run the whole pipeline on an embedded model and embedded images",
}
INTERNAL_ERROR_MESSAGE = "This is a bug in slimming. Please report it with the lines above and your command."
INTERNAL_ERROR, INPUT_ERROR, STOPPED_BY = 1, 2, 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the arguments of the process) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    command_line = shlex.join(["slimming", *words])
    words = [word for word in words if word != "--debug"]
    try:
        with handled_by(raise_interrupt), _explain_system_errors(), _plain_messages():
            return _run(words)
    except Interrupted as error:
        return _fail(error, f"{error} To go on: {command_line}", STOPPED_BY + error.signal, debug)
    except KeyboardInterrupt as error:
        line = f"Stopped. Saved files are kept. To go on or start again: {command_line}"
        return _fail(error, line, STOPPED_BY + signal_of(error), debug)
    except SlimmingError as error:
        return _fail(error, f"error: {error}", INPUT_ERROR, debug)
    except BrokenPipeError:
        sys.stderr.close()
        return INTERNAL_ERROR
    except Exception as error:
        _print_traceback(error)
        return _fail(error, INTERNAL_ERROR_MESSAGE, INTERNAL_ERROR, debug=False)


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Show the control characters of texts in warnings and in messages of logging, which go to stderr."""
    shown, handler = warnings.formatwarning, logging.lastResort
    warnings.formatwarning = lambda *args, **kwargs: printable(shown(*args, **kwargs))
    if handler is not None:
        handler.setFormatter(_PlainFormatter())
    try:
        yield
    finally:
        warnings.formatwarning = shown
        if handler is not None:
            handler.setFormatter(None)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _run(words: Sequence[str]) -> int:
    if any("\0" in word for word in words):
        raise ConfigError("The command line contains a null character; remove it.")
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
        with _all_processes():
            command(name).execute(arguments)
    return 0


@contextmanager
def _all_processes() -> Iterator[None]:
    """Let the processes of ``torchrun`` or ``accelerate launch`` end together if one of them fails."""
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if not launched or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    from slimming.training.distributed import agreed, distributed_state

    distributed_state()
    with agreed():
        yield
    # All have finished. Otherwise the threads of the group could abort a process whose peers end before it.
    distributed_state().destroy_process_group()


def command(name: str) -> ModuleType:
    """Return the module of a command, with ``DESCRIPTION``, ``arguments(parser)`` and ``execute(arguments)``."""
    return import_module(f"slimming.cli.{name.replace('-', '_')}_command")


def overview() -> str:
    """Return the text of ``slimming --help``."""
    lines = [f"  {name:<13} {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: slimming COMMAND ...",
            "",
            "Prune pretrained vision models into smaller models that are faster in practice.",
            "",
            "commands:",
            *lines,
            "",
            "slimming COMMAND --help describes a command with examples. To begin, run: slimming demo",
            "Every command takes --debug, which prints the traceback of an error. Version: slimming --version",
            "Exit codes: 0 success, 1 internal error, 2 error in the input, 130 stopped by Ctrl-C.",
        ]
    )


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `ConfigError` and suggests the closest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of argparse as a `ConfigError`."""
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse ``words``, after a check for unknown options, which argparse may take for values."""
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                options = list(self._option_string_actions)
                raise ConfigError(
                    f"{self.prog} has no option {option}; see {self.prog} --help.{nearest(option, options)}"
                )
        return super().parse_args(words)


def make_parser(name: str) -> Parser:
    """Return the parser of a command."""
    module = command(name)
    parser = Parser(
        prog=f"slimming {name}",
        description=module.DESCRIPTION,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    module.arguments(parser)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the description and leave room for long option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)

    def add_usage(self, usage: str | None, actions: object, groups: object, prefix: str | None = None) -> None:
        """Omit the settings and --help from the usage line; they are listed below it."""
        visible = [action for action in actions if action.default is not argparse.SUPPRESS]  # pyright: ignore
        super().add_usage(usage, visible, [], prefix)


def _print_traceback(error: BaseException) -> None:
    print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _fail(error: BaseException, line: str, code: int, debug: bool) -> int:
    if debug:
        _print_traceback(error)
    print(f"slimming: {on_one_line(line)}", file=sys.stderr)
    return code


@contextmanager
def _explain_system_errors() -> Iterator[None]:
    """Turn errors of memory, disk space and permissions into errors with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
            raise ConfigError(f"{error.filename} cannot be used ({error.strerror}). Give another path.") from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        from slimming.core.files import explain

        raise explain(error, Path(error.filename or "the output")) from error
    except (MemoryError, RuntimeError) as error:
        # Compare torch.OutOfMemoryError by name, because importing torch takes seconds.
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(
            "Out of memory. Use a smaller batch (train.batch_size, bench.batch_sizes), a smaller model or "
            "image size, or a machine with more memory."
        ) from error
