"""Predictions from frames in memory, tried on a loopback server that plays a real capture of Binance's stream."""

import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
from conftest import COMMAND_LINE, NewStore, Program, wait_for
from websockets.sync.server import serve, ServerConnection

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.errors import ConfigError, StoreBusy
from cryptoresearch.ingest.files import process_file
from cryptoresearch.live.binance import BinanceWebSocket
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.run import Run, train_run
from cryptoresearch.serving.live import LivePredictions
from cryptoresearch.serving.predictor import predict_live
from cryptoresearch.settings import Settings, shared_data

CAPTURE = shared_data() / "binance-ws-btcusdt-2024-08-08.jsonl.gz"
pytestmark = pytest.mark.slow
NUMBERS = ["prediction", "lower", "upper"]


@pytest.fixture(scope="module")
def frames() -> list[str]:
    with gzip.open(CAPTURE, "rt") as f:
        return [line.split(" ", 1)[1].strip() for line in f if '@trade"' in line]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run on the first minutes; the tests predict the later ones, each with a store of its own."
    folder = tmp_path_factory.mktemp("trained")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    con = init_duckdb(settings)
    process_file(con, min(shared_data().glob("BTCUSDT-trades-*.csv")))
    make_bars(con, "BTCUSDT", "1s")
    config = RunConfig(
        spec="1s", target="volatility", horizon=2, end="2024-08-08 23:58:30", test_start="2024-08-08 23:58:00", refit_every="30s",
        model="ridge", features=("ret_1", "rv_24"),
    )  # fmt: skip
    run = train_run(con, config, settings)
    con.close()
    return Path(run.folder).parent


@pytest.fixture
def settings(tmp_path: Path, runs_dir: Path, new_store: NewStore) -> Settings:
    return new_store(tmp_path, runs_dir=str(runs_dir), duckdb_threads=1)


@pytest.fixture
def run(settings: Settings) -> Run:
    from cryptoresearch.runs.run import load_run

    return load_run("btcusdt-1s", settings)


