"""Calibration images: as in evaluation, whatever the augmentation of the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slimming.training.batches import calibration_batches
from slimming.training.samples import Data, ImageDataset, SampleReader, StreamDataset
from slimming.training.sources import Record

from .tiny import CLASSES, SPEC, encoded, open_tiny, picture, write_data


@pytest.mark.parametrize("augment", ["light", "overhead", "deit"], ids=["light", "overhead", "deit"])
def test_calibration_images_are_not_augmented(augment: str, tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    data, plain = open_tiny(folder, augment=augment), open_tiny(folder, augment="none")
    assert isinstance(data.train, ImageDataset)
    assert isinstance(plain.train, ImageDataset)
    assert any(not torch.equal(data.train[i].image, plain.train[i].image) for i in range(8))
    ours, expected = (calibration_batches(each, 8, seed=3) for each in (data, plain))
    assert [batch.names for batch in ours] == [batch.names for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(ours, expected, strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(ours, expected, strict=True))


def test_images_of_a_stream_are_not_augmented() -> None:
    records = [Record(encoded(picture(i, i % 3)), i % 3, f"image {i}") for i in range(8)]

    def stream(augment: str | None) -> StreamDataset:
        return StreamDataset(lambda epoch: records, SampleReader(SPEC, augment), 8, 0.01)

    ours, expected = (
        calibration_batches(Data(stream(augment), stream(None), CLASSES), 8) for augment in ("deit", None)
    )
    assert np.concatenate([batch.images for batch in ours]).tolist() == torch.cat([b.images for b in expected]).tolist()
