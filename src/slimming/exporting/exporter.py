"""Export a model to one or more targets, and compare the outputs of each file with those of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimming.benchmarking.programs import OPSET
from slimming.benchmarking.timing import machine, paired_times, speedup, summary
from slimming.checkpoints import checkpoint, hub
from slimming.core.argument_types import checked_arguments
from slimming.core.calibration import given_batches
from slimming.core.copies import copied
from slimming.core.example_inputs import ExampleCall, set_example_inputs_
from slimming.core.files import atomic_directory, atomic_json, check_free
from slimming.errors import ConfigError, DataError, ParityError, PlanError, UnsupportedModelError
from slimming.exporting.metadata import class_names, description
from slimming.exporting.targets import Job, Run, Target, choose
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.models.hosts import classes_of, unplain
from slimming.models.prunable import PrunableModel
from slimming.models.raw_outputs import raw_output_modules
from slimming.runs.files import stored_data
from slimming.runs.setup import image_spec, read_images
from slimming.training.config import DataConfig
from slimming.training.outputs import logits_by_head, named_outputs, named_tensors

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
        difference: largest absolute difference of a logit, or of a value of another output, over all images.
        relative: the same as a share of the model's largest logit, or of the largest value of the same output.
        agreement: share of images with the same top-1 class as the model; None for a model without classes, or with
            several outputs.
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
    images: str | Sequence[Any] | None = None,
    example_inputs: Any = None,
    any_batch: bool = True,
    tolerance: float | None = None,
    agreement: float | None = None,
    opset: int = OPSET,
) -> tuple[Exported, ...]:
    """Export ``model``, and check the outputs of each file on real images: all floating-point outputs that count.

    The batch size of a model that takes a tensor of images is dynamic, unless ``any_batch`` is False. Other models are
    exported for the shapes of their example inputs.

    ``directory`` then contains one file for each target, and ``model.json`` with the preprocessing, the names of the
    classes, and the measurements. Preprocessing and class names are also embedded in each file. If one target fails,
    nothing is written.

    Args:
        model: a dense or slim model without masks, the directory of one, or ``hf-hub:owner/name``.
        directory: a directory that is empty or does not exist yet.
        to: one or more of ``"pt2"`` (torch.export), ``"onnx"``, ``"onnx-int8-dynamic"``, ``"onnx-int8-static"``,
            ``"openvino"`` and ``"openvino-fp16"``.
        images: preprocessed batches of shape (B, C, H, W), or batches of another form, as in `slimming.score`, of the
            shapes of the example inputs; or a source of images, see `slimming.load_images`; None
            reads the data named in the directory of the model. The first half, at most 128 images, calibrates static
            quantisation, and the others are compared; a single image is used for both.
        example_inputs: what the model takes, see `slimming.describe`; None if it is an image, or known.
        any_batch: whether the files take any number of images; otherwise one. Some detectors can be exported for one
            image only.
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
    set_example_inputs_(model, example_inputs)
    directory = Path(directory)
    check_free(directory)
    whole = prunable(model)
    example = whole.examples()[0].to(torch.float32)
    dynamic = any_batch and isinstance(example.value, Tensor)
    batches = read_images(data, model, 256) if data is not None else images
    calibration, compared = _calls(batches, whole, example, dynamic)
    plain = _plain(model, compared[0])
    known = classes_of(model) > 0 and len(plain.names) == 1
    if not known and any(target.tolerance is None for target in targets) and tolerance is None:
        raise ConfigError(
            "The model has no classes, so the agreement of 8-bit files cannot be checked; give a tolerance, such as "
            "0.1."
        )
    reference = _outputs(partial(_run, plain), compared)
    shapes = {name: array.shape[1:] for name, array in zip(plain.names, reference, strict=True)}
    spec = image_spec(data or DataConfig(source="batches"), model)
    words = description(spec, class_names(model), shapes, example, any_batch=dynamic)
    with atomic_directory(directory) as place:
        with tempfile.TemporaryDirectory(dir=place) as workplace:
            job = Job(plain, example, words, calibration, opset, Path(workplace), plain.names, dynamic)
            exported = [
                _export_target(target, job, place, reference, compared, _limits(target, tolerance, agreement, known))
                for target in targets
            ]
        rows = [{**asdict(entry), "file": entry.file.name} for entry in exported]
        environment = {"opset": opset, "machine": machine(), "torch": torch.__version__}
        atomic_json(place / f"{STEM}.json", {**words, "made": environment, "files": rows})
    return tuple(Exported(**{**vars(entry), "file": directory / entry.file.name}) for entry in exported)


class _OfImages(nn.Module):
    """A model of a tensor of images that returns only its outputs that count, as one tensor or a tuple."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, image: Tensor) -> Any:
        return _counted(self.model(image), self.names)


class _OfCalls(nn.Module):
    """The same for a model of any arguments."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _counted(self.model(*args, **kwargs), self.names)


def _counted(output: Any, names: Sequence[str]) -> Any:
    """The outputs that count, by name: one tensor, or a tuple."""
    if len(names) == 1:
        return logits_by_head(output)[0]
    found = named_tensors(output)
    return tuple(found[name] for name in names)


