"""The model card of a slim model: its costs, how to load it, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimming.core.metric import TOP1, Metric
from slimming.core.structure import Structure
from slimming.counting.model_cost import Cost
from slimming.models.transformers_tasks import CLASSIFICATION, task_named
from slimming.report.rendering import render

PICTURE = "kept.png"
PIPELINES: Mapping[str, str] = {
    CLASSIFICATION: "image-classification",
    "object detection": "object-detection",
    "segmentation": "image-segmentation",
    "depth estimation": "depth-estimation",
    "keypoint detection": "keypoint-detection",
    "mask generation": "mask-generation",
    "zero-shot classification": "zero-shot-image-classification",
}
"""Task -> tag of the hub."""
DEFAULT_PIPELINE = "image-feature-extraction"
SAME_WEIGHTS = frozenset({
    *("num_classes", "img_size", "in_chans", "global_pool", "pretrained_cfg_overlay"),
    *("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "patch_drop_rate"),
})  # fmt: skip
"""Arguments with which timm still loads the pretrained weights of the model's name."""


def card(
    record: Mapping[str, Any],
    structure: Structure,
    costs: Mapping[str, Cost],
    *,
    classes: int,
    repository: str | None,
    license: str | None,
    picture: bool,
) -> str:
    """The README.md of a repository, with the front matter that the hub reads.

    Args:
        record: provenance of the model.
        structure: structure of the model.
        costs: costs of the models ``"dense"`` and ``"this model"``.
        classes: number of classes.
        repository: ``owner/name``, if it is known.
        license: license of the weights, in the hub's notation.
        picture: whether the card shows a picture of the kept units.
    """
    name = repository or "OWNER/NAME"
    plan, source = record.get("plan") or {}, _data_source(record)
    return render(
        "card.md",
        front_matter=_front_matter(record, structure, classes, name, license),
        name=name,
        base=_base_name(structure),
        timm=_host(structure) == "timm",
        rows=[(model, _counted(cost, costs["dense"])) for model, cost in costs.items()],
        metric=_metric(record),
        value=_value(record),
        classifies=classes > 0 and _task(structure) == CLASSIFICATION,
        source=source,
        picture=PICTURE if picture else None,
        budget=plan.get("budget") or {},
        facts={key: record[key] for key in ("metrics", "versions") if record.get(key)},
        created=record.get("created"),
    )


def _front_matter(record: Mapping[str, Any], structure: Structure, classes: int, name: str, license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    host = _host(structure)
    given: dict[str, Any] = {
        "library_name": "slimming",
        "license": license,
        "tags": ["slimming", "pruning", host],
        "pipeline_tag": PIPELINES[task] if (task := _task(structure)) in PIPELINES and classes else DEFAULT_PIPELINE,
    }
    source, value, metric = _data_source(record), _value(record), _metric(record)
    if source.startswith("hf:"):
        given["datasets"] = [source.removeprefix("hf:")]
    if (parent := _parent(record, structure)) is not None:
        given |= {"base_model": parent, "base_model_relation": "finetune"}
    if value is not None and source:
        result = EvalResult(
            task_type=given["pipeline_tag"],
            dataset_type=source.removeprefix("hf:"),
            dataset_name=source.removeprefix("hf:"),
            metric_type="accuracy" if metric == TOP1 else metric.name,
            metric_value=round(value, 4),
        )
        given |= {"model_name": name.partition("/")[2], "eval_results": [result]}
    return ModelCardData(**given).to_yaml().strip()


def _host(structure: Structure) -> str:
    return str(structure.base.get("host", "timm"))


def _base_name(structure: Structure) -> str:
    base = structure.base
    return str(base.get("architecture") or base.get("name") or base.get("class"))


def _parent(record: Mapping[str, Any], structure: Structure) -> str | None:
    """The repository of the dense model, if the record or timm's name gives it; else None."""
    started = str(((record.get("settings") or {}).get("model") or {}).get("name") or "")
    for prefix in ("hf-hub:", "transformers:"):
        if started.startswith(prefix) and started.count("/") == 1:
            return started.removeprefix(prefix).partition("@")[0]
    name = _base_name(structure)
    known = _host(structure) == "timm" and "." in name and "/" not in name
    return f"timm/{name}" if known and structure.base["arguments"].keys() <= SAME_WEIGHTS else None


def _data_source(record: Mapping[str, Any]) -> str:
    return str((record.get("data") or {}).get("source") or "")


def _task(structure: Structure) -> str:
    """The task of a model, one of `slimming.models.transformers_tasks.TASKS`."""
    return task_named(str(structure.base.get("name") or "")) or CLASSIFICATION


def _metric(record: Mapping[str, Any]) -> Metric:
    """The metric in the record: top-1, unless it names another in its entry ``metric``."""
    found = record.get("metric")
    known = {"name", "unit", "higher_is_better", "key"}
    if isinstance(found, Mapping) and isinstance(found.get("name"), str):
        return Metric(**{key: value for key, value in found.items() if key in known})
    return TOP1


def _value(record: Mapping[str, Any]) -> float | None:
    found = (record.get("metrics") or {}).get(_metric(record).key)
    return float(found) if isinstance(found, int | float) else None


def _counted(cost: Cost, dense: Cost) -> list[str]:
    """Parameters, multiply-adds and memory with unit prefixes, and as shares of the dense model."""
    values = ((cost.params, dense.params, 1e6, "M"), (cost.macs, dense.macs, 1e6, "M"),
              (cost.memory_bytes, dense.memory_bytes, 2**20, "MiB"))  # fmt: skip
    return [f"{value / size:.3g} {unit} ({value / whole:.0%})" for value, whole, size, unit in values]
