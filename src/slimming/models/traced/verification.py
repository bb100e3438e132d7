"""Verify groups: compare the model with units masked and the model with the same units cut, in float64.

All weights are drawn at random, half the units of every group are set to 0 in one copy and cut from another, and both
copies must give the same output. A group that fails is left out and reported.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slimming.core.example_inputs import ExampleCall, tensors_in
from slimming.core.groups import Couplings, Group, Mask, Scale, Slices
from slimming.core.modules import MODEL_ERRORS, in_mode
from slimming.errors import UnsupportedModelError
from slimming.models.family import zero_slices_
from slimming.models.masked_norms import mask_norms
from slimming.models.token_masks import kept_rows, last_sites, mask_removed, present_positions

TOLERANCE = 1e-9
"""Largest difference of outputs in float64, relative to the largest output."""

REFUSED = "the host does not take other sizes"
"""How a reason begins if the cut model cannot be made or run."""

Cut = Callable[[nn.Module, Sequence[Group], dict[str, tuple[int, ...]]], nn.Module]
"""Makes the cut copy of a model, given groups and the units that each of them keeps."""


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Draw all parameters and statistics at random, none of them 0 or 1, so that no error is multiplied by zero."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A scalar parameter may be the gain of a branch, and 0 before training.
        if not tensor.is_floating_point() or tensor.numel() == 0 or (tensor.dim() == 0 and name not in parameters):
            continue
        if name.endswith(("inv_freq", "attn_mask")):
            continue
        if tensor.dim() <= 1 and isinstance(tensor, nn.Parameter):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
        elif isinstance(tensor, nn.Parameter):
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
        elif name.endswith("running_mean"):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        call: the arguments.
        training: whether all modules are in training mode.
    """

    call: ExampleCall
    training: bool = False

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """The floating-point tensors of the output.

        In training mode dropout keeps everything, other random numbers are drawn with a fixed seed, and the model's
        buffers, such as running statistics, are restored afterwards.
        """
        if not self.training:
            with in_mode(model, False):
                return outputs(model, self.call)
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        with torch.random.fork_rng(devices=[]), in_mode(model, True), _NoDropout():
            torch.manual_seed(0)
            try:
                results = outputs(model, self.call)
                # A buffer among the outputs is restored, too.
                restored = {buffer.untyped_storage()._cdata for buffer, _ in buffers}
                return [r.clone() if r.untyped_storage()._cdata in restored else r for r in results]
            finally:
                for buffer, value in buffers:
                    buffer.data.copy_(value)  # autograd may hold the buffer


