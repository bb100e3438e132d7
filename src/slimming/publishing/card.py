"""The model card of a slim model: what it is, what it costs, how to load it, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimming.core.structure import Structure
from slimming.counting.model_cost import Cost

PICTURE = "kept.png"
SAME_WEIGHTS = frozenset({
    *("num_classes", "img_size", "in_chans", "global_pool", "pretrained_cfg_overlay"),
    *("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "patch_drop_rate"),
})  # fmt: skip
"""Arguments with which a model of timm still takes the weights of its name."""


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
        record: the provenance.
        structure: of the model.
        costs: ``"dense"`` and ``"this model"``.
        classes: how many it tells apart.
        repository: ``owner/name``, if it is known.
        license: of the weights, as the hub names it.
        picture: whether there is one.
    """
    name = repository or "OWNER/NAME"
    base = _base_name(structure)
    parts = [
        f"---\n{_front_matter(record, structure, classes, name, license)}\n---\n",
        f"# {name.partition('/')[2]}\n",
        f"A slim `{base}`: units of the dense model were cut out, so its tensors are smaller. It needs neither masks "
        "nor special kernels. Made with slimming.\n",
        _table(costs, record) + "\n",
    ]
    if picture:
        parts.append(f"![What each layer keeps of the dense model]({PICTURE})\n")
    parts += ["## Load it\n", _loading(name, structure), "## How it was made\n", _making(record, base)]
    return "\n".join(parts)


def _front_matter(record: Mapping[str, Any], structure: Structure, classes: int, name: str, license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    host = _host(structure)
    given: dict[str, Any] = {
        "library_name": "slimming",
        "license": license,
        "tags": ["slimming", "pruning", host],
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
    }
    source, top1 = _data_source(record), (record.get("metrics") or {}).get("top1")
    if source.startswith("hf:"):
        given["datasets"] = [source.removeprefix("hf:")]
    if (parent := _parent(record, structure)) is not None:
        given |= {"base_model": parent, "base_model_relation": "finetune"}
    if isinstance(top1, (int, float)) and source:
        result = EvalResult(
            task_type="image-classification",
            dataset_type=source.removeprefix("hf:"),
            dataset_name=source.removeprefix("hf:"),
            metric_type="accuracy",
            metric_value=round(float(top1), 4),
        )
        given |= {"model_name": name.partition("/")[2], "eval_results": [result]}
    return ModelCardData(**given).to_yaml().strip()


def _host(structure: Structure) -> str:
    return str(structure.base.get("host", "timm"))


def _base_name(structure: Structure) -> str:
    base = structure.base
    return str(base.get("architecture") or base.get("name") or base.get("class"))


def _parent(record: Mapping[str, Any], structure: Structure) -> str | None:
    """The repository of the dense model, where the record or timm's name tells it."""
    started = str(((record.get("settings") or {}).get("model") or {}).get("name") or "")
    for prefix in ("hf-hub:", "transformers:"):
        if started.startswith(prefix) and started.count("/") == 1:
            return started.removeprefix(prefix).partition("@")[0]
    name = _base_name(structure)
    known = _host(structure) == "timm" and "." in name and "/" not in name
    return f"timm/{name}" if known and structure.base["arguments"].keys() <= SAME_WEIGHTS else None


def _data_source(record: Mapping[str, Any]) -> str:
    return str((record.get("data") or {}).get("source") or "")


def _table(costs: Mapping[str, Cost], record: Mapping[str, Any]) -> str:
    dense = costs["dense"]
    top1 = (record.get("metrics") or {}).get("top1")
    lines = ["| model | parameters | MACs | memory at batch 1 | top-1 |", "|---|---:|---:|---:|---:|"]
    for name, cost in costs.items():
        cells = [
            f"{value / size:.3g} {unit} ({value / whole:.0%})"
            for value, whole, size, unit in (
                (cost.params, dense.params, 1e6, "M"),
                (cost.macs, dense.macs, 1e6, "M"),
                (cost.memory_bytes, dense.memory_bytes, 2**20, "MiB"),
            )
        ]
        known = name != "dense" and isinstance(top1, (int, float))
        lines.append(f"| {name} | " + " | ".join([*cells, f"{top1:.2%}" if known else ""]) + " |")
    source = _data_source(record)
    note = "Parameters, multiply-adds and memory are counted by formula, for one image."
    return "\n".join(lines) + f"\n\n{note}" + (f" Top-1 on the validation images of `{source}`." if source else "")


def _loading(name: str, structure: Structure) -> str:
    blocks = [
        f'```python\nimport slimming\n\nmodel = slimming.load("hf-hub:{name}")\n```\n',
        "With transformers:\n\n```python\nimport slimming\nfrom transformers import pipeline\n\n"
        f'slimming.register_with_transformers()\nclassify = pipeline("image-classification", model="{name}")\n```\n',
    ]
    if _host(structure) == "timm":
        blocks.insert(
            1,
            "With timm, which knows the architecture once slimming is imported:\n\n```python\nimport slimming\n"
            f'import timm\n\nmodel = timm.create_model("hf-hub:{name}", pretrained=True)\n```\n',
        )
    return "\n".join(blocks)


def _making(record: Mapping[str, Any], base: str) -> str:
    plan, data = record.get("plan") or {}, _data_source(record)
    lines = [f"- dense model: `{base}`"]
    if plan.get("budget"):
        lines.append(f"- budget: {', '.join(f'{key} {value}' for key, value in plan['budget'].items())}")
    if data:
        lines.append(f"- data: `{data}`")
    for key in ("metrics", "versions"):
        if record.get(key):
            shown = (f"{name} {_short(value)}" for name, value in record[key].items())
            lines.append(f"- {key}: {', '.join(shown)}")
    if record.get("created"):
        lines.append(f"- made: {record['created']}")
    lines.append("\n`provenance.json` has all settings and the plan, `structure.json` the size of every layer.\n")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
