"""The stages as functions of a model: describe, attach, plan, cut, cost."""

from __future__ import annotations

import abc
import copy
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from slimming import checkpoint, masks
from slimming.bench import count
from slimming.compensation import cut_compensated_
from slimming.cost import Cost, per_group, total
from slimming.cut import complete, cut_
from slimming.errors import BudgetError, CheckpointError, ConfigError, PlanError, nearest
from slimming.families import family_called, family_of
from slimming.groups import Anatomy, Group, keep_all
from slimming.io import atomic_write_bytes, seal, unseal
from slimming.latency import LatencyTable
from slimming.masks import SoftMasks
from slimming.plan import FORMAT, ON_REQUEST, SOLVERS, Budget, Layout, Plan, Structure
from slimming.rank import Planner
from slimming.worth import Sensitivity

DEFAULT_PENALTY: Mapping[str, float] = {
    "head_dim": 1.0,
    "head": 1.0,
    "mlp": 1.0,
    "channel": 1.0,
    "token": 0.25,
    "block": 1.0,
    "width": 1.0,
}
"""Weights of the mean |mask| per kind; for DeiT-S they equal the paper's W1, W2, W3 on sums (joint search)."""


def anatomy_of(model: nn.Module) -> Anatomy:
    """What the model's family reads in it, with or without masks attached.

    Raises:
        UnsupportedModelError: no family reads the model.
    """
    found = masks.attached(model)
    return found.anatomy if found is not None else family_of(model).read(model)


def describe(model: nn.Module, *, coupled: bool = False) -> tuple[Group, ...]:
    """List what can go in ``model``, with sizes and limits. The model is not changed.

    Args:
        model: a model that a family reads, dense or slim.
        coupled: True gives one group per attention for QK and V together, as in the paper; False gives two.

    Raises:
        UnsupportedModelError: no family reads the model, or one of its parts.

    >>> import timm, slimming
    >>> groups = slimming.describe(timm.create_model("test_vit"))
    >>> groups[0]
    Group('blocks.0.attn.qk', kind='head_dim', size=64, minimum=1, parts=(32, 32))
    """
    groups = anatomy_of(model).groups
    joint = {group.site for group in groups if group.role == "qkv"}
    if coupled:
        return tuple(group for group in groups if not (group.site in joint and group.role in ("qk", "v")))
    return tuple(group for group in groups if group.role != "qkv")


def attach(
    model: nn.Module,
    groups: Sequence[Group] | None = None,
    *,
    tokens: str = "bias",
    penalty: Mapping[str, float] | None = None,
    norms: bool = False,
) -> SoftMasks:
    """Attach soft masks to ``model`` in place; its outputs do not change until the masks do.

    Args:
        model: a model that a family reads.
        groups: any of `describe`; by default all head dimensions, hidden units and tokens.
        tokens: ``"bias"`` (exact removal) or ``"multiply"`` (the paper's variant, which starts at tanh(3)).
        penalty: kind -> weight of its penalty, by default `DEFAULT_PENALTY`.
        norms: take the scales of BatchNorms as the masks of the channels that pass them, without parameters of
            their own (Network Slimming, section 3). ``masks[name]`` is then the scale of the first such norm.

    Returns:
        A mapping from group name to the float32 parameter of its mask.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: masks are attached already, or the groups are of another model or share units.

    >>> import timm, slimming
    >>> model = timm.create_model("test_vit")
    >>> masks = slimming.attach(model)
    >>> masks["blocks.0.mlp.hidden"].shape
    torch.Size([192])
    """
    if groups is None:
        groups = searched(describe(model))
    penalty = DEFAULT_PENALTY if penalty is None else penalty
    return masks.attach(model, anatomy_of(model), groups, tokens=tokens, penalty=penalty, norms=norms)


