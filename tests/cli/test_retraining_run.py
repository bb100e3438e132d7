"""`slimming run` with other ways to retrain, and with hours in place of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import slimming as library
from slimming.runs import pipeline, stages
from slimming.runs.files import TIME_ALLOCATION
from slimming.runs.time_budget import Pace

from .conftest import TRAIN, Call, settings, write_config

BUDGETS = [{"macs": 0.5}, {"macs": 0.8}]


def start(site: Path, directory: Path, **changes: Any) -> Path:
    return write_config(directory / "config.yaml", settings(site) | {"budgets": BUDGETS} | changes)


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_together(slimming: Call, site: Path, tmp_path: Path) -> None:
    config, output = start(site, tmp_path, retraining="together"), tmp_path / "out"
    shown = slimming("run", config, "--output", output)
    assert shown.code == 0, shown.err
    assert "together: one training for macs-0.50, macs-0.80" in shown.out
    rows = {row["name"]: row for row in results(output)["rows"]}
    assert list(rows) == ["macs-0.50", "macs-0.80"]
    assert {row["log"] for row in rows.values()} == {"together/log.jsonl"}
    served = json.loads((output / "together" / "served.json").read_text())
    assert sum(row["seconds"]["retrain"] for row in rows.values()) == pytest.approx(served["seconds"])
    # What is saved is cut out of the shared weights, at the budget's own plan, and its accuracy is its own.
    shared = library.load_search(output / "together")
    x = torch.randn(2, 3, 16, 16)
    for name, row in rows.items():
        slim = library.load(output / name / "slim")
        plan = library.Plan.load(output / name / "plan.json")
        assert torch.equal(slim(x), library.cut(shared.model, plan).eval()(x))
        assert not torch.equal(slim(x), library.load(output / name / "cut")(x))
        assert row["macs"] == library.cost(slim).macs
        own = slimming("eval", output / name / "slim", "--data.source", site / "images")
        assert f"{100 * row['top1']:.1f}" in own.out
    page = (output / "report.html").read_text()
    assert page.count("all budgets together") >= 1
    assert "nothing to do" in slimming("run", config, "--output", output).out


def test_a_budget_added_later_is_cut_from_the_shared_weights(
    slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, output = start(site, tmp_path, retraining="together"), tmp_path / "out"
    assert slimming("run", config, "--output", output).code == 0
    monkeypatch.setattr(stages, "train_slimmable", None)
    more = [word for share in (0.5, 0.8, 0.65) for word in ("--budget", f"macs={share}")]
    shown = slimming("run", config, "--output", output, *more)
    assert shown.code == 0, shown.err
    assert "together: already trained for macs-0.50, macs-0.80" in shown.out
    assert [row["name"] for row in results(output)["rows"]] == ["macs-0.50", "macs-0.80", "macs-0.65"]
    shared = library.load_search(output / "together")
    plan = library.Plan.load(output / "macs-0.65" / "plan.json")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(library.load(output / "macs-0.65" / "slim")(x), library.cut(shared.model, plan).eval()(x))


def test_progressive(slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without retraining nothing happens between two cuts, and without compensation the last is the only one.
    changes: dict[str, Any] = {"retraining": "progressive", "compensate": 0}
    output = tmp_path / "none"
    shown = slimming("run", start(site, tmp_path, **changes, retrain={**TRAIN, "steps": 0}), "--output", output)
    assert shown.code == 0, shown.err
    assert shown.out.index("macs-0.80: cut") < shown.out.index("macs-0.50: cut")
    assert [row["name"] for row in results(output)["rows"]] == ["macs-0.50", "macs-0.80"]
    searched, x = library.load_search(output / "search"), torch.randn(2, 3, 16, 16)
    plan = library.Plan.load(output / "macs-0.50" / "plan.json")
    small = library.load(output / "macs-0.50" / "slim")
    torch.testing.assert_close(small(x), library.cut(searched.model, plan).eval()(x))
    # With it, the smaller one begins where the larger one ended, also in a call that goes on.
    output = tmp_path / "some"
    config = start(site, tmp_path, **changes)
    original = stages.train

    def stop(*given: Any, **options: Any) -> Any:
        if options["title"] == "macs-0.50":
            raise KeyboardInterrupt
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", stop)
        assert slimming("run", config, "--output", output).code == 130
    shown = slimming("run", config, "--output", output)
    assert shown.code == 0, shown.err
    assert "macs-0.80: already done" in shown.out
    large, cut = (library.load(output / name) for name in ("macs-0.80/slim", "macs-0.50/cut"))
    assert torch.equal(large.get_parameter("head.weight"), cut.get_parameter("head.weight"))
    first = library.load(output / "macs-0.80/cut")
    assert not torch.equal(large.get_parameter("head.weight"), first.get_parameter("head.weight"))


def test_hours(slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_settings = {"search": {"train": {"batch_size": 4}}, "retrain": {"batch_size": 4, "eval_every": 0}}
    config, output = start(site, tmp_path, **open_settings), tmp_path / "out"
    # A machine so slow that only the least is done, whatever this one is.
    monkeypatch.setattr(pipeline, "measure_pace", lambda *_: Pace(read_seconds=0.1, step_seconds=1.0))
    shown = slimming("run", config, "--output", output, "--hours", "0.01")
    assert shown.code == 0, shown.err
    assert "0.01 h at 1 images/s: one-shot scores, retrain 50 steps for each budget" in shown.out
    found = results(output)
    assert found["time_allocation"]["retrain_steps"] == 50
    assert found["time_allocation"]["search_steps"] == 0
    assert TIME_ALLOCATION.read_values(output / "time_allocation.json") == found["time_allocation"]
    assert found["settings"]["hours"] == 0.01
    state = torch.load(output / "macs-0.50" / "state.pt", weights_only=True)
    assert state["step"] == state["settings"]["total"] == 50
    provenance = json.loads((output / "macs-0.50" / "slim" / "provenance.json").read_text())
    assert provenance["settings"]["retrain"]["steps"] == 50
    # The same call goes on with what was chosen then, and finds nothing left to do.
    monkeypatch.setattr(pipeline, "measure_pace", None)
    assert "nothing to do" in slimming("run", config, "--output", output, "--hours", "0.01").out
    (output / "results.json").unlink()
    assert slimming("run", config, "--output", output, "--hours", "0.01").code == 0
    assert results(output)["time_allocation"] == found["time_allocation"]


def test_hours_that_make_no_sense(slimming: Call, site: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for hours, wrong in (("0", "hours is 0; give the time"), ("-2", "hours is -2"), ("soon", "hours is 'soon'")):
        refused = slimming("run", start(site, tmp_path), "--output", output, "--hours", hours)
        assert refused.code == 2
        assert wrong in refused.err
    refused = slimming("run", start(site, tmp_path), "--output", output, "--hours", "1")
    assert refused.code == 2
    assert "hours has no effect" in refused.err
    refused = slimming("run", start(site, tmp_path), "--output", output, "--retraining", "togehter")
    assert "Did you mean 'together'" in refused.err
    assert not output.exists()


def test_together_refuses_to_compare_masked_tokens_before_it_searches(
    slimming: Call, site: Path, tmp_path: Path
) -> None:
    config, output = start(site, tmp_path, retraining="together"), tmp_path / "out"
    shown = slimming("run", config, "--output", output, "--distil.relations", "[blocks.0]")
    assert shown.code == 2
    assert "retrain each budget separately" in shown.err
    assert not (output / "search").exists()
