"""Compare models of any task that were trained elsewhere: costs, times, a metric and predictions, in one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.benchmarking.config import BenchConfig
from slimming.benchmarking.timing import machine
from slimming.core.argument_types import checked_arguments
from slimming.core.example_inputs import set_example_inputs_
from slimming.core.files import FORMAT, check_free
from slimming.core.metric import Metric
from slimming.core.modules import in_evaluation
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError
from slimming.masks.attachment import prunable
from slimming.models.prunable import PrunableModel
from slimming.report import write_report, write_table
from slimming.report.model import RESULTS, parse
from slimming.report.pages import REPORT, TABLE
from slimming.report.pages import RESULTS as RESULTS_FILE
from slimming.runs.results import (
    costs_of,
    dense_entry,
    described,
    entry_of,
    layers_of,
    measure_all,
    now,
    picture,
    versions,
    widths_of,
)
from slimming.runs.stages import value_of
from slimming.training.drawing import draw_prediction

QUICK = BenchConfig(batch_sizes=(1,))

Judge = Callable[[nn.Module], float | Mapping[str, float]]
"""A function that gets a model in evaluation mode and returns the value of its metric, or several metrics by name."""
Predict = Callable[[nn.Module, Tensor], Any]
"""A function that gets a model in evaluation mode and an image, uint8 (C, H, W), and returns what to draw on it."""


@checked_arguments
def compare(
    models: Mapping[str, nn.Module],
    directory: str | Path,
    *,
    evaluate: Judge,
    metric: Metric,
    cut: Mapping[str, nn.Module] | None = None,
    plans: Mapping[str, Plan] | None = None,
    images: Sequence[Tensor] = (),
    predict: Predict | None = None,
    classes: Sequence[str] = (),
    example_inputs: Any = None,
    bench: BenchConfig = QUICK,
    name: str = "comparison",
    data: str = "",
    note: str = "",
) -> dict[str, Any]:
    """Measure a dense model and slim ones, of any task and trained by any trainer, and write the report.

    ``directory`` then has ``results.json``, ``report.html`` and ``table.md``; files of an earlier comparison there are
    replaced.

    Args:
        models: models by name, the dense one first.
        directory: directory for the results.
        evaluate: returns the metric of a model: a number, or a mapping with ``metric.key``.
        metric: name, unit and direction of the metric.
        cut: by name, models directly after the cut, whose metric is shown beside that of the retrained ones.
        plans: by name, plans by which models were cut; the report then shows what stays in each layer.
        images: images, uint8 (C, H, W), on which the predictions of all models are drawn; two are enough.
        predict: returns what to draw for a model and one of ``images``: boxes, masks or maps, see
            `slimming.training.drawing.draw_prediction`.
        classes: names of the classes.
        example_inputs: what the models take, see `slimming.describe`; None if it is an image, or known.
        bench: how latency is measured. Batch sizes repeat the first example.
        name: title of the report.
        data: name of the data on which ``evaluate`` measures.
        note: a sentence for the report.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: there are fewer than two models, ``cut`` or ``plans`` names another model, ``evaluate`` returns no
            such metric, or a prediction cannot be drawn.
        UnsupportedModelError: no family reads a model.
        OutputError: the directory has other files, or is not writable.

    >>> import tempfile, timm, slimming
    >>> dense = timm.create_model("test_vit", img_size=32, num_classes=4)
    >>> plan = slimming.plan(slimming.attach(dense), slimming.Budget(macs=0.7))
    >>> models = {"dense": dense, "macs-0.70": slimming.cut(dense, plan)}
    >>> metric = slimming.Metric(name="PSNR", unit="dB")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     quick = slimming.BenchConfig(batch_sizes=(1,), runs=1, seconds=0.01)
    ...     results = slimming.compare(models, directory, evaluate=lambda model: 30.0, metric=metric, bench=quick)
    >>> [(row["name"], row["metric"]) for row in results["rows"]]
    [('macs-0.70', 30.0)]
    """
    cut, plans, directory = cut or {}, plans or {}, Path(directory)
    dense_name, *names = models
    _check(names, cut, plans, images, predict)
    check_free(directory, besides=(RESULTS_FILE, REPORT, TABLE))
    for model in (*models.values(), *cut.values()):
        set_example_inputs_(model, example_inputs)
    dense = prunable(models[dense_name])

    def judged(model: nn.Module) -> float:
        with in_evaluation(model), torch.no_grad():
            found = evaluate(model)
        return value_of(metric, found if isinstance(found, Mapping) else {metric.key: float(found)})

    values = {each: judged(model) for each, model in models.items()}
    values_cut = {each: judged(model) for each, model in cut.items()}
    predictions = _predictions(models, images, predict, classes)
    timed = measure_all(models, dense.examples()[0], bench)
    rows = [
        {
            "name": each,
            **costs_of(models[each]),
            **timed[each],
            entry_of(metric): values[each],
            **({entry_of(metric, "_cut"): values_cut[each]} if each in values_cut else {}),
            **_kept(dense, plans.get(each)),
        }
        for each in names
    ]
    results = {
        "format": FORMAT,
        "slimming": version("slimming"),
        "created": now(),
        "name": name,
        "model": {
            "name": type(dense.model).__name__,
            "family": dense.anatomy.structure.family,
            "input": list(dense.anatomy.input_shape),
            "classes": list(classes),
        },
        "data": {"source": data, "note": note},
        "machine": machine(),
        "versions": versions(),
        "dense": dense_entry(dense.model, values[dense_name], timed[dense_name], metric),
        "rows": rows,
        "predictions": predictions,
        **described(metric),
    }
    RESULTS.write(directory / RESULTS_FILE, results)
    write_report(directory)
    write_table(parse(results), directory / TABLE)
    return results


def _check(
    names: Sequence[str],
    cut: Mapping[str, nn.Module],
    plans: Mapping[str, Plan],
    images: Sequence[Tensor],
    predict: Predict | None,
) -> None:
    if not names:
        raise ConfigError("Give two models or more: the dense one first, then the slim ones.")
    for what, given in (("cut", cut), ("plans", plans)):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(f"{what} names {unknown[0]!r}, which is none of the slim models {', '.join(names)}.")
    if (len(images) > 0) != (predict is not None):
        raise ConfigError("Give images and predict together: predict says what to draw on the images.")


def _kept(dense: PrunableModel, plan: Plan | None) -> dict[str, Any]:
    if plan is None:
        return {}
    layers = layers_of(dense.anatomy, plan)
    return {"budget": dict(plan.budget), **widths_of(dense.anatomy, plan), "layers": layers}


def _predictions(
    models: Mapping[str, nn.Module], images: Sequence[Tensor], predict: Predict | None, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """What each model predicts on each image, drawn as PNG."""
    found = []
    for number, image in enumerate(images, 1):
        pictures = {}
        for name, model in models.items():
            assert predict is not None
            with in_evaluation(model), torch.no_grad():
                drawn = draw_prediction(image, predict(model, image), classes)
            pictures[name] = {"label": name, "png": picture(drawn)}
        found.append({"label": f"Image {number}", "pictures": pictures})
    return found
