"""The commands, in this process, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import slimming as library
from clocks import CountingClock
from slimming import demo
from slimming.cli import entry
from slimming.cli.entry import COMMANDS, make_parser
from slimming.planning import latency_measurement
from slimming.searching.config import PRESETS
from slimming.training import loop

from .conftest import ARGUMENTS, TRAIN, Call, settings, write_config

HERE = Path(__file__).parent


def test_the_list_of_commands_and_flags_is_frozen() -> None:
    lines = []
    for name in COMMANDS:
        options = [
            "/".join(action.option_strings) or action.dest.upper() + ("..." if action.nargs == "+" else "")
            for action in make_parser(name)._actions
        ]
        lines += [f"{name}:", *(f"  {option}" for option in options)]
    assert "\n".join(lines) + "\n" == (HERE / "flags.txt").read_text("utf-8")


def test_help(slimming: Call) -> None:
    assert slimming("--help").out == slimming().out
    assert all(name in slimming("--help").out for name in COMMANDS)
    assert slimming("--version").out.startswith("slimming 0")
    for name in COMMANDS:
        shown = slimming(name, "--help")
        assert shown.code == 0
        assert f"\n  slimming {name} " in shown.out or f"\n  slimming {name}\n" in shown.out
        assert max(map(len, shown.out.splitlines())) <= 120


def test_help_does_not_import_torch() -> None:
    program = f"""
