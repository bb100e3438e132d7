"""Start two processes that form a group, without the seconds that a launcher takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start(words: Sequence[object], logs: Path, processes: int = 2, **environment: str) -> list[subprocess.Popen[bytes]]:
    """Start ``python WORDS`` in every process; the output of process 0 is in ``logs/0.txt``, and so on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), **environment,
    }  # fmt: skip
    started = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (logs / f"{rank}.txt").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, words)],
                    env={**os.environ, **common, **ranks},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def finish(started: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Wait for the processes; return their exit codes, None for those that were still running and were killed."""
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(seconds))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for process in started:
        process.kill()
        process.wait()
    return codes
