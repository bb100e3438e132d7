"""Export a model to one or more targets, and compare the outputs of each file with those of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimming.benchmarking.programs import OPSET
from slimming.benchmarking.timing import machine, paired_times, speedup, summary
from slimming.checkpoints import checkpoint, hub
from slimming.core.argument_types import checked_arguments
from slimming.core.copies import copied
from slimming.core.files import atomic_directory, atomic_json, check_free
from slimming.errors import ConfigError, DataError, ParityError, PlanError
from slimming.exporting.metadata import class_names, description
from slimming.exporting.targets import Job, Run, Target, choose
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.models.hosts import classes_of, unplain
from slimming.runs.files import stored_data
from slimming.runs.setup import image_spec, read_images
from slimming.training.config import DataConfig
from slimming.training.outputs import logits_by_head, named_outputs

STEM = "model"
CALIBRATION = 128
"""Largest number of calibration images of static quantisation."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported file that was checked against the model.

    Attributes:
        target: name of the target.
        file: path of the file; companion files are in the same directory.
        bytes: size of the file and its companions.
        difference: largest absolute difference of a logit over all images.
        relative: the same as a share of the model's largest logit.
        agreement: share of images with the same top-1 class as the model; None for a model without classes.
        images: number of compared images.
        latency_ms: median milliseconds for one image on this machine.
        speedup: speed-up over the model in PyTorch at batch size 1: median and quartiles.
    """

    target: str
    file: Path
    bytes: int
    difference: float
    relative: float
    agreement: float | None
    images: int
    latency_ms: float
    speedup: Mapping[str, float]


@checked_arguments
def export(
    model: nn.Module | str | Path,
    directory: str | Path,
    *,
    to: str | Sequence[str] = "onnx",
    images: str | Sequence[Tensor] | None = None,
    tolerance: float | None = None,
    agreement: float | None = None,
    opset: int = OPSET,
) -> tuple[Exported, ...]:
    """Export ``model`` with a dynamic batch size, and check the outputs of each file on real images.

    ``directory`` then contains one file for each target, and ``model.json`` with the preprocessing, the names of the
    classes, and the measurements. Preprocessing and class names are also embedded in each file. If one target fails,
    nothing is written.

    Args:
        model: a dense or slim model without masks, the directory of one, or ``hf-hub:owner/name``.
        directory: a directory that is empty or does not exist yet.
        to: one or more of ``"pt2"`` (torch.export), ``"onnx"``, ``"onnx-int8-dynamic"``, ``"onnx-int8-static"``,
            ``"openvino"`` and ``"openvino-fp16"``.
        images: preprocessed batches of shape (B, C, H, W), or a source of images, see `slimming.load_images`; None
            reads the data named in the directory of the model. The first half, at most 128 images, calibrates static
            quantisation, and the others are compared; a single image is used for both.
        tolerance: largest difference of a logit as a share of the model's largest logit; by default 1e-5 for pt2, 1e-4
            for ONNX and OpenVINO in float32, 1e-2 for float16 weights, and not checked for 8 bits.
        agreement: smallest share of images with the same top-1 class; by default 0.95 for 8 bits, and not checked for
            other targets.
        opset: version of the ONNX operator set.

    Raises:
        ParityError: the outputs of a file differ from those of the model.
        UnsupportedModelError: the model cannot be exported, or has no layers to quantise.
        ConfigError: there is no such target, or a limit is out of range.
        MissingExtraError: the library of a target is not installed.
        DataError: there are no images.
        OutputError: the directory is not empty or not writable, or the disk is full.

    >>> import tempfile, timm, torch, slimming
    >>> model = timm.create_model("test_efficientnet", num_classes=10)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     (made,) = slimming.export(model, directory + "/out", to="pt2", images=[torch.randn(3, 3, 160, 160)])
    ...     made.file.name, made.relative <= 1e-5
    ('model.pt2', True)
    """
    targets = choose(to)
    _check_limits(tolerance, agreement)
    data = DataConfig(source=images) if isinstance(images, str) else None
    if not isinstance(model, nn.Module):
        model, data = _opened(model, data, needed=images is None)
    if attached(model) is not None:
        raise PlanError("The model has masks; cut it, or call masks.fold_() or masks.detach_(), and export the result.")
    if data is None and (images is None or isinstance(images, str)):
        raise DataError("Give images to compare the files on: batches, or a folder.")
    known = classes_of(model) > 0
    if not known and any(target.tolerance is None for target in targets) and tolerance is None:
        raise ConfigError(
            "The model has no classes, so the agreement of 8-bit files cannot be checked; give a tolerance, such as "
            "0.1."
        )
    directory = Path(directory)
    check_free(directory)
    calibration, compared = _images(read_images(data, model, 256) if data is not None else images, model)
    plain = _Logits(copied(model).float().cpu()).eval()
    _check_outputs(plain.model, compared[:1])
    reference = _outputs(lambda x: plain(torch.from_numpy(x)).numpy(), compared)
    spec = image_spec(data or DataConfig(source="batches"), model)
    words = description(spec, class_names(model), reference.shape[1:])
    with atomic_directory(directory) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as workplace:
            job = Job(plain, words, calibration, opset, Path(workplace))
            exported = [
                _export_target(target, job, partial, reference, compared, _limits(target, tolerance, agreement, known))
                for target in targets
            ]
        rows = [{**asdict(entry), "file": entry.file.name} for entry in exported]
        environment = {"opset": opset, "machine": machine(), "torch": torch.__version__}
        atomic_json(partial / f"{STEM}.json", {**words, "made": environment, "files": rows})
    return tuple(Exported(**{**vars(entry), "file": directory / entry.file.name}) for entry in exported)


@torch.no_grad()
def _check_outputs(model: nn.Module, image: Tensor) -> None:
    """Check that ``model`` has one output only, because files have one.

    Raises:
        ConfigError: it has none, or more.
    """
    named = named_outputs(model(image), len(image))
    if len(named) > 1:
        raise ConfigError(
            f"The model has {len(named)} outputs ({', '.join(named)}), but exported files have one. Wrap it in a "
            "module that returns one tensor, such as all of them concatenated."
        )


class _Logits(nn.Module):
    """A model whose only output is the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return logits_by_head(self.model(image))[0]


