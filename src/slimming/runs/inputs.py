"""The inputs that the settings of a run, a search or a training name by path or by name."""

from __future__ import annotations

from pathlib import Path

from slimming.core.inputs import Files, Inputs, check_inputs, files_at
from slimming.runs.config import ModelConfig
from slimming.training.config import DataConfig


def check_named_inputs(
    directory: Path,
    model: ModelConfig,
    data: DataConfig,
    *,
    teacher: str | None = None,
    latency_table: str | None = None,
    fresh: bool = False,
) -> None:
    """Check that the files that settings name are those with which the work in ``directory`` was started.

    The first call records them. Models and data of a hub are not files here.

    Args:
        directory: directory of the work.
        model: the dense model.
        data: the images.
        teacher: directory of the teacher.
        latency_table: file of the latency table.
        fresh: whether no work was finished yet, so that the inputs are recorded without a comparison.

    Raises:
        ConfigError: an input has changed; the message names the files.
        CheckpointError: the record is damaged.
        DataError: a file cannot be read.
    """
    weights: dict[str, Files] = {}
    model_directory = model.name.removeprefix("transformers:")
    for setting, place in (
        ("model.checkpoint", model.checkpoint),
        ("model.name", model_directory if Path(model_directory).is_dir() else None),
        ("teacher", teacher),
        ("latency_table", latency_table),
    ):
        if place is not None and (files := files_at(Path(place))):
            weights[f"{setting} ({Path(place).name})"] = files
    images: dict[str, Files] = {}
    for setting, place in (("data.source", data.source), ("data.val", data.val)):
        if place is not None and not data.source.startswith("hf:") and (files := files_at(Path(place))):
            images[f"{setting} ({Path(place).name})"] = files
    check_inputs(directory, Inputs(weights=weights, images=images), fresh=fresh)
