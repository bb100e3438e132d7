"""Open models, checkpoints and devices by the names on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.checkpoints import checkpoint, hub
from slimming.errors import CheckpointError, ConfigError
from slimming.masks.attachment import prunable
from slimming.models.create import create_untrained
from slimming.models.directories import CONFIG, open_directory
from slimming.models.families import family_of
from slimming.models.hosts import is_hosted
from slimming.models.transformers_tasks import give_example_inputs_


def open_named(name: str, arguments: dict[str, Any] | None = None, *, device: str = "cpu") -> nn.Module:
    """Load a checkpoint, or create a model with random weights, to inspect or time it.

    Raises:
        CheckpointError: the directory does not exist or is damaged.
        UnsupportedModelError: there is no model of this name, or it is not supported.
        ConfigError: ``arguments`` are given for a checkpoint, which contains its own.
    """
    if hub.is_address(name):
        fetched = hub.fetch(name, weights=False)
        if not (fetched / CONFIG).exists():
            return load_checkpoint(name)
        model, _ = open_directory(fetched, arguments, pretrained=False)
        give_example_inputs_(model)
        prunable(model)
        return model
    path = Path(name)
    if path.exists():
        if arguments:
            raise ConfigError(f"{path} is a checkpoint, for which model.arguments have no effect; drop them.")
        return load_checkpoint(path)
    if (os.sep in name and not is_hosted(name)) or name in (".", ".."):
        raise CheckpointError(f"There is no checkpoint directory {path}. Give one that slimming wrote, or a timm name.")
    model = create_untrained(name, arguments, device=device)
    if device == "meta" and family_of(model).runs_models:
        model = create_untrained(name, arguments)
    give_example_inputs_(model)
    prunable(model)
    return model


def load_checkpoint(name: str | Path) -> nn.Module:
    """Load a checkpoint; the error for the directory of a run or search lists the checkpoints in it.

    Args:
        name: a directory, or ``hf-hub:owner/name``.

    Raises:
        CheckpointError: the directory or repository does not exist, is damaged, or holds no checkpoint.
        ConfigError: the hub address is malformed.
    """
    if hub.is_address(name):
        return checkpoint.load(name)
    check_checkpoint(Path(name))
    return checkpoint.load(Path(name))


def check_checkpoint(path: Path) -> None:
    """Check that ``path`` is a checkpoint directory, without loading it.

    Raises:
        CheckpointError: it is not; the message lists the checkpoints in the directory of a run or search.
    """
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint directory {path}. Give one that slimming wrote.")
    if path.is_dir() and not any((path / file).exists() for file in (checkpoint.STRUCTURE, CONFIG)):
        checkpoints = sorted(str(file.parent) for file in path.glob(f"*/{checkpoint.STRUCTURE}"))
        checkpoints += sorted(str(file.parent) for file in path.glob(f"*/*/{checkpoint.STRUCTURE}"))
        if checkpoints:
            raise CheckpointError(
                f"{path} holds several files of a run; give a checkpoint in it: {', '.join(checkpoints)}."
            )


def set_threads(count: int | None) -> None:
    """Set the number of threads of PyTorch; None keeps the current number.

    Raises:
        ConfigError: ``count`` is below 1.
    """
    if count is None:
        return
    if count < 1:
        raise ConfigError(f"--threads is {count}; it must be at least 1.")
    torch.set_num_threads(count)


def choose_device(name: str | None) -> torch.device:
    """Return the device ``name``; by default a GPU if there is one, else the CPU.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"There is no device {name!r} on this machine; try --device cpu.") from error
    if device.type == "meta":
        raise ConfigError("The meta device cannot compute; try --device cpu.")
    return device
