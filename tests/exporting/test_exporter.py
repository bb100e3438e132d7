"""Exported files say what the model says, for any batch, and tell how they are used; what does not is not written."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from PIL import Image

import exported
import slimming
from slimming.core.example_inputs import image_call
from slimming.errors import ConfigError, DataError, MissingExtraError, OutputError, ParityError, UnsupportedModelError
from slimming.exporting import targets
from slimming.exporting.metadata import description
from slimming.exporting.targets import TARGETS, choose
from slimming.models.layers import TokenSelect, UnevenAttention
from slimming.training.images import ImageSpec, make_transform

ROOT = Path(__file__).resolve().parents[2]
ALL = "uneven heads"
"""The kind of model that is exported to every target."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.nn.Module, tuple[slimming.Exported, ...]]]:
    """Every kind of model in files, and every target for one of them."""
    root = tmp_path_factory.mktemp("exported")
    return {
        kind: exported.make(kind, root / kind / "out", list(TARGETS) if kind == ALL else ["onnx"])
        for kind in exported.MAKERS
    }


def test_the_models_are_what_their_names_say(made) -> None:
    def layers(kind: str) -> set[type]:
        return {type(module) for module in made[kind][0].modules()}

    assert TokenSelect in layers("pruned tokens")
    assert UnevenAttention in layers("uneven heads")
    assert torch.nn.Conv2d in layers("slim CNN")