@torch.no_grad()
def _plain(model: nn.Module, call: ExampleCall) -> _OfImages | _OfCalls:
    """A copy of ``model`` in float32 on the CPU that returns only its outputs that count.

    Raises:
        UnsupportedModelError: it is a detector that returns selected boxes, whose number changes.
    """
    plain = copied(model).float().cpu().eval()
    if raw_output_modules(model):
        raise UnsupportedModelError(
            f"This {type(model).__name__} returns selected boxes, whose number changes with the image, so that its "
            "files could not be compared with it. Export it with torch.onnx.export of PyTorch, or export a module that "
            "returns what its heads give."
        )
    names = list(named_outputs(call.run(plain), call.size))
    return (_OfImages if isinstance(call.value, Tensor) else _OfCalls)(plain, names).eval()


@torch.no_grad()
def _run(model: nn.Module, call: ExampleCall) -> list[np.ndarray]:
    """The outputs of a model as arrays."""
    return [tensor.numpy() for tensor in tree_leaves(call.run(model))]


class _Timed(nn.Module):
    """A runtime as a module, for timing."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        return self.run(ExampleCall(args, kwargs))


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


def _calls(
    batches: Any, whole: PrunableModel, example: ExampleCall, dynamic: bool
) -> tuple[list[ExampleCall], list[ExampleCall]]:
    """The calls for static quantisation, and those that are compared; a single image is used for both.

    With a dynamic batch size, the compared calls are of 1, 2 and 32 images, otherwise of those of the example.
    """
    shape = whole.anatomy.input_shape
    wanted = f"Give batches of images of shape (B, {', '.join(map(str, shape))}), or a folder of images."
    if batches is None or (isinstance(batches, Sequence) and not len(batches)):
        raise DataError(wanted)
    found = given_batches(whole.model, batches, 256, len(shape) + 1)
    calls = [batch.call.to(torch.float32) for batch in found]
    if any(call.shape != shape for call in calls):
        raise DataError(wanted)
    single = [part for call in calls for part in call.split(1)]
    if not single:
        raise DataError("There are no images to compare the files on.")
    half = min(len(single) // 2, CALIBRATION)
    if not dynamic:
        parts = [part.with_batch(example.size) for part in single]
        return parts[: max(half, 1)], parts[half:]
    together = torch.cat([part.main for part in single])
    sizes = [1, 2, *[32] * (len(together) // 32 + 1)]
    starts = np.cumsum([half, *sizes])
    compared = [together[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return (
        [ExampleCall((images,)) for images in together[: max(half, 1)].split(16)],
        [ExampleCall((images,)) for images in compared if len(images)],
    )


@torch.no_grad()
def _outputs(run: Run, calls: Sequence[ExampleCall]) -> list[np.ndarray]:
    """The outputs for all calls together, each (N, ...)."""
    parts = [run(call) for call in calls]
    return [np.concatenate([np.asarray(part[number]) for part in parts]) for number in range(len(parts[0]))]


def _export_target(
    target: Target,
    job: Job,
    directory: Path,
    reference: Sequence[np.ndarray],
    calls: Sequence[ExampleCall],
    limits: tuple[float | None, float | None],
) -> Exported:
    """Write the file of one target and check it.

    Raises:
        ParityError: its outputs differ from those of the model.
    """
    files = target.files(directory, STEM)
    target.write(job, files[0])
    run = target.open(files[0])
    found = _outputs(run, calls)
    differences = [_difference(*pair) for pair in zip(found, reference, strict=True)]
    sizes = [max(float(np.abs(array).max()), 1e-12) for array in reference]
    difference = max(differences)
    relative, worst = max((gap / size, name) for gap, size, name in zip(differences, sizes, job.outputs, strict=True))
    same = float((found[0].argmax(1) == reference[0].argmax(1)).mean()) if _has_classes(job) else None
    tolerance, agreement = limits
    images = sum(call.size for call in calls)
    differs = f"The outputs of the {target.name} file differ from those of the model on {images} images: "
    values = "logits differ" if len(reference) == 1 else f"values of {worst} differ"
    if tolerance is not None and not relative <= tolerance:
        raise ParityError(
            f"{differs}{values} by up to {relative:.2g} of the largest, and {tolerance:g} is allowed. "
            "Nothing was written. Take another target, or give a larger tolerance."
        )
    if agreement is not None and same is not None and not same >= agreement:
        raise ParityError(
            f"{differs}the top-1 class is the same for {same:.1%}, and at least {agreement:.1%} is required. "
            "Nothing was written. Take another target, or give a smaller agreement."
        )
    one = job.example.with_batch(1) if job.any_batch else job.example
    like, each = torch.zeros(()), one.size
    times = paired_times({"model": job.model, "file": _Timed(run)}, one, each, runs=20, seconds=0.5, like=like)
    return Exported(
        target=target.name,
        file=files[0],
        bytes=sum(file.stat().st_size for file in files),
        difference=difference,
        relative=relative,
        agreement=same,
        images=images,
        latency_ms=summary(times["file"]).median,
        speedup=speedup(times["model"], times["file"]),
    )


def _has_classes(job: Job) -> bool:
    """Whether the model has classes and its only output is their logits."""
    inner: Any = job.model.get_submodule("model")
    return len(job.outputs) == 1 and classes_of(inner) > 0


def _difference(found: np.ndarray, reference: np.ndarray) -> float:
    """The largest absolute difference; infinite if a value is not finite or the shapes differ."""
    if found.shape != reference.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - reference).max()) if found.size else 0.0
