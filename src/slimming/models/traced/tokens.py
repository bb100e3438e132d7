"""Find the sequence of tokens that a series of blocks passes on, and which of its positions can be removed.

The blocks are the children of one container that run one after the other, each once, from a sequence (B, N, D) to one
of the same shape. Positions that are equal for two images are class, distillation, register or box tokens; the others
are patches. Whether patches can be removed is proved on the model, see `verification`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.groups import Group, TokenInput, TokenSite
from slimming.core.modules import MODEL_ERRORS
from slimming.models.family import ENTRY
from slimming.models.traced.courses import Course
from slimming.models.traced.token_blocks import TOKENS, computes_part_of_table, table_methods
from slimming.models.traced.verification import Cut, Pass, cut_difference

IMAGES = 2
NORMS = (nn.LayerNorm, nn.RMSNorm)
SAME = 1e-12
"""Positions that differ by less than this share of the largest value do not depend on the image."""
NO_SEQUENCE = (
    "token positions: no blocks pass a flat sequence of tokens (B, N, D) from one to the next, as in models with "
    "windows, stages or a grid of tokens"
)
RETURNED = (
    "the model returns its tokens, so they are removed only if the kind token is named; the slim model then returns "
    "those that it keeps"
)


@dataclass
class BlockCall:
    """One call of a block.

    Attributes:
        name: name of the block.
        path: where the sequence is in its arguments.
        before: the sequence that it is given.
        after: the shape of the sequence that it returns.
        others: its other tensors with their paths.
        tables: modules inside it that returned a table over pairs of tokens.
        norms: norms inside it that were called with the sequence.
    """

    name: str
    path: tuple[int | str, ...]
    before: Tensor
    after: tuple[int, ...] = ()
    others: list[tuple[tuple[int | str, ...], tuple[int, ...]]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)


def block_names(model: nn.Module, course: Course) -> list[list[str]]:
    """Series of children of one container that returned a sequence, each called once, in the order of their calls."""
    counts = Counter(course.modules)
    containers = {name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))}
    series: dict[str, list[str]] = {}
    for name in course.sequences:
        container, _, child = name.rpartition(".")
        if child and container in containers and counts[name] == 1:
            series.setdefault(container, []).append(name)
    names = {name for blocks in series.values() for name in blocks}
    # A series inside a block, such as the layers of its MLP, is no series of blocks.
    return [blocks for blocks in series.values() if not any(_inside(blocks[0], name) for name in names)]


def _inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def read_tokens(
    model: nn.Module, groups: Sequence[Group], passes: Sequence[Pass], course: Course, cut: Cut
) -> tuple[list[Group], list[str]]:
    """The token groups of ``model`` that are exact together with ``groups``, and the reasons why others are not."""
    found, reasons = token_groups(model, passes[0], course)
    proved: list[Group] = []
    for sequence in dict.fromkeys(group.token.sequence for group in found if group.token is not None):
        tokens = [group for group in found if group.token is not None and group.token.sequence == sequence]
        why = cut_difference(model, [*groups, *proved, *tokens], passes, cut)
        if why is None:
            proved += tokens
            if any(group.on_request for group in tokens):
                reasons.append(f"{sequence}: token positions: {RETURNED}")
        else:
            alone = cut_difference(model, tokens, passes, cut)
            reasons.append(f"{sequence}: token positions: {alone or why}")
    if not found and not reasons and any(group.kind == "head" for group in groups):
        reasons = [NO_SEQUENCE]
    return proved, reasons


def token_groups(model: nn.Module, forward: Pass, course: Course) -> tuple[list[Group], list[str]]:
    """The token groups of ``model`` that remain to be proved, and for sequences without any the reason."""
    series = block_names(model, course)
    if not series or not forward.call.is_batched:
        return [], []
    try:
        calls, later = _calls(model, forward, {name for blocks in series for name in blocks})
    except MODEL_ERRORS as error:
        return [], [f"token positions: the model does not take two images ({type(error).__name__})"]
    groups: list[Group] = []
    reasons: list[str] = []
    for blocks in series:
        run = _last_run([calls[name] for name in blocks if name in calls])
        if run:
            found = _groups_of(model, run, later if run[-1].name == _last(calls) else [], course)
            if isinstance(found, str):
                reasons.append(f"{run[0].name.rpartition('.')[0]}: token positions: {found}")
            else:
                groups += found
    return groups, reasons


def _last(calls: Mapping[str, BlockCall]) -> str:
    return list(calls)[-1]


def _last_run(calls: Sequence[BlockCall]) -> list[BlockCall]:
    """The last calls of which each passes its sequence on to the next."""
    run: list[BlockCall] = []
    for call in reversed(calls):
        shape = tuple(call.before.shape)
        if len(shape) != 3 or len(call.after) != 3 or shape[0] != IMAGES or shape[::2] != call.after[::2]:
            break
        if run and tuple(run[-1].before.shape) != call.after:
            break
        run.append(call)
    return run[::-1]


@torch.no_grad()
def _calls(model: nn.Module, forward: Pass, names: set[str]) -> tuple[dict[str, BlockCall], list[BlockCall]]:
    """The calls of the blocks ``names`` for two images, and the calls of modules after the last of them."""
    calls: dict[str, BlockCall] = {}
    later: list[BlockCall] = []
    running: list[str] = []

    def enter(name: str, args: Any, kwargs: Any) -> None:
        call = _call(name, args, kwargs)
        if name in names and call is not None:
            calls[name] = call
            running.append(name)
            later.clear()
        elif not running and calls and call is not None:
            later.append(call)

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if running and running[-1] == name:
            running.pop()
            calls[name].after = tuple(first.shape) if isinstance(first, Tensor) else ()
        elif running and isinstance(first, Tensor):
            call = calls[running[-1]]
            if isinstance(module, NORMS) and first.shape == call.before.shape:
                call.norms.append(name)
            tokens = call.before.shape[1]
            given = any(tokens in leaf.shape for _, leaf in _leaves({**dict(enumerate(args)), **kwargs}, ()))
            if first.dim() >= 3 and first.shape[-2:] == (tokens, tokens) and not given:
                call.tables.append(name)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(
                module.register_forward_hook(
                    lambda module, args, kwargs, output, name=name: leave(name, module, args, kwargs, output),
                    with_kwargs=True,
                    always_call=True,
                )
            )
    try:
        Pass(forward.call.with_batch(IMAGES)).outputs(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls, later


def _call(name: str, args: Any, kwargs: Any) -> BlockCall | None:
    """The call with its sequence, the first tensor among its arguments; None if that is none."""
    leaves = list(_leaves({**dict(enumerate(args)), **kwargs}, ()))
    if not leaves or leaves[0][1].dim() != 3:
        return None
    (path, sequence), *others = leaves
    return BlockCall(name, path, sequence, others=[(path, tuple(tensor.shape)) for path, tensor in others])


def _leaves(value: Any, path: tuple[int | str, ...]) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if isinstance(key, (int, str)):
                yield from _leaves(each, (*path, key))
    elif isinstance(value, (tuple, list)):
        for place, each in enumerate(value):
            yield from _leaves(each, (*path, place))


def _groups_of(
    model: nn.Module, run: Sequence[BlockCall], later: Sequence[BlockCall], course: Course
) -> list[Group] | str:
    """The token groups of a run of blocks, or the reason why there are none."""
    first, last = run[0], run[-1]
    prefix, suffix, dynamic = fixed_ends(first.before)
    if dynamic is None:
        return "the tokens that do not depend on the image are neither at the start nor at the end"
    if dynamic < 2:
        return "no position depends on the image"
    sequence = first.name.rpartition(".")[0]
    earlier = model.get_submodule(first.name).__dict__.get(ENTRY, {}).get(TOKENS)
    grid = int(earlier["grid"]) if earlier is not None else dynamic
    full = prefix + grid + suffix
    returned = any(shape[0] == last.after[1] for shape in course.outputs if len(shape) == 2)
    groups: list[Group] = []
    positions = tuple(range(grid)) if earlier is None else tuple(earlier["incoming"])
    for depth, call in enumerate(run):
        cut = model.get_submodule(call.name).__dict__.get(ENTRY, {}).get(TOKENS)
        if cut is not None:
            positions = tuple(cut["positions"])
        if call.after[1] != prefix + len(positions) + suffix:
            return "its blocks return other tokens than they are given"
        inputs = [*_inputs(call, grid, full), *(_later_inputs(later, call, grid, full) if call is last else ())]
        groups.append(
            Group(
                name=f"{call.name}.tokens",
                kind="token",
                size=len(positions),
                site=call.name,
                role="token",
                token=TokenSite(
                    depth=depth,
                    block=call.name,
                    attention=None,
                    norms=tuple(call.norms),
                    prefix=prefix,
                    suffix=suffix,
                    positions=positions,
                    sequence=sequence,
                    grid=grid,
                    path=call.path,
                    inputs=tuple(inputs),
                    tables=tuple(_tables(model, call, full)),
                    returned=returned,
                ),
            )
        )
    return groups


def fixed_ends(sequence: Tensor) -> tuple[int, int, int | None]:
    """How many positions at the start and at the end do not depend on the image, and how many between them do.

    Args:
        sequence: the sequences of two images, (2, N, D).

    Returns:
        The three numbers; the last is None if positions between the others do not depend on the image either.
    """
    size = float(sequence.abs().max())
    differs = ((sequence[0] - sequence[1]).abs().amax(-1) > SAME * size).tolist()
    if not any(differs):
        return len(differs), 0, 0
    prefix = differs.index(True)
    suffix = differs[::-1].index(True)
    between = differs[prefix : len(differs) - suffix]
    return prefix, suffix, len(between) if all(between) else None


def _inputs(call: BlockCall, grid: int, full: int) -> Iterator[TokenInput]:
    """The inputs beside the sequence that have dimensions over tokens: masks over pairs, and tables by token."""
    for path, shape in call.others:
        if shape[-2:] == (full, full):
            yield TokenInput(module=call.name, path=path, dims=(-2, -1), fixed=True)
            continue
        sizes = [dim for dim, size in enumerate(shape) if size in (grid, full)]
        if sizes:
            dim = sizes[0]
            yield TokenInput(module=call.name, path=path, dims=(dim - len(shape),), fixed=shape[dim] == full)


def _later_inputs(later: Sequence[BlockCall], last: BlockCall, grid: int, full: int) -> list[TokenInput]:
    """The same for the modules that are given the sequence after the last block."""
    result: list[TokenInput] = []
    for call in later:
        nested = any(_inside(call.name, each.module) for each in result)
        if call.before.shape[1] == last.after[1] and not nested:
            result += _inputs(call, grid, full)
    return result


def _tables(model: nn.Module, call: BlockCall, full: int) -> Iterator[str]:
    """The modules of a block that compute a table over all pairs of tokens."""
    for name, module in model.get_submodule(call.name).named_modules():
        inner = f"{call.name}.{name}" if name else call.name
        methods = table_methods(type(module))
        known = inner in call.tables or computes_part_of_table(module)
        if known or (methods != ("forward",) and _gives_table(module, methods[0], full)):
            yield inner


def _gives_table(module: nn.Module, method: str, full: int) -> bool:
    """Whether ``method`` of ``module`` returns a table over pairs of ``full`` tokens."""
    try:
        table = getattr(module, method)()
    except MODEL_ERRORS:  # the module has no such table
        return False
    return isinstance(table, Tensor) and table.shape[-2:] == (full, full)
