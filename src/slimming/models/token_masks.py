"""Mask tokens where they mix, without a change of the modules: in every softmax over keys and in mean pooling.

A function mode is active while a block runs, and from the last block to the end of the model. It adds the logarithm of
the tokens' factors to the logits of attention and weights the mean over tokens. A factor of 0 then equals removal.

Shape suffixes: B batch, H heads, N tokens (including those that are never removed), D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimming.core.groups import Group, TokenSite
from slimming.errors import UnsupportedModelError

Source = tuple[Tensor, Tensor | None]
"""A mask, and the indices of the required positions in it (None: all positions, in order)."""

SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
MEAN = (torch.mean, Tensor.mean)
AVERAGE_POOL = (F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d)


class TokenGate:
    """The product of the token masks of a block and all blocks before it.

    Args:
        sources: the masks, one factor per position each.
        prefix: number of tokens before the positions, with a factor of 1.
        suffix: number of tokens after them, with a factor of 1.
    """

    def __init__(self, sources: Sequence[Source], prefix: int, suffix: int = 0) -> None:
        self.sources = list(sources)
        self.prefix, self.suffix = prefix, suffix

    def _stacked(self) -> Tensor:
        """Factors of the masks, shape (masks, positions)."""
        picked = [mask if places is None else mask[places.to(mask.device)] for mask, places in self.sources]
        return torch.stack(picked).clamp_min(0)

    def product(self) -> Tensor:
        """Return the product of the masks, shape (positions,)."""
        return self._stacked().prod(0)

    def bias(self) -> Tensor:
        """Return the log of the product, with 0 for the other tokens, shape (N,); -inf for a factor of 0."""
        stacked = self._stacked()
        alive = stacked > 0
        # The inner where avoids log(0), whose infinite derivative would become NaN.
        total = torch.where(alive, stacked, 1.0).log().sum(0)
        total = torch.where(alive.all(0), total, -torch.inf)
        return torch.cat([total.new_zeros(self.prefix), total, total.new_zeros(self.suffix)])


class MaskedTokens(TorchFunctionMode):
    """Within this context, attention and mean pooling over the tokens of ``gate`` are masked.

    Args:
        gate: the factors.
        as_mask: makes the attention mask (1, 1, 1, N) of a kernel from the bias.
        pools: whether means over tokens are weighted, too.
    """

    def __init__(self, gate: TokenGate, as_mask: Callable[[Tensor], Tensor], *, pools: bool) -> None:
        super().__init__()
        self.as_mask, self.pools = as_mask, pools
        self.bias, self.factor = gate.bias(), gate.product()
        self.end = gate.prefix + len(self.factor)
        self.prefix = gate.prefix
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAX:
            args = self._softmax(args, kwargs)
        elif func is F.scaled_dot_product_attention:
            args, kwargs = self._fused(args, kwargs)
        elif func is F.multi_head_attention_forward:
            kwargs = self._multi_head(args, kwargs)
        elif self.pools and func in MEAN:
            args = self._mean(args, kwargs)
        elif self.pools and func in AVERAGE_POOL:
            weights = self._weights(args[0].shape[-1], args[0].dtype) if args[1] in (1, (1,), [1]) else None
            args = args if weights is None else (args[0] * weights, *args[1:])
        return func(*args, **kwargs)

    def _of(self, whole: Tensor, count: int) -> Tensor | None:
        """The part of ``whole`` (N,) for ``count`` tokens: all of them, or those that are removable."""
        if count == len(whole):
            return whole
        return whole[self.prefix : self.end] if count == len(self.factor) else None

    def _keys(self, count: int, dtype: torch.dtype) -> Tensor | None:
        """The bias of ``count`` keys."""
        bias = self._of(self.bias, count)
        if bias is None:
            return None
        self.used = True
        return bias.to(dtype)

    def _softmax(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        logits = args[0]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if logits.dim() < 2 or dim not in (-1, logits.dim() - 1):
            return args
        bias = self._keys(logits.shape[-1], logits.dtype)
        return args if bias is None else (logits + bias, *args[1:])

    def _fused(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        given = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        key = args[1] if len(args) > 1 else kwargs["key"]
        causal = kwargs.get("is_causal", args[5] if len(args) > 5 else False)
        bias = None if causal else self._keys(key.shape[-2], key.dtype)
        if bias is None:
            return args, dict(kwargs)
        joined = self.as_mask(bias.view(1, 1, 1, -1)) if given is None else additive(given, bias.dtype) + bias
        if len(args) > 3:
            return (*args[:3], joined, *args[4:]), dict(kwargs)
        return args, {**kwargs, "attn_mask": joined}

    def _multi_head(self, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Add the bias to the padding mask of ``nn.MultiheadAttention``, whose tensors are (N, B, D)."""
        key = args[1]
        bias = self._keys(key.shape[0], key.dtype)
        if bias is None:
            return dict(kwargs)
        given = kwargs.get("key_padding_mask")
        if given is None:
            joined = bias.expand(key.shape[1], -1) if key.dim() == 3 else bias
        else:
            joined = additive(~given if given.dtype == torch.bool else given, bias.dtype) + bias
        return {**kwargs, "key_padding_mask": joined}

    def _mean(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        x = args[0]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if x.dim() != 3 or dim not in (1, -2):
            return args
        weights = self._weights(x.shape[1], x.dtype)
        return args if weights is None else (x * weights.view(1, -1, 1), *args[1:])

    def _weights(self, count: int, dtype: torch.dtype) -> Tensor | None:
        """Weights of ``count`` tokens with a mean of 1."""
        ones = self.factor.new_ones(len(self.bias) - len(self.factor))
        factor = self._of(torch.cat([ones[: self.prefix], self.factor, ones[self.prefix :]]), count)
        if factor is None:
            return None
        factor = factor.to(torch.promote_types(dtype, factor.dtype))
        return (factor * (count / factor.sum())).to(dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean attention mask, True where attention is allowed, as 0 and -inf; other masks unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def plain_mask(bias: Tensor) -> Tensor:
    """The bias itself as an attention mask."""
    return bias


class _Within:
    """Hooks of a module in which `MaskedTokens` is active."""

    def __init__(self, gate: TokenGate, as_mask: Callable[[Tensor], Tensor], *, required: bool) -> None:
        self.gate, self.as_mask, self.required = gate, as_mask, required
        self.active: list[MaskedTokens] = []
        self.used = False

    def enter(self, module: nn.Module, args: Any) -> None:
        mode = MaskedTokens(self.gate, self.as_mask, pools=False)
        mode.__enter__()
        self.active.append(mode)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active:
            mode = self.active.pop()
            mode.__exit__(None, None, None)
            self.used = self.used or mode.used
            if self.required and output is not None and not mode.used:  # None: the block has failed
                raise UnsupportedModelError(
                    f"The tokens of this {type(module).__name__} are masked for sequences of {len(mode.bias)}, and it "
                    "attends over none of that length: give images of the size that the model was read with, or leave "
                    "tokens out."
                )


class _After:
    """Hooks with which `MaskedTokens` is active from the end of the last block to the end of the model."""

    def __init__(self, gate: TokenGate, as_mask: Callable[[Tensor], Tensor]) -> None:
        self.gate, self.as_mask = gate, as_mask
        self.running = 0
        self.active: list[MaskedTokens] = []

    def start(self, module: nn.Module, args: Any) -> None:
        self.running += 1

    def enter(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.running and not self.active:
            mode = MaskedTokens(self.gate, self.as_mask, pools=True)
            mode.__enter__()
            self.active.append(mode)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = max(0, self.running - 1)
        while self.active:
            self.active.pop().__exit__(None, None, None)


def mask_block(
    model: nn.Module,
    site: TokenSite,
    gate: TokenGate,
    as_mask: Callable[[Tensor], Tensor] = plain_mask,
    *,
    required: bool = False,
) -> tuple[list[Callable[[], None]], Callable[[], bool]]:
    """Mask the tokens in the block of ``site``.

    Returns:
        Functions that undo it, and whether a softmax was masked. With ``required``, a call of the block in which none
        is masked is an error.
    """
    block, hooks = model.get_submodule(site.block), _Within(gate, as_mask, required=required)
    undo = [
        block.register_forward_pre_hook(hooks.enter).remove,
        block.register_forward_hook(hooks.leave, always_call=True).remove,
    ]
    return undo, lambda: hooks.used


def mask_after(
    model: nn.Module, site: TokenSite, gate: TokenGate, as_mask: Callable[[Tensor], Tensor] = plain_mask
) -> list[Callable[[], None]]:
    """Mask the tokens from the end of the block of ``site``, the last one, until ``model`` returns.

    Returns:
        Functions that undo it.
    """
    hooks = _After(gate, as_mask)
    return [
        model.register_forward_pre_hook(hooks.start).remove,
        model.get_submodule(site.block).register_forward_hook(hooks.enter).remove,
        model.register_forward_hook(hooks.leave, always_call=True).remove,
    ]


def places_of(earlier: TokenSite, here: TokenSite) -> Tensor | None:
    """The indices in a mask of ``earlier`` of the positions of ``here``; None for all, in order."""
    if earlier.positions == here.positions:
        return None
    place_of = {position: place for place, position in enumerate(earlier.positions)}
    return torch.tensor([place_of[position] for position in here.positions])


def present_positions(groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Token group -> positions left before its block, when every group keeps the units of ``kept`` (default: all)."""
    result: dict[str, tuple[int, ...]] = {}
    last: dict[str, frozenset[int]] = {}
    for group in groups:
        if group.token is None:
            continue
        site = group.token
        positions = [site.positions[unit] for unit in sorted(kept.get(group.name, range(group.size)))]
        before = last.get(site.sequence)
        result[group.name] = tuple(position for position in positions if before is None or position in before)
        last[site.sequence] = frozenset(result[group.name])
    return result


def last_sites(groups: Sequence[Group]) -> dict[str, Group]:
    """Sequence -> the token group of its last block."""
    return {group.token.sequence: group for group in groups if group.token is not None}


def mask_removed(
    model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]
) -> tuple[list[Callable[[], None]], dict[str, list[Callable[[], bool]]]]:
    """Mask the tokens that ``kept`` removes by factors of 0.

    Returns:
        Functions that undo it, and for each sequence whether a softmax was masked in its blocks, see `mask_block`.
    """
    undo: list[Callable[[], None]] = []
    used: dict[str, list[Callable[[], bool]]] = {}
    present, last = present_positions(groups, kept), last_sites(groups)
    like = next(model.parameters())
    for group in groups:
        site = group.token
        if site is None:
            continue
        left = set(present[group.name])
        factor = torch.tensor([float(p in left) for p in site.positions], dtype=like.dtype, device=like.device)
        gate = TokenGate([(factor, None)], site.prefix, site.suffix)
        removers, was_used = mask_block(model, site, gate)
        undo += removers
        used.setdefault(site.sequence, []).append(was_used)
        if last[site.sequence] is group:
            undo += mask_after(model, site, gate)
    return undo, used


def kept_rows(group: Group, left: Sequence[int]) -> list[int]:
    """The places in the sequence of the tokens that are left at ``group``, the last of its sequence."""
    site = group.token
    assert site is not None
    place_of = {position: site.prefix + place for place, position in enumerate(site.positions)}
    end = site.prefix + len(site.positions)
    return [*range(site.prefix), *(place_of[position] for position in left), *range(end, end + site.suffix)]
