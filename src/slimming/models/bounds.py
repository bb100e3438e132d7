"""Bound the size of a model while it is built from a file, before its modules and parameters take time and memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from slimming.core.limits import MOST_ELEMENTS, MOST_IN_RANGE, MOST_MODULES, MOST_TENSOR_ELEMENTS
from slimming.errors import CheckpointError

ARGUMENT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What constructors of hosts raise for arguments that they do not check."""
BUILD_ERRORS = (*ARGUMENT_ERRORS, RuntimeError)
"""The same, with what PyTorch raises for sizes that do not fit."""
FACTORIES = {
    getattr(torch, name)
    for name in ("empty", "zeros", "ones", "rand", "randn", "full", "arange", "linspace", "eye", "randperm", "randint")
}


@contextmanager
def bounded_building() -> Iterator[None]:
    """Limit the models that are built within the block, in this thread.

    Raises:
        CheckpointError: a model has more modules or parameters than `slimming.core.limits` allows.
    """
    thread, modules, elements = threading.get_ident(), 0, 0

    def count_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > MOST_MODULES:
                raise _too_large(f"more than {MOST_MODULES:,} modules")

    def count_parameter(parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal elements
        if threading.get_ident() == thread and parameter is not None:
            elements += parameter.numel() if type(parameter) is nn.Parameter else 0
            if elements > MOST_ELEMENTS:
                raise _too_large(f"more than {MOST_ELEMENTS:,} parameters")

    handles = [
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        with _BoundedTensors():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _BoundedTensors(TorchFunctionMode):
    """Refuse to make a tensor that is too large, also before any memory is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            sizes = [*args, *kwargs.values()]
            numbers = [size for entry in sizes for size in (entry if isinstance(entry, (tuple, list)) else [entry])]
            whole = [size for size in numbers if type(size) is int]
            ranged = func in (torch.arange, torch.linspace)
            elements = max(whole, default=0) if ranged else math.prod(whole)
            if elements > (MOST_IN_RANGE if ranged else MOST_TENSOR_ELEMENTS):
                raise _too_large(f"a tensor of {elements:,} elements")
        return func(*args, **kwargs)


def _too_large(what: str) -> CheckpointError:
    return CheckpointError(f"The file describes a model with {what}, which is too large. Take an intact copy.")
