"""The market page in a browser: it draws, changes when one clicks, and asks no other machine for anything."""

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.labels.horizon import fixed_horizon

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SERVE = "import sys; from cryptoresearch.serving.dashboards import dashboards; dashboards(port=int(sys.argv[1]))"
TITLE = ".js-plotly-plot .gtitle"


def fill(settings: Any, shared: Path) -> None:
    "Six years of real hours, a day of simulated minutes, and a run with invented predictions."
    con = init_duckdb(settings)
    process_file(con, shared / "BTCUSDT-1h-2017-08_2024-04.parquet", symbol="BTCUSDT", interval="1h")
    for spec in ("1h", "1d"):
        make_bars(con, "BTCUSDT", spec, source="klines")
    rng = np.random.default_rng(1)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.001, 1440)))
    ts = pd.date_range("2024-01-01", periods=1440, freq="1min")
    walk = pd.DataFrame({"ts": ts, "close_ts": ts + pd.Timedelta("1min"), "open": np.r_[100, close[:-1]], "close": close, "volume": rng.gamma(2, 3, 1440)})
    walk["high"], walk["low"] = walk[["open", "close"]].max(axis=1), walk[["open", "close"]].min(axis=1)
    con.register("walk", walk)
    write(
        con,
        lambda c: c.execute("""INSERT INTO bars (symbol, source, kind, spec, ts, close_ts, open, high, low, close, volume, gap)
        SELECT 'TESTUSD', 'simulated', 'time', '1m', ts, close_ts, open, high, low, close, volume, false FROM walk"""),
    )
    con.close()
    hours = bar_frame(pd.read_parquet(shared / "BTCUSDT-1h-2017-08_2024-04.parquet"), "1h", symbol="BTCUSDT").tail(2000)
    folder = Path(settings.runs_dir) / "btcusdt-1h-return24-0123456789"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "config": {"symbol": "BTCUSDT", "spec": "1h", "target": "return", "horizon": 24}}))
    fixed_horizon(hours, 24, "return").assign(prediction=rng.normal(0, 0.005, len(hours))).to_parquet(folder / "predictions.parquet")


def start(process: Any, settings: Any) -> str:
    "Voila on a port of its own; its address once it answers."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"DUCKDB_PATH": settings.duckdb_path, "RUNS_DIR": settings.runs_dir}
    server = process([sys.executable, "-c", SERVE, port], env=env)
    for _ in range(240):
        assert server.poll() is None, "Voila ended"
        try:
            httpx.get(f"http://127.0.0.1:{port}/voila/static/voila.js", timeout=5)
        except httpx.HTTPError:
            time.sleep(0.25)
        else:
            return f"http://127.0.0.1:{port}/"
    raise AssertionError("Voila does not answer")


def choose(page: Any, label: str, option: str) -> None:
    "Choose from the list below a label, as a visitor would."
    page.locator(".cr-label", has_text=label).first.locator("xpath=ancestor::div[contains(@class,'widget-vbox')][1]//select").select_option(label=option)


def titles(page: Any) -> list[str]:
    return page.locator(TITLE).all_text_contents()


def wait_for(page: Any, what: str) -> None:
    "Until the first figure's title says so."
    page.wait_for_function("([css, what]) => document.querySelector(css)?.textContent.includes(what)", arg=[TITLE, what], timeout=60_000)


def test_market_page_draws_and_changes_without_internet(page, process, settings, shared):
    fill(settings, shared)
    address = start(process, settings)
    page.goto(address, timeout=120_000)
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=120_000)
    wait_for(page, "BTCUSDT · 1h bars")
    assert any("return, 24 bars" in title for title in titles(page))
    assert "archived candles" in page.locator(".cr-provenance").inner_text()
    assert page.locator(".modebar-btn").count() > 0 and page.locator(".modebar-btn[data-title*='hare chart']").count() == 0  # it would upload the figure
    candles = page.evaluate("document.querySelector('.js-plotly-plot').data[0].x.length")
    assert candles == 500

    # fewer bars, another indicator: the same figure, redrawn
    choose(page, "Show", "last 100")
    page.wait_for_function("document.querySelector('.js-plotly-plot').data[0].x.length === 100", timeout=60_000)
    choose(page, "Second indicator", "willr_14")
    page.wait_for_function("document.querySelector('.js-plotly-plot').data.some(t => t.name === 'willr_14')", timeout=60_000)

    choose(page, "Bars", "1d")
    wait_for(page, "BTCUSDT · 1d bars")

    # simulated data say so, on the page and in the figure
    choose(page, "Market", "TESTUSD (simulated)")
    wait_for(page, "TESTUSD · 1m bars")
    assert "SIMULATED DATA, not a market" in titles(page)[0]
    assert "SIMULATED DATA, not a market" in page.locator(".cr-provenance").inner_text()

    # on a telephone nothing sticks out
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.querySelector('.js-plotly-plot .main-svg').getBoundingClientRect().width <= 390", timeout=60_000)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390

    assert page.outside == []
    assert page.errors == []


