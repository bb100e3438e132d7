"""Recognise, by what they compute, modules that normalise channels, and layers that standardise their weights.

A normaliser has parameters with one entry per channel, and returns a tensor of the shape of its input, such as a
GroupNorm, a global response normalisation, an RMSNorm or an EvoNorm. Which channels share statistics is seen from which
outputs change with one input: all of them, those in blocks, or that channel only. The result for permuted channels must
be the permuted result, so that the module on fewer channels is the same function of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.formulas import Dim, Ratio
from slimming.core.modules import MODEL_ERRORS
from slimming.models.masked_norms import Indices, run_on, runs_over
from slimming.models.traced.heads import Attributes

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KNOWN = (
    nn.Linear,
    *CONV,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.PReLU,
    nn.Embedding,
    nn.modules.rnn.RNNBase,
)
"""Classes that are read by their class."""
_NORMS = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
"""Classes that take statistics over the positions of each channel if every channel is a block."""
_CHANGED = 1e-9


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """A module that normalises channels.

    Attributes:
        channels: number of channels.
        block: number of consecutive channels that share statistics; ``channels`` if all of them do.
        tensors: name of each tensor with one entry per channel -> its dimension over channels.
        sizes: attributes that hold the number of channels.
        counts: attributes that hold the number of blocks.
    """

    channels: int
    block: int
    tensors: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    @property
    def over_all(self) -> bool:
        """Whether statistics are taken over all channels, so that they change when channels are removed."""
        return self.block == self.channels

    def removed_with(self, channel: int) -> range:
        """The channels that are removed together with one."""
        if self.over_all:
            return range(channel, channel + 1)
        first = channel // self.block * self.block
        return range(first, first + self.block)


@dataclass(frozen=True, kw_only=True)
class NormLayers:
    """The layers of a model that take statistics over channels, except BatchNorms and LayerNorms.

    Attributes:
        normalisers: the normalisers by name.
        standardised: names of the layers that standardise their weights over their input channels, as in BiT.
    """

    normalisers: Mapping[str, Normaliser] = field(default_factory=dict)
    standardised: frozenset[str] = frozenset()


def norm_layers(model: nn.Module) -> NormLayers:
    """Find the layers of ``model``, which is in evaluation mode with random weights, that take such statistics."""
    found = {name: _normaliser(module) for name, module in model.named_modules()}
    return NormLayers(
        normalisers={name: normaliser for name, normaliser in found.items() if normaliser is not None},
        standardised=frozenset(name for name, module in model.named_modules() if _standardises(module)),
    )


@torch.no_grad()
def _normaliser(module: nn.Module) -> Normaliser | None:
    if isinstance(module, _KNOWN) or not module._parameters or any(child.parameters() for child in _inner(module)):
        return None
    named: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None and tensor.numel() > 1}
    sizes = {tensor.numel() for tensor in tensors.values()}
    if len(sizes) != 1 or any(max(tensor.shape) != tensor.numel() for tensor in tensors.values()):
        return None
    channels = sizes.pop()
    dims = {name: list(tensor.shape).index(channels) for name, tensor in tensors.items()}
    place = next(((rank, dim) for rank in (4, 3, 2) for dim in (1, -1) if runs_over(module, rank, dim, channels)), None)
    if place is None:
        return None
    x = _random_input(next(iter(tensors.values())), channels, *place)
    block = _block(module, x, place[1])
    # A product with one factor per channel is followed like any other operation.
    is_product = block == 1 and not module._buffers and not isinstance(module, _NORMS)
    if block is None or is_product or not _is_symmetric(module, x, place[1], dims, block):
        return None
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    return Normaliser(
        channels=channels,
        block=block,
        tensors=dims,
        sizes=tuple(name for name, value in numbers.items() if value == channels),
        counts=tuple(n for n, value in numbers.items() if value == channels // block and value not in (1, channels)),
    )


def _inner(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _random_input(like: Tensor, channels: int, rank: int, dim: int) -> Tensor:
    shape = [1, *(3, 5, 7)[: rank - 1]]
    shape[dim] = channels
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _run(module: Any, x: Tensor) -> Tensor:
    return type(module).forward(module, x)


def _block(module: nn.Module, x: Tensor, dim: int) -> int | None:
    """The number of channels that share statistics with one; None if it differs between channels."""
    channels = x.shape[dim]
    before = _run(module, x)
    found: list[range] = []
    for channel in (0, channels - 1):
        other = x.clone()
        other.select(dim, channel).neg_().add_(0.5)
        change = (_run(module, other) - before).movedim(dim, 0).flatten(1).abs().amax(1)
        changed = (change > _CHANGED * before.abs().max()).nonzero().flatten().tolist()
        if not changed or changed != list(range(changed[0], changed[-1] + 1)):
            return None
        found.append(range(changed[0], changed[-1] + 1))
    first, last = found
    is_even = len(first) == len(last) and channels % len(first) == 0
    return len(first) if is_even and first.start == 0 and last.stop == channels else None


def _is_symmetric(module: nn.Module, x: Tensor, dim: int, dims: Mapping[str, int], block: int) -> bool:
    """Whether permuted channels, with permuted blocks, give the permuted result."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(x.shape[dim] // block, generator=generator)
    order = (blocks[:, None] * block + torch.randperm(block, generator=generator)[None]).flatten()
    permuted: Indices = {name: (at, order) for name, at in dims.items()}
    try:
        found = run_on(module, permuted, x.index_select(dim, order))
    except MODEL_ERRORS:
        return False
    wanted = _run(module, x).index_select(dim, order)
    return bool((found - wanted).abs().max() <= _CHANGED * wanted.abs().max())


