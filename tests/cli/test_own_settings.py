"""A run goes on from the config.yaml that it wrote: every preset, the demo, and every example in the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimming import demo
from slimming.cli.configs import SearchCommandConfig, config_from_values
from slimming.cli.output import run_directory
from slimming.core.yaml_text import read_yaml
from slimming.errors import ConfigError
from slimming.runs.config import RETRAININGS, RunConfig
from slimming.runs.pipeline import check_settings
from slimming.searching.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
LEAST = {"model": {"name": "m"}, "data": {"source": "d"}, "budgets": [{"macs": 0.5}]}


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in PRESETS:
        yield f"preset {name}", {"search": {"preset": name}}
        yield f"preset {name} with a penalty", {"search": {"preset": name, "penalty": {"head": 0.25}}}
    for name in RETRAININGS:
        yield f"retraining {name}", {"retraining": name, "budgets": [{"macs": 0.5}, {"keep": {"mlp": 0.5}}]}
    yield "demo", demo.settings()
    yield "no distillation", {"distil": None}
    yield "hours", {"hours": 1.5, "one_shot": 8}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)):
            if "model:" in block or "search:" in block or "retrain:" in block:
                yield f"{page.name} {number}", yaml.safe_load(block)


EXAMPLES = dict(examples())


def test_examples_were_found() -> None:
    assert {"demo", "configuration.md 0", "paper.md 0", "own-data.md 0", "scale.md 0"} <= EXAMPLES.keys()


@pytest.mark.parametrize("values", EXAMPLES.values(), ids=EXAMPLES)
def test_a_run_goes_on_from_its_own_config(tmp_path: Path, values: dict[str, Any]) -> None:
    config = config_from_values(RunConfig, {**LEAST, **values})
    path = tmp_path / "out" / "config.yaml"
    with run_directory(tmp_path / "out", config, "run"):
        check_settings(config, tmp_path / "out", write=True)
    written = path.read_text("utf-8")
    again = config_from_values(RunConfig, read_yaml(path))
    assert again == config
    with run_directory(tmp_path / "out", again, "run"):
        check_settings(again, tmp_path / "out", write=True)
    assert path.read_text("utf-8") == written
    search = SearchCommandConfig(model=config.model, data=config.data, search=config.search)
    for _ in range(2):
        with run_directory(tmp_path / "search", search, "search"):
            search = config_from_values(SearchCommandConfig, read_yaml(tmp_path / "search" / "config.yaml"))


def test_other_penalties_are_refused_with_those_that_differ_alone(tmp_path: Path) -> None:
    def made(**penalty: float) -> RunConfig:
        return config_from_values(RunConfig, {**LEAST, "search": {"preset": "network-slimming", "penalty": penalty}})

    with run_directory(tmp_path, made(), "run"):
        pass
    with pytest.raises(ConfigError) as caught, run_directory(tmp_path, made(channel=0.125), "run"):
        pass
    _, *lines, last = str(caught.value).splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"  search\.penalty\.channel: \S+ \(now 0\.125\)", lines[0])
    assert last.startswith(
        f"Go on with the same settings (slimming run {tmp_path / 'config.yaml'} --output {tmp_path})"
    )
