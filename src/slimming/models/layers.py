"""Modules that replace modules of the host library in slim models.

Shape suffixes: B batch, N tokens, D embedding width, Q and V the sums of the heads' QK and V sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.errors import UnsupportedModelError


class TokenSelect(nn.Module):
    """Select the tokens at fixed positions of the sequence, before a block.

    Args:
        index: positions of the input sequence to keep, prefix tokens included, ascending.
        incoming: length of the input sequence.
    """

    index: Tensor

    def __init__(self, index: Sequence[int], incoming: int) -> None:
        super().__init__()
        self.incoming = incoming
        # Not in the state dict, because the structure holds the positions.
        self.register_buffer("index", torch.tensor(list(index), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Select tokens: (B, N, D) -> (B, len(index), D).

        Raises:
            UnsupportedModelError: the sequence has another length, or an attention mask is given.
        """
        if x.shape[1] != self.incoming:
            raise UnsupportedModelError(
                f"Tokens were cut for sequences of {self.incoming} tokens, but this image has {x.shape[1]}: "
                "use the image size that the model was slimmed at, or plan without tokens."
            )
        if attn_mask is not None or is_causal:
            raise UnsupportedModelError("Tokens were cut, so an attention mask over the full grid no longer fits.")
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        return f"{self.incoming} -> {self.index.numel()}"


