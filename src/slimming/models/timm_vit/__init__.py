"""Family of timm's plain Vision Transformers: ``vit_*``, ``deit3_*``, ``deit_*`` with and without distillation token.

`sizes` reads the sizes of a model. `groups` and `width` derive groups from them, `operations` cost formulas and
`timed_layers` the layers of a latency table. `rebuild` finds the arguments from which timm builds the dense model, and
`resize` resizes modules.
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
from slimming.models.family import ENTRY, STRUCTURE, Family, Kept, TimedModules, select_indices, untied_groups
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
        if any(module.__dict__.get(ENTRY) for module in model.modules()):
            return False  # it was cut as a part of a model of the family traced
        try:
            block_sizes(model)
        except UnsupportedModelError:  # blocks of other classes, which the family traced may support
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
        # Heads whose QK and V sizes differ are not computed by the fused kernel, which the totals per layer do not
        # show. The live tensors of the backbone of a hybrid are not in its operations.
        has_live_tensors = bool(anatomy.operations[0].live)
        return has_live_tensors and all(is_even(after.heads) for after, _ in _blocks_after(anatomy, kept))

    def timed_modules(self, model: nn.Module, anatomy: Anatomy, *, uneven_heads: bool = False) -> TimedModules:
        return partial(timed_module, _vit(model), uneven_heads=uneven_heads)

    def structure(self, anatomy: Anatomy, kept: Kept) -> Structure:
        width = len(kept[WIDTH]) if WIDTH in kept else width_of(anatomy.structure.layers)
        return replace(anatomy.structure, layers=_layers([after for after, _ in _blocks_after(anatomy, kept)], width))

    def select(self, anatomy: Anatomy, kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = dict(state)
        for sizes, (after, order) in zip(_blocks(anatomy), _blocks_after(anatomy, kept), strict=True):
            if after.heads:
                _select_attention_(result, sizes, after, order)
            hidden = f"{sizes.name}.mlp.hidden"
            if hidden in kept and after.hidden:
                _select_units_(result, anatomy.group(hidden), kept[hidden])
        if WIDTH in kept:
            _select_units_(result, anatomy.group(WIDTH), kept[WIDTH])
        return {
            name: tensor for name, tensor in result.items() if not name.startswith(_removed_prefixes(anatomy, kept))
        }

    def resize_(self, model: nn.Module, structure: Structure) -> None:
        vit = _vit(model)
        blocks = _of_layers(structure.layers)
        for sizes in blocks:
            resize_block_(vit, sizes)
        resize_width_(vit, width_of(structure.layers))
        place_token_selects_(vit, blocks)
        vit.__dict__[STRUCTURE] = structure
        for module in vit.modules():
            if module is not vit:
                module.__dict__[ENTRY] = {}


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
"""Indices of the QK and of the V dimensions in the dense model, for every kept head in the order of the slim model."""


def _blocks_after(anatomy: Anatomy, kept: Kept) -> list[tuple[BlockSizes, HeadOrder]]:
    """`_block_after` for every block, without the tokens that were removed in an earlier block."""
    result: list[tuple[BlockSizes, HeadOrder]] = []
    for sizes in _blocks(anatomy):
        after, order = _block_after(sizes, kept)
        if result:
            present = set(result[-1][0].positions)
            after = replace(after, positions=tuple(position for position in after.positions if position in present))
        result.append((after, order))
    return result


def _removed_prefixes(anatomy: Anatomy, kept: Kept) -> tuple[str, ...]:
    """Prefixes of the names of tensors that are removed together with a whole attention or MLP."""
    modules = {"attn": ("norm1.", "attn.", "ls1."), "mlp": ("norm2.", "mlp.", "ls2.")}
    sites = [g.site.rpartition(".") for g in anatomy.groups if g.role == "branch" and not kept[g.name]]
    return tuple(f"{block}.{name}" for block, _, branch in sites for name in modules[branch])


def _block_after(sizes: BlockSizes, kept: Kept) -> tuple[BlockSizes, HeadOrder]:
    """The sizes of a block after the cut, and the head dimensions that are kept.

    Heads are sorted by size (stable), so that heads of equal size are consecutive.
    """
    site = f"{sizes.name}.attn"
    order: HeadOrder = []
    if f"{site}.v" in kept:
        qk_kept = set(kept.get(f"{site}.qk", range(sizes.qk_total)))
        v_kept = set(kept[f"{site}.v"])
        qk_start = v_start = 0
        for qk, v in sizes.heads:
            qk_of_head = [index for index in range(qk_start, qk_start + qk) if index in qk_kept]
            v_of_head = [index for index in range(v_start, v_start + v) if index in v_kept]
            if v_of_head:
                order.append((qk_of_head, v_of_head))
            qk_start, v_start = qk_start + qk, v_start + v
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
    """Replace every tensor of ``group`` in ``state`` by its slices of ``units``."""
    for slices in group.slices if len(units) < group.size else ():
        parts = range(len(slices.index[0]))
        indices = [slices.index[unit][part] for part in parts for unit in units]
        state[slices.tensor] = select_indices(state[slices.tensor], {slices.dim: indices})


def _select_attention_(state: dict[str, Tensor], sizes: BlockSizes, after: BlockSizes, order: HeadOrder) -> None:
    """Replace the attention tensors of one block in ``state`` by their kept slices."""
    if after.heads == sizes.heads:
        return
    site = f"{sizes.name}.attn"
    qk = [index for head in order for index in head[0]]
    v = [index for head in order for index in head[1]]
    total = sizes.qk_total
    rows = [*qk, *(total + index for index in qk), *(2 * total + index for index in v)]
    factor = query_factor(after)
    for name in (f"{site}.qkv.weight", f"{site}.qkv.bias"):
        if name in state:
            selected = select_indices(state[name], {0: rows})
            selected[: len(qk)] *= factor
            state[name] = selected
    state[f"{site}.proj.weight"] = select_indices(state[f"{site}.proj.weight"], {1: v})
