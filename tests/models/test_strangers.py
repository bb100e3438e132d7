"""Files of strangers: nothing that they name is opened, run or fetched, and no tensor is missing without a word."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import slimming
from slimming.core.files import seal
from slimming.errors import CheckpointError, SlimmingError
from slimming.models.create import create_dense

transformers = pytest.importorskip("transformers")

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
HF = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 16, "patch_size": 8},
}


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file of JSON, and seal it again if it was sealed."""
    value = json.loads(file.read_text())
    sealed = value.pop("sha256", None) is not None
    change(value)
    file.write_text(json.dumps(seal(value) if sealed else value))


class _Trap:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.mark, "w"))


def _plant(directory: Path) -> None:
    """Pickles that create the file ``ran``, under names that are downloaded and under others."""
    trap = pickle.dumps(_Trap(str(directory / "ran")))
    for name in ("evil.pth", "model-00001-of-00002.safetensors", "evil.bin", "model.npz"):
        (directory / name).write_bytes(trap)


GUARDED = """
import json, sys, warnings
warnings.simplefilter("ignore")
import slimming, timm, torch, torchvision, transformers, slimming.checkpoints.checkpoint, slimming.errors
import slimming.models.timm_vit, slimming.models.traced
seen = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        seen.append(f"{event} {arguments[1:]}")
        raise RuntimeError("the network is forbidden")
    if event == "open" and str(arguments[0]).endswith(("evil.pth", "00002.safetensors", "evil.bin", ".npz")):
        seen.append(f"open {arguments[0]}")
sys.addaudithook(hook)
real = torch.load
def load(*arguments, **options):
    seen.append(f"torch.load {arguments}")
    return real(*arguments, **options)
torch.load = load
results = {}
for directory in sys.argv[1:]:
    seen.clear()
    try:
        slimming.load(directory)
        said = "loaded"
    except slimming.errors.SlimmingError as error:
        said = f"{type(error).__name__}: {error}"
    except Exception as error:
        said = f"raw {type(error).__name__}: {error}"
    results[directory] = said, list(seen)
print(json.dumps(results))
"""
"""Loads directories while it watches which files are opened and refuses the network; prints what came of each."""


