"""Find which rows and columns of an attention module belong to each dimension inside its heads, by gradients.

The columns of the layer that reads the heads give the dimensions of V; the two factors of each product that sums over
the head dimensions give those of QK. Gradients say which rows of the layers before them, and which entries of other
parameters, belong to one dimension alone. Rows on which several dimensions depend belong to none, as with a norm over
the head dimension. Where positions rotate pairs of dimensions, a pair takes the place of a dimension, and the columns
of the rotary table belong to it in every head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimming.core.groups import InputSlices, Slices
from slimming.models.traced.attention_runs import ROUNDING, LayerCall, ProductCall, Run, before
from slimming.models.traced.channels import BATCH_NORM

UNUSED, SEVERAL = -1, -2
"""In place of the number of a head dimension: the entry belongs to none, or to several."""

Place = tuple[str, int]
"""Name of a tensor and one of its dimensions."""
NORM_OVER_HEADS = "a norm over the head dimension mixes the dimensions of its queries and keys"
HEAD_NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Norms over the dimensions of a head that can be taken over those that stay."""
_INPUT = "input"
"""Begins the name of a tensor that the module is given."""
Numbers = dict[Place, Tensor]
"""For each entry along a dimension of a tensor, the number of the head dimension that alone depends on it."""


@dataclass(frozen=True)
class Dimensions:
    """What belongs to each dimension of QK or of V, in the order of heads.

    Attributes:
        parts: the number of dimensions of each head.
        slices: the slices of each dimension.
        direct: whether each dimension is one row of Linear layers that are called as modules.
        inputs: the slices of each dimension in tensors that the module is given.
        alike: whether all heads must keep the same dimensions, because they share tensors with entries for each.
        norms: names of the norms over the dimensions of a head of queries or keys.
        normalised: whether a norm over the dimensions of a head needs that masks act on queries and on keys.
        width: 1, or the number of dimensions that are mixed and counted as one, such as 2 for rotary pairs.
    """

    parts: tuple[int, ...]
    slices: tuple[Slices, ...]
    direct: bool
    inputs: tuple[InputSlices, ...] = ()
    alike: bool = False
    norms: tuple[str, ...] = ()
    normalised: bool = False
    width: int = 1

    @property
    def size(self) -> int:
        """The size of a head for the host."""
        return self.parts[0] * self.width


