"""Files of weights that a user gives: every flipped byte and cut is seen, and nothing is executed."""

from __future__ import annotations

import hashlib
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from slimming.errors import CheckpointError
from slimming.models.create import read_state


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"weight": torch.randn(16, 8), "bias": torch.randn(16), "steps": torch.tensor(3)}


def _same(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"], ids=str)
def test_a_mutated_file_of_pytorch_is_refused_or_holds_the_same(
    suffix: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path)
    whole, dice, refused = path.read_bytes(), random.Random(0), 0
    assert _same(read_state(path), state)
    cases = [whole[:length] for length in dice.sample(range(len(whole)), 20)]
    for place in dice.sample(range(len(whole)), 150):
        cases.append(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :])
    for data in cases:
        path.write_bytes(data)
        try:
            found = read_state(path)
        except CheckpointError:
            refused += 1
        else:
            assert _same(found, state)
    assert refused > 40


def test_a_flipped_weight_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    whole = path.read_bytes()
    place = whole.index(state["weight"].numpy().tobytes()) + 5
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
    with pytest.raises(CheckpointError, match=r"the checksum of its entry '.*' differs"):
        read_state(path)


def test_repeated_entries_are_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith("/data/0"))
        data = archive.read(name)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(name, bytes(len(data)))
    with pytest.raises(CheckpointError, match="repeated or compressed"):
        read_state(path)


def test_files_without_checksums_need_that_of_their_name(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"without checksums, .* safetensors"):
        read_state(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    named = tmp_path / f"weights-{digest}.pth"
    shutil.copy(path, named)
    assert _same(read_state(named), state)
    named.write_bytes(named.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged one"):
        read_state(named)
