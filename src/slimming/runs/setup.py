"""Opening what a run starts from: a model by its name or file, and images as it takes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.checkpoints import checkpoint, hub
from slimming.core.modules import in_evaluation
from slimming.errors import ConfigError, DataError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.models.create import create_dense
from slimming.models.directories import CONFIG, open_directory
from slimming.models.hosts import classes_of, give_image_settings_, name_classes, reset_classes_
from slimming.training.batches import calibration_images
from slimming.training.config import DataConfig
from slimming.training.data import open_data as open_images
from slimming.training.data import open_unlabelled
from slimming.training.images import ImageSpec
from slimming.training.samples import Data


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense start.

    Attributes:
        name: a timm model name; ``hf-hub:owner/name``, a model of slimming, timm or transformers on the hub;
            ``transformers:owner/name`` or ``transformers:DIRECTORY``; ``torchvision:name``; or a directory that
            `slimming.save`, timm or transformers wrote.
        checkpoint: local weights (``.safetensors``, or ``.pth`` of plain tensors); null takes the host's
            pretrained ones.
        arguments: further arguments of the host's constructor, such as timm's ``img_size``.
    """

    name: str
    checkpoint: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def open_model(config: ModelConfig, *, classes: int | None = None) -> tuple[nn.Module, list[str]]:
    """Open the dense start; also gives notes for the user on what was replaced.

    Raises:
        UnsupportedModelError: unknown model, or arguments that it does not take.
        CheckpointError: weights that are missing, damaged, of another model, or a pickle of more than tensors; or the
            hub has no such repository, or cannot be reached.
    """
    addressed = hub.is_address(config.name)
    if not (Path(config.name).is_dir() or (addressed and config.checkpoint is None)):
        return create_dense(config.name, checkpoint=config.checkpoint, classes=classes, arguments=config.arguments)
    path = hub.fetch(config.name) if addressed else Path(config.name)
    if (path / checkpoint.STRUCTURE).exists() or not (path / CONFIG).exists():
        if config.checkpoint is not None or config.arguments:
            raise ConfigError(
                f"{config.name} is a whole model: model.checkpoint and model.arguments have no effect; drop them."
            )
        model = checkpoint.load(path)
    elif config.checkpoint is not None:
        raise ConfigError(f"{config.name} has weights of its own: model.checkpoint has no effect; drop it.")
    else:
        model = open_directory(path, config.arguments) if config.arguments else checkpoint.load(path)
    known = classes_of(model)
    if classes is None or known == classes:
        return model, []
    reset_classes_(model, classes)
    note = f"{config.name} knows {known} classes; its classifier was replaced by an untrained one for {classes}."
    return model, [note]


def open_data(config: DataConfig, model: nn.Module, seed: int = 0) -> Data:
    """Open images for ``model``: its own input size, normalisation, interpolation and crop.

    Args:
        config: where the images are.
        model: a model that a family reads.
        seed: decides the augmentation.

    Raises:
        DataError: no such data, an empty class, one class only, labels out of range, splits that differ, or a mean
            or std of another number of channels.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> len(data.train), data.classes[:3]
    (8, ('AnnualCrop', 'Forest', 'HerbaceousVegetation'))
    """
    return open_images(config, image_spec(config, model), seed)


def load_images(source: str, model: nn.Module, images: int = 512, *, seed: int = 0) -> list[Tensor]:
    """Read some training images as ``model`` takes them, without labels: for `slimming.score` and `slimming.cut`.

    Args:
        source: a folder of images, in class folders or not, a Parquet file (it needs no labels) or a tar shard, or
            anything else that `DataConfig` takes.
        model: a model that a family reads.
        images: how many, or all if there are fewer.
        seed: which ones.

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
    """`load_images` of data with settings of its own; what it says of augmentation is left out.

    Raises:
        ConfigError: ``images`` is below 1.
        DataError: there are no images.
    """
    config = dataclasses.replace(config, augment="none")
    found = open_unlabelled(config, image_spec(config, model))
    data = Data(found, [], ()) if found is not None else open_data(config, model, seed)
    return calibration_images(data, images, seed=seed)


def image_spec(config: DataConfig, model: nn.Module) -> ImageSpec:
    """What the model takes, with what the data says otherwise."""
    spec = dataclasses.replace(ImageSpec.of_model(model), input_size=prunable(model).anatomy.input_shape)
    channels = spec.input_size[0]
    if len(spec.mean) != channels:  # a model for grey images keeps the three numbers of its ImageNet entry
        grey = {name: (sum(value) / len(value),) * channels for name, value in (("mean", spec.mean), ("std", spec.std))}
        spec = dataclasses.replace(spec, **grey)
    asked = {name: value for name in ("mean", "std") if (value := getattr(config, name)) is not None}
    for name, value in asked.items():
        if len(value) != channels:
            raise DataError(f"data.{name} has {len(value)} numbers, the model's images {channels} channels.")
    return dataclasses.replace(spec, **asked)


def open_start(model_config: ModelConfig, data_config: DataConfig, seed: int) -> tuple[nn.Module, Data, list[str]]:
    """Open model and data and make them fit: the classifier follows the data's classes.

    The names of the classes, and the mean and std of the images, travel with the model from here on.

    Args:
        model_config: the model.
        data_config: the images.
        seed: decides the augmentation, and the weights of a new classifier.

    Returns:
        The model, the data, and notes for the user on what was replaced.

    Raises:
        SlimmingError: see `open_model`, `open_data` and `check_input`.
    """
    # A run that goes on must meet the same new classifier again.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, notes = open_model(model_config)
        check_input(model)
        data = open_data(data_config, model, seed)
        if classes_of(model) != len(data.classes):
            model, notes = open_model(model_config, classes=len(data.classes))
    name_classes(model, data.classes)
    spec = image_spec(data_config, model)
    give_image_settings_(model, {"mean": spec.mean, "std": spec.std})  # what the model is trained on from here
    return model, data, notes


@torch.no_grad()
def check_input(model: nn.Module) -> None:
    """Check that ``model`` takes images of the size that it was made for.

    Raises:
        UnsupportedModelError: it does not.
    """
    shape = prunable(model).anatomy.input_shape
    parameter = next(model.parameters())
    image = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with in_evaluation(model):
            model(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = " x ".join(map(str, shape[1:]))
        reason = (str(error).strip().splitlines() or [f"its forward ends in {type(error).__name__}."])[0]
        raise UnsupportedModelError(
            f"The model does not take images of {size} pixels: {reason} Give another img_size in model.arguments."
        ) from error
