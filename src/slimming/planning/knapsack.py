"""Knapsack with several limits and precedence constraints, by linear and mixed-integer programming."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slimming.errors import BudgetError

Array = npt.NDArray[Any]

SECONDS = 20.0
"""Time limit of one solve in seconds; the best choice found until then is used, with its gap."""
GAP = 5e-4
"""Relative gap at which a solve ends."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A choice of items.

    Attributes:
        kept: for each item, whether it is kept.
        value: total value of the kept items.
        bound: upper bound on the total value of any choice.
    """

    kept: tuple[bool, ...]
    value: float
    bound: float


def knapsack(
    values: npt.ArrayLike,
    prices: Mapping[str, npt.ArrayLike],
    room: Mapping[str, float],
    before: Sequence[tuple[int, int]],
) -> Solution | None:
    """Return the choice of items with the largest total value within every limit.

    The solution of the linear relaxation keeps only few items partially. If leaving these out and filling the remaining
    room comes within `GAP` of its value, this is the result; otherwise HiGHS branches (`scipy.optimize.milp`).

    Args:
        values: value of each item, at least 0.
        prices: limit -> price of each item, at least 0.
        room: limit -> largest total price.
        before: pairs (first, then): if ``first`` is kept, ``then`` must be kept.

    Returns:
        The best choice, or None if no choice is within the limits.

    Raises:
        BudgetError: the solver failed.
    """
    value = np.asarray(values, dtype=float)
    if any(limit < 0 for limit in room.values()):
        return None
    price = np.asarray([prices[name] for name in prices], dtype=float)
    limit = np.asarray([room[name] for name in prices], dtype=float)
    relaxed = _solve(value, price, limit, before, whole=False)
    bound = -relaxed.fun
    kept = _filled(relaxed.x > 1 - 1e-6, value, price, limit, before)
    if bound - value[kept].sum() > GAP * bound:
        try:
            solution = _solve(value, price, limit, before, whole=True)
        except BudgetError:
            pass  # the rounded solution is used instead
        else:
            bound = min(bound, -solution.mip_dual_bound)
            if value[solution.x > 0.5].sum() > value[kept].sum():
                kept = solution.x > 0.5
    return Solution(kept=tuple(bool(one) for one in kept), value=float(value[kept].sum()), bound=float(bound))


def _solve(value: Array, price: Array, limit: Array, before: Sequence[tuple[int, int]], *, whole: bool) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    # Scaled, so that the tolerances of the solver do not depend on the unit of a limit.
    scale = np.maximum(np.maximum(limit, price.max(1, initial=0.0)), 1e-30)
    upper: Any = limit / scale
    constraints = [LinearConstraint(price / scale[:, None], -np.inf, upper)]
    if before:
        rows = np.repeat(np.arange(len(before)), 2)
        signs = np.tile([1.0, -1.0], len(before))
        order = coo_array((signs, (rows, np.asarray(before).reshape(-1))), shape=(len(before), len(value)))
        constraints.append(LinearConstraint(order.tocsr(), -np.inf, 0.0))
    largest = max(float(value.max(initial=0.0)), 1e-30)
    options = {"time_limit": SECONDS, "mip_rel_gap": GAP / 2}
    with silenced():
        result = milp(
            -value / largest, integrality=np.full(len(value), int(whole)), bounds=Bounds(0, 1), constraints=constraints,
            options=options,
        )  # fmt: skip
    if result.x is None:
        raise BudgetError(f"The exact solver failed ({result.message}). Plan with solver='nested'.")
    result.fun *= largest
    if whole:
        result.mip_dual_bound *= largest
    return result


@contextmanager
def silenced() -> Iterator[None]:
    """Discard the standard output of the process: HiGHS prints to it regardless of its options.

    Up to SciPy 1.17, a bare ``printf`` in its branching sometimes reports that a relaxation is solved again, even with
    ``disp`` off. Using HiGHS without SciPy does not help: highspy 1.12 has the same ``printf``, and 1.16 prints a
    banner when a solver is created.
    """
    sys.stdout.flush()
    try:
        out = os.dup(1)
    except OSError:  # standard output has no file descriptor
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with suppress(OSError, AttributeError, TypeError):  # flushes the buffer of C's stdio, where it is available
            ctypes.CDLL(None).fflush(None)
        os.dup2(out, 1)
        os.close(out)


def _filled(kept: Array, value: Array, price: Array, limit: Array, before: Sequence[tuple[int, int]]) -> Array:
    """``kept`` with further items that fit, in descending order of value per price."""
    kept = kept.copy()
    required: dict[int, list[int]] = {}
    for first, then in before:
        required.setdefault(first, []).append(then)
    left = limit - price[:, kept].sum(1)
    density = value / np.maximum((price / np.maximum(limit, 1e-30)[:, None]).sum(0), 1e-30)
    waiting = [int(item) for item in np.argsort(-density, kind="stable") if not kept[item]]
    added = True
    while added:
        added = False
        for item in waiting:
            if not kept[item] and (price[:, item] <= left).all() and all(kept[then] for then in required.get(item, ())):
                kept[item] = added = True
                left = left - price[:, item]
    return kept
