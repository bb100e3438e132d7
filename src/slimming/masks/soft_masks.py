"""Soft masks: the learnable factors of groups, attached to a model for the search.

Masks over head dimensions, heads and hidden units are parametrisations of the weights they scale, so that the
host's forward is untouched and a mask folds into its weight exactly. Masks over tokens act where tokens mix:
as an additive bias log(m) on the keys, which is the same as removal when m reaches 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimming.core.completion import resolve_plan
from slimming.core.groups import SIDES, Anatomy, Group
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, PlanError
from slimming.masks.parametrization import Factor, flat, original, own_class_, scaled
from slimming.masks.tokens import BIAS, MULTIPLY, RAW_INIT, attach_token_gates, token_factor
from slimming.models.family import zero_slices_
from slimming.models.masked_norms import mask_norms
from slimming.models.prunable import PrunableModel

ATTRIBUTE = "slimming_masks"
"""Attribute of a masked model that holds its `SoftMasks`."""

_DECAY = 0.99


class SoftMasks(Mapping[str, nn.Parameter]):
    """The soft masks of a model: group name -> float32 parameter with one factor per unit.

    The parameters belong to the model (its ``parameters()`` and ``state_dict()`` hold them); this object finds
    them and knows what to do with them. Made by `slimming.attach`.
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

    # A mapping compares by content; masks are state, so two of them are the same only if they are one.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def of_kind(self, kind: str) -> list[Group]:
        """The attached groups of one kind, in the model's order."""
        return [group for group in self.groups if group.kind == kind]

    def own(self) -> dict[str, nn.Parameter]:
        """The masks that are parameters of their own; the others are scales of a BatchNorm of the model."""
        return {name: mask for name, mask in self.items() if name not in self._norms}

    def factor(self, group: Group) -> Tensor:
        """The factor of each unit, shape (size,): the mask itself, or its tanh for the paper's token masks.

        Where scales of BatchNorms are the masks, it is the mean of their absolute values over the norms that the
        unit passes: one norm in the paper, several where channels are coupled.
        """
        if group.name in self._norms:
            scales = [scale[places].abs().mean(1) for scale, places in self._norms[group.name]]
            return torch.stack(scales).mean(0)
        mask = self[group.name]
        return token_factor(mask, self.tokens) if group.token is not None else mask

    def penalties(self) -> dict[str, Tensor]:
        """The weighted l1 penalty of each attached kind, as scalars (ViT-Slim, eq. 4)."""
        result: dict[str, Tensor] = {}
        for kind in dict.fromkeys(group.kind for group in self.groups):
            factors = [self.factor(group).abs() for group in self.of_kind(kind)]
            weight = self.penalty_weights.get(kind, 0.0)
            if self.penalty_sum:
                # A unit that passes several norms has several scales, and each is one term.
                scales = [self._scales(group) for group in self.of_kind(kind)]
                result[kind] = weight * torch.stack([f.sum() * n for f, n in zip(factors, scales, strict=True)]).sum()
            else:
                result[kind] = weight * torch.cat(factors).mean()
        return result

    def _scales(self, group: Group) -> int:
        return sum(places.shape[1] for _, places in self._norms.get(group.name, [])) or 1

    def penalty(self) -> Tensor:
        """The penalty to add to a loss, a scalar.

        By default each kind's weight multiplies the *mean* of |factor| over its units, so that a weight means
        the same for every model, batch and world size. The paper's preset takes sums.
        """
        return torch.stack(list(self.penalties().values())).sum()

    def before_step(self) -> None:
        """Add the gradient of the penalty to the gradients of a loss without it, and `collect`.

        For loops that are not one's own: it is called with the unscaled gradients, right before the optimiser's step.
        ``optimizer.register_step_pre_hook(lambda *_: masks.before_step())`` does that in plain loops.
        """
        with torch.enable_grad():  # optimisers step without
            self.penalty().backward()
        self.collect()

    @torch.no_grad()
    def collect(self) -> None:
        """Note what the loss's gradient says of each unit; call it after backward, before the optimiser step.

        Keeps an average of (factor x gradient of the task loss)^2: the first-order estimate of what cutting
        the unit would change (Molchanov et al., CVPR 2019, eq. 8). The penalty's own gradient is taken out.
        A gradient that is not finite, as fp16 gives now and then, is passed over.
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
        # The first value as it is, then a moving average; in place, so that checkpoints see it. All on the device.
        steps = self.collected["steps"] = self.collected["steps"].to(finite.device)
        share = finite * torch.where(steps == 0, 1.0, 1 - _DECAY)
        for name, square in squares.items():
            usable = square.nan_to_num(0.0, 0.0, 0.0)
            self.collected[name] = self.collected[name].to(square.device).lerp_(usable, share)
        steps += finite

    def _squares(self, groups: Sequence[Group], weight: float) -> dict[str, Tensor]:
        """(factor x gradient of the task loss)^2 per unit, for the masks of one kind that are parameters."""
        pairs = [(group.name, self[group.name].grad) for group in groups if group.name not in self._norms]
        grads = {name: grad for name, grad in pairs if grad is not None}
        if not grads:
            return {}
        # All groups of a kind at once: the vectors are short, and one operation costs more than its numbers.
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
        """The same where scales of BatchNorms are the masks: a unit goes with all its scales at once."""
        result = {}
        for group in groups:
            found = [(scale, scale.grad, places) for scale, places in self._norms.get(group.name, [])]
            # A mean over a unit's scales is what was penalised, where the sum over units is not asked for.
            share = weight if self.penalty_sum or not found else weight / sum(p.shape[1] for _, _, p in found)
            changes = [
                (scale[places] * (grad[places] - share * scale[places].sign())).sum(1)
                for scale, grad, places in found
                if grad is not None
            ]
            if changes:
                result[group.name] = torch.stack(changes).sum(0).square()
        return result

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict as it would be without masks: plain names, masks left out."""
        masks = {id(mask) for mask in self.own().values()}
        state = self.model.state_dict(keep_vars=True)
        plain = {name: tensor for name, tensor in state.items() if id(tensor) not in masks}
        return {_plain_name(name): tensor.detach() for name, tensor in plain.items()}

    def scores(self, how: str | None = None) -> dict[str, Tensor]:
        """One score per unit: what cutting it would cost. float32 on the CPU, shape (size,) per group.

        Args:
            how: one of `MASK_SCORES`. Default: ``"taylor"`` if `collect` was called, else ``"contribution"``.

        Raises:
            ConfigError: there is no such score, or nothing was collected for taylor.
        """
        how = how or ("taylor" if bool(self.collected["steps"] > 0) else "contribution")
        if how not in MASK_SCORES:
            raise ConfigError(f"There is no score {how!r}; scores are {', '.join(MASK_SCORES)}.")
        return MASK_SCORES[how](self)

    @torch.no_grad()
    def apply_(self, plan: Plan) -> None:
        """Set what ``plan`` drops to exactly 0, so that the masked model equals the cut one.

        Kept tokens become exactly 1: a token's factor cannot be folded into a weight. With ``plan.fold`` False
        every kept unit becomes 1, as in the paper.

        Raises:
            PlanError: the plan cuts a group that has no mask here, or is of another model.
        """
        kept = resolve_plan(self.anatomy, plan)
        for name, units in plan.kept.items():
            if name not in self and len(units) < plan.sizes[name]:
                raise PlanError(f"The plan cuts {name!r}, which has no mask here. Attach that group too.")
        self._undo_(self._widen_norms)
        for group in self.groups:
            mask = self[group.name]
            stays = torch.zeros(group.size, dtype=torch.bool, device=mask.device)
            stays[list(kept[group.name])] = True
            if group.name in self._norms:
                self._silence_(group, [unit for unit in range(group.size) if not stays[unit]])
                continue
            one = 1.0 if group.token is None or self.tokens == BIAS else float("inf")
            if group.token is not None or not plan.fold:
                mask[stays] = one
            mask[~stays] = 0.0
            if group.norms:
                self._widen_norms += mask_norms(self.model, group, kept[group.name])

    def _silence_(self, group: Group, units: Sequence[int]) -> None:
        """Let nothing read ``units``: a scale of 0 leaves the norm's shift, which goes with the channel too."""
        for slices in group.slices:
            if slices.side == "consumes":
                zero_slices_(original(self.model, slices.tensor), slices, units)

    def fold_(self) -> None:
        """Multiply the masks into the weights and take them away; token masks, which no weight holds, stay."""
        self._remove_scales(fold=True)
        self._drop([group for group in self.groups if group.token is None])

    def detach_(self) -> None:
        """Take every mask away and give the weights back as they are without."""
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
        for tensor in sorted(tensors):
            module, _, name = tensor.rpartition(".")
            parametrize.remove_parametrizations(self.model.get_submodule(module), name, leave_parametrized=fold)


