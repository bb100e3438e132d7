"""Output directories: what is refused, kept, removed and locked, and starts after a process was killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import timm
import yaml

import slimming as library
from slimming.cli import main
from slimming.errors import OutputError
from slimming.training import loop

from .conftest import ARGUMENTS, TRAIN, Call, settings

COMMANDS = ("run", "search", "train")
slow = pytest.mark.slow
RUN_IS_SLOW = [pytest.param(name, marks=slow if name == "run" else (), id=name) for name in COMMANDS]


def words(site: Path, command: str, output: Path) -> list[str]:
    """The command line of a job with tiny settings."""
    if command != "train":
        return [command, str(site / "config.yaml"), "--output", str(output)]
    arguments = ",".join(f"{key}={value}" for key, value in ARGUMENTS.items())
    training = [word for key, value in TRAIN.items() for word in (f"--train.{key}", str(value))]
    return ["train", "--model.name", "vit_tiny_patch16_224", "--model.arguments", arguments, "--model.checkpoint",
            str(site / "dense.safetensors"), "--data.source", str(site / "images"), *training,
            "--output", str(output)]  # fmt: skip


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything in a directory: path -> content, None for directories."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes() for path in directory.rglob("*")
    }


@pytest.mark.parametrize("command", COMMANDS, ids=str)
@pytest.mark.parametrize("name", ["metrics.json", "log.jsonl", "dense/metrics.json", "a/b/log.jsonl"], ids=str)
def test_a_refused_directory_stays_as_it_is(
    slimming: Call, site: Path, tmp_path: Path, command: str, name: str
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = tree(tmp_path)
    refused = slimming(*words(site, command, tmp_path / "out"))
    assert refused.code == 2
    assert "is not empty" in refused.err
    assert tree(tmp_path) == before


def test_python_refuses_files_of_others_and_leaves_them(site: Path, tmp_path: Path) -> None:
    from slimming.cli.configs import config_from_values
    from slimming.runs.config import RunConfig

    (tmp_path / "results.json").write_text("mine")
    (tmp_path / "log.jsonl").write_text("mine\n")
    before = tree(tmp_path)
    config = config_from_values(RunConfig, settings(site))
    with pytest.raises(OutputError, match="is not empty"):
        library.run(config, tmp_path, log=lambda line: None)
    model = timm.create_model(config.model.name, **ARGUMENTS)
    data = library.open_data(config.data, model)
    with pytest.raises(OutputError, match=r"log\.jsonl is not the log of a training"):
        library.train(model, data, config.retrain, directory=tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS, ids=str)
@pytest.mark.parametrize("with_files", [False, True], ids=["alone", "beside other files"])
def test_a_config_of_the_user_is_not_overwritten(
    slimming: Call, site: Path, tmp_path: Path, command: str, with_files: bool
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    if command == "train":
        assert slimming(*words(site, "train", output), "--print-config").code == 0
        text = slimming(*words(site, "train", output), "--print-config").out
    else:
        text = (site / "config.yaml").read_text()
    (output / "config.yaml").write_text("# my comments\n" + text)
    if with_files:
        (output / "notes.txt").write_text("mine")
    before = tree(output)
    refused = slimming(*words(site, command, output))
    assert refused.code == 2
    assert f"{output / 'config.yaml'} was not written by slimming" in refused.err
    assert tree(output) == before


def test_comments_in_the_config_of_a_run_are_kept(slimming: Call, site: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert slimming(*words(site, "search", output)).code == 0
    path = output / "config.yaml"
    ours = path.read_text()
    path.write_text(ours.replace("search:\n", "search:  # as in the paper\n"))
    edited = path.read_text()
    assert slimming(*words(site, "search", output)).code == 0
    assert path.read_text() == edited
    refused = slimming(*words(site, "search", output), "--search.train.workers", "1")
    assert refused.code == 2
    assert "search.train.workers" in refused.err
    assert path.read_text() == edited
    path.write_text(ours)
    assert slimming(*words(site, "search", output), "--search.train.workers", "1").code == 0
    assert yaml.safe_load(path.read_text())["search"]["train"]["workers"] == 1


def test_a_failed_start_leaves_nothing_of_its_own_and_all_of_others(
    slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a" / "out"
    failed = slimming(*words(site, "search", output), "--search.train.lr", "1e30", "--search.train.clip_grad", "null",
                      "--search.train.steps", "20")  # fmt: skip
    assert failed.code == 2
    assert list(tmp_path.iterdir()) == []

    def drop(*given: Any) -> None:
        (output / "metrics.json").write_text("put there meanwhile")
        raise OutputError("stop")

    monkeypatch.setattr(loop.TrainingRun, "train_step", drop)
    assert slimming(*words(site, "search", output)).code == 2
    assert (output / "metrics.json").read_text() == "put there meanwhile"


def watch_writes(monkeypatch: pytest.MonkeyPatch, output: Path, copies: Path) -> list[Path]:
    """Copy ``output`` before each file is moved into it: what a process leaves that is killed at this moment."""
    replace, found = os.replace, []

    def copying(source: Any, target: Any, **more: Any) -> None:
        if Path(target).resolve().is_relative_to(output.resolve()):
            found.append(copies / str(len(found)))
            shutil.copytree(output, found[-1])
        replace(source, target, **more)

    monkeypatch.setattr(os, "replace", copying)
    return found


@pytest.mark.parametrize("command", RUN_IS_SLOW, ids=str)
def test_killed_in_the_first_writes_the_same_command_goes_on(
    slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        copies = watch_writes(patch, output, tmp_path / "copies")
        assert slimming(*words(site, command, output)).code == 0
    assert len(copies) > 3
    for copy in copies[:2]:
        assert any(path.name.startswith(".") for path in copy.rglob("*"))  # what the kill left
        shown = slimming(*words(site, command, copy))
        assert shown.code == 0, shown.err
        assert not [path for path in copy.rglob("*") if path.name.startswith(".")]
        assert {*tree(copy)} == {*tree(output)}


@pytest.mark.parametrize("command", RUN_IS_SLOW, ids=str)
def test_a_second_start_is_refused_while_the_first_runs(
    slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    output, codes = tmp_path / "out", []
    line = words(site, command, output)
    original = loop.TrainingRun.train_step

    def start_again(self: Any, *given: Any) -> Any:
        if not codes:
            codes.append(None)
            thread = threading.Thread(target=lambda: codes.append(main(line)))
            thread.start()
            thread.join()
        return original(self, *given)

    monkeypatch.setattr(loop.TrainingRun, "train_step", start_again)
    shown = slimming(*line)
    assert codes == [None, 2]
    assert f"{output} is in use by process {os.getpid()} on " in shown.err
    assert shown.code == 0
    assert not list(output.rglob(".*"))


@pytest.mark.parametrize("exists", [True, False], ids=["to a directory", "to nothing"])
def test_an_output_that_is_a_link_is_used_and_stays_a_link(
    slimming: Call, site: Path, tmp_path: Path, exists: bool
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    if exists:
        real.mkdir()
    link.symlink_to(real)
    assert slimming(*words(site, "search", link)).code == 0
    assert link.is_symlink()
    assert (real / "search.json").exists()
    assert "nothing to do" in slimming(*words(site, "search", real)).out
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


HOLDER = """
import sys, time
from pathlib import Path
from slimming.core.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_no_lock(slimming: Call, site: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        refused = slimming(*words(site, "search", output))
        assert refused.code == 2
        assert f"is in use by process {holder.pid} on " in refused.err
        assert "Wait until it ends" in refused.err
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert slimming(*words(site, "search", output)).code == 0
    assert not list(output.rglob(".*"))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which the call number ``at`` of a function of slimming sends this process a signal."""

    @contextmanager
    def patched(place: str, number: int, at: int) -> Iterator[None]:
        original, calls = resolve_name(place), []

        def interrupted(*given: Any, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                signal.raise_signal(number)
            return original(*given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            yield
        assert len(calls) >= at

    return patched


STEP, EVALUATION = "slimming.training.loop.TrainingRun.train_step", "slimming.training.evaluation.validation_batches"
MOMENTS = {
    "last step": ("search", STEP, 2),
    "evaluation": ("search", EVALUATION, 1),
    "last step of a training": ("train", STEP, 2),
    "first step of a run": ("run", STEP, 1),
    "evaluation of the search": ("run", EVALUATION, 2),
    "scoring": ("run", "slimming.searching.trained_scores.calibration_batches", 1),
    "cutting": ("run", "slimming.runs.stages.cut_from_last", 1),
    "last step of a retraining": ("run", STEP, 4),
    "measuring": ("run", "slimming.runs.results.paired_times", 1),
    "planning for the report": ("run", "slimming.runs.explore.plans", 1),
    "report": ("run", "slimming.report.pages.Page.write", 1),
}
LAST_FILES = {"run": "table.md", "search": "search.json", "train": "model"}


@pytest.mark.parametrize(
    ("command", "place", "at"),
    [pytest.param(*case, id=name, marks=slow if case[0] == "run" else ()) for name, case in MOMENTS.items()],
    ids=str,
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_stops_the_command_which_then_goes_on(
    slimming: Call, site: Path, tmp_path: Path, sent: Any, number: int, command: str, place: str, at: int
) -> None:
    output, line = tmp_path / "out", words(site, command, tmp_path / "out")
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
    ours = signal.getsignal(number)
    try:
        with sent(place, number, at):
            stopped = slimming(*line)
        assert stopped.code == 128 + number
        assert "Stopped" in stopped.err
        assert f": slimming {command} " in stopped.err
        assert not (output / LAST_FILES[command]).exists()
        assert signal.getsignal(number) is ours
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    gone_on = slimming(*line)
    assert gone_on.code == 0, gone_on.err
    assert (output / LAST_FILES[command]).exists()
