"""Labels and classes: integers only, numbering of classes without names, and models of other classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import slimming
from slimming.errors import DataError
from slimming.training.config import DataConfig
from slimming.training.data import open_data
from slimming.training.evaluation import evaluate
from slimming.training.samples import Data, ImageDataset, StreamDataset

from .tiny import (
    CLASSES,
    SPEC,
    encoded,
    make_model,
    open_tiny,
    picture,
    tar_entries,
    tiny_config,
    train,
    write_data,
    write_folders,
    write_parquet,
    write_tar,
)

NOT_LABELS = {
    "fraction": "1.7", "whole": "1.0", "true": "true", "plus": "+1", "underscore": "1_0", "word": "dark", "empty": "",
    "two": "1 2", "infinite": "1e400", "long": "9" * 5000, "arabic": "\u0661", "large": str(2**63),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["cls", "json"], ids=str)
@pytest.mark.parametrize("text", NOT_LABELS.values(), ids=NOT_LABELS)
def test_a_label_of_a_shard_that_is_no_integer_is_refused_by_name(text: str, kind: str, tmp_path: Path) -> None:
    entries = tar_entries(12)
    del entries["00003.cls"]
    content = text if kind == "cls" else f'{{"label": {text}}}'
    write_tar(tmp_path / "train.tar", {**entries, f"00003.{kind}": content.encode()})
    write_tar(tmp_path / "val.tar", tar_entries(6, first=50))
    with pytest.raises(DataError, match=rf"The label of .*train\.tar:00003\.{kind} is .*; write the number"):
        open_tiny(tmp_path)


@pytest.mark.parametrize("value", [None, "1", [1], {"id": 1}, True], ids=repr)
def test_a_label_of_another_type_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    entries = tar_entries(12)
    entries["00002.json"] = json.dumps({"label": value}).encode()
    write_tar(tmp_path / "train.tar", entries)
    write_tar(tmp_path / "val.tar", tar_entries(6, first=50))
    with pytest.raises(DataError, match=r"The label of .*train\.tar:00002\.json is "):
        open_tiny(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b"3", b"{", b"{}"], ids=["deep", "list", "3", "{", "{}"])
def test_metadata_without_a_label_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", {**tar_entries(12), "00002.json": content})
    write_tar(tmp_path / "val.tar", tar_entries(6, first=50))
    with pytest.raises(DataError, match=r"The label of .*train\.tar:00002\.json is missing"):
        open_tiny(tmp_path)


@pytest.mark.parametrize("text", ["1", " 1\n", "1\r\n", "001"], ids=repr)
def test_integers_in_a_shard(text: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", {**tar_entries(12), "00003.cls": text.encode()})
    write_tar(tmp_path / "val.tar", tar_entries(6, first=50))
    data = open_tiny(tmp_path)
    assert isinstance(data.train, ImageDataset)
    assert data.train.labels[3] == 1


@pytest.mark.parametrize(
    "labels",
    [pa.array([0.0, 1.0] * 3), pa.array([True, False] * 3), pa.array([0, 2**63 + 5] * 3, pa.uint64())],
    ids=["floats", "booleans", "huge"],
)
def test_columns_of_labels_that_are_no_integers_are_refused(labels: pa.Array, tmp_path: Path) -> None:
    images = [{"bytes": encoded(picture(i, 0))} for i in range(6)]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "all.parquet")
    with pytest.raises(DataError, match=r"Column 'label' of .*all\.parquet holds .*; set label_key"):
        open_tiny(tmp_path, split_fraction=0.5)


def parquet(root: Path, train_labels: list[int], val_labels: list[int]) -> Path:
    write_parquet(root / "train.parquet", train_labels, names=None)
    write_parquet(root / "test.parquet", val_labels, names=None)
    return root


def shards(root: Path, train_labels: list[int], val_labels: list[int]) -> Path:
    for part, labels in (("train", train_labels), ("val", val_labels)):
        entries: dict[str, bytes] = {}
        for i, label in enumerate(labels):
            entries |= {f"{i}.png": encoded(picture(i, label % 3)), f"{i}.cls": str(label).encode()}
        write_tar(root / f"{part}.tar", entries)
    return root


WRITERS = pytest.mark.parametrize("write", [parquet, shards], ids=["parquet", "shards"])


@WRITERS
@pytest.mark.parametrize(
    ("train_labels", "val_labels", "classes"),
    [
        ([1, 2, 3] * 2, [1, 3], ("1", "2", "3")),
        ([0, 5, 90] * 2, [90], ("0", "5", "90")),
        ([0, 5_000_000] * 2, [0], ("0", str(5_000_000))),
        ([1, 2] * 2, [3], ("1", "2", "3")),
    ],
    ids=["from one", "gaps", "huge", "only in validation"],
)
def test_labels_without_names_are_the_classes(
    write: Any,
    train_labels: list[int],
    val_labels: list[int],
    classes: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = open_tiny(write(tmp_path, train_labels, val_labels))
    assert data.classes == classes
    assert isinstance(data.train, ImageDataset)
    assert [int(classes[label]) for label in data.train.labels] == train_labels
    assert [data.train[i].label for i in range(len(data.train))] == data.train.labels.tolist()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} names no classes, and its labels do not count from 0: the labels {', '.join(classes)} become the "
        f"classes 0 to {len(classes) - 1}"
    ]
    history = train(data, tiny_config(steps=1, batch_size=2), None, make_model(num_classes=len(classes)))
    assert history.metrics["images"] == len(val_labels)


@WRITERS
def test_labels_from_zero_need_no_note(write: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert open_tiny(write(tmp_path, [2, 0, 1], [1])).classes == ("0", "1", "2")
    assert not caplog.records


@WRITERS
def test_named_classes_count_from_zero(write: Any, tmp_path: Path) -> None:
    (write(tmp_path, [1, 2, 3] * 2, [1, 3]) / "classes.txt").write_text("\n".join(CLASSES))
    with pytest.raises(DataError, match=r"has label 3, but there are 3 classes \(0 to 2\).* so subtract 1 from each"):
        open_tiny(tmp_path)
    assert open_tiny(write(tmp_path, [0, 1], [1])).classes == CLASSES


def test_labels_of_hub_data_follow_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    image = {"bytes": encoded(picture(0, 0)), "path": None}

    def open_labels(labels: list[Any]) -> Data:
        split = datasets.Dataset.from_list([{"image": image, "label": label} for label in labels])
        splits = {"train": split, "test": split}
        monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: splits)
        return open_data(DataConfig(source="hf:tiny"), SPEC)

    assert open_labels([1, 2, 3]).classes == ("1", "2", "3")
    for labels in ([1.0, 2.0], [True, False], [0, None]):
        with pytest.raises(DataError, match="not integers without missing values"):
            open_labels(labels)


class FakeStream:
    """A streamed split whose rows do not hold what its features say."""

    def __init__(self, labels: list[Any]) -> None:
        self.rows = [{"image": {"bytes": encoded(picture(0, 0))}, "label": label} for label in labels]
        self.features = {"image": None, "label": SimpleNamespace(names=["a", "b"])}
        self.info, self.split = SimpleNamespace(splits=None), "train"

    def cast_column(self, *_: object) -> FakeStream:
        return self

    def shuffle(self, **_: object) -> FakeStream:
        return self

    def set_epoch(self, _: int) -> None:
        pass

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.mark.parametrize("label", [1.7, True, None, "1"], ids=repr)
def test_a_label_of_a_stream_that_is_no_integer_is_refused_by_name(label: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": FakeStream([0, label]), "test": FakeStream([0, 1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: splits)
    data = open_data(DataConfig(source="hf:tiny", stream=True), SPEC)
    assert isinstance(data.train, StreamDataset)
    with pytest.raises(DataError, match=r"The label of hf:tiny epoch 0 row 1 is .*; write the number"):
        list(data.train.epochs(0))


def test_labels_of_a_loader_are_integers() -> None:
    batch = (torch.zeros(6, 3, 16, 16), torch.arange(6) % 2 == 0)
    with pytest.raises(DataError, match=r"labels of torch\.bool; give class numbers"):
        train(Data([batch], [], CLASSES), tiny_config(steps=1), None, make_model())


@pytest.mark.parametrize("classes", [2, 5], ids=["fewer", "more"])
@pytest.mark.parametrize("distilled", [False, True], ids=["labels", "teacher"])
def test_training_a_model_of_other_classes_is_refused(classes: int, distilled: bool, tmp_path: Path) -> None:
    data = open_tiny(write_data(tmp_path))
    model = make_model(num_classes=classes)
    teacher = make_model(1, num_classes=classes) if distilled else None
    message = rf"The model knows {classes} classes, the data has 3 \(dark, bright, green\).*reset_classifier\(3\)"
    with pytest.raises(DataError, match=message):
        slimming.train(model, data, tiny_config(steps=2), teacher)


@pytest.mark.parametrize("classes", [2, 5], ids=["fewer", "more"])
def test_searching_a_model_of_other_classes_is_refused(classes: int, tmp_path: Path) -> None:
    data = open_tiny(write_data(tmp_path))
    with pytest.raises(DataError, match=rf"The model knows {classes} classes, the data has 3"):
        slimming.search(
            make_model(num_classes=classes), data, slimming.SearchConfig(train=tiny_config(steps=2, ema=None))
        )


@pytest.mark.parametrize("classes", [2, 5], ids=["fewer", "more"])
def test_evaluating_on_other_classes_is_refused(classes: int, tmp_path: Path) -> None:
    data = open_tiny(write_data(tmp_path))
    message = rf"The model knows {classes} classes, the data has 3 \(dark, bright, green\)"
    with pytest.raises(DataError, match=message):
        evaluate(make_model(num_classes=classes), data.val)


def test_evaluating_on_classes_of_other_names_is_refused(tmp_path: Path) -> None:
    data = open_tiny(write_folders(tmp_path, classes=("ant", "bee", "cat")), split_fraction=0.5)
    model: Any = make_model()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": CLASSES}
    message = r"trained for other classes \(dark, bright, green\) than those of the data \(ant, bee, cat\)"
    with pytest.raises(DataError, match=message):
        evaluate(model, data.val)
    slimming.train(model, data, tiny_config(steps=1), evaluate=lambda trained: evaluate(trained, data.val))
    assert list(model.pretrained_cfg["label_names"]) == ["ant", "bee", "cat"]
