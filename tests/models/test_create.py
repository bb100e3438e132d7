"""Dense starts: weights of files and of the hub, what is replaced, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from slimming.errors import CheckpointError, UnsupportedModelError
from slimming.models.create import STATE_KEYS, create_dense, create_untrained, read_state

ARGUMENTS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS, num_classes=3).state_dict()


@pytest.mark.parametrize("wrapper", [None, *STATE_KEYS], ids=str)
def test_weights_are_found_where_training_scripts_keep_them(
    wrapper: str | None, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({wrapper: parallel, "epoch": 3} if wrapper else parallel, tmp_path / "weights.pth")
    found = read_state(tmp_path / "weights.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("content", "says"),
    [([1, 2], "holds a list, not a state dict"), ({"a": torch.ones(1), "b": "x"}, "holds 'b', a str")],
    ids=["list", "text among tensors"],
)
def test_what_is_no_state_dict_is_named(content: object, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=says):
        read_state(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"], ids=str)
def test_a_damaged_file_is_named(name: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"weights\.\w+ is truncated or damaged"):
        read_state(path)


def test_a_classifier_of_another_size_is_replaced(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    same, notes = create_dense("vit_tiny_patch16_224", checkpoint=tmp_path / "weights.safetensors", classes=3,
                               arguments=ARGUMENTS)  # fmt: skip
    assert notes == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    other, notes = create_dense("vit_tiny_patch16_224", checkpoint=tmp_path / "weights.safetensors", classes=5,
                                arguments=ARGUMENTS)  # fmt: skip
    assert len(notes) == 1
    assert "3" in notes[0]
    assert "5" in notes[0]
    assert other.get_parameter("head.weight").shape == (5, 16)
    assert torch.equal(other.get_parameter("norm.weight"), state["norm.weight"])


def pretrained(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let timm answer for its hub."""

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer(**options)

    monkeypatch.setattr(timm, "create_model", create)


def test_pretrained_weights_of_another_number_of_classes_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model
    sizes = {**ARGUMENTS, "pretrained_cfg_overlay": {"num_classes": 1000}}
    pretrained(monkeypatch, lambda **options: make("vit_tiny_patch16_224", **sizes, **options))
    model, notes = create_dense("vit_tiny_patch16_224", classes=7)
    assert notes == ["vit_tiny_patch16_224 has 1000 classes; its classifier was replaced by an untrained one for 7."]
    assert model.get_parameter("head.weight").shape == (7, 16)
    assert create_dense("vit_tiny_patch16_224", classes=1000)[1] == []


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (TypeError("depht"), UnsupportedModelError, "timm cannot make vit_tiny_patch16_224 with .*: depht"),
        (OSError("no route"), CheckpointError, r"could not be loaded \(no route\)\. Check the network"),
    ],
    ids=["misspelt", "offline"],
)
def test_what_timm_refuses_is_said(
    error: Exception, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained(monkeypatch, error)
    with pytest.raises(kind, match=says):
        create_dense("vit_tiny_patch16_224")


def test_names_and_arguments_are_checked() -> None:
    with pytest.raises(UnsupportedModelError, match="Did you mean"):
        create_untrained("vit_tiny_patch16_225")
    with pytest.raises(UnsupportedModelError, match="img_siz"):
        create_untrained("vit_tiny_patch16_224", {"img_siz": 16})
    assert next(create_untrained("vit_tiny_patch16_224", ARGUMENTS, device="meta").parameters()).is_meta
