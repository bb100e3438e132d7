"""Checkpoints and scores files: whole or not at all, nothing but tensors and JSON, and every damage named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import slimming
from slimming.checkpoints.checkpoint import read_provenance, untied, write_tensors
from slimming.core.budget import Budget
from slimming.core.files import atomic_directory, atomic_json, atomic_write_text, seal
from slimming.core.layout import Layout
from slimming.errors import CheckpointError, ConfigError, OutputError, PlanError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.planning.scores import ScoredModel, load_scores, save_scores
from slimming.planning.sensitivity import Sensitivity
from variants import VARIANTS, draw, image

FILES = ["provenance.json", "structure.json", "weights.safetensors"]


@pytest.fixture(scope="module")
def slim() -> nn.Module:
    model = VARIANTS[0].make().float()
    return slimming.cut(model, draw(prunable(model).anatomy, "free")[1])


@pytest.fixture
def saved(slim: nn.Module, tmp_path: Path) -> Path:
    slimming.save(slim, tmp_path / "slim", {"base": "vit_tiny", "metrics": {"top1": 0.5}})
    return tmp_path / "slim"


def test_a_checkpoint_is_three_files_with_provenance(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    assert sorted(path.name for path in saved.parent.iterdir()) == ["slim"]
    assert read_provenance(saved) == {"base": "vit_tiny", "metrics": {"top1": 0.5}}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_what_is_written_keeps_to_the_umask(umask: int, slim: nn.Module, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        slimming.save(slim, tmp_path / "new" / "slim")
        atomic_write_text(tmp_path / "new" / "text", "whole")
    finally:
        os.umask(before)
    places = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert len(places) == 6
    for place in places:
        assert place.stat().st_mode & 0o777 == (0o777 if place.is_dir() else 0o666) & ~umask, place


def test_a_dense_model_is_saved_too(tmp_path: Path) -> None:
    model = VARIANTS[0].make()
    slimming.save(model, tmp_path / "dense")
    again = slimming.load(str(tmp_path / "dense"))
    assert torch.equal(again(image(model)), model(image(model)))


def test_tied_and_odd_tensors_are_saved(tmp_path: Path) -> None:
    model: Any = VARIANTS[0].make().to(torch.bfloat16)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.head.weight.data = model.head.weight.data.t().contiguous().t()
    slimming.save(model, tmp_path / "odd")
    again = slimming.load(tmp_path / "odd")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_tied_tensors_are_written_once_per_name_and_stay_tied(tmp_path: Path) -> None:
    model: Any = VARIANTS[0].make()
    one, other = model.blocks[0].mlp, model.blocks[1].mlp
    other.fc1.weight = one.fc1.weight
    one.fc2.weight.data = one.fc1.weight.data.view_as(one.fc2.weight)
    whole = torch.randn(2, *other.fc2.weight.shape)
    other.fc2.weight.data = whole[1]
    slimming.save(model, tmp_path / "tied")
    written, again = load_file(tmp_path / "tied" / "weights.safetensors"), slimming.load(tmp_path / "tied")
    for found in (written, again.state_dict()):
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    assert other.fc1.weight is one.fc1.weight
    assert one.fc2.weight.data_ptr() == one.fc1.weight.data_ptr()


def test_only_what_shares_memory_or_lies_apart_is_copied_to_be_written() -> None:
    base = torch.randn(4, 6)
    state = {"plain": nn.Parameter(torch.randn(3)), "base": base, "tied": base, "part": base[1:], "across": base.t()}
    state |= {"empty": torch.empty(0), "scalar": torch.tensor(2)}
    plain = untied(state)
    assert all(torch.equal(plain[name], tensor) for name, tensor in state.items())
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in plain.values())
    kept = [name for name in state if plain[name].data_ptr() == state[name].data_ptr()]
    assert kept == ["plain", "base", "empty", "scalar"]


MEMORY = """
import os, sys, threading, timm, torch, slimming

def own() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def most(work) -> float:
    before, peak, done = own(), 0, threading.Event()
    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, own())
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    done.set()
    watcher.join()
    return max(peak, own()) - before

