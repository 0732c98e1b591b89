"""The two pictures of README.md, taken from a running store with a headless Chromium.

    scripts/screenshots.py RUN_FOLDER DASHBOARD_URL

RUN_FOLDER is that of a volatility run, DASHBOARD_URL the address of the served pages (cryptoresearch dashboards).
They land in nbs/images; commit them. Needs pillow and playwright (development requirements).
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "nbs" / "images"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def save(parts: list[Image.Image], name: str) -> None:
    "Stack the parts with a light line between them."
    width, height = max(p.width for p in parts), sum(p.height for p in parts) + 6 * (len(parts) - 1)
    sheet, top = Image.new("RGB", (width, height), "#d8dce3"), 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + 6
    IMAGES.mkdir(exist_ok=True)
    sheet.quantize(128).save(IMAGES / name, optimize=True)


def shot(page: Page, top: float, bottom: float, left: int = 100, width: int = 1000) -> Image.Image:
    data = page.screenshot(full_page=True, clip={"x": left, "y": top, "width": width, "height": bottom - top})
    return Image.open(io.BytesIO(data)).convert("RGB")


def report(page: Page, folder: Path) -> None:
    "Verdict and summary; then the scores next to the benchmarks."
    page.goto((folder / "report.html").resolve().as_uri())
    accuracy = page.locator("summary:has-text('Forecast accuracy')")
    accuracy.click()
    page.wait_for_timeout(4000)
    end = page.get_by_text("Each score with its interval").first.bounding_box()["y"]
    save([shot(page, 0, page.locator("#open-all").bounding_box()["y"] - 4), shot(page, accuracy.bounding_box()["y"] - 2, end - 10)], "report.png")


def dashboard(page: Page, url: str) -> None:
    "Three months of the market page."
    page.goto(f"{url.rstrip('/')}/voila/render/market.ipynb")
    page.wait_for_function("document.querySelector('.cr-chart')?.dataset.length", timeout=120_000)
    page.get_by_role("button", name="3M").click()
    page.wait_for_timeout(4000)
    box = page.locator(".cr-chart").bounding_box()
    save([shot(page, 0, box["y"] + box["height"], 0, 1240)], "dashboard.png")


if __name__ == "__main__":
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        tab = browser.new_page(viewport={"width": 1240, "height": 1000})
        report(tab, Path(sys.argv[1]))
        tab.set_viewport_size({"width": 1240, "height": 1000})
        dashboard(tab, sys.argv[2])
        browser.close()