@pytest.mark.parametrize("kind", exported.MAKERS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8], ids=lambda size: f"batch of {size}")
def test_the_onnx_file_says_what_the_model_says_in_any_batch(kind: str, batch: int, made) -> None:
    model, files = made[kind]
    file = next(one.file for one in files if one.target == "onnx")
    session = ort.InferenceSession(file)
    (x,) = exported.images(model, batch)[0].split(batch) if batch < 5 else [torch.cat(exported.images(model, batch))]
    (found,) = session.run(["logits"], {"image": x.numpy()})
    with torch.no_grad():
        wanted = model(x)
    assert found.shape == (batch, 3)
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_files_and_directories_have_the_modes_that_the_umask_says(made) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    place = made[ALL][1][0].file.parent
    for path in (place, *place.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_every_target_is_written_and_measured(made) -> None:
    model, files = made[ALL]
    assert [one.target for one in files] == list(TARGETS)
    for one in files:
        assert one.file.stat().st_size <= one.bytes
        assert one.images == 6
        assert one.latency_ms > 0
        assert one.speedup["median"] > 0
    exact = {one.target: one.relative for one in files if "int8" not in one.target}
    assert all(value <= TARGETS[name].tolerance for name, value in exact.items())
    # Rounding to 8 bits is seen, and is not wild.
    assert all(1e-4 < one.relative < 0.5 for one in files if "int8" in one.target)
    (program,) = (one.file for one in files if one.target == "pt2")
    x = torch.cat(exported.images(model, 3))
    with torch.no_grad():
        assert torch.allclose(torch.export.load(program).module()(x), model(x), atol=1e-4)


def test_8_bits_are_in_the_files(made) -> None:
    names = {one.target: one.file for one in made[ALL][1]}
    kinds = {name: {node.op_type for node in onnx.load(names[name]).graph.node} for name in names if "onnx" in name}
    assert "MatMulInteger" in kinds["onnx-int8-dynamic"]
    assert "QuantizeLinear" in kinds["onnx-int8-static"]
    assert not kinds["onnx"] & {"MatMulInteger", "QuantizeLinear"}


def test_files_describe_themselves(made) -> None:
    files = made[ALL][1]
    beside = json.loads((files[0].file.parent / "model.json").read_text())
    for one in files:
        if one.file.suffix == ".onnx":
            found = onnx.load(one.file, load_external_data=False)
            assert not found.graph.value_info, "shapes that the exporter may have got wrong"
            inside = json.loads({entry.key: entry.value for entry in found.metadata_props}["slimming"])
            assert inside == {key: beside[key] for key in inside}
            assert not any(tensor.external_data for tensor in found.graph.initializer)
            (size,) = (entry.version for entry in found.opset_import if entry.domain == "")
            assert size == beside["made"]["opset"] == 20
    about = {"slimming.json": ""}
    torch.export.load(files[0].file, extra_files=about)
    assert json.loads(about["slimming.json"])["classes"] == list(exported.CLASSES)
    assert beside["classes"] == list(exported.CLASSES)
    assert beside["preprocessing"]["resize"] == [35, 35]
    assert beside["preprocessing"]["mean"] == [0.3, 0.4, 0.5]
    assert [row["target"] for row in beside["files"]] == list(TARGETS)
    xml = next(one.file for one in files if one.target == "openvino").read_text()
    assert "forest" in xml
    # Nothing of the work is left beside the files.
    known = {path.name for one in files for path in TARGETS[one.target].files(one.file.parent, "model")}
    assert {path.name for path in files[0].file.parent.iterdir()} == known | {"model.json"}


def test_a_file_that_says_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported.dense()
    wrong = dataclasses.replace(
        TARGETS["pt2"],
        write=lambda job, file: file.write_bytes(b"x"),
        open=lambda file: lambda call: [np.roll(call.run(model).numpy(), 1, axis=1)],
    )
    monkeypatch.setattr(targets, "TARGETS", {**TARGETS, "pt2": wrong})
    images = exported.images(model)
    with pytest.raises(ParityError, match=r"pt2 file .* logits differ by up to .* Nothing was written"):
        slimming.export(model, tmp_path / "new" / "out", to="pt2", images=images)
    with pytest.raises(ParityError, match=r"on 6 images: the top-1 class is the same for \d+\.\d%"):
        slimming.export(model, tmp_path / "out", to="pt2", images=images, tolerance=1e9, agreement=0.99)
    nan = dataclasses.replace(wrong, open=lambda file: lambda call: [np.full((call.size, 3), np.nan, np.float32)])
    monkeypatch.setattr(targets, "TARGETS", {**TARGETS, "pt2": nan})
    with pytest.raises(ParityError, match="inf of the largest"):
        slimming.export(model, tmp_path / "out", to="pt2", images=images, tolerance=1e9)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_says_the_whole_shape_of_its_output(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=0, global_pool="").eval()
    slimming.export(model, tmp_path / "out", to="pt2", images=[torch.randn(4, 3, 32, 32)])
    with torch.no_grad():
        wanted = model(torch.randn(1, 3, 32, 32)).shape[1:]
    assert json.loads((tmp_path / "out" / "model.json").read_text())["output"]["shape"] == ["batch", *wanted]


def test_mistakes_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported.dense()
    images = exported.images(model)

    def wrong(error: type[Exception], match: str, **more) -> None:
        with pytest.raises(error, match=match):
            slimming.export(model, **{"directory": tmp_path / "out", "images": images, "to": "pt2", **more})

    wrong(ConfigError, "Did you mean 'onnx'", to="onx")
    wrong(ConfigError, "examples/export", to="coreml")
    wrong(ConfigError, "each target once", to=["onnx", "onnx"])
    wrong(ConfigError, "tolerance is -1", tolerance=-1)
    wrong(ConfigError, "agreement is 95", agreement=95)
    wrong(DataError, "Give images", images=None)
    wrong(DataError, r"shape \(B, 3, 32, 32\)", images=[torch.zeros(2, 3, 16, 16)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    wrong(OutputError, "not empty", directory=tmp_path / "full")
    encoder = exported.dense()
    encoder.reset_classifier(0)
    with pytest.raises(ConfigError, match="no classes"):
        slimming.export(encoder, tmp_path / "out", to="onnx-int8-static", images=images)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"slimming\[openvino\]"):
        choose("openvino")
    assert not (tmp_path / "out").exists()


def test_dynamic_quantisation_needs_linear_layers(tmp_path: Path) -> None:
    class Convolutions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean((2, 3))

    job = targets.Job(
        Convolutions().eval(), image_call((3, 8, 8)).to(torch.float32), {}, [], 20, tmp_path, ["logits"], True
    )
    with pytest.raises(UnsupportedModelError, match="onnx-int8-static"):
        TARGETS["onnx-int8-dynamic"].write(job, tmp_path / "x.onnx")


def test_torchao_takes_uneven_heads() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = exported.MAKERS[ALL]()
    small = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(small, Int8DynamicActivationInt8WeightConfig())
        x = torch.cat(exported.images(model))
        with torch.no_grad():
            found, wanted = small(x), model(x)
    assert 1e-5 < float((found - wanted).abs().max() / wanted.abs().max()) < 0.5


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "examples" / "onnx_inference.py"
    spec = importlib.util.spec_from_file_location("onnx_inference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (37, 120), (20, 24)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(input_size=(3, 32, 32), mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4), crop_pct=0.9),
        ImageSpec(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear"),
        ImageSpec(input_size=(3, 16, 40), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875),
        ImageSpec(input_size=(1, 28, 28), mean=(0.4,), std=(0.2,), interpolation="nearest"),
        ImageSpec(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, crop_mode="squash"),
        ImageSpec(input_size=(3, 32, 40), mean=(0.5,) * 3, std=(0.5,) * 3, crop_mode="squash"),
        ImageSpec(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_mode="border"),
        ImageSpec(input_size=(3, 32, 40), mean=(0.3, 0.4, 0.5), std=(0.5,) * 3, crop_pct=0.9, crop_mode="border"),
    ],
    ids=lambda spec: f"{spec.input_size} {spec.interpolation} {spec.crop_mode}",
)
def test_preprocessing_without_torch_is_the_library_s_own(example, spec: ImageSpec, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    how = description(spec, (), {"logits": (1,)}, image_call(spec.input_size))["preprocessing"]
    wanted = make_transform(spec, None)(image.convert(how["mode"])).numpy()
    found = example.preprocess(image, how)
    assert found.shape == spec.input_size
    assert np.abs(found - wanted).max() < 1e-5


def test_the_example_runs_without_torch(made, tmp_path: Path) -> None:
    file = next(one.file for one in made["dense"][1] if one.target == "onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    program = (
        f"import sys, runpy; sys.argv = ['x', {str(file)!r}, 'a.png', 'a.png'];"
        f"runpy.run_path({str(ROOT / 'examples' / 'onnx_inference.py')!r}, run_name='__main__');"
        "assert not {'torch', 'timm', 'slimming'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.splitlines()
    assert one == other
    assert one.startswith("a.png: ")
    assert all(name in one for name in exported.CLASSES)


@pytest.mark.parametrize("script", sorted((ROOT / "examples" / "export").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_for_other_runtimes_explain_themselves(script: Path) -> None:
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout
    assert ("Not run here." in done.stdout) == (script.stem == "to_tensorrt")