def normaliser_attributes(found: Mapping[str, Normaliser], dims: Mapping[str, tuple[Dim | Ratio, ...]]) -> Attributes:
    """The attributes of normalisers that count channels, as functions of the kept units.

    Args:
        found: the normalisers by name.
        dims: the dimensions of every tensor of the model.
    """
    result: Attributes = {}
    for name, normaliser in found.items():
        tensor, dim = next(iter(normaliser.tensors.items()))
        channels = dims[f"{name}.{tensor}"][dim]
        if isinstance(channels, Dim) and channels.groups:
            counted = Dim(
                fixed=channels.fixed // normaliser.block,
                groups=tuple((group, weight // normaliser.block) for group, weight in channels.groups),
            )
            result[name] = {**dict.fromkeys(normaliser.sizes, channels), **dict.fromkeys(normaliser.counts, counted)}
    return result


@torch.no_grad()
def _standardises(module: nn.Module) -> bool:
    """Whether an input matters to ``module`` although its weights are 0."""
    if not isinstance(module, (nn.Linear, *CONV)) or type(module) in (nn.Linear, *CONV):
        return False
    columns = module.weight.shape[1]
    if columns < 2:
        return False
    sizes = [] if isinstance(module, nn.Linear) else [kernel * rate + 1 for kernel, rate in _kernels(module)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn([1, columns * getattr(module, "groups", 1), *sizes], generator=generator, dtype=torch.float64)
    x, saved = x.to(module.weight), module.weight[:, 0].clone()
    module.weight[:, 0] = 0
    try:
        first = _run(module, x)
        x[:, 0] += 1
        return bool((_run(module, x) - first).abs().max() > _CHANGED)
    except MODEL_ERRORS:
        return False
    finally:
        module.weight[:, 0] = saved


def _kernels(module: Any) -> zip[tuple[int, int]]:
    return zip(module.kernel_size, module.dilation, strict=True)


def further_rows(module: nn.Module, rows: int) -> list[tuple[str, Tensor]]:
    """The tensors of a layer with one entry per output, beside weight and bias, such as a gain."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [
        (name, tensor)
        for name, tensor in own
        if name not in ("weight", "bias") and tensor.dim() and tensor.shape[0] == rows == tensor.numel()
    ]
