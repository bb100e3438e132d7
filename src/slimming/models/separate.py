"""A projection to queries, keys and values, or to values alone, whose heads differ in size from what the host assumes.

Hosts divide the output of a projection by ``reshape(batch, tokens, 3, heads, size)`` or ``view(batch, tokens, -1,
head_dim)``, which assumes one size for queries, keys and values. `SeparateLinear` returns an object that holds the
parts, takes these calls, and gives plain tensors as soon as the parts are apart. The forward of the host is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from slimming.errors import UnsupportedModelError


class SeparateLinear(nn.Linear):
    """A Linear whose output is divided into parts with heads of different sizes.

    It has no constructor arguments: the class of an existing Linear is set to this one by `separate_`.

    Attributes:
        heads: number of heads.
        head_sizes: size of a head in each part.
        assumed_size: the size that the host assumes for all of them.
    """

    heads: int
    assumed_size: int
    head_sizes: tuple[int, ...]

    def forward(self, input: Tensor) -> Any:
        """Project: (..., in) -> `Parts` that stand for (..., out)."""
        out = F.linear(input, self.weight, self.bias)
        return Parts(out.split([self.heads * size for size in self.head_sizes], dim=-1), self.heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}, head_sizes={self.head_sizes}"


def separate_(linear: nn.Linear, heads: int, assumed_size: int, head_sizes: Sequence[int]) -> None:
    """Make ``linear`` a `SeparateLinear`, see its attributes; its parameters stay as they are."""
    linear.__class__ = SeparateLinear
    vars(linear).update(heads=heads, assumed_size=assumed_size, head_sizes=tuple(head_sizes))


def join_(linear: SeparateLinear) -> None:
    """Make ``linear`` a plain Linear again, because all its parts have the head size that the host assumes."""
    del linear.heads, linear.assumed_size, linear.head_sizes
    linear.__class__ = nn.Linear  # pyright: ignore


class Parts:
    """The parts of a projection's output, until the host takes them apart.

    A single part only corrects the head size in the next reshape. Several parts are along the last dimension, or after
    a reshape along a dimension of their own.

    Args:
        parts: tensors that are equal in shape but for the last dimension.
        heads: number of heads.
        dim: the dimension of the parts, of size 1 in each; None if they are along the last.
    """

    def __init__(self, parts: Sequence[Tensor], heads: int, dim: int | None = None) -> None:
        self.parts, self.heads, self.dim = tuple(parts), heads, dim

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the host expects up to the dimension of the parts."""
        return tuple(self.parts[0].shape[: -1 if self.dim is None else self.dim])

    def reshape(self, *shape: Any) -> Any:
        """Divide the last dimension into (parts, heads, size), or for a single part into (heads, size)."""
        sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
        if len(self.parts) == 1:
            (part,) = self.parts
            return part.reshape(*sizes[:-1], part.shape[-1] // self.heads if -1 in sizes[:-1] else -1)
        if self.dim is None and len(sizes) > 3 and sizes[-3:-1] == [len(self.parts), self.heads]:
            place = len(sizes) - 3
        elif self.dim == 0 and sizes[0] == len(self.parts) and -1 not in sizes[:-1]:
            place = 0
        else:
            raise self._unsupported(f"reshape{tuple(sizes)}")
        sizes[place] = 1
        return Parts(
            [part.reshape(*sizes[:-1], self._size(part) if -1 in sizes[:-1] else -1) for part in self.parts],
            self.heads,
            place,
        )

    view = reshape

    def _size(self, part: Tensor) -> int:
        return part.shape[-1] // self.heads if self.dim is None else part.shape[-1]

    def permute(self, *dims: Any) -> Parts:
        """Permute the dimensions of every part."""
        order = list(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else list(dims)
        if self.dim is None:
            raise self._unsupported("permute")
        count = self.parts[0].dim()
        return Parts(
            [part.permute(*order) for part in self.parts], self.heads, [d % count for d in order].index(self.dim)
        )

    def transpose(self, first: int, second: int) -> Parts:
        """Exchange two dimensions of every part."""
        order = list(range(self.parts[0].dim()))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def contiguous(self) -> Parts:
        """Make every part contiguous."""
        return Parts([part.contiguous() for part in self.parts], self.heads, self.dim)

    def unbind(self, dim: int = 0) -> tuple[Tensor, ...]:
        """The parts as tensors."""
        if self.dim is None or dim % self.parts[0].dim() != self.dim:
            raise self._unsupported(f"unbind({dim})")
        return tuple(part.squeeze(self.dim) for part in self.parts)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        """The parts as tensors, before or after they have a dimension of their own."""
        if chunks != len(self.parts) or (dim != -1 if self.dim is None else dim % self.parts[0].dim() != self.dim):
            raise self._unsupported(f"chunk({chunks}, {dim})")
        return self.parts

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __getitem__(self, part: int) -> Tensor:
        return self.unbind(0)[part]

    def __add__(self, bias: Tensor) -> Parts:
        """Add a bias of all parts."""
        if self.dim is not None or bias.dim() != 1:
            raise self._unsupported("the sum with a tensor")
        biases = bias.split([part.shape[-1] for part in self.parts])
        return Parts([part + of_part for part, of_part in zip(self.parts, biases, strict=True)], self.heads)

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The attention of this model calls {what} on its projection, whose queries, keys and values have "
            "different sizes here; cut as many dimensions of QK as of V."
        )
