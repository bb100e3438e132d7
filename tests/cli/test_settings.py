"""Settings: one definition, three ways in, and the errors of all three."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from slimming.cli.flags import attribute_texts, flags_of, given, parse_flag, parse_pairs
from slimming.cli.jobs import JOBS, SearchJob, TrainJob, differences, document, from_values
from slimming.cli.settings import read_yaml
from slimming.core.budget import Budget
from slimming.errors import BudgetError, ConfigError
from slimming.runs.config import RunConfig
from slimming.searching.config import preset
from slimming.training.config import TrainConfig

FEWEST = {"model": {"name": "m"}, "data": {"source": "d"}, "budgets": [{"macs": 0.5}]}


def made(**more: object) -> RunConfig:
    return from_values(RunConfig, {**FEWEST, **more})


def test_defaults_come_from_the_dataclasses() -> None:
    assert made() == RunConfig(**{**vars(made()), "budgets": (Budget(macs=0.5),)})
    assert made().retrain.epochs == 10.0


def test_a_part_of_a_section_keeps_the_rest() -> None:
    config = made(retrain={"lr": "1e-4"}, distil={"alpha": 0.5}, search={"penalty": {"mlp": 3}})
    assert config.retrain == TrainConfig(epochs=10.0, lr=1e-4)
    assert config.distil is not None
    assert (config.distil.alpha, config.distil.temperature) == (0.5, 2.0)
    assert config.search.penalty == {**preset("default").penalty, "mlp": 3.0}


def test_the_preset_is_the_base_of_the_search() -> None:
    config = made(search={"preset": "paper", "train": {"epochs": 3}}).search
    assert config.coupled
    assert (config.train.epochs, config.train.batch_size) == (3.0, 1024)


@pytest.mark.parametrize("name", ["default", "paper"])
def test_the_saved_settings_make_the_same_job(name: str) -> None:
    config = made(search={"preset": name, "score": "mask"}, distil=None, retrain={"ema": 0.9, "trackers": ["x"]})
    assert from_values(RunConfig, document(config)) == config
    job = from_values(TrainJob, {"model": {"name": "m"}, "data": {"source": "d"}, "teacher": "t"})
    assert from_values(TrainJob, document(job)) == job


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serch": {}}, "Did you mean 'search'?"),
        ({"retrain": {"epoch": 1}}, "Did you mean 'retrain.epochs'?"),
        ({"search": {"train": {"batchsize": 1}}}, "Did you mean 'search.train.batch_size'?"),
        ({"search": {"preset": "papr"}}, "Did you mean 'paper'?"),
        ({"budgets": [{"mac": 0.5}]}, "Did you mean 'budgets[0].macs'?"),
        ({"retrain": {"epochs": "ten"}}, "retrain.epochs is 'ten'; it must be a number"),
        ({"retrain": {"steps": 1.5}}, "retrain.steps is 1.5; it must be a whole number"),
        ({"retrain": {"compile": 1}}, "must be true or false"),
        ({"retrain": {"optimizer": 3}}, "must be text"),
        ({"retrain": {"lr": -1}}, "retrain: lr is -1"),
        ({"retrain": 3}, "retrain is 3; it must be a mapping"),
        ({"search": {"kinds": "mlp"}}, "search.kinds is 'mlp'; it must be a list"),
        ({"budgets": {"macs": 0.5}}, "it must be a list"),
        ({"model": {}}, "model.name is missing"),
    ],
)
def test_a_mistake_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**values)
    assert message in str(caught.value)


def test_a_bad_budget_is_named_with_its_place() -> None:
    with pytest.raises(BudgetError, match=r"budgets\[1\]: Budget macs=2"):
        made(budgets=[{"macs": 0.5}, {"macs": 2}])


def test_distil_needs_a_teacher() -> None:
    with pytest.raises(ConfigError, match="without a teacher"):
        from_values(TrainJob, {"model": {"name": "m"}, "data": {"source": "d"}, "distil": {"alpha": 0.5}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1 is not YAML"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("just text", "holds no settings"),
        ("- a", "holds no settings"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        read_yaml(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_flags_are_read_by_type() -> None:
    words = {
        "search.kinds": "mlp,token", "search.penalty": "mlp=0.5", "retrain.ema": "null", "retrain.lr": "1e-4",
        "model.arguments": "img_size=64", "distil": "none", "retrain.compile": "true", "budget": ["keep.mlp=0.7"],
    }  # fmt: skip
    assert given(argparse.Namespace(**words), RunConfig) == {
        "search": {"kinds": ["mlp", "token"], "penalty": {"mlp": 0.5}},
        "retrain": {"ema": None, "lr": "1e-4", "compile": True},
        "model": {"arguments": {"img_size": 64}},
        "distil": None,
        "budgets": [{"keep": {"mlp": 0.7}}],
    }
    assert parse_flag(dict[str, int], "{a: 1}", "--x") == {"a": 1}
    with pytest.raises(ConfigError, match="not name=value"):
        parse_pairs("macs", "--budget")
    with pytest.raises(ConfigError, match="macs is given twice"):
        parse_pairs("macs=0.5,macs=0.3", "--budget")
    with pytest.raises(ConfigError, match=r"distil is given as null, so distil\.alpha has no effect"):
        given(argparse.Namespace(**{"distil": "null", "distil.alpha": "0.3"}), RunConfig)
    with pytest.raises(ConfigError, match="distil is given twice, or beside settings of its own"):
        given(argparse.Namespace(**{"distil.alpha": "0.3", "distil": "null"}), RunConfig)
    with pytest.raises(ConfigError, match="takes null only"):
        parse_flag(None, "yes", "--distil")


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_says_what_it_does(job: type) -> None:
    assert [flag.name for flag in flags_of(job) if not flag.text] == []


def test_attribute_texts_are_one_line_each() -> None:
    assert attribute_texts(Budget)["macs"] == "multiply-adds of one image."


def test_the_printed_settings_are_those_that_differ() -> None:
    config = made(retrain={"lr": 0.5}, model={"name": "m", "arguments": {"img_size": 64}}, search={"preset": "paper"})
    assert differences(config) == [
        "model    name=m, arguments.img_size=64",
        "data     source=d",
        "budgets  [{macs: 0.5}]",
        "search   preset=paper",
        "retrain  lr=0.5",
    ]


def test_a_search_job_knows_no_budgets() -> None:
    with pytest.raises(ConfigError, match="no setting budgets"):
        from_values(SearchJob, FEWEST)
