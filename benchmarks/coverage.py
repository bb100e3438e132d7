"""Does slimming work on a model? One row per architecture, every promise checked.

    python -m benchmarks.coverage                     the smallest member of every model file of timm, all hosts
    python -m benchmarks.coverage --every             one member of every structurally different variant
    python -m benchmarks.coverage --only swin,eva     some model files, hosts (torchvision, transformers), or rows
    python -m benchmarks.coverage --ci                a few, to see that the sweep itself works

For each model: its groups are read; weights and statistics are drawn anew; a random plan keeps about half the
units; masked must equal cut in float64, forward and backward; the slim model is saved, and loaded in another
process; costs by formula are held against the counted forward; `--onnx` exports it, for any batch size where that
goes, and compares ONNX Runtime with PyTorch on batches of one and three (also where the row is there already). Beside
it, what torch-pruning makes of the same model at the same ratio, then a forward pass (whole heads and their numbers
given for every joint projection, the classifier kept, as its documentation says for transformers).

Rows that a previous call finished are kept; `--again` makes them anew, with `--ours` except for what torch-pruning made
of the model. Every model runs in a process of its own with a time limit; one that runs out of it is a row that says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import RESULTS, store, table
from benchmarks.coverage_models import FEWER, image_shape, is_transformer, parameters, targets
from torch import nn

import slimming
from slimming.benchmarking.programs import INPUT, open_onnx, to_program, write_onnx
from slimming.counting.measured import count
from slimming.models.family import ORIGIN
from slimming.models.traced.verification import outputs
from slimming.pruning.checks import check_with_trial

OF_TRANSFORMERS = ("head_dim", "head", "mlp", "token", "block", "width")
CI = ("resnet", "swin_transformer", "eva", "mobilevit", "densenet")


def main() -> None:
    """Fill the rows that are missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="every structurally different variant of each file")
    parser.add_argument("--only", help="model files of timm, or torchvision, or transformers, with commas between")
    parser.add_argument("--ci", action="store_true", help="a few families, to see that the sweep works")
    parser.add_argument("--again", action="store_true", help="make finished rows anew")
    parser.add_argument("--failed", action="store_true", help="make rows that failed anew")
    parser.add_argument("--ours", action="store_true", help="keep what torch-pruning made of a model before")
    parser.add_argument("--part", help="a part of the rows, such as 1/2 for every second one from the first")
    parser.add_argument("--onnx", action="store_true", help="also export each slim model to ONNX")
    parser.add_argument("--seconds", type=int, default=300, help="time limit of one model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore")
    file = settings.output / "coverage.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    only = CI if settings.ci else tuple(settings.only.split(",")) if settings.only else None
    first, step = map(int, settings.part.split("/")) if settings.part else (1, 1)
    for key, family, make in islice(targets(only, settings.every), first - 1, None, step):
        done = rows.get(key)
        if done is not None and not settings.again and (done["exact"] or not settings.failed):
            if settings.onnx and done["exact"] and "export" not in done:
                done["export"] = onnx_alone(make, settings.seconds)
                print(key, "ONNX:", done["export"], flush=True)
                write(rows, settings)
            continue
        rows[key] = {"family": family, **row(make, settings, done)}
        print(key, json.dumps(rows[key]["summary"]), flush=True)
        write(rows, settings)
    write(rows, settings)
    if settings.ci and not all(one["exact"] and one["reloads"] for one in rows.values()):
        raise SystemExit("a row of the sweep is not exact")


