"""Readers, splits, decoding, and everything that is wrong with data."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from slimming.errors import ConfigError, DataError, MissingExtraError
from slimming.training import loop
from slimming.training.batches import BatchShard, train_batches, validation_batches
from slimming.training.config import DataConfig, TrainConfig
from slimming.training.data import open_data, open_unlabelled
from slimming.training.evaluation import evaluate
from slimming.training.images import ImageSpec, UnreadableImageError, decode, make_transform
from slimming.training.samples import Data, ImageDataset, SampleReader, StreamDataset
from slimming.training.sources import Record

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


def counts(data: Data) -> tuple[int, int]:
    assert isinstance(data.train, ImageDataset)
    assert isinstance(data.val, ImageDataset)
    return len(data.train), len(data.val)


def folders(root: Path) -> Path:
    write_folders(root / "train")
    write_folders(root / "val", per_class=2)
    return root


def tars(root: Path) -> Path:
    write_tar(root / "train-000.tar", tar_entries(12))
    write_tar(root / "train-001.tar", tar_entries(6, first=12))
    write_tar(root / "val-000.tar", tar_entries(6, first=50))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def parquets(root: Path) -> Path:
    write_parquet(root / "data" / "train-00000-of-00002.parquet", [0, 1, 2] * 3)
    write_parquet(root / "data" / "train-00001-of-00002.parquet", [0, 1, 2] * 3, first=9)
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", [0, 1, 2] * 2, first=50)
    return root


@pytest.mark.parametrize("write", [folders, tars, parquets], ids=["folders", "tars", "parquets"])
def test_every_layout_gives_the_same_kind_of_data(write: Callable[[Path], Path], tmp_path: Path) -> None:
    data = open_tiny(write(tmp_path))
    assert counts(data) == (18, 6)
    assert sorted(data.classes) == sorted(CLASSES)
    assert isinstance(data.train, ImageDataset)
    image, label, name = data.train[0]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert label == data.train.labels[0]
    assert str(tmp_path) in name
    assert np.bincount(data.train.labels).tolist() == [6, 6, 6]


def test_a_parquet_row_is_the_picture_that_was_stored(tmp_path: Path) -> None:
    data = open_tiny(parquets(tmp_path), augment="none")
    assert isinstance(data.train, ImageDataset)
    wanted = SampleReader(SPEC, None)(Record(picture(13, 4 % 3), 1, ""), 0, 0).image
    image, label, name = data.train[13]
    assert torch.equal(image, wanted)
    assert label == 1
    assert name.endswith("train-00001-of-00002.parquet row 4 (4.png)")


@pytest.mark.parametrize("write", [folders, tars, parquets], ids=["folders", "tars", "parquets"])
def test_pictures_without_labels_are_those_of_the_training_part(write: Callable[[Path], Path], tmp_path: Path) -> None:
    pictures = open_unlabelled(DataConfig(source=str(write(tmp_path))), SPEC)
    assert pictures is not None
    data = open_tiny(tmp_path, augment="none")
    assert isinstance(data.train, ImageDataset)
    own = sorted((pictures[i] for i in range(18)), key=lambda sample: sample.name)
    same = sorted((data.train[i] for i in range(18)), key=lambda sample: sample.name)
    assert [sample.name for sample in own] == [sample.name for sample in same]
    assert all(torch.equal(mine.image, its.image) for mine, its in zip(own, same, strict=True))


def test_one_file_of_pictures_needs_no_labels_and_no_other_part(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": encoded(picture(7, 1))}]}), tmp_path / "some.parquet")
    pictures = open_unlabelled(DataConfig(source=str(tmp_path / "some.parquet")), SPEC)
    assert pictures is not None
    assert torch.equal(pictures[0].image, SampleReader(SPEC, None)(Record(picture(7, 1), 0, ""), 0, 0).image)
    with pytest.raises(DataError, match="no data at"):
        open_unlabelled(DataConfig(source=str(tmp_path / "other.parquet")), SPEC)
    with pytest.raises(DataError, match=r"no column 'img', only 'image'"):
        open_unlabelled(DataConfig(source=str(tmp_path / "some.parquet"), image_key="img"), SPEC)


def test_one_folder_with_a_split_fraction(tmp_path: Path) -> None:
    data = open_tiny(write_folders(tmp_path, per_class=10), split_fraction=0.2)
    assert counts(data) == (24, 6)
    assert isinstance(data.train, ImageDataset)
    assert isinstance(data.val, ImageDataset)
    assert np.bincount(data.val.labels).tolist() == [2, 2, 2]
    assert not set(data.train.indices) & set(data.val.indices)


def test_limits_of_class_folders_are_mixed(tmp_path: Path) -> None:
    data = open_tiny(folders(tmp_path), train_limit=9, val_limit=4)
    assert counts(data) == (9, 4)
    assert isinstance(data.train, ImageDataset)
    assert len(np.unique(data.train.labels)) > 1


def test_val_names_another_place(tmp_path: Path) -> None:
    train_file = write_parquet(tmp_path / "a.parquet", [0, 1, 2])
    data = open_tiny(train_file, val=str(write_parquet(tmp_path / "b.parquet", [2, 1])))
    assert counts(data) == (3, 2)


def damaged_images() -> dict[str, Image.Image]:
    colours = picture(3, 1, size=32)
    palette = colours.convert("P")
    palette.info["transparency"] = b"\x00\x80"
    deep = Image.fromarray((np.arange(1024).reshape(32, 32) * 64).astype(np.uint16))
    return {
        "grey": colours.convert("L"), "palette": palette, "alpha": colours.convert("RGBA"),
        "cmyk": colours.convert("CMYK"), "bit": colours.convert("1"), "deep": deep,
        "huge": Image.new("RGB", (3000, 2000), "red"), "thin": Image.new("RGB", (1, 200)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", damaged_images(), ids=str)
@pytest.mark.parametrize("channels", [1, 3], ids=lambda count: f"{count} channels")
def test_all_kinds_of_images(kind: str, channels: int) -> None:
    spec = ImageSpec(input_size=(channels, 16, 16), mean=(0.0,) * channels, std=(1.0,) * channels)
    image = damaged_images()[kind]
    data = encoded(image, {"cmyk": "JPEG", "huge": "JPEG"}.get(kind, "PNG"))
    for augment in (None, "overhead"):
        tensor = SampleReader(spec, augment)(Record(data, 0, "x"), 0, 0).image
        assert tensor.shape == (channels, 16, 16)
        assert 0 <= tensor.min() <= tensor.max() <= 1.0 + 1e-6
    if kind == "deep":
        assert tensor.max() - tensor.min() > 0.3  # 16 bits are scaled, not clipped to white


def test_a_class_number_wins_over_metadata(tmp_path: Path) -> None:
    entries = tar_entries(12)
    first = {"00001.json": b'{"label": 0, "width": 20}'}
    write_tar(tmp_path / "train.tar", {**first, **entries, "00003.json": b'{"width": 20}'})
    write_tar(tmp_path / "val.tar", tar_entries(6, first=50))
    data = open_tiny(tmp_path)
    assert isinstance(data.train, ImageDataset)
    assert sorted(data.train.labels.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_class_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    root = folders(tmp_path)
    (root / "train" / "dark").rename(root / "train" / "d\udcffrk")
    with pytest.raises(DataError, match=r"is not UTF-8; rename this folder"):
        open_tiny(root)


def test_exif_rotation() -> None:
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), 3, 1000).size == (20, 40)


def test_a_huge_jpeg_is_decoded_at_a_reduced_scale() -> None:
    assert decode(encoded(Image.new("RGB", (4000, 4000)), "JPEG"), 3, 64).size == (500, 500)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(picture(0, 1, 200), "JPEG")[:900]], ids=len)
def test_truncated_images_are_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableImageError):
        decode(data, 3, 64)


def test_unreadable_files_are_named_counted_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path)
    (root / "train" / "bright" / "3.png").write_bytes(b"broken")
    (root / "val" / "green" / "1.png").write_bytes(b"")
    data = open_tiny(root, max_unreadable=0.2)
    history = train(data, tiny_config(epochs=2.0, batch_size=6), None, make_model())
    assert history.metrics["images"] == 5
    messages = [record.getMessage() for record in caplog.records]
    assert sum("bright/3.png" in message for message in messages) == 1
    with pytest.raises(DataError, match=r"1 of 18 images could not be read, more than the 0.*bright/3\.png"):
        train(open_tiny(root), tiny_config(epochs=2.0, batch_size=6), None, make_model())
    with pytest.raises(DataError, match=r"1 of 6 images could not be read"):
        evaluate(make_model(), open_tiny(root).val)


@pytest.mark.parametrize("content", [b"broken", encoded(picture(0, 1, 200), "JPEG")[:900], b""], ids=len)
def test_an_unreadable_row_that_comes_again_counts_once(content: bytes, tmp_path: Path) -> None:
    root = write_data(tmp_path)
    rows = pq.read_table(root / "train.parquet").to_pylist()
    rows[5]["image"]["bytes"] = content
    schema = pq.read_schema(root / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / "train.parquet")
    data = open_tiny(root, max_unreadable=1 / 48)
    assert train(data, tiny_config(epochs=4.0, eval_every=0.0), None, make_model()).steps == 24
    with pytest.raises(DataError, match=r"1 of 48 images could not be read, .* row 5 \(5\.png\)"):
        train(open_tiny(root), tiny_config(), None, make_model())


def empty_class(root: Path) -> Path:
    (folders(root) / "train" / "empty").mkdir()
    return root


def one_class(root: Path) -> Path:
    write_folders(root / "train", classes=("only",))
    write_folders(root / "val", classes=("only",))
    return root


def one_class_used(root: Path) -> Path:
    write_parquet(root / "train.parquet", [1, 1, 1])
    write_parquet(root / "test.parquet", [0, 1])
    return root


def labels_outside(root: Path) -> Path:
    write_parquet(root / "train.parquet", [0, 1, 2, 7])
    write_parquet(root / "test.parquet", [0, 1])
    return root


def negative_label(root: Path) -> Path:
    write_parquet(root / "train.parquet", [0, 1, -1], names=None)
    write_parquet(root / "test.parquet", [0, 1], names=None)
    return root


def other_classes(root: Path) -> Path:
    write_folders(root / "train")
    write_folders(root / "val", classes=("dark", "bright", "grean"))
    return root


def no_validation(root: Path) -> Path:
    return write_parquet(root / "all.parquet", [0, 1, 2]).parent


def truncated_parquet(root: Path) -> Path:
    file = write_data(root) / "train.parquet"
    file.write_bytes(file.read_bytes()[:500])
    return root


def truncated_tar(root: Path) -> Path:
    file = tars(root) / "train-000.tar"
    file.write_bytes(file.read_bytes()[:3000])
    return root


def unlabelled_tar(root: Path) -> Path:
    write_tar(tars(root) / "train-000.tar", {"a.png": b"x", "b.png": b"x", "b.cls": b"1"})
    return root


def mixed_files(root: Path) -> Path:
    write_tar(write_data(root) / "train-0.tar", tar_entries(3))
    return root


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: root / "nothing", r"There is no data at .*nothing"),
        (empty_class, r"class folder .*empty holds no images"),
        (one_class, r"one class only \(only\)"),
        (one_class_used, r"All 3 training images .* one class \(bright\)"),
        (labels_outside, r"row 3 .* has label 7, but there are 3 classes \(0 to 2\)"),
        (negative_label, r"has label -1"),
        (other_classes, r"different classes \(only in training: green; only in validation: grean\)"),
        (no_validation, r"no validation part .* split_fraction"),
        (truncated_parquet, r"is not a readable Parquet file"),
        (truncated_tar, r"cannot be read as a WebDataset shard"),
        (unlabelled_tar, r"Sample 'a' .* has no label"),
        (mixed_files, r"mixes \.parquet and \.tar"),
        (lambda root: root, r"holds no class folders"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_data_is_one_clear_sentence(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_tiny(write(tmp_path))


def test_a_missing_column_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'labels', only 'image', 'label'.* Did you mean 'label'\?"):
        open_tiny(write_data(tmp_path), label_key="labels")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2], "label": [0, 1]}, r"Column 'image' .* not images"),
        (
            {"image": [{"bytes": b"x"}] * 2, "label": [0, None]},
            r"Column 'label' .* not integers without missing values",
        ),
        ({"image": [{"bytes": b"x"}] * 2, "label": ["a", "b"]}, r"Column 'label' .* not integers"),
        ({"image": [], "label": []}, r"holds no rows"),
    ],
    ids=["images", "gaps", "words", "empty"],
)
def test_columns_of_another_kind(columns: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    with pytest.raises(DataError, match=message):
        open_tiny(tmp_path, split_fraction=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"precision": "bf32"}, "choose one of no, bf16, fp16"),
        ({"warmup_epochs": 10.0}, "leave some epochs"),
        ({"ema": 1.0}, "between 0 and 1"),
        ({"label_smoothing": 1.0}, "below 1"),
        ({"lr": float("nan")}, "lr is nan"),
    ],
    ids=str,
)
def test_bad_train_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"augment": "lite"}, "choose one of"),
        ({"split_fraction": 1.5}, "between 0 and 1"),
        ({"split_fraction": 0.1, "val": "x"}, "both given"),
        ({"stream": True}, "hf: data"),
        ({"train_limit": 0}, "at least 1"),
        ({"image_key": "label"}, "name two columns"),
    ],
    ids=str,
)
def test_bad_data_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"source": "x", **changes})


def test_models_of_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="4 channels"):
        ImageSpec(input_size=(4, 16, 16), mean=(0.5,) * 4, std=(0.5,) * 4)


def test_the_spec_comes_from_the_model() -> None:
    spec = ImageSpec.of_model(make_model(pretrained_cfg_overlay={"input_size": (3, 16, 16), "crop_pct": 0.8}))
    assert (spec.input_size, spec.crop_pct, spec.interpolation) == ((3, 16, 16), 0.8, "bicubic")


def names(data: Data, shard: BatchShard, start: int, count: int) -> list[str]:
    batches = train_batches(data, shard, seed=3, start=start, workers=0)
    return [name for _ in range(count) for name in next(batches).names]


def test_shares_of_all_processes_make_the_global_batch(tmp_path: Path) -> None:
    data = open_tiny(write_data(tmp_path))
    whole = names(data, BatchShard(8), 0, 12)
    ranks = [names(data, BatchShard(8, accumulate=2, rank=rank, world_size=2), 0, 24) for rank in (0, 1)]
    joined = [name for i in range(0, 48, 4) for rank in ranks for name in rank[i : i + 4]]
    assert joined == whole
    assert len(set(whole[:48])) == 48
    assert whole[:48] != whole[48:]
    assert names(data, BatchShard(8), 7, 5) == whole[7 * 8 :]


def test_validation_counts_every_image_once(tmp_path: Path) -> None:
    data = open_tiny(write_data(tmp_path))
    seen = [name for rank in range(3) for batch in validation_batches(data.val, 4, rank, 3) for name in batch.names]
    assert len(seen) == len(set(seen)) == 18


def stream_of(count: int, length: int | None) -> StreamDataset:
    def epochs(epoch: int) -> list[Record]:
        order = np.random.default_rng(epoch).permutation(count)
        return [Record(encoded(picture(int(i), int(i) % 3)), int(i) % 3, f"image {i}") for i in order]

    return StreamDataset(epochs, SampleReader(SPEC, "light"), length, 0.01)


def test_a_stream_is_shared_out_and_resumed_like_other_data() -> None:
    data = Data(stream_of(20, 20), stream_of(10, 10), CLASSES)
    whole = names(data, BatchShard(8), 0, 5)
    assert len(set(whole[:16])) == 16
    assert names(data, BatchShard(8), 3, 2) == whole[24:]
    halves = [names(data, BatchShard(8, rank=rank, world_size=2), 0, 5) for rank in (0, 1)]
    assert [name for i in range(0, 20, 4) for half in halves for name in half[i : i + 4]] == whole
    assert evaluate(make_model(), data.val, batch_size=4)["images"] == 10
    model, other = make_model(), make_model()
    train(data, tiny_config(steps=3, eval_every=0.0), None, model)
    train(data, tiny_config(steps=3, eval_every=0.0, workers=2), None, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_part_of_a_stream_whose_only_image_is_unreadable_takes_another_of_the_batch() -> None:
    def epochs(epoch: int) -> list[Record]:
        images = [encoded(picture(i, i % 3)) for i in range(8)]
        return [Record(b"broken" if i == 2 else image, i % 3, f"image {i}") for i, image in enumerate(images)]

    stream = StreamDataset(epochs, SampleReader(SPEC, "light"), 8, 0.2)
    config = tiny_config(steps=4, batch_size=4, accumulate=4, eval_every=0.0)
    assert train(Data(stream, stream_of(10, 10), CLASSES), config, None, make_model()).steps == 4
    assert names(Data(stream, [], CLASSES), BatchShard(4, accumulate=4), 0, 4) == [f"image {i}" for i in (0, 1, 0, 3)]
    broken = StreamDataset(lambda epoch: [Record(b"broken", 0, "only")] * 4, SampleReader(SPEC, "light"), 4, 1.0)
    with pytest.raises(DataError, match=r"No image of a part of batch 0 could be read: only"):
        train(Data(broken, [], CLASSES), tiny_config(steps=1, batch_size=4), None, make_model())


def test_a_stream_of_unknown_length_needs_steps() -> None:
    data = Data(stream_of(20, None), stream_of(10, None), CLASSES)
    with pytest.raises(ConfigError, match="set steps in place of epochs"):
        train(data, tiny_config(), None, make_model())
    assert train(data, tiny_config(steps=3), None, make_model()).steps == 3


def own_loaders(labels: int = 3) -> Data:
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(images, torch.arange(24) % labels)
    return Data(DataLoader(dataset, batch_size=8), DataLoader(dataset, batch_size=5), CLASSES)


def test_own_loaders(tmp_path: Path) -> None:
    whole, again = make_model(), make_model()
    config = tiny_config(epochs=2.0)
    history = train(own_loaders(), config, None, whole)
    assert history.steps == 6
    assert history.metrics["images"] == 24
    train(own_loaders(), config, tmp_path, again, lr_scale=lambda name: 1.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(DataError, match="labels outside 0 to 2"):
        train(own_loaders(labels=4), config, None, make_model())
    with pytest.raises(DataError, match=r"must give \(images, labels\)"):
        train(Data([torch.zeros(8, 3, 16, 16)], [], CLASSES), tiny_config(steps=1), None, make_model())


def test_what_is_wrong_with_own_loaders_is_said() -> None:
    images, labels = torch.zeros(6, 3, 16, 16), torch.arange(6) % 3
    for changes, batch, message in (
        ({"accumulate": 4}, (images, labels), r"has 6 images, not a multiple of 4;.*drop_last=True"),
        ({"accumulate": 2, "mixup": 0.2}, (images, labels), r"a part of batch 0 has 3;.*drop_last=True"),
        ({}, (images, F.one_hot(labels).float()), r"labels of torch.float32; give class numbers"),
    ):
        with pytest.raises(DataError, match=message):
            train(Data([batch], [], CLASSES), tiny_config(steps=1, **changes), None, make_model())
    with pytest.raises(DataError, match="Validation labels lie outside 0 to 2"):
        evaluate(make_model(), [(images, labels + 1)])


def test_the_speed_counts_the_images_that_a_loader_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    batch = (torch.zeros(6, 3, 16, 16), torch.arange(6) % 3)
    log = [train(Data([batch], [batch], CLASSES), tiny_config(steps=1, batch_size=size), None, make_model()).log[0]
           for size in (6, 60)]  # fmt: skip
    assert log[0]["images_per_second"] == log[1]["images_per_second"]


def test_hub_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})

    def split(first: int, count: int) -> Any:
        rows = [
            {"image": {"bytes": encoded(picture(first + i, i % 3)), "path": None}, "label": i % 3} for i in range(count)
        ]
        return datasets.Dataset.from_list(rows, features=features)

    splits = datasets.DatasetDict({"train": split(0, 16), "test": split(50, 6)})
    streams = datasets.IterableDatasetDict({name: part.to_iterable_dataset() for name, part in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: streams if streaming else splits)
    data = open_data(DataConfig(source="hf:tiny"), SPEC)
    assert counts(data) == (16, 6)
    assert data.classes == CLASSES
    train(data, tiny_config(steps=2), None, make_model())
    stream = open_data(DataConfig(source="hf:tiny", stream=True, val_limit=4), SPEC)
    assert train(stream, tiny_config(steps=3), None, make_model()).metrics["images"] == 4
    with pytest.raises(DataError, match="Did you mean 'label'"):
        open_data(DataConfig(source="hf:tiny", label_key="lable"), SPEC)
    text = datasets.Dataset.from_list([{"image": {"bytes": b"", "path": None}, "label": "dark"}] * 3)
    named = datasets.DatasetDict({"train": text, "test": text})
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda name, streaming: named)
        with pytest.raises(DataError, match="not integers without missing values; set label_key"):
            open_data(DataConfig(source="hf:tiny"), SPEC)
    with pytest.raises(DataError, match="has the splits 'train', 'test'"):
        open_data(DataConfig(source="hf:tiny", val="dev"), SPEC)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"slimming\[datasets\]"):
        open_data(DataConfig(source="hf:tiny"), SPEC)


@pytest.mark.parametrize("mode", ["center", "squash", "border"], ids=str)
def test_images_are_cut_as_the_model_was_trained(mode: str) -> None:
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model("test_vit", pretrained_cfg_overlay={"crop_mode": mode, "crop_pct": 0.9})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8))
    wanted: Any = create_transform(**resolve_data_config({}, model=model), is_training=False)
    assert torch.equal(make_transform(ImageSpec.of_model(model), None)(image), wanted(image))
