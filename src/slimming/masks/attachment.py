"""The stages as functions of a model: describe, attach, plan, cut, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from slimming.core.groups import Group
from slimming.core.kinds import KINDS
from slimming.errors import ConfigError
from slimming.masks.soft_masks import SoftMasks, attach_, attached
from slimming.models.prunable import PrunableModel, read, read_as


def prunable(model: nn.Module) -> PrunableModel:
    """Read ``model``, with or without masks attached.

    Raises:
        UnsupportedModelError: no family reads the model.
    """
    masks = attached(model)
    return read(model) if masks is None else read_as(model, masks.anatomy)


def describe(model: nn.Module, *, coupled: bool = False) -> tuple[Group, ...]:
    """List the groups of units that can be removed from ``model``, with sizes and limits. The model is not changed.

    Args:
        model: a model that a family reads, dense or slim.
        coupled: True gives one group per attention for QK and V together, as in the paper; False gives two.

    Raises:
        UnsupportedModelError: no family reads the model, or one of its parts.

    >>> import timm, slimming
    >>> groups = slimming.describe(timm.create_model("test_vit"))
    >>> groups[0]
    Group('blocks.0.attn.qk', kind='head_dim', size=64, minimum=1, parts=(32, 32))
    """
    groups = prunable(model).anatomy.groups
    return joint(groups) if coupled else independent(groups)


def independent(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Those of a model's groups that have one group each for the QK and the V of an attention."""
    return tuple(group for group in groups if group.role != "qkv")


def joint(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Those of a model's groups that have one group for QK and V of an attention together, where there is one."""
    sites = {group.site for group in groups if group.role == "qkv"}
    return tuple(group for group in groups if not (group.site in sites and group.role in ("qk", "v")))


def attach(
    model: nn.Module,
    groups: Sequence[Group] | None = None,
    *,
    tokens: str = "bias",
    penalty: Mapping[str, float] | None = None,
    norms: bool = False,
) -> SoftMasks:
    """Attach soft masks to ``model`` in place; its outputs do not change until the masks do.

    Args:
        model: a model that a family reads.
        groups: any of `describe`; by default all head dimensions, hidden units and tokens.
        tokens: ``"bias"`` (exact removal) or ``"multiply"`` (the paper's variant, which starts at tanh(3)).
        penalty: kind -> weight of its penalty, by default that of `slimming.core.kinds.KINDS`.
        norms: take the scales of BatchNorms as the masks of the channels that pass them, without parameters of
            their own (Network Slimming, section 3). ``masks[name]`` is then the scale of the first such norm.

    Returns:
        A mapping from group name to the float32 parameter of its mask.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: masks are attached already, or the groups are of another model or share units.

    >>> import timm, slimming
    >>> model = timm.create_model("test_vit")
    >>> masks = slimming.attach(model)
    >>> masks["blocks.0.mlp.hidden"].shape
    torch.Size([192])
    """
    found = prunable(model)
    groups = searched(independent(found.anatomy.groups)) if groups is None else groups
    penalty = {name: kind.penalty for name, kind in KINDS.items()} if penalty is None else penalty
    return attach_(found, groups, tokens=tokens, penalty=penalty, norms=norms)


def searched(groups: Sequence[Group], kinds: Sequence[str] | None = None) -> list[Group]:
    """Those of ``groups`` that get a mask.

    Args:
        groups: what `describe` gives.
        kinds: kinds to take; None takes all except whole attentions and MLPs, the embedding width, and heads whose
            dimensions can go on their own: such a head goes when its last V dimension does.

    Raises:
        ConfigError: there is no group of one of ``kinds``.
    """
    if kinds is None:
        has_dimensions = {group.site for group in groups if group.kind == "head_dim"}
        inner = [group for group in groups if not KINDS[group.kind].on_request]
        return [group for group in inner if group.kind != "head" or group.site not in has_dimensions]
    missing = [kind for kind in kinds if not any(group.kind == kind for group in groups)]
    if missing:
        raise ConfigError(f"This model has no groups of kind {missing[0]!r}; take it out of search.kinds.")
    return [group for group in groups if group.kind in kinds]
