"""The settings of distillation. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass

from slimming.training.config import check_distillation


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How a model learns from a teacher.

    Attributes:
        alpha: share of the teacher in the loss, 0 (labels only) to 1.
        temperature: softens both distributions.
        features: modules that teacher and student share whose outputs are matched too, such as ``"blocks.5"``.
        feature_weight: weight of that match.
        pool: what of the outputs is matched: the ``"first"`` token or the ``"mean"`` over tokens.
        relations: modules whose outputs (B, N, D) are matched by how their tokens relate to one another, such as
            ``"blocks.5.attn.qkv"`` (MiniLMv2, Wang et al. 2021); their widths D may differ.
        relation_weight: weight of that match.
        relation_heads: parts that D is split into, each with relations of its own; a multiple of 3 that divides D keeps
            queries, keys and values of a ``qkv`` apart.

    Raises:
        ConfigError: ``alpha``, ``temperature``, ``pool`` or ``relation_heads`` cannot be.
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
        check_distillation(self.alpha, self.temperature, self.pool, self.relation_heads)
