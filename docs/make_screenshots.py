"""Screenshots of the explorer of a run at three budgets, into docs/images.

    python docs/make_screenshots.py runs/demo

Needs Debian's chromium, and playwright (extra dev).
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent / "images"
BUDGETS = (70, 50, 30)


def main() -> None:
    """Open the report, choose each budget, and take its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    page_file = parser.parse_args().run / "report.html"
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=120_000
        )
        page = browser.new_page(viewport={"width": 1180, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("html[data-explorer=ready]")
        page.add_style_tag(
            content="#said, #explore .lead, #explorer details, .view > :is(h4, pre, .copy) {display:none}"
        )
        for share in BUDGETS:
            page.fill("#slider-a", str(share - int(page.evaluate(FIRST))))
            save(page.locator("#explore").screenshot(), IMAGES / f"explorer-{share}.png")
        browser.close()


FIRST = "Math.round(100 - Number(document.getElementById('slider-a').max))"
"""The smallest share of the slider, in hundredths."""


def save(png: bytes, path: Path) -> None:
    """Keep few colours, so that the file is small."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(160, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
