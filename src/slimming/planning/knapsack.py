"""Which items to keep under several limits: a knapsack by linear and mixed-integer programming."""

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
"""Time limit of one solve; what was found until then is used, with its gap."""
GAP = 5e-4
"""Share of the value within which a solve may end."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A choice of items.

    Attributes:
        kept: for each item, whether it stays.
        value: total value of what stays.
        bound: no choice is worth more than this.
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
    """Keep the items of the largest total value that fit into every limit.

    The linear relaxation has few items in parts; where leaving those out and filling up comes within `GAP` of its
    value, that is the answer, and otherwise HiGHS branches (`scipy.optimize.milp`).

    Args:
        values: of each item, at least 0.
        prices: per limit, what each item takes of it, at least 0.
        room: per limit, how much there is.
        before: pairs (first, then): if ``first`` stays, ``then`` stays.

    Returns:
        The best choice, or None if none fits.

    Raises:
        BudgetError: the solver failed.
    """
    worth = np.asarray(values, dtype=float)
    if any(limit < 0 for limit in room.values()):
        return None
    price = np.asarray([prices[name] for name in prices], dtype=float)
    limit = np.asarray([room[name] for name in prices], dtype=float)
    relaxed = _solve(worth, price, limit, before, whole=False)
    bound = -relaxed.fun
    kept = _filled(relaxed.x > 1 - 1e-6, worth, price, limit, before)
    if bound - worth[kept].sum() > GAP * bound:
        try:
            found = _solve(worth, price, limit, before, whole=True)
        except BudgetError:
            pass  # the rounded answer holds too
        else:
            bound = min(bound, -found.mip_dual_bound)
            if worth[found.x > 0.5].sum() > worth[kept].sum():
                kept = found.x > 0.5
    return Solution(kept=tuple(bool(one) for one in kept), value=float(worth[kept].sum()), bound=float(bound))


def _solve(worth: Array, price: Array, limit: Array, before: Sequence[tuple[int, int]], *, whole: bool) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    # Scaled, so that the solver's tolerances mean the same for bytes and for shares.
    scale = np.maximum(np.maximum(limit, price.max(1, initial=0.0)), 1e-30)
    upper: Any = limit / scale
    rules = [LinearConstraint(price / scale[:, None], -np.inf, upper)]
    if before:
        rows = np.repeat(np.arange(len(before)), 2)
        signs = np.tile([1.0, -1.0], len(before))
        order = coo_array((signs, (rows, np.asarray(before).reshape(-1))), shape=(len(before), len(worth)))
        rules.append(LinearConstraint(order.tocsr(), -np.inf, 0.0))
    unit = max(float(worth.max(initial=0.0)), 1e-30)
    options = {"time_limit": SECONDS, "mip_rel_gap": GAP / 2}
    with silenced():
        found = milp(
            -worth / unit, integrality=np.full(len(worth), int(whole)), bounds=Bounds(0, 1), constraints=rules,
            options=options,
        )  # fmt: skip
    if found.x is None:
        raise BudgetError(f"The exact solver failed ({found.message}). Plan with solver='nested'.")
    found.fun *= unit
    if whole:
        found.mip_dual_bound *= unit
    return found


@contextmanager
def silenced() -> Iterator[None]:
    """Drop what goes to the process's standard output: HiGHS prints there, whatever its options say.

    Up to SciPy 1.17 a bare ``printf`` of its branching says now and then that it solves a relaxation again, with
    ``disp`` off as well. HiGHS without SciPy is no way out: highspy 1.12 has the same, and 1.16 prints a banner when a
    solver is made.
    """
    sys.stdout.flush()
    try:
        out = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with suppress(OSError, AttributeError, TypeError):  # what waits in C's buffer; not every system has it here
            ctypes.CDLL(None).fflush(None)
        os.dup2(out, 1)
        os.close(out)


def _filled(kept: Array, worth: Array, price: Array, limit: Array, before: Sequence[tuple[int, int]]) -> Array:
    """``kept``, with what else fits, the most worth for its price first."""
    kept = kept.copy()
    needs: dict[int, list[int]] = {}
    for first, then in before:
        needs.setdefault(first, []).append(then)
    left = limit - price[:, kept].sum(1)
    density = worth / np.maximum((price / np.maximum(limit, 1e-30)[:, None]).sum(0), 1e-30)
    waiting = [int(item) for item in np.argsort(-density, kind="stable") if not kept[item]]
    added = True
    while added:
        added = False
        for item in waiting:
            if not kept[item] and (price[:, item] <= left).all() and all(kept[then] for then in needs.get(item, ())):
                kept[item] = added = True
                left = left - price[:, item]
    return kept
