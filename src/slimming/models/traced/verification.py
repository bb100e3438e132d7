"""Proving groups: what the reader found is held against the model itself before anyone relies on it.

The model's weights are drawn anew, half the units of every group are set to 0 on one copy and cut out of
another, and both must give the same output. A group that fails is left out and named.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from slimming.core.groups import Group
from slimming.models.family import silence_
from slimming.models.masked_norms import keep_in_norms

LIMIT = 1e-9
"""Largest relative difference in float64."""

Cut = Callable[[nn.Module, Sequence[Group], dict[str, tuple[int, ...]]], nn.Module]
"""Makes the cut copy of a model, given groups and what they keep."""


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Draw all parameters and statistics anew, away from 0 and 1, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.dim() == 0 or tensor.numel() == 0:
            continue
        if name.endswith(("inv_freq", "attn_mask")):
            continue
        if tensor.dim() == 1 and isinstance(tensor, nn.Parameter):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
        elif isinstance(tensor, nn.Parameter):
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
        elif name.endswith("running_mean"):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))


def proven(
    model: nn.Module, groups: Sequence[Group], example: Any, cut: Cut
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Split ``groups`` into those that hold and those that do not, with the reason.

    Args:
        model: in float64 with drawn weights, see `randomise_`.
        groups: what the readers found.
        example: what the model's forward takes, as a tuple of arguments.
        cut: makes a cut copy.
    """
    failed: list[tuple[Group, str]] = []

    def split(good: list[Group], rest: list[Group]) -> list[Group]:
        """The groups of ``rest`` that hold beside ``good``."""
        if not rest:
            return []
        reason = difference(model, [*good, *rest], example, cut)
        if reason is None:
            return rest
        if len(rest) == 1:
            failed.append((rest[0], reason))
            return []
        half = len(rest) // 2
        first = split(good, rest[:half])
        return first + split([*good, *first], rest[half:])

    return split([], list(groups)), failed


@torch.no_grad()
def difference(model: nn.Module, groups: Sequence[Group], example: Any, cut: Cut, seed: int = 0) -> str | None:
    """Why the masked model is not the cut one when every group keeps about half its units; None if it is."""
    chance = random.Random(seed)
    kept = {}
    for group in groups:
        count = max(1, group.size // 2)
        kept[group.name] = tuple(sorted(chance.sample(range(group.size), count)))
    masked = masked_output(model, groups, kept, example)
    try:
        small = outputs(cut(model, groups, kept), example)
    except Exception as error:  # whatever the host raises when its sizes do not fit
        return (
            f"the host does not take other sizes ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]})"
        )
    return compare(masked, small)


def masked_output(
    model: nn.Module, groups: Sequence[Group], kept: dict[str, tuple[int, ...]], example: Any
) -> list[Tensor]:
    """The outputs with what reads dropped units set to 0 and norms over what stays; the model is as before then."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    saved: dict[str, Tensor] = {}
    undo: list[Callable[[], None]] = []
    for group in groups:
        undo += keep_in_norms(model, group, kept[group.name])
        gone = sorted(set(range(group.size)) - set(kept[group.name]))
        for one in group.slices:
            if one.side == "consumes" and gone:
                tensor = tensors[one.tensor]
                saved.setdefault(one.tensor, tensor.detach().clone())
                silence_(tensor.data, one, gone)
    try:
        return outputs(model, example)
    finally:
        for one in undo:
            one()
        for name, tensor in saved.items():
            tensors[name].data.copy_(tensor)


class _Unrounded(TorchFunctionMode):
    """Hosts that cast down inside, to float32 for a softmax, stay in float64: the proof is of the formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(_kept(one) for one in args)
            kwargs = {name: _kept(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)


def _kept(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating-point tensors of the model's output."""
    with _Unrounded():
        found = model(**example) if isinstance(example, dict) else model(example)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str | None:
    """In what two lists of outputs differ, relative to the largest value; None if nothing."""
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            return "they leave the model as its output"
        size = float(one.abs().max())
        error = float((one - other).abs().max())
        if not error <= LIMIT * max(size, 1e-30):
            return f"cut and masked differ by {error / max(size, 1e-30):.1e}: something else reads these units"
    return None
