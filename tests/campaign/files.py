"""One target for each kind of file that slimming reads: a writer of a good file, and its reader.

A damaged file is clean if reading ends within seconds in an error of slimming, or gives what the good file gives. A
file whose content no checksum covers, or whose checksum was made anew, may also give something else.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import tarfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import slimming
from report.conftest import fabricate
from slimming.checkpoints.checkpoint import read_provenance
from slimming.cli.entry import main
from slimming.core.files import seal
from slimming.core.groups import keep_all
from slimming.core.pruning_plan import Plan
from slimming.core.records import FileKind
from slimming.masks.attachment import prunable
from slimming.planning.latency_table import LatencyTable
from slimming.planning.scores import load_scores
from slimming.report.curves import read_log
from slimming.report.model import RESULTS
from slimming.report.pages import read_results
from slimming.runs import files as run_files

from .mutations import mutated_bytes, mutated_value
from .tally import Tally

ARGUMENTS: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2,
}  # fmt: skip
SECONDS = 5
"""Longest time in which a damaged file is refused or read."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file.

    Attributes:
        name: name in the table.
        file: path of the file below the directory of `good_files`.
        read: reads the file and returns values to compare; its argument is the directory.
        sealed: whether a checksum covers the file, so that a change of its bytes must not change the result.
        loads: decodes the file for changes of its values, or None.
        dumps: the inverse of ``loads``; seals the values anew.
    """

    name: str
    file: str
    read: Callable[[Path], Any]
    sealed: bool = True
    loads: Callable[[bytes], Any] | None = None
    dumps: Callable[[Any], bytes] | None = None


def good_files(root: Path) -> Path:
    """Write a good file of every kind below ``root`` and return ``root``."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    slimming.save(model, root / "dense", {"metrics": {"top1": 0.5}, "data": {"source": "images"}})
    for part in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            (root / "images" / part / name).mkdir(parents=True)
            for index in range(2):
                pixels = np.full((16, 16, 3), 60 + 100 * label + index, np.uint8)
                Image.fromarray(pixels).save(root / "images" / part / name / f"{index}.png")
    data = slimming.open_data(slimming.DataConfig(source=str(root / "images")), model)
    train = slimming.TrainConfig(steps=1, batch_size=2, eval_every=0)
    result = slimming.search(model, data, slimming.SearchConfig(train=train, images=2), directory=root / "search")
    result.save(root / "search")
    plan = slimming.plan(result, slimming.Budget(macs=0.8))
    plan.save(root / "plan.json")
    slimming.save(slimming.cut(result.model, plan), root / "slim")
    _latency_table(root / "latency.json")
    results = fabricate(root / "run")
    row = {key: entry for key, entry in results["rows"][0].items() if key not in ("latency_ms", "speedup")}
    (root / "run" / "files").mkdir()
    for name, content in _run_files(row).items():
        kind = getattr(run_files, name)
        kind.write(root / "run" / "files" / f"{name.lower()}.json", content)
    _host_directories(root)
    (root / "config.yaml").write_text(
        "model: {name: test_vit, arguments: {img_size: 32}}\ndata: {source: images, augment: none}\n"
        "search: {preset: paper, kinds: [mlp, token], train: {steps: 3}}\nbudgets: [{macs: 0.5}, {keep: {mlp: 0.5}}]\n"
    )
    _data_files(root)
    return root


def _run_files(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    time = {"hours": 1.0, "images_per_second": 9.5, "search_steps": 3, "retrain_steps": None, "bench_seconds": 0.5}
    return {
        "METRICS": {"top1": 0.5},
        "SECONDS": {"seconds": 3.5, "log_sha256": "0" * 64},
        "SERVED": {"budgets": ["macs-0.50"], "seconds": 3.5, "log_sha256": "0" * 64},
        "ONE_SHOT": {"macs-0.50": {"top1_one_shot": 0.4}},
        "ROW": row,
        "TIME_ALLOCATION": {**time, "expected_hours": 0.9, "seconds": {"search": 3.0}},
        "SETTINGS": {"model": {"name": "x"}, "budgets": [{"macs": 0.5}]},
    }


def _latency_table(path: Path) -> None:
    anatomy = prunable(timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)).anatomy
    full = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    points = {
        (layer.kind, layer.like): {
            "kind": layer.kind, "like": layer.like, **{name: dim.value(full) for name, dim in layer.axes}, "ms": 0.5,
            "p25": 0.4, "p75": 0.6, "runs": 3,
        }
        for layer in anatomy.timed_layers
    }  # fmt: skip
    LatencyTable(
        setting={"model": "x", "batch_size": 1}, points=tuple(points.values()), calibration=1.1, reference_ms=2.0
    ).save(path)


