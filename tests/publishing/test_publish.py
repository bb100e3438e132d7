"""Models on the hub and in directories of hosts: everything is tried on local directories, and no network is used."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from huggingface_hub import errors as hub_errors
from PIL import Image
from torch import nn

import slimming
from slimming.checkpoints import hub
from slimming.core.files import seal
from slimming.errors import CheckpointError, ConfigError, OutputError, PlanError, UnsupportedModelError
from slimming.models.families import family_of
from slimming.models.hosts import name_classes
from slimming.runs.setup import open_start
from slimming.training.images import ImageSpec, make_transform
from variants import NOTED

NAMES = ("field", "forest", "river")
RECORD = {
    "data": {"source": "/home/someone/photos"},
    "metrics": {"top1": 0.9},
    "plan": {"budget": {"macs": 0.5}},
    "settings": {"model": {"name": "hf-hub:someone/dense"}},
}


def slim_vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3)
    name_classes(model, NAMES)
    masks = slimming.attach(model, [group for group in slimming.describe(model) if group.kind != "width"][:12])
    with torch.no_grad():
        for mask in masks.values():
            mask.uniform_(0.2, 1.0)
    plan = slimming.plan(masks, slimming.Budget(macs=0.6), score="mask", layout=slimming.Layout(multiple=1))
    return slimming.cut(model, plan).eval()


@pytest.fixture(scope="module")
def slim() -> nn.Module:
    return slim_vit()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pushed(slim: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be pushed, as the command writes it from a checkpoint."""
    from slimming.cli import main

    root = tmp_path_factory.mktemp("pushed")
    slimming.save(slim, root / "small", RECORD)
    words = ["push", str(root / "small"), "me/tiny-half", "--to", str(root / "repository"), "--license", "mit"]
    assert main(words) == 0
    return root / "repository"


@pytest.fixture
def hosted(pushed: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that holds the pushed model; what it was asked for."""
    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        return str(pushed)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_pushed_directory_loads_in_every_host_bit_for_bit(
    pushed: Path, slim: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        wanted = slim(images)
        assert torch.equal(slimming.load(pushed)(images), wanted)
        slimming.register_with_transformers()
        hosted = transformers.AutoModelForImageClassification.from_pretrained(pushed).eval()
        assert torch.equal(hosted(images).logits, wanted)
        assert list(hosted.config.id2label.values()) == list(NAMES)
        hosted.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(again(images).logits, wanted)
        # What transformers wrote has no structure.json; its config.json is enough.
        assert torch.equal(slimming.load(tmp_path / "again")(images), wanted)


@pytest.fixture
def registered() -> None:
    """timm knows the architecture of slim models, as after a user's call."""
    slimming.register_with_timm()


@pytest.mark.usefixtures("registered")
def test_timm_loads_what_was_pushed_and_what_transformers_wrote_of_it(
    pushed: Path, slim: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    by_timm = timm.create_model(f"local-dir:{pushed}", pretrained=True).eval()
    assert torch.equal(by_timm(images), slim(images))
    assert by_timm.pretrained_cfg["label_names"] == list(NAMES)
    slimming.register_with_transformers()
    transformers.AutoModelForImageClassification.from_pretrained(pushed).save_pretrained(tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path}/again", pretrained=True).eval()
    assert torch.equal(again(images), slim(images))
    found, wanted = ([(group.name, group.size) for group in slimming.describe(model)] for model in (by_timm, slim))
    assert found == wanted


def test_no_code_and_no_pickle_in_what_is_pushed(pushed: Path) -> None:
    names = {path.name for path in pushed.iterdir()}
    assert names == {
        *("README.md", "kept.png", "config.json", "structure.json", "provenance.json"),
        *("preprocessor_config.json", "model.safetensors"),
    }
    assert "/home" not in (pushed / "provenance.json").read_text()
    with Image.open(pushed / "kept.png") as picture:
        assert min(picture.size) > 100


def test_the_card_has_front_matter_a_table_and_how_to_load(pushed: Path) -> None:
    card = huggingface_hub.ModelCard.load(pushed / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "someone/dense"
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("photos", 0.9)
    text = card.text
    assert "| this model |" in text
    assert "(kept.png)" in text
    assert "budget: macs 0.5" in text
    for line in ('load("hf-hub:me/tiny-half")', 'create_model("hf-hub:me/tiny-half"', 'model="me/tiny-half"'):
        assert line in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"img_size": 32, "num_classes": 3}, True), ({"depth": 3}, False)],
    ids=["same weights", "other depth"],
)
def test_a_card_names_a_base_model_only_where_its_weights_fit(
    arguments: dict[str, Any], named: bool, tmp_path: Path
) -> None:
    model = timm.create_model("test_vit.r160_in1k", **arguments)
    plan = slimming.plan(slimming.attach(model), slimming.Budget(keep={"mlp": 0.5}))
    slimming.push_to_hub(slimming.cut(model, plan), to=tmp_path / "pushed")
    data = huggingface_hub.ModelCard.load(tmp_path / "pushed" / "README.md").data
    assert data.get("base_model") == ("timm/test_vit.r160_in1k" if named else None)


