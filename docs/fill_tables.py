"""Fill the parts of README.md and docs/ that are made from result files and from the code itself.

    python docs/fill_tables.py            write them
    python docs/fill_tables.py --check    only say which files are out of date

A part lies between ``<!-- KIND:NAME -->`` and ``<!-- /KIND:NAME -->``. Kinds: ``results`` (a table of
``benchmarks/results/NAME.json`` or ``NAME.md``), ``summary`` (a short table of one of these files), ``registry`` (the
entries of a registry of the package), ``config`` (the fields of a dataclass of settings) and ``api`` (signature and
first sentence of a public name).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import slimming
from slimming.core.kinds import KINDS
from slimming.scoring.registry import SCORES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"(<!-- (results|summary|registry|config|api):([\w.]+) -->\n)(.*?)(<!-- /\2:\3 -->)", re.DOTALL)

COLOURS = re.compile(r"\x1b?\[\d+m")
"""Colours of a terminal, which messages of other tools bring along."""

CONFIGS = (
    "RunConfig",
    "ModelConfig",
    "DataConfig",
    "SearchConfig",
    "Layout",
    "TrainConfig",
    "DistilConfig",
    "Budget",
    "BenchConfig",
)
"""Public dataclasses of settings, each with a table in docs/configuration.md."""
TORCH_PRUNING = ("magnitude", "taylor", "hessian")
"""How the criteria of Torch-Pruning begin in the names of methods in ``accuracy.json``."""


def documents() -> list[Path]:
    """README.md, every page below docs/ and the notes on benchmarks."""
    notes = (ROOT / "benchmarks" / "notes").glob("*.md")
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(notes)]


def filled(text: str) -> str:
    """``text`` with every part made anew."""
    return PART.sub(lambda found: f"{found[1]}{MAKERS[found[2]](found[3]).strip()}\n{found[5]}", text)


def results_table(name: str) -> str:
    """The table of a committed result, or a line that says that there is none yet."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "dense" in content and isinstance(content.get("rows"), list):  # of a run
        return run_table(content)
    written = path.with_suffix(".md")
    if written.exists():
        lines = [line for line in written.read_text("utf-8").splitlines() if not line.startswith("# ")]
        return COLOURS.sub("", "\n".join(lines)).strip()
    return f"*Not measured yet: `benchmarks/results/{name}.md` does not exist.*"