@contextlib.contextmanager
def binance(*connections: list[str | float]) -> Iterator[tuple[str, threading.Event]]:
    "A server that plays a list of frames and pauses (s) on each connection, then drops it; the last one stays open."
    left, over = list(connections), threading.Event()

    def play(c: ServerConnection) -> None:
        with contextlib.suppress(Exception):
            c.recv(timeout=5)
            for item in left.pop(0) if left else []:
                over.wait(item) if isinstance(item, float) else c.send(item)
            if left:
                time.sleep(0.1)  # the client reads what is on its way
                c.socket.close()
            else:
                over.wait(90)

    server = serve(play, "127.0.0.1", 0, compression=None, close_timeout=0.2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/stream", over
    finally:
        over.set()
        server.shutdown()


def at(frames: list[str], when: str) -> int:
    "The first frame at or after a time of the capture's day."
    ms = pd.Timestamp(f"2024-08-08 {when}").value // 10**6
    return next(i for i, f in enumerate(frames) if json.loads(f)["data"]["T"] >= ms)


def collect(settings: Settings, run: Run, url: str, count: int, **kw: Any) -> LivePredictions:
    feed = BinanceWebSocket("BTCUSDT", url=url, source="binance", settings=settings, retry_base_s=0.01)
    with LivePredictions(feed, [run], **kw) as live:
        end = time.monotonic() + 60
        while feed.stats.trades < count and not live.join(0.01):
            assert time.monotonic() < end, feed.stats
    return live


def stored(settings: Settings) -> pd.DataFrame:
    with init_duckdb(settings) as con:
        return con.sql("SELECT ts, close_ts, prediction, lower, upper FROM predictions ORDER BY ts").df()


def follow_again(settings: Settings, run: Run) -> pd.DataFrame:
    "The predictions that the store's trades give."
    with init_duckdb(settings) as con:
        write(con, lambda c: c.execute("DELETE FROM predictions"))
    ended = threading.Event()
    ended.set()
    predict_live(settings, run.id, source="binance", stop=ended)
    return stored(settings)


def test_a_lost_connection_makes_the_gap_that_the_store_has(settings: Settings, run: Run, frames: list[str]) -> None:
    a, b, c, d = (at(frames, t) for t in ("23:58:20", "23:59:00.5", "23:59:04", "23:59:50"))
    with binance(frames[a:b], frames[c:d]) as (url, _):
        live = collect(settings, run, url, b - a + d - c, lateness_s=None)
    made = stored(settings)
    assert live.stats.gaps == 1 and live.stats.skipped["gap"] == 5  # 23:59:00 to 23:59:04
    assert len(made) == live.stats.predictions == live.stored > 20
    assert not made["ts"].between("2024-08-08 23:59:00", "2024-08-08 23:59:04").any()
    again = follow_again(settings, run)
    assert made["ts"].tolist() == again["ts"].tolist()
    np.testing.assert_allclose(made[NUMBERS], again[NUMBERS], rtol=0, atol=1e-9)


def test_a_missing_id_makes_a_gap_in_bars_and_store(settings: Settings, run: Run, frames: list[str]) -> None:
    a, b, d = (at(frames, t) for t in ("23:58:20", "23:59:10", "23:59:50"))
    with binance([*frames[a:b], *frames[b + 1 : d]]) as (url, _):
        live = collect(settings, run, url, d - a - 1, lateness_s=None)
    made = stored(settings)
    assert (live.feed.stats.missing, live.feed.stats.reconnects, live.stats.gaps) == (1, 0, 1)
    assert live.stats.skipped["gap"] >= 1
    assert made["ts"].tolist() == follow_again(settings, run)["ts"].tolist()


def test_the_clock_ends_bars_of_a_quiet_market_and_gaps_found_later_count(settings: Settings, run: Run, frames: list[str]) -> None:
    a, b, c, d = (at(frames, t) for t in ("23:58:20", "23:59:10.2", "23:59:20", "23:59:59"))
    seen: list[tuple[int, pd.Timestamp]] = []
    with binance([*frames[a:b], 4.0], frames[c:d]) as (url, _):
        feed = BinanceWebSocket("BTCUSDT", url=url, source="binance", settings=settings, retry_base_s=0.01)
        live = LivePredictions(feed, [run])
        live.subscribe(lambda rows: seen.extend((feed.stats.trades, t) for t in rows["close_ts"]))
        with live:
            end = time.monotonic() + 60
            while feed.stats.trades < b - a + d - c and not live.join(0.01):
                assert time.monotonic() < end
    last = pd.Timestamp(json.loads(frames[b - 1])["data"]["T"], unit="ms", tz="UTC")
    quiet = [t for n, t in seen if n == b - a and t > last]
    assert len(quiet) >= 1, seen[-5:]  # before any later trade, and before the loss was noticed
    made = stored(settings)
    after = made[made["ts"] >= "2024-08-08 23:59:21"]
    again = follow_again(settings, run)
    later = again[again["ts"] >= "2024-08-08 23:59:21"]
    assert after["ts"].tolist() == later["ts"].tolist()  # the bars that were predicted and then met the gap are gaps for later ones
    np.testing.assert_allclose(after[NUMBERS], later[NUMBERS], rtol=0, atol=1e-9)


def test_after_a_restart_no_bar_is_missed_and_none_is_made_twice(settings: Settings, run: Run, frames: list[str]) -> None:
    a, b, c, d = (at(frames, t) for t in ("23:58:00", "23:59:00.5", "23:59:02", "23:59:50"))
    with binance(frames[a:b]) as (url, _):
        collect(settings, run, url, b - a, lateness_s=None)
    first = stored(settings)
    with init_duckdb(settings) as con:  # as if it had been killed before it stored the last three
        write(con, lambda k: k.execute("DELETE FROM predictions WHERE ts >= ?", [first["ts"].iloc[-3]]))
    with binance(frames[c:d]) as (url, _):
        live = collect(settings, run, url, d - c, lateness_s=None)
    both = stored(settings)
    pd.testing.assert_frame_equal(both.head(len(first)), first)
    assert live.stored == len(both) - len(first) + 3
    assert both["ts"].is_unique and not both["ts"].between("2024-08-08 23:59:00", "2024-08-08 23:59:02").any()


PREDICTION = r"BTCUSDT 1s 2024-08-08 23:5\d:\d\d \S+ volatility: \S+ \[\S+, \S+\]"


def page_of(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def test_the_command_predicts_and_ends_at_ctrl_c(settings: Settings, run: Run, frames: list[str], program: Program, tmp_path: Path) -> None:
    a, d = at(frames, "23:58:00"), at(frames, "23:59:50")
    with binance(frames[a:d]) as (url, _):
        env = {k: v for k, v in os.environ.items() if k != "FINNHUB_TOKEN"}
        env |= {"DUCKDB_PATH": settings.duckdb_path, "RUNS_DIR": settings.runs_dir}
        words = ["live", "BTCUSDT", "--run", run.id, "--feed", "binance", "--url", url]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with program(COMMAND_LINE, *words, "--metrics", port, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            said = list[str]()
            while not said or (said[-1] and not re.match(PREDICTION, said[-1])):  # status lines come before it on a slow machine
                said.append(process.stdout.readline())
            wait_for(lambda: re.search(r"^cryptoresearch_predictions_total [1-9]", page_of(port), re.MULTILINE))
            page = page_of(port)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=90)
    assert re.match(PREDICTION, said[-1]), "".join(said) + err
    assert process.returncode == 0, err
    assert "cryptoresearch_silence_seconds{symbol=" in page
    assert re.search(rf"{d - a:,} trades received, [1-9]\d* predictions stored", out), out[-300:]


def test_the_predict_command_writes_one_line_of_json_per_forecast(settings: Settings, run: Run, frames: list[str], program: Program) -> None:
    a, d = at(frames, "23:58:00"), at(frames, "23:59:20")
    with binance(frames[a:d]) as (url, _):
        collect(settings, run, url, d - a)
    with init_duckdb(settings) as con:
        write(con, lambda c: c.execute("DELETE FROM predictions"))
    env = os.environ | {"DUCKDB_PATH": settings.duckdb_path, "RUNS_DIR": str(settings.runs_dir)}
    with program(COMMAND_LINE, "predict", run.id, "--source", "binance", "--json", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        process.send_signal(signal.SIGINT)
        lines += process.stdout.readlines()  # communicate() would lose what readline() has read ahead
        _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    told, made = [json.loads(line) for line in lines], stored(settings)
    assert len(told) == len(made) > 20 and f"{len(made):,} predictions" in err
    assert [row["prediction"] for row in told] == made["prediction"].tolist()
    assert pd.to_datetime([row["ts"] for row in told]).tolist() == made["ts"].dt.tz_localize("UTC").tolist()


def test_a_start_that_fails_stops_the_feed(settings: Settings, run: Run, frames: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise StoreBusy("another writer")

    monkeypatch.setattr("cryptoresearch.serving.live.RecycledConnection.cursor", broken)
    with binance(frames[:10]) as (url, _):
        feed = BinanceWebSocket("BTCUSDT", url=url, source="binance", settings=settings)
        live = LivePredictions(feed, [run])
        with pytest.raises(StoreBusy, match="another writer"):
            live.start()
        assert feed.stats.state == "stopped" and feed.join(0)
        live.stop()


def test_start_and_stop_may_be_called_again(settings: Settings, run: Run, frames: list[str]) -> None:
    with binance(frames[:10]) as (url, _):
        feed = BinanceWebSocket("BTCUSDT", url=url, source="binance", settings=settings)
        live = LivePredictions(feed, [run])
        live.stop()
        assert live.stored == 0
        with live.start() as same:
            assert same is live and feed._subscribers.count(live._queue.put) == 1  # no trade arrives twice
        live.stop()
        with pytest.raises(ConfigError, match="a second start"):
            live.start()
