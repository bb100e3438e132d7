"""Other bases for the inside of attention heads: the function stays, and few dimensions hold most of it.

Queries and keys may be multiplied by any matrix and its inverse, and so may values and the columns that read them. Of
all bases, one orders the dimensions by how much they add: for queries and keys, the logits are cut best at every number
of dimensions; for values, the output is. It is that of balanced truncation (Moore, IEEE TAC 1981): the singular vectors
of the product of the two factors' square roots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from slimming.core.groups import Group, Slices
from slimming.models.activations import Moments, inputs_of, own_share, precise
from slimming.models.prunable import PrunableModel

_LEAST, _NOTHING = 1e-6, 1e-30
"""Second moments along any direction count as at least this share of their mean, which is at least the other: their
roots can be inverted then, also where the sums have the errors of single precision."""


@torch.no_grad()
def rotate_(prunable: PrunableModel, images: Sequence[Tensor]) -> None:
    """Give every attention head whose dimensions can be cut the basis in which they are best cut.

    Outputs change by rounding alone. Models without such heads stay as they are.

    Args:
        prunable: a plain model in evaluation mode.
        images: batches of shape (B, C, H, W), the same on every process.
    """
    model = prunable.model
    roles: defaultdict[str, dict[str, Group]] = defaultdict(dict)
    for group in prunable.anatomy.groups:
        if group.role in ("qk", "v"):
            roles[group.site][group.role] = group
    queries = [own["qk"] for own in roles.values() if "qk" in own]
    values = [own["v"] for own in roles.values() if "v" in own]
    # Other bases change nothing outside of the heads: all statistics can be taken before.
    moments = _moments(model, queries, values, images)
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
    return [one for one in group.slices if one.side == side]


def _heads(group: Group) -> Iterator[range]:
    """The units of each head."""
    start = 0
    for size in group.limits.parts:
        yield range(start, start + size)
        start += size


def _places(one: Slices, units: range, device: torch.device) -> Tensor:
    return torch.tensor([one.index[unit][0] for unit in units], device=device)


def _multiply_(model: nn.Module, slices: Sequence[Slices], units: range, by: Tensor) -> None:
    """Multiply rows of weights and biases, as one vector space, by a matrix (units, units)."""
    for one in slices:
        tensor = model.get_parameter(one.tensor)
        rows = _places(one, units, tensor.device)
        tensor[rows] = (by @ tensor[rows].double()).to(tensor.dtype)


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices for two factors x, y of a sum x·y that leave it as it is and order its terms by what they add.

    Args:
        first: second moments of x, (n, n).
        second: of y, (n, n).
    """
    a, b = (_root(moments) for moments in (first, second))
    u, s, v = torch.linalg.svd(a.T @ b)
    least = torch.rsqrt(s)[:, None]
    return least * (v @ b.T), least * (u.T @ a.T)


def _root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    return vectors * values.clamp_min(_LEAST * moments.diagonal().mean().clamp_min(_NOTHING)).sqrt()


def _moments(
    model: nn.Module, queries: Sequence[Group], values: Sequence[Group], images: Sequence[Tensor]
) -> dict[str, list[list[Tensor]]]:
    """Per group and head: the second moments of queries and of keys, or the covariance of attended values."""
    like = next(model.parameters())
    made = {_slices(group, "query")[0].tensor.rpartition(".")[0]: group for group in queries}
    read = {_slices(group, "consumes")[0].tensor.rpartition(".")[0]: group for group in values}
    found = {
        group.name: [[Moments(n, like.device) for _ in range(factors)] for n in group.limits.parts]
        for some, factors in ((queries, 2), (values, 1))
        for group in some
    }
    outputs: dict[str, list[Tensor]] = {name: [] for name in made}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs[name].append(output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in made]
    try:
        with inputs_of(model, read) as inputs:
            for batch in own_share(images):
                model(batch.to(like.device, like.dtype))
                for name, group in made.items():
                    for out in outputs.pop(name):
                        _add_qk(found[group.name], group, precise(out))
                    outputs[name] = []
                for name, group in read.items():
                    for rows in map(precise, inputs[name]):
                        x = rows[:, _places(_slices(group, "consumes")[0], range(group.size), rows.device)]
                        for units, (moments,) in zip(_heads(group), found[group.name], strict=True):
                            moments.add(x[:, units.start : units.stop])
                    inputs[name].clear()
    finally:
        for handle in handles:
            handle.remove()
    for moments in (moments for heads in found.values() for head in heads for moments in head):
        moments.add_up()
    sums = {group.name: [[moments.xx for moments in head] for head in found[group.name]] for group in queries}
    for group in values:  # the mean of what is attended is a constant, which a bias can hold
        sums[group.name] = [
            [of_v.xx - torch.outer(of_v.x, of_v.x) / of_v.count.clamp_min(1)] for (of_v,) in found[group.name]
        ]
    return sums


def _add_qk(found: Sequence[Sequence[Moments]], group: Group, out_BND: Tensor) -> None:
    """Add the second moments of the queries and keys in a projection's output."""
    q, k = (
        out_BND[..., _places(_slices(group, side)[0], range(group.size), out_BND.device)] for side in ("query", "key")
    )
    k = k - k.mean(1, keepdim=True)  # what all keys share, softmax takes out
    for units, (of_q, of_k) in zip(_heads(group), found, strict=True):
        for moments, x in ((of_q, q), (of_k, k)):
            moments.add(x[..., units.start : units.stop].flatten(0, -2))
