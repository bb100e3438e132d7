"""Open the model and the data of a run: `open_model`, `open_data` and `load_images`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from slimming.checkpoints import checkpoint, hub
from slimming.core.argument_types import checked_arguments
from slimming.core.example_inputs import given_calls
from slimming.core.modules import in_evaluation
from slimming.errors import ConfigError, DataError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.models.create import create_dense
from slimming.models.directories import CONFIG, open_directory, replaced_note
from slimming.models.hosts import classes_of, give_image_settings_, name_classes, reset_classes_
from slimming.models.transformers_tasks import CLASSIFICATION, give_example_inputs_, task_of
from slimming.runs.config import ModelConfig
from slimming.training.batches import calibration_images
from slimming.training.config import DataConfig
from slimming.training.data import open_data as open_images
from slimming.training.data import open_unlabelled
from slimming.training.images import ImageSpec
from slimming.training.samples import Data


@checked_arguments
def open_model(
    config: ModelConfig, *, classes: int | None = None, headless: bool = False
) -> tuple[nn.Module, list[str]]:
    """Open the dense model; also return notes for the user about replaced parts.

    Args:
        config: name, weights and arguments of the model.
        classes: number of classes that the classifier must have; another classifier is replaced by an untrained one.
        headless: take weights without a classifier although ``classes`` is not given.

    Raises:
        UnsupportedModelError: the model is unknown, or does not take the arguments.
        CheckpointError: the weights are missing, damaged, of another model, or a pickle with more than tensors; or the
            hub has no such repository or cannot be reached.
    """
    model, notes = _opened(config, classes, headless)
    give_example_inputs_(model)
    return model, notes


def _opened(config: ModelConfig, classes: int | None, headless: bool) -> tuple[nn.Module, list[str]]:
    addressed = hub.is_address(config.name)
    if not (Path(config.name).is_dir() or (addressed and config.checkpoint is None)):
        return create_dense(
            config.name,
            checkpoint=config.checkpoint,
            classes=classes,
            arguments=config.arguments,
            headless=headless,
        )
    path = hub.fetch(config.name) if addressed else Path(config.name)
    if (path / checkpoint.STRUCTURE).exists() or not (path / CONFIG).exists():
        if config.checkpoint is not None or config.arguments:
            raise ConfigError(
                f"{config.name} is a saved model: model.checkpoint and model.arguments have no effect; drop them."
            )
        model = checkpoint.load(path)
    elif config.checkpoint is not None:
        raise ConfigError(f"{config.name} contains weights: model.checkpoint has no effect; drop it.")
    else:
        return open_directory(path, config.arguments, classes=classes, headless=headless)
    known = classes_of(model)
    if classes is None or known == classes:
        return model, []
    reset_classes_(model, classes)
    return model, [replaced_note(config.name, known, classes)]


@checked_arguments
def open_data(config: DataConfig, model: nn.Module, seed: int = 0) -> Data:
    """Open the data for ``model``, with the input size, normalisation, interpolation and crop of the model.

    Args:
        config: the data.
        model: a model that a family reads.
        seed: seed of the augmentation.

    Raises:
        DataError: there is no such data, a class is empty, there is only one class, labels are out of range, the
            classes of the splits differ, or mean or std have another number of channels.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> len(data.train), data.classes[:3]
    (8, ('AnnualCrop', 'Forest', 'HerbaceousVegetation'))
    """
    return open_images(config, image_spec(config, model), seed)


@checked_arguments
def load_images(source: str, model: nn.Module, images: int = 512, *, seed: int = 0) -> list[Tensor]:
    """Read calibration images, preprocessed for ``model``, without labels: for `slimming.score` and `slimming.cut`.

    Args:
        source: a folder of images with or without class folders, a Parquet file (labels are not needed), a tar shard,
            or any other source of `DataConfig`.
        model: a model that a family reads.
        images: number of training images; all if there are fewer.
        seed: seed of the choice of images.

    Returns:
        Batches of shape (B, C, H, W).

    Raises:
        ConfigError: ``images`` is below 1.
        DataError: there are no images.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> [batch.shape for batch in slimming.load_images(settings()["data"]["source"], model, 40)]
    [torch.Size([40, 3, 32, 32])]
    """
    return read_images(DataConfig(source=source), model, images, seed=seed)


def read_images(config: DataConfig, model: nn.Module, images: int, *, seed: int = 0) -> list[Tensor]:
    """Read calibration images from ``config`` without augmentation, see `load_images`.

    Raises:
        ConfigError: ``images`` is below 1.
        DataError: there are no images.
    """
    config = dataclasses.replace(config, augment="none")
    pictures = open_unlabelled(config, image_spec(config, model))
    data = Data(pictures, [], ()) if pictures is not None else open_data(config, model, seed)
    return calibration_images(data, images, seed=seed)


def image_spec(config: DataConfig, model: nn.Module) -> ImageSpec:
    """Return the input specification of the model, with the mean and std of ``config`` if they are given."""
    spec = dataclasses.replace(ImageSpec.of_model(model), input_size=prunable(model).anatomy.input_shape)
    channels = spec.input_size[0]
    if len(spec.mean) != channels:  # models for grey images have the three values of their ImageNet entry
        grey = {name: (sum(value) / len(value),) * channels for name, value in (("mean", spec.mean), ("std", spec.std))}
        spec = dataclasses.replace(spec, **grey)
    given = {name: value for name in ("mean", "std") if (value := getattr(config, name)) is not None}
    for name, value in given.items():
        if len(value) != channels:
            raise DataError(
                f"data.{name} has {len(value)} numbers, the model's images have {channels} channels. Give one number "
                "per channel."
            )
    return dataclasses.replace(spec, **given)


def open_start(model_config: ModelConfig, data_config: DataConfig, seed: int) -> tuple[nn.Module, Data, list[str]]:
    """Open the model and the data, and give the model a classifier for the classes of the data.

    The names of the classes and the mean and std of the images are stored in the model.

    Args:
        model_config: the model.
        data_config: the data.
        seed: seed of the augmentation and of the weights of a new classifier.

    Returns:
        The model, the data, and notes for the user about replaced parts.

    Raises:
        SlimmingError: see `open_model`, `open_data` and `check_input`.
    """
    # A resumed run must get the same new classifier.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, notes = open_model(model_config, headless=True)
        check_trainable_here(model)
        check_input(model)
        data = open_data(data_config, model, seed)
        if notes or classes_of(model) != len(data.classes):
            model, notes = open_model(model_config, classes=len(data.classes))
    name_classes(model, data.classes)
    spec = image_spec(data_config, model)
    give_image_settings_(model, {"mean": spec.mean, "std": spec.std})  # those on which the model is trained
    return model, data, notes


def check_trainable_here(model: nn.Module) -> None:
    """Check that ``model`` is not of a task other than classification, which this library does not train.

    Raises:
        UnsupportedModelError: it is.
    """
    if (task := task_of(model)) != CLASSIFICATION:
        raise UnsupportedModelError(
            f"This {type(model).__name__} is a model for {task}, which slimming does not train. Cut it with slimming "
            "cut --one-shot, or score and cut it in Python, and retrain it in its own trainer."
        )


@torch.no_grad()
def check_input(model: nn.Module) -> None:
    """Check that ``model`` accepts images of the size that its anatomy names.

    Raises:
        UnsupportedModelError: it does not.
    """
    whole = prunable(model)
    shape = whole.anatomy.input_shape
    try:
        with in_evaluation(model):
            whole.examples()[0].run(model)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = " x ".join(map(str, shape[1:]))
        reason = (str(error).strip().splitlines() or [f"its forward raises {type(error).__name__}."])[0]
        raise UnsupportedModelError(
            f"The model does not accept images of {size} pixels: {reason} Give another img_size in "
            "model.arguments (for a model of transformers, image_size)."
        ) from error


def check_takes_images(model: nn.Module) -> None:
    """Check that ``model`` takes images alone, which is all that commands can give it.

    Raises:
        UnsupportedModelError: it takes more.
    """
    calls = given_calls(model)
    if calls and not isinstance(calls[0].value, torch.Tensor):
        names = ", ".join(calls[0].kwargs) or f"{len(calls[0].args)} arguments"
        raise UnsupportedModelError(
            f"This {type(model).__name__} takes {names}, and a command has images only. Give the model of its images "
            "alone, such as CLIPVisionModelWithProjection of CLIP, or score it in Python, with batches of all that it "
            "takes: slimming.score(model, batches)."
        )
