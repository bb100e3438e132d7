"""Checkpoints that try to run code, to open other files, or to reach the network, with correct checksums."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.models import save_for_hf

import slimming
from slimming.core.files import seal
from slimming.errors import SlimmingError

from .tally import Tally

SECONDS = 5
SEALED = "structure.json"
KEYS = (
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "file", "url",
    "hf_hub_id", "hf_hub_filename", "state_dict", "custom_load", "weights", "weights_backbone", "progress", "backbone",
    "use_timm_backbone", "use_pretrained_backbone", "backbone_config", "backbone_kwargs", "auto_map",
    "trust_remote_code", "_name_or_path", "name_or_path", "code_revision", "model_type", "architectures",
    "quantization_config", "adapter", "norm_layer", "act_layer", "block", "mlp_layer", "embed_layer", "hidden_act",
    "attn_implementation", "_attn_implementation", "scriptable", "exportable", "features_only", "torch_dtype", "dtype",
    "img_size", "image_size", "num_classes", "depth", "num_hidden_layers", "embed_dim", "hidden_size", "patch_size",
    "in_chans", "num_channels", "name", "architecture", "class", "host", "config_class", "__class__", "x",
)  # fmt: skip
"""Names that a file may use as an argument of a constructor."""


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class Guard:
    """An audit hook that notes what a hostile file must not cause, while it is armed."""

    FORBIDDEN = (
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "subprocess.Popen",
        "os.system",
        "os.exec",
    )

    def __init__(self) -> None:
        self.trap, self.seen = "", []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note a forbidden event, or that the trap is opened."""
        if not self.trap:
            return
        opened = event == "open" and isinstance(arguments[0], str) and os.path.realpath(arguments[0]) == self.trap
        if opened or event in self.FORBIDDEN:
            self.seen.append(f"{event} {arguments[0]}")


def good_directories(root: Path) -> dict[str, Path]:
    """Write one directory for each way to name a model in a file."""
    root.mkdir()
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=32, num_classes=2)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    hosted = transformers.ViTForImageClassification(config)
    slimming.save(vit, root / "timm ViT")
    slimming.save(timm.create_model("test_resnet", num_classes=2), root / "timm CNN")
    slimming.save(torchvision.models.mobilenet_v3_small(num_classes=2), root / "torchvision")
    slimming.save(hosted, root / "transformers")
    save_for_hf(vit, str(root / "saved by timm"), safe_serialization=True)
    hosted.save_pretrained(root / "saved by transformers")
    return {path.name: path for path in sorted(root.iterdir())}


def attack(tally: Tally, good: dict[str, Path], root: Path, guard: Guard, times: int, seed: int) -> None:
    """Load directories that name an odd argument at a random place, each with a correct checksum.

    Loading must end within seconds in a model or an error of slimming, and open, run or reach nothing else.
    """
    dice, names = random.Random(seed), list(good)
    with _trap(root, guard) as (trap, mark):
        values = _values(trap)
        for number in range(times):
            name = names[number % len(names)]

            def spoil(base: dict[str, Any]) -> str:
                key, place = dice.choice(KEYS), dice.choice(list(_mappings(base)))
                if dice.random() < 0.25 and place:  # in the place of an entry that is there
                    key = dice.choice(list(place))
                place[key] = value = dice.choice(values)
                return f"{key} = {value!r}"

            _try(tally, name, good[name], root / "hostile", trap, mark, guard, spoil)


def attack_arguments(tally: Tally, good: dict[str, Path], root: Path, guard: Guard) -> None:
    """Load directories in which every name in `KEYS`, at every place, names a pickle; see `attack`."""
    with _trap(root, guard) as (trap, mark):
        for name, directory in good.items():
            places = len(list(_mappings(_read(directory)[1])))
            for key, place in itertools.product(KEYS, range(places)):

                def spoil(base: dict[str, Any], key: str = key, place: int = place) -> str:
                    list(_mappings(base))[place][key] = str(trap)
                    return f"{key} in mapping {place}"

                _try(tally, name, directory, root / "hostile", trap, mark, guard, spoil)


@contextlib.contextmanager
def _trap(root: Path, guard: Guard) -> Iterator[tuple[Path, Path]]:
    """Arm the guard; yield the pickle, and the file that it makes when it is loaded."""
    mark, trap = root / "mark", root / "trap.pth"
    trap.write_bytes(pickle.dumps(Trap(mark)))
    guard.trap = os.path.realpath(trap)
    try:
        yield trap, mark
    finally:
        guard.trap = ""


def _try(
    tally: Tally,
    name: str,
    good: Path,
    directory: Path,
    trap: Path,
    mark: Path,
    guard: Guard,
    spoil: Callable[[dict[str, Any]], str],
) -> None:
    shutil.copytree(good, directory)
    guard.trap, armed = "", guard.trap
    shutil.copy(trap, directory / "pytorch_model.bin")
    guard.trap = armed
    path, base, content = _read(directory)
    what = spoil(base)
    if path.name == SEALED:
        content = seal({entry: value for entry, value in content.items() if entry != "sha256"})
    path.write_text(json.dumps(content), "utf-8")
    fault = _fault(directory, guard, mark)
    tally.add(None if fault is None else f"{name}: {what}: {fault}")
    shutil.rmtree(directory)


def _read(directory: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The file of a directory that names the model, the part of it with arguments, and its content."""
    path = directory / SEALED if (directory / SEALED).exists() else directory / "config.json"
    content = json.loads(path.read_text("utf-8"))
    return path, content["base"] if path.name == SEALED else content, content


def _values(trap: Path) -> tuple[Any, ...]:
    return (
        str(trap), f"../{trap.name}", "pytorch_model.bin", f"file://{trap}", "https://localhost/model.bin",
        "hf-hub:a/b", "timm/resnet18.a1_in1k", "resnet18", "transformers:a/b", "DEFAULT", "IMAGENET1K_V1",
        "os.system", "builtins.eval", "torch.load",
        True, None, -1, 0, 10**7, 2.5, [], [str(trap)], {"file": str(trap)}, {"url": str(trap)},
        {"hf_hub_id": "a/b"}, {"model_type": "resnet", "name_or_path": str(trap)}, {"AutoModel": "evil.Evil"},
    )  # fmt: skip


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for entry in value.values():
            yield from _mappings(entry)


def _fault(directory: Path, guard: Guard, mark: Path) -> str | None:
    guard.seen.clear()
    began, error = time.monotonic(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            slimming.load(directory)
        except SlimmingError:
            pass
        except Exception as other:  # any other class of error breaks the promise
            error = f"{type(other).__name__}: {str(other)[:200]}"
    if mark.exists():
        mark.unlink()
        return "its code was run"
    if guard.seen:
        return f"it caused {guard.seen[0]}"
    seconds = time.monotonic() - began
    return error if error is not None or seconds < SECONDS else f"took {seconds:.0f} s"
