"""Save and load models as directories with safetensors, structure and provenance; nothing is pickled."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as dump_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from slimming.checkpoints import hub
from slimming.checkpoints.proof import recorded
from slimming.core.argument_types import checked_arguments
from slimming.core.copies import copied
from slimming.core.files import atomic_directory, atomic_file, check_free, check_json
from slimming.core.records import FileKind
from slimming.core.structure import STRUCTURE as STRUCTURE_FILE
from slimming.core.structure import Structure
from slimming.errors import CheckpointError, ConfigError, PlanError
from slimming.masks.soft_masks import attached
from slimming.models.bounds import bounded_building
from slimming.models.directories import CONFIG, open_directory, read_config, structure_in, unprefixed
from slimming.models.families import build as build
from slimming.models.families import resize_and_replace_
from slimming.models.family import STRUCTURE as SLIM
from slimming.models.family import assign_state_
from slimming.models.prunable import read
from slimming.models.weight_files import HOST_WEIGHTS, readable
from slimming.models.weight_files import read_metadata as read_metadata
from slimming.models.weight_files import read_tensors as read_tensors

WEIGHTS, STRUCTURE, PROVENANCE = "weights.safetensors", "structure.json", "provenance.json"
MEMORY_FORMAT, CHANNELS_LAST = "memory_format", "channels_last"
PROVENANCE_FILE = FileKind(name="the provenance of a model", schema=dict[str, Any])


@checked_arguments
def save(model: nn.Module, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a dense or slim model atomically to the directory ``path``.

    Args:
        model: a model without masks.
        path: a directory that is empty or does not exist yet.
        provenance: origin of the model, as JSON values: base model, data, settings, versions, metrics.

    Raises:
        UnsupportedModelError: no family reads the model, or it was changed so that the file could not be loaded.
        PlanError: the model has masks attached.
        ConfigError: the provenance contains values that JSON cannot hold, or a reserved entry.
        OutputError: the directory is not empty or not writable, or the disk is full.

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
    structure = recorded(model, read(model).anatomy.structure)
    weights = untied(model.state_dict())
    check_free(path)
    with atomic_directory(path) as partial:
        write_tensors(partial / WEIGHTS, weights, memory_format_of(model))
        digest = sha256(partial / WEIGHTS)
        STRUCTURE_FILE.write(partial / STRUCTURE, {**structure.to_dict(), "weights_sha256": digest})
        PROVENANCE_FILE.write(partial / PROVENANCE, record)


@checked_arguments
def load(path: str | Path, device: str | torch.device = "cpu", *, dense: nn.Module | None = None) -> nn.Module:
    """Rebuild the model that `save` wrote to the directory ``path``, in evaluation mode.

    The dense weights are not needed, and nothing in the directory is executed or unpickled.

    Args:
        path: the directory, or ``hf-hub:owner/name``, optionally followed by ``@revision``. A directory that timm or
            transformers saved (a config.json and weights as safetensors) can be loaded too.
        device: device of the model.
        dense: for a model that no library creates by name, the dense model with any weights; a copy of it gets the
            sizes and weights of the checkpoint, and the model itself is not changed.

    Raises:
        CheckpointError: the directory is not a checkpoint, is damaged, or is of a newer format; ``dense`` is not the
            model from which it was cut; or the hub has no such repository or cannot be reached.
        ConfigError: the address of the repository is malformed.
        UnsupportedModelError: the directory is of a model that its library cannot create.
    """
    path = hub.fetch(str(path)) if hub.is_address(path) else Path(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; slimming loads directories that slimming.save wrote. A pickle is never loaded; "
            "for plain weights of a dense model use the dense start (model: NAME, checkpoint: FILE)."
        )
    saved = _structure_in(path)
    if saved is None:
        if dense is not None:
            raise CheckpointError(f"{path} was saved by timm or transformers; dense has no effect. Leave it out.")
        return open_directory(path)[0].to(device).eval()
    structure, weights = saved
    model = build(structure) if dense is None else _refit(dense, structure, path)
    state = unprefixed(read_tensors(weights), model)
    try:
        assign_state_(model, state)
    except RuntimeError as error:
        whose = "its structure" if dense is None else f"the {type(dense).__name__} given as dense"
        raise CheckpointError(f"The weights in {path} do not fit {whose}: {error}") from error
    unfilled = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if unfilled:
        raise CheckpointError(
            f"{path} does not fill {unfilled[0]!r}; it was saved with another version of the model's library. Install "
            "the version with which it was saved."
        )
    _same_type_(model, state)
    if read_metadata(weights).get(MEMORY_FORMAT) == CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    return model.to(device).eval()


def _structure_in(path: Path) -> tuple[Structure, Path] | None:
    """The structure and the file of weights in a directory; None if it contains a dense model of timm or transformers.

    A directory written for the hub has the weights under the name that timm and transformers expect. It has the
    structure in config.json too, which is the only copy left after transformers saved the model again.
    """
    sealed = path / STRUCTURE
    if not sealed.exists() and (path / CONFIG).exists():
        structure = structure_in(read_config(path))
        return None if structure is None else (structure, path / HOST_WEIGHTS)
    saved = STRUCTURE_FILE.read(sealed)
    weights = path / (HOST_WEIGHTS if (path / HOST_WEIGHTS).exists() else WEIGHTS)
    if sha256(weights) != saved.weights_sha256:
        raise CheckpointError(f"{weights} was changed after it was written: its checksum differs. Take an intact copy.")
    return saved.structure, weights


def missing_files(path: Path) -> list[str]:
    """Return the names of the files that a checkpoint in ``path`` lacks; if it lacks none, verify their checksums.

    Raises:
        CheckpointError: a file is damaged.
    """
    missing = [name for name in (WEIGHTS, STRUCTURE, PROVENANCE) if not (path / name).exists()]
    if not missing:
        _structure_in(path)
        read_provenance(path)
    return missing


def save_again(model: nn.Module, path: Path, provenance: Mapping[str, Any]) -> None:
    """Save a checkpoint like `save`, unless a whole one is in ``path``; the files of a partial one are replaced."""
    if missing_files(path):
        for name in (WEIGHTS, STRUCTURE, PROVENANCE):
            (path / name).unlink(missing_ok=True)
        save(model, path, provenance)


def _refit(dense: nn.Module, structure: Structure, path: Path) -> nn.Module:
    """Return a copy of ``dense`` with the sizes of ``structure``.

    Raises:
        CheckpointError: ``dense`` has masks, was cut before, or is another model.
    """
    if attached(dense) is not None or SLIM in dense.__dict__:
        raise CheckpointError("The model given as dense has masks or was cut; create it anew.")
    cls = f"{type(dense).__module__}.{type(dense).__qualname__}"
    wanted = structure.base.get("class", cls)
    if wanted.rpartition(".")[2] != type(dense).__qualname__.rpartition(".")[2]:
        raise CheckpointError(f"{path} was cut from a {wanted}, but the model given as dense is a {cls}.")
    model = copied(dense)
    try:
        with bounded_building():
            resize_and_replace_(model, structure)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, CheckpointError) as error:
        raise CheckpointError(
            f"The {cls} given as dense cannot be resized to {path} ({str(error)[:300].rstrip('.')}). Give the dense "
            "model from which it was cut."
        ) from error
    return model


def _same_type_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Convert non-persistent buffers, such as tables of positions, to the floating-point dtype of the weights."""
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) != 1:
        return
    (dtype,) = types
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set and buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