torch.set_num_threads(1)
model = timm.create_model("vit_large_patch16_224", depth=2)
saving = most(lambda: slimming.save(model, sys.argv[1]))
loading = most(lambda: slimming.load(sys.argv[1]))
size = os.path.getsize(sys.argv[1] + "/weights.safetensors")
print(saving / size, loading / size)
"""
"""Prints the most memory of its own that the process takes while it saves and loads, over the size of the file."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.skipif(safetensors.__version__ < "0.8", reason="older safetensors copy what they write")
def test_saving_takes_no_memory_of_the_size_of_the_model_and_loading_takes_it_once(tmp_path: Path) -> None:
    printed = subprocess.check_output([sys.executable, "-c", MEMORY, str(tmp_path / "large")], text=True)
    saving, loading = map(float, printed.split())
    assert saving < 0.5
    assert 0.9 < loading < 1.5


def test_a_loaded_model_does_not_depend_on_its_file(slim: nn.Module, saved: Path) -> None:
    loaded = slimming.load(saved)
    with (saved / "weights.safetensors").open("r+b") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
    assert torch.equal(loaded(image(slim)), slim(image(slim)))
    shutil.rmtree(saved)
    slimming.save(loaded, saved)
    assert torch.equal(slimming.load(saved)(image(slim)), slim(image(slim)))


def test_masked_models_are_not_saved_as_if_they_were_plain(tmp_path: Path) -> None:
    model = VARIANTS[0].make()
    masks = slimming.attach(model)
    with pytest.raises(PlanError, match=r"cut|fold_|detach_"):
        slimming.save(model, tmp_path / "masked")
    assert list(tmp_path.iterdir()) == []
    masks.detach_()
    slimming.save(model, tmp_path / "plain")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"metrics": {"top1": float("nan")}}, "provenance.metrics.top1 is nan"),
        ({"lr": [0.1, float("inf")]}, "provenance.lr[1] is inf"),
        ({"metrics": {"top1": torch.tensor(0.5)}}, "provenance.metrics.top1 is of type Tensor"),
        ({"data": {"source": Path("photos")}}, "provenance.data.source is of type PosixPath"),
        ({"sizes": {16: 1}}, "provenance.sizes has the key 16"),
        ({"format": 2}, "provenance.format is reserved"),
        ({"sha256": ""}, "provenance.sha256 is reserved"),
    ],
    ids=["nan", "inf", "tensor", "path", "key", "format", "sha256"],
)
def test_provenance_that_json_cannot_hold_is_named(
    slim: nn.Module, tmp_path: Path, entry: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        slimming.save(slim, tmp_path / "new" / "slim", {"base": "vit_tiny", **entry})
    assert list(tmp_path.iterdir()) == []


def test_all_that_json_holds_comes_back(slim: nn.Module, tmp_path: Path) -> None:
    given = {"none": None, "yes": True, "count": 3, "share": 0.5, "nested": {"texts": ["ä", ""], "rows": [[1], {}]}}
    slimming.save(slim, tmp_path / "slim", given)
    assert read_provenance(tmp_path / "slim") == given


def test_no_json_file_of_ours_holds_nan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"results\.json\.rows\[0\]\.loss is nan"):
        atomic_json(tmp_path / "results.json", {"rows": [{"loss": float("nan")}]})
    assert list(tmp_path.iterdir()) == []


