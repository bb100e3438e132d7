"""A picture of the page in examples/browser, into docs/images.

    python docs/make_browser_picture.py

Before it: `npm install` there, and beside it the exports that `benchmarks/exports.py --work DIR` left, as dense/ and
slim/. The image is one of the demo's. Needs Debian's chromium, and playwright (extra dev).
"""

from __future__ import annotations

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
from make_screenshots import IMAGES, save
from playwright.sync_api import FilePayload, sync_playwright

from slimming.demo import HERE

PAGE = IMAGES.parents[1] / "examples" / "browser"


def main() -> None:
    """Serve the page, give it an image, and take its picture."""
    (first,) = pq.read_table(HERE / "assets" / "eurosat" / "val.parquet").slice(800, 1).to_pylist()
    name = Path(first["image"]["path"]).name
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(PAGE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as started:
        threading.Thread(target=server.serve_forever).start()
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=120_000
        )
        page = browser.new_page(viewport={"width": 820, "height": 640})
        page.set_default_timeout(120_000)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("html[data-state=ready]")
        file = FilePayload(name=name, mimeType="image/jpeg", buffer=first["image"]["bytes"])
        page.set_input_files("#file", file)
        page.wait_for_selector("html[data-state=done]")
        page.evaluate("document.activeElement.blur()")
        save(page.screenshot(full_page=True), IMAGES / "browser.png")
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()
