"""Makes docs/images/report.png anew: the page of an H100's figures, in Debian's Chromium.

python scripts/report_screenshot.py
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin
from playwright.sync_api import sync_playwright

from mixquant.report import page
from mixquant.results import read

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "attention_speed_h100.json"
PICTURE = ROOT / "docs" / "images" / "report.png"


def main() -> None:
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "report.html"
        file.write_text(page([(SOURCE.name, read(SOURCE))]), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        tab.goto(file.as_uri())
        tab.screenshot(path=PICTURE, full_page=True)
        browser.close()
    # tests/unit/test_documents.py sees by this whether the figures have changed since.
    note = PngImagePlugin.PngInfo()
    note.add_text("source", hashlib.sha256(SOURCE.read_bytes()).hexdigest())
    with Image.open(PICTURE) as picture:
        picture.load()
        picture.save(PICTURE, pnginfo=note, optimize=True)


if __name__ == "__main__":
    main()
