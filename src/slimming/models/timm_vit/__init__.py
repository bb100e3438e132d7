"""timm's plain Vision Transformers: ``vit_*``, ``deit_*`` (with and without distillation token), ``deit3_*``.

`sizes` reads the sizes of a model, `groups` turns them into groups, `cost` into operations; `base` knows how
timm makes the dense model again and `resize` how to give modules other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from slimming.core.groups import Anatomy, Group
from slimming.core.structure import Structure
from slimming.errors import UnsupportedModelError
from slimming.models.family import STRUCTURE, Family, Kept, TimedModules, take, untied_groups
from slimming.models.timm_vit.groups import block_groups, tokens_why_not
from slimming.models.timm_vit.operations import operations
from slimming.models.timm_vit.rebuild import build, find_base, input_channels, rebased
from slimming.models.timm_vit.resize import is_even, place_token_selects_, query_factor, resize_block_
from slimming.models.timm_vit.sizes import BlockSizes, block_sizes
from slimming.models.timm_vit.timed_layers import timed_layers, timed_module
from slimming.models.timm_vit.width import WIDTH, resize_width_, width_group, width_of, width_why_not


class TimmViT(Family):
    """Reader of timm's ``VisionTransformer`` and ``VisionTransformerDistilled``."""

    name = "timm-vit"

    def reads(self, model: nn.Module) -> bool:
        if not isinstance(model, VisionTransformer) or type(model) not in (
            VisionTransformer,
            VisionTransformerDistilled,
        ):
            return False
        try:
            block_sizes(model)
        except UnsupportedModelError:  # blocks of another class, which tracing may still read
            return False
        return True

    def read(self, model: nn.Module) -> Anatomy:
        vit = _vit(model)
        blocks = block_sizes(vit)
        why_not = tokens_why_not(vit)
        uncovered = [f"token positions: {why_not}"] if why_not is not None else []
        groups = [
            group
            for depth, sizes in enumerate(blocks)
            for group in block_groups(vit, depth, sizes, tokens=why_not is None, uncovered=uncovered)
        ]
        if (why_not := width_why_not(vit)) is None:
            groups.append(width_group(vit, blocks))
        else:
            uncovered.append(f"embedding width: {why_not}")
        groups, shared = untied_groups(vit, groups)
        return Anatomy(
            groups=tuple(groups),
            operations=operations(vit, blocks, {group.name for group in groups}),
            structure=Structure(family=self.name, base=_base(vit), layers=_layers(blocks, vit.embed_dim)),
            timed_layers=timed_layers(vit, blocks, {group.name for group in groups}),
            uncovered=(*uncovered, *shared),
            input_shape=(input_channels(vit), *vit.patch_embed.img_size),
        )

    def build(self, base: Mapping[str, Any]) -> nn.Module:
        return build(base)

    def has_memory_formula(self, anatomy: Anatomy, kept: Kept) -> bool:
        # Heads with QK and V of different sizes leave the fused kernel, which totals per layer do not tell. What a
        # hybrid's layers in front of the patches hold is not in its operations.
        plain = bool(anatomy.operations[0].live)
        return plain and all(is_even(after.heads) for after, _ in _all_after(anatomy, kept))

    def timed_modules(self, model: nn.Module, anatomy: Anatomy, *, uneven_heads: bool = False) -> TimedModules:
        return partial(timed_module, _vit(model), uneven_heads=uneven_heads)

    def structure(self, anatomy: Anatomy, kept: Kept) -> Structure:
        width = len(kept[WIDTH]) if WIDTH in kept else width_of(anatomy.structure.layers)
        return replace(anatomy.structure, layers=_layers([after for after, _ in _all_after(anatomy, kept)], width))

    def select(self, anatomy: Anatomy, kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = dict(state)
        for sizes, (after, order) in zip(_blocks(anatomy), _all_after(anatomy, kept), strict=True):
            if after.heads:
                _select_attention_(result, sizes, after, order)
            hidden = f"{sizes.name}.mlp.hidden"
            if hidden in kept and after.hidden:
                _select_units_(result, anatomy.group(hidden), kept[hidden])
        if WIDTH in kept:
            _select_units_(result, anatomy.group(WIDTH), kept[WIDTH])
        return {name: tensor for name, tensor in result.items() if not name.startswith(_gone(anatomy, kept))}

    def resize_(self, model: nn.Module, structure: Structure) -> None:
        vit = _vit(model)
        blocks = _of_layers(structure.layers)
        for sizes in blocks:
            resize_block_(vit, sizes)
        resize_width_(vit, width_of(structure.layers))
        place_token_selects_(vit, blocks)
        vit.__dict__[STRUCTURE] = structure


def _vit(model: nn.Module) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(f"{type(model).__name__} is not a timm VisionTransformer.")
    return model


def _base(vit: VisionTransformer) -> dict[str, Any]:
    stored = vit.__dict__.get(STRUCTURE)
    return find_base(vit) if stored is None else rebased(stored.base, vit)


def _blocks(anatomy: Anatomy) -> list[BlockSizes]:
    return _of_layers(anatomy.structure.layers)


def _of_layers(layers: Mapping[str, Any]) -> list[BlockSizes]:
    return [BlockSizes.from_dict(name, entry) for name, entry in layers.items() if name != WIDTH]


def _layers(blocks: list[BlockSizes], width: int) -> dict[str, Any]:
    entries = {sizes.name: {k: v for k, v in asdict(sizes).items() if k != "name"} for sizes in blocks}
    return {**entries, WIDTH: {"width": width}}


HeadOrder = list[tuple[list[int], list[int]]]
"""Per kept head, in the order of the slim model: its QK places and its V places in the dense model."""


def _all_after(anatomy: Anatomy, kept: Kept) -> list[tuple[BlockSizes, HeadOrder]]:
    """`_after` for every block: a token that left earlier is gone, also where a block has no group of its own."""
    result: list[tuple[BlockSizes, HeadOrder]] = []
    for sizes in _blocks(anatomy):
        after, order = _after(sizes, kept)
        if result:
            present = set(result[-1][0].positions)
            after = replace(after, positions=tuple(place for place in after.positions if place in present))
        result.append((after, order))
    return result


def _gone(anatomy: Anatomy, kept: Kept) -> tuple[str, ...]:
    """How the names of the tensors begin that go with their whole attention or MLP."""
    inside = {"attn": ("norm1.", "attn.", "ls1."), "mlp": ("norm2.", "mlp.", "ls2.")}
    sites = [g.site.rpartition(".") for g in anatomy.groups if g.role == "branch" and not kept[g.name]]
    return tuple(f"{block}.{name}" for block, _, branch in sites for name in inside[branch])


def _after(sizes: BlockSizes, kept: Kept) -> tuple[BlockSizes, HeadOrder]:
    """The sizes of a block after the cut, and which head dimensions they are.

    Heads of different sizes are ordered by size (stable), so that equal ones lie together.
    """
    site = f"{sizes.name}.attn"
    order: HeadOrder = []
    if f"{site}.v" in kept:
        qk_kept = set(kept.get(f"{site}.qk", range(sizes.qk_total)))
        v_kept = set(kept[f"{site}.v"])
        at_qk = at_v = 0
        for qk, v in sizes.heads:
            qk_here = [place for place in range(at_qk, at_qk + qk) if place in qk_kept]
            v_here = [place for place in range(at_v, at_v + v) if place in v_kept]
            if v_here:
                order.append((qk_here, v_here))
            at_qk, at_v = at_qk + qk, at_v + v
        order.sort(key=lambda head: (len(head[0]), len(head[1])))
    positions = sizes.positions
    if f"{sizes.name}.tokens" in kept:
        positions = tuple(positions[unit] for unit in kept[f"{sizes.name}.tokens"])
    after = replace(
        sizes,
        heads=tuple((len(qk), len(v)) for qk, v in order) if f"{site}.v" in kept else sizes.heads,
        hidden=len(kept.get(f"{sizes.name}.mlp.hidden", range(sizes.hidden))),
        positions=positions,
    )
    return after, order


def _select_units_(state: dict[str, Tensor], group: Group, units: Sequence[int]) -> None:
    """Replace every tensor of ``group`` in ``state`` by what ``units`` are of it."""
    for slices in group.slices if len(units) < group.size else ():
        parts = range(len(slices.index[0]))
        places = [slices.index[unit][part] for part in parts for unit in units]
        state[slices.tensor] = take(state[slices.tensor], {slices.dim: places})


def _select_attention_(state: dict[str, Tensor], sizes: BlockSizes, after: BlockSizes, order: HeadOrder) -> None:
    """Replace the attention tensors of one block in ``state`` by what stays of them."""
    if after.heads == sizes.heads:
        return
    site = f"{sizes.name}.attn"
    qk = [place for head in order for place in head[0]]
    v = [place for head in order for place in head[1]]
    total = sizes.qk_total
    rows = [*qk, *(total + place for place in qk), *(2 * total + place for place in v)]
    factor = query_factor(after)
    for tensor in (f"{site}.qkv.weight", f"{site}.qkv.bias"):
        if tensor in state:
            chosen = take(state[tensor], {0: rows})
            chosen[: len(qk)] *= factor
            state[tensor] = chosen
    state[f"{site}.proj.weight"] = take(state[f"{site}.proj.weight"], {1: v})
