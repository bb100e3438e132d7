"""The few modules that a cut may leave behind.

Shape suffixes: B batch, N tokens, D embedding width, Q and V the sums of the heads' QK and V sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.errors import UnsupportedModelError


class TokenSelect(nn.Module):
    """Keep the tokens at fixed places of the sequence: an index selection in front of a block.

    Args:
        index: places to keep in the incoming sequence, prefix tokens included, ascending.
        incoming: length of the incoming sequence.
    """

    index: Tensor

    def __init__(self, index: Sequence[int], incoming: int) -> None:
        super().__init__()
        self.incoming = incoming
        # The structure is the one record of the positions, so the buffer stays out of the state dict.
        self.register_buffer("index", torch.tensor(list(index), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Select tokens: (B, N, D) -> (B, len(index), D).

        Raises:
            UnsupportedModelError: the sequence has another length, or an attention mask came along.
        """
        if x.shape[1] != self.incoming:
            raise UnsupportedModelError(
                f"Tokens were cut for sequences of {self.incoming} tokens, this image makes {x.shape[1]}: "
                "use the image size that the model was slimmed at, or plan without tokens."
            )
        if attn_mask is not None or is_causal:
            raise UnsupportedModelError("Tokens were cut, so an attention mask over the full grid no longer fits.")
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        return f"{self.incoming} -> {self.index.numel()}"


class Refusal:
    """Stands in for a method that a cut made meaningless; calling it says why.

    Args:
        reason: one sentence, what was cut and what to do instead.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Refuse.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(self.reason)


class UnevenAttention(nn.Module):
    """Multi-head self-attention whose heads have sizes of their own, QK apart from V.

    Heads lie ordered by size, so that each distinct size is one slice of the projections and one call of the
    attention kernel, without padding. Parameter names are those of timm's ``Attention``.

    Args:
        dim: embedding width D of the input.
        heads: (QK size, V size) of each head, ordered.
        scale: factor of the logits, the dense model's ``head_dim ** -0.5``.
        qkv_bias: whether the joint projection has a bias.
        proj_bias: whether the output projection has a bias.
        dim_out: embedding width of the output.
        q_norm: normalisation over each query's dimensions, if any.
        k_norm: normalisation over each key's dimensions, if any.
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
        at_qk = at_v = 0
        for count, qk, v in self.runs:
            q = q_BNQ[..., at_qk : at_qk + count * qk].reshape(batch, tokens, count, qk).transpose(1, 2)
            k = k_BNQ[..., at_qk : at_qk + count * qk].reshape(batch, tokens, count, qk).transpose(1, 2)
            value = v_BNV[..., at_v : at_v + count * v].reshape(batch, tokens, count, v).transpose(1, 2)
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
            at_qk += count * qk
            at_v += count * v
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return self.proj_drop(self.proj(joined))

    def extra_repr(self) -> str:
        return "heads (qk, v): " + ", ".join(f"{count}x({qk}, {v})" for count, qk, v in self.runs)