@checked_arguments
def memory_format_of(model: nn.Module) -> dict[str, str]:
    """Metadata of a file of weights: whether the convolutions of ``model`` are in ``torch.channels_last``."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    last = all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    some = any(not weight.is_contiguous() for weight in weights)
    return {MEMORY_FORMAT: CHANNELS_LAST} if last and some else {}


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Return the provenance with which the model was saved.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return PROVENANCE_FILE.read(Path(path) / PROVENANCE)


def check_provenance(record: Mapping[str, Any]) -> None:
    """Check that ``record`` can be written as provenance.

    Raises:
        ConfigError: it contains values that JSON cannot hold, or a reserved entry.
    """
    check_json(record, "provenance")
    for name in ("format", "sha256"):
        if name in record:
            raise ConfigError(f"provenance.{name} is reserved. Give your entry another name.")


def untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict as safetensors requires it: on the CPU, contiguous, no two tensors sharing memory.

    Only tensors that do not meet this are copied; of tied tensors, all but the first.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        plain[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return plain


def write_tensors(path: Path, plain: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write the result of `untied` atomically to a safetensors file.

    The content of the file is not held in memory; safetensors before 0.8 makes one copy of the tensors.

    Raises:
        OutputError: the disk is full, or ``path`` is not writable.
    """
    with atomic_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            # The message contains the error number: "(os error 28)", before safetensors 0.6 "Os { code: 28, …".
            number = re.search(r"(?:os error|code:) (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error


def dump_tensors(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the safetensors bytes of a small state dict; tied tensors are written once per name."""
    return dump_safetensors(untied(state), metadata=dict(metadata or {}))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits.

    Raises:
        CheckpointError: the file is missing or not readable.
    """
    digest = hashlib.sha256()
    with readable(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
