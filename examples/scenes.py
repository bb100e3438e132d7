"""Compose scenes with objects, boxes and masks from labelled images: data for the examples of dense tasks.

    python examples/scenes.py --output scenes [--source eurosat] [--train 800] [--val 200]

Each scene is a tile of one class, magnified, on which one to three tiles of other classes are pasted as ellipses and
rectangles. The directory holds ``train`` and ``val``, each with ``images``, COCO annotations in ``annotations.json``,
and in ``masks`` an image of classes per scene, 0 being the background. The same seed gives the same scenes. By default
the tiles are the EuroSAT images of the demo (MIT licence).
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from PIL import Image, ImageDraw

from slimming.demo import HERE

BACKGROUND = 0
"""Label of the tiles that become backgrounds: in EuroSAT annual crops."""
OBJECTS = {"forest": 1, "industry": 4, "residential": 7, "sea or lake": 9}
"""Labels of the tiles that become objects, by the name of the class."""
SIDE, SMALLEST, LARGEST = 96, 24, 44
"""Sides in pixels: of a scene, of the smallest and of the largest object."""


def main(words: Sequence[str] | None = None) -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=HERE / "assets" / "eurosat", help="train.parquet, val.parquet")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--val", type=int, default=200)
    settings = parser.parse_args(words)
    for number, split in enumerate(("train", "val")):
        write_scenes(settings.source, split, settings.output, getattr(settings, split), seed=number)


def write_scenes(source: Path, split: str, output: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` scenes from the tiles of ``split``."""
    tiles = _tiles(source, split)
    place = output / split
    for folder in ("images", "masks"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"{seed} {split}")
    images, annotations = [], []
    for number in range(count):
        scene, mask, boxes = _scene(tiles, draw)
        name = f"{number:05d}.png"
        scene.save(place / "images" / name)
        mask.save(place / "masks" / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for category, (left, top, width, height) in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(OBJECTS, 1)]
    found = {"images": images, "annotations": annotations, "categories": categories}
    (place / "annotations.json").write_text(json.dumps(found))


def _tiles(source: Path, split: str) -> dict[int, list[bytes]]:
    """The encoded images by label."""
    result: dict[int, list[bytes]] = {}
    for row in pyarrow.parquet.read_table(source / f"{split}.parquet").to_pylist():
        result.setdefault(row["label"], []).append(row["image"]["bytes"])
    return result


def _scene(tiles: dict[int, list[bytes]], draw: random.Random) -> tuple[Image.Image, Image.Image, list[Any]]:
    """A scene, its classes by pixel, and (category, box) of each object."""
    scene = _opened(draw.choice(tiles[BACKGROUND])).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    mask = Image.new("L", (SIDE, SIDE))
    taken: list[tuple[int, int, int, int]] = []
    boxes: list[Any] = []
    for _ in range(draw.randint(1, 3)):
        width, height = draw.randint(SMALLEST, LARGEST), draw.randint(SMALLEST, LARGEST)
        left, top = draw.randint(0, SIDE - width), draw.randint(0, SIDE - height)
        category, label = draw.choice(list(enumerate(OBJECTS.values(), 1)))
        tile = _opened(draw.choice(tiles[label])).resize((width, height), Image.Resampling.BILINEAR)
        shape = Image.new("L", (width, height))
        paint = ImageDraw.Draw(shape)
        (paint.ellipse if draw.random() < 0.5 else paint.rectangle)((0, 0, width - 1, height - 1), fill=255)
        if any(_overlap((left, top, width, height), other) for other in taken):
            continue
        scene.paste(tile, (left, top), shape)
        mask.paste(category, (left, top), shape)
        taken.append((left, top, width, height))
        boxes.append((category, taken[-1]))
    return scene, mask, boxes


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    """Whether two boxes (left, top, width, height) overlap."""
    return all(first[at] < second[at] + second[at + 2] and second[at] < first[at] + first[at + 2] for at in (0, 1))


if __name__ == "__main__":
    main()