def _load_guarded(*directories: Path) -> dict[str, tuple[str, list[str]]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *map(str, directories)],
        capture_output=True,
        text=True,
        check=True,
        cwd=directories[0],
        env=environment,
    )
    return {Path(place).name: tuple(found) for place, found in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all hosts: a ViT and a CNN of timm, models of transformers and torchvision."""
    root = tmp_path_factory.mktemp("saved")
    slimming.save(timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=3), root / "vit")
    slimming.save(timm.create_model("test_resnet", num_classes=3), root / "cnn")
    slimming.save(transformers.ViTForImageClassification(transformers.ViTConfig(**HF)), root / "hf")
    slimming.save(torchvision.models.squeezenet1_1(num_classes=3), root / "tv")
    return root


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copied")
    return tmp_path / "copied"


ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("vit", {"checkpoint_path": "evil.pth"}),
    ("vit", {"pretrained_cfg": {"file": "evil.pth"}, "pretrained": True}),
    ("vit", {"pretrained_cfg_overlay": {"file": "evil.pth"}}),
    ("vit", {"cache_dir": "/tmp"}),
    ("vit", {"pretrained_strict": False}),
    ("vit", {"norm_layer": "https://example.org/evil"}),
    ("vit", {"norm_layer": "../evil.pth"}),
    ("vit", {"drop_rate": 7.0}),
    ("vit", {"embed_dim": 10**9}),
    ("vit", {"block_fn": {"file": "evil.pth"}}),
    ("cnn", {"checkpoint_path": "evil.pth"}),
    ("cnn", {"pretrained": True}),
    ("cnn", {"pretrained_cfg_overlay": {"hf_hub_id": "someone/evil"}}),
    ("cnn", {"features_only": "evil.pth"}),
    ("tv", {"weights": "DEFAULT"}),
    ("tv", {"weights_backbone": "DEFAULT"}),
    ("tv", {"progress": "evil.pth"}),
    ("tv", {"num_classes": "evil.pth"}),
    ("tv", {"dropout": 2}),
    ("hf", {"trust_remote_code": True}),
    ("hf", {"config": "evil.bin"}),
]


@pytest.mark.parametrize(
    ("which", "arguments"),
    ARGUMENTS,
    ids=[f"{which} {next(iter(given))} {at}" for at, (which, given) in enumerate(ARGUMENTS)],
)
def test_arguments_from_a_structure_pass_a_list(which: str, arguments: dict[str, Any], copied: Path) -> None:
    _edit(copied / which / "structure.json", lambda value: value["base"].setdefault("arguments", {}).update(arguments))
    with pytest.raises(CheckpointError, match=r"passes|must be|add_pooling_layer"):
        slimming.load(copied / which)


FIELDS: list[dict[str, Any]] = [
    {"backbone": "someone/evil"},
    {"use_pretrained_backbone": True},
    {"auto_map": {"AutoModel": "evil.Model"}},
    {"trust_remote_code": True},
    {"quantization_config": {"quant_method": "evil"}},
    {"_attn_implementation": "someone/kernel"},
    {"hidden_act": "../evil.bin"},
    {"hidden_size": 10**9},
    {"id2label": ["evil"]},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/evil"}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=[next(iter(fields)) for fields in FIELDS])
def test_a_configuration_of_transformers_passes_a_list(fields: dict[str, Any], copied: Path, tmp_path: Path) -> None:
    _edit(copied / "hf" / "structure.json", lambda value: value["base"]["config"].update(fields))
    host = tmp_path / "host"
    transformers.ViTForImageClassification(transformers.ViTConfig(**HF)).save_pretrained(host)
    _edit(host / "config.json", lambda value: value.update(fields))
    if "backbone_config" in fields:  # no field of this class, so it is not passed on
        slimming.load(copied / "hf")
        return
    for directory in (copied / "hf", host):
        with pytest.raises(CheckpointError, match=r"passes|does not map"):
            slimming.load(directory)


def test_image_settings_from_a_structure_name_no_file(copied: Path) -> None:
    place = {"file": "evil.pth", "custom_load": True, "hf_hub_id": "someone/evil"}
    for which, key in (("vit", "config"), ("cnn", "config"), ("tv", "images"), ("hf", "images")):
        _edit(copied / which / "structure.json", lambda value, key=key: value["base"][key].update(place))
        config = slimming.load(copied / which).pretrained_cfg
        assert not any(config.get(name) in place.values() for name in ("file", "hf_hub_id"))


def test_a_structure_does_not_name_the_architecture_that_takes_a_path(copied: Path, saved: Path) -> None:
    slimming.register_with_timm()
    structure = json.loads((saved / "vit" / "structure.json").read_text())
    _edit(
        copied / "cnn" / "structure.json",
        lambda value: value["base"].update(name="slimming", arguments={"structure": str(saved / "vit")}),
    )
    assert structure
    with pytest.raises(CheckpointError, match="no architecture 'slimming'"):
        slimming.load(copied / "cnn")


def _timm_directory(path: Path) -> Path:
    model = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=3)
    timm.models.save_for_hf(model, path, safe_serialization=True, model_args=VIT)
    return path


SOURCES = {"file": "evil.pth", "url": "https://example.org/evil.pth", "hf_hub_id": "someone/evil", "custom_load": True}


@pytest.fixture(scope="module")
def guarded(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """What came of loading hostile directories, by name."""
    root = tmp_path_factory.mktemp("guarded")

    def hostile(which: str, called: str, **base: Any) -> None:
        shutil.copytree(saved / which, root / called)
        _edit(root / called / "structure.json", lambda value: value["base"].update(base))

    hostile("vit", "pickle", arguments={"checkpoint_path": "evil.pth"})
    hostile("cnn", "allowed name", arguments={"checkpoint_path": "model-00001-of-00002.safetensors"})
    hostile("cnn", "overlay", arguments={"pretrained_cfg_overlay": SOURCES, "pretrained": True})
    hostile("tv", "weights_backbone", name="lraspp_mobilenet_v3_large", arguments={"weights_backbone": "DEFAULT"})
    backbone = {"model_type": "timm_backbone", "backbone": "hf-hub:someone/evil"}
    hostile("hf", "backbone", name="TimmBackbone", config_class="TimmBackboneConfig", config=backbone)
    hostile("vit", "architecture", architecture="hf-hub:someone/evil")
    for name in ("sources of timm", "argument of timm"):
        _timm_directory(root / name)
    _edit(root / "sources of timm" / "config.json", lambda value: value["pretrained_cfg"].update(SOURCES))
    _edit(
        root / "argument of timm" / "config.json", lambda value: value["model_args"].update(checkpoint_path="evil.pth")
    )
    for directory in root.iterdir():
        _plant(directory)
    found = _load_guarded(*root.iterdir())
    return {name: (said, seen + ["ran"] * (root / name / "ran").exists()) for name, (said, seen) in found.items()}


@pytest.mark.parametrize(
    "name",
    ["pickle", "allowed name", "overlay", "argument of timm", "weights_backbone", "backbone", "architecture"],
    ids=str,
)
def test_what_a_directory_names_is_neither_run_nor_opened_nor_asked(
    name: str, guarded: dict[str, tuple[str, list[str]]]
) -> None:
    said, seen = guarded[name]
    assert said.startswith("CheckpointError: ")
    assert seen == []


def test_places_of_weights_in_a_config_of_timm_are_not_passed_on(guarded: dict[str, tuple[str, list[str]]]) -> None:
    assert guarded["sources of timm"] == ("loaded", [])


def _hf_model(name: str) -> nn.Module:
    if name == "timm backbone":
        backbone = transformers.TimmBackboneConfig(backbone="test_resnet", out_indices=[-1])
        return transformers.TimmBackbone(backbone)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF))


NETWORK: dict[str, Callable[[], nn.Module]] = {
    "vit of timm": lambda: timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=3),
    "tagged cnn of timm": lambda: timm.create_model("test_resnet.r160_in1k", num_classes=3),
    "vit of transformers": lambda: _hf_model("vit"),
    "timm backbone of transformers": lambda: _hf_model("timm backbone"),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=3),
    "segmentation": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ),
}


@pytest.mark.slow
def test_loading_a_directory_never_asks_the_network(tmp_path: Path) -> None:
    for name, make in NETWORK.items():
        model = make().eval()
        if "vit" not in name:
            model.image_size = 64
        slimming.save(model, tmp_path / name)
    assert _load_guarded(*tmp_path.iterdir()) == {name: ("loaded", []) for name in NETWORK}


def _sharded(directory: Path) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=3))
    model.save_pretrained(directory, max_shard_size="8KB")
    assert (directory / "model.safetensors.index.json").exists()


def test_a_sharded_directory_is_read(tmp_path: Path) -> None:
    _sharded(tmp_path / "host")
    wanted = transformers.ViTForImageClassification.from_pretrained(tmp_path / "host").state_dict()
    found = slimming.load(tmp_path / "host").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "{root}/outside.safetensors", "outside.bin", "link", "x/y.safetensors"], ids=str
)
def test_an_index_names_files_of_its_directory_only(place: str, tmp_path: Path) -> None:
    _sharded(tmp_path / "host")
    index = tmp_path / "host" / "model.safetensors.index.json"
    first = sorted(set(json.loads(index.read_text())["weight_map"].values()))[0]
    shutil.move(tmp_path / "host" / first, tmp_path / "outside.safetensors")
    shutil.copy(tmp_path / "outside.safetensors", tmp_path / "host" / "outside.bin")
    name = place.format(root=tmp_path)
    if place == "link":
        name = "linked.safetensors"
        (tmp_path / "host" / name).symlink_to(tmp_path / "outside.safetensors")
    if place == "x/y.safetensors":
        (tmp_path / "host" / "x").mkdir()
        shutil.copy(tmp_path / "outside.safetensors", tmp_path / "host" / name)

    def change(value: dict[str, Any]) -> None:
        value["weight_map"] = {key: name if file == first else file for key, file in value["weight_map"].items()}

    _edit(index, change)
    for road in (lambda: slimming.load(tmp_path / "host"), lambda: create_dense(f"transformers:{tmp_path}/host")):
        with pytest.raises(CheckpointError, match=r"only safetensors files in the same directory|leads out of"):
            road()


def test_files_in_the_cache_of_the_hub_are_links_to_its_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    _sharded(tmp_path / "host")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (tmp_path / "host").iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *words, **options: str(snapshot))
    assert slimming.load("hf-hub:a/b").config.num_labels == 3
    assert create_dense("transformers:a/b")[0].config.num_labels == 3
    shard = next(snapshot.glob("*.safetensors"))
    target = shutil.copy(shard, tmp_path / "outside.safetensors")
    shard.unlink()
    shard.symlink_to(target)
    with pytest.raises(CheckpointError, match="leads out of"):
        slimming.load("hf-hub:a/b")


HOSTS: dict[str, Callable[[Path], Any]] = {
    "vit of timm": lambda path: timm.models.save_for_hf(
        timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=3), path, safe_serialization=True, model_args=VIT
    ),
    "cnn of timm": lambda path: timm.models.save_for_hf(
        timm.create_model("test_resnet", num_classes=3), path, safe_serialization=True
    ),
    "distilled of timm": lambda path: timm.models.save_for_hf(
        timm.create_model("deit_tiny_distilled_patch16_224", **VIT), path, safe_serialization=True, model_args=VIT
    ),
    "vit": lambda path: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)).save_pretrained(path),
    "deit": lambda path: transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(**HF)
    ).save_pretrained(path),
    "beit": lambda path: transformers.BeitForImageClassification(
        transformers.BeitConfig(**HF, use_relative_position_bias=True)
    ).save_pretrained(path),
    "dinov2": lambda path: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**HF)
    ).save_pretrained(path),
    "siglip": lambda path: transformers.SiglipForImageClassification(
        transformers.SiglipConfig(text_config={**HF, "vocab_size": 99}, vision_config=HF)
    ).save_pretrained(path),
    "resnet": lambda path: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ).save_pretrained(path),
    "swin": lambda path: transformers.SwinForImageClassification(
        transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    ).save_pretrained(path),
    "mobilenet": lambda path: transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(depth_multiplier=0.25, min_depth=4)
    ).save_pretrained(path),
    "convnext": lambda path: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
    ).save_pretrained(path),
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_good_directories_load_and_every_tensor_must_be_there(host: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    HOSTS[host](tmp_path / "host")
    file = tmp_path / "host" / "model.safetensors"
    whole = load_file(file)
    found = slimming.load(tmp_path / "host").state_dict()
    assert sum(any(torch.equal(tensor, other) for other in found.values()) for tensor in whole.values()) == len(whole)
    body = [name for name in whole if whole[name].dim() > 1]
    first, last = body[0], body[-1]
    damaged = {
        "missing": {name: tensor for name, tensor in whole.items() if name != first},
        "missing head": {name: tensor for name, tensor in whole.items() if name != last},
        "unexpected": whole | {f"{first}.more": torch.zeros(2)},
        "renamed": {name + "_" if name == first else name: tensor for name, tensor in whole.items()},
        "mismatched": whole | {first: torch.zeros(3, 3)},
    }
    for state in damaged.values():
        save_file(state, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"of another model|not those of"):
            slimming.load(tmp_path / "host")


@pytest.mark.parametrize("host", ["vit of timm", "vit"], ids=str)
def test_only_the_classifier_may_lack_and_only_for_other_classes(host: str, tmp_path: Path) -> None:
    HOSTS[host](tmp_path / "host")
    file = tmp_path / "host" / "model.safetensors"
    name = f"transformers:{tmp_path}/host" if host == "vit" else str(tmp_path / "host")
    from slimming.runs.config import ModelConfig
    from slimming.runs.setup import open_model

    model, notes = open_model(ModelConfig(name=name), classes=7)
    assert slimming.describe(model)
    assert len(notes) == 1
    whole = load_file(file)
    body = next(key for key in whole if "mlp.fc1.weight" in key or "intermediate.dense.weight" in key)
    save_file({key: tensor for key, tensor in whole.items() if key != body}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is missing|Missing key"):
        open_model(ModelConfig(name=name), classes=7)


def test_weights_without_a_classifier_start_a_training_for_given_classes(tmp_path: Path) -> None:
    backbone = transformers.ViTModel(transformers.ViTConfig(**HF))
    backbone.save_pretrained(tmp_path / "host")
    name = f"transformers:{tmp_path}/host"
    model, notes = create_dense(name, classes=5)
    assert "has no classifier; it gets an untrained one" in notes[0]
    assert model.classifier.weight.shape == (5, 16)
    assert torch.equal(model.vit.embeddings.cls_token, backbone.embeddings.cls_token)
    with pytest.raises(CheckpointError, match="Give the number of classes"):
        create_dense(name)


def test_pretrained_weights_of_timm_lack_nothing_but_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(int(pretrained))
        model = made(name, **{"num_classes": 1000, **options})
        if pretrained and options.get("num_classes") is None:
            raise RuntimeError("Missing key(s) in state_dict: 'blocks.0.mlp.fc1.weight'")
        return model

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(CheckpointError, match="Missing key"):
        create_dense("vit_tiny_patch16_224", classes=7, arguments=VIT)


def test_a_head_of_another_size_is_taken_whole_or_replaced_where_it_was_asked(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=3).state_dict()
    save_file(state, tmp_path / "three.safetensors")
    model, notes = create_dense("vit_tiny_patch16_224", checkpoint=tmp_path / "three.safetensors", arguments=VIT)
    assert notes == []
    assert torch.equal(model.get_parameter("head.weight"), state["head.weight"])
    half = {name: tensor for name, tensor in state.items() if name != "head.bias"}
    save_file(half, tmp_path / "half.safetensors")
    for classes in (None, 3, 5):
        with pytest.raises(CheckpointError, match=r"'head\.(bias|weight)' (is missing|has another shape)"):
            create_dense(
                "vit_tiny_patch16_224", checkpoint=tmp_path / "half.safetensors", classes=classes, arguments=VIT
            )
    wide = state | {"head.weight": torch.zeros(3, 8)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="another shape"):
        create_dense("vit_tiny_patch16_224", checkpoint=tmp_path / "wide.safetensors", classes=5, arguments=VIT)


def test_the_oldest_timm_reads_no_pickles() -> None:
    """Earlier versions run a pickle that an argument or a configuration names."""
    from importlib.metadata import requires

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"timm>=1.0.26"' in text
    assert requires("slimming")


def test_errors_are_of_slimming() -> None:
    assert issubclass(CheckpointError, SlimmingError)


@pytest.mark.parametrize("file", ["structure.json", "provenance.json"], ids=str)
def test_a_checkpoint_without_its_checksum_is_refused(file: str, copied: Path) -> None:
    from slimming.checkpoints.checkpoint import read_provenance

    path = copied / "cnn" / file
    value = json.loads(path.read_text())
    del value["sha256"]
    path.write_text(json.dumps(value))
    read: Callable[[Path], Any] = slimming.load if file == "structure.json" else read_provenance
    with pytest.raises(CheckpointError, match="checksum") as caught:
        read(copied / "cnn")
    assert "remove" not in str(caught.value)


def test_a_structure_in_a_config_needs_its_checksum(copied: Path, tmp_path: Path) -> None:
    slimming.push_to_hub(slimming.load(copied / "vit"), to=tmp_path / "pushed")
    (tmp_path / "pushed" / "structure.json").unlink()
    assert slimming.load(tmp_path / "pushed")
    _edit(tmp_path / "pushed" / "config.json", lambda value: value["model_args"]["structure"].pop("sha256"))
    with pytest.raises(CheckpointError, match="checksum"):
        slimming.load(tmp_path / "pushed")
    _edit(
        tmp_path / "pushed" / "config.json",
        lambda value: value["model_args"]["structure"].update(sha256="0" * 64),
    )
    with pytest.raises(CheckpointError, match="checksum differs"):
        slimming.load(tmp_path / "pushed")