def searched(groups: Sequence[Group], kinds: Sequence[str] | None = None) -> list[Group]:
    """Those of ``groups`` that get a mask.

    Args:
        groups: what `describe` gives.
        kinds: kinds to take; None takes all except whole attentions and MLPs, the embedding width, and heads whose
            dimensions can go on their own: such a head goes when its last V dimension does.

    Raises:
        ConfigError: there is no group of one of ``kinds``.
    """
    if kinds is None:
        has_dimensions = {group.site for group in groups if group.kind == "head_dim"}
        inner = [group for group in groups if group.kind not in ON_REQUEST]
        return [group for group in inner if group.kind != "head" or group.site not in has_dimensions]
    missing = [kind for kind in kinds if not any(group.kind == kind for group in groups)]
    if missing:
        raise ConfigError(f"This model has no groups of kind {missing[0]!r}; take it out of search.kinds.")
    return [group for group in groups if group.kind in kinds]


@dataclass(frozen=True, kw_only=True)
class Rating:
    """Scores of a model's units, and how plans are made of them unless asked otherwise.

    Attributes:
        anatomy: the model.
        scores: group name -> score of each unit, shape (size,).
        layout: which sizes the layers get.
        fold: see `Plan`.
        sensitivity: what cutting each kind does, see `slimming.sensitivity`; None if it was not measured.
    """

    anatomy: Anatomy
    scores: Mapping[str, Tensor]
    layout: Layout = field(default_factory=Layout)
    fold: bool = True
    sensitivity: Sensitivity | None = None


class Rated(abc.ABC):
    """Something that plans can be made from, such as a search result."""

    @property
    @abc.abstractmethod
    def rating(self) -> Rating:
        """Its scores."""