@torch.no_grad()
def taylor_scores(masks: SoftMasks) -> dict[str, Tensor]:
    """The average change of the loss that `SoftMasks.collect` estimated, one unit at a time.

    Raises:
        ConfigError: nothing was collected.
    """
    if not bool(masks.collected["steps"] > 0):
        raise ConfigError("Score 'taylor' needs gradients: call masks.collect() after each backward.")
    return {name: masks.collected[name].sqrt().float().cpu() for name in masks}


@torch.no_grad()
def contribution_scores(masks: SoftMasks) -> dict[str, Tensor]:
    """|factor| times the norms of the weights that produce and consume the unit, over the mean of its kind."""
    found = {g.name: masks.factor(g).float().abs() * weight_norms(masks, g) for g in masks.groups}
    for kind in {group.kind for group in masks.groups}:
        names = [group.name for group in masks.of_kind(kind)]
        mean = torch.cat([found[name] for name in names]).mean().clamp_min(1e-12)
        found |= {name: found[name] / mean for name in names}
    return {name: score.cpu() for name, score in found.items()}


@torch.no_grad()
def mask_values(masks: SoftMasks) -> dict[str, Tensor]:
    """The signed factor itself, as in the paper (ViT-Slim, section 3.3)."""
    return {group.name: masks.factor(group).float().detach().cpu().clone() for group in masks.groups}


