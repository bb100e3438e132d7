"""The plans that a report lets its reader choose from: one search, read off at every hundredth of the dense model."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slimming.checkpoints import checkpoint
from slimming.core.budget import Budget
from slimming.core.completion import complete
from slimming.core.files import read_json
from slimming.core.groups import keep_all
from slimming.core.pruning_plan import Plan
from slimming.counting.model_cost import total
from slimming.errors import BudgetError, CheckpointError, SlimmingError
from slimming.models import family_called
from slimming.planning.budgeting import plans, smallest
from slimming.planning.latency_table import LatencyTable
from slimming.planning.scores import Scored, Scores, load_scores
from slimming.report.explored import Costs, Explored, Measured, Recipe, Step
from slimming.report.model import Picture, Results, Row, parse, parse_layers, parse_pictures, parse_widths
from slimming.report.nodes import Node
from slimming.runs.config import EACH
from slimming.runs.results import examples, layers_of, widths_of
from slimming.runs.setup import open_data
from slimming.searching.mask_search import SCORES_FILE, search_directory
from slimming.training.config import DataConfig

METRICS = ("macs", "params", "latency")
"""What the reader may limit; time only with a latency table."""
FINENESS = (0.02, 0.01, 0.005, 0.002, 0.001)
"""Steps between budgets to choose from."""
FEWEST = 50
"""So many budgets there are at least, if steps of a thousandth give as many."""


def explore(directory: str | Path, *, latency: str | Path | None = None) -> Explored:
    """Plan a search at many budgets, for the explorer of its report.

    Args:
        directory: what ``slimming run`` or ``slimming search`` wrote.
        latency: file of a latency table, by default the one of the run.

    Raises:
        CheckpointError: there is no finished search, or a file is damaged.
        ConfigError: the latency table is of another layout or missing.
        PlanError: it is of another model.
    """
    place = Path(directory)
    found = search_directory(place)
    if found is None:
        raise CheckpointError(f"{place} holds no finished search; give a directory that slimming search or run wrote.")
    source = _Saved(load_scores(found / SCORES_FILE))
    results = parse(read_json(place / "results.json")) if (place / "results.json").is_file() else None
    settings = results.settings if results is not None else _settings(place)
    table_file = str(latency) if latency is not None else settings.get("latency_table")
    table = LatencyTable.load(table_file) if table_file else None
    prices = _Prices(source.rating, table)
    solver = None if settings.get("retraining", EACH) == EACH else "nested"  # as the budgets of a run are planned
    steps = {metric: tuple(_steps(source, metric, table, prices, solver)) for metric in METRICS[: 3 if table else 2]}
    model = results.model if results is not None else settings.get("model", {})
    return Explored(
        name=results.name if results is not None else str(settings.get("name", place.resolve().name)),
        place=str(directory),
        model=str(model.get("name", "model")),
        dense=prices.dense,
        steps={metric: found for metric, found in steps.items() if found},
        measured=_measured(place, results, prices) if results is not None else (),
        recipe=_recipe(str(directory), found, settings, table_file, solver),
        latency=_device(table),
        pictures=results.images if results is not None else _pictures(source.rating, settings.get("data")),
    )


@dataclass(frozen=True)
class _Saved(Scored):
    """Scores of a file, read once."""

    saved: Scores

    @property
    def rating(self) -> Scores:
        return self.saved


@dataclass(frozen=True)
class _Prices:
    """What plans of one model cost."""

    rating: Scores
    table: LatencyTable | None

    @cached_property
    def dense(self) -> Costs:
        """The costs of the whole model."""
        return self._of(keep_all(self.rating.anatomy.groups))

    def of(self, plan: Plan) -> Costs:
        """The costs of what ``plan`` leaves."""
        return self._of(complete(self.rating.anatomy, plan))

    def _of(self, kept: Mapping[str, tuple[int, ...]]) -> Costs:
        anatomy = self.rating.anatomy
        counts = {name: len(units) for name, units in kept.items()}
        found = total(anatomy, counts)
        has_memory = family_called(anatomy.structure.family).has_memory_formula(anatomy, kept)
        return Costs(
            params=found.params,
            macs=found.macs,
            memory_bytes=found.memory_bytes if has_memory else None,
            latency_ms=None if self.table is None else self.table.predict(anatomy, counts),
        )


def shares(least: float) -> list[float]:
    """Budgets from ``least`` to all, ascending, at the coarsest fineness that gives enough of them.

    >>> shares(0.3)[:2], len(shares(0.3)), len(shares(0.97))
    ([0.3, 0.31], 71, 31)
    """
    found: list[float] = []
    for step in FINENESS:
        whole = round(1 / step)
        first = next(number for number in range(1, whole + 1) if number * step >= least - 1e-9)
        found = [round(number * step, 3) for number in range(first, whole + 1)]
        if len(found) >= FEWEST:
            break
    return found


def _steps(
    source: _Saved, metric: str, table: LatencyTable | None, prices: _Prices, solver: str | None
) -> Iterator[Step]:
    try:
        least = smallest(source, metric, latency=table)
    except BudgetError:
        if metric == "latency":  # a table of other heads than the layout's
            return
        raise
    # A hair above what is left when all goes, as the cost of that is rounded.
    wanted: list[dict[str, Any]] = [{metric: share} for share in shares(min(1.0, least + 1e-6))]
    budgets = [Budget(**limits) for limits in wanted]
    anatomy = source.rating.anatomy
    for budget, plan in zip(budgets, plans(source, budgets, solver=solver, latency=table), strict=True):
        layers = layers_of(anatomy, plan)
        yield Step(
            share=budget.limits[metric],
            name=budget.name,
            costs=prices.of(plan),
            kept_score=float(plan.solution["kept_score"]),
            layers=parse_layers([Node(layer, "plan") for layer in layers]),
            widths=parse_widths([Node(one, "plan") for one in widths_of(anatomy, plan).get("widths", [])]),
        )


def _measured(place: Path, results: Results, prices: _Prices) -> tuple[Measured, ...]:
    dense = Measured(label="dense", costs=prices.dense, top1=results.dense.top1)
    return (dense, *(_point(place, row, prices) for row in results.rows))


def _point(place: Path, row: Row, prices: _Prices) -> Measured:
    """A budget of the run. Its predicted time needs its plan, which may be gone."""
    time = None
    if prices.table is not None and (place / row.name / "plan.json").is_file():
        time = prices.of(Plan.load(place / row.name / "plan.json")).latency_ms
    shares = {metric: value for metric, value in row.limits.items() if metric in METRICS and value <= 1}
    limit, share = next(iter(shares.items())) if len(row.limits) == len(shares) == 1 else (None, None)
    return Measured(
        label=row.label,
        costs=Costs(params=row.params, macs=row.macs, memory_bytes=row.memory_bytes, latency_ms=time),
        top1=row.top1,
        top1_cut=row.top1_cut,
        top1_one_shot=row.top1_one_shot,
        limit=limit,
        share=share,
    )


def _settings(place: Path) -> dict[str, Any]:
    """The settings of a search without a run around it, if they are there."""
    path = place / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Take an intact copy.") from error
    return found if isinstance(found, dict) else {}


def _pictures(rating: Scores, data: Any) -> tuple[Picture, ...]:
    """A few validation images; none where the data is not to be had here."""
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(data or {}).items()}
        opened = open_data(DataConfig(**given), checkpoint.build(rating.anatomy.structure))
        return parse_pictures([Node(entry, "images") for entry in examples(opened)])
    except (SlimmingError, TypeError, ValueError, OSError):
        return ()


def _device(table: LatencyTable | None) -> str:
    if table is None:
        return ""
    found = table.setting
    threads = f", {found['threads']} threads" if found.get("threads") else ""
    return f"batch {found.get('batch_size')}, {found.get('runtime')}, {found.get('device')}{threads}"


def _recipe(place: str, search: Path, settings: Mapping[str, Any], table: str | None, solver: str | None) -> Recipe:
    """The command and the program that make one of the plans."""
    data, note = _images(settings)
    count = int(settings.get("compensate", 256) or 0)
    output = f"{place.rstrip('/')}-" if Path(place).name not in ("", "..") else "slim-"
    words = [] if solver is None else ["--solver", solver]
    if table is not None:
        words += ["--latency-table", table]
    if data is not None:
        words += ["--data", data, "--images", str(count)]
    command = (
        f"slimming cut {shlex.quote(place)} --budget ",
        f"{''.join(f' {shlex.quote(word)}' for word in words)} --output {shlex.quote(output)}",
        "",
    )
    by_solver = f", solver={solver!r}" if solver is not None else ""
    by_table = f", latency={table!r}" if table is not None else ""
    images = f", images=slimming.load_images({data!r}, result.model, {count})" if data is not None else ""
    python = (
        f"import slimming\nresult = slimming.load_search({str(search)!r})\nplan = slimming.plan(result, "
        f"slimming.Budget(",
        f"){by_solver}{by_table})\nsmall = slimming.cut(result.model, plan{images})\n"
        f'slimming.save(small, {output!r} + "',
        '")',
    )
    return Recipe(command=command, python=python, note=note)


def _images(settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """Where images for the compensation are, if a command can say it, and what to know otherwise."""
    data = settings.get("data")
    if not isinstance(data, Mapping) or not data.get("source") or settings.get("compensate") == 0:
        return None, ""
    plain = DataConfig(source=str(data["source"]))
    asked = ("val", "split_fraction", "image_key", "label_key", "stream", "mean", "std")
    if any(data.get(name) not in (None, getattr(plain, name)) for name in asked):
        return None, "Add --data IMAGES to compensate at the cut."
    return plain.source, ""
