"""Slim models on the disk: a directory of safetensors, structure and provenance, without any pickle."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from slimming.checkpoints import hub
from slimming.core.files import FORMAT, atomic_directory, atomic_file, atomic_json, check_json, read_sealed, seal
from slimming.core.structure import Structure
from slimming.errors import CheckpointError, ConfigError, OutputError, PlanError
from slimming.masks.soft_masks import attached
from slimming.models import build as build
from slimming.models import family_called
from slimming.models.directories import CONFIG, HOST_WEIGHTS, open_directory, read_config, structure_in, unprefixed
from slimming.models.family import STRUCTURE as SLIM
from slimming.models.family import fill_
from slimming.models.prunable import read

WEIGHTS, STRUCTURE, PROVENANCE = "weights.safetensors", "structure.json", "provenance.json"


def save(model: nn.Module, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a dense or slim model to the directory ``path``, whole or not at all.

    Args:
        model: a model without masks.
        path: a directory that is empty or does not exist yet.
        provenance: where the model comes from: base model, data, settings, versions, metrics; JSON values.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: the model has masks attached.
        ConfigError: the provenance holds what JSON cannot, or an entry of the file's own.
        OutputError: the place is occupied, not writable or full.

    >>> import timm, tempfile, slimming
    >>> model = timm.create_model("test_vit", num_classes=10)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     slimming.save(model, directory + "/dense")
    ...     type(slimming.load(directory + "/dense")).__name__
    'VisionTransformer'
    """
    path = Path(path)
    if attached(model) is not None:
        raise PlanError(
            "The model has masks attached; cut it, or call masks.fold_() or masks.detach_(), and save the result."
        )
    record = dict(provenance or {})
    check_provenance(record)
    structure = read(model).anatomy.structure
    weights = untied(model.state_dict())
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} is not empty; give another directory, or remove this one first.")
    with atomic_directory(path) as partial:
        write_tensors(partial / WEIGHTS, weights)
        atomic_json(partial / STRUCTURE, seal({**structure.to_dict(), "weights_sha256": sha256(partial / WEIGHTS)}))
        atomic_json(partial / PROVENANCE, seal({"format": FORMAT, **record}))


def load(path: str | Path, device: str | torch.device = "cpu", *, dense: nn.Module | None = None) -> nn.Module:
    """Rebuild the model that `save` wrote to the directory ``path``, in evaluation mode.

    The dense weights are not needed, and nothing in the directory is executed or unpickled.

    Args:
        path: the directory, or ``hf-hub:owner/name`` (with ``@revision`` at its end, if need be). It may also hold a
            model of timm or transformers, as they write it: a config.json and weights as safetensors.
        device: where the model goes.
        dense: for a model that no host makes by name, the dense model as you made it, with any weights; a copy of
            it gets the sizes and weights of the checkpoint, and it stays as it was.

    Raises:
        CheckpointError: the directory is not a checkpoint, is damaged, or is of a newer format, or ``dense`` is
            not the model that it was cut from; or the hub has no such repository, or cannot be reached.
        ConfigError: the address is not one of the hub's.
        UnsupportedModelError: the directory is of a model that its host does not make.
    """
    path = hub.fetch(str(path)) if hub.is_address(path) else Path(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; slimming loads directories that slimming.save wrote. A pickle is never loaded; "
            "for plain weights of a dense model use the dense start (model: NAME, checkpoint: FILE)."
        )
    found = _structure_in(path)
    if found is None:
        if dense is not None:
            raise CheckpointError(f"{path} is a model of its host's own; dense has no effect. Leave it out.")
        return open_directory(path).to(device).eval()
    structure, weights = found
    model = build(structure) if dense is None else _refit(dense, structure, path)
    state = unprefixed(read_tensors(weights), model)
    try:
        fill_(model, state)
    except RuntimeError as error:
        whose = "its structure" if dense is None else f"the {type(dense).__name__} given as dense"
        raise CheckpointError(f"The weights in {path} do not fit {whose}: {error}") from error
    unfilled = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if unfilled:
        raise CheckpointError(f"{path} does not fill {unfilled[0]!r}; it was made with another version of its host.")
    _same_type_(model, state)
    return model.to(device).eval()


