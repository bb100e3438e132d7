"""Apply token masks by hooks on the attention modules, the pooling and, for the variant of the paper, the norms.

Shape suffixes: B batch, H heads, N tokens (including the prefix), D embedding width, X size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.groups import Group, TokenSite
from slimming.masks.options import BIAS, MULTIPLY
from slimming.models.token_masks import Source, TokenGate, additive, last_sites, mask_after, mask_block, places_of

RAW_INIT = 3.0
"""Initial value of token masks in the variant of the paper: tanh(3) is almost 1 (code of the authors)."""

NEVER = -1e4
"""A key bias that acts like -inf in every kernel, and gives no NaN when multiplied by 0."""


def token_factor(mask: Tensor, tokens: str) -> Tensor:
    """Return the factor of each token: its mask clamped to at least 0, or its tanh for the variant of the paper."""
    return torch.tanh(mask) if tokens == MULTIPLY else mask.clamp_min(0)


class KeyBias(TokenGate):
    """Forward pre-hook of an attention module: adds the bias to the keys of every head and query."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        bias = self.bias().to(args[0].dtype).view(1, 1, 1, -1)
        positional = list(args)
        given = positional[1] if len(positional) > 1 else kwargs.get("attn_mask")
        joined = as_key_bias(bias) if given is None else bias + additive(given, bias.dtype)
        if len(positional) > 1:
            positional[1] = joined
            return tuple(positional), kwargs
        return args, {**kwargs, "attn_mask": joined}


