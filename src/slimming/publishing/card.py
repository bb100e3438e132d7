"""The model card of a slim model: its costs, how to load it, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimming.core.structure import Structure
from slimming.counting.model_cost import Cost
from slimming.report.rendering import render

PICTURE = "kept.png"
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
        top1=_top1(record),
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
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
    }
    source, top1 = _data_source(record), _top1(record)
    if source.startswith("hf:"):
        given["datasets"] = [source.removeprefix("hf:")]
    if (parent := _parent(record, structure)) is not None:
        given |= {"base_model": parent, "base_model_relation": "finetune"}
    if top1 is not None and source:
        result = EvalResult(
            task_type="image-classification",
            dataset_type=source.removeprefix("hf:"),
            dataset_name=source.removeprefix("hf:"),
            metric_type="accuracy",
            metric_value=round(top1, 4),
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


def _top1(record: Mapping[str, Any]) -> float | None:
    found = (record.get("metrics") or {}).get("top1")
    return float(found) if isinstance(found, int | float) else None


def _counted(cost: Cost, dense: Cost) -> list[str]:
    """Parameters, multiply-adds and memory with unit prefixes, and as shares of the dense model."""
    values = ((cost.params, dense.params, 1e6, "M"), (cost.macs, dense.macs, 1e6, "M"),
              (cost.memory_bytes, dense.memory_bytes, 2**20, "MiB"))  # fmt: skip
    return [f"{value / size:.3g} {unit} ({value / whole:.0%})" for value, whole, size, unit in values]