import sys
from slimming.cli import main
assert main(["--help"]) == 0
for name in {sorted(COMMANDS)!r}:
    assert main([name, "--help"]) == 0
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_slimming() -> None:
    done = subprocess.run([sys.executable, "-m", "slimming", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("slimming: error: There is no command 'nothing'")


def test_run_leaves_everything(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["macs-0.70"]
    assert (finished / "report.html").exists()
    assert (finished / "macs-0.70" / "slim" / "weights.safetensors").exists()
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["retrain"]["steps"] == 2
    assert saved["search"]["preset"] == "default"


def test_a_complete_run_shows_its_table_again(slimming: Call, site: Path, finished: Path) -> None:
    before = (finished / "results.json").stat().st_mtime_ns
    shown = slimming("run", site / "config.yaml", "--output", finished)
    assert shown.code == 0
    assert "is complete; nothing to do" in shown.out
    assert "70 % MACs" in shown.out
    assert str(finished / "report.html") in shown.out
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_run_adds_a_budget_and_keeps_the_rest(slimming: Call, site: Path, copied: Path) -> None:
    searched = (copied / "search" / "search.json").stat().st_mtime_ns
    words = ("run", copied / "config.yaml", "--output", copied, "--budget", "macs=0.7", "--budget", "macs=0.8")
    shown = slimming(*words)
    assert shown.code == 0, shown.err
    assert "search: already done" in shown.out
    assert "macs-0.80" in shown.out
    assert (copied / "search" / "search.json").stat().st_mtime_ns == searched


def test_run_refuses_other_settings(slimming: Call, site: Path, finished: Path) -> None:
    refused = slimming("run", site / "config.yaml", "--output", finished, "--search.train.lr", "0.5")
    assert refused.code == 2
    assert "search.train.lr: 0.0001 (now 0.5)" in refused.err
    refused = slimming("search", site / "config.yaml", "--output", finished)
    assert refused.code == 2
    assert "not of a `slimming search`" in refused.err


def test_ctrl_c_saves_and_says_how_to_go_on(
    slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    words = ("search", site / "config.yaml", "--output", output)
    original = loop.TrainingRun.train_step

    def press(self: Any, *given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "train_step", press)
        stopped = slimming(*words)
    assert stopped.code == 130
    assert "Stopped after step 1 of 2" in stopped.err
    assert f"To go on: slimming search {site / 'config.yaml'} --output {output}" in stopped.err
    assert (output / "state.pt").exists()
    gone_on = slimming(*words)
    assert gone_on.code == 0, gone_on.err
    assert (output / "search.json").exists()
    assert "nothing to do" in slimming(*words).out


def test_search_cut_train_eval_bench(slimming: Call, site: Path, finished: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    done = slimming(
        "cut", finished, "--budget", "macs=0.8", "--budget", "keep.mlp=0.5,keep.head_dim=0.5", "--output", cut
    )
    assert done.code == 0, done.err
    names = sorted(path.name for path in cut.iterdir())
    assert names == ["head_dim-0.50_mlp-0.50", "macs-0.80"]
    assert (cut / "macs-0.80" / "plan.json").exists()
    small = cut / "macs-0.80" / "cut"

    words = ("cut", finished, "--budget", "macs=0.8", "--data", site / "images", "--output")
    done = slimming(*words, tmp_path / "compensated", "--images", 6)
    assert done.code == 0, done.err
    better = load_file(tmp_path / "compensated" / "macs-0.80" / "cut" / "weights.safetensors")
    plain = load_file(small / "weights.safetensors")
    assert {name: tensor.shape for name, tensor in better.items()} == {n: tensor.shape for n, tensor in plain.items()}
    assert any(not torch.equal(better[name], tensor) for name, tensor in plain.items())
    done = slimming(*words, tmp_path / "none", "--images", 0)
    assert (done.code, "The number of calibration images is 0; it must be at least 1" in done.err) == (2, True)
    assert not (tmp_path / "none").exists()

    again = tmp_path / "again"
    planned = slimming("cut", finished, "--plan", cut / "macs-0.80" / "plan.json", "--output", again)
    assert planned.code == 0, planned.err
    weights = "cut/weights.safetensors"
    assert (again / "plan" / weights).read_bytes() == (cut / "macs-0.80" / weights).read_bytes()

    out = tmp_path / "trained"
    teacher = tmp_path / "teacher"
    flags = [f"--train.{key}={value}" for key, value in TRAIN.items()]
    dense = slimming("train", site / "config.yaml", "--output", teacher, *flags)
    assert dense.code == 0, dense.err
    assert "not used by this command: " in dense.out
    trained = slimming(
        "train", "--model.name", small, "--teacher", teacher / "model", "--data.source", site / "images",
        "--output", out, *flags,
    )  # fmt: skip
    assert trained.code == 0, trained.err

    judged = slimming("eval", teacher / "model", out / "model", "--device", "cpu", "--json")
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)[str(out / "model")]["images"] == 8

    timed = slimming(
        "bench", teacher / "model", out / "model", "--bench.batch_sizes", "1", "--bench.runs", "5",
        "--bench.seconds", "0.01", "--device", "cpu",
    )  # fmt: skip
    assert timed.code == 0, timed.err
    assert "speed-up" in timed.out


def test_cut_in_one_shot(slimming: Call, site: Path, tmp_path: Path) -> None:
    """A model that was not searched, and images without classes."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, path in enumerate(sorted((site / "images").rglob("*.png"))):
        (pictures / f"{number}.png").write_bytes(path.read_bytes())
    words = ["cut", "vit_tiny_patch16_224", "--model.checkpoint", site / "dense.safetensors", "--one-shot"]
    words += ["--model.arguments", ",".join(f"{key}={value}" for key, value in ARGUMENTS.items())]
    budgets = ["--budget", "macs=0.8", "--budget", "macs=0.6", "--output"]
    done = slimming(*words, "--data", pictures, *budgets, tmp_path / "cut")
    assert done.code == 0, done.err
    for name, share in (("macs-0.80", 0.8), ("macs-0.60", 0.6)):
        small = library.load(tmp_path / "cut" / name / "cut")
        dense = library.open_model(
            library.ModelConfig(
                name="vit_tiny_patch16_224", checkpoint=str(site / "dense.safetensors"), arguments=ARGUMENTS
            )
        )[0]
        assert library.cost(small).macs <= share * library.cost(dense).macs
    record = json.loads((tmp_path / "cut" / "macs-0.80" / "cut" / "provenance.json").read_text())
    outputs = [{"kind": "classes", "name": "output", "scale": 1.0}]
    images = len(list(pictures.iterdir()))
    assert record["one_shot"] == {"score": "compensated", "images": images, "outputs": outputs}

    for more, said in (
        ([], "--one-shot needs images: give --data"),
        (["--data", tmp_path / "cut"], "holds no images"),
        (["--data", tmp_path / "nowhere"], "There is no data at"),
        (["--data", pictures, "--plan", "plan.json"], "drop it or --plan"),
    ):
        failed = slimming(*words, *more, *budgets, tmp_path / "none")
        assert (failed.code, said in failed.err) == (2, True), failed.err
        assert not (tmp_path / "none").exists()
    failed = slimming("cut", tmp_path / "cut", "--model.checkpoint", "a", *budgets, tmp_path / "none")
    assert (failed.code, "has no effect without --one-shot" in failed.err) == (2, True), failed.err


def test_eval_takes_the_data_of_the_checkpoint(slimming: Call, finished: Path) -> None:
    judged = slimming("eval", finished / "macs-0.70" / "slim")
    assert judged.code == 0, judged.err
    assert re.search(r"top-1 \d+\.\d\d%, loss \d\.\d{4}, 8 images", judged.out)


def test_images_are_normalised_as_in_training(slimming: Call, site: Path, tmp_path: Path) -> None:
    """Whatever data is given, and without it: the model has the mean and std that it was trained with."""
    own = ("--data.mean", "0.1,0.1,0.1", "--data.std", "0.9,0.9,0.9")
    made = slimming(
        "train",
        site / "config.yaml",
        "--train.steps",
        "2",
        "--train.batch_size",
        "4",
        *own,
        "--output",
        tmp_path / "out",
    )
    assert made.code == 0, made.err
    words = ("eval", tmp_path / "out" / "model", "--json")
    found = [slimming(*words), slimming(*words, "--data.source", site / "images")]
    by_record, by_source = (next(iter(json.loads(one.out).values())) for one in found)
    assert by_record == by_source
    other = slimming(*words, "--data.source", site / "images", "--data.mean", "0.5,0.5,0.5")
    assert next(iter(json.loads(other.out).values())) != by_source


def test_bench_prints_json(slimming: Call) -> None:
    words = ("test_vit", "--bench.batch_sizes", "1", "--bench.runs", "5", "--bench.seconds", "0.01", "--json")
    found = json.loads(slimming("bench", *words).out)
    assert found["models"]["test_vit"]["params"] == 371240
    assert found["models"]["test_vit"]["speedup"]["1"]["median"] == 1.0


def test_names_with_brackets_are_shown_as_they_are(slimming: Call, finished: Path, tmp_path: Path) -> None:
    place = tmp_path / "my runs [v2]"
    shutil.copytree(finished / "macs-0.70" / "slim", place / "slim")
    words = ("--bench.batch_sizes", "1", "--bench.runs", "2", "--bench.seconds", "0.01")
    shown = slimming("bench", place / "slim", *words)
    assert shown.code == 0, shown.err
    assert "my runs [v2]/slim" in shown.out.replace("\n", "")


def test_inspect(slimming: Call, finished: Path) -> None:
    shown = slimming("inspect", "deit_small_patch16_224")
    assert shown.code == 0, shown.err
    assert "22.05 M params" in shown.out
    assert re.search(r"blocks\.11 +6 x 64 +6 x 64 +1536 +196 ", shown.out)
    assert re.search(r"width +1 +384 ", shown.out)
    assert (
        "not covered: embedding width: the pooling attention" in slimming("inspect", "vit_base_patch16_siglip_224").out
    )
    found = json.loads(slimming("inspect", finished / "macs-0.70" / "slim", "--json").out)
    assert found["input"] == [3, 16, 16]
    assert set(found["kinds"]) == {"head_dim", "head", "mlp", "token", "block", "width"}
    assert found["macs"] <= 0.7 * json.loads((finished / "results.json").read_text())["dense"]["macs"]
    plan = json.loads((finished / "macs-0.70" / "plan.json").read_text())
    kept = sum(len(group["kept"]) for name, group in plan["groups"].items() if name.endswith("hidden"))
    assert found["kinds"]["mlp"]["units"] == kept < 2 * 64
    assert "blocks.0.attn.qk" in slimming("inspect", "test_vit", "--groups").out


def test_report_again(slimming: Call, finished: Path, tmp_path: Path) -> None:
    shown = slimming("report", finished, "--output", tmp_path / "r.html")
    assert shown.code == 0, shown.err
    assert (tmp_path / "r.html").exists()
    assert "70 % MACs" in shown.out
    assert slimming("report", tmp_path).code == 2


def test_the_demo_runs_its_embedded_settings(
    slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "settings", lambda: settings(site))
    monkeypatch.chdir(tmp_path)
    shown = slimming("demo")
    assert shown.code == 0, shown.err
    assert (tmp_path / "runs" / "demo" / "results.json").exists()
    assert "nothing to do" in slimming("demo").out


def test_the_demo_is_complete_in_the_package() -> None:
    from slimming.cli.configs import config_from_values
    from slimming.runs.config import RunConfig

    config = config_from_values(RunConfig, demo.settings())
    assert [budget.macs for budget in config.budgets] == [0.7, 0.5, 0.3]
    assert (Path(config.data.source) / "train.parquet").exists()


def test_a_config_file_with_relative_paths(slimming: Call, site: Path, tmp_path: Path) -> None:
    """A file may hold sections of several commands."""
    values = settings(site) | {"train": TRAIN}
    path = write_config(tmp_path / "both.yaml", values)
    assert slimming("search", path, "--output", tmp_path / "s").code == 0
    assert ARGUMENTS["img_size"] == 16


def test_our_mistake_is_exit_code_one(slimming: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(entry, "command", broken)
    failed = slimming("inspect", "test_vit")
    assert failed.code == 1
    assert "ZeroDivisionError: surprise" in failed.err
    assert "Please report it" in failed.err


def test_debug_shows_where(slimming: Call) -> None:
    assert "Traceback" not in slimming("inspect", "nothing").err
    shown = slimming("inspect", "nothing", "--debug")
    assert shown.code == 2
    assert "Traceback" in shown.err


def test_cut_by_absolute_limits_and_a_chosen_solver(slimming: Call, finished: Path, tmp_path: Path) -> None:
    dense = json.loads((finished / "results.json").read_text())["dense"]
    macs, params = int(0.8 * dense["macs"]), int(0.9 * dense["params"])
    done = slimming("cut", finished, "--budget", f"macs={macs},params={params}", "--output", tmp_path / "both")
    assert done.code == 0, done.err
    (made,) = (tmp_path / "both").iterdir()
    plan = json.loads((made / "plan.json").read_text())
    assert plan["solution"]["solver"] == "exact"
    small = library.load(made / "cut")
    assert library.cost(small).macs <= macs
    assert library.cost(small).params <= params
    assert library.cost(small).macs > 0.5 * macs
    done = slimming("cut", finished, "--budget", "macs=0.8", "--solver", "exact", "--output", tmp_path / "exact")
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "exact" / "macs-0.80" / "plan.json").read_text())
    assert plan["solution"]["solver"] == "exact"
    wrong = slimming("cut", finished, "--budget", "macs=0.8", "--solver", "exakt", "--output", tmp_path / "no")
    assert wrong.code == 2
    assert "There is no solver 'exakt'; solvers are nested, exact. Did you mean 'exact'?" in wrong.err
    assert not (tmp_path / "no").exists()


def test_a_run_without_training_is_one_shot(slimming: Call, site: Path, tmp_path: Path) -> None:
    run = ("run", site / "config.yaml", "--search.train.steps", "0", "--output")
    done = slimming(*run, tmp_path / "run", "--retrain.steps", "0")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (row,) = results["rows"]
    assert row["top1"] == row["top1_cut"]
    assert row["macs"] <= 0.7 * results["dense"]["macs"]
    assert (tmp_path / "run" / "report.html").exists()
    found = library.load_search(tmp_path / "run" / "search")
    assert all(bool((mask == 1).all()) for mask in found.masks.values())
    model, _ = library.open_model(
        library.ModelConfig(
            name="vit_tiny_patch16_224", checkpoint=str(site / "dense.safetensors"), arguments=ARGUMENTS
        )
    )
    data = library.open_data(library.DataConfig(source=str(site / "images")), model)
    images = library.calibration_images(data, 512, batch_size=found.config.train.images_per_pass)
    expected = library.score(model, images).scores
    for name, score in found.scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-3, atol=1e-7)
    assert "is complete" in slimming(*run, tmp_path / "run", "--retrain.steps", "0").out
    wrong = slimming(*run, tmp_path / "no", "--search.score", "taylor")
    assert wrong.code == 2
    assert "score 'taylor' is collected during training" in wrong.err


def test_a_cut_says_what_its_layout_costs(slimming: Call, finished: Path, tmp_path: Path) -> None:
    cut = ("cut", finished, "--budget", "macs=0.6", "--budget", "keep.mlp=0.5")
    done = slimming(*cut, "--output", tmp_path / "alike")
    assert done.code == 0, done.err
    found = re.search(r"macs-0\.60: score lost (\S+) with this layout, (\S+) with any sizes", done.out)
    assert found, done.out
    assert 0 < float(found[2]) <= 1.5 * float(found[1])
    assert done.out.count("with this layout") == 1  # keep ratios are given, and nothing is weighed
    plan = json.loads((tmp_path / "alike" / "macs-0.60" / "plan.json").read_text())
    assert float(f"{plan['solution']['lost_score']:.3g}") == float(found[1])
    assert 0 < plan["solution"]["kept_score"] < 1
    flags = ("--layout.equal_heads", "false", "--layout.equal_qkv", "false", "--layout.multiple", "1")
    free = slimming(*cut, *flags, "--output", tmp_path / "free")
    assert free.code == 0, free.err
    assert "with this layout" not in free.out


def test_latency_table_and_a_cut_by_time(
    slimming: Call, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_measurement, "STEPS", dict.fromkeys(latency_measurement.STEPS, (0.25, 1.0)))
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    table = tmp_path / "table.json"
    given = ",".join(f"{name}={value}" for name, value in ARGUMENTS.items() if isinstance(value, int))
    build = ("latency-table", "build", "vit_tiny_patch16_224", "--model.arguments", given)
    built = slimming(*build, "--output", table)
    assert built.code == 0, built.err
    assert "points; the dense model takes" in built.out
    done = slimming("cut", finished, "--budget", "latency=0.9", "--latency-table", table, "--output", tmp_path / "cut")
    assert done.code == 0, done.err
    assert "ms by the table" in done.out
    plan = json.loads((tmp_path / "cut" / "latency-0.90" / "plan.json").read_text())
    assert plan["solution"]["latency_ms"] > 0
    merged = slimming("latency-table", "merge", table, table, "--output", tmp_path / "both.json")
    assert merged.code == 0, merged.err
    for words, says in (
        (["build", "vit_tiny_patch16_225", "--output", tmp_path / "x.json"], "Did you mean"),
        (["build", "test_vit", "--batch-size", "0", "--output", tmp_path / "x.json"], "--batch-size is 0"),
        (["build", "test_vit", "--dtype", "float8", "--output", tmp_path / "x.json"], "Did you mean 'float"),
        (["bild", "test_vit", "--output", tmp_path / "x.json"], "invalid choice: 'bild'"),
    ):
        wrong = slimming("latency-table", *words)
        assert wrong.code == 2, wrong
        assert says in wrong.err
    assert not (tmp_path / "x.json").exists()
    missing = slimming("cut", finished, "--budget", "latency=0.9", "--output", tmp_path / "no")
    assert missing.code == 2
    assert "slimming latency-table build" in missing.err


@pytest.mark.parametrize("name", PRESETS, ids=str)
@pytest.mark.parametrize("command", ["run", "search"], ids=str)
def test_the_printed_config_is_the_one_that_a_run_writes(
    slimming: Call, site: Path, tmp_path: Path, command: str, name: str
) -> None:
    words = ("--search.preset", name, "--search.penalty", "head=0.5", "--search.train.lr", "1e-5")
    printed = slimming(command, site / "config.yaml", *words, "--output", tmp_path / "o", "--print-config")
    assert printed.code == 0, printed.err
    assert not (tmp_path / "o").exists()
    (tmp_path / "printed.yaml").write_text(printed.out, "utf-8")
    values = yaml.safe_load(printed.out)
    assert values["search"]["preset"] == name
    assert (values["search"]["train"]["lr"], values["search"]["penalty"]["head"]) == (1e-5, 0.5)
    assert slimming(command, tmp_path / "printed.yaml", "--print-config").out == yaml_of(printed.out)


def yaml_of(printed: str) -> str:
    """What was printed, without the notes above it."""
    return "".join(line for line in printed.splitlines(keepends=True) if not line.startswith("#"))


def test_a_training_goes_on_from_its_printed_config(slimming: Call, site: Path, tmp_path: Path) -> None:
    words = ("train", "--model.name", "vit_tiny_patch16_224", "--data.source", site / "images", "--train.steps", "1",
             "--train.batch_size", "4", "--model.checkpoint", site / "dense.safetensors")  # fmt: skip
    words += ("--model.arguments", ",".join(f"{key}={value}" for key, value in ARGUMENTS.items()))
    path = tmp_path / "printed.yaml"
    path.write_text(slimming(*words, "--print-config").out, "utf-8")
    assert slimming(*words, "--output", tmp_path / "o").code == 0
    assert yaml_of((tmp_path / "o" / "config.yaml").read_text("utf-8")) == path.read_text("utf-8")
    assert "trained already" in slimming("train", path, "--output", tmp_path / "o").out


def test_a_config_with_a_mistake_is_not_printed(slimming: Call) -> None:
    shown = slimming("train", "--model.name", "vit", "--print-config")
    assert (shown.code, shown.out) == (2, "")
    assert "data.source is missing" in shown.err
