"""Cost formulas of a forward pass: sums of products of dimensions, as plain data and compiled to arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Dim:
    """One dimension of an operation: ``fixed`` plus, for each pair (group, weight), the weight times its kept units."""

    fixed: int = 0
    groups: tuple[tuple[str, int], ...] = ()

    def value(self, kept: Mapping[str, int]) -> int:
        """Return the dimension when group ``name`` keeps ``kept[name]`` units."""
        return self.fixed + sum(weight * kept[name] for name, weight in self.groups)

    def __add__(self, other: Dim) -> Dim:
        return Dim(fixed=self.fixed + other.fixed, groups=self.groups + other.groups)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A size that is the quotient of two others, such as the kept dimensions of all heads over the kept heads.

    Attributes:
        total: the numerator.
        parts: the denominator.
        inverse_root: whether the value is one over the square root of the size, as the scale of logits is.
    """

    total: Dim
    parts: Dim
    inverse_root: bool = False

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """The groups on which it depends."""
        return self.total.groups + self.parts.groups

    def value(self, kept: Mapping[str, int]) -> int | float:
        """Return the value when group ``name`` keeps ``kept[name]`` units."""
        size = self.total.value(kept) // max(self.parts.value(kept), 1)
        return max(size, 1) ** -0.5 if self.inverse_root else size


Product = tuple[Dim | Ratio, ...]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """The cost of one step of the forward pass at batch size 1, as sums of products of dimensions.

    Attributes:
        name: name of the module, for reports.
        macs: multiply-adds of matrix products and convolutions; element-wise operations are not counted.
        params: elements of its parameters.
        live: elements of the tensors that are in memory while it runs, including its output and excluding the input
            image.
        live_if_fewer: triples (group, units, product): the product is in memory too if the group keeps fewer units.
    """

    name: str
    macs: tuple[Product, ...] = ()
    params: tuple[Product, ...] = ()
    live: tuple[Product, ...] = ()
    live_if_fewer: tuple[tuple[str, int, Product], ...] = ()


def evaluate(products: Iterable[Product], kept: Mapping[str, int]) -> int:
    """Return the sum of products of dimensions when group ``name`` keeps ``kept[name]`` units."""
    return sum(math.prod(int(dim.value(kept)) for dim in product) for product in products)


class Formulas:
    """The costs of all operations, compiled to arrays so that one evaluation takes tens of microseconds.

    Numbers are float64, which is exact below 2**53 (about 9e15).

    Args:
        operations: the forward pass.
        names: names of the groups.
    """

    def __init__(self, operations: Sequence[Operation], names: Sequence[str]) -> None:
        self._names = names
        self._compiler = compiler = _Compiler({name: place for place, name in enumerate(names)})
        self._params = compiler.products(product for operation in operations for product in operation.params)
        self._macs = compiler.products(product for operation in operations for product in operation.macs)
        always = [(number, product) for number, operation in enumerate(operations) for product in operation.live]
        once = [(number, *each) for number, operation in enumerate(operations) for each in operation.live_if_fewer]
        self._live = compiler.products([product for _, product in always] + [product for *_, product in once])
        self._owner = np.array([number for number, *_ in (*always, *once)], dtype=int)
        self._always = len(always)
        self._once_group = np.array([compiler.place[group] for _, group, _, _ in once], dtype=int)
        self._once_units = np.array([units for _, _, units, _ in once], dtype=float)
        self._quotients = compiler.quotients()
        self._fixed, self._weights = compiler.matrices()

    def evaluate(self, kept: Mapping[str, int]) -> tuple[int, int, int]:
        """Return parameters, multiply-adds and peak elements in memory, given the kept units per group."""
        counts = np.array([kept[name] for name in self._names], dtype=float)
        values = self._fixed + self._weights @ counts
        if len(self._quotients):
            at, total, parts = self._quotients.T
            values[at] = values[total] // np.maximum(values[parts], 1)
        alive = values[self._live].prod(1)
        alive[self._always :] *= counts[self._once_group] < self._once_units
        most = np.bincount(self._owner, alive).max(initial=0.0)
        return int(values[self._params].prod(1).sum()), int(values[self._macs].prod(1).sum()), int(most)


class _Compiler:
    """Assigns an index to each distinct dimension."""

    def __init__(self, place: Mapping[str, int]) -> None:
        self.place = place
        self.dims: dict[Dim | Ratio, int] = {Dim(fixed=1): 0}

    def products(self, products: Iterable[Product]) -> npt.NDArray[np.int_]:
        """Indices of the dimensions of each product, shape (products, most dimensions), padded with the dimension 1."""
        rows = [[self.dims.setdefault(dim, len(self.dims)) for dim in product] for product in products]
        longest = max((len(row) for row in rows), default=1)
        return np.array([row + [0] * (longest - len(row)) for row in rows], dtype=int).reshape(len(rows), longest)

    def quotients(self) -> npt.NDArray[np.int_]:
        """Indices of each quotient, of its numerator and of its denominator, shape (quotients, 3)."""
        ratios = [dim for dim in self.dims if isinstance(dim, Ratio)]
        parts = [(ratio, ratio.total, ratio.parts) for ratio in ratios]
        rows = [[self.dims.setdefault(dim, len(self.dims)) for dim in each] for each in parts]
        return np.array(rows, dtype=int).reshape(len(rows), 3)

    def matrices(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the fixed parts, shape (dimensions,), and the weights, shape (dimensions, groups)."""
        weights = np.zeros((len(self.dims), len(self.place)))
        dims = {dim: row for dim, row in self.dims.items() if isinstance(dim, Dim)}
        for dim, row in dims.items():
            for name, weight in dim.groups:
                weights[row, self.place[name]] += weight
        fixed = np.zeros(len(self.dims))
        fixed[list(dims.values())] = [dim.fixed for dim in dims]
        return fixed, weights
