"""Read whole attentions, MLPs and other residual branches as units that are removed on request.

`residuals` finds what is computed for a branch alone. A branch is removed by putting a module that computes nothing in
the place of each of its modules: it returns zeros in the place of the largest, and its argument in that of the others,
such as norms. Once a block does nothing but return its input, the block itself is removed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from slimming.core.formulas import Dim
from slimming.core.groups import Group, LayerSizes, Limits, Removal, Scale, Slices, TimedLayer
from slimming.models.family import shared_parameters
from slimming.models.traced.residuals import Flow, Graph, ModuleCall, Residual, Value, is_product, last_parameters
from slimming.models.traced.verification import Pass

Returns = tuple[str, tuple[tuple[Any, ...], ...]]
"""Form and results of `slimming.models.layers.Removed`."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A unit: a residual branch, or the branches of a block together.

    Attributes:
        site: name of the module that the unit is called after.
        removed: name of a module -> what is returned in its place.
        spent: names of parameters that only the branch uses, of modules that stay.
        scales: names of the parameters that make the branch 0 if they are 0.
        additions: where the branch is added to the stream.
    """

    site: str
    removed: Mapping[str, Returns]
    spent: tuple[str, ...]
    scales: tuple[str, ...]
    additions: frozenset[Any]

    @property
    def name(self) -> str:
        """Name of the group."""
        return f"{self.site}.branch"

    def holds(self, tensor: str) -> bool:
        """Whether the branch alone uses a tensor."""
        return tensor in self.spent or any(tensor.startswith(f"{name}.") for name in self.removed)


@dataclass(frozen=True, kw_only=True)
class BranchReading:
    """The branches of a model.

    Attributes:
        branches: the units.
        blocks: name of a block -> what is returned in its place, and the names of the groups without which it returns
            its input.
        uncovered: branches that cannot be removed, with the reason.
    """

    branches: tuple[Branch, ...] = ()
    blocks: Mapping[str, tuple[Returns, tuple[str, ...]]]
    uncovered: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A branch that was found, in which block, and why its modules cannot be removed one by one.

    There is no block if nothing scales the branch, and no reason if the modules can be removed.
    """

    residual: Residual
    block: str | None
    unit: Branch
    reason: str | None


def read_branches(model: nn.Module, flow: Flow, forward: Pass) -> BranchReading:
    """Read the residual branches of ``model``.

    Args:
        model: in float64 with random weights.
        flow: what was recorded of a forward pass with gradients.
        forward: that pass.
    """
    graph = Graph(flow)
    reader = _Reader(model, flow, graph)
    found = [each for residual in graph.residuals() if (each := reader.branch(residual)) is not None]
    by_addition = {each.residual.add: each.residual for each in found}
    names = dict.fromkeys(each.block for each in found if each.block is not None)
    passed = {name: reader.passed(name, by_addition) for name in names if name}
    blocks = {name: value for name, value in passed.items() if value is not None}
    blocks = _confirmed(model, blocks, [each.unit for each in found], forward)
    units: list[Branch] = []
    uncovered: dict[str, list[str]] = {}
    for each in found:
        if each.block is None:
            uncovered.setdefault(str(each.reason), []).append(each.unit.site or "a branch of the model")
    for name in names:
        own = [each for each in found if each.block == name]
        additions = {each.residual.add for each in own}
        failing = [each for each in own if each.reason is not None]
        if name in blocks and (len(own) == 1 or failing) and additions == {each.add for each in blocks[name][1]}:
            units.append(_joined(name, blocks[name][0], [each.unit for each in own]))
            continue
        units += [each.unit for each in own if each.reason is None]
        for each in failing:
            uncovered.setdefault(str(each.reason), []).append(each.unit.site)
    units = _named_apart(units)
    owner = {addition: unit.name for unit in units for addition in unit.additions}
    whole: dict[str, tuple[Returns, tuple[str, ...]]] = {}
    for name, (returns, residuals) in blocks.items():
        groups = tuple(dict.fromkeys(owner.get(each.add, "") for each in residuals))
        own = [unit for unit in units if unit.name in groups]
        inside = [tensor for tensor, _ in model.named_parameters() if tensor.startswith(f"{name}.")]
        # A norm that several branches read stays, and the block with it.
        is_empty = all(any(unit.holds(tensor) for unit in own) for tensor in inside)
        if "" not in groups and is_empty and not any(name in unit.removed for unit in units):
            whole[name] = returns, groups
    sentences = [
        f"{sites[0]}{f' and {len(sites) - 1} more' if len(sites) > 1 else ''} as a whole: {reason}"
        for reason, sites in uncovered.items()
    ]
    return BranchReading(branches=tuple(units), blocks=whole, uncovered=tuple(sentences))


