"""Commands of the package in forked processes, and what happens to them when they change a file.

Forking spares the seconds that importing PyTorch takes, so that thousands of attacks are affordable.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
"""Audit events of Python that change files, besides opening one for writing."""
SPACE = {"os.mkdir"}
"""Audit events that need space on the disk, besides opening a file for writing."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: exit code; negative for the number of a signal.
        output: last part of what it wrote to its standard output and error.
        seconds: wall time.
    """

    code: int
    output: str
    seconds: float


@dataclass(frozen=True)
class Process:
    """A process that was started and not waited for yet."""

    pid: int
    output: int
    began: float

    def wait(self, limit: float = 120.0) -> Outcome:
        """Return the outcome; a process that does not end within ``limit`` seconds is killed and has code -SIGALRM."""
        code, text = None, b""
        while code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - self.began > limit:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                code = -signal.SIGALRM
            else:
                time.sleep(0.005)
            with suppress(BlockingIOError):
                while part := os.read(self.output, 1 << 16):
                    text += part
        os.close(self.output)
        return Outcome(code, text.decode("utf-8", errors="replace")[-3000:], time.monotonic() - self.began)


def start(words: Sequence[str], *, hook: Callable[[str, tuple[Any, ...]], None] | None = None) -> Process:
    """Start ``slimming WORDS`` in a forked process; ``hook`` is an audit hook of that process."""
    # A pipe, as the process may not be allowed to write files.
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _run(words, hook, writing)
    os.close(writing)
    return Process(pid, reading, began)


def run(words: Sequence[str], *, hook: Callable[[str, tuple[Any, ...]], None] | None = None) -> Outcome:
    """Run ``slimming WORDS`` in a forked process to its end; see `start`."""
    return start(words, hook=hook).wait()


def _run(words: Sequence[str], hook: Callable[[str, tuple[Any, ...]], None] | None, output: int) -> None:
    """The life of a forked process; it never returns."""
    code = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)
        from slimming.cli.entry import main

        if hook is not None:
            sys.addaudithook(hook)
        code = main(list(words))
    finally:
        with suppress(ValueError, OSError):
            sys.stdout.flush()
        os._exit(code)


class AtChange:
    """An audit hook that acts before the process changes a file below ``directory`` for the ``number``-th time.

    Opening a file for writing counts as a change, and so does each audit event in ``events``. Changes are counted from
    1, so that 1 acts before anything was written; with 0 it never acts. Every change adds a byte to the open file
    ``counter``.
    """

    def __init__(
        self,
        directory: Path,
        number: int,
        act: Callable[[], None],
        counter: int | None = None,
        events: Collection[str] = CHANGES,
    ) -> None:
        self.directory, self.number, self.act, self.counter, self.count = str(directory), number, act, counter, 0
        self.events = events

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count the event if it changes a file, and act at the chosen one."""
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not (writes or event in self.events) or not os.fspath(str(arguments[0])).startswith(self.directory):
            return
        self.count += 1
        if self.counter is not None:
            os.write(self.counter, b".")
        if self.count == self.number:
            self.act()
