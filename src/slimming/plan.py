"""Budgets, plans and structures: the plain data that decides what a slim model is, with their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slimming.errors import BudgetError, CheckpointError, ConfigError, PlanError, nearest
from slimming.io import atomic_json, seal, unseal

FORMAT = 1
"""Version of the JSON formats below; a file with a larger number is refused."""

KINDS = ("head_dim", "head", "mlp", "channel", "token", "block", "width")
"""The kinds of unit, in the order in which they are shown."""
ON_REQUEST = ("block", "width")
"""Kinds that are left whole unless they are named."""

METRICS = ("params", "macs", "memory_bytes", "latency", "latency_ms")
"""What a budget can limit, see `slimming.cost.Cost` and `slimming.latency`."""

LEAST_ABSOLUTE = 1000
"""Limits from here on are absolute numbers; a limit between 1 and this is taken for a mistake."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the slim model may cost.

    Give keep ratios per kind, or one or more limits, which then all hold. A limit of ``params``, ``macs`` or
    ``memory_bytes`` in (0, 1] is a share of the dense model, one of 1000 or more is absolute.

    Attributes:
        keep: kind of unit -> share of its units that may stay, over the whole network (ViT-Slim, section 3.3).
        params: parameters.
        macs: multiply-adds of one image.
        memory_bytes: weights and peak activations of one image, in float32; see `slimming.cost`.
        latency: share of the dense model's time of one pass, by a latency table.
        latency_ms: milliseconds of one pass, by a latency table.

    Raises:
        BudgetError: nothing was given, or a limit is neither a share nor an absolute number.

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
        limits = self.limits
        for name, value in limits.items():
            self._check(name, value, absolute=name != "latency")
        if self.keep is not None:
            if not self.keep or limits:
                raise BudgetError(f"A budget takes keep ratios alone (at least one), or {', '.join(METRICS)}.")
            for kind, ratio in self.keep.items():
                if kind not in KINDS:
                    hint = nearest(kind, KINDS)
                    raise BudgetError(f"There is no kind {kind!r}; kinds are {', '.join(KINDS)}.{hint}")
                self._check(f"keep[{kind!r}]", ratio, absolute=False)
        elif not limits:
            raise BudgetError('A budget needs a limit: Budget(macs=0.5), or params=…, or keep={"mlp": 0.7}.')

    @staticmethod
    def _check(name: str, value: Any, *, absolute: bool) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if name == "latency_ms":
            if not number or value <= 0:
                raise BudgetError(f"Budget latency_ms={value} is no time; give milliseconds above 0.")
        elif not number or not (0 < value <= 1 or (absolute and value >= LEAST_ABSOLUTE)):
            rest = f"; or an absolute number of {LEAST_ABSOLUTE} or more" if absolute else ""
            raise BudgetError(
                f"Budget {name}={value} is not a share of the dense model; give a number above 0 and at most 1{rest}."
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that were given, by metric."""
        return {name: value for name in METRICS if (value := getattr(self, name)) is not None}

    def absolute(self, dense: Mapping[str, float]) -> dict[str, float]:
        """The limits as numbers, given those of the dense model."""
        return {name: value * dense[name] if self.is_share(name) else value for name, value in self.limits.items()}

    def alone(self, name: str) -> Budget:
        """The budget with one of its limits."""
        return replace(self, **{other: None for other in METRICS if other != name})

    def is_share(self, name: str) -> bool:
        """Whether the limit ``name`` is a share of the dense model."""
        return name != "latency_ms" and self.limits[name] <= 1

    @property
    def name(self) -> str:
        """A name for files and tables, such as ``"macs-0.50"``."""
        values = self.keep if self.keep is not None else self.limits
        return "_".join(
            f"{key}-{values[key]:g}" if key == "latency_ms" else f"{key}-{_short(values[key])}"
            for key in sorted(values)
        )

    def to_dict(self) -> dict[str, Any]:
        """The limits that were given, as JSON takes them."""
        return {"keep": dict(self.keep)} if self.keep is not None else dict(self.limits)


def _short(value: float) -> str:
    """A share with two digits or as many as it has, or an absolute number with its unit."""
    if value <= 1:
        return max(f"{value:.2f}", f"{value:.6g}", key=len)
    size, letter = next(unit for unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= unit[0])
    return f"{value / size:.6g}{letter}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which sizes a plan may give to the layers; sizes decide how fast the hardware runs.

    Attributes:
        equal_heads: all heads of a layer keep the same number of dimensions, QK and V alike, so that the
            host's own attention module stays. Otherwise each head keeps what its scores say.
        equal_qkv: a head's QK and V keep the same number of dimensions, which fused attention kernels ask for; heads
            of one size always do.
        multiple: head dimensions (per head) and hidden units stay in multiples of this; null: of what a latency table
            found fast on its device where a plan is made with one, of 8 elsewhere. It is halved where a layer would
            otherwise have fewer than four sizes to choose from.
        scarcity: a channel's score is divided by the share of its group that is still there at its turn, to this power;
            0: it counts the same however few are left. Scores tell what single channels matter while the others are
            there, and too little of a layer that loses nearly all of them.

    Raises:
        ConfigError: ``multiple`` is below 1, or ``scarcity`` below 0.
    """

    equal_heads: bool = True
    equal_qkv: bool = True
    multiple: int | None = None
    scarcity: float = 2.0

    def __post_init__(self) -> None:
        if not (self.scarcity >= 0 and math.isfinite(self.scarcity)):
            raise ConfigError(f"layout.scarcity={self.scarcity}: give a power of 0 (as scored) or more, such as 2.")
        if self.multiple is not None and self.multiple < 1:
            raise ConfigError(f"layout.multiple={self.multiple}: give 1 (any size) or more, for example 8.")


SOLVERS = ("nested", "exact")
"""Ways to make a plan under limits, see `slimming.plan`."""

FREE = Layout(equal_heads=False, equal_qkv=False, multiple=1, scarcity=0.0)
"""Every unit on its own, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a model looks like without its weights: enough to build it again.

    Attributes:
        family: name of the family that reads and builds it.
        base: how the host makes the dense architecture (names and arguments, plain data).
        layers: what differs from it, layer by layer; empty for a dense model.
    """

    family: str
    base: dict[str, Any]
    layers: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The structure as JSON takes it."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_dict(value: Any, *, source: str = "structure") -> Structure:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: it is malformed or of a newer format.
        """
        _check_format(value, source)
        try:
            return Structure(family=value["family"], base=dict(value["base"]), layers=dict(value["layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source} is damaged: {error!r}. Take an intact copy.") from error


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which units stay, per group. Nothing else decides a cut.

    Attributes:
        kept: group name -> kept units, ascending.
        sizes: group name -> number of units in the model that the plan was made for.
        budget: the budget that it answers, as `Budget.to_dict` gives it.
        solution: how the units were chosen under limits: ``solver``, ``kept_score`` (share of the total score that
            stays) and ``lost_score`` (the total of what goes: where sensitivity was measured, by how much the loss is
            expected to grow); of the exact solver also ``gap`` (by how much of the total score a better choice could
            be, at most), and with a latency table the ``latency_ms`` that it says.
        fold: True multiplies the learned factors into the weights at the cut (exact); False makes the masks of
            what stays 1, as the paper does.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    budget: Mapping[str, Any] = field(default_factory=dict)
    solution: Mapping[str, Any] = field(default_factory=dict)
    fold: bool = True

    def __post_init__(self) -> None:
        if set(self.kept) != set(self.sizes):
            raise PlanError("A plan needs the size of each group that it names; the two sets of names differ.")

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            OutputError: the place is not writable, or the disk is full.
        """
        atomic_json(Path(path), seal(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        groups = {name: {"size": self.sizes[name], "kept": list(units)} for name, units in self.kept.items()}
        how = {"budget": dict(self.budget), "solution": dict(self.solution), "fold": self.fold}
        return {"format": FORMAT, **how, "groups": groups}

    @staticmethod
    def from_dict(value: Any, *, source: str = "plan") -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: it is malformed or of a newer format.
        """
        _check_format(value, source)
        try:
            groups = value["groups"]
            kept = {name: tuple(int(unit) for unit in entry["kept"]) for name, entry in groups.items()}
            sizes = {name: int(entry["size"]) for name, entry in groups.items()}
            solution = dict(value.get("solution", {}))
            return Plan(kept=kept, sizes=sizes, budget=value["budget"], solution=solution, fold=bool(value["fold"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{source} is damaged: {error!r}. Make the plan again.") from error

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or of a newer format.
        """
        return Plan.from_dict(read_sealed(Path(path)), source=str(path))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist. Give the path that slimming wrote.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON ({error}). Take an intact copy.") from error


def read_sealed(path: Path) -> Any:
    """Read a JSON file that carries its own checksum.

    Raises:
        CheckpointError: it is missing, not JSON, or not as it was written.
    """
    value, intact = unseal(read_json(path))
    if not intact:
        raise CheckpointError(
            f"{path} is not as it was written: its checksum differs. Take an intact copy, or, if you changed it on "
            'purpose, remove its "sha256" entry.'
        )
    return value


def _check_format(value: Any, source: str) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        raise CheckpointError(f"{source} is not a file of slimming: it has no format number.")
    if value["format"] > FORMAT:
        raise CheckpointError(
            f"{source} has format {value['format']}, this version of slimming reads up to {FORMAT}. "
            "Upgrade: pip install -U slimming."
        )
