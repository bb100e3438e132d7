"""Read the sizes of a timm Vision Transformer, dense or slim, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import nn

from slimming.errors import CheckpointError, UnsupportedModelError
from slimming.models.layers import PartialBlock, TokenSelect, UnevenAttention


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Sizes of one block.

    Attributes:
        name: the block's module name.
        heads: (QK, V) dimensions of each head, in order; empty if the attention was removed.
        scale: factor of the attention logits.
        hidden: hidden units of the MLP; 0 if it was removed.
        positions: patch positions that are present, as indices into the dense grid, row by row.
    """

    name: str
    heads: tuple[tuple[int, int], ...]
    scale: float
    hidden: int
    positions: tuple[int, ...]

    @property
    def qk_total(self) -> int:
        """QK dimensions of all heads."""
        return sum(qk for qk, _ in self.heads)

    @property
    def v_total(self) -> int:
        """V dimensions of all heads."""
        return sum(v for _, v in self.heads)

    @staticmethod
    def from_dict(name: str, entry: Mapping[str, Any]) -> BlockSizes:
        """Read an entry of `Structure.layers`.

        Raises:
            CheckpointError: the entry is damaged.
        """
        try:
            sizes = BlockSizes(
                name=name,
                heads=tuple((int(qk), int(v)) for qk, v in entry["heads"]),
                scale=float(entry["scale"]),
                hidden=int(entry["hidden"]),
                positions=tuple(int(position) for position in entry["positions"]),
            )
            positive = [size for head in sizes.heads for size in head] + [sizes.hidden + 1, len(sizes.positions)]
            if min(positive) < 1:
                raise ValueError("a size below 1")
            return sizes
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The structure of {name} is damaged: {error!r}. Take an intact copy.") from error


def block_sizes(vit: VisionTransformer) -> list[BlockSizes]:
    """Read the sizes of every block.

    Raises:
        UnsupportedModelError: a block, attention or MLP is of a class that is not supported.
    """
    rows, columns = vit.patch_embed.grid_size
    positions = tuple(range(rows * columns))
    prefix = vit.num_prefix_tokens
    result: list[BlockSizes] = []
    for key, block in vit.blocks.named_children():
        if isinstance(block, TokenSelect):
            positions = tuple(positions[index - prefix] for index in block.index.tolist()[prefix:])
            continue
        name = f"blocks.{key}"
        _check(name, block, Block, ResPostBlock, PartialBlock)
        if block.attn is not None:
            _check(f"{name}.attn", block.attn, Attention, UnevenAttention)
        if block.mlp is not None:
            _check(f"{name}.mlp", block.mlp, Mlp, GluMlp)
        result.append(
            BlockSizes(
                name=name,
                heads=head_sizes(block.attn),
                scale=1.0 if block.attn is None else float(block.attn.scale),
                hidden=0 if block.mlp is None else block.mlp.fc2.in_features,
                positions=positions,
            )
        )
    return result


def head_sizes(attention: nn.Module | None) -> tuple[tuple[int, int], ...]:
    """(QK, V) dimensions of each head; empty if ``attention`` is None."""
    if attention is None:
        return ()
    if isinstance(attention, UnevenAttention):
        return tuple(attention.heads)
    return ((int(attention.head_dim), int(attention.head_dim)),) * int(attention.num_heads)


def norm_follows(block: nn.Module) -> bool:
    """Whether ``block`` has post-norm: its norms follow the attention and the MLP."""
    return isinstance(block, ResPostBlock) or (isinstance(block, PartialBlock) and block.post_norm)


def _check(name: str, module: nn.Module, *classes: type[nn.Module]) -> None:
    if type(module) not in classes:
        readable = " and ".join(c.__name__ for c in classes if c not in (UnevenAttention, PartialBlock))
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, which family timm-vit does not read (it reads {readable}). "
            "docs/add-a-model.md shows how to add a reader."
        )
