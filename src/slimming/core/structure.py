"""Structures: the architecture of a model without its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from slimming.core.files import FORMAT, check_format
from slimming.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The architecture of a model without its weights, from which the model can be rebuilt.

    Attributes:
        family: name of the family that reads and builds the model.
        base: name and arguments with which its library creates the dense architecture, as plain data.
        layers: differences from the dense architecture by layer; empty for a dense model.
    """

    family: str
    base: dict[str, Any]
    layers: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the structure as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_dict(value: Any, *, source: str = "structure") -> Structure:
        """Build a structure from what `to_dict` returned.

        Raises:
            CheckpointError: ``value`` is malformed or of a newer format.
        """
        check_format(value, source)
        try:
            return Structure(family=value["family"], base=dict(value["base"]), layers=dict(value["layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source} is damaged: {error!r}. Take an intact copy.") from error
