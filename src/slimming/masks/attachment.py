"""List the prunable groups of a model, and attach soft masks to them: `describe` and `attach`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimming.core.argument_types import checked_arguments
from slimming.core.example_inputs import set_example_inputs_
from slimming.core.groups import Group
from slimming.core.kinds import KINDS
from slimming.errors import ConfigError
from slimming.masks.soft_masks import SoftMasks, attach_, attached
from slimming.models.prunable import PrunableModel, read, read_as


def prunable(model: nn.Module) -> PrunableModel:
    """Read ``model``, which may have masks attached.

    Raises:
        UnsupportedModelError: no family reads the model.
    """
    masks = attached(model)
    return read(model) if masks is None else read_as(model, masks.anatomy)


@checked_arguments
def describe(model: nn.Module, *, coupled: bool = False, example_inputs: Any = None) -> tuple[Group, ...]:
    """Return the prunable groups of ``model``. Its weights and modules are not changed.

    Args:
        model: a dense or slim model that a family reads.
        coupled: whether QK and V of an attention form one group, as in the ViT-Slim paper, or two.
        example_inputs: what the model's forward takes, if that is not one image of the size that the model states: a
            tensor, a tuple of positional or a dict of keyword arguments, with a batch dimension; or a list of these,
            with one entry for each way in which the forward is called (for example for each task). They are kept as
            the attribute ``example_inputs`` of the model, where all functions find them; costs are those of the
            first.

    Raises:
        UnsupportedModelError: no family reads the model or one of its parts.
        ConfigError: the example inputs are malformed.

    >>> import timm, slimming
    >>> groups = slimming.describe(timm.create_model("test_vit"))
    >>> groups[0]
    Group('blocks.0.attn.qk', kind='head_dim', size=64, minimum=1, parts=(32, 32))
    """
    set_example_inputs_(model, example_inputs)
    groups = prunable(model).anatomy.groups
    return joint(groups) if coupled else independent(groups)


def independent(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Return the groups without the coupled ones, so that QK and V of an attention are separate groups."""
    return tuple(group for group in groups if group.role != "qkv")


def joint(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Return the groups with QK and V coupled, in every attention that has a coupled group."""
    sites = {group.site for group in groups if group.role == "qkv"}
    return tuple(group for group in groups if not (group.site in sites and group.role in ("qk", "v")))


@checked_arguments
def attach(
    model: nn.Module,
    groups: Sequence[Group] | None = None,
    *,
    tokens: str = "bias",
    penalty: Mapping[str, float] | None = None,
    norms: bool = False,
    example_inputs: Any = None,
) -> SoftMasks:
    """Attach soft masks to ``model`` in place; its outputs do not change until the masks do.

    Args:
        model: a model that a family reads.
        groups: groups to mask, from `describe`; by default those that `select_kinds` returns.
        tokens: ``"bias"`` (exact removal) or ``"multiply"`` (the variant of the paper, which starts at tanh(3)).
        penalty: kind -> weight of its penalty; by default the weights of `slimming.core.kinds.KINDS`.
        norms: use the scales of BatchNorms as the masks of their channels instead of separate parameters (Network
            Slimming, section 3). ``masks[name]`` is then the scale of the first BatchNorm of the group.
        example_inputs: what the model's forward takes, see `describe`.

    Returns:
        A mapping from group name to the float32 parameter of its mask.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: the model has masks already, or the groups belong to another model or share units.

    >>> import timm, slimming
    >>> model = timm.create_model("test_vit")
    >>> masks = slimming.attach(model)
    >>> masks["blocks.0.mlp.hidden"].shape
    torch.Size([192])
    """
    set_example_inputs_(model, example_inputs)
    read_model = prunable(model)
    groups = select_kinds(independent(read_model.anatomy.groups)) if groups is None else groups
    penalty = {name: kind.penalty for name, kind in KINDS.items()} if penalty is None else penalty
    return attach_(read_model, groups, tokens=tokens, penalty=penalty, norms=norms)


def select_kinds(groups: Sequence[Group], kinds: Sequence[str] | None = None) -> list[Group]:
    """Return the groups of the given kinds.

    Args:
        groups: groups from `describe`.
        kinds: kinds to select; None selects all except blocks, the embedding width, tokens that the model returns, and
            heads whose dimensions can be removed individually (such a head is removed with its last V dimension).

    Raises:
        ConfigError: the model has no group of one of ``kinds``.
    """
    if kinds is None:
        has_dimensions = {group.site for group in groups if group.kind == "head_dim"}
        default = [group for group in groups if not group.on_request]
        return [group for group in default if group.kind != "head" or group.site not in has_dimensions]
    missing = [kind for kind in kinds if not any(group.kind == kind for group in groups)]
    if missing:
        raise ConfigError(f"This model has no groups of kind {missing[0]!r}; take it out of search.kinds.")
    return [group for group in groups if group.kind in kinds]
