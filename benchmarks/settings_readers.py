"""Compare the reader of settings with jsonargparse and tyro, over the same dataclass and the same mistakes.

    .venv/bin/pip install jsonargparse tyro
    .venv/bin/python benchmarks/settings_readers.py

Writes two tables to results/settings_readers.md: what each says to a file with one mistake, and what each makes of
flags that users type. tyro reads no files. The decision that rests on them is in docs/design.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonargparse
import tyro

from slimming import Budget, DataConfig, ModelConfig, RunConfig
from slimming.cli.configs import config_from_values, read_config
from slimming.cli.entry import make_parser

NEEDED = {"model": {"name": "m"}, "data": {"source": "d"}, "budgets": [{"macs": 0.5}]}
FILES: tuple[dict[str, Any], ...] = (
    {"retrian": {"lr": 1.0}},
    {"search": {"train": {"batchsize": 1}}},
    {"search": {"preset": "paper"}},
    {"budgets": [{"mac": 0.5}]},
    {"budgets": [{"macs": 0.5}, {"macs": 2.0}]},
    {"retrain": {"epochs": "ten"}},
    {"retrain": {"steps": 1.5}},
    {"retrain": {"lr": -1.0}},
    {"retrain": 3},
    {"search": {"kinds": "mlp"}},
    {"search": {"penalty": {"mlp": 3.0}}},
    {"distil": {"alpha": "x"}},
    {"model": {}},
)
FLAGS = (
    "--search.kinds mlp,token",
    "--search.penalty mlp=0.5",
    "--search.preset paper",
    "--budget macs=0.5 --budget keep.mlp=0.7",
    "--bench.batch_sizes 1,8",
    "--model.arguments img_size=64",
    "--retrain.ema null",
    "--retrain.lr 1e-4",
    "--retrain.epochs ten",
    "--retrain.epoch 1",
    "--distil null --distil.alpha 0.3",
)


def by_slimming(values: Mapping[str, Any]) -> Any:
    return config_from_values(RunConfig, values)


def by_jsonargparse(values: Mapping[str, Any]) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    return parser.instantiate_classes(parser.parse_object(dict(values)))


def flags_by_slimming(words: list[str]) -> Any:
    needed = ["--model.name", "m", "--data.source", "d", *([] if "--budget" in words else ["--budget", "macs=0.5"])]
    return read_config(RunConfig, make_parser("run").parse_args([*needed, *words]))[0]


def flags_by_jsonargparse(words: list[str]) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    needed = ["--model.name", "m", "--data.source", "d", "--budgets", "[{macs: 0.5}]"]
    return parser.instantiate_classes(parser.parse_args([*needed, *words]))


def flags_by_tyro(words: list[str]) -> Any:
    base = RunConfig(model=ModelConfig(name="m"), data=DataConfig(source="d"), budgets=(Budget(macs=0.5),))
    return tyro.cli(RunConfig, args=words, default=base, use_underscores=True)


def answer(read: Callable[[Any], Any], given: Any) -> str:
    """What a reader says: the class and first line of its error with the number of lines, or that it takes it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            read(given)
    except (Exception, SystemExit) as error:  # each library has its own errors, and some are mistakes of its own
        lines = [line for line in (said.getvalue() or str(error)).splitlines() if line.strip(" ╭╮╰╯─│-")]
        more = f" … ({len(lines)} lines)" if len(lines) > 1 else ""
        return f"{type(error).__name__}: {' '.join(' '.join(lines[:3]).split()).replace('|', '/')[:150]}{more}"
    return "taken"


def import_ms(module: str) -> float:
    """Milliseconds that a module takes to import, the least of five."""
    program = f"import time; t = time.perf_counter(); import {module}; print(1000 * (time.perf_counter() - t))"
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "12345"
    ]
    return min(float(run.stdout) for run in runs)


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of settings that a help page names."""
    words = {word.strip(",[]") for word in parser.format_help().split()}
    return {word for word in words if re.fullmatch(r"--[a-z_.]+", word)} - {"--help", "--output", "--print-config"}


def tables() -> Iterator[str]:
    """The lines of both tables, what the two help pages name, and how long each takes to import."""
    yield "# What readers of settings say to the same mistakes\n"
    yield ", ".join(f"{name} {version(name)}" for name in ("jsonargparse", "tyro")) + ".\n"
    yield "| file | slimming | jsonargparse |\n|---|---|---|"
    for change in FILES:
        values = {**NEEDED, **change}
        yield f"| `{change}` | {answer(by_slimming, values)} | {answer(by_jsonargparse, values)} |"
    yield "\n| flags | slimming | jsonargparse | tyro |\n|---|---|---|---|"
    for line in FLAGS:
        readers = (flags_by_slimming, flags_by_jsonargparse, flags_by_tyro)
        yield f"| `{line}` | {' | '.join(answer(read, line.split()) for read in readers)} |"
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    ours, theirs = options(make_parser("run")), options(parser)
    yield f"\nOptions of `run` that the help of jsonargparse lacks: {', '.join(sorted(ours - theirs))}."
    yield f"\nOptions that it adds: {', '.join(sorted(theirs - ours))}."
    times = (f"{name} {import_ms(name):.0f}" for name in ("argparse, yaml", "jsonargparse", "tyro"))
    yield f"\nMilliseconds of import, the least of five: {'; '.join(times)}."


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    target = Path(__file__).parent / "results" / "settings_readers.md"
    target.write_text("\n".join(tables()) + "\n", "utf-8")
    print(target)
