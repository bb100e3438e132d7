"""What every benchmark needs: where it ran, interleaved timing, and writing results down."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"

FIRST_ORDER: dict[str, Any] = {"score": "taylor", "sensitivity": 128, "rotate": False}
"""Settings of searches ranked by what they collect: what the results of some scripts here were measured with."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, all in one unit."""

    median: float
    p25: float
    p75: float
    runs: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of ``values`` (at least one)."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        p25, median, p75 = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, p25, p75, len(values))

    def text(self, digits: int = 3) -> str:
        """Median with its quartiles, for tables."""
        return f"{self.median:.{digits}f} ({self.p25:.{digits}f}–{self.p75:.{digits}f})"


def parser(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """An argument parser with what all benchmarks take; ``rounds`` only where something is timed."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        found.add_argument("--rounds", type=int, default=rounds, help="measurements of each case")
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--output", type=Path, default=RESULTS, help="directory of the result files")
    return found


def machine(threads: int) -> dict[str, Any]:
    """The machine that the measurements are of."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "os": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("slimming", "torch", "timm", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def interleaved(
    cases: Mapping[str, Callable[[], object]], *, rounds: int, threads: int, number: int = 1
) -> dict[str, list[float]]:
    """Time every case once per round, so that a drift of the machine meets all of them alike.

    Args:
        cases: what to time, by name; each is called once beforehand to warm up.
        rounds: measurements of each case; the order turns by one from round to round.
        threads: threads that torch may use.
        number: calls per measurement.

    Returns:
        Seconds per call, one entry per round, by name. Entries of one round belong together.
    """
    # torch.utils.benchmark makes two unmeasured calls before each measurement, which triples the time of
    # long steps. One warm-up per case is enough where every case is called again and again.
    torch.set_num_threads(threads)
    timers = {name: timeit.Timer(run) for name, run in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for name, timer in timers.items():
        print(f"warm-up: {name}, {timer.timeit(1):.2f} s", file=sys.stderr, flush=True)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(timers[name].timeit(number) / number)
        print(f"\rround {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of quotients, each taken within one round."""
    return Spread.of([above / below for above, below in zip(numerator, denominator, strict=True)])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write(name: str, *, settings: argparse.Namespace, rows: Sequence[Mapping[str, Any]], markdown: str) -> None:
    """`store` for timings: a line below the table says where they were taken; the table is printed.

    `Spread` values in ``rows`` become objects.
    """
    plain = [{key: asdict(value) if isinstance(value, Spread) else value for key, value in row.items()} for row in rows]
    where, used = machine(settings.threads), versions()
    words = ", ".join(f"{key} {value}" for key, value in chosen(settings).items())
    place = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    stack = ", ".join(f"{key} {value}" for key, value in used.items())
    text = f"{markdown.rstrip()}\n\nMedian (quartiles). {place}; {stack}; {words}.\n"
    store(name, settings, text, rows=plain)
    print(text)


def chosen(settings: argparse.Namespace) -> dict[str, Any]:
    """The settings that a result depends on: no places, and not which part of it this call made."""
    return {k: v for k, v in vars(settings).items() if not isinstance(v, Path) and k not in ("only", "again", "failed")}


def store(name: str, settings: argparse.Namespace, markdown: str, **content: Any) -> None:
    """Write ``name.json`` (where, with what, ``content``) and ``name.md`` to the directory of ``settings``."""
    head = {"name": name, "settings": chosen(settings), "machine": machine(settings.threads), "versions": versions()}
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / f"{name}.json").write_text(json.dumps(head | content, indent=1) + "\n", "utf-8")
    (settings.output / f"{name}.md").write_text(f"# {name}\n\n{markdown}", "utf-8")
