"""Ctrl-C, SIGTERM and the lock of a directory, in one process, in a thread, and in two processes."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slimming.core.files import exclusive
from slimming.core.interrupts import SIGNALS, InterruptRequest, defer_interrupt, interruptible
from slimming.errors import Interrupted

from .launch import finish, start
from .tiny import make_model, open_tiny, tiny_config, train, write_data

TINY = Path(__file__).with_name("tiny.py")
Handlers = dict[signal.Signals, object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def handlers() -> Iterator[Callable[[], Handlers]]:
    """The handlers of the signals; those of the test raise nothing."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield lambda: {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_recorded_and_the_handlers_come_back(
    handlers: Callable[[], Handlers], number: signal.Signals
) -> None:
    before = handlers()
    with defer_interrupt() as request:
        signal.raise_signal(number)
        signal.raise_signal(number)  # as launchers repeat it
        assert (request.requested, request.signal) == (True, number)
        with pytest.raises(KeyboardInterrupt), request.at_once():
            raise AssertionError("an earlier signal stops the block")
    assert handlers() == before
    with pytest.raises(Interrupted, match=r"^Stopped\. Go on\.$") as stopped, interruptible("Go on."):
        signal.raise_signal(number)
    assert stopped.value.signal == number
    assert handlers() == before


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    request, clock = InterruptRequest(), iter((10.0, 10.5, 11.5))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    request(signal.SIGINT, None)
    request(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        request(signal.SIGTERM, None)
    assert request.signal == signal.SIGINT


def test_a_thread_trains_without_handlers(folder: Path, handlers: Callable[[], Handlers]) -> None:
    before, steps = handlers(), []
    work = threading.Thread(
        target=lambda: steps.append(train(open_tiny(folder), tiny_config(steps=1), None, make_model()).steps)
    )
    work.start()
    work.join()
    assert steps == [1]
    assert handlers() == before


@pytest.mark.slow
def test_two_processes_are_refused_together_where_another_one_writes(folder: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "out"):
        began = time.monotonic()
        codes = finish(start([TINY, folder, tmp_path / "out", "epochs=2.0"], tmp_path), 120)
    assert all(code not in (0, None) for code in codes)
    assert time.monotonic() - began < 100
    for rank in range(2):
        assert "is in use by process" in (tmp_path / f"{rank}.txt").read_text()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "out" / "log.jsonl"
    processes = start([TINY, folder, tmp_path / "out", "epochs=200.0", "log_every=1"], tmp_path)
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) > 2:
            break
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes = finish(processes, 120)
    assert all(code not in (0, None) for code in codes)
    said = {
        re.findall(r"Stopped after step \d+ of 1200", (tmp_path / f"{rank}.txt").read_text())[-1] for rank in (0, 1)
    }
    assert len(said) == 1
    assert (tmp_path / "out" / "state.pt").exists()