class _Reader:
    """Turns what was found in the graph into units."""

    def __init__(self, model: nn.Module, flow: Flow, graph: Graph) -> None:
        self.model, self.calls, self.graph = model, flow.calls, graph
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self.nodes = {name: node for node in graph.frames if (name := self._parameter(node)) is not None}
        self.makers: defaultdict[Any, list[str]] = defaultdict(list)
        for name, calls in flow.calls.items():
            for node in {node for call in calls for node in call.nodes}:
                self.makers[node].append(name)
        self.shared = {name for names in shared_parameters(model) for name in names}

    def _parameter(self, node: Any) -> str | None:
        return self.parameters.get(id(node.variable)) if type(node).__name__ == "AccumulateGrad" else None

    def branch(self, residual: Residual) -> _Found | None:
        """The unit of ``residual``; None if it has no parameters."""
        used = [name for node in residual.nodes if (name := self._parameter(node)) is not None]
        if not used:
            return None
        removed = self._removed(residual)
        owners = {name: name.rpartition(".")[0] for name in used if not _is_inside(name, removed)}
        block = _common([residual.frame, *removed, *owners.values()])
        sizes = {name: sum(each.numel() for each in self.model.get_submodule(name).parameters()) for name in removed}
        site = max(sizes, key=lambda name: sizes[name], default=block)
        returns, reason = self._returns(removed, site)
        last = last_parameters(residual.node)
        scales = tuple(dict.fromkeys(self.parameters[id(each)] for each in last or () if id(each) in self.parameters))
        if not site or not last or any(self.nodes.get(name) not in residual.nodes for name in scales):
            reason = "no layer is last in it, whose weights could be its mask"
            nothing = Branch(site=site, removed={}, spent=(), scales=(), additions=frozenset())
            return _Found(residual, None, nothing, reason)
        if reason is None:
            reason = self._left_over(residual, removed, owners)
        unit = Branch(
            site=site,
            removed=returns,
            spent=tuple(sorted(owners)),
            scales=scales,
            additions=frozenset((residual.add,)),
        )
        return _Found(residual, block, unit, reason)

    def _removed(self, residual: Residual) -> list[str]:
        """The outermost modules that run for the branch alone."""
        names = dict.fromkeys(name for node in residual.nodes for name in self.makers.get(node, ()))
        own = [
            name
            for name in names
            if name and all(call.nodes and residual.nodes.issuperset(call.nodes) for call in self.calls[name])
        ]
        result: list[str] = []
        for name in sorted(own, key=lambda name: name.count(".")):
            if not _is_inside(name, result):
                result.append(name)
        order = {name: position for position, name in enumerate(self.calls)}
        return sorted(result, key=order.__getitem__)

    def _returns(self, removed: Sequence[str], site: str) -> tuple[dict[str, Returns], str | None]:
        """What is returned in the place of each module, and why that cannot be said of one of them."""
        result: dict[str, Returns] = {}
        for name in removed:
            ways = {_returned(call, "zeros" if name == site else "input") for call in self.calls[name]}
            way = ways.pop() if len(ways) == 1 else None
            if way is None:
                return {}, f"what {_last(name)} returns cannot be made without it"
            result[name] = way
        return result, None

    def _left_over(self, residual: Residual, removed: Sequence[str], owners: Mapping[str, str]) -> str | None:
        """What of the branch would stay; None if nothing that costs parameters or multiply-adds does."""
        for node in residual.nodes:
            frame = self.graph.frames[node]
            if is_product(node) and not _is_inside(f"{frame}.", removed):
                return f"{_class(self.model, frame)} multiplies matrices for it in its own forward"
        for name, owner in owners.items():
            if owner and not f"{residual.frame}.".startswith(f"{owner}."):
                return f"{_class(self.model, owner)} uses {_last(name)} for other things, too"
        for name in (name for name, _ in self.model.named_parameters() if _is_inside(name, removed)):
            if name in self.shared or self.nodes.get(name, residual.node) not in residual.nodes:
                return f"{_last(name)} is used elsewhere, too"
        return None

    def passed(self, name: str, branches: Mapping[Any, Residual]) -> tuple[Returns, list[Residual]] | None:
        """What a block returns without its branches, and these; None if it does anything else."""
        if len(self.calls[name]) != 1:
            return None
        call = self.calls[name][0]
        result = call.results[0] if call.results else Value()
        for key, argument in call.arguments.items():
            if argument.node is None or result.node is None or argument.shape != result.shape:
                continue
            found = self.graph.between(argument.node, result.node, branches)
            returns = _returned(call, "input", key)
            if found and returns is not None:
                return returns, found
        return None