def _host_directories(root: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": ARGUMENTS,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 2,
                           "classifier": "head", "first_conv": "patch_embed.proj"},
    }  # fmt: skip
    (root / "timm").mkdir()
    (root / "timm" / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), root / "timm" / "model.safetensors")
    torch.save(model.state_dict(), root / "weights.pth")


def _data_files(root: Path) -> None:
    (root / "parquet").mkdir()
    (root / "tar").mkdir()
    images = [path.read_bytes() for path in sorted((root / "images" / "train").rglob("*.png"))]
    feature = {"label": {"names": ["dark", "light"], "_type": "ClassLabel"}}
    table = pyarrow.table(
        {"image": [{"bytes": image, "path": None} for image in images], "label": [0, 0, 1, 1]}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    for part in ("train", "val"):
        pyarrow.parquet.write_table(table, root / "parquet" / f"{part}.parquet")
        with tarfile.open(root / "tar" / f"{part}.tar", "w") as tar:
            for index, image in enumerate(images):
                for name, content in ((f"{index}.png", image), (f"{index}.cls", str(index // 2).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    (root / "tar" / "classes.txt").write_text("dark\nlight\n")


def _model(path: Path) -> Any:
    return {name: (tuple(tensor.shape), float(tensor.double().sum())) for name, tensor in _state(path).items()}


def _state(path: Path) -> Mapping[str, torch.Tensor]:
    return slimming.load(path).state_dict()


def _search(root: Path) -> Any:
    result = slimming.load_search(root / "search")
    scores = {name: score.tolist() for name, score in result.scores.items()}
    return {name: float(tensor.double().sum()) for name, tensor in result.model.state_dict().items()}, scores


def _weights(root: Path) -> Any:
    config = slimming.ModelConfig(
        name="vit_tiny_patch16_224", checkpoint=str(root / "weights.pth"), arguments=ARGUMENTS
    )
    model, _ = slimming.open_model(config)
    return {name: float(tensor.double().sum()) for name, tensor in model.state_dict().items()}


def _data(root: Path, name: str) -> Any:
    data = slimming.open_data(slimming.DataConfig(source=str(root / name), augment="none"), _plain())
    samples = [data.train[index] for index in range(len(data.train))]  # pyright: ignore
    return data.classes, [(sample.label, float(sample.image.sum())) for sample in samples]


def _plain() -> Any:
    with torch.device("meta"):
        return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)


def _config(root: Path) -> Any:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(["run", str(root / "config.yaml"), "--print-config"])
    if code == 2 and errors.getvalue().startswith("slimming: error: ") and errors.getvalue().count("\n") == 1:
        raise slimming.errors.ConfigError(errors.getvalue())
    assert code == 0, errors.getvalue()[-500:]
    return output.getvalue()


def _table(root: Path) -> Any:
    table = LatencyTable.load(root / "latency.json")
    anatomy = prunable(_plain()).anatomy
    return table, table.predict(anatomy, {name: len(units) for name, units in keep_all(anatomy.groups).items()})


def _json(sealed: bool) -> dict[str, Any]:
    def dumps(value: Any) -> bytes:
        if sealed and isinstance(value, dict):
            rest = {key: entry for key, entry in value.items() if key != "sha256"}
            with contextlib.suppress(ValueError):  # NaN has no checksum
                value = seal(rest)
        return json.dumps(value).encode()

    return {"loads": json.loads, "dumps": dumps, "sealed": sealed}


def _yaml() -> dict[str, Any]:
    def dumps(value: Any) -> bytes:
        return json.dumps(value).encode()  # which is YAML, however deeply it is nested

    return {"loads": yaml.safe_load, "dumps": dumps, "sealed": False}


def _safetensors() -> dict[str, Any]:
    """Changes of the metadata; the tensors stay as they are."""

    def loads(data: bytes) -> Any:
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) | {"@": data}

    def dumps(value: Any) -> bytes:
        data = value.pop("@", None) if isinstance(value, dict) else None
        if not isinstance(data, bytes):
            return b""
        header = json.dumps(value).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]

    return {"loads": loads, "dumps": dumps}


def targets() -> tuple[Target, ...]:
    """Return the kinds of files, each with its writer and reader."""
    kinds = {name: kind for name, kind in vars(run_files).items() if isinstance(kind, FileKind) and kind is not RESULTS}
    own = [name for name in kinds if name in _run_files({})]
    return (
        Target(name="structure.json", file="slim/structure.json", read=lambda at: _model(at / "slim"), **_json(True)),
        Target(name="provenance.json", file="dense/provenance.json", read=lambda at: read_provenance(at / "dense"),
               **_json(True)),
        Target(name="weights.safetensors", file="slim/weights.safetensors", read=lambda at: _model(at / "slim"),
               **_safetensors()),
        Target(name="plan", file="plan.json", read=lambda at: Plan.load(at / "plan.json"), **_json(True)),
        Target(name="latency table", file="latency.json", read=_table, **_json(True)),
        Target(name="search.json", file="search/search.json", read=_search, **_json(True)),
        Target(name="scores.safetensors", file="search/scores.safetensors",
               read=lambda at: load_scores(at / "search" / "scores.safetensors").scores, **_safetensors()),
        Target(name="masks.safetensors", file="search/masks.safetensors", read=_search, **_safetensors()),
        Target(name="results.json", file="run/results.json", read=lambda at: read_results(at / "run"), **_json(True)),
        Target(name="log.jsonl", file="run/search/log.jsonl", sealed=False,
               read=lambda at: read_log(at / "run", "search/log.jsonl")),
        *(Target(name=f"{name.lower()}.json of a run", file=f"run/files/{name.lower()}.json",
                 read=lambda at, name=name: kinds[name].read(at / "run" / "files" / f"{name.lower()}.json"),
                 **_json(True)) for name in own),
        Target(name="config.json of timm", file="timm/config.json", read=lambda at: _model(at / "timm"),
               **_json(False)),
        Target(name="model.safetensors of timm", file="timm/model.safetensors", sealed=False,
               read=lambda at: _model(at / "timm")),
        Target(name="weights.pth", file="weights.pth", read=_weights),
        Target(name="config.yaml", file="config.yaml", read=_config, **_yaml()),
        Target(name="Parquet file", file="parquet/train.parquet", read=lambda at: _data(at, "parquet"), sealed=False),
        Target(name="tar shard", file="tar/train.tar", read=lambda at: _data(at, "tar"), sealed=False),
        Target(name="classes.txt", file="tar/classes.txt", read=lambda at: _data(at, "tar"), sealed=False),
    )  # fmt: skip


def attack(target: Target, good: Path, work: Path, *, times: int, seed: int) -> Tally:
    """Damage a file of one kind ``times`` times and read it.

    Args:
        target: the kind of file.
        good: directory of `good_files`, which is not changed.
        work: an empty directory.
        times: number of damaged files.
        seed: seed of the damage.
    """
    tally = Tally(f"damaged {target.name}", "a sentence or the same result, within seconds")
    dice = random.Random(f"{seed} {target.name}")
    data = (good / target.file).read_bytes()
    shutil.copytree(good, work, dirs_exist_ok=True)
    expected = target.read(work)
    for number in range(times):
        by_value = target.loads is not None and target.dumps is not None and number % 2 == 1
        damaged = _damaged_value(target, data, dice) if by_value else mutated_bytes(data, dice)
        (work / target.file).write_bytes(damaged)
        may_differ = by_value or not target.sealed
        fault = _fault(target, work, expected, may_differ=may_differ)
        tally.add(None if fault is None else f"{target.name} {number} ({'value' if by_value else 'bytes'}): {fault}")
    return tally


def _damaged_value(target: Target, data: bytes, dice: random.Random) -> bytes:
    assert target.loads is not None
    assert target.dumps is not None
    return target.dumps(mutated_value(target.loads(data), dice))


def _fault(target: Target, work: Path, expected: Any, *, may_differ: bool) -> str | None:
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.read(work)
    except slimming.errors.SlimmingError as error:
        fault = None if str(error).strip() else "an error without a sentence"
    except Exception as error:  # the attack is to find these
        fault = f"{type(error).__name__}: {error}"[:300]
    else:
        fault = None if may_differ or _same(found, expected) else "another result without an error"
    seconds = time.monotonic() - began
    return fault or (f"took {seconds:.0f} s" if seconds > SECONDS else None)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Mapping) and any(isinstance(entry, torch.Tensor) for entry in expected.values()):
        return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    return found == expected
