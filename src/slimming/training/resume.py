"""Save and load the state of a training run, as one file of tensors and numbers, to resume it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from slimming.core.files import atomic_file
from slimming.core.same_settings import check_same_settings
from slimming.errors import CheckpointError
from slimming.training.config import FREE_SETTINGS, TrainConfig
from slimming.training.sharding import sharded_state
from slimming.training.tasks import Task

FORMAT = 1
STATE_FILE = "state.pt"


@dataclass
class TrainingState:
    """Everything that changes during training; the rest of a run follows from its settings and the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    averaged: AveragedModel | None
    scaler: torch.amp.GradScaler
    step: int = 0

    def save(self, directory: Path, config: TrainConfig, total: int, optimizer: dict[str, Any]) -> None:
        """Write the state to ``directory`` atomically; ``optimizer`` is the optimizer's, with whole tensors.

        Raises:
            OutputError: the disk is full, or the directory is not writable.
        """
        content = {
            "format": FORMAT,
            "step": self.step,
            "settings": _settings(config, total),
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "task": self.task.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.module.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_file(directory / STATE_FILE) as temporary, temporary.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # the OSError of the file explains more than PyTorch's error
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load(self, directory: Path, config: TrainConfig, total: int, sharded: Sequence[Tensor] | None = None) -> None:
        """Load the state from ``directory``; ``sharded`` are the parameters of the optimizer if they are sharded.

        Raises:
            CheckpointError: the file is damaged, has another format, or belongs to another model.
            ConfigError: the run was started with other settings.
        """
        path = directory / STATE_FILE
        content = _read(path)
        check_same_settings(
            path.parent, _named(content["settings"]), _named(_settings(config, total)), free=FREE_SETTINGS
        )
        try:
            self.model.load_state_dict(content["model"])
            optimizer = content["optimizer"]
            self.optimizer.load_state_dict(optimizer if sharded is None else sharded_state(optimizer, sharded))
            self.task.load_state_dict(content["task"])
            self.scaler.load_state_dict(content["scaler"])
            if self.averaged is not None:
                self.averaged.module.load_state_dict(content["averaged"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} belongs to another model or task ({str(error).splitlines()[0]}); "
                "choose another directory to start a new run."
            ) from error
        self.step = int(content["step"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type of the error depends on where the file is damaged
        raise CheckpointError(f"{path} is damaged or not the state of a run; remove it to start a new run.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is not the state of a run; remove it to start a new run.")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, but this version of slimming reads format {FORMAT}; "
            "use the version that wrote it."
        )
    return content


def _settings(config: TrainConfig, total: int) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "trackers": list(config.trackers), "total": total}


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    return {"number of steps" if name == "total" else name: value for name, value in settings.items()}
