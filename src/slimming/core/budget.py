"""Budgets: limits on the cost of a slim model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slimming.core.argument_types import plain_number
from slimming.core.kinds import check_kinds
from slimming.core.records import shown
from slimming.errors import BudgetError

LARGEST = 1e300
LEAST_ABSOLUTE = 1000
"""Limits of at least this are absolute numbers; a limit between 1 and this is an error."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A cost that a budget can limit.

    Attributes:
        label: name in tables and texts.
        description: what is counted.
        share: whether a limit of at most 1 is a share of the dense model's cost.
        absolute: whether a limit may be an absolute number.
        timed: whether the cost is looked up in a latency table.
    """

    label: str
    description: str
    share: bool = True
    absolute: bool = True
    timed: bool = False


METRICS: Mapping[str, Metric] = {
    "params": Metric(label="params", description="parameters"),
    "macs": Metric(label="MACs", description="multiply-adds of one image"),
    "memory_bytes": Metric(
        label="memory", description="bytes of the weights and the peak activations of one image, in float32"
    ),
    "latency": Metric(
        label="latency", description="share of the dense model's time of one pass", absolute=False, timed=True
    ),
    "latency_ms": Metric(label="latency", description="milliseconds of one pass", share=False, timed=True),
}
"""The metrics by name: fields of `slimming.counting.model_cost.Cost`, and the times that a latency table predicts."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on the cost of a slim model.

    Give keep ratios by kind, or one or more limits, all of which then hold. A limit of ``params``, ``macs`` or
    ``memory_bytes`` in (0, 1] is a share of the dense model's cost; a limit of 1000 or more is absolute.

    Attributes:
        keep: kind of unit -> share of its units to keep, over the whole network (ViT-Slim, section 3.3).
        params: number of parameters.
        macs: multiply-adds for one image.
        memory_bytes: bytes of the weights and the peak activations for one image, in float32; see `slimming.cost`.
        latency: share of the dense model's time of one forward pass, predicted by a latency table.
        latency_ms: milliseconds of one forward pass, predicted by a latency table.

    Raises:
        BudgetError: no limit was given, or a limit is neither a share nor an absolute number.

    >>> Budget(macs=0.5).name, Budget(macs=1.2e9, params=0.7).name
    ('macs-0.50', 'macs-1.2G_params-0.70')
    """

    keep: Mapping[str, float] | None = None
    params: float | None = None
    macs: float | None = None
    memory_bytes: float | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name in METRICS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", {kind: plain_number(ratio) for kind, ratio in self.keep.items()})
        elif self.keep is not None:
            raise BudgetError(f"Budget keep={shown(self.keep)} is not a mapping such as {{'mlp': 0.7}}.")
        limits = self.limits
        for name, value in limits.items():
            self._check(name, value, absolute=METRICS[name].absolute)
        if self.keep is not None:
            if not self.keep or limits:
                raise BudgetError(f"A budget takes either keep ratios (at least one), or {', '.join(METRICS)}.")
            for kind, ratio in self.keep.items():
                check_kinds([kind], BudgetError)
                self._check(f"keep[{kind!r}]", ratio, absolute=False)
        elif not limits:
            raise BudgetError('A budget needs a limit: Budget(macs=0.5), or params=…, or keep={"mlp": 0.7}.')

    @staticmethod
    def _check(name: str, value: Any, *, absolute: bool) -> None:
        number = type(value) in (int, float) and -LARGEST < value < LARGEST
        if name == "latency_ms":
            if not number or value <= 0:
                raise BudgetError(f"Budget latency_ms={shown(value)} is no time; give milliseconds above 0.")
        elif not number or not (0 < value <= 1 or (absolute and value >= LEAST_ABSOLUTE)):
            rest = f"; or an absolute number of {LEAST_ABSOLUTE} or more" if absolute else ""
            raise BudgetError(
                f"Budget {name}={shown(value)} is not a share of the dense model; give a number above 0 and at "
                f"most 1{rest}."
            )

    @property
    def limits(self) -> dict[str, float]:
        """The given limits by metric."""
        return {name: value for name in METRICS if (value := getattr(self, name)) is not None}

    def absolute(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Return the limits as absolute numbers, given the costs of the dense model."""
        return {name: value * dense[name] if self.is_share(name) else value for name, value in self.limits.items()}

    def alone(self, name: str) -> Budget:
        """Return the budget with only the limit ``name``."""
        return replace(self, **{other: None for other in METRICS if other != name})

    def is_share(self, name: str) -> bool:
        """Return whether the limit ``name`` is a share of the dense model's cost."""
        return METRICS[name].share and self.limits[name] <= 1

    @property
    def name(self) -> str:
        """Name in files and tables, such as ``"macs-0.50"``."""
        values = self.keep if self.keep is not None else self.limits
        return "_".join(
            f"{key}-{values[key]:g}" if key == "latency_ms" else f"{key}-{_short(values[key])}"
            for key in sorted(values)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the given limits as JSON values."""
        return {"keep": dict(self.keep)} if self.keep is not None else dict(self.limits)


def _short(value: float) -> str:
    """A share with at least two digits, or an absolute number with a unit prefix."""
    if value <= 1:
        return max(f"{value:.2f}", f"{value:.6g}", key=len)
    size, letter = next(unit for unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= unit[0])
    return f"{value / size:.6g}{letter}"
