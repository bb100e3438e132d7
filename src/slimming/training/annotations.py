"""Images with annotations: COCO files by torchvision's reader, and folders of masks."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from slimming.errors import DataError, MissingExtraError
from slimming.training.image_files import UnreadableImageError
from slimming.training.images import decode

LARGEST = 1 << 16


@dataclass(frozen=True)
class Annotated:
    """An image with what is known of it.

    Attributes:
        file: path of the image.
        objects: boxes as x1, y1, x2, y2 in pixels, each with its category and whether it is a crowd.
        categories: names of all categories by id.
        mask: path of its mask.
    """

    file: Path
    objects: tuple[tuple[tuple[float, float, float, float], int, bool], ...] = ()
    categories: Mapping[int, str] = field(default_factory=dict)
    mask: Path = Path()

    def open(self) -> Image.Image:
        """Return the image.

        Raises:
            DataError: it cannot be decoded.
        """
        try:
            return decode(self.file, 3, LARGEST)
        except (UnreadableImageError, OSError) as error:
            raise DataError(f"{self.file} cannot be read: {error}. Repair or remove it.") from error


def coco_images(folder: Path, annotations: Path) -> list[Annotated]:
    """Return the images in the JSON file ``annotations`` of COCO, whose files are in ``folder``.

    Raises:
        DataError: the file is missing or no annotations of COCO, or an image is missing.
        MissingExtraError: pycocotools is not installed.
    """
    if not annotations.is_file():
        raise DataError(f"{annotations} is not a file. Give the JSON file of COCO with the boxes of the images.")
    try:
        import pycocotools  # pyright: ignore # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Annotations of COCO need an extra: pip install 'slimming[dense]'.") from error
    from torchvision.datasets import CocoDetection

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = CocoDetection(str(folder), str(annotations)).coco
        categories = {int(key): str(entry["name"]) for key, entry in coco.cats.items()}
        found = []
        for key, entry in sorted(coco.imgs.items()):
            objects = tuple(
                ((x, y, x + width, y + height), int(each["category_id"]), bool(each.get("iscrowd", 0)))
                for each in coco.loadAnns(coco.getAnnIds(imgIds=key))
                for x, y, width, height in [each["bbox"]]
            )
            found.append(Annotated(folder / entry["file_name"], objects, categories))
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise DataError(
            f"{annotations} holds no annotations of COCO ({type(error).__name__}: {error}). Give a JSON file with "
            "images, annotations (bbox, category_id, image_id) and categories."
        ) from error
    if not found or not categories:
        raise DataError(f"{annotations} names no images or no categories. Give a JSON file of COCO.")
    _check_files([each.file for each in found], folder)
    return found


def masked_images(folder: Path, masks: Path) -> list[Annotated]:
    """Return the images in ``folder`` with the masks of the same names, whatever their extensions, in ``masks``.

    Raises:
        DataError: a folder is missing or empty, or an image has no mask.
    """
    for where, what in ((folder, "images"), (masks, "masks")):
        if not where.is_dir():
            raise DataError(f"{where} is not a folder. Give a folder of {what}.")
    by_name = {file.stem: file for file in sorted(masks.iterdir()) if file.is_file() and not file.name.startswith(".")}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise DataError(f"{folder} holds no images; add some.")
    for file in files:
        if file.stem not in by_name:
            raise DataError(f"{file} has no mask in {masks}; add one called {file.stem}.png.")
    return [Annotated(file, mask=by_name[file.stem]) for file in files]


def _check_files(files: list[Path], folder: Path) -> None:
    inside = os.path.normpath(folder)  # links are followed, since data sets are often links
    outside = [file for file in files if not Path(os.path.normpath(file)).is_relative_to(inside)]
    if outside:
        raise DataError(
            f"The annotations name {outside[0]}, which is outside {folder}. Give the folder that all images are in."
        )
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} images are not in {folder}, such as {missing[0].name}. Give the folder of "
            "the images that the annotations name."
        )
