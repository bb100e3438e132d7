"""Plans: the kept units of each group, and their JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from slimming.core.files import FORMAT
from slimming.core.records import FileKind
from slimming.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The kept units of each group, which fully determine a cut.

    Attributes:
        kept: group name -> kept units, ascending.
        sizes: group name -> number of units in the model for which the plan was made.
        budget: the budget of the plan, as returned by `Budget.to_dict`.
        solution: how the units were chosen under limits: ``solver``, ``kept_score`` (share of the total score that is
            kept) and ``lost_score`` (total score of the removed units; if sensitivity was measured, the expected
            increase of the loss). The exact solver adds ``gap`` (upper bound on the share of the total score that an
            optimal choice could keep in addition), a latency table the predicted ``latency_ms``. A plan that ends more
            than 1 % below its closest limit adds ``below`` (the share of the limit that it does not use) and ``note``.
        fold: True multiplies the learned masks into the weights at the cut (exact); False sets the masks of kept units
            to 1, as in the ViT-Slim paper.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    budget: Mapping[str, Any] = field(default_factory=dict)
    solution: Mapping[str, Any] = field(default_factory=dict)
    fold: bool = True

    def __post_init__(self) -> None:
        if set(self.kept) != set(self.sizes):
            raise PlanError("A plan needs the size of each group that it names; the two sets of names differ.")

    @property
    def note(self) -> str:
        """How far the plan ends below its limit, and why; empty if it is within 1 %."""
        return str(self.solution.get("note", ""))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON with a checksum, atomically.

        Raises:
            OutputError: ``path`` is not writable, or the disk is full.
        """
        PLAN.write(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        groups = {name: {"size": self.sizes[name], "kept": list(units)} for name, units in self.kept.items()}
        how = {"budget": dict(self.budget), "solution": dict(self.solution), "fold": self.fold}
        return {"format": FORMAT, **how, "groups": groups}

    @staticmethod
    def from_dict(value: Any, *, source: str = "plan") -> Plan:
        """Build a plan from what `to_dict` returned.

        Raises:
            CheckpointError: ``value`` is malformed or of a newer format.
        """
        return _EMBEDDED.check(value, source).plan()

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or of a newer format.
        """
        return PLAN.read(path).plan()


Count = Annotated[int, msgspec.Meta(ge=0)]


class PlannedGroup(msgspec.Struct, frozen=True):
    """The entry of one group in the file of a plan."""

    size: Count
    kept: tuple[Count, ...]

    def __post_init__(self) -> None:
        if any(after <= before for before, after in pairwise(self.kept)):
            raise ValueError("kept is not in ascending order")
        if self.kept and self.kept[-1] >= self.size:
            raise ValueError(f"kept names unit {self.kept[-1]} of {self.size}, counted from 0")


class PlanContent(msgspec.Struct, frozen=True):
    """The content of the file of a plan."""

    groups: dict[str, PlannedGroup]
    budget: dict[str, Any]
    fold: bool
    solution: dict[str, Any] = {}

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan(
            kept={name: entry.kept for name, entry in self.groups.items()},
            sizes={name: entry.size for name, entry in self.groups.items()},
            budget=self.budget,
            solution=self.solution,
            fold=self.fold,
        )


PLAN = FileKind(name="a plan", schema=PlanContent, mend="Make the plan again.")
_EMBEDDED = FileKind(name="a plan", schema=PlanContent, mend="Make the plan again.", sealed=False)
