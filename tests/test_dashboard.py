"""The pages in a browser: they draw, change when one clicks, and ask no other machine for anything."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.labels.horizon import fixed_horizon
from cryptoresearch.settings import Settings

pytestmark = [pytest.mark.browser, pytest.mark.slow]
# with other limits than a user's: seconds until a closed page's kernel ends, and pages at the same time
SERVE = "import sys, cryptoresearch.serving.dashboards as d; d.write_template.__defaults__ = (*d.write_template.__defaults__[:1], {idle_s}, {visitors}); d.dashboards(port=int(sys.argv[1]))"
AS_A_USER = "import sys; from cryptoresearch.serving.dashboards import dashboards; dashboards(port=int(sys.argv[1]))"


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


@dataclass(frozen=True)
class Served:
    "A store and the address of its pages."

    settings: Settings
    address: str


Serve = Callable[[Settings, str], Served]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    "Starts Voila with a store and a program, on a port of its own, and waits until it answers; the server ends after the last test of this file."
    started: list[subprocess.Popen[bytes]] = []

    def start(settings: Settings, program: str) -> Served:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = os.environ | {"DUCKDB_PATH": settings.duckdb_path, "RUNS_DIR": str(settings.runs_dir)}
        started.append(subprocess.Popen([sys.executable, "-c", program, str(port)], env=env, stdin=subprocess.DEVNULL))
        for _ in range(600):
            assert started[-1].poll() is None, "Voila ended"
            try:
                httpx.get(f"http://127.0.0.1:{port}/voila/static/voila.js", timeout=5)
            except httpx.HTTPError:
                time.sleep(0.1)
            else:
                return Served(settings, f"http://127.0.0.1:{port}/")
        raise AssertionError("Voila does not answer")

    yield start
    for server in started:
        server.terminate()
    for server in started:
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def store_in(folder: Path) -> Settings:
    "Settings of a store in a folder."
    return Settings(_env_file=None, duckdb_path=str(folder / "store" / "catalog.sqlite"), duckdb_memory_limit="1GB", runs_dir=str(folder / "runs"))


@pytest.fixture(scope="module")
def filled(serve: Serve, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    "The pages of a store with data, as a user serves them."
    settings = store_in(tmp_path_factory.mktemp("filled"))
    fill(settings, shared)
    return serve(settings, AS_A_USER)


@pytest.fixture(scope="module")
def empty(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Served:
    "The pages of an empty store, open to two visitors; a kernel without a page ends after 4 s."
    return serve(store_in(tmp_path_factory.mktemp("nothing")), SERVE.format(idle_s=4, visitors=2))


def choose(page: Any, label: str, option: str) -> None:
    "Choose from the list below a label, as a visitor would."
    page.locator(".cr-label", has_text=label).first.locator("xpath=ancestor::div[contains(@class,'widget-vbox')][1]//select").select_option(label=option)


def wait_for_length(page: Any, seconds: float) -> None:
    "Until the chart draws bars of this length."
    page.wait_for_function("s => document.querySelector('.cr-chart')?.dataset.length == s", arg=seconds, timeout=120_000)


def test_market_page_draws_and_changes_without_internet(page, filled):
    page.goto(filled.address, timeout=120_000)  # leads to the home page, which links to the market
    page.wait_for_selector("text=BTCUSDT (klines)", timeout=120_000)
    page.get_by_role("link", name="1h", exact=True).click()
    wait_for_length(page, 3600)
    assert "archived candles" in page.locator(".cr-provenance").inner_text()
    legend = page.locator(".cr-chart-legend")
    assert "1h bars" in legend.inner_text() and "rsi_14" in legend.inner_text()

    # all six years: a bar of a day for each; and back to hours with the wheel
    page.get_by_role("button", name="All").click()
    wait_for_length(page, 86400)
    assert "drawn as 1d" in legend.inner_text()
    page.locator(".cr-chart-box").hover()
    for _ in range(40):
        page.mouse.wheel(0, -400)
        page.wait_for_timeout(40)
    page.wait_for_function("document.querySelector('.cr-chart').dataset.length < 86400", timeout=60_000)
    assert "from=" in page.url and "market=BTCUSDT" in page.url
    view = page.url

    # a day by the picker; the address shows the same again
    page.get_by_label("Go to a day").fill("2021-05-19")
    page.wait_for_function("new URL(location.href).searchParams.get('from') > 1621300000 && new URL(location.href).searchParams.get('from') < 1621500000", timeout=60_000)
    page.goto(view, timeout=120_000)
    page.wait_for_function("document.querySelector('.cr-chart')?.dataset.answers !== undefined", timeout=120_000)
    page.wait_for_timeout(1000)
    assert abs(float(page.url.split("from=")[1].split("&")[0]) - float(view.split("from=")[1].split("&")[0])) < 4 * 86400

    choose(page, "Second indicator", "willr_14")
    page.wait_for_function("document.querySelector('.cr-chart-legend').textContent.includes('willr_14')", timeout=60_000)
    choose(page, "Bars", "1d")
    wait_for_length(page, 86400)

    # simulated data say so; the address leads to a market that is not the first of the list
    choose(page, "Market", "TESTUSD (simulated)")
    simulated = "document.querySelector('.cr-provenance')?.textContent.includes('SIMULATED DATA, not a market')"
    page.wait_for_function(simulated, timeout=60_000)
    page.wait_for_function("new URL(location.href).searchParams.get('market') === 'TESTUSD (simulated)'", timeout=60_000)
    page.reload(timeout=120_000)
    page.wait_for_function(simulated, timeout=120_000)
    page.wait_for_function("document.querySelector('.cr-chart')?.dataset.length", timeout=120_000)

    # the keyboard moves, the theme changes the colours, and on a telephone nothing sticks out
    page.locator(".cr-chart-box").focus()
    before = page.url
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("u => location.href !== u", arg=before, timeout=60_000)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="light / dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.querySelector('.cr-chart-box canvas').getBoundingClientRect().width <= 390", timeout=60_000)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390

    assert page.outside == []
    assert page.errors == []


def test_every_page_opens_and_says_what_is_missing(page, filled):
    address = filled.address
    sent: list[int] = []
    page.on("requestfinished", lambda request: sent.append(request.sizes()["responseBodySize"]))
    for name, text in (("predictions", "run"), ("runs", "btcusdt-1h-return24-0123456789"), ("compare", "cryptoresearch train"), ("data", "usable")):
        page.goto(f"{address}voila/render/{name}.ipynb", timeout=120_000)
        page.wait_for_selector(f"#rendered_cells >> text={text}", timeout=120_000)
        assert "Traceback" not in page.content()
        assert page.locator(".cr-nav a[aria-current]").inner_text().lower() == name
        page.wait_for_timeout(1500)  # what the page still tells its kernel
        assert len(sent) < 10 and sum(sent) < 2e6  # once plotly.js without what it is not used for; the second page has it
        sent.clear()
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=120_000)
    ink = "[...document.querySelectorAll('.js-plotly-plot .gtitle, .js-plotly-plot .xtick text')].map(e => getComputedStyle(e).fill)"
    light = set(page.evaluate(ink))
    page.get_by_role("button", name="light / dark").click()
    page.wait_for_timeout(500)
    assert light and not light & set(page.evaluate(ink))  # figures of reports follow the theme too
    assert page.outside == []
    assert page.errors == []


def test_without_a_store_the_page_says_what_to_run(page, empty):
    address = empty.address
    for host, status in (("evil.example", 403), ("10.0.0.7", 403), ("localhost", 200)):  # a page elsewhere that takes this machine's address
        assert httpx.get(f"{address}voila/render/home.ipynb", headers={"Host": host}, timeout=120).status_code == status
        upgrade = {"Host": host, "Origin": f"http://{host}", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        assert httpx.get(f"{address}api/kernels/{'0' * 8}-0000-0000-0000-{'0' * 12}/channels", headers=upgrade, timeout=60).status_code == (403 if status == 403 else 404)
    page.goto(address, timeout=120_000)
    page.wait_for_selector(".cr-provenance", timeout=120_000)
    assert "cryptoresearch demo" in page.locator(".cr-provenance").inner_text()
    assert "Traceback" not in page.content()
    assert page.outside == []
    assert page.errors == []


def test_a_visitor_cannot_run_code(filled, tmp_path):
    from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    from cryptoresearch.serving.page_kernels import PROTOCOL

    address = filled.address
    shown = httpx.get(f"{address}voila/render/data.ipynb", timeout=120).text
    kernel = re.search(r'"kernelId": ?"([0-9a-f-]{36})"', shown)[1]
    channels = f"{address.replace('http', 'ws')}api/kernels/{kernel}/channels"
    with pytest.raises(InvalidStatus, match="403"):
        connect(channels, origin="http://evil.example", subprotocols=[PROTOCOL]).close()
    with pytest.raises(InvalidStatus, match="400"):
        connect(channels).close()  # the old protocol, whose binary messages would stop Voila
    code = {"code": f"open({str(tmp_path / 'ran')!r}, 'w').close()", "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False, "stop_on_error": True}

    def message(kind: str, content: dict[str, Any]) -> bytes:
        header = {"msg_id": kind, "msg_type": kind, "session": "s", "username": "", "version": "5.3", "date": "2024-01-01T00:00:00Z"}
        return serialize_msg_to_ws_v1([json.dumps(part).encode() for part in (header, {}, {}, content)], "shell")

    def received(client: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        header, parent = deserialize_msg_from_ws_v1(client.recv(timeout=60))[1][:2]
        return json.loads(header), json.loads(parent)

    with connect(channels, subprotocols=[PROTOCOL]) as client:
        client.send(message("execute_request", code))
        client.send(message("comm_info_request", {"target_name": "jupyter.widget"}))  # answered after what was sent before it
        while (told := received(client))[0]["msg_type"] != "comm_info_reply":
            assert told[1].get("msg_id") != "execute_request", told
    assert not (tmp_path / "ran").exists()
    for path in ("api/contents", "api/sessions", "api/terminals", "api/kernels", "voila/files/home.ipynb", "voila/files/../settings.py"):
        assert httpx.get(f"{address}{path}", timeout=60).status_code in (403, 404, 405), path
    assert httpx.post(f"{address}api/kernels", json={}, timeout=60).status_code in (403, 404, 405)


def kernels(settings: Any) -> list[int]:
    "Process ids of the kernels of a store: forks of a fork server, or interpreters of their own."

    def read(pid: int | str, name: str) -> bytes:
        try:
            return Path(f"/proc/{pid}/{name}").read_bytes()
        except OSError:
            return b""

    found = []
    for pid in (int(p.name) for p in Path("/proc").glob("[0-9]*") if settings.runs_dir.encode() in read(p.name, "environ")):
        command, parent = read(pid, "cmdline"), read(pid, "stat").rsplit(b")", 1)[-1].split()
        forked = b"forkserver" in command and len(parent) > 1 and b"forkserver" in read(parent[1].decode(), "cmdline")
        if (forked or b"ipykernel_launcher" in command) and parent[:1] != [b"Z"]:
            found.append(pid)
    return found


def wait_for_kernels(settings: Any, count: int, seconds: float = 30) -> None:
    "Until there are this many kernels."
    for _ in range(int(seconds / 0.25)):
        if len(kernels(settings)) == count:
            return
        time.sleep(0.25)
    assert len(kernels(settings)) == count


def test_the_kernel_of_a_page_that_vanished_ends(page, empty):  # the last test that has these pages: it kills their server
    address, settings = empty.address, empty.settings
    wait_for_kernels(settings, 0)  # those of other tests
    data = f"{address}voila/render/data.ipynb"
    page.goto(data, timeout=120_000)
    page.wait_for_selector(".cr-provenance", timeout=120_000)
    time.sleep(8)  # the idle time, and twice the pause between two looks at it
    assert len(kernels(settings)) == 1, "an open page keeps its kernel"
    httpx.get(data, timeout=120)  # a visitor who never connects
    assert len(kernels(settings)) == 2
    third = httpx.get(data, timeout=120)
    assert third.status_code == 503 and "Too many visitors" in third.text and "All 2 places are taken" in third.text
    wait_for_kernels(settings, 1)
    for _ in range(20):  # the server collects a process that has ended within some tenths of a second
        if (again := httpx.get(data, timeout=120).status_code) == 200:
            break
        time.sleep(0.25)
    assert again == 200

    # a kernel that is ended or killed: the page says so and can be loaded again
    wait_for_kernels(settings, 1)
    mine = json.loads(page.locator("#jupyter-config-data").text_content())["kernelId"]
    for end in (lambda: httpx.post(f"{address}voila/api/shutdown/{mine}", timeout=60).raise_for_status(), lambda: os.kill(kernels(settings)[0], signal.SIGKILL)):
        end()
        page.wait_for_selector(".cr-lost", timeout=90_000)
        page.get_by_role("link", name="Load it again").click()
        page.wait_for_selector(".cr-lost", state="detached", timeout=120_000)
        page.wait_for_selector(".cr-provenance", timeout=120_000)
        wait_for_kernels(settings, 1)

    # a page that is closed: its kernel ends at once; a server that is killed: all end
    page.goto("about:blank")
    wait_for_kernels(settings, 0, 20)
    page.goto(data, timeout=120_000)
    voila = next(int(p.name) for p in Path("/proc").glob("[0-9]*") if f"--port={address.split(':')[2].strip('/')}".encode() in (p / "cmdline").read_bytes())
    os.kill(voila, signal.SIGKILL)
    wait_for_kernels(settings, 0)


def test_the_title_of_a_figure_folds_on_a_narrow_page(page):
    from cryptoresearch.serving.figures import finish, Panel, stack_panels, static_text

    title, trace = "Rising: the model is better than the baseline; falling: worse (thinned for display)", go.Scatter(x=[1, 2], y=[1, 2])
    place = {"x": 0, "xanchor": "left", "xref": "paper", "y": 0.98, "yanchor": "top"}  # as in reports
    report = go.Figure(trace, {"title": {"text": title, "font": {"size": 14}, **place}, "height": 340, "margin": {"l": 8, "r": 8, "t": 46, "b": 8}})
    figures = [report, finish(stack_panels([Panel("", 1, [go.Scatter(x=[1, 2], y=[1, 2])], {})], title, title))]
    script = "".join(map(static_text, ("library.js", "figure_theme.js", "plotly_view.js"))).replace("export default { render }", "window.render = render")
    for width in (390, 1240):
        page.set_viewport_size({"width": width, "height": 844})
        page.set_content("<body style='margin: 0'></body>")
        page.add_script_tag(content=static_text("plotly-cartesian.js"))
        page.add_script_tag(content=f"(() => {{ {script} }})()")
        model = "{get: (name) => ({figure, config: '{}'})[name], on() {}, off() {}, send() {}}"
        for figure in figures:
            page.evaluate(f"(figure) => render({{model: {model}, el: document.body.appendChild(document.createElement('div'))}})", figure.to_json())
        page.wait_for_function("document.querySelectorAll('.gtitle').length === 2", timeout=60_000)
        boxes = "[...document.querySelectorAll('.gtitle, .gtitle-subtitle')].map((e) => [e.getBoundingClientRect(), e.closest('.js-plotly-plot').getBoundingClientRect()])"
        found = page.evaluate(f"{boxes}.map(([a, b]) => [a.left - b.left, b.right - a.right, a.top - b.top])")
        assert len(found) == 3 and min(min(f) for f in found) >= 0, (width, found)
    assert page.errors == [] and page.outside == []
