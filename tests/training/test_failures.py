"""Work that fails on one of two processes alone ends both, within seconds and with the same sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import slimming

from .launch import finish, start

JOB = Path(__file__).with_name("failures_job.py")
SECONDS = 5
"""Within which the other process ends."""
EXPECTED = {
    "scoring": ("ConfigError", "Out of memory"),
    "rotation": ("MemoryError", "in rotation"),
    "sensitivity": ("KeyError", "in sensitivity"),
    "one_shot": ("RuntimeError", "in a bug"),
    "compensation": ("MemoryError", "in compensation"),
    "evaluation": ("DataError", "The disk of process 1 is gone."),
    "reading": ("DataError", "The disk of process 1 is gone."),
    "saving": ("OutputError", "The disk is full."),
    "logging": ("OutputError", "The log is full."),
    "planning": ("BudgetError", "No such plan."),
    "reporting": ("OutputError", "No space for the report."),
}
"""Error of the process that fails, and a part of the message that both have."""
QUICK = ("scoring", "reading", "saving")


def run(out: Path, *cases: str, seconds: float = 240) -> tuple[list[dict[str, dict[str, Any]]], list[int | None]]:
    """Run cases in two processes; return what each wrote, by case, and the exit codes."""
    codes = finish(start([JOB, out, *cases], out), seconds)
    files = [out / f"{rank}.jsonl" for rank in range(2)]
    lines = [list(map(json.loads, file.read_text().splitlines())) if file.exists() else [] for file in files]
    return [{line["case"]: line for line in of_rank} for of_rank in lines], codes


def both_end_with_the_error_of_one(ended: list[dict[str, dict[str, Any]]], case: str) -> None:
    error, words = EXPECTED[case]
    assert [case in of_rank for of_rank in ended] == [True, True], f"{case}: a process hung"
    failed = 0 if case in ("saving", "logging", "planning", "reporting") else 1
    here, there = ended[failed][case], ended[1 - failed][case]
    assert here["error"] == error
    assert words in here["message"]
    if hasattr(slimming.errors, error):
        assert (there["error"], there["message"]) == (error, here["message"])
    else:
        assert there["error"] == "ProcessError"
        assert f"Process {failed} failed: {error}: " in there["message"]
        assert words in there["message"]
    assert abs(here["seconds"] - there["seconds"]) < SECONDS


def test_both_processes_end_with_the_error_of_one(tmp_path: Path) -> None:
    ended, codes = run(tmp_path, *QUICK)
    for case in QUICK:
        both_end_with_the_error_of_one(ended, case)
    assert codes == [0, 0]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("ended"), *(case for case in EXPECTED if case not in QUICK))[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EXPECTED if case not in QUICK], ids=str)
def test_both_processes_end_with_the_error_of_one_in(ended: list[dict[str, dict[str, Any]]], case: str) -> None:
    both_end_with_the_error_of_one(ended, case)


@pytest.mark.slow
def test_a_forward_pass_that_fails_ends_the_other_process(tmp_path: Path) -> None:
    (zero, one), codes = run(tmp_path, "forward")
    assert one["forward"]["error"] == "RuntimeError"
    assert zero["forward"]["error"] == "ProcessError"
    assert "Process 1 failed: RuntimeError: in the forward pass" in zero["forward"]["message"]
    assert abs(zero["forward"]["seconds"] - one["forward"]["seconds"]) < SECONDS
    assert codes == [3, 3]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_in_a_sentence(tmp_path: Path) -> None:
    (zero, one), codes = run(tmp_path, "killed")
    assert not one
    assert zero["killed"]["error"] == "ProcessError"
    assert "Another process of this run ended" in zero["killed"]["message"]
    assert codes == [3, -9]
