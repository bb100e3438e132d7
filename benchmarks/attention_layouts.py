"""How to run attention whose heads have sizes of their own.

    python benchmarks/attention_layouts.py

The attention of DeiT-S, its heads cut to drawn sizes, in several ways, all timed in turns with the dense one:

- grouped: heads lie ordered by size, one call of the kernel for each distinct size
  (`slimming.models.layers.UnevenAttention`);
- matched: the same, with zeros after the projections that make QK and V of a head alike;
- rounded: each head gets zeros up to a multiple of 16, one call for each distinct size;
- one by one: a call for each head;
- padded: projections of the true sizes, then zeros up to the largest head, and one call;
- padded weights: the zeros are in the weights, so that the host's own module runs;
- equal heads: as many dimensions in all, but the same for each head, for comparison.

``converted`` is the measured speed-up over the ratio of MACs, those of the true sizes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from common import Spread, interleaved, parser, ratios, table, write
from slimming.models.layers import UnevenAttention

TOKENS, WIDTH, HEADS, SIZE = 197, 384, 6, 64
LAYOUTS = {
    "multiples of 16": (16, True),
    "multiples of 8": (8, True),
    "multiples of 8, QK and V apart": (8, False),
    "any size, QK and V apart": (1, False),
}
"""Name -> (multiple, whether QK and V are of one size)."""


class OneByOne(UnevenAttention):
    """A call of the kernel for each head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.runs = [(1, qk, v) for qk, v in self.heads]


