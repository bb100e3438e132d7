"""Cache what reading a model gives, by a digest of its architecture.

Tracing a model takes seconds; a cached reading takes at most a thirtieth of that. Every public function that is given a
model reads it: describe, score, plan, cut, cost and save read five times together. Without the cache they take 1.8
times as long for ResNet-18, 1.6 times for ConvNeXt-T and 1.4 times for Swin-T (`benchmarks/reading.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import fx, nn

T = TypeVar("T")
CAPACITY = 16
"""Number of architectures that are kept; the oldest is dropped first."""


class ArchitectureCache(Generic[T]):
    """Values that depend on the architecture of a model but not on its weights."""

    def __init__(self) -> None:
        self._values: dict[str, T] = {}

    def get(self, digest: str, compute: Callable[[], T]) -> T:
        """The value of an architecture, computed when it is first asked for.

        Args:
            digest: see `architecture_digest`.
            compute: gives the value.
        """
        if digest not in self._values:
            while len(self._values) >= CAPACITY:
                self._values.pop(next(iter(self._values)))
            self._values[digest] = compute()
        return self._values[digest]

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()


def architecture_digest(model: nn.Module, inputs: Sequence[Any]) -> str:
    """A digest of everything that determines the reading of ``model``: classes, settings and tensor shapes.

    Args:
        model: the model.
        inputs: what else determines it, such as the shape of an image.
    """
    digest = hashlib.sha256(repr(tuple(inputs)).encode())
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            digest.update(f"{name} is {names[module]}".encode())
            continue
        names[module] = name
        settings = {key: value for key, value in vars(module).items() if _is_setting(value) and key != "training"}
        # Buffers outside the state dict are cut in another way.
        apart = sorted(module._non_persistent_buffers_set)
        digest.update(f"{name} {_code(module)} {sorted(settings.items())} {apart}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
    return digest.hexdigest()


def _code(module: nn.Module) -> str:
    """What distinguishes the forward of ``module`` from those of other classes, also of classes of the same name."""
    if isinstance(module, fx.GraphModule):  # each has a class of its own
        return " ".join(str(value) for value in vars(module).values() if isinstance(value, fx.Graph))
    return f"{type(module)} {id(type(module))}"


def _is_setting(value: Any) -> bool:
    """Whether ``value`` is a number, string or boolean, or a sequence of them, such as the strides of a convolution."""
    return type(value) in (int, float, bool, str) or (type(value) in (tuple, list) and all(map(_is_setting, value)))
