"""Read a model, and keep it together with its anatomy for all steps of the method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from slimming.core.copies import copied
from slimming.core.example_inputs import ExampleCall, given_calls, image_call
from slimming.core.groups import Anatomy
from slimming.core.modules import check_whole
from slimming.models.families import family_called, family_of
from slimming.models.family import Family


@dataclass(frozen=True, kw_only=True)
class PrunableModel:
    """A model that has been read. Public functions read a model once and pass this object on.

    Attributes:
        model: the model itself, not a copy.
        family: the family that read it.
        anatomy: its groups, cost formulas, structure and input shape.
    """

    model: nn.Module
    family: Family
    anatomy: Anatomy

    def copy(self) -> PrunableModel:
        """The same with a deep copy of the model."""
        return replace(self, model=copied(self.model))

    def examples(self, batch: int = 1) -> tuple[ExampleCall, ...]:
        """Example calls of the model, each for ``batch`` examples, in its dtype and on its device.

        The costs of a model are those of the first call.
        """
        like = next(self.model.parameters())
        calls = given_calls(self.model) if self.family.runs_models else ()
        calls = calls or (image_call(self.anatomy.input_shape),)
        return tuple(call.with_batch(batch).to(like.dtype, like.device) for call in calls)


def read(model: nn.Module) -> PrunableModel:
    """Read a model that has no masks attached.

    Raises:
        UnsupportedModelError: the model, or a part of it, is not supported.
        ConfigError: the weights are sharded.
    """
    check_whole(model)
    family = family_of(model)
    return PrunableModel(model=model, family=family, anatomy=family.read(model))


def read_as(model: nn.Module, anatomy: Anatomy) -> PrunableModel:
    """Combine ``model`` with an ``anatomy`` that was read before, for example from the same model without masks."""
    return PrunableModel(model=model, family=family_called(anatomy.structure.family), anatomy=anatomy)
