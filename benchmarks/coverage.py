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
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import RESULTS, store, table
from torch import nn

import slimming
from slimming.benchmarking.programs import INPUT, open_onnx, to_program, write_onnx
from slimming.counting.measured import count
from slimming.models.family import ORIGIN
from slimming.models.traced.rebuild import input_shape
from slimming.models.traced.verification import outputs
from slimming.pruning.checks import check_with_trial

SIZES = (64, 96, 128, 160, 192, 224, 256, None)
"""Image sizes to try, the smallest that a model takes is used; None is its own."""
FEWER: dict[str, Any] = {"depth": 2, "depths": (1, 1, 1, 1), "layers": (1, 1, 1, 1)}
LARGE = 15_000_000
"""Models with more parameters are made with few blocks, where their constructor allows it; the row says so."""
TOO_LARGE = (
    "convnext_large", "regnet_y_128gf", "regnet_y_32gf", "vgg13", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_h_14",
    "vit_l_16", "vit_l_32",
)  # fmt: skip
"""Classifiers of torchvision above 120 million parameters that are larger members of rows that are there."""
OF_TRANSFORMERS = ("head_dim", "head", "mlp", "token", "block", "width")
ATTENTION = (
    "beit", "cait", "coat", "convit", "crossvit", "davit", "deepseek_vit", "deit", "efficientformer",
    "efficientformer_v2", "eva", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "levit", "maxxvit", "mobilevit",
    "mvitv2", "naflexvit", "nest", "pit", "pvt_v2", "qwen3_vit", "swin_transformer", "swin_transformer_v2",
    "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
)  # fmt: skip
"""Model files of timm whose models are transformers: blocks of attention, alone or after convolutions."""
CI = ("resnet", "swin_transformer", "eva", "mobilevit", "densenet")
WINDOWED = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", {}),
    "deit": ("DeiTModel", {}),
    "dinov2": ("Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {}),
    "dinov3_vit": ("DINOv3ViTModel", {}),
    "beit": ("BeitModel", {}),
    "clip_vision": ("CLIPVisionModel", {}),
    "siglip_vision": ("SiglipVisionModel", {}),
    "siglip2_vision": ("Siglip2VisionModel", {}),
    "swin": ("SwinModel", {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4}),
    "swinv2": (
        "Swinv2Model",
        {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4},
    ),
    "pvt": ("PvtModel", {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}),
    "pvt_v2": ("PvtV2Model", {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}),
    "segformer": ("SegformerModel", {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}),
    "yolos": ("YolosModel", {"image_size": [64, 64]}),
}
"""Model type of transformers -> class and arguments of its configuration beside the small ones."""
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}


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


def targets(only: tuple[str, ...] | None, every: bool) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Key, family and maker of each model."""
    import timm
    import torchvision

    def wanted(*names: str) -> bool:
        return only is None or any(name in only for name in names)

    for module in timm.list_modules():
        rows = {f"timm/{name}" for name in timm.list_models(module=module)}
        if wanted(module):
            for name in variants(module, every):
                yield f"timm/{name}", module, lambda name=name: small_timm(name)
        elif only is not None:
            for key in sorted(rows.intersection(only)):
                yield key, module, lambda key=key: small_timm(key.removeprefix("timm/"))
    for name in torchvision.models.list_models(module=torchvision.models):
        if wanted("torchvision", key := f"torchvision/{name}") and name not in TOO_LARGE:
            yield key, "torchvision", lambda name=name: small_torchvision(name)
    for name in TRANSFORMERS:
        if wanted("transformers", key := f"transformers/{name}"):
            yield key, "transformers", lambda name=name: small_transformers(name)


def variants(module: str, every: bool) -> list[str]:
    """The smallest model of each structure in one model file of timm; only the smallest by default.

    A structure is the set of classes of the modules that hold parameters, so that another activation is no other.
    """
    import timm

    found: dict[frozenset[str], tuple[int, str]] = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:  # a few cannot be made on the meta device
                model = timm.create_model(name).to("meta")
        owners = (m for m in model.modules() if any(True for _ in m.parameters()))
        classes = frozenset(f"{type(m).__module__}.{type(m).__qualname__}" for m in owners)
        size = parameters(model)
        found[classes] = min(found.get(classes, (size, name)), (size, name))
    names = [name for _, name in sorted(found.values())]
    return names if every else names[:1]


def small_timm(name: str) -> nn.Module:
    """The model at the smallest image size that it takes, and with few blocks where it is large."""
    error: Exception | None = None
    for size in SIZES:
        overlay: dict[str, Any] = {} if size is None else {"pretrained_cfg_overlay": {"input_size": (3, size, size)}}
        options: tuple[dict[str, Any], ...] = ({"img_size": size}, {}) if size else ({},)
        for sized in options:
            try:
                model, fewer = shallow(name, {**sized, **overlay})
                with torch.no_grad():
                    model(torch.randn(1, *input_shape(model)))
                # So that the slim model is made the same way when it is loaded.
                model.__dict__[ORIGIN] = {"name": name, "arguments": {**sized, **overlay, **fewer}}
                return model
            except Exception as raised:  # hosts raise anything where a size does not fit
                error = raised
    raise RuntimeError(f"{name} takes no image: {error}")


def shallow(name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model in evaluation mode, and the argument that made it less deep if it has many parameters."""
    import timm

    with torch.device("meta"):
        try:
            size = parameters(timm.create_model(name, **options))
        except Exception:  # a few cannot be made on the meta device
            size = 0
    if size > LARGE:
        for fewer in [{key: value} for key, value in FEWER.items()]:
            try:
                model = timm.create_model(name, **options, **fewer).eval()
            except Exception:  # its constructor has no such argument
                continue
            if parameters(model) < size:
                return model, fewer
    return timm.create_model(name, **options).eval(), {}


def parameters(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def small_transformers(name: str) -> nn.Module:
    """A small random model from its configuration."""
    import transformers

    cls, extra = TRANSFORMERS[name]
    config = getattr(transformers, cls).config_class()
    known = config.to_dict()
    config = type(config)(**{k: v for k, v in {**SMALL, **extra}.items() if k in known and (k not in extra or v)})
    model = getattr(transformers, cls)(config).eval()
    return OfPatches(model) if cls == "Siglip2VisionModel" else model


class OfPatches(nn.Module):
    """SigLIP 2 takes patches of images of any size; this makes them of one image (B, 3, 64, 64)."""

    image_size = 64

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> Any:
        """Cut the image into patches (B, 16, 768), row by row."""
        patches = nn.functional.unfold(image, 16, stride=16).transpose(1, 2)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        return self.model(patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[4, 4]] * len(image)))


def small_torchvision(name: str) -> nn.Module:
    """The model at full size, at the smallest image size that it takes."""
    import torchvision

    for size in SIZES:
        sized = {"image_size": size} if size and name.startswith("vit_") else {}
        model: Any = torchvision.models.get_model(name, **sized).eval()
        if size:
            model.image_size = size
        try:
            with torch.no_grad():
                model(torch.randn(1, *input_shape(model)))
        except Exception:  # it does not take images as small
            continue
        return model
    raise RuntimeError(f"{name} takes no image")


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
        "input": list(input_shape(model)),
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

    shape = input_shape(model)
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


def is_transformer(key: str, family: str) -> bool:
    """Whether the model file of a row is one of transformers, or the model of torchvision is one."""
    return family in ("transformers", *ATTENTION) or key.startswith(("torchvision/swin", "torchvision/vit"))


def _short(text: str | None) -> str:
    return (text or "–").replace("|", "/").replace("\n", " ")[:110]


if __name__ == "__main__":
    main()
