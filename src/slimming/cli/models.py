"""Models as the command line names them."""

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


def open_named(name: str, arguments: dict[str, Any] | None = None, *, device: str = "cpu") -> nn.Module:
    """Open a checkpoint directory, or make a model without its weights, for looking and timing only.

    Raises:
        CheckpointError: no such directory, or a damaged one.
        UnsupportedModelError: the host has no such model, or no family reads it.
        ConfigError: arguments with a checkpoint, which has its own.
    """
    if hub.is_address(name):
        fetched = hub.fetch(name, weights=False)
        if not (fetched / CONFIG).exists():
            return load_checkpoint(name)
        model = open_directory(fetched, arguments, pretrained=False)
        prunable(model)
        return model
    path = Path(name)
    if path.exists():
        if arguments:
            raise ConfigError(f"{path} is a whole model: model.arguments have no effect; drop them.")
        return load_checkpoint(path)
    if (os.sep in name and not is_hosted(name)) or name in (".", ".."):
        raise CheckpointError(f"There is no checkpoint directory {path}. Give one that slimming wrote, or a timm name.")
    model = create_untrained(name, arguments, device=device)
    if device == "meta" and family_of(model).runs_models:
        model = create_untrained(name, arguments)
    prunable(model)
    return model


def load_checkpoint(name: str | Path) -> nn.Module:
    """Load a checkpoint directory, and say what to give where a whole run or search was given.

    Args:
        name: the directory, or ``hf-hub:owner/name``.

    Raises:
        CheckpointError: no such directory or repository, a damaged one, or one that holds no checkpoint.
        ConfigError: the address is not one of the hub's.
    """
    if hub.is_address(name):
        return checkpoint.load(name)
    check_checkpoint(Path(name))
    return checkpoint.load(Path(name))


def check_checkpoint(path: Path) -> None:
    """Check that ``path`` is a checkpoint directory, without reading it.

    Raises:
        CheckpointError: it is not; the message says what to give where a whole run or search was given.
    """
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint directory {path}. Give one that slimming wrote.")
    if path.is_dir() and not any((path / file).exists() for file in (checkpoint.STRUCTURE, CONFIG)):
        inside = sorted(str(found.parent) for found in path.glob(f"*/{checkpoint.STRUCTURE}"))
        inside += sorted(str(found.parent) for found in path.glob(f"*/*/{checkpoint.STRUCTURE}"))
        if inside:
            raise CheckpointError(f"{path} holds several files of a run; give a checkpoint in it: {', '.join(inside)}.")


def set_threads(count: int | None) -> None:
    """Let torch use ``count`` threads; None leaves them as they are.

    Raises:
        ConfigError: there are none.
    """
    if count is None:
        return
    if count < 1:
        raise ConfigError(f"--threads is {count}; it must be at least 1.")
    torch.set_num_threads(count)


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; by default a GPU where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"There is no device {name!r} here; try --device cpu.") from error
    if device.type == "meta":
        raise ConfigError("The meta device computes nothing; try --device cpu.")
    return device
