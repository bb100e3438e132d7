"""Example calls of a model: the arguments with which it is run to read it, to check it and to count its costs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from slimming.core.modules import set_attribute_
from slimming.errors import ConfigError

ATTRIBUTE = "example_inputs"
"""Attribute of a model with its example inputs, which every function that reads the model uses."""


@dataclass(frozen=True)
class ExampleCall:
    """The arguments of one call of a model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(value: Any) -> ExampleCall:
        """The call with ``value``: one argument, a tuple of positional or a mapping of keyword arguments."""
        if isinstance(value, ExampleCall):
            return value
        if isinstance(value, Mapping):
            return ExampleCall(kwargs=dict(value))
        return ExampleCall(args=value if type(value) is tuple else (value,))

    @property
    def value(self) -> Any:
        """The arguments in the form that `of` takes."""
        if self.kwargs:
            return self if self.args else dict(self.kwargs)
        return self.args[0] if len(self.args) == 1 and type(self.args[0]) is not tuple else self.args

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return tensors_in((self.args, dict(self.kwargs)))

    @property
    def main(self) -> Tensor:
        """The first floating-point tensor; its first dimension is the batch, unless it is in a list of images."""
        return next(tensor for tensor in self.tensors if tensor.is_floating_point())

    @property
    def is_batched(self) -> bool:
        """Whether the first dimension of `main` is the batch: it is not in a list, as images of several sizes are."""
        return self._list_of_images is None

    @property
    def _list_of_images(self) -> list[Any] | None:
        """The list that `main` is in."""
        main = self.main
        lists = (each for each in (*self.args, *self.kwargs.values()) if isinstance(each, list))
        return next((each for each in lists if any(leaf is main for leaf in tensors_in(each))), None)

    @property
    def size(self) -> int:
        """Number of examples: the first dimension of `main`, or the length of the list that it is in."""
        images = self._list_of_images
        return len(self.main) if images is None else len(images)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `main` without its batch dimension."""
        return tuple(self.main.shape)[1 if self.is_batched else 0 :]

    @property
    def digest(self) -> str:
        """A digest of everything that determines the course of the call: all but the values of floating tensors."""
        leaves, spec = tree_flatten((self.args, dict(self.kwargs)))
        digest = hashlib.sha256(repr(spec).encode())
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                digest.update(repr(leaf).encode())
                continue
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            if not leaf.is_floating_point():
                digest.update(repr(leaf.tolist()).encode())
        return digest.hexdigest()

    def run(self, model: nn.Module) -> Any:
        """Call ``model``."""
        return model(*self.args, **self.kwargs)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> ExampleCall:
        """The call with its floating-point tensors in ``dtype``, on ``device``."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

        return self._mapped(moved)

    def with_batch(self, size: int) -> ExampleCall:
        """The call for ``size`` examples: the first ones, and others made from the first by shuffling its values.

        The tensors whose first dimension is the batch of `main` are changed, and lists with one entry for each example,
        such as images of several sizes, or targets; further entries of lists repeat the first.
        """
        main, given = self.main, self.size
        generator = torch.Generator().manual_seed(size)

        def shuffled(tensor: Tensor) -> Tensor:
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            return tensor.reshape(-1)[order].reshape(tensor.shape)

        def resized(part: Any) -> Any:
            if size <= given:
                return part[:size]
            if isinstance(part, list):
                return [*part, *part[:1] * (size - given)]
            more = [shuffled(part[:1]) if part is main else part[:1] for _ in range(size - given)]
            return torch.cat([part, *more])

        return self._by_example(resized)

    def split(self, size: int) -> list[ExampleCall]:
        """The call in parts of at most ``size`` examples."""
        if self.size <= size:
            return [self]
        return [self._by_example(lambda part, at=at: part[at : at + size]) for at in range(0, self.size, size)]

    def _by_example(self, change: Callable[[Any], Any]) -> ExampleCall:
        """The call with ``change`` applied to everything that has one entry for each example: tensors and lists."""
        given = self.size

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value) if value.dim() and len(value) == given else value
            if isinstance(value, list) and len(value) == given:
                return change(value)
            return _mapped_parts(value, changed)

        return ExampleCall(changed(self.args), changed(dict(self.kwargs)))

    def varied(self, seed: int = 0) -> ExampleCall:
        """The call with random values in place of a constant image, such as zeros, which would prove little."""
        main = self.main
        if main.numel() == 0 or not bool((main == main.reshape(-1)[0]).all()):
            return self
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(main.shape, generator=generator, dtype=torch.float64).to(main.device, main.dtype)
        return self.with_main(random)

    def with_main(self, tensor: Tensor) -> ExampleCall:
        """The call with ``tensor`` in place of `main`."""
        main = self.main
        return self._mapped(lambda leaf: tensor if leaf is main else leaf)

    def _mapped(self, change: Any) -> ExampleCall:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else _mapped_parts(value, changed)

        return ExampleCall(changed(self.args), changed(dict(self.kwargs)))


def _mapped_parts(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to its parts, if it is a mapping, a dataclass, a list or a tuple."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for each in dataclasses.fields(value):
            object.__setattr__(made, each.name, change(getattr(value, each.name)))
        return made
    if isinstance(value, Mapping):
        return {key: change(part) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [change(part) for part in value]
        return getattr(value, "_make", tuple)(parts)  # of a named tuple
    return [change(part) for part in value] if isinstance(value, list) else value


def image_call(shape: Sequence[int]) -> ExampleCall:
    """A call with a random image of ``shape`` (without the batch dimension)."""
    generator = torch.Generator().manual_seed(0)
    return ExampleCall((torch.randn(1, *shape, generator=generator, dtype=torch.float64),))


def set_example_inputs_(model: nn.Module, example_inputs: Any) -> None:
    """Keep ``example_inputs`` as an attribute of ``model``, so that all functions that read the model use them.

    Raises:
        ConfigError: they are not example calls, see `given_calls`.
    """
    if example_inputs is not None:
        _calls(example_inputs)
        set_attribute_(model, ATTRIBUTE, example_inputs)


def given_calls(model: nn.Module) -> tuple[ExampleCall, ...]:
    """The example calls that ``model`` was given; empty if none.

    Raises:
        ConfigError: they are not a tensor, a tuple or mapping of arguments, or a list of these, or a call has no
            floating-point tensor.
    """
    value = getattr(model, ATTRIBUTE, None)
    return () if value is None else _calls(value)


def _calls(value: Any) -> tuple[ExampleCall, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(each, (Tensor, tuple, Mapping)) for each in values):
        raise ConfigError(
            f"example_inputs is {type(value).__name__}: give a tensor, a tuple of positional or a dict of keyword "
            "arguments of the model's forward, or a list of these with one entry for each call."
        )
    calls = tuple(ExampleCall.of(each) for each in values)
    for call in calls:
        if not any(tensor.is_floating_point() and tensor.dim() for tensor in call.tensors):
            raise ConfigError(
                "A call in example_inputs has no floating-point tensor, such as an image with a batch dimension: add "
                "it to the arguments."
            )
    return calls


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in ``value``: in tuples, mappings, dataclasses and the attributes of other objects."""
    return list(_tensors_in(value, set()))


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    leaves = tree_leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):
        for leaf in leaves:
            yield from _tensors_in(leaf, seen)
        return
    if id(value) in seen or isinstance(value, (type, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, each.name) for each in dataclasses.fields(value)]
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors_in(part, seen)
