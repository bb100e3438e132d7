"""Where token masks act: hooks on the attention modules, the pooling and, for the paper's variant, the norms.

Shape suffixes: B batch, H heads, N tokens (prefix included), D embedding width, X size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.groups import Group, TokenSite

BIAS = "bias"
MULTIPLY = "multiply"
RAW_INIT = 3.0
"""Start of the paper's raw token masks: tanh(3) is almost 1 (authors' code)."""

NEVER = -1e4
"""A key bias that no kernel tells from -inf, and that gives no NaN where it is multiplied by 0."""

Source = tuple[nn.Parameter, Tensor | None]
"""A mask and the places of the wanted positions in it (None: all of them, in order)."""


def token_factor(mask: Tensor, tokens: str) -> Tensor:
    """The factor of each token: its mask from 0 up, or tanh of it for the paper's variant."""
    return torch.tanh(mask) if tokens == MULTIPLY else mask.clamp_min(0)


class _Gate:
    """What all gates share: the product of the masks on the way to here."""

    def __init__(self, sources: list[Source], prefix: int) -> None:
        self.sources = sources
        self.prefix = prefix

    def _stacked(self) -> Tensor:
        """Factors of every mask so far, shape (masks, positions)."""
        picked = [mask if places is None else mask[places.to(mask.device)] for mask, places in self.sources]
        return torch.stack(picked).clamp_min(0)

    def product(self) -> Tensor:
        """Product over the masks, shape (positions,)."""
        return self._stacked().prod(0)

    def bias(self) -> Tensor:
        """Logarithm of the product with a zero per prefix token, shape (N,); -inf where a factor is 0."""
        stacked = self._stacked()
        alive = stacked > 0
        # The inner where keeps log away from 0, whose infinite slope would turn into NaN.
        total = torch.where(alive, stacked, 1.0).log().sum(0)
        total = torch.where(alive.all(0), total, -torch.inf)
        return torch.cat([total.new_zeros(self.prefix), total])


class KeyBias(_Gate):
    """Forward pre-hook of an attention module: adds the bias to the keys of every head and query."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        bias = self.bias().to(args[0].dtype).view(1, 1, 1, -1)
        positional = list(args)
        given = positional[1] if len(positional) > 1 else kwargs.get("attn_mask")
        if given is not None and given.dtype == torch.bool:
            given = torch.zeros(given.shape, dtype=bias.dtype, device=given.device).masked_fill(~given, -torch.inf)
        joined = bias if given is None else bias + given
        if given is None:
            joined = joined.as_subclass(Learning)
        if len(positional) > 1:
            positional[1] = joined
            return tuple(positional), kwargs
        return args, {**kwargs, "attn_mask": joined}


class Learning(Tensor):
    """An attention mask (1, 1, 1, N) with one number per key, which hosts hand on to the attention kernel.

    The fused kernel of CPUs gives no gradient of a mask, and is left for one that keeps the attention weights of all
    heads, (B, heads, N, N). With this mask it stays. Those of GPUs give one.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return _attend(*args, **kwargs)
            return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    """Attention with a key bias (1, 1, 1, N), on CPUs by PyTorch's private operators where the bias learns.

    They are worth it for memory more than for time. Without them a search step of DeiT-S holds 1.17 times as much at
    224 pixels and 1.54 times as much at 384, and takes 1.03 and 1.05 times as long. `_KeyBiased` alone calls them.
    """
    learns = attn_mask.requires_grad and torch.is_grad_enabled() and query.device.type == "cpu"
    alike = query.shape == value.shape and query.dtype == key.dtype == value.dtype
    if not (learns and alike) or dropout_p or is_causal or others.get("enable_gqa"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **others)
    out: Any = _KeyBiased.apply(query, key, value, attn_mask.to(query.dtype), others.get("scale"))
    return out


