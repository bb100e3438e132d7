"""How large the page of a report's explorer is, how long its plans take, and how fast a browser opens it.

    python benchmarks/explorer.py [--model vit_base_patch16_224]

The scores are drawn evenly at random, and four images of noise stand for those of a run: they are the worst that
JPEG can meet. Times in the browser run from the start of the navigation to the end of the first drawing. Needs
Debian's chromium, and playwright (extra dev).
"""

from __future__ import annotations

import base64
import dataclasses
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import slimming
from common import Spread, parser, table, write
from slimming.planning.scores import ScoredModel, save_scores
from slimming.report import write_comparison
from slimming.report.explored import Explored
from slimming.report.model import Picture
from slimming.runs.explore import explore
from slimming.searching.mask_search import RECORD, SCORES_FILE

IMAGES = 4


def searched(name: str, directory: Path) -> None:
    """Leave what the explorer reads of a search: random scores of ``name``."""
    masks = slimming.attach(timm.create_model(name))
    scores = {group: torch.rand(mask.shape) for group, mask in masks.items()}
    save_scores(directory / SCORES_FILE, ScoredModel(anatomy=masks.anatomy, scores=scores))
    (directory / RECORD).write_text("{}", "utf-8")


def noise(size: int, seed: int) -> Picture:
    """An image of noise as a run would keep it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return Picture(label=f"noise {seed}", png=base64.b64encode(buffer.getvalue()).decode(), width=size, height=size)


def opening(browser: Browser, page_file: Path) -> tuple[float, float]:
    """Seconds to open the page and to draw it, and of one move of the slider."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(300_000)
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-explorer=ready]")
    opened = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
    moved = page.evaluate(
        "(() => { const began = performance.now(), s = document.getElementById('slider-a');"
        "s.value = Math.round(s.max / 3); s.dispatchEvent(new Event('input'));"
        "document.body.getBoundingClientRect(); return performance.now() - began; })()"
    )
    page.close()
    return opened / 1000, moved / 1000


def main() -> None:
    """Plan, write, open, and write the table."""
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--model", default="vit_base_patch16_224")
    settings = arguments.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as started:
        directory = Path(place)
        searched(settings.model, directory)
        began = time.perf_counter()
        found: Explored = explore(directory)
        seconds = time.perf_counter() - began
        pictures = tuple(noise(224, seed) for seed in range(IMAGES))
        page = write_comparison([], [dataclasses.replace(found, pictures=pictures)], directory / "page.html")
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=300_000
        )
        times = [opening(browser, page) for _ in range(settings.rounds)]
        version = browser.version
        browser.close()
        size = page.stat().st_size
    row: dict[str, Any] = {
        "model": settings.model,
        "plans": sum(map(len, found.steps.values())),
        "plan_seconds": seconds,
        "bytes": size,
        "opened": Spread.of([opened for opened, _ in times]),
        "moved": Spread.of([moved for _, moved in times]),
        "chromium": version,
    }
    header = ["model", "plans", "s to plan all", "page, MB", "s to open", "ms to redraw"]
    cells = [settings.model, row["plans"], f"{seconds:.0f}", f"{size / 1e6:.2f}", row["opened"].text(2)]
    moved = Spread.of([1000 * moved for _, moved in times])
    note = f"Chromium {version}, without a GPU; random scores, and {IMAGES} images of noise."
    write("explorer", settings=settings, rows=[row], markdown=f"{table(header, [[*cells, moved.text(0)]])}\n{note}")


if __name__ == "__main__":
    main()
