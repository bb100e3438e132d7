"""Derive the cost formulas of a model by counting its operations in a few cut copies of it.

What an operation costs is a product of dimensions, see `slimming.models.traced.matching`. Nothing is assumed about the
classes of the modules or the kinds of the groups, so every kind of unit gets its formulas here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimming.core.copies import copied
from slimming.core.example_inputs import ExampleCall
from slimming.core.formulas import Dim, Operation, Product
from slimming.core.groups import Group
from slimming.counting.operations import MacCounter, unfused
from slimming.errors import UnsupportedModelError
from slimming.models.family import Kept
from slimming.models.traced.matching import Matcher
from slimming.models.traced.module_stack import module_stack
from slimming.models.traced.resize import tensor_dims
from slimming.models.traced.sample_cuts import sample_cuts
from slimming.models.traced.verification import randomise_

Factors = tuple[int, ...]
"""Numbers whose product is the number of multiply-adds of an operation."""
MacsByWeight = Mapping[tuple[str, str], Sequence[Factors]]
"""(Module, parameter) -> the products of the parameter, or of other tensors if it is empty, one after the other."""


def operations(
    model: nn.Module, call: ExampleCall, groups: Sequence[Group], cut: Callable[[Kept], nn.Module]
) -> tuple[Operation, ...]:
    """One operation per module that has parameters or multiplies matrices.

    Args:
        model: the model in evaluation mode.
        call: one example.
        groups: its groups.
        cut: makes a copy of ``model`` that is cut to the given units.

    Raises:
        UnsupportedModelError: the cost of an operation is no product of dimensions.
    """
    cuts, matcher = sample_cuts(groups, _dims(model, groups))
    copies = [model, *(cut(kept) for kept in cuts)]
    macs = _macs([macs_by_weight(copy, call) for copy in copies], matcher, lambda: macs_of_other_weights(model, call))
    params = _params(copies, matcher)
    names = [name for name, _ in model.named_modules() if params[name] or macs[name]]
    return tuple(Operation(name=name or "model", macs=_summed(macs[name]), params=params[name]) for name in names)


def _dims(model: nn.Module, groups: Sequence[Group]) -> list[Dim]:
    """The dimensions that occur in the model."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = tensor_dims(groups, {name: tuple(tensor.shape) for name, tensor in named})
    return [*dict.fromkeys(dim for dims in tensors.values() for dim in dims if isinstance(dim, Dim)), *_units(groups)]


def _units(groups: Sequence[Group]) -> Iterator[Dim]:
    """The dimensions that are in no parameter: units of groups, and tokens with those that are never removed.

    Keys and values together have other numbers of rows than a joint projection, see ``nn.MultiheadAttention``.
    """
    values = {group.site: group for group in groups if group.role == "v"}
    for group in groups:
        if group.role not in ("branch", "qkv"):
            yield Dim(groups=((group.name, 1),))
        if group.role == "qk" and group.site in values:
            yield Dim(groups=((group.name, 1), (values[group.site].name, 1)))
        if group.token is not None:
            yield Dim(fixed=group.token.prefix + group.token.suffix, groups=((group.name, 1),))


def _macs(
    counted: Sequence[MacsByWeight], matcher: Matcher, of_other_weights: Callable[[], MacsByWeight]
) -> defaultdict[str, list[Product]]:
    """Module -> its multiply-adds as products.

    Args:
        counted: what was counted in each copy, the dense model first.
        matcher: finds the products.
        of_other_weights: counts again in a dense model with other weights. What then differs depends on the data, such
            as the number of objects that a detector finds, and is taken to be as in the dense model.
    """
    result: defaultdict[str, list[Product]] = defaultdict(list)
    again: MacsByWeight | None = None
    for key in dict.fromkeys(key for macs in counted for key in macs):
        calls = [macs.get(key, ()) for macs in counted]
        found = _products(calls, matcher, key[1] or f"{key[0]}.")
        if None in found:
            again = of_other_weights() if again is None else again
            if again.get(key, ()) != calls[0]:
                found = _products_at_the_positions_of_the_first(calls, matcher)
        for products in found:
            if products is None:
                name, weight = key
                what = f"with {weight}" if weight else "of two activations"
                first, last = (", ".join(map(str, dict.fromkeys(each))) or "nothing" for each in (calls[0], calls[-1]))
                raise UnsupportedModelError(
                    f"The multiply-adds of {name or 'the model'} {what} are no product of numbers of units: the sizes "
                    f"of its products are {first} in the model and {last} in a cut copy. Slim the parts of the model "
                    "around it by themselves, such as its backbone."
                )
            result[key[0]] += products
    return result


