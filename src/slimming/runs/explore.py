"""Plan a finished search at many budgets, for the interactive explorer of its report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from slimming.checkpoints import checkpoint
from slimming.core.budget import Budget
from slimming.core.completion import complete
from slimming.core.groups import keep_all
from slimming.core.metric import TOP1
from slimming.core.plain_text import without_places
from slimming.core.pruning_plan import Plan
from slimming.core.records import converted
from slimming.core.yaml_text import read_yaml
from slimming.counting.model_cost import total
from slimming.errors import BudgetError, CheckpointError, SlimmingError
from slimming.models.families import family_called
from slimming.planning.budgeting import plans, smallest
from slimming.planning.latency_table import LatencyTable
from slimming.planning.scores import HasScores, ScoredModel, load_scores
from slimming.report.explored import Costs, Explored, Recipe, Step
from slimming.report.model import Layer, Picture, Results, Width, checked, labelled
from slimming.report.pages import read_results
from slimming.runs.config import EACH
from slimming.runs.files import SETTINGS, SETTINGS_FILE
from slimming.runs.results import examples, layers_of, widths_of
from slimming.runs.setup import open_data
from slimming.searching.mask_search import SCORES_FILE, search_directory
from slimming.training.config import DataConfig

METRICS = ("macs", "params", "latency")
"""Metrics that the reader of the report can limit; latency only with a latency table."""
FINENESS = (0.02, 0.01, 0.005, 0.002, 0.001)
"""Possible steps between two budgets, from which the coarsest with `FEWEST` budgets is taken."""
FEWEST = 50
"""Smallest number of budgets, if the finest step allows it."""


def explore(directory: str | Path, *, latency: str | Path | None = None) -> Explored:
    """Plan a search at many budgets, for the explorer of its report.

    Args:
        directory: a directory that ``slimming run`` or ``slimming search`` wrote.
        latency: file of a latency table; by default the table of the run.

    Raises:
        CheckpointError: there is no finished search, or a file is damaged.
        ConfigError: the latency table is missing.
        PlanError: the latency table is of another model.
    """
    place = Path(directory)
    found = search_directory(place)
    if found is None:
        raise CheckpointError(f"{place} holds no finished search; give a directory that slimming search or run wrote.")
    source = _Saved(load_scores(found / SCORES_FILE))
    results = read_results(place) if (place / "results.json").is_file() else None
    settings = converted(_settings(place, results), _Settings, str(place))
    table_file = str(latency) if latency is not None else settings.latency_table
    table = LatencyTable.load(table_file) if table_file else None
    prices = _Prices(source.scored, table)
    solver = None if settings.retraining == EACH else "nested"  # as the budgets of a run are planned
    steps = {metric: tuple(_steps(source, metric, table, prices, solver)) for metric in METRICS[: 3 if table else 2]}
    model = results.model.name if results is not None else settings.model.name
    return Explored(
        name=results.name if results is not None else settings.name or place.resolve().name,
        place=without_places(str(directory)),
        model=str(model),
        dense=prices.dense,
        steps={metric: found for metric, found in steps.items() if found},
        measured=(results.dense, *results.rows) if results is not None else (),
        times=_times(place, results, prices) if results is not None else {},
        recipe=_recipe(str(directory), found, settings, table_file, solver),
        latency=_device(table),
        metric=results.metric if results is not None else TOP1,
        pictures=results.images or () if results is not None else _pictures(source.scored, settings.data),
    )


@dataclass(frozen=True)
class _Saved(HasScores):
    """The content of a scores file."""

    saved: ScoredModel

    @property
    def scored(self) -> ScoredModel:
        return self.saved


@dataclass(frozen=True)
class _Prices:
    """Costs of the plans of one model."""

    scored: ScoredModel
    table: LatencyTable | None

    @cached_property
    def dense(self) -> Costs:
        """The costs of the dense model."""
        return self._of(keep_all(self.scored.anatomy.groups))

    def of(self, plan: Plan) -> Costs:
        """Return the costs of the model under ``plan``."""
        return self._of(complete(self.scored.anatomy, plan))

    def _of(self, kept: Mapping[str, tuple[int, ...]]) -> Costs:
        anatomy = self.scored.anatomy
        counts = {name: len(units) for name, units in kept.items()}
        cost = total(anatomy, counts)
        has_memory = family_called(anatomy.structure.family).has_memory_formula(anatomy, kept)
        return Costs(
            params=cost.params,
            macs=cost.macs,
            memory_bytes=cost.memory_bytes if has_memory else None,
            latency_ms=None if self.table is None else self.table.predict(anatomy, counts),
        )


def shares(least: float) -> list[float]:
    """Return budgets from ``least`` to 1 in ascending order, with the coarsest step that gives at least `FEWEST`.

    >>> shares(0.3)[:2], len(shares(0.3)), len(shares(0.97))
    ([0.3, 0.31], 71, 31)
    """
    budgets: list[float] = []
    for step in FINENESS:
        whole = round(1 / step)
        first = next(number for number in range(1, whole + 1) if number * step >= least - 1e-9)
        budgets = [round(number * step, 3) for number in range(first, whole + 1)]
        if len(budgets) >= FEWEST:
            break
    return budgets


def _steps(
    source: _Saved, metric: str, table: LatencyTable | None, prices: _Prices, solver: str | None
) -> Iterator[Step]:
    try:
        least = smallest(source, metric, latency=table)
    except BudgetError:
        if metric == "latency":  # the latency table was measured with another layout of heads
            return
        raise
    # Slightly above the smallest share, which is rounded.
    wanted: list[dict[str, Any]] = [{metric: share} for share in shares(min(1.0, least + 1e-6))]
    budgets = [Budget(**limits) for limits in wanted]
    anatomy = source.scored.anatomy
    for budget, plan in zip(budgets, plans(source, budgets, solver=solver, latency=table), strict=True):
        yield Step(
            share=budget.limits[metric],
            name=budget.name,
            costs=prices.of(plan),
            kept_score=float(plan.solution["kept_score"]),
            layers=labelled(checked(layers_of(anatomy, plan), tuple[Layer, ...], "plan")),
            widths=checked(widths_of(anatomy, plan).get("widths", []), tuple[Width, ...], "plan"),
        )


def _times(place: Path, results: Results, prices: _Prices) -> dict[str, float]:
    """Predicted times of the run's models by name; budgets whose plan was deleted are left out."""
    found = {"dense": prices.dense.latency_ms}
    for row in results.rows:
        if prices.table is not None and (place / row.name / "plan.json").is_file():
            found[row.name] = prices.of(Plan.load(place / row.name / "plan.json")).latency_ms
    return {name: time for name, time in found.items() if time is not None}


