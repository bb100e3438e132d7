"""FSDP2 on two processes gives what one process gives; what cannot be sharded is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import slimming
from slimming.errors import ConfigError
from slimming.training.distributed import distributed_state
from slimming.training.samples import Data

from .launch import finish, start

JOB = Path(__file__).with_name("sharding_job.py")
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
}  # fmt: skip


def job(out: Path, processes: int, **environment: str) -> dict[str, Any]:
    out.mkdir()
    codes = finish(start([JOB, out], out, processes, **environment), 240)
    assert codes == [0] * processes, (out / "0.txt").read_text()[-3000:]
    return torch.load(out / "found.pt", weights_only=True)


@pytest.mark.slow
def test_two_processes_with_sharded_weights_give_the_results_of_one(tmp_path: Path) -> None:
    one, sharded = job(tmp_path / "one", 1), job(tmp_path / "sharded", 2, **FSDP)
    assert (tmp_path / "one" / "kept.txt").read_text() == (tmp_path / "sharded" / "kept.txt").read_text()
    assert bool(one.pop("sharded")["none"])
    assert bool(sharded.pop("sharded")["all"])
    for part, tensors in one.items():
        assert tensors.keys() == sharded[part].keys()
        for name, tensor in tensors.items():
            # Sums over images have another order, as with any two processes, and AdamW divides gradients near 0,
            # such as those of the keys' bias, by their size.
            difference = float((sharded[part][name] - tensor).abs().max())
            assert difference <= 5e-3 * float(tensor.abs().max()), f"{part} {name}: {difference}"
    model = slimming.load(tmp_path / "sharded" / "small")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_model_that_is_sharded_already_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    images = [torch.zeros(2, 3, 32, 32)]
    data = [(images[0], torch.zeros(2, dtype=torch.int64))]
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for call in (
        lambda: slimming.describe(model),
        lambda: slimming.attach(model),
        lambda: slimming.score(model, images),
        lambda: slimming.cost(model),
        lambda: slimming.save(model, tmp_path / "model"),
        lambda: slimming.evaluate(model, data),  # type: ignore[arg-type]
        lambda: slimming.train(model, Data(data, data, ("a", "b")), slimming.TrainConfig()),
    ):
        with pytest.raises(ConfigError, match=r"weights are sharded .*before fully_shard.*get_model_state_dict"):
            call()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed is not supported .*--fsdp_version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, r"parallelism_config\) is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"FSDP1 is not supported\. Use FSDP2"),
    ],
    ids=["deepspeed", "megatron", "parallelism", "fsdp1"],
)
def test_other_kinds_of_parallelism_are_refused_by_name(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        distributed_state()
    batches = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    data = Data(batches, batches, ("a", "b"))
    with pytest.raises(ConfigError, match=words):
        slimming.train(model, data, slimming.TrainConfig(steps=1, batch_size=2))


@pytest.mark.slow
def test_settings_that_need_whole_weights_are_refused_by_name(tmp_path: Path) -> None:
    """Through accelerate launch, as a user starts it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm, torch, slimming\n"
        "from slimming.training.samples import Data\n"
        "batches = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]\n"
        "model = timm.create_model('test_vit', img_size=32, num_classes=2)\n"
        "data = Data(batches, batches, ('a', 'b'))\n"
        "slimming.train(model, data, slimming.TrainConfig(steps=1, batch_size=2))\n"
        "try:\n"
        "    slimming.train(model, data, slimming.TrainConfig(steps=1, batch_size=2, ema=0.9))\n"
        "except slimming.errors.ConfigError as error:\n"
        "    sys.stdout.write(f'refused: {error}\\n')\n"  # at once, as both processes share the pipe
    )
    words = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
    done = subprocess.run(
        [sys.executable, *words, str(script)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("refused: ema does not work with sharded weights (FSDP2)") == 2
