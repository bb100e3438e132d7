"""Classify images with an exported ONNX file: onnxruntime, numpy and Pillow only.

    python examples/onnx_inference.py photos-export/model.onnx photo.jpg other.png

All that it needs lies in the file: how an image becomes the input, and the names of the classes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def preprocess(image: Image.Image, how: dict[str, Any]) -> np.ndarray:
    """From an image to the model's input without the batch, (C, H, W), as ``preprocessing`` in the file says."""
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(how["mode"])
    image = image.resize(scaled(image.size, how["resize"], how["fit"]), Image.Resampling[how["interpolation"].upper()])
    height, width = how["crop"]
    left, top = middle(image.width, width), middle(image.height, height)
    cut = Image.new(image.mode, (width, height), tuple(round(255 * mean) for mean in how["mean"]))
    cut.paste(image, (-left, -top))
    pixels = np.asarray(cut, dtype=np.float32).reshape(height, width, -1) / 255
    normal = (pixels - np.asarray(how["mean"], np.float32)) / np.asarray(how["std"], np.float32)
    return normal.transpose(2, 0, 1)


def middle(have: int, want: int) -> int:
    """Where the middle ``want`` of ``have`` pixels begin; below 0 where there are fewer."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def scaled(size: tuple[int, int], resize: list[int], fit: str) -> tuple[int, int]:
    """Width and height of an image of ``size`` that is to cover ``resize`` (height, width), lie inside, or stretch."""
    width, height = size
    if fit == "stretch":
        return resize[1], resize[0]
    if fit == "inside":
        ratio = max(height / resize[0], width / resize[1])
        return round(width / ratio), round(height / ratio)
    if resize[0] == resize[1]:
        short = min(size)
        return resize[0] * width // short, resize[0] * height // short
    ratio = min(height / resize[0], width / resize[1])
    return round(width / ratio), round(height / ratio)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of each row."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def main() -> None:
    """Print the likeliest classes of each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an ONNX file that slimming export wrote")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--top", type=int, default=3, help="classes to print")
    arguments = parser.parse_args()
    session = ort.InferenceSession(arguments.model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["slimming"])
    batch = np.stack([preprocess(Image.open(path), about["preprocessing"]) for path in arguments.images])
    (logits,) = session.run([about["output"]["name"]], {about["input"]["name"]: batch})
    for path, shares in zip(arguments.images, softmax(logits), strict=True):
        best = np.argsort(-shares)[: arguments.top]
        names = [about["classes"][k] if about["classes"] else f"class {k}" for k in best]
        print(f"{path}: " + ", ".join(f"{name} {shares[k]:.1%}" for name, k in zip(names, best, strict=True)))


if __name__ == "__main__":
    main()