def row(make: Callable[[], nn.Module], settings: argparse.Namespace, done: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that is known of one model; ``done`` is its row of a previous call."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "slim"
        ours = in_process(lambda: judge(make(), path, settings.onnx), settings.seconds)
        if ours.get("saved"):
            fresh = in_process(lambda: reloaded(path, make), settings.seconds)
            ours["reloads"] = fresh.get("reloads", False)
            ours["reload_error"] = fresh.get("error")
    keep = settings.ours and done is not None
    theirs = done["torch_pruning"] if keep else in_process(lambda: torch_pruning(make()), settings.seconds)
    exact = bool(ours.get("ok"))
    summary = {
        "exact": exact,
        "macs": round(ours.get("covered_macs", 0.0), 3),
        "reason": None if exact else (ours.get("reason") or ours.get("error")),
        "torch_pruning": theirs.get("result") or theirs.get("error"),
    }
    seconds = round(time.perf_counter() - began, 1)
    return {**ours, "exact": exact, "torch_pruning": theirs, "summary": summary, "seconds": seconds}


def in_process(work: Callable[[], dict[str, Any]], seconds: int) -> dict[str, Any]:
    """What ``work`` gives, in a forked process with a time limit; an error as an entry."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        try:
            send.send(work())
        except BaseException as error:  # whatever it is belongs into the row
            first = (str(error).splitlines() or [""])[0][:200]
            where = traceback.extract_tb(error.__traceback__)[-1]
            send.send({"error": f"{type(error).__name__}: {first} ({where.name})"})

    process = context.Process(target=run)
    process.start()
    found = receive.recv() if receive.poll(seconds) else {"error": f"no result within {seconds} s"}
    if process.is_alive():
        process.kill()
    process.join()
    return found


def judge(model: nn.Module, path: Path, onnx: bool) -> dict[str, Any]:
    """Run the contract, and leave the slim model with its output at ``path``."""
    found, trial = check_with_trial(model)
    reason = next((f"{step.name}: {step.detail}" for step in found.steps if not step.held), None)
    result: dict[str, Any] = {
        "ok": found.ok,
        "reason": reason,
        "kinds": found.kinds,
        "covered_params": found.covered_params,
        "covered_macs": found.covered_macs,
        "steps": {step.name: step.detail for step in found.steps},
        "uncovered": list(found.uncovered),
        "input": list(image_shape(model)),
        "params": parameters(model),
        "made_with": {k: v for k, v in model.__dict__.get(ORIGIN, {}).get("arguments", {}).items() if k in FEWER},
    }
    if found.ok and trial is not None:
        slimming.save(trial.small, path)
        expected = [out.detach() for out in outputs(trial.small, trial.image)]
        torch.save({"image": trial.image, "outputs": expected}, path.parent / "expected.pt")
        result["saved"] = True
        if onnx:
            result["export"] = exported(trial.small.float(), trial.image.float(), path.with_suffix(".onnx"))
    return result


def exported(model: nn.Module, image: torch.Tensor, file: Path) -> str:
    """Which batches the ONNX file takes and how far its logits are off, as a share of the largest; or why it fails."""
    torch.manual_seed(0)
    batches = [torch.randn(size, *image.shape[1:]) for size in (1, 3)]
    try:
        try:
            program, what = to_program(model, batches[1], any_batch=True), "any batch"
        except slimming.errors.UnsupportedModelError:
            batches = batches[:1]
            program, what = to_program(model, batches[0], any_batch=False), "one image"
        write_onnx(model, batches[-1], file, program=program)
        session = open_onnx(file)
        worst = 0.0
        for batch in batches:
            found = [torch.from_numpy(one) for one in session.run(None, {INPUT: batch.numpy()})]
            with torch.no_grad():
                wanted = outputs(model, batch)
            off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
            worst = max(worst, *off)
        return f"{what}, {worst:.0e}"
    except Exception as error:  # whatever the exporter raises
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def onnx_alone(make: Callable[[], nn.Module], seconds: int) -> str:
    """The entry of a row that was made without it."""
    with tempfile.TemporaryDirectory() as directory:
        found = in_process(lambda: judge(make(), Path(directory) / "slim", onnx=True), seconds)
    return found.get("export") or found.get("error") or "not exact this time"


def reloaded(path: Path, make: Callable[[], nn.Module]) -> dict[str, Any]:
    """Load in a process that never saw the model, and compare; a wrapper of ours is made here."""
    kept = torch.load(path.parent / "expected.pt", weights_only=True)
    try:
        model = slimming.load(path)
    except slimming.errors.CheckpointError:
        model = slimming.load(path, dense=make())
    with torch.no_grad():
        found = outputs(model, kept["image"])
    same = all(
        float((a - b).abs().max()) <= 1e-9 * float(b.abs().max()) for a, b in zip(found, kept["outputs"], strict=True)
    )
    return {"reloads": same}


def torch_pruning(model: nn.Module) -> dict[str, Any]:
    """Cut to half with torch-pruning by magnitude, then a forward pass."""
    tp: Any = importlib.import_module("torch_pruning")

    shape = image_shape(model)
    image = torch.randn(1, *shape)
    before = count(model, shape).macs
    joint: list[Any] = [m for m in model.modules() if isinstance(vars(m).get("num_heads"), int)]
    heads = {m.qkv: m.num_heads for m in joint if isinstance(m._modules.get("qkv"), nn.Linear)}
    classifiers = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=classifiers,
        num_heads=heads,
    )
    pruner.step()
    for m in joint:
        if m._modules.get("qkv") in heads:
            m.num_heads = pruner.num_heads[m.qkv]
            width = m.qkv.out_features // 3
            for name, value in (("head_dim", width // m.num_heads), ("attn_dim", width)):
                if name in vars(m):
                    setattr(m, name, value)
    with torch.no_grad():
        model(image)
    share = count(model, shape).macs / before
    return {"result": "unchanged" if share > 0.999 else "runs", "macs": share}


def write(rows: dict[str, Any], settings: argparse.Namespace) -> None:
    """Write all rows so far, and the table."""
    header = ["model", "file", "made with", "kinds", "MACs covered", "params", "exact", "reloads", "ONNX"]
    header += ["torch-pruning", "s"]
    lines = []
    for key, one in sorted(rows.items()):
        theirs = one["torch_pruning"]
        share = f", {theirs['macs']:.0%} of MACs" if "macs" in theirs else ""
        lines.append(
            [
                key,
                one["family"],
                ", ".join(f"{k}={v}" for k, v in one.get("made_with", {}).items()) or "–",
                ", ".join(f"{number} {kind}" for kind, number in one.get("kinds", {}).items()) or "–",
                f"{one.get('covered_macs', 0):.0%}",
                f"{one.get('covered_params', 0):.0%}",
                "yes" if one["exact"] else _short(one["summary"]["reason"]),
                {True: "yes", False: "no"}.get(one.get("reloads"), "–"),
                _short(one.get("export") or {"yes": "one image, not compared"}.get(one.get("onnx"), one.get("onnx"))),
                _short(theirs.get("result") or theirs.get("error")) + share,
                f"{one['seconds']:.0f}",
            ]
        )
    exact = [one for one in rows.values() if one["exact"]]
    wide = [one for one in exact if one["covered_macs"] >= 0.6]
    tried = [one["export"] for one in exact if "export" in one]
    close = [text for text in tried if text.startswith(("any", "one")) and float(text.split()[-1]) <= 1e-4]
    every = sum(text.startswith("any") for text in close)
    runs = [one for one in rows.values() if one["torch_pruning"].get("result") == "runs"]
    attending = [one for key, one in rows.items() if is_transformer(key, one["family"])]
    offer = {kind: sum(kind in one.get("kinds", {}) for one in attending) for kind in OF_TRANSFORMERS}
    text = (
        f"{len(rows)} architectures: {len(exact)} read and exact, {len(wide)} of them with at least "
        f"60 % of their MACs in units that can go. torch-pruning cuts and still runs {len(runs)} of them. "
        "Exact: masked equals cut in float64 within 1e-9, forward and backward, with every weight random; costs by "
        "formula equal the counted ones within 0.5 %; the slim model saves and loads. "
        f"{len(tried)} slim models were exported to ONNX: {len(close)} say what the model says within 1e-4 of the "
        f"largest output, {every} of them for any batch size. Of the {len(attending)} transformers among them, "
        + ", ".join(f"{number} ({number / max(len(attending), 1):.0%}) offer {kind}" for kind, number in offer.items())
        + ".\n\n"
    )
    store("coverage", settings, text + table(header, lines), rows=rows)


def _short(text: str | None) -> str:
    return (text or "–").replace("|", "/").replace("\n", " ")[:110]


if __name__ == "__main__":
    main()