class Matched(UnevenAttention):
    """As grouped; where QK and V differ the smaller gets zeros up to the larger, so that a fused kernel runs."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, self.v_dim], dim=-1)
        outputs: list[Tensor] = []
        at_qk = at_v = 0
        for count, qk, size in self.runs:
            most = max(qk, size)
            query, key = (
                F.pad(one[..., at_qk : at_qk + count * qk].reshape(batch, tokens, count, qk), (0, most - qk))
                for one in (q, k)
            )
            value = F.pad(v[..., at_v : at_v + count * size].reshape(batch, tokens, count, size), (0, most - size))
            found = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=self.scale
            )
            outputs.append(found[..., :size].transpose(1, 2).reshape(batch, tokens, count * size))
            at_qk += count * qk
            at_v += count * size
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1))


class Rounded(UnevenAttention):
    """Each head padded to a multiple of 16, QK and V alike; one call for each distinct size."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        total = 2 * self.qk_dim + self.v_dim  # place of a column of zeros
        by_size: dict[int, list[list[list[int]]]] = {}
        where: dict[int, list[list[int]]] = {}
        at_qk = at_v = 0
        for qk, v in self.heads:
            size = -(-max(qk, v) // 16) * 16
            starts = ((at_qk, qk), (self.qk_dim + at_qk, qk), (2 * self.qk_dim + at_v, v))
            rows = [[*range(start, start + own), *[total] * (size - own)] for start, own in starts]
            by_size.setdefault(size, []).append(rows)
            where.setdefault(size, []).append([at_v, v])
            at_qk, at_v = at_qk + qk, at_v + v
        self.sizes = list(by_size)
        for size, rows in by_size.items():
            index = torch.tensor(rows).permute(1, 0, 2).reshape(-1)  # q, k, v of all heads
            self.register_buffer(f"index_{size}", index, persistent=False)
        order = [start + place for size in self.sizes for start, v in where[size] for place in range(v)]
        kept, at = [], 0
        for size in self.sizes:
            for _, v in where[size]:
                kept += range(at, at + v)
                at += size
        back = torch.empty(self.v_dim, dtype=torch.int64)
        back[torch.tensor(order)] = torch.tensor(kept)
        self.register_buffer("back", back, persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = F.pad(self.qkv(x), (0, 1))
        outputs = []
        for size in self.sizes:
            run = qkv.index_select(-1, self.get_buffer(f"index_{size}")).view(batch, tokens, 3, -1, size)
            q, k, v = run.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            outputs.append(out.transpose(1, 2).reshape(batch, tokens, -1))
        return self.proj(torch.cat(outputs, dim=-1).index_select(-1, self.back))


class Padded(UnevenAttention):
    """Projections of the true sizes; queries, keys and values get zeros up to the largest head."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, self.v_dim], dim=-1)
        qk_sizes, v_sizes = [qk for qk, _ in self.heads], [v for _, v in self.heads]
        q, k, v = _padded(q, qk_sizes), _padded(k, qk_sizes), _padded(v, v_sizes)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(torch.cat([out[:, head, :, :size] for head, size in enumerate(v_sizes)], dim=-1))


def _padded(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """From (B, N, sum of sizes) to (B, heads, N, largest size)."""
    most = max(sizes)
    return torch.stack([F.pad(one, (0, most - one.shape[-1])) for one in x.split(list(sizes), dim=-1)], dim=1)


def even(size: int) -> Attention:
    """Timm's attention with heads of ``size`` dimensions."""
    found = Attention(WIDTH, num_heads=HEADS, qkv_bias=True)
    found.head_dim, found.attn_dim, found.scale = size, HEADS * size, size**-0.5
    found.qkv, found.proj = nn.Linear(WIDTH, 3 * HEADS * size), nn.Linear(HEADS * size, WIDTH)
    return found


def drawn(share: float, multiple: int, same: bool, seed: int) -> list[tuple[int, int]]:
    """Sizes of heads, about ``share`` of the dense ones together, ordered."""
    dice = random.Random(seed)

    def size() -> int:
        wanted = SIZE * min(1.0, max(0.1, dice.gauss(share, 0.2)))
        return max(multiple, round(wanted / multiple) * multiple)

    found = []
    for _ in range(HEADS):
        qk = size()
        found.append((qk, qk if same else size()))
    return sorted(found)


def macs(heads: Sequence[tuple[int, int]]) -> int:
    """Multiply-adds of the attention of one image."""
    qk, v = sum(one for one, _ in heads), sum(one for _, one in heads)
    return TOKENS * WIDTH * (2 * qk + v) + TOKENS * TOKENS * (qk + v) + TOKENS * v * WIDTH


def ways(heads: Sequence[tuple[int, int]]) -> dict[str, nn.Module]:
    """The same attention in each way."""
    made = {
        "grouped": UnevenAttention,
        "matched": Matched,
        "rounded": Rounded,
        "one by one": OneByOne,
        "padded": Padded,
    }
    arguments: dict[str, Any] = {"scale": SIZE**-0.5, "qkv_bias": True, "proj_bias": True, "dim_out": WIDTH}
    found: dict[str, nn.Module] = {name: cls(WIDTH, heads, **arguments) for name, cls in made.items()}
    state, x = found["grouped"].state_dict(), torch.randn(2, TOKENS, WIDTH)
    for module in found.values():
        module.load_state_dict(state)
        torch.testing.assert_close(module(x), found["grouped"](x))
    found["padded weights"] = even(max(max(head) for head in heads))
    found["equal heads"] = even(round(sum(qk + v for qk, v in heads) / (2 * HEADS)))
    return found


@torch.inference_mode()
def main() -> None:
    """Time every way at every layout, write the table."""
    arguments = parser(__doc__, rounds=20)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.4])
    settings = arguments.parse_args()
    torch.manual_seed(settings.seed)
    dense = even(SIZE).eval()
    full = macs([(SIZE, SIZE)] * HEADS)
    rows: list[dict[str, Any]] = []
    for batch in settings.batches:
        x = torch.randn(batch, TOKENS, WIDTH)
        for layout, (multiple, same) in LAYOUTS.items():
            for share in settings.shares:
                heads = drawn(share, multiple, same, settings.seed)
                modules = {"dense": dense, **{name: module.eval() for name, module in ways(heads).items()}}
                cases = {name: partial(module, x) for name, module in modules.items()}
                number = max(1, 64 // batch)
                seconds = interleaved(cases, rounds=settings.rounds, threads=settings.threads, number=number)
                ratio = full / macs(heads)
                for way in list(modules)[1:]:
                    speedup = ratios(seconds["dense"], seconds[way])
                    converted = Spread(speedup.median / ratio, speedup.p25 / ratio, speedup.p75 / ratio, speedup.runs)
                    rows.append({"batch": batch, "layout": layout, "share": share, "heads": heads, "way": way,
                                 "macs_ratio": ratio, "speedup": speedup, "converted": converted})  # fmt: skip
    names = list(dict.fromkeys(row["way"] for row in rows))
    lines = []
    for first in rows[:: len(names)]:
        same = [row for row in rows if all(row[key] == first[key] for key in ("batch", "layout", "share"))]
        sizes = " ".join(f"{qk}" if qk == v else f"{qk}/{v}" for qk, v in first["heads"])
        cells = [row["converted"].text(2) for row in same]
        lines.append([first["batch"], first["layout"], sizes, f"{1 / first['macs_ratio']:.0%}", *cells])
    markdown = table(["batch", "layout", "heads (QK/V)", "MACs", *names], lines)
    write("attention_layouts", settings=settings, rows=rows, markdown=markdown)


if __name__ == "__main__":
    main()
