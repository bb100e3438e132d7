"""Small Vision Transformers with attention of their own, as people write it, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DIM, HEADS = 32, 4


def split(x: Tensor, heads: int) -> Tensor:
    """'b n (h d) -> b h n d'."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """'b h n d -> b n (h d)'."""
    return x.transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """One layer for queries, keys and values, a norm inside, and the product in a module of its own."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, dim_head: int = 8) -> None:
        super().__init__()
        self.heads, self.scale, inner = heads, dim_head**-0.5, heads * dim_head
        self.norm, self.attend, self.dropout = nn.LayerNorm(dim), nn.Softmax(dim=-1), nn.Dropout(0.0)
        self.to_qkv = nn.Linear(dim, inner * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part, self.heads) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        weights = self.dropout(self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale))
        return self.to_out(joined(torch.matmul(weights, v)))


class HeadsLast(Packed):
    """Two heads that are put together dimension by dimension, as in NesT."""

    def __init__(self) -> None:
        super().__init__(heads=2, dim_head=6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part, self.heads) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        weights = self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale)
        return self.to_out(torch.matmul(weights, v).permute(0, 2, 3, 1).flatten(2))


class KeysAndValues(nn.Module):
    """One layer for queries and one for keys and values; products by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_kv, self.to_out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q = split(self.to_q(x), self.heads)
        k, v = (split(part, self.heads) for part in self.to_kv(x).chunk(2, dim=-1))
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(dim=-1)
        return self.to_out(joined(torch.einsum("bhij,bhjd->bhid", weights, v)))


class Separate(nn.Module):
    """Three layers, a norm for the queries and keys of every head, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.head_size = HEADS, DIM // HEADS
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.q_norm, self.k_norm, self.out = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.n_head, self.head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(joined(mixed))


class Inferred(nn.Module):
    """Divides the width by the number of heads, as in many copies of timm's first attention."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, 8**-0.5
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) * self.scale * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Rotary(nn.Module):
    """Rotates queries and keys by position, in a class whose name says nothing; rows of a head are 3 x d together."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.mix, self.back = HEADS, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def turned(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.linspace(1, 0.1, half, dtype=x.dtype)
        cos, sin = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.mix(x), self.count).chunk(3, dim=-1)
        weights = (self.turned(q) @ self.turned(k).transpose(-2, -1)).softmax(dim=-1)
        return self.back(joined(weights @ v))


class Grouped(nn.Module):
    """Half as many heads of keys and values as of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, HEADS // 2, 8
        self.q_proj, self.o_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.k_proj, self.v_proj = nn.Linear(DIM, DIM // 2), nn.Linear(DIM, DIM // 2)

    def forward(self, x: Tensor) -> Tensor:
        q = split(self.q_proj(x), self.num_heads)
        k, v = (split(layer(x), self.num_kv_heads) for layer in (self.k_proj, self.v_proj))
        k, v = (part.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for part in (k, v))
        return self.o_proj(joined((q @ k.transpose(-2, -1)).softmax(-1) @ v))


class Adapted(nn.Module):
    """A Linear with an adapter of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, 0.5
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling


class WithAdapters(KeysAndValues):
    """Adapters beside the layers for queries, for keys and values, and for the output."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("to_q", "to_kv", "to_out"):
            base = self.get_submodule(name)
            assert isinstance(base, nn.Linear)
            setattr(self, name, Adapted(base))


class TalkingHeads(Packed):
    """Attention weights of all heads are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Conv2d(HEADS, HEADS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part, self.heads) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        weights = self.talk((q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1))
        return self.to_out(joined(weights @ v))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer, self.norm2 = nn.LayerNorm(DIM), attention, nn.LayerNorm(DIM)
        self.feed = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.feed(self.norm2(x))


class Vit(nn.Module):
    """Two blocks on 16 patches."""

    image_size = 16

    def __init__(self, attention: Callable[[], nn.Module], classes: int = 5) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, DIM, 4, 4), nn.Sequential(Block(attention()), Block(attention()))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, classes)

    def forward(self, x: Tensor) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))
