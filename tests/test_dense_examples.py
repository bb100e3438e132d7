"""The examples of dense tasks: every script runs from data to a slim model that loads with the same metric."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dense_models

pytest.importorskip("pycocotools")
pytest.importorskip("torchmetrics")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # the Trainer and the ONNX exporter warn of their own matters


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scenes")
    _script("scenes").main(["--output", str(place), "--train", "8", "--val", "4"])
    return place


def _script(name: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


SHORT = ["--scored", "4", "--steps", "2", "--batch", "2"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("DETR", 64, id="DETR", marks=pytest.mark.slow),
        pytest.param("YOLOS", 32, id="YOLOS", marks=pytest.mark.slow),
    ],
)
def test_detectors_in_the_trainer(name: str, size: int, scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    dense_models.MODELS[name](num_labels=4)[0].save_pretrained(tmp_path / "dense")
    words = [str(tmp_path / "dense"), "--data", str(scenes), "--size", str(size), "--output", str(tmp_path / "slim")]
    found = _script("detection_in_trainer").main([*words, *SHORT])
    assert found["macs"] <= 0.7 + 1e-9
    assert found["loaded"] == pytest.approx(found["retrained"], abs=1e-6)
    assert found["onnx"] < 1e-3


def test_a_segmenter_in_the_trainer(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    dense_models.MODELS["SegFormer"](num_labels=5)[0].save_pretrained(tmp_path / "dense")
    words = [str(tmp_path / "dense"), "--data", str(scenes), "--size", "64", "--output", str(tmp_path / "slim")]
    found = _script("segmentation_in_trainer").main([*words, *SHORT])
    assert found["macs"] <= 0.5 + 1e-9
    assert found["loaded"] == pytest.approx(found["retrained"], abs=1e-6)


@pytest.mark.slow
def test_a_detector_of_torchvision(scenes: Path, tmp_path: Path) -> None:
    words = ["ssdlite320_mobilenet_v3_large", "--data", str(scenes), "--output", str(tmp_path / "slim")]
    found = _script("torchvision_detection").main([*words, *SHORT])
    assert found["macs"] <= 0.7 + 1e-9
    assert found["loaded"] == pytest.approx(found["retrained"], abs=1e-6)


def test_scenes_are_the_same_for_the_same_seed(scenes: Path, tmp_path: Path) -> None:
    _script("scenes").main(["--output", str(tmp_path), "--train", "2", "--val", "1"])
    for name in ("images/00000.png", "masks/00001.png"):
        assert (tmp_path / "train" / name).read_bytes() == (scenes / "train" / name).read_bytes()


def test_both_towers_of_clip(scenes: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import tokenizers

    torch.manual_seed(0)
    dense_models.MODELS["CLIP"]()[0].save_pretrained(tmp_path / "dense")
    words = ["<pad>", "<unk>", *["an", "image", "of", "and", "forest", "industry", "residential", "sea", "or", "lake"]]
    level = tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    plain = tokenizers.Tokenizer(level)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 98)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        tmp_path / "dense"
    )
    places = ["--data", str(scenes), "--size", "32", "--words", "12", "--output", str(tmp_path / "slim")]
    found = _script("two_towers").main([str(tmp_path / "dense"), *places, *SHORT])
    assert found["macs"] <= 0.7 + 1e-9
    assert found["loaded"] == pytest.approx(found["retrained"], abs=1e-5)
    assert found["cut"] > 0.5