class _NoDropout(TorchDispatchMode):
    """Makes dropout, and every other choice by Bernoulli variables, keep everything.

    A masked and a cut model draw numbers for tensors of different shapes, so that a common seed is not enough.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func._overloadpacket
        if operation == torch.ops.aten.bernoulli_:
            return args[0].fill_(1)
        if operation == torch.ops.aten.bernoulli:
            return torch.ones_like(args[0])
        if operation == torch.ops.aten.native_dropout:
            tensor, rate = args[:2]
            return tensor / (1 - rate), torch.ones_like(tensor, dtype=torch.bool)
        return func(*args, **(kwargs or {}))


class _KeepFloat64(TorchFunctionMode):
    """Ignore casts from float64 to float32, which some hosts do before a softmax and which would cause rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float and not args[0].is_floating_point():
            return args[0].to(torch.get_default_dtype())
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(_as_float64(value) for value in args)
            kwargs = {name: _as_float64(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _as_float64(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors that the forward creates without a dtype, such as the weights of a loss, ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating-point tensors of the model's output in the mode that it is in.

    Args:
        model: the model.
        example: an `ExampleCall`, or what `ExampleCall.of` takes.
    """
    call = ExampleCall.of(example)
    with _KeepFloat64(), _default_dtype(call.main.dtype):
        result = call.run(model)
    return [leaf for leaf in tensors_in(result) if leaf.is_floating_point()]


def verified(
    model: nn.Module, groups: Sequence[Group], passes: Sequence[Pass], cut: Cut, known: Sequence[Group] = ()
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Split ``groups`` into those that pass and those that fail, with the reason.

    All groups are tested together first. A set that fails is halved until the failing groups are found.

    Args:
        model: in float64 with random weights, see `randomise_`.
        groups: the groups to verify.
        passes: the forward passes in which masked and cut model must agree.
        cut: makes a cut copy.
        known: groups that have passed, with which the others are tested together.
    """
    failed: list[tuple[Group, str]] = []

    def passing(known: list[Group], untested: list[list[Group]]) -> list[Group]:
        """The groups of ``untested`` that pass together with ``known``."""
        if not untested:
            return []
        new = [group for bundle in untested for group in bundle]
        reason = cut_difference(model, [*known, *new], passes, cut)
        if reason is None:
            return new
        if len(untested) == 1:
            failed.extend((group, reason) for group in new)
            return []
        middle = len(untested) // 2
        first = passing(known, untested[:middle])
        return first + passing([*known, *first], untested[middle:])

    return [*known, *passing(list(known), _bundles(groups))], failed


def _bundles(groups: Sequence[Group]) -> list[list[Group]]:
    """``groups`` one by one, but the head dimensions of one attention together: one module holds their sizes."""
    bundles: dict[str, list[Group]] = {}
    for group in groups:
        bundles.setdefault(group.site if group.kind == "head_dim" else f"group {group.name}", []).append(group)
    return list(bundles.values())


@torch.no_grad()
def cut_difference(
    model: nn.Module, groups: Sequence[Group], passes: Sequence[Pass], cut: Cut, seed: int = 0
) -> str | None:
    """How the masked model differs from the cut one when every group keeps about half its units; None if equal.

    Branches have one unit and are removed in turns, see `turns`.
    """
    for removed in turns(groups):
        reason = _difference(model, groups, half(groups, seed, removed), passes, cut)
        if reason is not None:
            return reason
    return None


def turns(groups: Sequence[Group]) -> list[set[str]]:
    """The branches to remove in each comparison: every second one, then the others, then all.

    Each branch is removed without its neighbours, such as the other branch of a block, and whole blocks are removed.
    """
    branches = [group.name for group in groups if group.role == "branch"]
    return [set(turn) for turn in (branches[::2], branches[1::2], branches[1:] and branches) if turn] or [set()]


def _difference(
    model: nn.Module, groups: Sequence[Group], kept: dict[str, tuple[int, ...]], passes: Sequence[Pass], cut: Cut
) -> str | None:
    """How the masked model differs from the cut one; None if they are equal."""
    try:
        small = cut(model, groups, kept)
        results = [forward.outputs(small) for forward in passes]
    except MODEL_ERRORS as error:
        return f"{REFUSED} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]})"
    if not any(tensor.numel() for result in results for tensor in result):
        return "the model returns nothing for the random image that cut and masked are compared on"
    for forward, result in zip(passes, results, strict=True):
        try:
            masked = masked_outputs(model, groups, kept, forward)
        except UnsupportedModelError as error:
            return str(error)
        reason = output_difference(masked, result, sequences_left(groups, kept))
        if reason is not None:
            return f"{reason} in training mode" if forward.training else reason
    return None


def half(groups: Sequence[Group], seed: int = 0, removed: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """About half the units of every group, at random, with the units that are removed with others; in each head alike.

    Where QK and V may keep other sizes, they do: more of QK with an even seed, more of V with an odd one. The groups
    named in ``removed`` lose all units.
    """
    rng = random.Random(seed)
    masks = _some_tokens(groups, rng)
    for group in groups:
        if group.role == "qkv" or group.token is not None:
            continue  # a coupled group follows from QK and V
        units: list[int] = []
        start = 0
        places: list[int] = []
        for size in group.limits.parts or (group.size,):
            # Not half of many: hosts have other layers of half a width, which would fit by chance.
            count = max(1, (size if size < 8 else size - 1) // 2)
            if group.role == "qk" and group.limits.same_as is None:
                count = max(1, min(count + (-1) ** seed, size))
            if not (group.limits.alike and places):
                places = rng.sample(range(size), count)
            units += [start + place for place in places]
            start += size
        masks[group.name] = np.isin(np.arange(group.size), () if group.name in removed else units)
    left = Couplings(groups).left(masks)
    return {name: tuple(np.flatnonzero(mask).tolist()) for name, mask in left.items()}


def _some_tokens(groups: Sequence[Group], rng: random.Random) -> dict[str, Mask]:
    """Masks of the token groups: about half the tokens are left in the last block, and more in earlier ones."""
    masks: dict[str, Mask] = {}
    left: dict[str, set[int]] = {}
    blocks = Counter(group.token.sequence for group in groups if group.token is not None)
    for group in groups:
        if group.token is None:
            continue
        positions, sequence = group.token.positions, group.token.sequence
        present = left.get(sequence, set(positions)) & set(positions)
        step = max(1, len(positions) // (2 * blocks[sequence]))
        left[sequence] = present - set(rng.sample(sorted(present), min(step, max(0, len(present) - 1))))
        masks[group.name] = np.isin(positions, sorted(left[sequence]))
    return masks


def masked_outputs(
    model: nn.Module, groups: Sequence[Group], kept: dict[str, tuple[int, ...]], forward: Pass
) -> list[Tensor]:
    """The outputs while the slices that consume removed units are 0; the model is restored afterwards."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    saved: dict[Tensor, Tensor] = {}  # a parameter may have several names
    undo, masked = mask_removed(model, groups, kept)
    for group in groups:
        if group.role == "qkv" or (not kept[group.name] and group.role != "branch"):
            continue  # its units are those of QK and V, or all of them are in a removed branch
        undo += mask_norms(model, group, kept[group.name])
        removed = sorted(set(range(group.size)) - set(kept[group.name]))
        for part in _zeroed(group):
            if removed and part.tensor in tensors:
                tensor = tensors[part.tensor]
                saved.setdefault(tensor, tensor.detach().clone())
                zero_slices_(tensor.data, part, removed)
    try:
        results = forward.outputs(model)
        if not all(any(was_masked() for was_masked in blocks) for blocks in masked.values()):
            raise UnsupportedModelError("no block has a softmax over the tokens, by which removed ones could be masked")
        return results
    finally:
        for restore in undo:
            restore()
        for tensor, value in saved.items():
            tensor.data.copy_(value)


def _zeroed(group: Group) -> Sequence[Slices | Scale]:
    """The slices that are 0 if a unit is: those that read it, for QK and branches those that its mask scales."""
    if group.role in ("branch", "qk"):
        return group.scales
    return [part for part in group.slices if part.side in ("consumes", "query")]


def sequences_left(groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> dict[tuple[int, int], list[int]]:
    """(tokens of a sequence, tokens left of it) -> the places of those left, for the sequences that lose tokens."""
    present = present_positions(groups, kept)
    result: dict[tuple[int, int], list[int]] = {}
    for group in last_sites(groups).values():
        places = kept_rows(group, present[group.name])
        site = group.token
        assert site is not None
        result[site.prefix + len(site.positions) + site.suffix, len(places)] = places
    return result


def left_of(expected: Tensor, actual: Tensor, sequences: Mapping[tuple[int, int], list[int]]) -> Tensor:
    """A returned sequence (B, N, D) without the tokens that are missing in ``actual``; other outputs as they are."""
    if expected.dim() != 3 or actual.dim() != 3 or expected.shape == actual.shape:
        return expected
    places = sequences.get((expected.shape[1], actual.shape[1]))
    return expected if places is None else expected[:, places]


def output_difference(
    masked: Sequence[Tensor], cut: Sequence[Tensor], sequences: Mapping[tuple[int, int], list[int]] | None = None
) -> str | None:
    """How the outputs of a masked and a cut model differ, relative to the largest value; None if they are equal.

    Args:
        masked: outputs of the masked model.
        cut: outputs of the cut model.
        sequences: see `sequences_left`.
    """
    if len(masked) != len(cut):
        return "the cut model returns another number of tensors"
    for expected, actual in zip(masked, cut, strict=True):
        expected = left_of(expected, actual, sequences or {})
        if expected.shape != actual.shape:
            return "they are outputs of the model"
        if not expected.numel():
            continue
        size = float(expected.abs().max())
        error = float((expected - actual).abs().max())
        if not error <= TOLERANCE * max(size, 1e-30):
            return f"cut and masked differ by {error / max(size, 1e-30):.1e}: something else reads these units"
    return None
