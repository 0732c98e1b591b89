"""Measure how soon the dashboards show a picture, on a store of simulated trades, in a headless Chromium on this machine.

    scripts/measure_dashboards.py                       each page three times: median seconds, and what was sent
    scripts/measure_dashboards.py --against FOLDER      another checkout too, in turn with this one, and the ratio
    scripts/measure_dashboards.py --visitors 20         visitors who come at once, their kernels' memory

`start` is the visit of a server that has just begun to answer, `cold` one with an empty cache of the browser, `warm` the same again. Columns in seconds:
html (the server has sent the document), scripts (the last script has arrived), words (the first text from the store), picture
(the first figure; on the home page its tables), done (nothing changes any more). MB is what the visit adds to the memory of the server and
its kernels, shared pages in proportion. --home FOLDER keeps the store for the next time.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.ingest.files import process_file
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.run import train_run
from cryptoresearch.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
PLOT = ".js-plotly-plot .main-svg"
PICTURES = {"home": ".cr-part table", "market": ".cr-chart[data-length]", "predictions": PLOT, "runs": PLOT, "compare": PLOT, "data": PLOT}
WATCH = """
window.seen = {};
const picture = PICTURE, words = ".cr-part, .cr-provenance";
const shown = (selector) => [...document.querySelectorAll(selector)].some((e) => (e.textContent || e.dataset.length) && e.getClientRects().length);
new MutationObserver(() => {
  const now = performance.now() / 1000;
  for (const [name, selector] of [["words", words], ["picture", picture]]) if (!(name in seen) && shown(selector)) seen[name] = now;
  seen.done = now;
}).observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
"""
TIMES = """() => {
  const s = (name) => performance.getEntriesByType("resource").filter((r) => r.initiatorType === name).map((r) => r.responseEnd);
  const seconds = { html: performance.getEntriesByType("navigation")[0].responseEnd, scripts: Math.max(0, ...s("script")) };
  return { html: seconds.html / 1000, scripts: seconds.scripts / 1000, ...seen };
}"""


def fill(home: Path) -> dict[str, str]:
    "Fill a store unless it is there: six days of simulated trades, bars, two models of volatility; return its settings."
    s = Settings(_env_file=None, duckdb_path=str(home / "store" / "catalog.sqlite"), runs_dir=str(home / "runs"), duckdb_memory_limit="1GB")
    if not (home / "filled").exists():
        with init_duckdb(s) as con:
            for file in simulate_trades(home / "files", "SIMUSDT", "2024-01-01", 6, 60_000):
                process_file(con, file, symbol="SIMUSDT", settings=s)
            for spec in ("1m", "5m", "1h"):
                make_bars(con, "SIMUSDT", spec, source="simulated")
            config = RunConfig("SIMUSDT", "1m", "simulated", "volatility", 30, refit_every="1D", features=("volatility",), model="ridge")
            for one in (config, replace(config, params={"penalty": 3e5})):
                train_run(con, one, s)
        (home / "filled").touch()
    return {"DUCKDB_PATH": s.duckdb_path, "RUNS_DIR": str(s.runs_dir), "DUCKDB_MEMORY_LIMIT": "1GB", "CRYPTORESEARCH_HOME": str(home)}


def tree(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    "List the processes of a server."
    with suppress(psutil.Error):
        return [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return []


def total(processes: list[psutil.Process], what: str) -> float:
    "Sum processor seconds (`cpu`) or proportional memory in MB (`pss`) of processes."
    found = 0.0
    for process in processes:
        with suppress(psutil.Error):
            found += sum(process.cpu_times()[:2]) if what == "cpu" else process.memory_full_info().pss / 1e6
    return found


def wait_until_quiet(server: subprocess.Popen[bytes]) -> None:
    "Wait until the processes of a server have used less than a tenth of a core for two seconds."
    before = -1.0
    for _ in range(90):
        now = total(tree(server), "cpu")
        if 0 <= now - before < 0.2 and before >= 0:
            return
        before = now
        time.sleep(2)


@contextmanager
def serve(code: Path, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    "Serve the pages of a checkout; yield the process and its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from cryptoresearch.serving.dashboards import dashboards; dashboards(port=int(sys.argv[1]))"]
    own = {k: v for k, v in os.environ.items() if k not in ("RUNS_DIR",)}
    server = subprocess.Popen([*command, str(port)], env={**own, **env, "PYTHONPATH": str(code)}, cwd=env["CRYPTORESEARCH_HOME"])
    try:
        for _ in range(300):
            with suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/voila/static/voila.js", timeout=5)
                break
            time.sleep(0.2)
        yield server, f"http://127.0.0.1:{port}/voila/render/"
    finally:
        server.terminate()
        server.wait(30)


def open_page(context: BrowserContext, address: str, name: str) -> tuple[Page, dict[str, float]]:
    "Open a page; return it and a count of what is sent to it, which grows."
    page = context.new_page()
    sent = {"kB": 0.0, "requests": 0.0}
    wire = page.context.new_cdp_session(page)
    wire.send("Network.enable")

    def arrived(size: float, requests: int) -> None:
        sent["kB"] += size / 1000
        sent["requests"] += requests

    wire.on("Network.loadingFinished", lambda e: arrived(e["encodedDataLength"], 1))
    wire.on("Network.webSocketFrameReceived", lambda e: arrived(len(e["response"]["payloadData"]), 0))
    page.add_init_script(WATCH.replace("PICTURE", repr(PICTURES[name])))
    page.goto(f"{address}{name}.ipynb", wait_until="commit", timeout=120_000)
    return page, sent


def visit(context: BrowserContext, server: subprocess.Popen[bytes], address: str, name: str) -> dict[str, float]:
    "Visit a page until it does not change any more; return seconds, what was sent and the memory that it took."
    before = total(tree(server), "pss")
    page, sent = open_page(context, address, name)
    page.wait_for_function("window.seen?.picture && performance.now() / 1000 - seen.done > 2", timeout=180_000, polling=200)
    found: dict[str, Any] = {**page.evaluate(TIMES), **sent, "MB": total(tree(server), "pss") - before}
    page.close(run_before_unload=True)
    return found


def new_context(browser: Browser) -> BrowserContext:
    "Open a profile with an empty cache."
    return browser.new_context(viewport={"width": 1280, "height": 900})


def measure_pages(browser: Browser, codes: dict[str, Path], env: dict[str, str], repeat: int, pages: list[str]) -> pd.DataFrame:
    "Visit each page a number of times with each version of the code, in turn."
    rows = []
    for _ in range(repeat):
        for version, code in codes.items():
            with serve(code, env) as (server, address):
                for name, states in [(pages[0], ("start",)), *((name, ("cold", "warm")) for name in pages)]:
                    context = new_context(browser)
                    for state in states:
                        if state != "start":
                            wait_until_quiet(server)
                        rows.append({"page": name, "state": state, "code": version, **visit(context, server, address, name)})
                    context.close()
    return pd.DataFrame(rows)


def measure_visitors(browser: Browser, code: Path, env: dict[str, str], visitors: int, pages: list[str]) -> dict[str, float]:
    "Open pages at once; return seconds until pictures, and the memory of the server and its kernels."
    with serve(code, env) as (server, address):
        wait_until_quiet(server)
        before, began, opened = total(tree(server), "pss"), time.perf_counter(), []
        for k in range(visitors):
            opened.append(open_page(new_context(browser), address, pages[k % len(pages)])[0])
        waits = []
        for page in opened:
            page.wait_for_function("window.seen?.picture", timeout=600_000, polling=200)
            waits.append(time.perf_counter() - began)
        kernels = len(tree(server)) - 1
        after = total(tree(server), "pss")
        own = [page.evaluate("seen.picture") for page in opened]
        for page in opened:
            page.context.close()
    figures = {"all_s": max(waits), "median_visitor_s": statistics.median(own), "processes": kernels}
    return figures | {"before_mb": before, "after_mb": after, "mb_per_visitor": (after - before) / visitors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--visitors", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pages", nargs="+", default=list(PICTURES), choices=list(PICTURES))
    parser.add_argument("--home", type=Path, help="folder that keeps the store")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dashboards-") as folder, sync_playwright() as playwright:
        env = fill(asked.home or Path(folder))
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        codes = ({"before": asked.against} if asked.against else {}) | {"now": ROOT}
        loads = [os.getloadavg()[0]]
        if asked.visitors:
            found = {name: measure_visitors(browser, code, env, asked.visitors, asked.pages) for name, code in codes.items()}
            print(pd.DataFrame(found).round(2).to_string())
        else:
            rows = measure_pages(browser, codes, env, asked.repeat, asked.pages)
            table = rows.groupby(["page", "state", "code"], sort=False).median()
            print(table.round(2).to_string())
            if asked.against:
                picture = table["picture"].unstack("code")
                print((picture["now"] / picture["before"]).rename("picture, now / before").unstack("state").round(2).to_string())
        loads.append(os.getloadavg()[0])
        print(f"{os.cpu_count()} cores, load {loads[0]:.1f} at the start and {loads[1]:.1f} at the end, {asked.repeat} visits each")
        browser.close()


if __name__ == "__main__":
    main()
