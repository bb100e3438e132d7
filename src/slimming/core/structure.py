"""Structures: the architecture of a model without its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from slimming.core.files import FORMAT
from slimming.core.records import FileKind


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The architecture of a model without its weights, from which the model can be rebuilt.

    Attributes:
        family: name of the family that reads and builds the model.
        base: name and arguments with which its library creates the dense architecture, as plain data.
        layers: differences from the dense architecture by layer; empty for a dense model.
        replaced: layers that the user replaced by plain layers of PyTorch, such as a classifier, by name.
    """

    family: str
    base: dict[str, Any]
    layers: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the structure as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_dict(value: Any, *, source: str = "structure") -> Structure:
        """Build a structure from what `to_dict` returned.

        Raises:
            CheckpointError: ``value`` is malformed or of a newer format.
        """
        return EMBEDDED.check(value, source)


@dataclass(frozen=True, kw_only=True)
class SavedStructure(Structure):
    """The content of a ``structure.json``: the structure, and the checksum of the file of weights beside it."""

    weights_sha256: str

    @property
    def structure(self) -> Structure:
        """The structure alone."""
        return Structure(family=self.family, base=self.base, layers=self.layers, replaced=self.replaced)


EMBEDDED = FileKind(name="a structure", schema=Structure, sealed=False)
"""The structure of a part, within that of a model."""
IN_CONFIG = FileKind(name="the structure in a config.json", schema=Structure)
"""The structure in the config.json of a model on the hub. It has a checksum of its own, which transformers keeps when
it saves the model again."""
STRUCTURE = FileKind(name="the structure.json of a model", schema=SavedStructure)