def test_without_a_store_the_page_says_what_to_run(page, process, settings):
    address = start(process, settings)
    for host, status in (("evil.example", 403), ("10.0.0.7", 403), ("localhost", 200)):  # a page elsewhere that takes this machine's address
        assert httpx.get(address, headers={"Host": host}, timeout=120).status_code == status
        upgrade = {"Host": host, "Origin": f"http://{host}", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        assert httpx.get(f"{address}api/kernels/{'0' * 8}-0000-0000-0000-{'0' * 12}/channels", headers=upgrade, timeout=60).status_code == (403 if status == 403 else 404)
    page.goto(address, timeout=120_000)
    page.wait_for_selector(".cr-provenance", timeout=120_000)
    assert "cryptoresearch demo" in page.locator(".cr-provenance").inner_text()
    assert "Traceback" not in page.content()
    assert page.outside == []
    assert page.errors == []


def test_the_page_follows_models_that_come_and_go(settings, shared):
    import shutil

    from cryptoresearch.serving.dashboards import MarketPage

    fill(settings, shared)
    runs = Path(settings.runs_dir)
    for spec, symbol, name in (("1d", "BTCUSDT", "btcusdt-1d-return5-0000000001"), ("1d", "TESTUSD", "testusd-1d-return5-0000000002")):
        (runs / name).mkdir()
        (runs / name / "run.json").write_text(json.dumps({"id": name, "config": {"symbol": symbol, "spec": spec, "target": "return", "horizon": 5}}))
    with init_duckdb(settings) as con:
        write(con, lambda c: c.execute("INSERT INTO bars SELECT * REPLACE ('1d' AS spec, ts + INTERVAL 1 DAY AS close_ts) FROM bars WHERE symbol = 'TESTUSD' AND hour(ts) = 0 AND minute(ts) = 0"))
        write(con, lambda c: c.execute("INSERT INTO bars SELECT * REPLACE ('1m' AS spec, 'BTCUSDT' AS symbol, 'klines' AS source) FROM bars WHERE symbol = 'TESTUSD' AND spec = '1m'"))
    page = MarketPage(settings)
    page.market.value, page.spec.value = ("BTCUSDT", "klines"), "1m"
    assert page.run.value == ""
    page.market.value = ("TESTUSD", "simulated")  # has 1m bars too, but its model is of 1d
    assert (page.spec.value, page.run.value) == ("1d", "testusd-1d-return5-0000000002")
    page.spec.value = "1m"
    assert page.spec.value == "1m", "a chosen length is kept"
    page.market.value, page.spec.value = ("BTCUSDT", "klines"), "1h"
    chosen = page.run.value
    shutil.rmtree(runs / chosen)
    page.refresh()
    assert page.run.value == "" and chosen in page.gone and chosen in page.forecast.figure
    page.spec.value = "1d"
    page.run.value = "btcusdt-1d-return5-0000000001"
    assert page.gone == ""
    page.con.close()


def test_the_kernel_of_a_page_that_vanished_ends(page, process, settings, monkeypatch):
    kernels = "import sys, cryptoresearch.serving.dashboards as d; d.write_template.__defaults__ = (*d.write_template.__defaults__[:-1], 6); d.dashboards(port=int(sys.argv[1]))"
    monkeypatch.setitem(globals(), "SERVE", kernels)
    address = start(process, settings)

    def running() -> int:
        return sum(b"ipykernel_launcher" in command(p) and settings.runs_dir.encode() in environment(p) for p in Path("/proc").glob("[0-9]*"))

    def environment(p: Path) -> bytes:
        return read(p / "environ")

    def command(p: Path) -> bytes:
        return read(p / "cmdline")

    def read(file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError:
            return b""

    page.goto(address, timeout=120_000)
    page.wait_for_selector(".cr-provenance", timeout=120_000)
    assert running() == 1
    time.sleep(12)
    assert running() == 1, "an open page keeps its kernel"
    httpx.get(address, timeout=120)  # a visitor who never connects
    assert running() == 2
    for _ in range(40):
        time.sleep(0.5)
        if running() == 1:
            break
    assert running() == 1