MASK_SCORES: Mapping[str, Callable[[SoftMasks], dict[str, Tensor]]] = {
    "taylor": taylor_scores,
    "contribution": contribution_scores,
    "mask": mask_values,
}
"""Scores that masks alone have."""


def weight_norms(masks: SoftMasks, group: Group) -> Tensor:
    """Product over the sides of a unit of the norm of its slices; ones for tokens. Shape (size,)."""
    squares: dict[str, Tensor] = {}
    device = masks[group.name].device
    for slices in group.slices:
        if is_buffer(masks.model, slices.tensor):
            continue
        tensor = original(masks.model, slices.tensor).float()
        each = tensor.square().movedim(slices.dim, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor.square()
        owners, places = flat(slices.index, device)
        total = torch.zeros(group.size, device=device).index_add_(0, owners, each[places])
        squares[slices.side] = squares.get(slices.side, torch.zeros_like(total)) + total
    result = torch.ones(group.size, device=device)
    for side in SIDES:
        result = result * squares[side].sqrt() if side in squares else result
    return result


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
        prunable: the model, without masks.
        groups: some of its groups.
        tokens: ``"bias"`` (a key bias, exact) or ``"multiply"`` (the paper's multiplication of norm outputs).
        penalty: kind -> weight of its penalty.
        norms: take the scales of a group's BatchNorms as its masks, where it has some (Network Slimming).

    Raises:
        PlanError: masks are attached already, a group is not of this model, or two groups share units.
        ConfigError: ``tokens`` is neither.
    """
    model, anatomy = prunable.model, prunable.anatomy
    _check(model, anatomy, groups, tokens)
    # Its own: taking masks away puts the parameters of a module into another order, and with them the slices.
    groups = [anatomy.group(group.name) for group in groups]
    masks = SoftMasks(model, anatomy, groups, tokens, penalty)
    device = next(model.parameters()).device
    for group in groups:
        masks.collected[group.name] = torch.zeros(group.size, device=device)
        found = batch_norms(model, group) if norms else []
        if found:
            masks._norms[group.name] = found
            masks._parameters[group.name] = found[0][0]
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
    """The masks that are attached to ``model``, if any."""
    masks: Any = model.__dict__.get(ATTRIBUTE)
    return masks


def batch_norms(model: nn.Module, group: Group) -> list[tuple[nn.Parameter, Tensor]]:
    """The scales of the BatchNorms that the units of ``group`` pass, each with the units' places, (size, places)."""
    found = []
    for slices in group.slices:
        module_name, _, name = slices.tensor.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight":
            found.append((module.weight, torch.tensor(slices.index, device=module.weight.device)))
    return found


def is_buffer(model: nn.Module, tensor: str) -> bool:
    """Whether ``tensor`` is a statistic of a norm or another tensor that is not trained."""
    module_name, _, name = tensor.rpartition(".")
    return name in dict(model.get_submodule(module_name).named_buffers(recurse=False))


def _plain_name(name: str) -> str:
    """The name of a tensor before a parametrisation took it in."""
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
        own = anatomy.group(group.name)
        if (own.kind, own.size, own.limits, own.token) != (group.kind, group.size, group.limits, group.token):
            raise PlanError(f"Group {group.name!r} has other sizes in this model; call slimming.describe(model) again.")
        keys = {group.name} if group.role != "qkv" else {group.name, f"{group.site}.qk", f"{group.site}.v"}
        for key in keys:
            if key in seen:
                raise PlanError(f"Groups {seen[key]!r} and {group.name!r} share units; attach one of them.")
            seen[key] = group.name