def test_occupied_places_are_refused(slim: nn.Module, saved: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    (tmp_path / "file").write_text("mine")
    for place in (saved, tmp_path / "file"):
        with pytest.raises(OutputError, match=r"is not empty|is a file"):
            slimming.save(slim, place)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    slimming.save(slim, tmp_path / "empty")
    slimming.save(slim, tmp_path / "new" / "deep" / "slim")
    assert slimming.load(tmp_path / "new" / "deep" / "slim")


def test_a_place_below_a_file_is_refused(slim: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        slimming.save(slim, tmp_path / "file" / "slim")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_refused(slim: nn.Module, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            slimming.save(slim, tmp_path / "slim")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS], ids=["not permitted", "read only"])
def test_a_read_only_disk_is_said(code: int, slim: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", _failing(code))
    with pytest.raises(OutputError, match="cannot be written"):
        slimming.save(slim, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def _failing(code: int) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


WRITES = [*(("fsync", number) for number in range(3)), *(("replace", number) for number in range(4))]
"""Every write and every rename of one checkpoint, in order."""


@pytest.mark.parametrize(("function", "which"), WRITES, ids=[f"{name} {number}" for name, number in WRITES])
def test_a_full_disk_leaves_nothing(
    function: str, which: int, slim: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at each of the writes and renames in turn."""
    real = getattr(os, function)
    calls = 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return _failing(errno.ENOSPC)() if calls - 1 == which else real(*args)

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OutputError, match=r"The disk is full: .*slim.* was not written\. Free some space"):
        slimming.save(slim, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []
    which, calls = -1, 0
    slimming.save(slim, tmp_path / "slim")
    assert calls == sum(name == function for name, _ in WRITES)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("I/O error: No space left on device (os error 28)", "The disk is full: "),
        ('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })', "The disk is full: "),
        ("I/O error: Permission denied (os error 13) at path", r"cannot be written \(Permission denied\)"),
        ("something else", r"cannot be written \(something else\)"),
    ],
    ids=["full", "full as Rust says it", "not permitted", "anything else"],
)
def test_what_the_writer_of_tensors_says_of_the_disk_is_understood(
    said: str, says: str, slim: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(said)

    monkeypatch.setattr("slimming.checkpoints.checkpoint.save_file", half)
    with pytest.raises(OutputError, match=says):
        slimming.save(slim, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_halfway_leaves_nothing(slim: nn.Module, tmp_path: Path) -> None:
    """The system's limit on the size of a file, which the library that writes the tensors runs into."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=r"weights\.safetensors cannot be written \(File too large\)"):
            slimming.save(slim, tmp_path / "slim")
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "before").write_text("mine")
        with pytest.raises(OutputError, match="before cannot be written"):
            write_tensors(tmp_path / "before", untied(slim.state_dict()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    assert (tmp_path / "before").read_text() == "mine"


def test_a_model_without_weights_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="meta"):
        slimming.save(VARIANTS[0].make().to("meta"), tmp_path / "new" / "slim")
    assert list(tmp_path.iterdir()) == []


def test_killed_while_saving_leaves_no_checkpoint(slim: nn.Module, saved: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, time, slimming, slimming.checkpoints.checkpoint as c; model = slimming.load(sys.argv[1]);\n"
        "def stop(path, tensors, metadata=None):\n"
        "    print('half', flush=True); time.sleep(60)\n"
        "c.write_tensors = stop; slimming.save(model, sys.argv[2])"
    )
    target = tmp_path / "out" / "slim"
    child = subprocess.Popen([sys.executable, "-c", program, str(saved), str(target)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not target.exists()
    slimming.save(slim, target)
    assert slimming.load(target)


class _Trap:
    """What a pickle of an attacker looks like."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "weights.safetensors"], ids=str)
def test_files_and_pickles_are_refused(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    path = saved / "weights.safetensors" if name in FILES else saved.parent / name
    if name not in FILES:
        path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match=r"is a file; slimming loads directories.*A pickle is never loaded"):
        slimming.load(path)
    assert not Path("executed").exists()


def test_a_pickle_in_place_of_the_weights_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    data = pickle.dumps(_Trap())
    (saved / "weights.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum differs"):
        slimming.load(saved)
    _edit(saved, lambda value: value.update(weights_sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        slimming.load(saved)
    assert not Path("executed").exists()


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the structure and seal it again, as another version of slimming might have written it."""
    file = path / "structure.json"
    value = json.loads(file.read_text())
    del value["sha256"]
    change(value)
    file.write_text(json.dumps(seal(value)))


def test_missing_pieces_are_named(saved: Path, tmp_path: Path) -> None:
    for name in ("structure.json", "weights.safetensors"):
        copy = tmp_path / f"without {name}"
        shutil.copytree(saved, copy)
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match=re.escape(name)):
            slimming.load(copy)
    with pytest.raises(CheckpointError, match="nowhere"):
        slimming.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="does not exist"):
        slimming.load(tmp_path / "empty")


def test_truncation_and_flipped_bytes_are_seen(saved: Path) -> None:
    dice = random.Random(0)
    for name in ("weights.safetensors", "structure.json"):
        whole = (saved / name).read_bytes()
        damaged = [whole[:length] for length in (0, 7, len(whole) // 2, len(whole) - 1)]
        places = [0, 8, len(whole) - 2, *dice.sample(range(len(whole)), 12)]
        damaged += [whole[:p] + bytes([whole[p] ^ 1]) + whole[p + 1 :] for p in places]
        for data in damaged:
            if name.endswith(".json") and _same_json(data, whole):
                continue
            (saved / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=r"(Take an intact copy|no format number|does not|newer|Upgrade)"):
                slimming.load(saved)
        (saved / name).write_bytes(whole)
    slimming.load(saved)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(format=2), "has format 2, this version of slimming reads up to 1. Upgrade"),
        (lambda v: v.update(family="swin"), "is of family 'swin'; this version of slimming knows timm-vit"),
        (lambda v: v.update(family=["swin"]), "damaged: family: expected `str`, got `array`"),
        (lambda v: v.pop("base"), "is damaged"),
        (lambda v: v["base"].update(architecture="vit_huge_nonsense"), "no architecture 'vit_huge_nonsense'"),
        (lambda v: v["base"]["arguments"].update(depht=3), "passes 'depht' to vit_tiny"),
        (lambda v: v["base"]["arguments"].update(num_heads=7), "cannot make"),
        (lambda v: v["base"].update(architecture="resnet18"), "cannot make|makes a ResNet"),
        (lambda v: v["base"].pop("arguments"), "damaged"),
        (lambda v: v["base"].update({"class": "Evil", "architecture": None}), "cannot make|damaged"),
        (lambda v: v["base"].update({"architecture": "hf-hub:someone/evil"}), "no architecture"),
        (lambda v: v["layers"].popitem(), "is damaged"),
        (lambda v: v["layers"]["blocks.0"].pop("heads"), "structure of blocks.0 is damaged"),
        (lambda v: v["layers"]["blocks.0"].update(hidden="many"), "structure of blocks.0 is damaged"),
        (lambda v: v["layers"]["blocks.0"].update(hidden=7), "do not fit"),
        (lambda v: v["layers"]["blocks.0"].update(hidden=-7), "damaged|do not fit"),
        (lambda v: v["layers"]["blocks.0"].update(heads=[]), "do not fit"),
        (lambda v: v["layers"]["blocks.0"].update(positions=[99]), "damaged"),
        (lambda v: v["layers"].update({"blocks.77": v["layers"]["blocks.0"]}), "damaged|do not fit"),
    ],
    ids=[
        "newer format",
        "other family",
        "family in a list",
        "no base",
        "unknown architecture",
        "misspelt argument",
        "impossible argument",
        "other architecture",
        "no arguments",
        "a class",
        "an address",
        "a layer less",
        "no heads",
        "hidden in words",
        "hidden of another size",
        "hidden below 0",
        "no head",
        "positions outside",
        "a layer more",
    ],
)
def test_structures_that_cannot_be_built(change: Callable[[dict[str, Any]], Any], says: str, saved: Path) -> None:
    _edit(saved, change)
    with pytest.raises(CheckpointError, match=says):
        slimming.load(saved)


def test_weights_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    slimming.save(VARIANTS[0].make(), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "weights.safetensors", saved)
    with pytest.raises(CheckpointError, match="checksum differs"):
        slimming.load(saved)
    other = json.loads((tmp_path / "other" / "structure.json").read_text())
    _edit(saved, lambda value: value.update(weights_sha256=other["weights_sha256"]))
    with pytest.raises(CheckpointError, match="do not fit its structure"):
        slimming.load(saved)


def test_models_that_cannot_be_rebuilt_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model: Any = VARIANTS[0].make()
    model.blocks[0].mlp.act = nn.Softshrink()
    with pytest.raises(UnsupportedModelError, match=r"'blocks.0.mlp.act' is Softshrink"):
        slimming.save(model, tmp_path / "odd")
    assert list(tmp_path.iterdir()) == []


def test_scores_make_the_same_plan_without_the_model(tmp_path: Path) -> None:
    model = VARIANTS[0].make()
    masks = slimming.attach(model)
    with torch.no_grad():
        for mask in masks.values():
            mask.uniform_(0, 1)
    scores = masks.scores()
    curves = {"mlp": ((0.5, 0.01), (0.2, 0.4)), "token": ((0.5, 0.3),)}
    measured = Sensitivity(curves=curves, spread="score", joint={"rank": ((0.7, 0.1),), "score": ((0.7, 0.05),)})
    scored = ScoredModel(
        anatomy=masks.anatomy, scores=scores, layout=Layout(multiple=4), fold=False, sensitivity=measured
    )
    save_scores(tmp_path / "scores.safetensors", scored)
    read = load_scores(tmp_path / "scores.safetensors")
    assert (read.anatomy, read.layout, read.fold, read.sensitivity) == (masks.anatomy, scored.layout, False, measured)
    assert read.scores.keys() == scores.keys()
    assert all(torch.equal(read.scores[name], score) for name, score in scores.items())
    save_scores(tmp_path / "scores.safetensors", ScoredModel(anatomy=masks.anatomy, scores=scores))
    budget = Budget(macs=0.7)
    assert slimming.plan(str(tmp_path / "scores.safetensors"), budget) == slimming.plan(masks, budget)


def test_files_that_are_no_scores(saved: Path, tmp_path: Path) -> None:
    masks = slimming.attach(VARIANTS[0].make())
    path = tmp_path / "scores.safetensors"
    save_scores(path, ScoredModel(anatomy=masks.anatomy, scores=masks.scores()))
    whole = path.read_bytes()
    budget = Budget(macs=0.7)
    (tmp_path / "pickle").write_bytes(pickle.dumps(_Trap()))
    path.write_bytes(whole[: len(whole) // 2])
    for file, says in (
        (saved / "weights.safetensors", "is not a scores file"),
        (tmp_path / "pickle", "not a safetensors file"),
        (path, "truncated"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=says):
            slimming.plan(file, budget)
    middle = whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:]
    path.write_bytes(middle)
    with pytest.raises(CheckpointError, match="checksum"):
        slimming.plan(path, budget)


class Own(nn.Module):
    """A model that only its user can make."""

    image_size = 16

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)
        self.register_buffer("bias", torch.ones(3), persistent=False)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.head(self.norm(self.stem(image)).relu().mean((2, 3))) + self.bias}


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = Own().eval()
    masks = slimming.attach(model)
    plan = slimming.plan(masks, Budget(keep={"channel": 0.5}))
    masks.detach_()
    small = slimming.cut(model, plan)
    slimming.save(small, tmp_path / "own")
    return tmp_path / "own", small


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_model_of_ones_own_is_loaded_into_the_dense_one(
    own: tuple[Path, nn.Module], tmp_path: Path, dtype: torch.dtype
) -> None:
    small = own[1].to(dtype)
    slimming.save(small, tmp_path / "again")
    dense = Own()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    loaded = slimming.load(tmp_path / "again", dense=dense)
    x = torch.randn(2, 3, 16, 16, dtype=dtype)
    assert torch.equal(loaded(x)["scores"], small(x)["scores"])
    assert not loaded.training
    assert loaded.stem.out_channels == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert slimming.describe(loaded) == slimming.describe(small)
    slimming.save(loaded, tmp_path / "third")
    assert torch.equal(slimming.load(tmp_path / "third", dense=dense)(x)["scores"], small(x)["scores"])


def test_a_dense_model_that_is_missing_or_does_not_fit_is_named(own: tuple[Path, nn.Module]) -> None:
    path, small = own
    with pytest.raises(CheckpointError, match=r"dense=model"):
        slimming.load(path)
    with pytest.raises(CheckpointError, match=r"was cut from a .*Own, but the model given as dense is a .*ReLU"):
        slimming.load(path, dense=nn.ReLU())
    with pytest.raises(CheckpointError, match="has masks or was cut; create it anew"):
        slimming.load(path, dense=small)
    masked = Own()
    slimming.attach(masked)
    with pytest.raises(CheckpointError, match="has masks or was cut"):
        slimming.load(path, dense=masked)
    other = Own()
    other.head = nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match="do not fit the Own given as dense"):
        slimming.load(path, dense=other)
    other = Own()
    del other.stem
    with pytest.raises(CheckpointError, match="cannot be resized to"):
        slimming.load(path, dense=other)


def test_a_known_model_may_be_handed_over_too(saved: Path, slim: nn.Module) -> None:
    loaded = slimming.load(saved, dense=VARIANTS[0].make().float())
    assert torch.equal(loaded(image(slim)), slim(image(slim)))


def test_what_goes_wrong_inside_a_directory_names_the_place_that_its_caller_knows(tmp_path: Path) -> None:
    place = tmp_path / "new"
    with (
        pytest.raises(OutputError, match=re.escape(f"{place}/big cannot be written")),
        atomic_directory(place) as partial,
    ):
        raise OutputError(f"{partial}/big cannot be written")
    assert not list(tmp_path.iterdir())
