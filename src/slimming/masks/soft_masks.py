"""Soft masks of a model: learnable factors of its units, with their penalties, scores and removal.

Masks of head dimensions, heads, hidden units and channels are parametrisations of the weights that they scale: the
model's forward is unchanged, and a mask can be folded exactly into its weight. A token mask m acts where tokens mix, as
a bias log(m) on the attention keys, which equals removal at m = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimming.core.completion import resolve_plan
from slimming.core.groups import Anatomy, Group
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, PlanError
from slimming.masks.group_tensors import batch_norms, weight_norms
from slimming.masks.options import BIAS, MULTIPLY
from slimming.masks.parametrization import Factor, original, own_class_, scaled
from slimming.masks.tokens import RAW_INIT, attach_token_gates, token_factor
from slimming.models.family import zero_slices_
from slimming.models.masked_norms import mask_norms
from slimming.models.prunable import PrunableModel

ATTRIBUTE = "slimming_masks"
"""Attribute of a masked model that holds its `SoftMasks`."""

_DECAY = 0.99
"""Decay per step of the moving average in `SoftMasks.collect`."""


class SoftMasks(Mapping[str, nn.Parameter]):
    """The soft masks of a model: group name -> float32 parameter with one factor per unit.

    The parameters belong to the model and are in its ``parameters()`` and ``state_dict()``. Created by
    `slimming.attach`.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, groups: Sequence[Group], tokens: str, penalty: Mapping[str, float]
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.groups = tuple(groups)
        self.tokens = tokens
        self.penalty_weights = dict(penalty)
        self.penalty_sum = False
        self._parameters: dict[str, nn.Parameter] = {}
        self._norms: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        self._remove_gates: list[Callable[[], None]] = []
        self._widen_norms: list[Callable[[], None]] = []
        self.collected: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        return f"SoftMasks({len(self)} groups, {sum(p.numel() for p in self.values())} units)"

    # Mapping compares by content; masks are mutable state and compare by identity.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def of_kind(self, kind: str) -> list[Group]:
        """Return the masked groups of one kind, in the order of the model."""
        return [group for group in self.groups if group.kind == kind]

    def own(self) -> dict[str, nn.Parameter]:
        """Return the masks that are separate parameters; the others are scales of BatchNorms."""
        return {name: mask for name, mask in self.items() if name not in self._norms}

    def factor(self, group: Group) -> Tensor:
        """Return the factor of each unit, shape (size,): the mask, or its tanh for ``tokens="multiply"``.

        If scales of BatchNorms are the masks, it is the mean of their absolute values over the norms of the unit: one
        norm in the paper, several if channels are coupled.
        """
        if group.name in self._norms:
            scales = [scale[places].abs().mean(1) for scale, places in self._norms[group.name]]
            return torch.stack(scales).mean(0)
        mask = self[group.name]
        return token_factor(mask, self.tokens) if group.token is not None else mask

    def penalties(self) -> dict[str, Tensor]:
        """Return the weighted l1 penalty of each masked kind, as scalars (ViT-Slim, eq. 4)."""
        result: dict[str, Tensor] = {}
        for kind in dict.fromkeys(group.kind for group in self.groups):
            factors = [self.factor(group).abs() for group in self.of_kind(kind)]
            weight = self.penalty_weights.get(kind, 0.0)
            if self.penalty_sum:
                # A unit with several norms has several scales, each of which is a term of the sum.
                scales = [self._scales(group) for group in self.of_kind(kind)]
                result[kind] = weight * torch.stack([f.sum() * n for f, n in zip(factors, scales, strict=True)]).sum()
            else:
                result[kind] = weight * torch.cat(factors).mean()
        return result

    def _scales(self, group: Group) -> int:
        return sum(places.shape[1] for _, places in self._norms.get(group.name, [])) or 1

    def penalty(self) -> Tensor:
        """Return the penalty to add to a loss, a scalar.

        By default, the weight of a kind multiplies the *mean* of |factor| over its units, so that its effect does not
        depend on the size of the model. With ``penalty_sum`` it multiplies the sum, as in the paper.
        """
        return torch.stack(list(self.penalties().values())).sum()

    def before_step(self) -> None:
        """Add the gradient of the penalty to the gradients of the loss, and call `collect`.

        Call it with unscaled gradients right before the optimizer's step. In training loops that cannot be changed,
        ``optimizer.register_step_pre_hook(lambda *_: masks.before_step())`` does this.
        """
        with torch.enable_grad():  # optimizers disable gradients in their step
            self.penalty().backward()
        self.collect()

    @torch.no_grad()
    def collect(self) -> None:
        """Update the Taylor score of each unit from the gradients; call it after backward, before the optimizer step.

        The score is a moving average of (factor x gradient of the task loss)^2, the first-order estimate of the squared
        change of the loss when the unit is removed (Molchanov et al., CVPR 2019, eq. 8). The gradient of the penalty is
        subtracted. Steps with gradients that are not finite, which occur with fp16, are skipped.
        """
        squares: dict[str, Tensor] = {}
        for kind in dict.fromkeys(group.kind for group in self.groups):
            groups = self.of_kind(kind)
            weight = self.penalty_weights.get(kind, 0.0)
            weight /= 1 if self.penalty_sum else sum(group.size for group in groups)
            squares |= {**self._squares(groups, weight), **self._norm_squares(groups, weight)}
        if not squares:
            return
        finite = torch.cat(list(squares.values())).isfinite().all()
        # The average starts with the first value. It is updated in place, so that checkpoints contain it, and without
        # synchronising the device.
        steps = self.collected["steps"] = self.collected["steps"].to(finite.device)
        share = finite * torch.where(steps == 0, 1.0, 1 - _DECAY)
        for name, square in squares.items():
            usable = square.nan_to_num(0.0, 0.0, 0.0)
            self.collected[name] = self.collected[name].to(square.device).lerp_(usable, share)
        steps += finite

    def _squares(self, groups: Sequence[Group], weight: float) -> dict[str, Tensor]:
        """(factor x gradient of the task loss)^2 per unit, for the masks of one kind that are separate parameters."""
        pairs = [(group.name, self[group.name].grad) for group in groups if group.name not in self._norms]
        grads = {name: grad for name, grad in pairs if grad is not None}
        if not grads:
            return {}
        # All groups of a kind in one operation: the vectors are short, so that launching operations dominates.
        mask, grad = torch.cat([self[name].detach() for name in grads]), torch.cat(list(grads.values()))
        factor, slope = mask, torch.ones_like(mask)
        if groups[0].token is not None and self.tokens == MULTIPLY:
            factor = torch.tanh(mask)
            slope = 1 - factor.square()
        # Relative to the factor: d loss / d factor = (d loss / d mask) / (d factor / d mask).
        task = grad / slope.clamp_min(1e-6) - weight * factor.sign()
        squares = (factor * task).square().split([len(grad) for grad in grads.values()])
        return dict(zip(grads, squares, strict=True))

    def _norm_squares(self, groups: Sequence[Group], weight: float) -> dict[str, Tensor]:
        """The same for masks that are scales of BatchNorms: a unit is removed with all its scales."""
        result = {}
        for group in groups:
            scales = [(scale, scale.grad, places) for scale, places in self._norms.get(group.name, [])]
            # Without `penalty_sum`, the mean over the scales of a unit is penalised.
            share = weight if self.penalty_sum or not scales else weight / sum(p.shape[1] for _, _, p in scales)
            changes = [
                (scale[places] * (grad[places] - share * scale[places].sign())).sum(1)
                for scale, grad, places in scales
                if grad is not None
            ]
            if changes:
                result[group.name] = torch.stack(changes).sum(0).square()
        return result

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the model without masks, with the names of the plain model."""
        masks = {id(mask) for mask in self.own().values()}
        state = self.model.state_dict(keep_vars=True)
        plain = {name: tensor for name, tensor in state.items() if id(tensor) not in masks}
        return {_plain_name(name): tensor.detach() for name, tensor in plain.items()}

    def scores(self, how: str | None = None) -> dict[str, Tensor]:
        """Return one score per unit, an estimate of the cost of removing it: float32 on the CPU, shape (size,).

        Args:
            how: one of `MASK_SCORES`; by default ``"taylor"`` if `collect` was called, else ``"contribution"``.

        Raises:
            ConfigError: there is no such score, or `collect` was not called for ``"taylor"``.
        """
        how = how or ("taylor" if bool(self.collected["steps"] > 0) else "contribution")
        if how not in MASK_SCORES:
            raise ConfigError(f"There is no score {how!r}; scores are {', '.join(MASK_SCORES)}.")
        return MASK_SCORES[how](self)

    @torch.no_grad()
    def apply_(self, plan: Plan) -> None:
        """Set the masks of removed units to exactly 0, so that the masked model equals the cut model.

        The masks of kept tokens are set to 1, since they cannot be folded into a weight. With ``plan.fold`` False the
        masks of all kept units are set to 1, as in the paper.

        Raises:
            PlanError: the plan removes units of a group without a mask, or was made for another model.
        """
        kept = resolve_plan(self.anatomy, plan)
        for name, units in plan.kept.items():
            if name not in self and len(units) < plan.sizes[name]:
                raise PlanError(f"The plan removes units of {name!r}, which has no mask. Attach that group too.")
        self._undo_(self._widen_norms)
        for group in self.groups:
            mask = self[group.name]
            is_kept = torch.zeros(group.size, dtype=torch.bool, device=mask.device)
            is_kept[list(kept[group.name])] = True
            self._widen_norms += mask_norms(self.model, group, kept[group.name])
            if group.name in self._norms:
                self._silence_(group, [unit for unit in range(group.size) if not is_kept[unit]])
                continue
            unmasked = 1.0 if group.token is None or self.tokens == BIAS else float("inf")
            if group.token is not None or not plan.fold:
                mask[is_kept] = unmasked
            mask[~is_kept] = 0.0

    def _silence_(self, group: Group, units: Sequence[int]) -> None:
        """Set the weights that read ``units`` to 0: a scale of 0 alone would leave the shift of the norm."""
        for slices in group.slices:
            if slices.side == "consumes":
                zero_slices_(original(self.model, slices.tensor), slices, units)

    def fold_(self) -> None:
        """Multiply the masks into the weights and remove them; token masks, which cannot be folded, are kept."""
        self._remove_scales(fold=True)
        self._drop([group for group in self.groups if group.token is None])

    def detach_(self) -> None:
        """Remove all masks without folding them; the weights are those of the model without masks."""
        self._remove_scales(fold=False)
        self._undo_(self._remove_gates)
        self._undo_(self._widen_norms)
        self._drop(list(self.groups))

    @staticmethod
    def _undo_(hooks: list[Callable[[], None]]) -> None:
        while hooks:
            hooks.pop()()

    def _drop(self, groups: list[Group]) -> None:
        names = {group.name for group in groups}
        self.groups = tuple(group for group in self.groups if group.name not in names)
        for name in names:
            self._parameters.pop(name, None)
            self._norms.pop(name, None)
            self.collected.pop(name, None)
        if not self.groups:
            self.model.__dict__.pop(ATTRIBUTE, None)

    def _remove_scales(self, *, fold: bool) -> None:
        tensors = {scale.tensor for group in self.groups if group.name not in self._norms for scale in group.scales}
        for module in {tensor.rpartition(".")[0] for tensor in tensors}:
            own_class_(self.model.get_submodule(module))
        folded: set[Tensor] = set()
        for tensor in sorted(tensors):
            module, _, name = tensor.rpartition(".")
            parameter = original(self.model, tensor)  # several modules may share it, which is folded once
            parametrize.remove_parametrizations(
                self.model.get_submodule(module), name, leave_parametrized=fold and parameter not in folded
            )
            folded.add(parameter)


@torch.no_grad()
def taylor_scores(masks: SoftMasks) -> dict[str, Tensor]:
    """Return the root mean square change of the loss per unit, as estimated by `SoftMasks.collect`.

    Raises:
        ConfigError: `SoftMasks.collect` was not called.
    """
    if not bool(masks.collected["steps"] > 0):
        raise ConfigError("Score 'taylor' needs gradients: call masks.collect() after each backward.")
    return {name: masks.collected[name].sqrt().float().cpu() for name in masks}


@torch.no_grad()
def contribution_scores(masks: SoftMasks) -> dict[str, Tensor]:
    """Return |factor| times the norms of the weights that produce and consume the unit, over the mean of its kind."""
    scores = {
        g.name: masks.factor(g).float().abs() * weight_norms(masks.model, g, masks[g.name].device) for g in masks.groups
    }
    for kind in {group.kind for group in masks.groups}:
        names = [group.name for group in masks.of_kind(kind)]
        mean = torch.cat([scores[name] for name in names]).mean().clamp_min(1e-12)
        scores |= {name: scores[name] / mean for name in names}
    return {name: score.cpu() for name, score in scores.items()}


@torch.no_grad()
def mask_values(masks: SoftMasks) -> dict[str, Tensor]:
    """Return the signed factor of each unit, as in the paper (ViT-Slim, section 3.3)."""
    return {group.name: masks.factor(group).float().detach().cpu().clone() for group in masks.groups}


MASK_SCORES: Mapping[str, Callable[[SoftMasks], dict[str, Tensor]]] = {
    "taylor": taylor_scores,
    "contribution": contribution_scores,
    "mask": mask_values,
}
"""Scores that are computed from the masks and what they collected, by name."""


def attach_(
    prunable: PrunableModel,
    groups: Sequence[Group],
    *,
    tokens: str = BIAS,
    penalty: Mapping[str, float],
    norms: bool = False,
) -> SoftMasks:
    """Attach a soft mask to each of ``groups``, in place. With ``tokens="bias"`` the outputs do not change.

    Args:
        prunable: a model without masks.
        groups: groups of the model.
        tokens: ``"bias"`` (a key bias, exact) or ``"multiply"`` (the paper's multiplication of norm outputs).
        penalty: kind -> weight of its penalty.
        norms: use the scales of BatchNorms as the masks of the groups that have some (Network Slimming).

    Raises:
        PlanError: the model has masks already, a group belongs to another model, or two groups share units.
        ConfigError: there is no such variant of token masks.
    """
    model, anatomy = prunable.model, prunable.anatomy
    _check(model, anatomy, groups, tokens)
    # The groups of this anatomy: removing masks changes the order of a module's parameters, and so of the slices.
    groups = [anatomy.group(group.name) for group in groups]
    masks = SoftMasks(model, anatomy, groups, tokens, penalty)
    device = next(model.parameters()).device
    for group in groups:
        masks.collected[group.name] = torch.zeros(group.size, device=device)
        scales = batch_norms(model, group) if norms else []
        if scales:
            masks._norms[group.name] = scales
            masks._parameters[group.name] = scales[0][0]
            continue
        init = RAW_INIT if group.token is not None and tokens == MULTIPLY else 1.0
        masks._parameters[group.name] = nn.Parameter(torch.full((group.size,), init, device=device))
    masks.collected["steps"] = torch.zeros((), dtype=torch.int64)
    for group in groups:
        for scale in group.scales if group.name not in masks._norms else ():
            length = original(model, scale.tensor).shape[scale.dim]
            scaled(model, scale.tensor).add(Factor(masks[group.name], scale.dim, scale.index, length))
    sites = [group for group in anatomy.groups if group.token is not None]
    masks._remove_gates = attach_token_gates(model, sites, masks, tokens)
    model.__dict__[ATTRIBUTE] = masks
    return masks


def attached(model: nn.Module) -> SoftMasks | None:
    """Return the masks that are attached to ``model``, or None."""
    masks: Any = model.__dict__.get(ATTRIBUTE)
    return masks


def _plain_name(name: str) -> str:
    """The name that a tensor had before its parametrisation."""
    module, marker, rest = name.partition(".parametrizations.")
    return f"{module}.{rest.removesuffix('.original')}" if marker else name


def _check(model: nn.Module, anatomy: Anatomy, groups: Sequence[Group], tokens: str) -> None:
    if tokens not in (BIAS, MULTIPLY):
        raise ConfigError(f"tokens={tokens!r}: give {BIAS!r} (exact) or {MULTIPLY!r} (as in the paper).")
    if attached(model) is not None:
        raise PlanError("The model has masks already; call masks.detach_() or masks.fold_() first.")
    if not groups:
        raise PlanError("No group was given; slimming.describe(model) lists those of the model.")
    seen: dict[str, str] = {}
    for group in groups:
        known = anatomy.group(group.name)
        if (known.kind, known.size, known.limits, known.token) != (group.kind, group.size, group.limits, group.token):
            raise PlanError(f"Group {group.name!r} has other sizes in this model; call slimming.describe(model) again.")
        keys = {group.name} if group.role != "qkv" else {group.name, f"{group.site}.qk", f"{group.site}.v"}
        for key in keys:
            if key in seen:
                raise PlanError(f"Groups {seen[key]!r} and {group.name!r} share units; attach one of them.")
            seen[key] = group.name
