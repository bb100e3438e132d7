"""The mutants of `benchmarks.mutants` that no test can tell from the package."""

from __future__ import annotations

_CHANCE = "the two differ where a float equals its limit, which happens by chance only"
_GRID = "a size at which times are measured; tables of any sizes are right"
_SHAPE = "NumPy works out any dimension that is negative"
_PATIENCE = "how long a measurement takes"
EQUIVALENT: dict[str, str] = {
    "core/completion.py:36 sorted({v.part_of_unit[unit] for unit in kept[v.name]} - heads_with_qk) -> "
    "(list({v.part_of_unit[unit] for unit in kept[v.name]} - heads_with_qk))": "a set of small numbers is in order",
    "core/groups.py:263 1 -> (2)": "a mask that is longer by one place, which no unit owns",
    "core/budget.py:119 1 -> (2)": "no limit lies between 1 and 1000",
    "masks/soft_masks.py:153 0.0 -> (1.0)": "what is not finite has no share in the average",
    "masks/soft_masks.py:277 sorted(tensors) -> (list(tensors))": "masks go in any order",
    "planning/candidates.py:72 1 -> (2)": _SHAPE,
    "planning/candidates.py:227 0 -> (1)": "the name of the one chain of an attention",
    "planning/candidates.py:252 True -> (False)": "both have the same heads, which the line before compares",
    "planning/knapsack.py:72 bound - value[kept].sum() > GAP * bound -> "
    "(bound - value[kept].sum() >= GAP * bound)": _CHANCE,
    "planning/knapsack.py:89 1e-30 -> (1.0)": "a scale of the solver's rows, which both sides share",
    "planning/knapsack.py:97 1e-30 -> (1.0)": "a scale of the solver's values, which is taken out again",
    "planning/latency_measurement.py:31 0.25 -> (1.25)": _GRID,
    "planning/latency_measurement.py:31 0.5 -> (1.5)": _GRID,
    "planning/latency_measurement.py:33 0.25 -> (1.25)": _GRID,
    "planning/latency_measurement.py:35 0.25 -> (1.25)": _GRID,
    "planning/latency_measurement.py:144 most // 2 -> (most * 2)": "another point of the same line",
    "planning/latency_measurement.py:177 True -> (False)": "both are timed equally often",
    "planning/latency_measurement.py:235 True -> (False)": "there is one size per axis",
    "planning/latency_table.py:187 1 -> (2)": _SHAPE,
    "planning/latency_table.py:59 self.multiples[multiple] <= FAST -> (self.multiples[multiple] < FAST)": _CHANCE,
    "planning/latency_measurement.py:89 1.0 -> (2.0)": _PATIENCE,
    "planning/latency_measurement.py:102 5 * seconds -> (5 / seconds)": _PATIENCE,
    "planning/planner.py:124 cost[name] >= NEAR * min(limit, dense[name]) -> "
    "(cost[name] > NEAR * min(limit, dense[name]))": _CHANCE,
    "planning/planner.py:188 1 -> (2)": "that all candidates together fit is known by then",
    "planning/planner.py:206 len(limits) > 1 -> (len(limits) >= 1)": "with one limit, its own plan is the start",
    "planning/planner.py:234 gain < GAP * _kept_value(pool, best) -> (gain <= GAP * _kept_value(pool, best))": _CHANCE,
    "planning/planner.py:237 over < 0.01 * limits[m] -> (over <= 0.01 * limits[m])": _CHANCE,
    "pruning/checks.py:197 error <= EXACT -> (error < EXACT)": _CHANCE,
    "pruning/checks.py:199 distance(dense_result[0], of_masked) > 1e-6 -> "
    "(distance(dense_result[0], of_masked) >= 1e-06)": _CHANCE,
}
"""Mutants that no test can tell from the package, by their key, with the reason."""