def _products(calls: Sequence[Sequence[Factors]], matcher: Matcher, name: str) -> list[tuple[Product, ...] | None]:
    present = [bool(each) for each in calls]
    return [matcher.products(factors, present, name) for factors in _aligned([each for each in calls if each])]


def _products_at_the_positions_of_the_first(
    calls: Sequence[Sequence[Factors]], matcher: Matcher
) -> list[tuple[Product, ...] | None]:
    """The products with a layer's weight, all in one, at as many positions as in the first copy."""
    shapes = [dict.fromkeys(each[:-1] for each in products) for products in calls]
    if not calls[0] or any(len(found) > 1 for found in shapes):
        return [None] * bool(calls[0])
    factors = list(zip(*(next(iter(found)) for found in shapes if found), strict=True))
    positions = sum(each[-1] for each in calls[0])
    return [matcher.products([*factors, (positions,) * len(factors[0])], map(bool, shapes))]


def _aligned(calls: Sequence[Sequence[Factors]]) -> list[list[tuple[int, ...]]]:
    """For each product, its factors in all copies; one for all together if copies have different numbers of them."""
    if len({tuple(map(len, products)) for products in calls}) == 1:
        return [list(zip(*same, strict=True)) for same in zip(*calls, strict=True)]
    if all(len(set(products)) == 1 for products in calls) and len({len(products[0]) for products in calls}) == 1:
        number = tuple(len(products) for products in calls)  # a product per head, for example
        return [[number, *zip(*(products[0] for products in calls), strict=True)]]
    return [[tuple(sum(map(math.prod, products)) for products in calls)]]


def _params(copies: Sequence[nn.Module], matcher: Matcher) -> dict[str, tuple[Product, ...]]:
    """Module -> the elements of its parameters as products; a shared parameter is that of its first module."""
    named = [dict(copy.named_parameters()) for copy in copies]
    result: defaultdict[str, list[Product]] = defaultdict(list)
    for name in dict.fromkeys(name for parameters in named for name in parameters):
        shapes = [tuple(parameters[name].shape) for parameters in named if name in parameters]
        present = [name in parameters for parameters in named]
        found = (
            matcher.products(list(zip(*shapes, strict=True)), present, name) if len({*map(len, shapes)}) == 1 else None
        )
        if found is None:
            raise UnsupportedModelError(
                f"The size of {name} is no product of numbers of units: it is {shapes[0]} in "
                f"the model and {shapes[-1]} in a cut copy."
            )
        result[name.rpartition(".")[0]] += found
    return {name: _summed(result[name]) for name, _ in copies[0].named_modules()}


def _summed(products: Sequence[Product]) -> tuple[Product, ...]:
    """The products with their leading numbers added up where the others are equal."""
    numbers: defaultdict[Product, int] = defaultdict(int)
    for number, *others in products:
        numbers[tuple(others)] += number.fixed
    return tuple((Dim(fixed=number), *others) for others, number in numbers.items())


@torch.no_grad()
def macs_by_weight(model: nn.Module, call: ExampleCall) -> MacsByWeight:
    """The products of matrices in one forward pass, by the parameter and its module, or the innermost that runs."""
    stack = [""]
    named = [(name, weight) for name, weight in model.named_parameters() if weight.dim() > 1]
    weights = {weight.untyped_storage()._cdata: name for name, weight in named}
    result: defaultdict[tuple[str, str], list[Factors]] = defaultdict(list)

    def record(operation: Any, args: Sequence[Any], macs: int) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim() > 1]
        weight = next((tensor for tensor in tensors if tensor.untyped_storage()._cdata in weights), None)
        name = "" if weight is None else weights[weight.untyped_storage()._cdata]
        if "scaled_dot_product" in operation.__name__:
            query, key, value = tensors[:3]
            heads, queries, keys = math.prod(query.shape[:-2]), query.shape[-2], key.shape[-2]
            # As the kernel that is not fused multiplies them: which one runs may depend on the sizes.
            parts = [(heads, query.shape[-1], keys, queries), (heads, keys, value.shape[-1], queries)]
        else:
            operand = weight if weight is not None else tensors[-1] if tensors else None
            shape = () if operand is None else tuple(operand.shape)
            parts = [(*shape, macs // max(1, math.prod(shape)))]
        # Where the forward of a module is replaced, others may run the layers inside it.
        owner = name.rpartition(".")[0] if name else stack[-1]
        result[owner, name] += parts if sum(map(math.prod, parts)) == macs else [(macs,)]

    with module_stack(model, stack), unfused(), MacCounter(record):
        call.run(model)
    return dict(result)


def macs_of_other_weights(model: nn.Module, call: ExampleCall) -> MacsByWeight:
    """What `macs_by_weight` counts in a copy of ``model`` with other random weights."""
    other = copied(model)
    randomise_(other, seed=1)
    return macs_by_weight(other, call)
