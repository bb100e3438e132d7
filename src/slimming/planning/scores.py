"""The scores of a model's units, and the files in which they are saved."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
from torch import Tensor

from slimming.checkpoints import checkpoint
from slimming.core.files import FORMAT, atomic_write_bytes, seal
from slimming.core.groups import Anatomy
from slimming.core.layout import Layout
from slimming.core.records import FileKind
from slimming.core.structure import Structure
from slimming.errors import CheckpointError
from slimming.models.prunable import read
from slimming.planning.sensitivity import Sensitivity


@dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """The scores of a model's units, with the default options of plans that are made from them.

    Attributes:
        anatomy: anatomy of the model.
        scores: group name -> score of each unit, shape (size,).
        layout: sizes that plans may give to the layers.
        fold: see `Plan`.
        sensitivity: increase of the loss when units of each kind are removed, see `slimming.scoring.sensitivity`; None
            if it was not measured.
    """

    anatomy: Anatomy
    scores: Mapping[str, Tensor]
    layout: Layout = field(default_factory=Layout)
    fold: bool = True
    sensitivity: Sensitivity | None = None


class HasScores(abc.ABC):
    """An object from which plans can be made, such as a search result."""

    @property
    @abc.abstractmethod
    def scored(self) -> ScoredModel:
        """The scores from which plans are made."""


class ScoresContent(msgspec.Struct, frozen=True):
    """The metadata of a scores file."""

    structure: Structure
    scores_sha256: str
    layout: Layout
    fold: bool
    sensitivity: Sensitivity | None


SCORES = FileKind(name="the scores of a search", schema=ScoresContent)


def save_scores(path: str | Path, scored: ScoredModel) -> None:
    """Write scores together with the structure of their model, so that plans can be made without the model.

    Raises:
        OutputError: ``path`` is not writable, or the disk is full.
    """
    entry = {
        "format": FORMAT,
        "structure": scored.anatomy.structure.to_dict(),
        "scores_sha256": _digest(scored.scores),
        "layout": asdict(scored.layout),
        "fold": scored.fold,
        "sensitivity": None if scored.sensitivity is None else scored.sensitivity.to_dict(),
    }
    metadata = {"slimming": json.dumps(seal(entry))}
    atomic_write_bytes(Path(path), checkpoint.dump_tensors(scored.scores, metadata))


def _digest(scores: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(checkpoint.dump_tensors(scores)).hexdigest()


def load_scores(path: str | Path) -> ScoredModel:
    """Read what `save_scores` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or of a newer format.
    """
    path = Path(path)
    scores, metadata = checkpoint.read_tensors(path), checkpoint.read_metadata(path)
    if "slimming" not in metadata:
        raise CheckpointError(f"{path} is not a scores file of slimming. Give one that slimming search wrote.")
    content = SCORES.parse(metadata["slimming"], str(path))
    if content.scores_sha256 != _digest(scores):
        raise CheckpointError(f"{path} was changed after it was written: its checksum differs. Take an intact copy.")
    return ScoredModel(
        anatomy=read(checkpoint.build(content.structure)).anatomy,
        scores=scores,
        layout=content.layout,
        fold=content.fold,
        sensitivity=content.sensitivity,
    )
