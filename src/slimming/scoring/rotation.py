"""Rotate attention heads: change the bases inside the heads, so that few dimensions carry most of the function.

The function of a head does not change if queries and keys are multiplied by any invertible matrix and its inverse
transpose, and likewise values and the columns that read them. One basis orders the dimensions by their contribution:
truncation to any number of dimensions then approximates the attention logits best for queries and keys, and the output
for values. It is the basis of balanced truncation (Moore, IEEE TAC 1981): the singular vectors of the product of the
square roots of the second moments of the two factors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.calibration import CalibrationBatch
from slimming.core.groups import Group, Slices
from slimming.errors import NonFiniteLossError
from slimming.models.activations import Moments, inputs_of, own_share, precise
from slimming.models.prunable import PrunableModel

_LEAST, _NOTHING = 1e-6, 1e-30
"""Eigenvalues of second moments are clamped to at least ``_LEAST`` times their mean, and the mean to at least
``_NOTHING``, so that their square roots can be inverted despite rounding errors in single precision."""


@torch.no_grad()
def rotate_(prunable: PrunableModel, batches: Sequence[Any]) -> None:
    """Change, in place, the basis of every attention head whose dimensions can be pruned.

    The outputs change only by rounding. Models without such heads are not changed.

    Args:
        prunable: a model without masks in evaluation mode.
        batches: calibration batches, see `CalibrationBatch.of`, the same on every process.

    Raises:
        NonFiniteLossError: the images or the weights are not finite; the model is unchanged.
    """
    model = prunable.model
    roles: defaultdict[str, dict[str, Group]] = defaultdict(dict)
    for group in prunable.anatomy.groups:
        if group.role in ("qk", "v") and group.any_basis:
            roles[group.site][group.role] = group
    queries = [of_site["qk"] for of_site in roles.values() if "qk" in of_site]
    values = [of_site["v"] for of_site in roles.values() if "v" in of_site]
    # The rotations change nothing outside the heads, so all statistics can be computed beforehand.
    moments = _moments(model, queries, values, batches)
    for group in values:
        for reads in _slices(group, "consumes"):
            if not bool(torch.isfinite(model.get_parameter(reads.tensor)).all()):
                raise NonFiniteLossError(f"{reads.tensor} is not finite. Load weights without NaN and infinity.")
    for group in queries:
        q, k = (_slices(group, side) for side in ("query", "key"))
        for rows, (of_q, of_k) in zip(_heads(group), moments[group.name], strict=True):
            to_q, to_k = _balanced(of_q, of_k)
            _multiply_(model, q, rows, to_q)
            _multiply_(model, k, rows, to_k)
    for group in values:
        makes, (reads, *_) = (_slices(group, side) for side in ("produces", "consumes"))
        weight = model.get_parameter(reads.tensor)
        for rows, (of_v,) in zip(_heads(group), moments[group.name], strict=True):
            columns = _places(reads, rows, weight.device)
            read = weight[:, columns].double()
            to_v, to_read = _balanced(of_v, read.T @ read)
            _multiply_(model, makes, rows, to_v)
            weight[:, columns] = (read @ to_read.T).to(weight.dtype)


def _slices(group: Group, side: str) -> list[Slices]:
    return [slices for slices in group.slices if slices.side == side]


def _heads(group: Group) -> Iterator[range]:
    """The units of each head."""
    start = 0
    for size in group.limits.parts:
        yield range(start, start + size)
        start += size


def _places(entry: Slices, units: range, device: torch.device) -> Tensor:
    return torch.tensor([entry.index[unit][0] for unit in units], device=device)


def _multiply_(model: nn.Module, slices: Sequence[Slices], units: range, by: Tensor) -> None:
    """Multiply the rows of ``units`` in weights and biases by a matrix (units, units)."""
    for entry in slices:
        tensor = model.get_parameter(entry.tensor)
        rows = _places(entry, units, tensor.device)
        tensor[rows] = (by @ tensor[rows].double()).to(tensor.dtype)


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices for x and y that preserve the product x·y and order its terms by their contribution.

    Args:
        first: second moments of x, (n, n).
        second: second moments of y, (n, n).
    """
    a, b = (_root(moments) for moments in (first, second))
    u, s, v = torch.linalg.svd(a.T @ b)
    inverse_root = torch.rsqrt(s)[:, None]
    return inverse_root * (v @ b.T), inverse_root * (u.T @ a.T)


def _root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    return vectors * values.clamp_min(_LEAST * moments.diagonal().mean().clamp_min(_NOTHING)).sqrt()


def _moments(
    model: nn.Module, queries: Sequence[Group], values: Sequence[Group], batches: Sequence[Any]
) -> dict[str, list[list[Tensor]]]:
    """For each group and head, the second moments of queries and of keys, or the covariance of attended values."""
    like = next(model.parameters())
    query_layers = {side: {group.name: _layer(group, side) for group in queries} for side in ("query", "key")}
    value_readers = {_slices(group, "consumes")[0].tensor.rpartition(".")[0]: group for group in values}
    moments_of = {
        group.name: [[Moments(n, like.device) for _ in range(factors)] for n in group.limits.parts]
        for of_kind, factors in ((queries, 2), (values, 1))
        for group in of_kind
    }
    outputs: dict[str, list[Tensor]] = {name: [] for of_side in query_layers.values() for name in of_side.values()}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs[name].append(output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in outputs]
    try:
        with inputs_of(model, value_readers) as inputs:
            for batch in own_share(batches):
                CalibrationBatch.of(model, batch).to(like).run(model)
                for group in queries:
                    of_q, of_k = (outputs[of_side[group.name]] for of_side in query_layers.values())
                    for q, k in zip(of_q, of_k, strict=True):
                        _add_qk(moments_of[group.name], group, precise(q), precise(k))
                for made in outputs.values():
                    made.clear()
                for name, group in value_readers.items():
                    for rows in map(precise, inputs[name]):
                        x = rows[:, _places(_slices(group, "consumes")[0], range(group.size), rows.device)]
                        for units, (moments,) in zip(_heads(group), moments_of[group.name], strict=True):
                            moments.add(x[:, units.start : units.stop])
                    inputs[name].clear()
    finally:
        for handle in handles:
            handle.remove()
    for moments in (moments for heads in moments_of.values() for head in heads for moments in head):
        moments.add_up()
    sums = {group.name: [[moments.xx for moments in head] for head in moments_of[group.name]] for group in queries}
    for group in values:  # the mean of the attended values is a constant, which a bias can represent
        sums[group.name] = [
            [of_v.xx - torch.outer(of_v.x, of_v.x) / of_v.count.clamp_min(1)] for (of_v,) in moments_of[group.name]
        ]
    return sums


def _layer(group: Group, side: str) -> str:
    """Name of the layer that makes the queries or keys of ``group``."""
    return _slices(group, side)[0].tensor.rpartition(".")[0]


def _add_qk(moments_of: Sequence[Sequence[Moments]], group: Group, queries_BND: Tensor, keys_BND: Tensor) -> None:
    """Add the second moments of the queries and keys in the outputs of their layers, which may be one layer."""
    q, k = (
        out[..., _places(_slices(group, side)[0], range(group.size), out.device)]
        for side, out in (("query", queries_BND), ("key", keys_BND))
    )
    k = k - k.mean(1, keepdim=True)  # the softmax does not depend on the mean key
    for units, (of_q, of_k) in zip(_heads(group), moments_of, strict=True):
        for moments, x in ((of_q, q), (of_k, k)):
            moments.add(x[..., units.start : units.stop].flatten(0, -2))
