"""Save and load the state of a training run, as one file of tensors and numbers, to resume it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from slimming.core.files import atomic_file
from slimming.core.same_settings import check_same_settings
from slimming.errors import CheckpointError
from slimming.training.config import FREE_SETTINGS, TrainConfig
from slimming.training.sharding import sharded_state
from slimming.training.tasks import Task

FORMAT = 2
STATE_FILE = "state.pt"
SEAL, DIGITS = b"\nsha256 ", 64
"""The last bytes of the file are its checksum: `SEAL` and the hexadecimal digits of the SHA-256 of the bytes before."""


@dataclass
class TrainingState:
    """Everything that changes during training; the rest of a run follows from its settings and the step.

    Attributes:
        model: the trained model.
        optimizer: its optimizer.
        task: computes the loss.
        averaged: the averaged model, or None.
        scaler: scaler of gradients in fp16.
        step: number of finished steps.
        evaluation_due: whether the evaluation after this step was not finished.
        log: lines of the log up to this step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    averaged: AveragedModel | None
    scaler: torch.amp.GradScaler
    step: int = 0
    evaluation_due: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)

    def save(self, directory: Path, config: TrainConfig, total: int, optimizer: dict[str, Any]) -> None:
        """Write the state to ``directory`` atomically; ``optimizer`` is the optimizer's, with whole tensors.

        Raises:
            OutputError: the disk is full, or the directory is not writable.
        """
        content = {
            "format": FORMAT,
            "step": self.step,
            "evaluation_due": self.evaluation_due,
            "log": [json.dumps(line) for line in self.log],
            "settings": _settings(config, total),
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "task": self.task.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.module.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_file(directory / STATE_FILE) as temporary:
            with temporary.open("wb") as file:
                try:
                    torch.save(content, file)
                except RuntimeError as error:  # the OSError of the file explains more than PyTorch's error
                    raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
            with temporary.open("rb+") as file:
                digest = _digest(file, temporary.stat().st_size)
                file.seek(0, os.SEEK_END)
                file.write(SEAL + digest)

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
        self.step, self.evaluation_due = content["step"], content["evaluation_due"]
        self.log = [json.loads(line) for line in content["log"]]


def _read(path: Path) -> dict[str, Any]:
    advice = "remove it to start this training from its first step"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size - len(SEAL) - DIGITS
            digest = _digest(file, size) if size > 0 else b""
            if file.read() != SEAL + digest:
                raise CheckpointError(
                    f"{path} is damaged, or of an earlier version of slimming: its checksum is missing or differs; "
                    f"{advice}."
                )
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it readable, or {advice}.") from error
    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} is not the state of a training; {advice}.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is not the state of a training; {advice}.")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, but this version of slimming reads format {FORMAT}; "
            f"use the version that wrote it, or {advice}."
        )
    return content


def _digest(file: BinaryIO, size: int) -> bytes:
    """The SHA-256 of the next ``size`` bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def _settings(config: TrainConfig, total: int) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "trackers": list(config.trackers), "total": total}


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    return {"number of steps" if name == "total" else name: value for name, value in settings.items()}
