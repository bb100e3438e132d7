"""The settings of a search and their presets. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from slimming.core.argument_types import check_fields
from slimming.core.kinds import KINDS, check_kinds
from slimming.core.layout import FREE, Layout
from slimming.errors import ConfigError, nearest
from slimming.masks.options import BIAS, MULTIPLY
from slimming.scoring.registry import SCORES, score_called
from slimming.training.config import TrainConfig

RECORD = "search.json"
"""File that a search writes last, when its units are scored."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The settings of a search; `preset` returns named ones.

    Attributes:
        kinds: kinds of units with masks; None selects the default kinds of the model, see
            `slimming.masks.attachment.select_kinds`.
        coupled: whether QK and V share one mask, as in the ViT-Slim paper.
        tokens: how token masks act: ``"bias"`` (exact) or ``"multiply"`` (as in the paper).
        norms: whether the scales of BatchNorms are the masks of their channels (Network Slimming); groups without a
            BatchNorm get soft masks.
        penalty: kind -> weight of its l1 penalty.
        penalty_sum: whether the weights multiply sums over units, as in the paper, instead of means.
        score: score by which units are ranked, one of `slimming.scoring.registry.SCORES`. With a custom loss, its
            gradients replace those of the log-likelihood. It may be changed after the training.
        rotate: whether to change the bases of attention heads before the training, see `slimming.scoring.rotation`;
            skipped if the training images can be iterated only once.
        images: number of training images, used without labels, for ``rotate`` and ``score``. Without ``rotate``, it
            may be changed after the training.
        fold: whether the cut multiplies the learned factors into the weights; False sets them to 1, as in the paper.
        mask_lr: learning rate of the masks as a multiple of that of the weights.
        layout: sizes that plans may give to the layers.
        sensitivity: number of images on which the loss is measured after the training with each kind alone pruned, so
            that kinds are weighed against each other; 0 skips this. Without it, the scores ``"taylor"`` and
            ``"contribution"`` are not comparable between kinds. It may be changed after the training.
        train: settings of the training.

    Raises:
        ConfigError: a kind, score or token variant is unknown, or a number is out of range.
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
        check_fields(self)
        check_kinds((*(self.kinds or ()), *self.penalty), ConfigError)
        if self.kinds is not None and not self.kinds:
            raise ConfigError("search.kinds is empty: there is nothing to search. Name at least one kind.")
        if score_called(self.score).needs_training and self.train.steps == 0:
            untrained = ", ".join(name for name, score in SCORES.items() if not score.needs_training)
            raise ConfigError(
                f"search.train.steps is 0, but score {self.score!r} is collected during training. Train, or take one "
                f"of {untrained}."
            )
        if self.images < 1:
            raise ConfigError(f"search.images is {self.images}; it must be at least 1.")
        if self.tokens not in (BIAS, MULTIPLY):
            raise ConfigError(f"search.tokens={self.tokens!r}: give {BIAS!r} or {MULTIPLY!r}.")
        if any(weight < 0 for weight in self.penalty.values()) or self.mask_lr <= 0:
            raise ConfigError("Penalty weights must be at least 0 and mask_lr above 0.")
        if self.sensitivity < 0:
            raise ConfigError(f"search.sensitivity is {self.sensitivity} images; it must be at least 0.")


def scoring_settings(config: SearchConfig) -> tuple[str, ...]:
    """Return the settings that only matter after the training of a search, so that they may change until then."""
    return ("score", "sensitivity") if config.rotate else ("score", "sensitivity", "images")


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
"""Named settings, see `preset`."""


def preset(name: str) -> SearchConfig:
    """Return the settings called ``name``: ``"default"``, ``"paper"`` or ``"network-slimming"``.

    ``"paper"`` reproduces ViT-Slim (section 4.1), ``"network-slimming"`` reproduces Liu et al. 2017.

    Raises:
        ConfigError: there is no such preset.

    >>> preset("paper").train.batch_size
    1024
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; presets are {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return PRESETS[name]()