class _Model(msgspec.Struct, frozen=True):
    name: str = "model"


class _Settings(msgspec.Struct, frozen=True):
    """The settings of a run or a search that the explorer needs."""

    name: str | None = None
    latency_table: str | None = None
    retraining: str = EACH
    compensate: Annotated[int, msgspec.Meta(ge=0)] | None = 256
    model: _Model = _Model()
    data: dict[str, Any] | None = None


def _settings(place: Path, results: Results | None) -> dict[str, Any]:
    """The settings of ``slimming run`` or ``slimming search``, or an empty dict."""
    if (place / SETTINGS_FILE).is_file():
        return SETTINGS.read(place / SETTINGS_FILE)
    if results is not None:
        return dict(results.settings or {})
    path = place / "config.yaml"
    return read_yaml(path) if path.is_file() else {}


def _pictures(scored: ScoredModel, data: Any) -> tuple[Picture, ...]:
    """A few validation images; none if the data cannot be opened on this machine."""
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(data or {}).items()}
        opened = open_data(DataConfig(**given), checkpoint.build(scored.anatomy.structure))
        return checked(examples(opened), tuple[Picture, ...], "images")
    except (SlimmingError, TypeError, ValueError, OSError):
        return ()


def _device(table: LatencyTable | None) -> str:
    if table is None:
        return ""
    setting = table.setting
    threads = f", {setting['threads']} threads" if setting.get("threads") else ""
    return f"batch {setting.get('batch_size')}, {setting.get('runtime')}, {setting.get('device')}{threads}"


def _recipe(place: str, search: Path, settings: _Settings, table: str | None, solver: str | None) -> Recipe:
    """The command and the Python program that cut the model to one of the plans.

    A report is handed on, so absolute paths are shortened to their last component.
    """
    data, note = _images(settings)
    inner = search.relative_to(place)
    place, table, data = without_places(place), without_places(table), without_places(data)
    search = Path(place) / inner
    count = settings.compensate or 0
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


def _images(settings: _Settings) -> tuple[str | None, str]:
    """The source of the images for the compensation if a command can name it, and a note if it cannot."""
    data = settings.data or {}
    if not data.get("source") or settings.compensate == 0:
        return None, ""
    plain = DataConfig(source=str(data["source"]))
    asked = ("val", "split_fraction", "image_key", "label_key", "stream", "mean", "std")
    if any(data.get(name) not in (None, getattr(plain, name)) for name in asked):
        return None, "Add --data IMAGES to compensate for the removed units."
    return plain.source, ""