class KeyBiasMask(Tensor):
    """An attention mask (1, 1, 1, N) with one bias per key, which models pass on to the attention kernel.

    On CPUs the fused kernel gives no gradient of a mask, so PyTorch would use a kernel that stores the attention
    weights of all heads, (B, H, N, N). With this class the fused kernel is used. The kernels of GPUs give a gradient.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return biased_attention(*args, **kwargs)
            return func(*args, **kwargs)


def as_key_bias(bias: Tensor) -> Tensor:
    """The bias (1, 1, 1, N) as a `KeyBiasMask`."""
    return bias.as_subclass(KeyBiasMask)


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    """Attention with a key bias (1, 1, 1, N); on CPUs, a bias with a gradient uses private operators of PyTorch.

    These save more memory than time: without them, a search step of DeiT-S needs 1.17 times the memory at 224 pixels
    and 1.52 times at 384, and takes 1.02 and 1.04 times as long (`benchmarks/key_bias.py`). Only `KeyBiased` calls
    them.
    """
    needs_gradient = attn_mask.requires_grad and torch.is_grad_enabled() and query.device.type == "cpu"
    same_shape = query.shape == value.shape and query.dtype == key.dtype == value.dtype
    if not (needs_gradient and same_shape) or dropout_p or is_causal or others.get("enable_gqa"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **others)
    out: Any = KeyBiased.apply(query, key, value, attn_mask.to(query.dtype), others.get("scale"))
    return out


class KeyBiased(torch.autograd.Function):
    """Fused attention on a CPU with a gradient of the key bias.

    In the backward pass, the bias is given to the kernel as an additional head dimension, which is 1 in the queries and
    the bias in the keys. The gradient of the bias is then part of the gradient of the keys.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
        """Return the outputs of attention; the bias has shape (1, 1, 1, N)."""
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        mask = bias.expand(1, 1, query.shape[2], -1)
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=ctx.scale
        )
        ctx.save_for_backward(query, key, value, bias, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys, values and the bias."""
        query, key, value, bias, out, total = ctx.saved_tensors
        column = bias.view(1, 1, -1).clamp_min(NEVER) / ctx.scale
        grads_wide = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
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
        bias_grad = grads_wide[1][..., -1].sum((0, 1)).view_as(bias) / ctx.scale
        return *(grad[..., :-1] for grad in grads_wide), bias_grad, None


def _wider(tensor_BHNX: Tensor, last: float | Tensor) -> Tensor:
    """A copy with one more dimension per head, filled with ``last``; in the memory order (B, N, H, X) of the kernel."""
    batch, heads, tokens, size = tensor_BHNX.shape
    made = tensor_BHNX.new_empty(batch, tokens, heads, size + 1).transpose(1, 2)
    made[..., :-1] = tensor_BHNX
    made[..., -1] = last
    return made


class MeanPoolWeight(TokenGate):
    """Forward hook of the module before average pooling: turns the mean over tokens into a weighted mean."""

    def __init__(self, sources: Sequence[Source], prefix: int, pool_prefix: bool) -> None:
        super().__init__(sources, prefix)
        self.pooled_prefix = prefix if pool_prefix else 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output_BND: Tensor) -> Tensor:
        product = self.product()
        count = product.numel() + self.pooled_prefix
        share = count / (product.sum() + self.pooled_prefix)
        ahead = share if self.pooled_prefix else torch.ones_like(share)
        weights = torch.cat([ahead.expand(self.prefix), product * share])
        return output_BND * weights.to(output_BND.dtype).view(1, -1, 1)


class Multiply(TokenGate):
    """Forward hook of a norm: multiplies its output by tanh of the mask of this block, as in the paper."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output_BND: Tensor) -> Tensor:
        mask, _ = self.sources[-1]
        factor = torch.cat([mask.new_ones(self.prefix), torch.tanh(mask), mask.new_ones(self.suffix)])
        return output_BND * factor.to(output_BND.dtype).view(1, -1, 1)


def attach_token_gates(
    model: nn.Module, sites: Sequence[Group], masks: Mapping[str, nn.Parameter], tokens: str
) -> list[Callable[[], None]]:
    """Register each token mask as a parameter of its block, and the hooks that apply it from there to the pooling.

    Args:
        model: the model.
        sites: all token groups of the model, from shallow to deep.
        masks: masks of some of these groups by name.
        tokens: ``"bias"`` or ``"multiply"``.

    Returns:
        Functions that remove the parameters and hooks.
    """
    removers: list[Callable[[], None]] = []
    seen: dict[str, list[tuple[TokenSite, nn.Parameter]]] = {}
    last = last_sites(sites)
    for group in sites:
        site = group.token
        assert site is not None
        mask = masks.get(group.name)
        before = seen.setdefault(site.sequence, [])
        if mask is not None:
            block = model.get_submodule(site.block)
            block.register_parameter("token_mask", mask)
            removers.append(_Unregister(block))
            before.append((site, mask))
        sources: list[Source] = [(parameter, places_of(earlier, site)) for earlier, parameter in before]
        if tokens == MULTIPLY and mask is not None:
            gate = Multiply(sources, site.prefix, site.suffix)
            removers += [model.get_submodule(name).register_forward_hook(gate).remove for name in site.norms]
        elif tokens == BIAS and sources:
            # A block without a mask still needs the masks of the blocks before it.
            removers += _gate_attention(model, site, sources)
            if group is last[site.sequence]:
                removers += _gate_pool(model, site, sources)
    return removers


def _gate_attention(model: nn.Module, site: TokenSite, sources: list[Source]) -> list[Callable[[], None]]:
    if site.attention is None:
        gate = TokenGate(sources, site.prefix, site.suffix)
        return mask_block(model, site, gate, as_key_bias, required=True)[0]
    hook = KeyBias(sources, site.prefix)
    return [model.get_submodule(site.attention).register_forward_pre_hook(hook, with_kwargs=True).remove]


def _gate_pool(model: nn.Module, last: TokenSite, sources: list[Source]) -> list[Callable[[], None]]:
    """Apply the product of all masks in the pooling; models that use the class token have none."""
    if last.attention is None:
        return mask_after(model, last, TokenGate(sources, last.prefix, last.suffix), as_key_bias)
    removers: list[Callable[[], None]] = []
    if last.mean_pool is not None:
        weight = MeanPoolWeight(sources, last.prefix, last.pool_prefix)
        removers.append(model.get_submodule(last.mean_pool).register_forward_hook(weight).remove)
    if last.attention_pool is not None:
        bias = KeyBias(sources, last.prefix if last.pool_prefix else 0)
        pool = model.get_submodule(last.attention_pool)
        removers.append(pool.register_forward_pre_hook(bias, with_kwargs=True).remove)
    return removers


class _Unregister:
    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self) -> None:
        del self.block.token_mask
