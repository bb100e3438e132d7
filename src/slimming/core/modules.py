"""Switch modules to evaluation mode and back, set attributes that copies keep, check that a model can be trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx, nn

from slimming.errors import ConfigError, DataError, SlimmingError

MODEL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SlimmingError, TypeError, ValueError,
)  # fmt: skip
"""What the code of a model, or a library that traces it, raises on inputs and sizes that it does not take."""


def run_on_images(model: nn.Module, images: torch.Tensor) -> Any:
    """Return the outputs of ``model`` for images that a user gave.

    Raises:
        DataError: the model fails on them, for example because they have other channels or another size.
    """
    with explain_input_errors(f"images of shape {tuple(images.shape)}"):
        return model(images)


@contextmanager
def explain_input_errors(given: str) -> Iterator[None]:
    """In this block, errors of a model are reported as errors of the inputs ``given``.

    Raises:
        DataError: the model fails on them.
    """
    try:
        yield
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = (
            "the arguments that the model's forward takes"
            if isinstance(error, TypeError)
            else ("images of the size and with the channels that the model takes")
        )
        raise DataError(f"The model fails on {given}: {reason} Give {what}.") from error


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put ``model`` into training or evaluation mode, and restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            if type(module).train is not nn.Module.train and module.training != mode:
                module.train(mode)  # some models exchange their graph here
        for module, mode in modes.items():
            module.training = mode


def in_evaluation(model: nn.Module) -> AbstractContextManager[None]:
    """Put ``model`` into evaluation mode, and restore the mode of every module afterwards."""
    return in_mode(model, False)


def set_attribute_(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute that copies of ``module`` keep; a copy of a graph module of torch.fx loses all others."""
    module.__dict__[name] = value
    if isinstance(module, fx.GraphModule):
        module.meta.setdefault("_user_preserved_attributes", {})[name] = value


def check_whole(model: nn.Module) -> None:
    """Check that the weights of ``model`` are whole tensors, not shards of a model in several processes.

    Raises:
        ConfigError: they are sharded, for example by ``fully_shard``.
    """
    # Importing the class would take a second; without it, no tensor is one.
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    sharded_type = () if tensors is None else tensors.DTensor
    sharded = next((name for name, tensor in model.named_parameters() if isinstance(tensor, sharded_type)), None)
    if sharded is not None:
        raise ConfigError(
            f"The model's weights are sharded ({sharded} is a DTensor, as fully_shard makes it); slimming needs whole "
            "weights. Give the model before fully_shard: in a training under accelerate launch --use_fsdp "
            "--fsdp_version 2, slimming shards it. To use a sharded model, load its full state dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into a model "
            "that is not sharded."
        )


def check_trainable(model: nn.Module) -> None:
    """Check that the weights of ``model`` are float32 or float64, as training requires.

    Raises:
        ConfigError: they are in half precision, or sharded.
    """
    check_whole(model)
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise ConfigError(
            f"The model's weights are {str(half).removeprefix('torch.')}, which is too coarse for training: call "
            "model.float() first, and train with precision 'bf16' or 'fp16' to save time and memory."
        )


def train_heads_apart_(model: nn.Module, apart: bool) -> None:
    """Set whether a model with a distillation head returns the logits of both heads in training; no-op for others."""
    switch = getattr(model, "set_distilled_training", None)  # timm's
    if switch is not None:
        switch(apart)
