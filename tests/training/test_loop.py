"""The loop: learning, resuming after a kill, Ctrl-C, NaN, two processes, precision, averaging."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimming.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    MissingExtraError,
    NonFiniteLossError,
    OutputError,
)
from slimming.training import resume
from slimming.training.evaluation import evaluate
from slimming.training.loop import fit
from slimming.training.optimisation import parameter_groups
from slimming.training.tasks import ClassificationTask, PenaltyTask

from .tiny import make_model, open_tiny, run, tiny_config, train, write_data

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def losses(lines: Any) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def start(folder: Path, out: Path, *settings: str, processes: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(TINY),
        str(folder),
        str(out),
        *settings,
    ]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    return output


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the run did not get going")


def test_learns(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    history = train(open_tiny(folder), tiny_config(epochs=8.0, ema=None), tmp_path, model)
    assert history.metrics["top1"] >= 0.9
    assert history.metrics["images"] == 18
    assert history.steps == 48
    assert not model.training
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == list(history.log)
    assert {"step", "epoch", "lr", "loss", "images_per_second"} <= lines[0].keys()
    assert sum("val_top1" in line for line in lines) == 8


def test_leaves_the_global_generators_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(open_tiny(folder), tiny_config(steps=2), None, make_model(seed=5))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    data = open_tiny(folder)
    model, state = make_model(), torch.get_rng_state()
    train(data, tiny_config(steps=2), None, model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("changes", [{"workers": 2}, {"log_every": 3, "eval_every": 0.5}], ids=["workers", "watching"])
def test_how_a_run_is_watched_does_not_change_it(folder: Path, changes: dict[str, Any]) -> None:
    plain, other = make_model(proj_drop_rate=0.1), make_model(proj_drop_rate=0.1)
    data = open_tiny(folder, augment="deit")
    train(data, tiny_config(epochs=1.0), None, plain)
    train(data, tiny_config(epochs=1.0, **changes), None, other)
    assert same(plain.state_dict(), other.state_dict())


def test_killed_and_resumed_is_bit_equal(folder: Path, tmp_path: Path) -> None:
    settings = ("epochs=8.0", "checkpoint_seconds=0.0", "drop=0.1", "mixup=0.2", "augment='deit'", "accumulate=2")
    run(folder, tmp_path / "whole", *settings)
    for lines in (3, 20):
        process = start(folder, tmp_path / "killed", *settings)
        wait_for_lines(tmp_path / "killed" / "log.jsonl", lines, process)
        process.send_signal(signal.SIGKILL)
        finish(process)
    assert not (tmp_path / "killed" / "final.pt").exists()
    run(folder, tmp_path / "killed", *settings)
    whole, killed = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "killed"))
    assert same(whole["model"], killed["model"])
    assert same(whole["averaged"], killed["averaged"])
    logs = [read_log(tmp_path / name) for name in ("whole", "killed")]
    assert losses(logs[0]) == losses(logs[1])


def test_two_processes_see_what_one_sees(folder: Path, tmp_path: Path) -> None:
    settings = ("epochs=2.0", "accumulate=2", "augment='deit'")
    both = start(folder, tmp_path / "two", *settings, processes=2)
    output = finish(both)
    assert both.returncode == 0, output
    assert losses(read_log(tmp_path / "two" / "again")) == losses(read_log(tmp_path / "two"))
    run(folder, tmp_path / "one", *settings)
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert len(losses(logs[0])) == 12
    torch.testing.assert_close(losses(logs[1]), losses(logs[0]), rtol=1e-4, atol=1e-5)
    checks = [[line for line in log if "val_top1" in line] for log in logs]
    assert checks[1][-1]["val_images"] == checks[0][-1]["val_images"] == 18
    assert checks[1][-1]["val_loss"] == pytest.approx(checks[0][-1]["val_loss"], rel=1e-4)


def test_accumulated_parts_equal_the_whole_batch(folder: Path) -> None:
    plain, parts = make_model(), make_model()
    data = open_tiny(folder)
    one = train(data, tiny_config(epochs=1.0), None, plain)
    two = train(data, tiny_config(epochs=1.0, accumulate=4), None, parts)
    torch.testing.assert_close(losses(two.log), losses(one.log), rtol=1e-4, atol=1e-5)


def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    whole = make_model()
    data, config = open_tiny(folder), tiny_config(checkpoint_seconds=1e6)
    train(data, config, tmp_path / "whole", whole)

    class Pressed:
        steps = 0

        def __call__(self) -> dict[str, Tensor]:
            self.steps += 1
            if self.steps == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return {}

    # A shell that starts the tests in the background has them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = make_model()
    task = PenaltyTask(ClassificationTask(0.1), Pressed())
    with pytest.raises(Interrupted, match=r"after step 5 of 12.*resume to go on"):
        fit(model, task, data, config, directory=tmp_path / "cut", title=None)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    again = make_model(seed=9)
    quiet = PenaltyTask(ClassificationTask(0.1), lambda: {})
    fit(again, quiet, data, config, directory=tmp_path / "cut", resume=True, title=None)
    assert same(again.state_dict(), whole.state_dict())


def test_a_loss_that_is_not_finite_stops_and_names_the_images(folder: Path, tmp_path: Path) -> None:
    data, model = open_tiny(folder), make_model()
    calls = []

    def penalty() -> dict[str, Tensor]:
        calls.append(1)
        return {"extra": torch.tensor(float("nan") if len(calls) == 4 else 0.0)}

    config = tiny_config(checkpoint_seconds=0.0)
    with pytest.raises(NonFiniteLossError, match=r"extra nan.*at step 4,.*lower lr.*train.parquet row \d+"):
        fit(model, PenaltyTask(ClassificationTask(), penalty), data, config, directory=tmp_path, title=None)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("clip_grad", [None, 1.0], ids=["free", "clipped"])
@pytest.mark.parametrize("precision", ["no", "bf16"], ids=str)
def test_a_gradient_that_is_not_finite_stops_before_anything_changes(
    folder: Path, tmp_path: Path, clip_grad: float | None, precision: str
) -> None:
    data, model = open_tiny(folder), make_model()
    weight, calls, looks = model.get_parameter("head.weight"), [], []

    def penalty() -> dict[str, Tensor]:
        calls.append(1)
        return {"extra": (weight * 0).square().sum().sqrt() if len(calls) == 3 else weight.sum() * 0}

    config = tiny_config(checkpoint_seconds=0.0, clip_grad=clip_grad, precision=precision, ema=None)
    task = PenaltyTask(ClassificationTask(), penalty, lambda: looks.append(1))
    with pytest.raises(NonFiniteLossError, match=r"^gradient nan at step 3,.*train.parquet row \d+"):
        fit(model, task, data, config, directory=tmp_path, title=None)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["step"] == len(looks) == 2
    assert same(saved["model"], model.state_dict())


def test_tied_parameters_are_trained_averaged_and_saved_once(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    shared = nn.Parameter(torch.ones(16))
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_parameter("shared", shared)
    groups = parameter_groups(model, 0.05, lambda name: False, lambda name: 1.0)
    assert sum(p is shared for group in groups for p in group["params"]) == 1
    task = PenaltyTask(ClassificationTask(), lambda: {"pull": shared.square().sum()})
    history = fit(model, task, open_tiny(folder), tiny_config(steps=1, ema=0.5), directory=tmp_path, title=None)
    assert history.averaged is not None
    averaged = dict(history.averaged.named_parameters(remove_duplicate=False))
    assert averaged["blocks.0.shared"] is averaged["blocks.1.shared"]
    torch.testing.assert_close(averaged["blocks.0.shared"].detach(), (1 + shared.detach()) / 2)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    assert torch.equal(saved["blocks.0.shared"], saved["blocks.1.shared"])


def test_parameter_groups() -> None:
    model = make_model()
    groups = parameter_groups(
        model,
        0.05,
        lambda name: name == "patch_embed.proj.weight",
        lambda name: 10.0 if "cls" in name else 1.0,
    )
    found = {id(p): (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert by_name["patch_embed.proj.weight"] == (0.0, 1.0)
    assert by_name["blocks.0.mlp.fc1.weight"] == (0.05, 1.0)
    assert by_name["blocks.0.mlp.fc1.bias"] == (0.0, 1.0)
    assert by_name["cls_token"] == (0.05, 10.0)


def test_collected_tensors_come_back(folder: Path, tmp_path: Path) -> None:
    def task_with(total: Tensor, model: nn.Module) -> PenaltyTask:
        def collect() -> None:
            gradient = model.get_parameter("head.weight").grad
            assert gradient is not None
            total.add_(gradient.abs().sum())

        return PenaltyTask(ClassificationTask(0.1), lambda: {}, collect, {"total": total})

    data, config = open_tiny(folder), tiny_config(epochs=1.0)
    whole, model = torch.zeros(()), make_model()
    fit(model, task_with(whole, model), data, config, directory=tmp_path, title=None)
    assert whole > 0
    again, model = torch.zeros(()), make_model()
    fit(model, task_with(again, model), data, config, directory=tmp_path, resume=True, title=None)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"compile": True}, {"schedule": "constant"}], ids=str)
def test_other_ways_to_run(folder: Path, changes: dict[str, Any]) -> None:
    if "compile" in changes:
        pytest.importorskip("torch._inductor")
        torch._dynamo.reset()
    model = make_model()
    history = train(open_tiny(folder, augment="none"), tiny_config(steps=3, **changes), None, model)
    plain = train(open_tiny(folder, augment="none"), tiny_config(steps=3), None, make_model())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(losses(history.log), losses(plain.log), rtol=0.05, atol=0.05)


def test_schedule(folder: Path) -> None:
    data = open_tiny(folder)
    history = train(data, tiny_config(epochs=4.0, warmup_epochs=1.0, lr=1e-3), None, make_model())
    rates = [line["lr"] for line in history.log if "lr" in line]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[6] == max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 3e-5
    assert rates[6:] == sorted(rates[6:], reverse=True)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    data = open_tiny(folder)
    train(data, tiny_config(steps=2), tmp_path, make_model())
    with pytest.raises(OutputError, match="holds a run already"):
        train(data, tiny_config(steps=2), tmp_path, make_model())
    with pytest.raises(ConfigError, match=r"started with other settings:\n  lr: 0\.003 \(now 0\.1\)"):
        train(data, tiny_config(steps=2, lr=0.1), tmp_path, make_model(), resume=True)
    with pytest.raises(CheckpointError, match="another model"):
        train(data, tiny_config(steps=2), tmp_path, make_model(embed_dim=32), resume=True)
    with pytest.raises(ConfigError, match=r"multiple of 3"):
        train(data, tiny_config(accumulate=3), None, make_model())
    with pytest.raises(ConfigError, match=r"more than the 48 training images"):
        train(data, tiny_config(batch_size=64), None, make_model())
    with pytest.raises(ConfigError, match=r"Did you mean 'adamw'"):
        train(data, tiny_config(optimizer="adamww"), None, make_model())
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        train(data, tiny_config(), None, make_model().requires_grad_(False))
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        train(data, tiny_config(trackers=("tensorbord",)), tmp_path / "t", make_model())
    with pytest.raises(MissingExtraError, match="pip install"):
        train(data, tiny_config(trackers=("aim",)), tmp_path / "t", make_model())
    whole = (tmp_path / "state.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no state", whole[: whole.rindex(b"\nsha256 ")], b""):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged"):
            train(data, tiny_config(steps=2), tmp_path, make_model(), resume=True)


def test_no_flipped_bit_of_a_state_is_resumed(folder: Path, tmp_path: Path) -> None:
    data, config, model = open_tiny(folder), tiny_config(steps=1, eval_every=0.0), make_model()
    train(data, config, tmp_path, model)
    whole, random = (tmp_path / "state.pt").read_bytes(), np.random.default_rng(0)
    for place in random.integers(len(whole), size=40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged.*remove it"):
            train(data, config, tmp_path, model, resume=True)


def test_a_full_disk_is_what_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        yield Path("/dev/full")

    monkeypatch.setattr(resume, "atomic_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(open_tiny(folder), tiny_config(steps=1), tmp_path, make_model())


def test_out_of_memory_is_advice(folder: Path) -> None:
    def penalty() -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="set accumulate to 2"):
        fit(
            make_model(),
            PenaltyTask(ClassificationTask(), penalty),
            open_tiny(folder),
            tiny_config(),
            title=None,
        )


def test_out_of_memory_in_evaluation_is_advice(folder: Path) -> None:
    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="in evaluation with 7 images per forward pass: make batch_size smaller"):
        evaluate(Full(), open_tiny(folder).val, batch_size=7)


def test_tensorboard(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(open_tiny(folder), tiny_config(steps=2, trackers=("tensorboard",)), tmp_path, make_model())
    assert list(tmp_path.rglob("events.out.tfevents.*"))
