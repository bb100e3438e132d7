"""What a search is told: its settings, and the named ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slimming.core.kinds import KINDS, check_kinds
from slimming.core.layout import FREE, Layout
from slimming.errors import ConfigError, nearest
from slimming.masks.tokens import BIAS, MULTIPLY
from slimming.scoring.registry import SCORES, score_called
from slimming.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a search is done. `preset` gives the named ones.

    Attributes:
        kinds: kinds of units that can be removed; None takes those that the model has, except the ones on request.
        coupled: one mask for query-key and value dimensions together, as in ViT-Slim.
        tokens: how token masks act: ``"bias"`` (exact) or ``"multiply"`` (as in ViT-Slim).
        norms: use the scales of BatchNorms as masks of their channels (Network Slimming); other groups get a soft mask.
        penalty: kind -> weight of its l1 penalty.
        penalty_sum: penalty weights multiply sums over units, as in the papers, instead of means.
        score: the score that units are ranked by, one of `slimming.scoring.registry.SCORES`. With a loss of your own,
            its derivatives replace those of the log-likelihood.
        rotate: before training, rotate attention heads into bases in which few dimensions carry most of the signal, see
            `slimming.scoring.rotation`; left out if the training images can be iterated over only once.
        images: how many training images to use for ``rotate`` and ``score``; labels are not used.
        fold: multiply the learned factors into the weights at the cut; False sets them to 1, as in ViT-Slim.
        mask_lr: learning rate of the masks, as a multiple of that of the weights.
        layout: which sizes plans give to the layers.
        sensitivity: how many images to use after training to measure the loss when each kind alone is cut, which
            weighs the kinds against each other; 0 leaves it out. Scores ``"taylor"`` and ``"contribution"`` are not
            comparable between kinds without it.
        train: the training of weights and masks; ``steps`` 0 scores the model as it is (one-shot).

    Raises:
        ConfigError: an unknown kind, score or token variant, or a negative weight.
    """

    kinds: tuple[str, ...] | None = None
    coupled: bool = False
    tokens: str = BIAS
    norms: bool = False
    penalty: Mapping[str, float] = field(default_factory=lambda: {name: kind.penalty for name, kind in KINDS.items()})
    penalty_sum: bool = False
    score: str = "compensated"
    rotate: bool = True
    images: int = 512
    fold: bool = True
    mask_lr: float = 1.0
    layout: Layout = field(default_factory=Layout)
    sensitivity: int = 0
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0, lr=1e-4, schedule="constant"))

    def __post_init__(self) -> None:
        check_kinds((*(self.kinds or ()), *self.penalty), ConfigError)
        if self.kinds is not None and not self.kinds:
            raise ConfigError("search.kinds is empty: there is nothing to search. Name at least one kind.")
        if score_called(self.score).needs_training and self.train.steps == 0:
            untrained = ", ".join(name for name, score in SCORES.items() if not score.needs_training)
            raise ConfigError(
                f"search.train.steps is 0, and score {self.score!r} is collected in training. Train, or take one of "
                f"{untrained}."
            )
        if self.images < 1:
            raise ConfigError(f"search.images is {self.images}; it must be at least 1.")
        if self.tokens not in (BIAS, MULTIPLY):
            raise ConfigError(f"search.tokens={self.tokens!r}: give {BIAS!r} or {MULTIPLY!r}.")
        if any(weight < 0 for weight in self.penalty.values()) or self.mask_lr <= 0:
            raise ConfigError("Penalty weights must be at least 0 and mask_lr above 0.")
        if self.sensitivity < 0:
            raise ConfigError(f"search.sensitivity is {self.sensitivity} images; it must be at least 0.")


def _paper() -> SearchConfig:
    return SearchConfig(
        coupled=True,
        tokens=MULTIPLY,
        penalty={"head_dim": 2e-4, "mlp": 5e-5, "token": 1e-4},
        penalty_sum=True,
        score="mask",
        rotate=False,
        fold=False,
        layout=FREE,
        train=TrainConfig(
            epochs=50.0,
            batch_size=1024,
            lr=5e-4,
            weight_decay=1e-3,
            schedule="constant",
            clip_grad=None,
            label_smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
        ),
    )


def _network_slimming() -> SearchConfig:
    return SearchConfig(
        kinds=("channel",),
        norms=True,
        penalty={"channel": 1e-4},
        penalty_sum=True,
        score="mask",
        rotate=False,
        layout=FREE,
        train=TrainConfig(
            epochs=160.0,
            batch_size=64,
            optimizer="nesterov",
            lr=0.1,
            weight_decay=1e-4,
            schedule="step",
            warmup_epochs=0.0,
            clip_grad=None,
            label_smoothing=0.0,
        ),
    )


PRESETS: Mapping[str, Callable[[], SearchConfig]] = {
    "default": SearchConfig,
    "paper": _paper,
    "network-slimming": _network_slimming,
}
"""The named searches, see `preset`."""


def preset(name: str) -> SearchConfig:
    """The search called ``name``: ``"default"``, ``"paper"`` or ``"network-slimming"``.

    ``"paper"`` is ViT-Slim to the letter (section 4.1), ``"network-slimming"`` is Liu et al. 2017.

    Raises:
        ConfigError: there is no such preset.

    >>> preset("paper").train.batch_size
    1024
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; presets are {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return PRESETS[name]()


def config_from_dict(value: Mapping[str, Any]) -> SearchConfig:
    """A `SearchConfig` from what `dataclasses.asdict` and JSON made of one."""
    nested = {"layout": Layout(**value["layout"]), "train": TrainConfig(**_tuples(value["train"]))}
    return SearchConfig(**{**_tuples(value), **nested})


def _tuples(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items()}