def plan(
    source: Rated | SoftMasks | str | Path,
    budget: Budget,
    *,
    layout: Layout | None = None,
    score: str | None = None,
    fold: bool | None = None,
    solver: str | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> Plan:
    """Decide which units stay under ``budget``.

    Args:
        source: a search result, attached masks, or a scores file.
        budget: what the slim model may cost.
        layout: which sizes the layers may get; by default that of the search, else equal heads and multiples of 8.
        score: which score of attached masks to use, see `SoftMasks.scores`; other sources have theirs.
        fold: False makes the masks of what stays 1 at the cut, as in the paper; by default as the search says.
        solver: ``"nested"`` takes units away in one order, so that larger budgets keep all that smaller ones keep;
            it is the default for one limit, where it ends within 1 % of it. ``"exact"`` keeps the most total score that
            fits, by linear programming (see `slimming.solve`): the default for several limits, which one order meets
            badly, and where the last step of the order was a large one. Its plans are not nested. Keep ratios need no
            solver.
        latency: the table, or its file, that says how long a model takes; needed for limits of latency.

    Raises:
        ConfigError: there is no such solver, or no latency table for a limit of latency.
        BudgetError: the budget cannot be reached; the message says the smallest that can.
        PlanError: the scores are of another model or not finite, or ``source`` is a model without scores.
        CheckpointError: the scores file is damaged.

    >>> import timm, slimming
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> plan = slimming.plan(masks, slimming.Budget(keep={"mlp": 0.5}))
    >>> sum(len(units) for name, units in plan.kept.items() if name.endswith("hidden"))
    576
    """
    return plans(source, [budget], layout=layout, score=score, fold=fold, solver=solver, latency=latency)[0]


def plans(
    source: Rated | SoftMasks | str | Path,
    budgets: Sequence[Budget],
    *,
    layout: Layout | None = None,
    score: str | None = None,
    fold: bool | None = None,
    solver: str | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> list[Plan]:
    """One plan per budget, as `plan` makes them; faster than one by one, and from the same scores.

    With the solver ``"nested"``, what a smaller budget of one limit keeps, a larger one keeps too.

    >>> import timm, slimming
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> budgets = [slimming.Budget(macs=0.4), slimming.Budget(macs=0.8)]
    >>> small, large = slimming.plans(masks, budgets, solver="nested")
    >>> all(set(units) <= set(large.kept[name]) for name, units in small.kept.items())
    True
    """
    if solver is not None and solver not in SOLVERS:
        raise ConfigError(f"There is no solver {solver!r}; solvers are {', '.join(SOLVERS)}.{nearest(solver, SOLVERS)}")
    metrics = {metric for budget in budgets for metric in budget.limits}
    planner, rating, table = _planner(source, metrics, layout=layout, score=score, latency=latency)
    fold = rating.fold if fold is None else fold
    found = []
    for budget in budgets:
        made = planner.plan(budget, fold=fold, solver=solver)
        if table is not None:
            counts = {name: len(units) for name, units in complete(rating.anatomy, made).items()}
            made = replace(made, solution={**made.solution, "latency_ms": table.predict(rating.anatomy, counts)})
        found.append(made)
    return found


def smallest(
    source: Rated | SoftMasks | str | Path,
    metric: str,
    *,
    layout: Layout | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> float:
    """The smallest share of ``metric`` that a budget may ask for; arguments and errors are those of `plan`.

    >>> import timm, slimming
    >>> from slimming.api import smallest
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> 0.1 < smallest(masks, "macs") < 0.3
    True
    """
    return _planner(source, {metric}, layout=layout, latency=latency)[0].smallest(metric)


def _planner(
    source: Rated | SoftMasks | str | Path,
    metrics: Collection[str],
    *,
    layout: Layout | None,
    latency: LatencyTable | str | Path | None,
    score: str | None = None,
) -> tuple[Planner, Rating, LatencyTable | None]:
    """What plans are made by: for limits of ``metrics``, from what, and the table where one of them is a time."""
    if isinstance(source, SoftMasks):
        rating = Rating(anatomy=source.anatomy, scores=source.scores(score))
    elif score is not None:
        raise ConfigError("A score is chosen where there are masks; a search result or a scores file has its own.")
    elif isinstance(source, Rated):
        rating = source.rating
    elif isinstance(source, nn.Module):
        raise PlanError("A model alone has no scores: give what slimming.search or slimming.score found, or its masks.")
    else:
        rating = load_scores(source)
    layout = layout or rating.layout
    if "memory_bytes" in metrics:
        _check_memory(rating.anatomy, layout)
    table = None if latency is None else _latency_table(latency)
    if table is not None and layout.multiple is None:
        layout = replace(layout, multiple=table.multiple)
    if {"latency", "latency_ms"} & set(metrics):
        _check_latency(table, layout)
    else:
        table = None
    measure = partial(_measure, rating.anatomy, table=table)
    return Planner(rating.anatomy, rating.scores, layout, measure, rating.sensitivity), rating, table


def _measure(anatomy: Anatomy, kept: Mapping[str, int], *, table: LatencyTable | None = None) -> dict[str, float]:
    found = total(anatomy, kept)
    costs: dict[str, float] = {"params": found.params, "macs": found.macs, "memory_bytes": found.memory_bytes}
    if table is not None:
        costs["latency"] = costs["latency_ms"] = table.predict(anatomy, kept)
    return costs


def _latency_table(given: LatencyTable | str | Path) -> LatencyTable:
    return given if isinstance(given, LatencyTable) else LatencyTable.load(given)


def _check_latency(table: LatencyTable | None, layout: Layout) -> None:
    if table is None:
        raise ConfigError(
            "A budget of latency needs a table of the device: slimming latency-table build MODEL --output FILE, then "
            "plan(…, latency=FILE) or --latency-table FILE."
        )
    if table.uneven_heads == layout.equal_heads or not (layout.equal_heads or layout.equal_qkv):
        table_has = "different sizes" if table.uneven_heads else "one size"
        raise BudgetError(
            f"This latency table is of heads of {table_has}, QK and V alike, and the layout is not. Set "
            "layout.equal_heads and layout.equal_qkv, or build one for the other: slimming latency-table build, with "
            "or without --uneven-heads."
        )


def _check_memory(anatomy: Anatomy, layout: Layout) -> None:
    whole = keep_all(anatomy.groups)
    if not family_called(anatomy.structure.family).has_memory_formula(anatomy, whole):
        raise BudgetError(
            "This model was read by tracing, and its memory has no formula to plan with. Give params or macs; "
            "slimming.cost counts the memory of a plan."
        )
    if not layout.equal_heads:
        raise BudgetError(
            "Heads of several sizes have no formula for memory. Give layout.equal_heads, or params or macs."
        )


def cut(model: nn.Module, plan: Plan, *, images: Sequence[Tensor] = ()) -> nn.Module:
    """Make the slim model: a plain module with smaller tensors. The model given stays as it was.

    Masks that are attached to the model are folded into the weights (or set to 1, if the plan says so).

    Args:
        model: dense or masked.
        plan: which units stay.
        images: batches of shape (B, C, H, W) of some hundred images, as the model takes them: what goes is then
            predicted from what stays, and folded into the layers that read it (see `slimming.compensation`). Without
            images the slim model equals the masked one.

    Raises:
        PlanError: the plan was made for another model, or leaves a group without a unit.

    >>> import timm, slimming
    >>> model = timm.create_model("test_vit")
    >>> plan = slimming.plan(slimming.attach(model), slimming.Budget(macs=0.5))
    >>> small = slimming.cut(model, plan)
    >>> slimming.cost(small).macs <= 0.5 * slimming.cost(model).macs
    True
    """
    anatomy, family = anatomy_of(model), family_of(model)
    complete(anatomy, plan)
    batches = [images] if isinstance(images, Tensor) else list(images)
    slim = copy.deepcopy(model)
    found = masks.attached(slim)
    if found is not None:
        if plan.fold:
            found.fold_()
        found.detach_()
    if batches:
        cut_compensated_(slim, family, anatomy, plan, batches)
    else:
        cut_(slim, family, anatomy, plan)
    return slim


def cost(model: nn.Module, plan: Plan | None = None) -> Cost:
    """What ``model`` costs, now or under ``plan``, by formula.

    The memory of traced models, and of heads of several sizes, has no formula: one forward pass is counted.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: the plan was made for another model.

    >>> import timm, slimming
    >>> slimming.cost(timm.create_model("deit_small_patch16_224")).macs
    4598882304
    """
    anatomy = anatomy_of(model)
    kept = complete(anatomy, plan) if plan is not None else keep_all(anatomy.groups)
    counts = {name: len(units) for name, units in kept.items()}
    element_bytes = next(model.parameters()).element_size()
    found = total(anatomy, counts, element_bytes=element_bytes)
    if family_of(model).has_memory_formula(anatomy, kept):
        memory = found.memory_bytes
    else:
        memory = count(_plain(model) if plan is None else cut(model, plan), anatomy.input_shape).memory_bytes
    return Cost(params=found.params, macs=found.macs, memory_bytes=memory, groups=per_group(anatomy, counts))


def _plain(model: nn.Module) -> nn.Module:
    """The model without masks."""
    if masks.attached(model) is None:
        return model
    copied = copy.deepcopy(model)
    if (found := masks.attached(copied)) is not None:
        found.detach_()
    return copied


def save_scores(path: str | Path, rating: Rating) -> None:
    """Write scores with the structure of the model they are of, so that plans can be made without the model.

    Raises:
        OutputError: the place is not writable, or the disk is full.
    """
    entry = {
        "format": FORMAT,
        "structure": rating.anatomy.structure.to_dict(),
        "scores_sha256": _digest(rating.scores),
        "layout": asdict(rating.layout),
        "fold": rating.fold,
        "sensitivity": None if rating.sensitivity is None else rating.sensitivity.to_dict(),
    }
    metadata = {"slimming": json.dumps(seal(entry))}
    atomic_write_bytes(Path(path), checkpoint.dump_tensors(rating.scores, metadata))


def _digest(scores: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(checkpoint.dump_tensors(scores)).hexdigest()


def load_scores(path: str | Path) -> Rating:
    """Read what `save_scores` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or of a newer format.
    """
    path = Path(path)
    data = checkpoint.read_bytes(path)
    scores = checkpoint.parse_tensors(data, path)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        entry, intact = unseal(json.loads(header["__metadata__"]["slimming"]))
        structure, layout = entry["structure"], Layout(**entry["layout"])
        measured = None if entry["sensitivity"] is None else Sensitivity.from_dict(entry["sensitivity"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a scores file of slimming. Give one that slimming search wrote."
        ) from error
    if not intact or entry.get("scores_sha256", _digest(scores)) != _digest(scores):
        raise CheckpointError(f"{path} is not as it was written: its checksum differs. Take an intact copy.")
    model = checkpoint.build(Structure.from_dict(structure, source=str(path)))
    anatomy = family_of(model).read(model)
    return Rating(anatomy=anatomy, scores=scores, layout=layout, fold=bool(entry["fold"]), sensitivity=measured)
