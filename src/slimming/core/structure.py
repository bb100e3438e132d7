"""Structures: what a model looks like without its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from slimming.core.files import FORMAT, check_format
from slimming.errors import CheckpointError


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
        check_format(value, source)
        try:
            return Structure(family=value["family"], base=dict(value["base"]), layers=dict(value["layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source} is damaged: {error!r}. Take an intact copy.") from error