class _KeyBiased(torch.autograd.Function):
    """Fused attention on a CPU whose key bias has a gradient.

    The kernel's backward pass sees the bias as one more dimension, 1 in the queries and the bias in the keys, of which
    it gives the gradient like that of all others.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        mask = bias.expand(1, 1, query.shape[2], -1)
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=ctx.scale
        )
        ctx.save_for_backward(query, key, value, bias, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, total = ctx.saved_tensors
        column = bias.view(1, 1, -1).clamp_min(NEVER) / ctx.scale
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _wider(grads[0], 0.0),
            _wider(query, 1.0),
            _wider(key, column),
            _wider(value, 0.0),
            _wider(out, 0.0),
            total,
            0.0,
            False,
            scale=ctx.scale,
        )
        along_bias = found[1][..., -1].sum((0, 1)).view_as(bias) / ctx.scale
        return *(each[..., :-1] for each in found), along_bias, None


def _wider(tensor_BHNX: Tensor, last: float | Tensor) -> Tensor:
    """A copy with one more dimension per head, which is ``last``; in memory (B, N, H, X), as the kernel likes it."""
    batch, heads, tokens, size = tensor_BHNX.shape
    made = tensor_BHNX.new_empty(batch, tokens, heads, size + 1).transpose(1, 2)
    made[..., :-1] = tensor_BHNX
    made[..., -1] = last
    return made


class MeanPoolWeight(_Gate):
    """Forward hook of the module in front of average pooling: turns the mean into the weighted mean."""

    def __init__(self, sources: list[Source], prefix: int, pool_prefix: bool) -> None:
        super().__init__(sources, prefix)
        self.pooled_prefix = prefix if pool_prefix else 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output_BND: Tensor) -> Tensor:
        product = self.product()
        count = product.numel() + self.pooled_prefix
        share = count / (product.sum() + self.pooled_prefix)
        ahead = share if self.pooled_prefix else torch.ones_like(share)
        weights = torch.cat([ahead.expand(self.prefix), product * share])
        return output_BND * weights.to(output_BND.dtype).view(1, -1, 1)


class Multiply(_Gate):
    """Forward hook of a norm: the paper's variant, which multiplies its output by tanh of this block's mask."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output_BND: Tensor) -> Tensor:
        mask, _ = self.sources[-1]
        factor = torch.cat([mask.new_ones(self.prefix), torch.tanh(mask)])
        return output_BND * factor.to(output_BND.dtype).view(1, -1, 1)


def attach_token_gates(
    model: nn.Module, sites: Sequence[Group], masks: Mapping[str, nn.Parameter], tokens: str
) -> list[Callable[[], None]]:
    """Register each token mask on its block and the hooks that apply it, from its block to the pooling.

    Args:
        model: the model.
        sites: every token group of the model, from shallow to deep.
        masks: masks of some of them, by group name.
        tokens: ``"bias"`` or ``"multiply"``.

    Returns:
        Functions that take everything away again.
    """
    removers: list[Callable[[], None]] = []
    seen: list[tuple[TokenSite, nn.Parameter]] = []
    for group in sites:
        site = group.token
        assert site is not None
        mask = masks.get(group.name)
        if mask is not None:
            block = model.get_submodule(site.block)
            block.register_parameter("token_mask", mask)
            removers.append(_Unregister(block))
            seen.append((site, mask))
        sources = [_source(earlier, parameter, site) for earlier, parameter in seen]
        if tokens == MULTIPLY and mask is not None:
            gate = Multiply(sources, site.prefix)
            removers += [model.get_submodule(name).register_forward_hook(gate).remove for name in site.norms]
        elif tokens == BIAS and sources:
            # A block without a mask of its own still sees the tokens that left before it.
            hook = KeyBias(sources, site.prefix)
            attention = model.get_submodule(site.attention)
            removers.append(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if group is sites[-1]:
                removers += _gate_pool(model, site, sources)
    return removers


def _gate_pool(model: nn.Module, last: TokenSite, sources: list[Source]) -> list[Callable[[], None]]:
    """Gate the pooling by the product of all masks; nothing to do where the class token is read."""
    removers: list[Callable[[], None]] = []
    if last.mean_pool is not None:
        weight = MeanPoolWeight(sources, last.prefix, last.pool_prefix)
        removers.append(model.get_submodule(last.mean_pool).register_forward_hook(weight).remove)
    if last.attention_pool is not None:
        bias = KeyBias(sources, last.prefix if last.pool_prefix else 0)
        pool = model.get_submodule(last.attention_pool)
        removers.append(pool.register_forward_pre_hook(bias, with_kwargs=True).remove)
    return removers


def _source(earlier: TokenSite, mask: nn.Parameter, here: TokenSite) -> Source:
    if earlier.positions == here.positions:
        return mask, None
    place_of = {position: place for place, position in enumerate(earlier.positions)}
    return mask, torch.tensor([place_of[position] for position in here.positions])


class _Unregister:
    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self) -> None:
        del self.block.token_mask