def test_the_image_processor_does_what_the_evaluation_does(pushed: Path) -> None:
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (6, 9, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    picture = Image.fromarray(pixels)
    found = transformers.AutoImageProcessor.from_pretrained(pushed)(picture, return_tensors="pt").pixel_values[0]
    spec = dataclasses.replace(ImageSpec.of_model(slimming.load(pushed)), input_size=(3, 32, 32))
    wanted = make_transform(spec, None)(picture)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().mean() < 0.02  # of a range of 2; resizing rounds differently
    slimming.register_with_transformers()
    classify = transformers.pipeline("image-classification", model=str(pushed))
    assert {entry["label"] for entry in classify(picture)} == set(NAMES)


@pytest.mark.usefixtures("registered")
def test_timm_adapts_a_slim_model(pushed: Path, images: torch.Tensor) -> None:
    name = f"local-dir:{pushed}"
    other = timm.create_model(name, pretrained=True, num_classes=7, drop_path_rate=0.1)
    assert other(images).shape == (2, 7)
    assert other.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    with pytest.raises(UnsupportedModelError, match="tokens were cut"):
        timm.create_model(name, pretrained=True, features_only=True)
    whole = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3)
    structure = seal(family_of(whole).read(whole).structure.to_dict())
    features = timm.create_model("slimming", structure=structure, features_only=True)
    assert [feature.shape[2:] for feature in features(images)] == [(4, 4)] * 3
    fresh = timm.create_model(name, pretrained=False)
    assert fresh(images).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="like its dense model"):
        timm.create_model(name, img_size=64)
    with pytest.raises(UnsupportedModelError, match="leave out depth"):
        timm.create_model(name, depth=3)
    with pytest.raises(UnsupportedModelError, match="local-dir:DIRECTORY"):
        timm.create_model("slimming")


@pytest.mark.usefixtures("registered")
def test_timm_takes_a_checkpoint_by_structure_and_path(slim: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    slimming.save(slim, tmp_path / "small")
    file = tmp_path / "small" / "weights.safetensors"
    model = timm.create_model("slimming", structure=str(tmp_path / "small"), checkpoint_path=str(file)).eval()
    assert torch.equal(model(images), slim(images))
    slimming.save(model, tmp_path / "again")
    assert torch.equal(slimming.load(tmp_path / "again")(images), slim(images))


def test_registering_twice_is_registering_once() -> None:
    slimming.register_with_timm()
    slimming.register_with_timm()
    assert timm.is_model("slimming")


def test_transformers_gives_a_model_without_weights_and_with_other_classes(pushed: Path, images: torch.Tensor) -> None:
    slimming.register_with_transformers()
    auto = transformers.AutoModelForImageClassification
    config = transformers.AutoConfig.from_pretrained(pushed)
    assert auto.from_config(config)(images).logits.isfinite().all()
    other = auto.from_pretrained(pushed, num_labels=5, ignore_mismatched_sizes=True)
    found = other(pixel_values=images, labels=torch.tensor([0, 4]))
    assert found.logits.shape == (2, 5)
    assert found.loss.isfinite()


@NOTED
def test_tables_that_no_file_holds_survive_transformers(tmp_path: Path) -> None:
    """Swin keeps indices of positions and masks of windows beside its weights."""
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **small)
    groups = [group for group in slimming.describe(model) if group.kind == "mlp"]
    plan = slimming.plan(slimming.attach(model, groups), slimming.Budget(keep={"mlp": 0.5}))
    slim = slimming.cut(model, plan).eval()
    place = slimming.push_to_hub(slim, to=tmp_path / "swin")
    image = torch.randn(1, 3, 32, 32)
    slimming.register_with_transformers()
    hosted = transformers.AutoModelForImageClassification.from_pretrained(place).eval()
    assert torch.equal(hosted(image).logits, slim(image))
    assert torch.equal(timm.create_model(f"local-dir:{place}", pretrained=True).eval()(image), slim(image))