class UnavailableMethod:
    """Replacement of a method that cannot work after a cut; raises an error with the reason when it is called.

    Args:
        reason: a sentence about what was cut and what to do instead.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Raise the error.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(self.reason)


class Removed(nn.Module):
    """Takes the place of a module that was removed: it computes nothing and returns what the host's forward expects.

    Attributes that are plain settings, such as a number of heads, are those of the removed module.

    Args:
        module: the module that is removed.
        form: ``"one"`` result, or a ``"tuple"`` or ``"list"`` of them.
        results: for each result ``("zeros", key)`` with the position or keyword of the argument that has its shape,
            ``("zeros", key, dim)`` if it has size 1 along a dimension, ``("input", key)`` for the argument
            itself, or ``("none",)``.
    """

    def __init__(self, module: nn.Module, form: str, results: Sequence[Sequence[Any]]) -> None:
        super().__init__()
        settings = {name: value for name, value in vars(module).items() if type(value) in (bool, int, float, str)}
        self.__dict__.update(settings)
        self.removed = type(module).__name__
        self.form = form
        self.results = tuple(tuple(result) for result in results)
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros or arguments, see above.

        Raises:
            UnsupportedModelError: the host does not pass an argument that it passed when the model was read.
        """
        found = [self._result(*result, args=args, kwargs=kwargs) for result in self.results]
        return found[0] if self.form == "one" else tuple(found) if self.form == "tuple" else found

    def _result(self, what: str, key: int | str = 0, single: int | None = None, *, args: Any, kwargs: Any) -> Any:
        if what == "none":
            return None
        if key not in kwargs and not (isinstance(key, int) and key < len(args)):
            raise UnsupportedModelError(
                f"{self.removed} was cut from this model, and its call does not give argument {key!r}: "
                "call the model as it was called when it was slimmed."
            )
        value = args[key] if isinstance(key, int) else kwargs[key]
        if what == "input":
            return value
        return torch.zeros_like(value if single is None else value.narrow(single, 0, 1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            removed = self.__dict__.get("removed", "module")
            raise AttributeError(f"{removed} was cut from this model, so that it has no {name!r}.") from None

    def extra_repr(self) -> str:
        return self.removed


class UnevenAttention(nn.Module):
    """Multi-head self-attention with a QK size and a V size per head.

    Heads are ordered by size, so that the heads of one size are one slice of the projections and one call of the
    attention kernel, without padding. Parameter names are those of timm's ``Attention``.

    Args:
        dim: embedding width D of the input.
        heads: (QK size, V size) of each head, ordered.
        scale: factor of the logits, ``head_dim ** -0.5`` of the dense model.
        qkv_bias: whether the joint projection has a bias.
        proj_bias: whether the output projection has a bias.
        dim_out: embedding width of the output.
        q_norm: norm over the dimensions of each query, if any.
        k_norm: norm over the dimensions of each key, if any.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
    """

    def __init__(
        self,
        dim: int,
        heads: Sequence[tuple[int, int]],
        *,
        scale: float,
        qkv_bias: bool,
        proj_bias: bool,
        dim_out: int,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = [(int(qk), int(v)) for qk, v in heads]
        self.runs = [(len(list(run)), qk, v) for (qk, v), run in groupby(self.heads)]
        self.num_heads = len(self.heads)
        self.qk_dim = sum(qk for qk, _ in self.heads)
        self.v_dim = self.attn_dim = sum(v for _, v in self.heads)
        self.scale = scale
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + self.v_dim, bias=qkv_bias, **factory)
        self.q_norm = q_norm if q_norm is not None else nn.Identity()
        self.k_norm = k_norm if k_norm is not None else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.v_dim, dim_out, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend: (B, N, D) -> (B, N, dim_out); ``attn_mask`` broadcasts to (B, heads, N, N)."""
        batch, tokens, _ = x.shape
        q_BNQ, k_BNQ, v_BNV = self.qkv(x).split([self.qk_dim, self.qk_dim, self.v_dim], dim=-1)
        outputs: list[Tensor] = []
        qk_start = v_start = 0
        for count, qk, v in self.runs:
            q = q_BNQ[..., qk_start : qk_start + count * qk].reshape(batch, tokens, count, qk).transpose(1, 2)
            k = k_BNQ[..., qk_start : qk_start + count * qk].reshape(batch, tokens, count, qk).transpose(1, 2)
            value = v_BNV[..., v_start : v_start + count * v].reshape(batch, tokens, count, v).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                self.q_norm(q),
                self.k_norm(k),
                value,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.0,
                is_causal=is_causal,
                scale=self.scale,
            )
            outputs.append(out.transpose(1, 2).reshape(batch, tokens, count * v))
            qk_start += count * qk
            v_start += count * v
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return self.proj_drop(self.proj(joined))

    def extra_repr(self) -> str:
        return "heads (qk, v): " + ", ".join(f"{count}x({qk}, {v})" for count, qk, v in self.runs)


class PartialBlock(nn.Module):
    """A timm transformer block without its attention, its MLP, or both; the other modules keep their names.

    Args:
        block: the block whose modules are used.
        attention: whether the attention and its norm are kept.
        mlp: whether the MLP and its norm are kept.
        post_norm: whether the norms follow the attention and the MLP.
    """

    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    ls1: Any
    ls2: Any
    drop_path1: Any
    drop_path2: Any

    def __init__(self, block: nn.Module, *, attention: bool, mlp: bool, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        branches = ((attention, ("norm1", "attn", "ls1", "drop_path1")), (mlp, ("norm2", "mlp", "ls2", "drop_path2")))
        for is_kept, names in branches:
            for name in names:
                # A removed module is None and not a child, so loading weights for it is an error.
                setattr(self, name, getattr(block, name, None) if is_kept else None)
        self.train(block.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Add the outputs of the kept branches: (B, N, D) -> (B, N, D)."""
        if self.attn is not None:
            causal = {"is_causal": True} if is_causal else {}  # older versions of timm do not have the argument
            branch = self.attn(x if self.post_norm else self.norm1(x), attn_mask=attn_mask, **causal)
            x = x + self.drop_path1(self.norm1(branch) if self.post_norm else self.ls1(branch))
        if self.mlp is not None:
            branch = self.mlp(x if self.post_norm else self.norm2(x))
            x = x + self.drop_path2(self.norm2(branch) if self.post_norm else self.ls2(branch))
        return x

    def extra_repr(self) -> str:
        removed = [name for name in ("attn", "mlp") if getattr(self, name) is None]
        return f"without {' and '.join(removed)}"


class SomeHeadsAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose number of heads times their size may differ from the embedding width.

    It has no constructor arguments: the class of an existing ``nn.MultiheadAttention`` is set to this one.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # Disables torch's fused encoder, which infers the head size from the embedding width.
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments and results of ``nn.MultiheadAttention``."""
        batched = query.dim() == 3
        batch_dim = 0 if self.batch_first or not batched else 1
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self._projected(query, key, value, batch_dim if batched else None)
        )
        mask = _additive_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = (logits if mask is None else logits + mask).softmax(-1)
            out = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], weights if weights is None else weights[0]
        return out.transpose(0, batch_dim), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int | None) -> Sequence[Tensor]:
        """Project to queries, keys and values: (B, N, D), (N, B, D) or (N, D) -> (B, N, size of all heads)."""
        weight, bias, values = self.in_proj_weight, self.in_proj_bias, self.out_proj.in_features
        rows = len(weight) if weight is not None else 2 * len(self.q_proj_weight) + values
        sizes = [(rows - values) // 2] * 2 + [values]
        inputs = [x[None] if batch_dim is None else x.transpose(0, batch_dim) for x in (query, key, value)]
        if weight is not None and query is key is value:
            return F.linear(inputs[0], weight, bias).split(sizes, dim=-1)
        if weight is not None and key is value:
            of_query, of_others = weight.split([sizes[0], rows - sizes[0]])
            bias_of_query, bias_of_others = (None, None) if bias is None else bias.split([sizes[0], rows - sizes[0]])
            queries = F.linear(inputs[0], of_query, bias_of_query)
            return [queries, *F.linear(inputs[1], of_others, bias_of_others).split(sizes[1:], dim=-1)]
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.split(sizes)
        )
        biases = (None, None, None) if bias is None else bias.split(sizes)
        return [F.linear(*each) for each in zip(inputs, weights, biases, strict=True)]


def _additive_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """The sum of the masks of ``nn.MultiheadAttention``, to be added to the logits: (B or 1, heads or 1, N, M)."""
    total = None
    if attn_mask is not None:
        batch, heads = q.shape[:2]
        total = _as_additive(attn_mask, q)
        total = total[None, None] if total.dim() == 2 else total.unflatten(0, (batch, heads))
    if padding is not None:
        mask = _as_additive(padding if padding.dim() == 2 else padding[None], q)[:, None, None]
        total = mask if total is None else total + mask
    return total


def _as_additive(mask: Tensor, q: Tensor) -> Tensor:
    """A boolean mask, True where attention is not allowed, as 0 and -inf; other masks in the dtype of ``q``."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(q.dtype)
