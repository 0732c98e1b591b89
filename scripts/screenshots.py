"""The two pictures of README.md, taken from a running store with a headless Chromium.

    scripts/screenshots.py RUN_FOLDER DASHBOARD_URL

RUN_FOLDER is that of a volatility run, DASHBOARD_URL a served market page that knows it (cryptoresearch dashboards).
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
    "Verdict and what was run; then the scores next to the benchmarks."
    page.goto((folder / "report.html").resolve().as_uri())
    page.wait_for_timeout(4000)
    titles = ("Data", "Forecast accuracy")
    tops = {text: page.locator(f":is(h2, .figure-title):has-text('{text}')").first.bounding_box()["y"] for text in titles}
    end = page.get_by_text("Each score with its interval").first.bounding_box()["y"]
    save([shot(page, 0, tops["Data"] - 20), shot(page, tops["Forecast accuracy"] - 20, end - 10)], "report.png")


def dashboard(page: Page, url: str) -> None:
    "Two hundred bars and the volatility model."
    page.goto(url)
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=120_000)
    page.wait_for_timeout(3000)
    lists = page.locator("select")
    lists.nth(2).select_option(label="last 200")
    page.wait_for_timeout(3000)
    model = next(o for o in lists.nth(5).locator("option").all_text_contents() if o.startswith("volatility"))
    lists.nth(5).select_option(label=model)
    page.wait_for_timeout(5000)
    box = page.locator(".js-plotly-plot").first.bounding_box()
    save([shot(page, 0, box["y"] + box["height"], 0, 1240)], "dashboard.png")


if __name__ == "__main__":
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        tab = browser.new_page(viewport={"width": 1240, "height": 1000})
        report(tab, Path(sys.argv[1]))
        tab.set_viewport_size({"width": 1240, "height": 1000})
        dashboard(tab, sys.argv[2])
        browser.close()