@dataclass(frozen=True)
class _Parts:
    """The slices of each dimension of each head on one side; for the attributes see `Dimensions`."""

    slices: tuple[Slices, ...]
    inputs: tuple[InputSlices, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether heads share entries."""
        return bool(self.inputs) or any(_is_shared(part.index) for part in self.slices)


@dataclass(frozen=True)
class Scores:
    """A product whose result is the scores of attention, or is added to them.

    Attributes:
        size: the number of dimensions that it sums over.
        factors: for each of both factors, which rows belong to which dimension.
        product: the product.
    """

    size: int
    factors: tuple[Numbers, Numbers]
    product: ProductCall


def scores_of(module: nn.Module, run: Run) -> list[Scores]:
    """The products before a softmax in ``run``, a run of ``module``."""
    after_softmax = {attention.by_head.grad_fn for attention in run.attentions}
    result: list[Scores] = []
    for product in run.products.values():
        if product is None or product.left.shape[product.left_dim] < 2:
            continue
        tensors = ((product.left, product.left_dim), (product.right, product.right_dim))
        if any(tensor.grad_fn in after_softmax for tensor, _ in tensors):
            continue
        size = product.left.shape[product.left_dim]
        left, right = (numbered(module, run, tensor, dim, torch.arange(size)) for tensor, dim in tensors)
        result.append(Scores(size, (left, right), product))
    return result


def value_dimensions(
    module: nn.Module, run: Run, heads: Sequence[Slices], scores: Sequence[Scores]
) -> Dimensions | str:
    """The dimensions of V, or why they cannot be told apart.

    Args:
        module: the attention module.
        run: a run of it.
        heads: the slices of its heads.
        scores: what `scores_of` gives. Their rows are not those of V, however little the result depends on them.
    """
    consumed = [part for part in heads if part.side == "consumes"]
    weight = module.get_parameter(consumed[0].tensor)
    reader = next((call for call in run.layers if call.weight is weight), None)
    read, features = (run.linears.get(id(weight)), -1) if reader is None else (reader.read, _features(reader))
    if read is None or read.grad_fn is None:
        return f"{consumed[0].tensor} does not read its heads directly"
    columns = consumed[0].index
    if len(columns[0]) < 2:
        return "its heads have one dimension"
    for size in _sizes(heads, len(columns[0])):
        numbers = torch.full((weight.shape[1],), UNUSED)
        for unit in columns:
            numbers[list(unit)] = torch.arange(len(unit)) % size
        found = numbered(module, run, read, features, numbers)
        for at, of_scores in ((at, rows) for each in scores for factor in each.factors for at, rows in factor.items()):
            if at in found:
                found[at] = torch.where(of_scores == UNUSED, found[at], SEVERAL)
        by_head = _by_head(module, found, heads, size, "produces")
        if isinstance(by_head, str):
            return by_head
        if by_head.slices:
            index = tuple(
                tuple(column for place, column in enumerate(unit) if place % size == number)
                for unit in columns
                for number in range(size)
            )
            readers = [Slices(tensor=part.tensor, dim=1, index=index, side="consumes") for part in consumed]
            direct = reader is not None and _are_direct(module, run, by_head) and len(readers) == len(index[0]) == 1
            return Dimensions(
                (size,) * len(columns), (*by_head.slices, *readers), direct, by_head.inputs, by_head.alike
            )
    return "no row of its layers belongs to a single dimension of its values: a norm or a layer mixes them"


def query_key_dimensions(
    module: nn.Module, run: Run, heads: Sequence[Slices], scores: Sequence[Scores]
) -> Dimensions | str:
    """The dimensions of QK, or why they cannot be told apart; for the arguments see `value_dimensions`."""
    weights = {part.tensor for part in heads if part.side == "produces"}
    by_row = [[_rows(factor, weights) for factor in each.factors] for each in scores]
    alone = [[_alone(rows) for rows in factors] for factors in by_row]
    found = next((each for each, names in zip(scores, alone, strict=True) if all(names)), None)
    width = 1
    if found is None:
        mixed = next((each for each, rows in zip(scores, by_row, strict=True) if all(rows)), None)
        in_sets = _in_sets(module, run, mixed, weights)
        if isinstance(in_sets, str) or mixed is None:
            return in_sets
        found, width = in_sets, mixed.size // in_sets.size
    size, sides = found.size, dict(zip(("query", "key"), found.factors, strict=True))
    for each, names in zip(scores, alone, strict=True):
        if each.size == size and not all(names):
            _add_table(sides, each.factors, names)
    slices: dict[tuple[str, str], Slices] = {}
    inputs: dict[tuple[int | str, ...], InputSlices] = {}
    direct, alike = True, False
    for side, numbers in sides.items():
        by_head = _by_head(module, numbers, heads, size, side, run)
        if isinstance(by_head, str):
            return by_head
        if not any(part.side == side for part in by_head.slices):
            return "its heads do not have the same number of rows of queries and keys"
        # Queries and keys may share a table.
        slices |= {(f"{part.tensor} {part.dim}", part.side): part for part in by_head.slices}
        inputs |= {part.path: part for part in by_head.inputs}
        direct = direct and _are_direct(module, run, by_head)
        alike = alike or by_head.alike
    if width > 1 and not alike:
        return "positions rotate its queries and keys with a table that its forward computes for the size of a head"
    _add_biases(module, slices)
    parts = (size,) * len(heads[0].index)
    return Dimensions(parts, tuple(slices.values()), direct, tuple(inputs.values()), alike, width=width)


def _add_biases(module: nn.Module, slices: dict[tuple[str, str], Slices]) -> None:
    """Add the entries of biases that the forward does not use, as those of keys in some hosts."""
    parameters = dict(module.named_parameters())
    for (_, side), part in list(slices.items()):
        owner, _, last = part.tensor.rpartition(".")
        bias = f"{owner}.bias"
        if last == "weight" and part.dim == 0 and bias in parameters and side != "produces":
            slices.setdefault((f"{bias} 0", side), replace(part, tensor=bias))


def _rows(numbers: Numbers, weights: Collection[str]) -> dict[str, Tensor]:
    """The numbers of the rows of ``weights``."""
    return {tensor: found for (tensor, dim), found in numbers.items() if tensor in weights and dim == 0}


def _alone(rows: Mapping[str, Tensor]) -> set[str]:
    """The tensors of which each row belongs to one dimension, if to any."""
    return {name for name, found in rows.items() if bool((found >= 0).any()) and not bool((found == SEVERAL).any())}


def _add_table(sides: dict[str, Numbers], factors: tuple[Numbers, Numbers], alone: Sequence[set[str]]) -> None:
    """Add what the queries or keys are multiplied with besides each other, such as a table of relative positions."""
    for place in (0, 1):
        for side, opposite in (("query", "key"), ("key", "query")):
            if alone[place] and alone[place] <= {tensor for tensor, _ in sides[side]}:
                more = {at: found for at, found in factors[1 - place].items() if at not in factors[place]}
                sides[opposite] = {**sides[opposite], **more}
                return


def _in_sets(module: nn.Module, run: Run, scores: Scores | None, weights: Collection[str]) -> Scores | str:
    """``scores`` by sets of dimensions that are mixed among themselves only, such as rotary pairs; or why not."""
    if scores is None:
        return "its queries and keys are not multiplied by head dimension"
    product = scores.product
    together = torch.eye(scores.size, dtype=torch.bool)
    tensors = ((product.left, product.left_dim), (product.right, product.right_dim))
    for tensor, dim in tensors:
        used: list[Tensor] = []
        for number in range(scores.size):
            numbers = torch.full((scores.size,), UNUSED)
            numbers[number] = 0
            rows = _rows(numbered(module, run, tensor, dim, numbers), weights)
            used.append(torch.cat([rows[name] == 0 for name in sorted(rows)]))
        of_row = torch.stack(used).long()
        together |= of_row @ of_row.T > 0
    firsts = together.int().argmax(1)
    sets, numbers = firsts.unique(return_inverse=True)
    if len(sets) == 1 or not bool((together == (firsts[:, None] == firsts)).all()):
        return NORM_OVER_HEADS
    left, right = (numbered(module, run, tensor, dim, numbers) for tensor, dim in tensors)
    if not all(_alone(_rows(factor, weights)) for factor in (left, right)):
        return "a layer mixes the dimensions of its queries and keys"
    return Scores(len(sets), (left, right), product)


def numbered(module: nn.Module, run: Run, tensor: Tensor, dim: int, numbers: Tensor) -> Numbers:
    """For every tensor of ``module`` on which ``tensor`` depends, the number that belongs to each of its entries.

    The entries of ``tensor`` are divided by the bits of their numbers, once for every bit: an entry on which only those
    depend that have the bit, or only those without it, for each bit, belongs to one number.

    Args:
        module: the module that ran.
        run: its run.
        tensor: a tensor of the run.
        dim: a dimension of ``tensor``.
        numbers: the number of each index along ``dim``, `UNUSED` if it has none.
    """
    reached = before(tensor.grad_fn, run.made_by)
    calls = [run.made_by[node] for node in reached if node in run.made_by]
    leaves = {id(node.variable) for node in reached if type(node).__name__ == "AccumulateGrad"}
    given = [(_input_name(path), leaf) for path, leaf in run.inputs]
    named = [*module.named_parameters(), *module.named_buffers(), *given]
    named = [(name, leaf) for name, leaf in named if id(leaf) in leaves]
    wanted = [*(call.made for call in calls), *(leaf for _, leaf in named)]
    if not wanted:
        return {}
    weights = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=tensor.dtype) + 0.5
    used: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for bit in range(max(1, int(numbers.max()).bit_length())):
        halves = [
            _used(tensor, dim, weights, ((numbers >= 0) & ((numbers >> bit & 1) == value)).nonzero().flatten(), wanted)
            for value in (0, 1)
        ]
        for at in halves[0]:
            used.setdefault(at, []).append((halves[0][at], halves[1][at]))
    result: Numbers = {}
    for (position, along), bits in used.items():
        found = _number(bits)
        if position < len(calls):
            call = calls[position]
            if along == _features(call) % call.made.dim():
                for name, _ in module.get_submodule(call.name).named_parameters(recurse=False):
                    _merge(result, (f"{call.name}.{name}", 0), found)
        else:
            name, leaf = named[position - len(calls)]
            _merge(result, (name, along - leaf.dim() if name.startswith(_INPUT) else along), found)
    return _with_statistics(module, result)


def _input_name(path: Sequence[int | str]) -> str:
    return "/".join((_INPUT, *map(str, path)))


def _features(call: LayerCall) -> int:
    return -1 if call.weight.dim() == 2 else 1


def _used(
    tensor: Tensor, dim: int, weights: Tensor, places: Tensor, wanted: Sequence[Tensor]
) -> dict[tuple[int, int], Tensor]:
    """For each dimension of ``wanted``, at which indices the entries of ``tensor`` at ``places`` depend on it."""
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if len(places):
        total = (tensor.index_select(dim, places) * weights.index_select(dim, places)).sum()
        grads = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
    least = ROUNDING * max((float(grad.abs().max()) for grad in grads if grad is not None), default=0.0)
    result = {}
    for position, (leaf, grad) in enumerate(zip(wanted, grads, strict=True)):
        large = torch.zeros_like(leaf, dtype=torch.bool) if grad is None else grad.abs() > least
        for along in range(leaf.dim()):
            result[position, along] = large.movedim(along, 0).flatten(1).any(1) if leaf.dim() > 1 else large
    return result


def _number(bits: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The number that belongs to each entry, given which entries the numbers without and with each bit depend on."""
    result = torch.zeros(len(bits[0][0]), dtype=torch.int64)
    for bit, (_, with_bit) in enumerate(bits):
        result += with_bit.long() << bit
    several = torch.stack([without & with_bit for without, with_bit in bits]).any(0)
    some = torch.stack([without | with_bit for without, with_bit in bits])
    result[several | (some.any(0) & ~some.all(0))] = SEVERAL
    result[~some.any(0)] = UNUSED
    return result


def _merge(result: Numbers, at: Place, found: Tensor) -> None:
    """Add what one call of a layer says; entries of which two calls say different things belong to several."""
    known = result.get(at)
    if known is not None:
        both = torch.where(known == UNUSED, found, known)
        found = torch.where((known != found) & (known != UNUSED) & (found != UNUSED), SEVERAL, both)
    result[at] = found


def _with_statistics(module: nn.Module, numbers: Numbers) -> Numbers:
    """``numbers`` with the statistics of BatchNorms, which belong to the same dimensions as their weights."""
    result = dict(numbers)
    for (tensor, dim), found in numbers.items():
        owner = module.get_submodule(tensor.rpartition(".")[0])
        if isinstance(owner, BATCH_NORM):
            for name, buffer in owner.named_buffers(recurse=False):
                if buffer.dim():
                    result[f"{tensor.rpartition('.')[0]}.{name}", dim] = found
    return result


def _sizes(heads: Sequence[Slices], columns: int) -> list[int]:
    """Possible numbers of dimensions of a head that has ``columns`` columns, the largest first."""
    least = min(len(part.index[0]) for part in heads if part.side == "produces")
    return [size for size in (columns, *(columns // count for count in range(2, columns) if columns % count == 0))
            if size > 1 and (size == columns or size <= least)]  # fmt: skip


def _by_head(
    module: nn.Module, numbers: Numbers, heads: Sequence[Slices], size: int, side: str, run: Run | None = None
) -> _Parts | str:
    """The slices of each dimension of each head; none if no row of a head belongs to a single dimension.

    Args:
        module: the attention module.
        numbers: what `numbered` gives.
        heads: the slices of the heads.
        size: number of dimensions of a head.
        side: the side of the slices.
        run: the run, if tensors that the module is given may have entries for single dimensions.
    """
    rows = {(part.tensor, part.dim): part.index for part in heads if part.side == "produces"}
    paths = {} if run is None else {_input_name(path): path for path, _ in run.inputs}
    slices: list[Slices] = []
    inputs: list[InputSlices] = []
    for at, found in numbers.items():
        if not bool((found >= 0).any()):
            continue
        values = found.tolist()
        if at in rows:
            units = rows[at]
        elif bool((found == SEVERAL).any()):
            if at[0].startswith(_INPUT):
                continue
            return f"{at[0]} has entries for single head dimensions, and others for several"
        elif not at[0].startswith(_INPUT) and _is_outside_state(module, at[0]):
            return f"all heads share {at[0]}, a buffer outside the state dict (persistent=False)"
        else:
            units = (range(len(values)),) * len(heads[0].index)
        index = tuple(tuple(row for row in unit if values[row] == number) for unit in units for number in range(size))
        if len({len(each) for each in index}) != 1 or not index[0]:
            return f"the rows of {at[0]} are not divided evenly among the head dimensions"
        if at[0] in paths:
            inputs.append(InputSlices(path=paths[at[0]], dim=at[1], index=index))
        elif not at[0].startswith(_INPUT):
            # A factor of queries or keys must not multiply what is only multiplied with them.
            is_norm = isinstance(module.get_submodule(at[0].rpartition(".")[0]), HEAD_NORMS)
            own = side if at in rows or is_norm else "produces"
            slices.append(Slices(tensor=at[0], dim=at[1], index=index, side=own))
    return _Parts(tuple(slices), tuple(inputs))


def _is_outside_state(module: nn.Module, tensor: str) -> bool:
    owner, _, name = tensor.rpartition(".")
    return name in module.get_submodule(owner)._non_persistent_buffers_set


def _is_shared(index: Sequence[Sequence[int]]) -> bool:
    entries = [entry for unit in index for entry in unit]
    return len(set(entries)) < len(entries)


def _are_direct(module: nn.Module, run: Run, parts: _Parts) -> bool:
    """Whether each dimension is one row of one Linear that was called as a module."""
    slices = parts.slices
    called = {call.name for call in run.layers}
    owners = {part.tensor.rpartition(".")[0] for part in slices}
    return (
        len(owners) == 1
        and not parts.alike
        and owners <= called
        and all(isinstance(module.get_submodule(name), nn.Linear) for name in owners)
        and all(len(part.index[0]) == 1 for part in slices)
    )
