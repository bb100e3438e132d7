"""Settings: one definition, three ways in, and the errors of all three."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

import pytest

from slimming.cli.configs import (
    CONFIGS,
    SearchCommandConfig,
    TrainCommandConfig,
    changed_settings,
    config_from_values,
    config_to_yaml,
)
from slimming.cli.flags import add_flags, attribute_docs, flag_values, flags_of, parse_flag
from slimming.core.budget import Budget
from slimming.core.yaml_text import read_yaml
from slimming.errors import BudgetError, ConfigError
from slimming.runs.config import RunConfig
from slimming.searching.config import PRESETS, preset
from slimming.training.config import TrainConfig

T = TypeVar("T")
FEWEST = {"model": {"name": "m"}, "data": {"source": "d"}, "budgets": [{"macs": 0.5}]}


def made(**more: object) -> RunConfig:
    return config_from_values(RunConfig, {**FEWEST, **more})


def test_defaults_come_from_the_dataclasses() -> None:
    assert made() == RunConfig(**{**vars(made()), "budgets": (Budget(macs=0.5),)})
    assert made().retrain.epochs == 10.0


def test_a_part_of_a_section_keeps_the_rest() -> None:
    config = made(retrain={"lr": "1e-4", "mixup": 1}, distil={"alpha": 0.5}, search={"penalty": {"mlp": 3}})
    assert config.retrain == TrainConfig(epochs=10.0, lr=1e-4, mixup=1.0)
    assert config.distil is not None
    assert (config.distil.alpha, config.distil.temperature) == (0.5, 2.0)
    assert config.search.penalty == {**preset("default").penalty, "mlp": 3.0}


def test_the_preset_is_the_base_of_the_search() -> None:
    config = made(search={"preset": "paper", "train": {"epochs": 3}}).search
    assert config.coupled
    assert (config.train.epochs, config.train.batch_size) == (3.0, 1024)


@pytest.mark.parametrize("name", PRESETS, ids=str)
def test_the_saved_settings_make_the_same_job(name: str, tmp_path: Path) -> None:
    config = made(search={"preset": name, "score": "mask"}, distil=None, retrain={"ema": 0.9, "trackers": ["x"]})
    assert config.search.penalty == preset(name).penalty
    assert again(config, tmp_path) == config
    more = made(search={"preset": name, "penalty": {"head": 0.25, "channel": 1e-5}})
    assert again(more, tmp_path) == more


def again(job: T, directory: Path) -> T:
    """The job that the file of ``job`` makes."""
    path = directory / "config.yaml"
    path.write_text(config_to_yaml(job), "utf-8")
    return config_from_values(type(job), read_yaml(path))


def test_the_saved_settings_of_a_training_make_the_same_job(tmp_path: Path) -> None:
    job = config_from_values(TrainCommandConfig, {"model": {"name": "m"}, "data": {"source": "d"}, "teacher": "t"})
    assert again(job, tmp_path) == job


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "unknown section": ({"serch": {}}, "Did you mean 'search'?"),
    "unknown setting": ({"retrain": {"epoch": 1}}, "Did you mean 'retrain.epochs'?"),
    "nothing near": ({"retrain": {"zzz": 1}}, "no setting retrain.zzz. retrain takes epochs, steps, batch_size"),
    "two levels down": ({"search": {"train": {"batchsize": 1}}}, "Did you mean 'search.train.batch_size'?"),
    "unknown preset": ({"search": {"preset": "papr"}}, "Did you mean 'paper'?"),
    "above a preset": ({"search": {"preset": "paper", "fld": True}}, "Did you mean 'search.fold'?"),
    "in a list": ({"budgets": [{"mac": 0.5}]}, "Did you mean 'budgets[0].macs'?"),
    "no number": ({"retrain": {"epochs": "ten"}}, "retrain.epochs is 'ten'; it must be a number"),
    "no whole number": ({"retrain": {"steps": 1.5}}, "retrain.steps is 1.5; it must be a whole number"),
    "no truth value": ({"retrain": {"compile": 1}}, "retrain.compile is 1; it must be true or false"),
    "truth value for a number": ({"retrain": {"lr": True}}, "retrain.lr is True; it must be a number"),
    "no text": ({"retrain": {"optimizer": 3}}, "retrain.optimizer is 3; it must be text"),
    "null": ({"retrain": {"lr": None}}, "retrain.lr is None; it must be a number"),
    "out of range": ({"retrain": {"lr": -1}}, "retrain: lr is -1"),
    "no section": ({"retrain": 3}, "retrain is 3; it must be a mapping"),
    "no list": ({"search": {"kinds": "mlp"}}, "search.kinds is 'mlp'; it must be a list"),
    "entry of a list": ({"bench": {"batch_sizes": [1, "x"]}}, "bench.batch_sizes[1] is 'x'; it must be a whole number"),
    "entry of a mapping": ({"search": {"penalty": {"mlp": "x"}}}, "search.penalty.mlp is 'x'; it must be a number"),
    "no list of sections": ({"budgets": {"macs": 0.5}}, "it must be a list"),
    "missing": ({"model": {}}, "model.name is missing"),
    "missing list": ({"budgets": None}, "budgets is None; it must be a list"),
}


@pytest.mark.parametrize(("values", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named_by_the_setting_that_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"data\.source is missing"):
        config_from_values(RunConfig, {"model": {"name": "m"}, "budgets": [{"macs": 0.5}]})
    with pytest.raises(ConfigError, match=r"budgets is missing"):
        config_from_values(RunConfig, {"model": {"name": "m"}, "data": {"source": "d"}})


def test_a_bad_budget_is_named_with_its_place() -> None:
    with pytest.raises(BudgetError, match=r"budgets\[1\]: Budget macs=2"):
        made(budgets=[{"macs": 0.5}, {"macs": 2}])


def test_distil_needs_a_teacher() -> None:
    with pytest.raises(ConfigError, match="without a teacher"):
        config_from_values(
            TrainCommandConfig, {"model": {"name": "m"}, "data": {"source": "d"}, "distil": {"alpha": 0.5}}
        )


BAD_FILES = {
    "no YAML": ("a: [1", "line 1 is not YAML"),
    "a key twice": ("a: 1\na: 2", "'a' is given twice"),
    "a key twice below": ("a:\n  b: 1\n  b: 2", "'b' is given twice"),
    "text": ("just text", "holds no settings"),
    "a list": ("- a", "holds no settings"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        read_yaml(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


def flags(*words: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    return flag_values(parser.parse_args(words), RunConfig)


def test_flags_are_read_by_type() -> None:
    assert flags() == {}
    words = "--search.kinds mlp,token --search.penalty mlp=0.5 --retrain.ema null --retrain.lr 1e-4 --distil none"
    words += " --model.arguments img_size=64 --retrain.compile true --budget keep.mlp=0.7 --budget macs=0.5"
    assert flags(*words.split()) == {
        "search": {"kinds": ["mlp", "token"], "penalty": {"mlp": 0.5}},
        "retrain": {"ema": None, "lr": "1e-4", "compile": True},
        "model": {"arguments": {"img_size": 64}},
        "distil": None,
        "budgets": [{"keep": {"mlp": 0.7}}, {"macs": 0.5}],
    }
    assert parse_flag(dict[str, int], "{a: 1}", "--x") == {"a": 1}


BAD_FLAGS = {
    "no pair": ("--budget macs", "'macs' is not of the form name=value"),
    "a name twice": ("--budget macs=0.5,macs=0.3", "macs is given twice"),
    "below what is off": ("--distil null --distil.alpha 0.3", "distil is given as null, so distil.alpha has no effect"),
    "off what is set": ("--distil.alpha 0.3 --distil null", "distil is given twice, or beside settings of its own"),
    "a section": ("--distil yes", "--distil takes null only"),
    "no YAML": ("--search.penalty mlp=[", "is not YAML"),
}


@pytest.mark.parametrize(("words", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_bad_flag_is_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags(*words.split())
    assert message in str(caught.value)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_flag_says_what_it_does(cls: type) -> None:
    assert [flag.name for flag in flags_of(cls) if not flag.text] == []


def test_attribute_texts_are_one_line_each() -> None:
    assert attribute_docs(Budget)["macs"] == "multiply-adds for one image."


def test_the_printed_settings_are_those_that_differ() -> None:
    config = made(retrain={"lr": 0.5}, model={"name": "m", "arguments": {"img_size": 64}}, search={"preset": "paper"})
    assert changed_settings(config) == [
        "model    name=m, arguments.img_size=64",
        "data     source=d",
        "budgets  macs=0.5",
        "search   preset=paper",
        "retrain  lr=0.5",
    ]
    given_again = made(budgets=[{"macs": 0.5}, {"keep": {"mlp": 0.5, "token": 0.7}}], distil=None, bench={"runs": 3})
    assert changed_settings(given_again) == [
        "model    name=m",
        "data     source=d",
        "budgets  macs=0.5 keep.mlp=0.5,keep.token=0.7",
        "search   preset=default",
        "distil   null",
        "bench    runs=3",
    ]


def test_a_search_job_knows_no_budgets() -> None:
    with pytest.raises(ConfigError, match="no setting budgets"):
        config_from_values(SearchCommandConfig, FEWEST)