def test_a_model_of_transformers_goes_the_same_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    dense = transformers.ViTForImageClassification(config).eval()
    image = torch.randn(1, 3, 32, 32)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(slimming.load(tmp_path / "dense")(image).logits, dense(image).logits)
    masks = slimming.attach(dense)
    slim = slimming.cut(dense, slimming.plan(masks, slimming.Budget(keep={"mlp": 0.5, "head_dim": 0.5})))
    slimming.as_transformers(slim).save_pretrained(tmp_path / "slim")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "slim")
    with torch.no_grad():
        assert torch.equal(again(image).logits, slim.eval()(image).logits)
        assert torch.equal(slimming.load(tmp_path / "slim")(image).logits, slim(image).logits)


def test_a_directory_of_timm_loads_and_is_a_dense_start(tmp_path: Path, images: torch.Tensor) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3).eval()
    save_for_hf(model, tmp_path / "dense", model_args={"img_size": 32, "patch_size": 8}, safe_serialization=True)
    loaded = slimming.load(tmp_path / "dense")
    assert torch.equal(loaded(images), model(images))
    opened, notes = slimming.open_model(slimming.ModelConfig(name=str(tmp_path / "dense")), classes=4)
    assert opened(images).shape == (2, 4)
    assert len(notes) == 1
    slimming.save(loaded, tmp_path / "saved")
    assert torch.equal(slimming.load(tmp_path / "saved")(images), model(images))
    overlay = {"pretrained_cfg_overlay": {"crop_pct": 0.5}}
    opened, _ = slimming.open_model(slimming.ModelConfig(name=str(tmp_path / "dense"), arguments=overlay))
    assert opened.pretrained_cfg["crop_pct"] == 0.5
    # A pickle beside weights of another name is left alone.
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "dense" / "weights.safetensors")
    (tmp_path / "dense" / "pytorch_model.bin").write_bytes(b"nonsense")
    assert torch.equal(slimming.load(tmp_path / "dense")(images), model(images))
    with pytest.raises(CheckpointError, match="dense has no effect"):
        slimming.load(tmp_path / "dense", dense=model)


