"""The settings of distillation. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass

from slimming.core.argument_types import check_fields
from slimming.training.config import check_distillation


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How a model learns from a teacher.

    Attributes:
        alpha: weight of the teacher in the loss, 0 (labels only) to 1.
        temperature: temperature of both distributions.
        features: modules of teacher and student whose outputs are matched too, such as ``"blocks.5"``.
        feature_weight: weight of the feature loss.
        pool: part of the outputs that is matched: the ``"first"`` token or the ``"mean"`` over tokens.
        relations: modules whose outputs (B, N, D) are matched by the relations between their tokens, such as
            ``"blocks.5.attn.qkv"`` (MiniLMv2, Wang et al. 2021); the widths D may differ.
        relation_weight: weight of the relation loss.
        relation_heads: number of parts into which D is split, each with separate relations; a multiple of 3 that
            divides D separates queries, keys and values of a ``qkv`` layer.

    Raises:
        ConfigError: ``alpha``, ``temperature``, ``pool`` or ``relation_heads`` is out of range.
    """

    alpha: float = 0.8
    temperature: float = 2.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    pool: str = "first"
    relations: tuple[str, ...] = ()
    relation_weight: float = 1.0
    relation_heads: int = 12

    def __post_init__(self) -> None:
        check_fields(self)
        check_distillation(self.alpha, self.temperature, self.pool, self.relation_heads)