def _returned(call: ModuleCall, what: str, key: int | str | None = None) -> Returns | None:
    """What takes the place of the results of ``call``: zeros or the argument ``key``; None if a result is unknown."""
    if call.form == "other" or not call.results or call.results[0].shape is None:
        return None
    shape = call.results[0].shape
    if key is None:
        tensors = {name: value for name, value in call.arguments.items() if value.node is not None}
        same = [name for name, value in tensors.items() if value.shape == shape]
        key = next(
            iter(same or [name for name, value in tensors.items() if len(value.shape or ()) == len(shape)]), None
        )
    if key is None:
        return None
    given = call.arguments[key].shape or ()
    single = tuple(dim for dim, size in enumerate(shape) if what == "zeros" and size == 1 != given[dim])
    results: list[tuple[Any, ...]] = [(what, key, *single[:1])]
    for other in call.results[1:]:
        same = [name for name, value in call.arguments.items() if _is_plain(other) and value == other]
        if not same and other.shape is None and other.plain is not None:
            return None
        results.append(("input", same[0]) if same else ("none",))
    return call.form, tuple(results)


def _is_plain(value: Value) -> bool:
    return value.shape is None and value.plain is not None


def _confirmed(
    model: nn.Module, blocks: Mapping[str, tuple[Returns, list[Residual]]], units: Sequence[Branch], forward: Pass
) -> dict[str, tuple[Returns, list[Residual]]]:
    """Those of ``blocks`` that return their input when all branches are 0; others may rectify it, for example."""
    if not blocks:
        return {}
    kept = dict(blocks)

    def compare(name: str, args: Any, kwargs: Any, output: Any) -> None:
        form, ((_, key, *_), *_) = blocks[name][0]
        given = args[key] if isinstance(key, int) else kwargs[key]
        result = output if form == "one" else output[0]
        if not (result.shape == given.shape and torch.equal(result, given)):
            kept.pop(name, None)

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: compare(name, args, kwargs, output), with_kwargs=True
        )
        for name in blocks
    ]
    parameters = dict(model.named_parameters())
    saved = {name: parameters[name].detach().clone() for unit in units for name in unit.scales}
    try:
        with torch.no_grad():
            for name in saved:
                parameters[name].zero_()
            forward.outputs(model)
    finally:
        for handle in handles:
            handle.remove()
        for name, value in saved.items():
            parameters[name].data.copy_(value)
    return kept


def _joined(block: str, returns: Returns, units: Sequence[Branch]) -> Branch:
    """The unit of a whole block."""
    return Branch(
        site=block,
        removed={block: returns},
        spent=(),
        scales=tuple(dict.fromkeys(name for unit in units for name in unit.scales)),
        additions=frozenset(addition for unit in units for addition in unit.additions),
    )