def test_images_are_normalised_as_in_training_wherever_the_model_goes(tmp_path: Path) -> None:
    """``data.mean`` and ``data.std`` travel with models of every host, and a later training's take their place."""
    small = {"image_size": 32, "patch_size": 16, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**small, intermediate_size=48, num_labels=2)
    squeezed: Any = torchvision.models.squeezenet1_1(num_classes=2).eval()
    squeezed.image_size = 32
    hosts = {
        "a ViT of timm": timm.create_model("test_vit", img_size=32, num_classes=2),
        "a CNN of timm": timm.create_model("test_resnet", num_classes=2),
        "transformers": transformers.ViTForImageClassification(config),
        "torchvision": squeezed,
    }
    for label, pixel in (("dark", 40), ("light", 200)):
        for part in ("train", "val"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            Image.new("RGB", (32, 32), (pixel,) * 3).save(tmp_path / "images" / part / label / "0.png")
    for host, model in hosts.items():
        place = tmp_path / host
        slimming.save(model.eval(), place / "0")
        for turn, mean in enumerate(((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))):
            data = slimming.DataConfig(source=str(tmp_path / "images"), mean=mean, std=(0.9,) * 3)
            started, _, _ = open_start(slimming.ModelConfig(name=str(place / str(turn))), data, seed=0)
            budget = slimming.Budget(macs=0.9)
            masks = slimming.attach(started)
            slimming.save(slimming.cut(started, slimming.plan(masks, budget, score="mask")), place / str(turn + 1))
            spec = ImageSpec.of_model(slimming.load(place / str(turn + 1)))
            assert (spec.mean, spec.std) == (mean, (0.9,) * 3), host
        pushed = Path(slimming.push_to_hub(place / "2", "me/it", to=place / "pushed"))
        assert json.loads((pushed / "preprocessor_config.json").read_text())["image_mean"] == [0.4, 0.5, 0.6]


def test_an_address_loads_wherever_a_directory_does(
    hosted: list[dict[str, Any]], slim: nn.Module, images: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    from slimming.cli import main

    assert torch.equal(slimming.load("hf-hub:me/tiny-half@v1")(images), slim(images))
    assert hosted[0]["repository"] == "me/tiny-half"
    assert hosted[0]["revision"] == "v1"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in hosted[0]["allow_patterns"])
    opened, _ = slimming.open_model(slimming.ModelConfig(name="hf-hub:me/tiny-half"))
    assert torch.equal(opened.eval()(images), slim(images))
    del hosted[:]
    assert main(["inspect", "hf-hub:me/tiny-half", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input"] == [3, 32, 32]
    assert "model.safetensors" not in hosted[0]["allow_patterns"]


def test_a_model_of_the_hub_is_exported(
    hosted: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimming.cli import main
    from slimming.demo import HERE

    monkeypatch.chdir(tmp_path)
    images = str(HERE / "assets" / "eurosat" / "val.parquet")
    assert main(["export", "hf-hub:me/tiny-half@v1", "--to", "pt2", "--data", images]) == 0
    assert {one["revision"] for one in hosted} == {"v1"}
    assert {file.name for file in (tmp_path / "tiny-half-export").iterdir()} == {"model.pt2", "model.json"}
    assert main(["export", "hf-hub:tiny", "--to", "pt2"]) == 2


@pytest.mark.parametrize(
    "name", ["hf-hub:tiny", "hf-hub:a/b/c", "hf-hub:me/../x", "hf-hub:me/tiny@", "hf-hub:"], ids=str
)
def test_a_bad_name_is_refused_before_anything_is_asked(name: str, hosted: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        slimming.load(name)
    assert hosted == []


http = importlib.import_module(hub_errors.Response.__module__.partition(".")[0])
"""The library that huggingface_hub sends with, which is not the same in all of its versions."""


def response(status: int) -> Any:
    return http.Response(status, request=http.Request("GET", "https://hub.invalid"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_errors.RepositoryNotFoundError("404", response=response(404)), "no repository me/tiny"),
        (hub_errors.GatedRepoError("403", response=response(403)), "gated"),
        (hub_errors.RevisionNotFoundError("404", response=response(404)), "no revision 'v9'"),
        (hub_errors.LocalEntryNotFoundError("offline"), "check the network"),
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (http.ConnectError("no route"), "no route"),
    ],
    ids=["no repository", "gated", "no revision", "not cached", "offline", "no route"],
)
def test_what_the_hub_says_is_told(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*words: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=said):
        slimming.load("hf-hub:me/tiny@v9")


def test_offline_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from slimming.cli import main

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["inspect", "hf-hub:nobody/there-is-no-such-model"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert "could not be fetched" in said


def test_a_repository_without_a_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *words, **options: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        slimming.load("hf-hub:me/tiny")
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        slimming.load("hf-hub:me/tiny")


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"architecture": "vit_of_nobody"}, UnsupportedModelError, "no model 'vit_of_nobody'"),
        ({"hello": 1}, CheckpointError, "names neither"),
        ([], CheckpointError, "expected `object`, got `array`"),
        (
            {"model_type": "slimming"},
            CheckpointError,
            "not the structure in a config.json|no format number|no checksum",
        ),
        (
            {"model_type": "vit", "auto_map": {"AutoModelForImageClassification": "evil.Model"}},
            CheckpointError,
            "passes 'auto_map'",
        ),
    ],
    ids=["unknown model", "no model", "no object", "no format", "foreign code"],
)
def test_a_bad_directory_is_named(config: Any, error: type[Exception], said: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(error, match=said):
        slimming.load(tmp_path)
    assert not (tmp_path / "run").exists()


def test_changed_weights_are_met(pushed: Path, tmp_path: Path) -> None:
    for file in pushed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="checksum differs"):
        slimming.load(tmp_path)


class FakeApi:
    """Notes what would be sent."""

    sent: list[dict[str, Any]]
    error: Exception | None = None

    def __init__(self, **options: Any) -> None:
        type(self).sent = []

    def create_repo(self, repository: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append({"repository": repository, **options})

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        self.sent.append({"repository": repo_id, "files": sorted(path.name for path in Path(folder_path).iterdir())})
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repo_id}/commit/1")


def test_a_push_sends_the_directory(slim: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    address = slimming.push_to_hub(slim, "me/tiny", private=True)
    assert address == "https://hub.invalid/me/tiny/commit/1"
    made, sent = FakeApi.sent
    assert made == {"repository": "me/tiny", "private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors"} <= set(sent["files"])


def test_a_push_that_is_refused_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    for error, said in (
        (hub_errors.HfHubHTTPError("401", response=response(401)), "hf auth login"),
        (hub_errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (http.ConnectError("no route"), "--to DIRECTORY"),
    ):
        monkeypatch.setattr(FakeApi, "error", error)
        with pytest.raises(OutputError, match=said):
            hub.upload(tmp_path, "me/tiny", private=False, message="a push")


def test_bad_pushes_write_nothing(slim: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        slimming.push_to_hub(slim, "tiny", to=tmp_path / "a")
    with pytest.raises(ConfigError, match="directory to write to"):
        slimming.push_to_hub(slim)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        slimming.push_to_hub(slim, to=tmp_path / "full")
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    own.image_size = 8
    with pytest.raises(CheckpointError, match="cannot be created by name"):
        slimming.push_to_hub(own, to=tmp_path / "own")
    masked = timm.create_model("test_vit", img_size=32, patch_size=8)
    slimming.attach(masked)
    with pytest.raises(PlanError, match="masks attached"):
        slimming.push_to_hub(masked, to=tmp_path / "masked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_addresses() -> None:
    assert hub.is_address("hf-hub:me/tiny")
    assert not hub.is_address("me/tiny")
    assert not hub.is_address(Path("hf-hub:me"))


def test_importing_slimming_changes_nothing_of_others() -> None:
    code = (
        "import sys; finders = list(sys.meta_path); import slimming; assert sys.meta_path == finders;"
        "assert 'timm' not in sys.modules; import timm; assert not timm.is_model('slimming');"
        "slimming.register_with_timm(); assert timm.is_model('slimming')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_records_that_cannot_be_pushed_are_refused_first(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    for name in ("hf-hub:owner/name", "owner/name@main"):
        with pytest.raises(ConfigError, match="give OWNER/NAME, without hf-hub: and @REVISION"):
            slimming.push_to_hub(model, name, to=tmp_path / "new")
    with pytest.raises(ConfigError, match=r"provenance\.sha256 is reserved"):
        slimming.push_to_hub(model, "owner/name", to=tmp_path / "new", provenance={"sha256": "1"})
    assert not (tmp_path / "new").exists()


def test_a_card_compares_bytes_of_one_type(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    slimming.push_to_hub(model.bfloat16(), "owner/name", to=tmp_path / "new")
    text = (tmp_path / "new" / "README.md").read_text()
    assert "iB" in text
    assert "(50%)" not in text