def run_table(results: Mapping[str, Any]) -> str:
    """The table of budgets of a run's ``results.json``."""
    dense, rows = results["dense"], results["rows"]
    sizes = list(dense["latency_ms"])
    one_shot = any("top1_one_shot" in row for row in rows)
    header = ["budget", "params", "MACs", "memory", *(f"ms at batch {size}" for size in sizes)]
    header += [*(f"speed-up, batch {size}" for size in sizes), *(["top-1 in one shot"] if one_shot else [])]
    header += ["top-1 after the cut", "top-1 retrained"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in (dense, *rows):
        cells = [row["name"], f"{row['params'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.1f} M"]
        cells.append(f"{row['memory_bytes'] / 2**20:.2f} MiB")
        cells += [_spread(row["latency_ms"][size], 2) for size in sizes]
        slim = row is not dense
        cells += [_spread(row["speedup"][size], 2, "×") if slim else "1" for size in sizes]
        cells += [_percent(row["top1_one_shot"]) if slim else ""] if one_shot else []
        cells += [_percent(row["top1_cut"]) if slim else "", _percent(row["top1"])]
        lines.append(cells)
    runtime = results.get("settings", {}).get("bench", {}).get("runtime", "eager")
    machine, versions, data = results["machine"], results["versions"], results["data"]
    what = (data["note"] or data["source"]).rstrip(".")
    size = "×".join(map(str, results["model"]["input"][1:]))
    note = (
        f"Model: {results['model']['name']} at {size} pixels. Data: {what}; {data['train_images']} images to train "
        f"on, {data['val_images']} to validate on. One run, seed {results['seed']}. Times are medians (quartiles) on "
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, PyTorch {versions['torch']}, {runtime}; "
        "they hold for that machine only."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}"


def summary(name: str) -> str:
    """A short table of a committed result."""
    content = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    header, rows = SUMMARIES[name](content)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_summary(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Size, speed and accuracy of the models of the demo: header and rows."""
    sizes = list(results["dense"]["latency_ms"])
    header = ["model", "params", "MACs", *(f"speed-up, batch {size}" for size in sizes)]
    header += ["top-1, one-shot, no training", "top-1, search and retraining"]
    rows = []
    for row in (results["dense"], *results["rows"]):
        slim = row is not results["dense"]
        cells = [row["name"].replace("macs-0.", "MACs × 0."), f"{row['params'] / 1e6:.2f} M"]
        cells.append(f"{row['macs'] / 1e6:.1f} M")
        cells += [f"{row['speedup'][size]['median']:.2f}×" if slim else "1" for size in sizes]
        rows.append([*cells, f"{row['top1_one_shot' if slim else 'top1']:.1%}", f"{row['top1']:.1%}" if slim else ""])
    return header, rows


def accuracy_summary(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One-shot, search and the best criterion of Torch-Pruning, after the cut and retrained: header and rows.

    Means over seeds; retrained for the longest time that was tried.
    """
    methods = ("one-shot", "search", "Torch-Pruning")
    header = ["model", "dense", "MACs left", *(f"cut: {method}" for method in methods)]
    header += ["epochs", *(f"retrained: {method}" for method in methods)]
    rows = []
    for model, dense in content["dense"].items():
        top1 = f"{mean(dense['top1'].values()):.1%}"
        for budget in ("0.5", "0.3"):
            cut, retrained = _by_method(content["rows"], model, budget)
            longest = max(retrained["one-shot"], key=float)
            after = {method: values[longest] for method, values in retrained.items() if longest in values}
            cells = [model, top1, f"{float(budget):.0%}", *_three(cut)]
            rows.append([*cells, f"{float(longest):g}", *_three(after)])
    return header, rows


def _by_method(
    rows: Mapping[str, Any], model: str, budget: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Mean top-1 over seeds: method -> straight after the cut, and method -> epochs -> retrained."""
    cut: dict[str, list[float]] = {}
    retrained: dict[str, dict[str, list[float]]] = {}
    for key, row in rows.items():
        of, part, method, share, _ = key.split("/")
        if (of, part, share) == (model, "all", budget):
            cut.setdefault(method, []).append(row["top1"])
            for epochs, top1 in row["retrained"].items():
                retrained.setdefault(method, {}).setdefault(epochs, []).append(top1)
    means = {method: {epochs: mean(top1) for epochs, top1 in found.items()} for method, found in retrained.items()}
    return {method: mean(top1) for method, top1 in cut.items()}, means


def _three(top1: Mapping[str, float]) -> list[str]:
    best = max(value for method, value in top1.items() if method.startswith(TORCH_PRUNING))
    return [f"{value:.1%}" for value in (top1["one-shot"], top1["search"], best)]


SUMMARIES: Mapping[str, Callable[[Mapping[str, Any]], tuple[list[str], list[list[str]]]]] = {
    "demo": demo_summary,
    "accuracy": accuracy_summary,
}


def _spread(value: Mapping[str, float], digits: int, unit: str = "") -> str:
    return f"{value['median']:.{digits}f}{unit} ({value['p25']:.{digits}f}–{value['p75']:.{digits}f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def config_table(name: str) -> str:
    """Key, default and meaning of every field of a dataclass of settings."""
    cls = getattr(slimming, name)
    meanings = attributes(cls)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        kind = str(field.type).replace("|", "\\|")
        meaning = meanings[field.name].replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{kind}` | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def attributes(cls: type) -> dict[str, str]:
    """The entries under ``Attributes:`` of a class docstring, each on one line, as Markdown."""
    text = inspect.getdoc(cls) or ""
    section = text.partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif line.startswith("        ") and name:
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return {key: _plain(value) for key, value in found.items()}


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default_factory()
    if dataclasses.is_dataclass(value):
        return f"see `{type(value).__name__}`{_differences(value)}"
    return f"`{_yaml(value)}`"


def _differences(value: Any) -> str:
    """What a default object changes of its class's own defaults."""
    own = {field.name: field.default for field in dataclasses.fields(value)}
    given = {name: getattr(value, name) for name, default in own.items() if default is not dataclasses.MISSING}
    changed = [f"`{name}: {_yaml(entry)}`" for name, entry in given.items() if entry != own[name]]
    return f", with {', '.join(changed)}" if changed else ""


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else '""' if value == "" else str(value)


def _plain(text: str) -> str:
    return text.replace("``", "`").replace('`"', "`").replace('"`', "`")


def api_entry(name: str) -> str:
    """Signature and first sentence of a public name of the package."""
    value = getattr(slimming, name)
    first = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
    return f"```text\n{_signature(name, value)}\n```\n\n{_plain(first)}"


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    arrow = "" if isinstance(value, type) else f" -> {signature.return_annotation}"
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        # Annotations are strings here, which some versions of Python print in quotes.
        text = re.sub(r": '([^']*)'", r": \1", str(parameter)).replace("<factory>", "...")
        parts.append(re.sub(r"<built-in function (\w+)>", r"\1", text))
    line = f"slimming.{name}({', '.join(parts)}){arrow}"
    if len(line) <= 100:
        return line
    return f"slimming.{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow}"


def registry(name: str) -> str:
    """The names of a registry of the package with their descriptions."""
    header, rows = REGISTRIES[name]()
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def scores() -> tuple[list[str], list[list[str]]]:
    """Every score: name, definition, and what it is computed from."""
    rows = []
    for name, score in SCORES.items():
        needs = [
            "images" if score.needs_images else "",
            "labels" if score.needs_labels else "",
            "" if score.one_shot else "a search",
        ]
        rows.append([f"`{name}`", score.description, ", ".join(filter(None, needs)) or "weights only"])
    return ["score", "definition", "needs"], rows


def kinds() -> tuple[list[str], list[list[str]]]:
    """Every kind of unit: name, unit, and whether it has to be asked for."""
    rows = [
        [f"`{name}`", kind.description, "on request" if kind.on_request else "by default"]
        for name, kind in KINDS.items()
    ]
    return ["kind", "unit", "pruned"], rows


REGISTRIES: Mapping[str, Callable[[], tuple[list[str], list[list[str]]]]] = {"scores": scores, "kinds": kinds}

MAKERS: Mapping[str, Callable[[str], str]] = {
    "results": results_table,
    "summary": summary,
    "registry": registry,
    "config": config_table,
    "api": api_entry,
}


def main() -> int:
    """Write or check every page; the exit status is 1 when a checked page is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = False
    for path in documents():
        text = path.read_text("utf-8")
        new = filled(text)
        if new != text:
            stale = True
            print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
            if not check:
                path.write_text(new, "utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
