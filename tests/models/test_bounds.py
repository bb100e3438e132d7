"""Files that ask for huge models, or expand without end, are refused within seconds and without gigabytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm

import slimming
from slimming.core.files import seal

ARGUMENTS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
HUGE = {
    "depth": 10**7, "img_size": 10**7, "num_classes": 10**9, "patch_size": 0, "in_chans": 10**7, "embed_dim": 10**7,
    "num_heads": 0, "depth-1e5": 10**5, "patch_size-negative": -8, "mlp_ratio": 1e30,
}  # fmt: skip
PROGRAM = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch, timm, slimming
from slimming.cli.entry import main
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
found = []
for words in json.loads(sys.argv[1]):
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        if words[0] == "load": slimming.load(words[1])
        else: raise SystemExit(main(words))
        end = "loaded"
    except BaseException as error:
        end = type(error).__name__ + str(error)[:80]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    found.append([end, time.monotonic() - began, grown])
print(json.dumps(found))
"""


def outcomes(*calls: list[str]) -> list[tuple[str, float, float]]:
    """What happened in each call, its seconds, and the gigabytes by which the process grew."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [(end, seconds, grown) for end, seconds, grown in json.loads(done.stdout.splitlines()[-1])]


def test_a_structure_of_a_huge_model_is_refused(tmp_path: Path) -> None:
    slimming.save(timm.create_model("vit_tiny_patch16_224", **ARGUMENTS, num_classes=2), tmp_path / "good")
    calls = []
    for name, value in HUGE.items():
        directory = tmp_path / name
        directory.mkdir()
        for file in ("weights.safetensors", "provenance.json"):
            (directory / file).symlink_to(tmp_path / "good" / file)
        structure = json.loads((tmp_path / "good" / "structure.json").read_text())
        del structure["sha256"]
        structure["base"]["arguments"][name.partition("-")[0]] = value
        (directory / "structure.json").write_text(json.dumps(seal(structure)))
        calls.append(["load", str(directory)])
    for call, (end, seconds, grown) in zip(calls, outcomes(*calls), strict=True):
        assert end.startswith("CheckpointError"), (call, end)
        assert seconds < 20, (call, seconds)
        assert grown < 1, (call, grown)


@pytest.mark.slow
def test_a_config_of_a_huge_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    slimming.save(timm.create_model("vit_tiny_patch16_224", **ARGUMENTS, num_classes=2), tmp_path / "saved")
    calls = []
    for name, value in HUGE.items():
        directory = tmp_path / name
        directory.mkdir()
        (directory / "model.safetensors").symlink_to(tmp_path / "saved" / "weights.safetensors")
        arguments = {**ARGUMENTS, name.partition("-")[0]: value}
        config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "num_classes": 2}
        (directory / "config.json").write_text(json.dumps(config))
        calls.append(["load", str(directory)])
    for call, (end, seconds, grown) in zip(calls, outcomes(*calls), strict=True):
        assert end.startswith(("CheckpointError", "UnsupportedModelError")), (call, end)
        assert seconds < 20, (call, seconds)
        assert grown < 1, (call, grown)


def test_yaml_that_expands_or_nests_without_end_is_refused(tmp_path: Path) -> None:
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    files = {
        "laughs": "\n".join(laughs),
        "merged": "\n".join(f"a{n}: &a{n} {{{', '.join(f'k{m}: *a{n - 1}' for m in range(9))}}}" if n else
                            "a0: &a0 {x: 1}" for n in range(12)),
        "own": "data: &a [*a]",
        "deep": "data: " + "[" * 100_000,
        "deeper": "\n".join(f"{' ' * n}a:" for n in range(1000)),
        "large": "x: " + "y" * 2_000_000,
        "digits": "hours: " + "9" * 10_000,
        "tag": "data: !!python/object/apply:os.system [ls]",
    }  # fmt: skip
    calls = []
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        calls.append(["run", str(tmp_path / f"{name}.yaml"), "--print-config"])
    for call, (end, seconds, grown) in zip(calls, outcomes(*calls), strict=True):
        assert end == "SystemExit2", (call, end)
        assert seconds < 5, (call, seconds)
        assert grown < 0.5, (call, grown)


def test_models_are_built_as_usual_within_the_bounds() -> None:
    from slimming.models.bounds import bounded_building

    with bounded_building():
        assert timm.create_model("test_vit").num_classes == 1000
    with pytest.raises(slimming.errors.CheckpointError, match="a tensor of"), bounded_building():
        timm.create_model("test_vit", num_classes=10**9)