def _named_apart(units: Sequence[Branch]) -> list[Branch]:
    """The units with different sites: a block that is a branch of another block gets the name of a module in it."""
    result: dict[str, Branch] = {}
    for unit in units:
        if unit.site in result:
            unit = replace(unit, site=unit.scales[0].rpartition(".")[0])
        result.setdefault(unit.site, unit)
    return list(result.values())


def branch_groups(model: nn.Module, branches: Iterable[Branch], inner: Sequence[Group]) -> list[Group]:
    """The group of each branch, with the slices of the units inside it, which are removed with it.

    Args:
        model: the model.
        branches: its branches.
        inner: its other groups.
    """
    parameters = dict(model.named_parameters())
    return [
        Group(
            name=branch.name,
            kind="block",
            size=1,
            site=branch.site,
            role="branch",
            limits=Limits(minimum=0),
            slices=_slices(branch, inner),
            scales=tuple(
                Scale(tensor=name, dim=0, index=(tuple(range(len(parameters[name]))),)) for name in branch.scales
            ),
        )
        for branch in branches
    ]


def _slices(branch: Branch, inner: Sequence[Group]) -> tuple[Slices, ...]:
    """All slices of the groups of ``inner`` that are inside the branch, as those of one unit."""
    indices: dict[tuple[str, int, str], set[int]] = {}
    for group in inner:
        if group.token is None and all(branch.holds(part.tensor) for part in group.slices):
            for part in group.slices:
                side = "consumes" if part.side == "consumes" else "produces"  # also for queries and keys
                indices.setdefault((part.tensor, part.dim, side), set()).update(i for unit in part.index for i in unit)
    return tuple(
        Slices(tensor=tensor, dim=dim, index=(tuple(sorted(found)),), side=side)
        for (tensor, dim, side), found in indices.items()
    )


def with_removals(
    sizes: Mapping[str, LayerSizes], reading: BranchReading, names: Collection[str]
) -> dict[str, LayerSizes]:
    """``sizes`` with the modules that are removed with the groups called ``names``."""
    removals: defaultdict[str, list[Removal]] = defaultdict(list)
    spent: defaultdict[str, dict[str, Dim]] = defaultdict(dict)
    for unit in reading.branches:
        if unit.name not in names:
            continue
        kept = Dim(groups=((unit.name, 1),))
        for module, returns in unit.removed.items():
            removals[module].append(Removal(kept=kept, returns=returns))
        for tensor in unit.spent:
            owner, _, name = tensor.rpartition(".")
            spent[owner][name] = kept
    for module, (returns, groups) in reading.blocks.items():
        if set(groups) <= set(names):
            removals[module].append(Removal(kept=Dim(groups=tuple((name, 1) for name in groups)), returns=returns))
    return {
        **sizes,
        **{
            module: replace(sizes.get(module, LayerSizes()), removals=tuple(removals[module]), spent=spent[module])
            for module in {*removals, *spent}
        },
    }


def alive(module: str, sizes: Mapping[str, LayerSizes]) -> tuple[Dim, ...]:
    """A product that is 0 once ``module`` was removed with a branch, and 1 before."""
    around = [module.rsplit(".", depth)[0] for depth in range(module.count(".") + 1)]
    found = [removal.kept for name in around if name in sizes for removal in sizes[name].removals]
    return tuple(dict.fromkeys(dim for dim in found if len(dim.groups) == 1))


def layers_of_branches(layers: Iterable[TimedLayer], sizes: Mapping[str, LayerSizes]) -> tuple[TimedLayer, ...]:
    """``layers`` that take no time once their module was removed with a branch."""
    return tuple(replace(layer, alive=alive(layer.name.rpartition("#")[0], sizes)) for layer in layers)


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _common(names: Sequence[str]) -> str:
    """The innermost module that is around all of ``names``, or one of them."""
    paths = [name.split(".") for name in names]
    shared = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)


def _class(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__


def _last(name: str) -> str:
    return name.rpartition(".")[2]