class _Timed(nn.Module):
    """A runtime as a module, for timing."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, image: Tensor) -> Tensor:
        return torch.from_numpy(self.run(image.numpy()))


def _opened(name: str | Path, data: DataConfig | None, *, needed: bool) -> tuple[nn.Module, DataConfig | None]:
    """The model of a directory; and the given data, else the data on which it was trained with the same split."""
    path = hub.fetch(name) if isinstance(name, str) and hub.is_address(name) else Path(name)
    model = checkpoint.load(path)
    stored = stored_data(path)
    source = data.source if data is not None else stored.get("source")
    if not needed and data is None:
        return model, None
    if not source:
        raise DataError(f"{name} does not name the data on which it was trained; give images to compare on.")
    if source != stored.get("source"):
        return model, data
    return model, DataConfig(
        **unplain({field.name: stored[field.name] for field in fields(DataConfig) if field.name in stored})
    )


def _check_limits(tolerance: float | None, agreement: float | None) -> None:
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError(f"tolerance is {tolerance}; it is a share of the largest logit, such as 1e-4.")
    if agreement is not None and not 0 <= agreement <= 1:
        raise ConfigError(f"agreement is {agreement}; it is a share of the images, from 0 to 1.")


def _limits(
    target: Target, tolerance: float | None, agreement: float | None, known: bool
) -> tuple[float | None, float | None]:
    """Tolerance and agreement of a target; ``known`` is whether the model has classes."""
    tolerance = target.tolerance if tolerance is None else tolerance
    agreement = target.agreement if agreement is None else agreement
    return tolerance, agreement if known else None


def _images(batches: str | Sequence[Tensor] | None, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The images for static quantisation, and those that are compared; a single image is used for both."""
    shape = prunable(model).anatomy.input_shape
    given: list[Any] = [batches] if isinstance(batches, Tensor) else list([] if batches is None else batches)
    if not given or any(not isinstance(batch, Tensor) or batch.shape[1:] != shape for batch in given):
        raise DataError(f"Give batches of images of shape (B, {', '.join(map(str, shape))}), or a folder of images.")
    together = torch.cat([batch.float().cpu() for batch in given])
    if not len(together):
        raise DataError("There are no images to compare the files on.")
    half = min(len(together) // 2, CALIBRATION)
    return together[: max(half, 1)], together[half:]


@torch.no_grad()
def _outputs(run: Run, images: Tensor) -> np.ndarray:
    """All logits, (N, K), computed in batches of 1, 2 and 32 images."""
    sizes = [1, 2] + [32] * (len(images) // 32 + 1)
    starts = np.cumsum([0, *sizes])
    parts = [images[start : start + size].numpy() for start, size in zip(starts, sizes, strict=False)]
    return np.concatenate([np.asarray(run(part)) for part in parts if len(part)])


def _export_target(
    target: Target,
    job: Job,
    directory: Path,
    reference: np.ndarray,
    images: Tensor,
    limits: tuple[float | None, float | None],
) -> Exported:
    """Write the file of one target and check it.

    Raises:
        ParityError: its outputs differ from those of the model.
    """
    files = target.files(directory, STEM)
    target.write(job, files[0])
    run = target.open(files[0])
    logits = _outputs(run, images)
    difference = float(np.abs(logits - reference).max()) if np.isfinite(logits).all() else float("inf")
    relative = difference / max(float(np.abs(reference).max()), 1e-12)
    same = float((logits.argmax(1) == reference.argmax(1)).mean())
    tolerance, agreement = limits
    differs = f"The outputs of the {target.name} file differ from those of the model on {len(images)} images: "
    if tolerance is not None and not relative <= tolerance:
        raise ParityError(
            f"{differs}logits differ by up to {relative:.2g} of the largest, and {tolerance:g} is allowed. "
            "Nothing was written. Take another target, or give a larger tolerance."
        )
    if agreement is not None and not same >= agreement:
        raise ParityError(
            f"{differs}the top-1 class is the same for {same:.1%}, and at least {agreement:.1%} is required. "
            "Nothing was written. Take another target, or give a smaller agreement."
        )
    times = paired_times(
        {"model": job.model, "file": _Timed(run)}, images.shape[1:], 1, runs=20, seconds=0.5, like=images
    )
    return Exported(
        target=target.name,
        file=files[0],
        bytes=sum(file.stat().st_size for file in files),
        difference=difference,
        relative=relative,
        agreement=same if classes_of(job.model.model) else None,  # pyright: ignore[reportArgumentType]
        images=len(images),
        latency_ms=summary(times["file"]).median,
        speedup=speedup(times["model"], times["file"]),
    )
