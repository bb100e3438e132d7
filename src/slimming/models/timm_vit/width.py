"""Read and resize the embedding width of a timm Vision Transformer: a unit is one feature of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import nn

from slimming.core.groups import Group, Scale, Slices
from slimming.errors import CheckpointError
from slimming.models.family import linear_like
from slimming.models.layers import TokenSelect
from slimming.models.timm_vit.sizes import BlockSizes, norm_follows

WIDTH = "embedding"
"""Name of the group, and its entry in the layers of a structure."""


def width_why_not(vit: VisionTransformer) -> str | None:
    """The reason why the embedding width cannot be cut; None if it can."""
    if vit.attn_pool is not None:
        return "the pooling attention mixes its features"
    blocks = [block for block in vit.blocks if not isinstance(block, TokenSelect)]
    if any(norm_follows(block) for block in blocks):
        return "attention and MLP read it without a norm (post-norm)"
    if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None for norm in _norms(vit).values()):
        return "a norm over it is not a LayerNorm with weights"
    if not isinstance(vit.patch_embed.proj, nn.Conv2d):
        return "the backbone produces it without a projection"
    if not isinstance(getattr(vit.patch_embed, "norm", nn.Identity()), nn.Identity):
        return "the patch embedding ends in a norm"
    if not _classifiers(vit):
        return "the model has no classifier, so it is the output"
    return None


def width_group(vit: VisionTransformer, blocks: Sequence[BlockSizes]) -> Group:
    """The group of the embedding width, with every tensor that has it as a dimension."""
    every = tuple((unit,) for unit in range(vit.embed_dim))
    produces = [(f"patch_embed.proj.{name}", 0) for name, _ in vit.patch_embed.proj.named_parameters()]
    produces += [(name, tensor.dim() - 1) for name, tensor in vit.named_parameters(recurse=False)]
    consumes = [(f"{name}.weight", 1) for name in _classifiers(vit)]
    norms = _norms(vit)
    produces += [(f"{path}.{name}", 0) for path, norm in norms.items() for name, _ in norm.named_parameters()]
    for sizes in blocks:
        block: Any = vit.get_submodule(sizes.name)
        for branch, first, last, scale in (("attn", "qkv", "proj", "ls1"), ("mlp", "fc1", "fc2", "ls2")):
            if getattr(block, branch) is None:
                continue
            consumes.append((f"{sizes.name}.{branch}.{first}.weight", 1))
            for owner in (f"{branch}.{last}", scale):
                parameters = block.get_submodule(owner).named_parameters()
                produces += [(f"{sizes.name}.{owner}.{name}", 0) for name, _ in parameters]
    # Every layer reads the output of a norm, so a factor on weight and bias of the norms scales the feature everywhere.
    # The output of norm_pre is the residual stream itself, which is not scaled.
    scaled = [path for path in norms if path != "norm_pre"]
    return Group(
        name=WIDTH,
        kind="width",
        size=vit.embed_dim,
        site=WIDTH,
        role="width",
        slices=(
            *(Slices(tensor=name, dim=dim, index=every, side="produces") for name, dim in produces),
            *(Slices(tensor=name, dim=dim, index=every, side="consumes") for name, dim in consumes),
        ),
        scales=tuple(
            Scale(tensor=f"{path}.{name}", dim=0, index=every)
            for path in scaled
            for name, _ in norms[path].named_parameters()
        ),
        norms=tuple(norms),
    )


def width_of(layers: Mapping[str, Any]) -> int:
    """The embedding width in the layers of a structure.

    Raises:
        CheckpointError: the entry is missing or damaged.
    """
    try:
        width = int(layers[WIDTH]["width"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The structure of {WIDTH} is damaged: {error!r}. Take an intact copy.") from error
    if width < 1:
        raise CheckpointError(f"The structure of {WIDTH} is damaged: width {width}. Take an intact copy.")
    return width


def _norms(vit: VisionTransformer) -> dict[str, Any]:
    """The norms over the embedding width, by path."""
    paths = [
        "norm_pre",
        *(f"blocks.{key}.{name}" for key, _ in vit.blocks.named_children() for name in ("norm1", "norm2")),
    ]
    norms: dict[str, Any] = {}
    for path in [*paths, "norm", "fc_norm"]:
        owner, _, name = path.rpartition(".")
        norm = vit.get_submodule(owner)._modules.get(name)
        if norm is not None and not isinstance(norm, nn.Identity):
            norms[path] = norm
    return norms


def _classifiers(vit: VisionTransformer) -> list[str]:
    return [name for name in ("head", "head_dist") if isinstance(getattr(vit, name, None), nn.Linear)]


def resize_width_(vit: VisionTransformer, width: int) -> None:
    """Resize the embedding width of ``vit``; the contents of resized tensors are undefined."""
    if width == vit.embed_dim:
        return
    for owner, name, old in list(_linears(vit)):
        consumes = name in ("qkv", "fc1", "head", "head_dist")
        sizes = (width, old.out_features) if consumes else (old.in_features, width)
        owner.add_module(name, linear_like(old, *sizes))
    for norm in _norms(vit).values():
        norm.normalized_shape = (width,)
        for name, old in list(norm.named_parameters()):
            norm.register_parameter(name, _like(old, (width,)))
    for module in [module for module in vit.modules() if isinstance(module, LayerScale)]:
        module.register_parameter("gamma", _like(module.gamma, (width,)))
    for name, old in list(vit.named_parameters(recurse=False)):
        vit.register_parameter(name, _like(old, (*old.shape[:-1], width)))
    projection = vit.patch_embed.proj
    projection.out_channels = width
    for name, old in list(projection.named_parameters()):
        projection.register_parameter(name, _like(old, (width, *old.shape[1:])))
    vit.embed_dim = vit.num_features = vit.head_hidden_size = width


def _linears(vit: VisionTransformer) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every Linear that consumes or produces the residual stream, with its owner and name."""
    for name in _classifiers(vit):
        yield vit, name, vit.get_submodule(name)  # pyright: ignore
    for block in vit.blocks:
        for branch, names in (("attn", ("qkv", "proj")), ("mlp", ("fc1", "fc2"))):
            owner = None if isinstance(block, TokenSelect) else block._modules.get(branch)
            for name in names if owner is not None else ():
                yield owner, name, owner.get_submodule(name)  # pyright: ignore


def _like(old: torch.Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=old.device, dtype=old.dtype), requires_grad=old.requires_grad)