def _structure_in(path: Path) -> tuple[Structure, Path] | None:
    """The structure in a directory, and its weights; None where a host's own model lies there.

    A directory made for the hub has the weights under the name that hosts look for, and the structure in config.json
    too, which is all that is left where transformers saved the model again.
    """
    sealed = path / STRUCTURE
    if not sealed.exists() and (path / CONFIG).exists():
        structure = structure_in(read_config(path))
        return None if structure is None else (structure, path / HOST_WEIGHTS)
    raw = read_sealed(sealed)
    structure = Structure.from_dict(raw, source=str(sealed))
    weights = path / (HOST_WEIGHTS if (path / HOST_WEIGHTS).exists() else WEIGHTS)
    if sha256(weights) != raw.get("weights_sha256"):
        raise CheckpointError(f"{weights} is not as it was written: its checksum differs. Take an intact copy.")
    return structure, weights


def _refit(dense: nn.Module, structure: Structure, path: Path) -> nn.Module:
    """A copy of ``dense`` with the sizes of ``structure``.

    Raises:
        CheckpointError: it has masks, was cut before, or is another model.
    """
    if attached(dense) is not None or SLIM in dense.__dict__:
        raise CheckpointError("The model given as dense has masks or was cut; make it again as it was before.")
    cls = f"{type(dense).__module__}.{type(dense).__qualname__}"
    wanted = structure.base.get("class", cls)
    if wanted.rpartition(".")[2] != type(dense).__qualname__.rpartition(".")[2]:
        raise CheckpointError(f"{path} was cut from a {wanted}, the model given as dense is a {cls}.")
    family = family_called(structure.family)
    model = copy.deepcopy(dense)
    try:
        family.resize_(model, structure)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, CheckpointError) as error:
        raise CheckpointError(
            f"The {cls} given as dense does not take the sizes in {path} ({error}). Make the model from which it was "
            "cut."
        ) from error
    return model


def _same_type_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give what is not saved, such as tables of positions, the floating-point type of the weights."""
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) != 1:
        return
    (dtype,) = types
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set and buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What `save` was told about where the model comes from.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return read_sealed(Path(path) / PROVENANCE)


def check_provenance(record: Mapping[str, Any]) -> None:
    """Check before anything is written that a provenance file can hold ``record``.

    Raises:
        ConfigError: it holds what JSON cannot, or an entry of the file's own.
    """
    check_json(record, "provenance")
    for name in ("format", "sha256"):
        if name in record:
            raise ConfigError(f"provenance.{name} is an entry of the file itself. Give yours another name.")


def untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as safetensors takes it: on the CPU, contiguous, each tensor in memory of its own.

    Only what is not so already is copied; of tied tensors, all but the first.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        plain[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return plain


def write_tensors(path: Path, plain: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write what `untied` gives to a safetensors file, whole or not at all.

    The file is never held in memory; safetensors before 0.8 makes one copy of the tensors.

    Raises:
        OutputError: the disk is full, or the place is not writable.
    """
    with atomic_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            # It holds what the system said as text: "(os error 28)", before safetensors 0.6 "Os { code: 28, …".
            said = re.search(r"(?:os error|code:) (\d+)", str(error))
            raise (OSError(int(said[1]), os.strerror(int(said[1]))) if said else OSError(str(error))) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or not safetensors.
    """
    with _damage_named(path):
        # load_file maps the file. Copies, since a mapped model changes or dies when its file is overwritten in place;
        # they are also aligned in memory as other tensors are, which the file is not.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def dump_tensors(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The safetensors bytes of a small state dict; tied tensors are written once per name."""
    return dump_safetensors(untied(state), metadata=dict(metadata or {}))


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts that a safetensors file holds beside its tensors.

    Raises:
        CheckpointError: it is missing, truncated or not safetensors.
    """
    with _damage_named(path), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    with _readable(source):
        source.open("rb").close()
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{source} is truncated or not a safetensors file ({error}). Take an intact copy."
        ) from error


def sha256(path: Path) -> str:
    """The checksum of a file, which is read in pieces.

    Raises:
        CheckpointError: it is missing or not readable.
    """
    digest = hashlib.sha256()
    with _readable(path), path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Give a path that slimming wrote.") from error


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
