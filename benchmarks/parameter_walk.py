"""Which files of the package a parameter enters: the calls that are given it, while one small job runs.

    python benchmarks/parameter_walk.py [OUTPUT]

A call counts when one of its arguments is the model (or a copy of it, or an object that carries it), for `score` and
`search`; or the configuration or one of its sections, for `run`. Fewer files and calls mean that less has to be read to
follow a value through the package.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import slimming
from slimming.demo import settings

LOG = "log" if "log" in inspect.signature(slimming.run).parameters else "say"  # the name before the layout by steps
PACKAGE = Path(slimming.__file__).parent
OUTPUT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results" / "parameter_walk")
"""Without suffix."""


def walk(job: Callable[[], object], is_it: Callable[[Any], bool]) -> Counter[str]:
    """Calls per file of the package whose arguments hold a value for which ``is_it`` is true, while ``job`` runs."""
    functions: set[tuple[str, str]] = set()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)) or code.co_name.startswith("<"):
            return
        count = code.co_argcount + code.co_kwonlyargcount
        if any(is_it(frame.f_locals.get(name)) for name in code.co_varnames[:count]):
            functions.add(
                (
                    str(Path(code.co_filename).relative_to(PACKAGE)),
                    code.co_qualname if sys.version_info >= (3, 11) else code.co_name,
                )
            )

    sys.setprofile(look)
    try:
        job()
    finally:
        sys.setprofile(None)
    return Counter(file for file, _ in functions)


def carries(cls: type[nn.Module]) -> Callable[[Any], bool]:
    """Whether a value is a model of this class, or a dataclass with one in a field."""

    def is_it(value: Any) -> bool:
        if isinstance(value, cls):
            return True
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else ()
        return any(isinstance(vars(value).get(field.name), cls) for field in fields if hasattr(value, "__dict__"))

    return is_it


def main() -> None:
    """Walk with `score` and `search` (parameter ``model``) and `run` (parameter ``config``)."""
    torch.manual_seed(0)
    make = lambda: timm.create_model("test_vit", img_size=32, num_classes=10)  # noqa: E731
    source = settings()["data"]["source"]
    images = slimming.DataConfig(source=source, train_limit=16, val_limit=16)
    few = slimming.TrainConfig(steps=1, batch_size=4)
    found: dict[str, dict[str, int]] = {}
    batches = [torch.randn(8, 3, 32, 32)]
    is_model = carries(type(make()))
    found["score(model)"] = dict(walk(lambda: slimming.score(make(), batches), is_model))
    data = slimming.open_data(images, make())
    search = slimming.SearchConfig(train=few, images=8)
    found["search(model)"] = dict(walk(lambda: slimming.search(make(), data, search), is_model))
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "dense.safetensors"
        save_file(make().state_dict(), weights)
        config = slimming.RunConfig(
            model=slimming.ModelConfig(
                name="test_vit", checkpoint=str(weights), arguments={"img_size": 32, "num_classes": 10}
            ),
            data=images,
            budgets=(slimming.Budget(macs=0.6),),
            search=search,
            retrain=few,
            compensate=8,
            bench=slimming.BenchConfig(batch_sizes=(1,), seconds=0.1),
        )
        found["run(config)"] = dict(
            walk(
                lambda: slimming.run(config, Path(directory) / "run", **{LOG: lambda line: None}),
                lambda value: isinstance(value, slimming.RunConfig),
            )
        )
    record = {
        "files": found,
        "slimming": str(slimming.__version__),
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
    OUTPUT.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    rows = [f"| `{name}` | {len(files)} | {sum(files.values())} |" for name, files in found.items()]
    listed = [
        f"- `{name}`: " + ", ".join(f"{file} {count}" for file, count in sorted(files.items()))
        for name, files in found.items()
    ]
    text = ["| value | files | functions |", "|---|---:|---:|", *rows, "", *listed]
    OUTPUT.with_suffix(".md").write_text("\n".join(text) + "\n", "utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
