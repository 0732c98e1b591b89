"What a live session meets apart from the market: full disks, stores that are locked or away, clocks that jump, broken frames."

import contextlib
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, UTC
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import NewStore, Program, wait_for
from s3_server import _client, _free_port, _stop, _wait, NoServer, program, S3
from websockets.sync.server import serve, ServerConnection

from cryptoresearch.data.maintenance import verify
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import ConfigError, FeedError
from cryptoresearch.ingest.files import process_file
from cryptoresearch.live.collector import Collector, replay_journal
from cryptoresearch.live.feed import FinnhubWebSocket
from cryptoresearch.live.messages import Trade
from cryptoresearch.live.replay import CHAOS, Disturbed, ReplayServer
from cryptoresearch.settings import Settings, shared_data

BTC, T0 = "BINANCE:BTCUSDT", 1_721_555_886_208


@pytest.fixture
def settings(settings: Settings, new_store: NewStore) -> Settings:
    "Settings of a store without rows that exists already."
    new_store(Path(settings.duckdb_path).parent)
    return settings


def trades(first: int, n: int = 1) -> list[Trade]:
    return [Trade(BTC, 100.0 + i % 7, float(i), datetime.fromtimestamp((T0 + i) / 1000, UTC)) for i in range(first, first + n)]


def frame(first: int, n: int = 1) -> str:
    return json.dumps({"type": "trade", "data": [{"p": 100.0 + i % 7, "s": BTC, "t": T0 + i, "v": float(i)} for i in range(first, first + n)]})


@contextlib.contextmanager
def stub(script: Callable[[ServerConnection, int], object]) -> Iterator[str]:
    "A server whose n-th connection is played by `script(connection, n)` after the subscription."
    seen: list[int] = []

    def handle(c: ServerConnection) -> None:
        c.recv(timeout=5)
        seen.append(1)
        with contextlib.suppress(Exception):
            script(c, len(seen))

    server = serve(handle, "127.0.0.1", 0, compression=None, close_timeout=0.2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()


def hold(c: ServerConnection) -> None:
    with contextlib.suppress(Exception):
        c.recv(timeout=30)


def stored(settings: Settings) -> list[float]:
    "The volumes of the stored trades, which number them."
    with init_duckdb(settings) as con:
        assert verify(con).ok
        return [row[0] for row in con.execute("SELECT qty FROM trades ORDER BY qty").fetchall()]


# ------------------------------------------------------------------ the disk


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    "Let no file of this process grow above a size: writes end as on a full disk, without a mount."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_journal_on_a_full_disk_has_no_half_line(settings: Settings) -> None:
    "What was announced is stored; after the failure, further events can be read again."
    collector = Collector([BTC], settings=settings, interval_s=60).start()
    collector.add(trades(1), datetime.now(UTC))
    with no_file_above(collector.journal.path.stat().st_size + 50), pytest.raises(FeedError, match="Free disk space"):
        collector.add(trades(2, 100), datetime.now(UTC))
    collector.add(trades(200), datetime.now(UTC))
    session = replay_journal(collector.journal.path)
    assert session is not None and list(session.batch.trades.qty) == [1.0, 200.0]
    collector.stop()
    assert stored(settings) == [1.0, 200.0]


@pytest.mark.parametrize("n", [100, 3000])  # rows that go into the catalog, and into a data file
def test_a_store_that_is_full_catches_up_when_there_is_space(settings: Settings, caplog: pytest.LogCaptureFixture, n: int) -> None:
    collector = Collector([BTC], settings=settings, interval_s=0.05).start()
    with collector._flushing:
        collector.add(trades(1, n), datetime.now(UTC))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        wait_for(lambda: "wait in the journal" in caplog.text)
        time.sleep(0.5)
        assert collector.error is None and collector.stored == 0
        assert caplog.text.count("wait in the journal") == 1, "said at every try"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    wait_for(lambda: collector.stored == n)
    collector.stop()
    assert len(stored(settings)) == n


def test_a_store_that_may_only_be_read_is_refused_in_words(settings: Settings) -> None:
    init_duckdb(settings).close()
    with connect(settings, read_only=True) as con, pytest.raises(ConfigError, match="can be written"):
        Collector([BTC], settings=settings, con=con).start()


LOCK = """
import sqlite3, sys
con = sqlite3.connect(sys.argv[1], isolation_level=None)
con.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
"""


def test_a_catalog_that_another_program_locks_for_a_time(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    "A minute, shortened: SQLite's own lock is held for several of the collector's tries."
    collector = Collector([BTC], settings=settings, interval_s=0.05, timeout_s=0.2).start()
    collector.add(trades(1), datetime.now(UTC))
    wait_for(lambda: collector.stored == 1)
    command = [sys.executable, "-c", LOCK, str(settings.path(settings.duckdb_path))]  # SQLite's locks are between processes
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == b"locked\n"
        collector.add(trades(2, 300), datetime.now(UTC))
        wait_for(lambda: "wait in the journal" in caplog.text)
        time.sleep(1.0)
        assert collector.error is None and collector.stored == 1
        other.stdin.close()
    wait_for(lambda: collector.stored == 301)
    collector.stop()
    assert len(stored(settings)) == 301


# ------------------------------------------------------------------ S3


@pytest.mark.slow
def test_an_s3_server_that_is_killed_and_comes_back(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for way in ("versitygw", "binary"):
        with contextlib.suppress(NoServer):
            what = program(way, may_build=False)
            break
    else:
        pytest.fail("no S3 server that can be started: run python scripts/s3_server.py --prepare")
    port, log = _free_port(), tmp_path / "log"

    def start() -> subprocess.Popen[bytes]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MINIO_", "S3_"))} | what.env("user-user", "password-password")
        with log.open("w") as out:
            process = subprocess.Popen(what.command(port, str(tmp_path)), env=env, cwd=tmp_path, stdout=out, stderr=out)
        _wait(f"127.0.0.1:{port}", process, log, what.ready)
        return process

    process, s3 = start(), S3(f"127.0.0.1:{port}", "user-user", "password-password", what.name)
    try:
        _client(s3).make_bucket("lake")
        settings = settings.model_copy(update={"duckdb_data_path": "s3://lake/data"} | Settings(_env_file=None, **s3.settings).model_dump(include=set(s3.settings)))
        collector = Collector([BTC], settings=settings, interval_s=0.1).start()
        collector.add(trades(1, 1000), datetime.now(UTC))
        wait_for(lambda: collector.stored == 1000)
        process.kill()
        process.wait()
        collector.add(trades(1001, 1000), datetime.now(UTC))
        wait_for(lambda: "wait in the journal" in caplog.text, 60)
        assert collector.error is None
        collector.add(trades(2001, 1000), datetime.now(UTC))
        process = start()
        wait_for(lambda: collector.stored == 3000, 60)
        collector.stop()
        assert stored(settings) == [float(i) for i in range(1, 3001)]
    finally:
        _stop(process)


# ------------------------------------------------------------------ the clock


class Clock(datetime):
    "A wall clock that tests move."

    shift = timedelta(0)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + cls.shift


@pytest.mark.parametrize("hours", [-5, 5])
def test_trades_are_kept_when_the_clock_jumps(settings: Settings, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    monkeypatch.setattr("cryptoresearch.live.feed.datetime", Clock)
    monkeypatch.setattr(Clock, "shift", timedelta(0))
    step = threading.Event()

    def now(n: int) -> str:
        return json.dumps({"type": "trade", "data": [{"p": 100.0, "s": BTC, "t": round(time.time() * 1000), "v": float(n)}]})

    def script(c: ServerConnection, n: int) -> None:
        first = now(1)
        c.send(first)
        step.wait(10)
        c.send(first)  # the same once more, at once: two real trades may be equal
        c.send(now(2))
        hold(c)

    with stub(script) as url:
        feed = FinnhubWebSocket(url=url, settings=settings, retry_base_s=0.02).start()
        wait_for(lambda: feed.stats.trades == 1)
        Clock.shift = timedelta(hours=hours)
        step.set()
        wait_for(lambda: feed.stats.frames == 3)
        feed.stop()
    assert (feed.stats.trades, feed.stats.rejected, feed.stats.repeated) == (3, 0, 0)
    assert stored(settings) == [1.0, 1.0, 2.0]


COLLECT = textwrap.dedent(
    """
    import os, sys, time
    os.write(1, f"{os.getpid()}\\n".encode())
    from cryptoresearch.live.feed import FinnhubWebSocket
    from cryptoresearch.settings import Settings
    feed = FinnhubWebSocket(url=sys.argv[1], settings=Settings(_env_file=None, duckdb_path=sys.argv[2]), silence_s=3.0, retry_base_s=0.05).start()
    while feed.stats.trades < 1 or feed.stats.last_seen and not os.path.exists(sys.argv[3]):
        time.sleep(0.02)
        os.write(1, f"{feed.stats.trades}\\n".encode())
    feed.stop()
    """
)


@pytest.mark.slow
def test_a_suspended_process_keeps_what_arrived_and_knows_what_did_not(settings: Settings, program: Program, tmp_path: Path) -> None:
    "Longer than the silence that ends a connection: after it wakes, the frames that waited in the socket are taken."
    count = [0]

    def script(c: ServerConnection, n: int) -> None:
        while True:
            count[0] += 1
            c.send(frame(count[0]))
            time.sleep(0.01)

    with stub(script) as url:
        path, end = str(settings.path(settings.duckdb_path)), tmp_path / "end"
        child = program(COLLECT, url, path, end, stdout=subprocess.PIPE)
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        while int(child.stdout.readline()) < 20:
            pass
        os.kill(pid, signal.SIGSTOP)
        time.sleep(4.0)
        os.kill(pid, signal.SIGCONT)
        seen = count[0]
        while int(child.stdout.readline()) < seen:
            pass
        end.touch()
        child.communicate(timeout=90)
        assert child.returncode == 0
    rows = stored(settings)
    assert rows == [float(i) for i in range(1, len(rows) + 1)] and len(rows) >= seen
    with init_duckdb(settings) as con:
        assert con.execute("SELECT count(*) FROM gaps").fetchone() == (0,)


# ------------------------------------------------------------------ frames


@pytest.mark.parametrize("cut", [1, 3, 4, 60])
def test_half_a_frame_ends_the_coverage_and_nothing_else(settings: Settings, cut: int) -> None:
    "The connection breaks inside a frame: its trades are in the gap, and those before it are kept."
    text = frame(3).encode()
    whole = bytes([0x81, len(text)]) + text if len(text) < 126 else bytes([0x81, 126]) + len(text).to_bytes(2) + text

    def script(c: ServerConnection, n: int) -> None:
        if n > 1:
            c.send(frame(5000))
            return hold(c)
        c.send(frame(1))
        c.send(frame(1000))
        c.socket.sendall(whole[:cut])
        time.sleep(0.1)
        c.socket.shutdown(socket.SHUT_RDWR)

    with stub(script) as url:
        feed = FinnhubWebSocket(url=url, settings=settings, retry_base_s=0.02).start()
        wait_for(lambda: feed.stats.trades == 3)
        feed.stop()
    assert (feed.stats.malformed, feed.stats.rejected, feed.stats.connections) == (0, 0, 2)
    assert stored(settings) == [1.0, 1000.0, 5000.0]
    with init_duckdb(settings) as con:
        assert con.execute("SELECT epoch_ms(start_ts), epoch_ms(end_ts) FROM gaps").fetchall() == [(T0 + 900, T0 + 5100)]


@pytest.mark.slow
def test_frames_of_ten_megabytes(settings: Settings) -> None:
    garbage, big = "x" * 10_000_000, frame(1, 200_000)
    assert len(big) > 10_000_000

    def script(c: ServerConnection, n: int) -> None:
        c.send(garbage)
        c.send(big)
        hold(c)

    with stub(script) as url:
        feed = FinnhubWebSocket(url=url, settings=settings).start()
        wait_for(lambda: feed.stats.frames == 2, 60)
        feed.stop()
    assert (feed.stats.trades, feed.stats.malformed, feed.stats.connections) == (200_000, 1, 1)
    assert len(stored(settings)) == 200_000
    with init_duckdb(settings) as con:
        assert con.execute("SELECT count(*), max(length(raw)) < 2000 FROM quarantine").fetchone() == (1, True)


@pytest.mark.parametrize("n", [2_000, pytest.param(100_000, marks=pytest.mark.heavy)])
def test_garbage_frames_fill_neither_log_nor_store(settings: Settings, caplog: pytest.LogCaptureFixture, n: int) -> None:
    def script(c: ServerConnection, _: int) -> None:
        c.send(frame(1))
        for i in range(n):
            c.send(f"<html>{i}")
        c.send(frame(5000))
        hold(c)

    caplog.set_level(logging.WARNING)
    with stub(script) as url:
        feed = FinnhubWebSocket(url=url, settings=settings).start()
        wait_for(lambda: feed.stats.frames == n + 2, 300)
        feed.stop()
    assert (feed.stats.malformed, feed.stats.trades) == (n, 2) and len(caplog.records) < 20
    with init_duckdb(settings) as con:
        assert con.execute("SELECT count(*) FROM quarantine").fetchone() == (1000,)
        assert con.execute("SELECT count(*) FROM gaps").fetchone() == (1,)
    assert stored(settings) == [1.0, 5000.0]


# ------------------------------------------------------------------ all of it at once


@pytest.fixture(scope="module")
def real() -> pd.DataFrame:
    names = ["trade_id", "price", "qty", "quote_qty", "ms", "buyer_maker", "best"]
    day = pd.concat(pd.read_csv(file, names=names) for file in sorted(shared_data().glob("BTCUSDT-trades-*.csv")))
    return day.assign(symbol="BTCUSDT", ts=pd.to_datetime(day["ms"], unit="ms", utc=True))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.heavy) for n in range(3, 23))])
def test_chaos_loses_what_it_says_and_nothing_else(settings: Settings, real: pd.DataFrame, seed: int) -> None:
    "Each trade that arrived is stored once, each that was lost lies in a gap row, and there are no other gaps."
    got: list[Trade] = []
    with ReplayServer(real, speed=math.inf, frame_ms=25, chaos=seed) as server:
        feed = FinnhubWebSocket(BTC, url=server.url, settings=settings, silence_s=1.0, retry_cap_s=0.02, on_trades=got.extend).start()
        wait_for(lambda: server.done.is_set() and feed.stats.trades == server.sent)
        feed.stop()
    assert server.chaos is not None and server.sent + server.lost == len(real)
    log, stats = server.chaos.log, feed.stats
    count = Counter(entry.kind for entry in log)
    assert count.keys() == CHAOS.keys() or seed > 2, f"seed {seed} misses a kind"
    assert server.lost == sum(e.lost for e in log)
    assert "simulated" in stats.last_problem and stats.server_errors == stats.connections
    assert stats.reconnects == count["drop"] + count["cut"] + count["silence"]
    assert stats.repeated == count["double"]
    lost = pd.concat([real["ms"][(real["ms"] >= e.first_ms) & (real["ms"] <= e.last_ms)].to_frame().assign(at=e.first_ms) for e in log if e.lost])
    assert len(lost) == server.lost
    with init_duckdb(settings) as con:
        stored = con.sql("SELECT epoch_ms(ts) AS ms, price, qty FROM trades ORDER BY trade_id").df()
        gaps = con.sql("SELECT epoch_ms(start_ts) AS a, epoch_ms(end_ts) AS b FROM gaps ORDER BY 1").df()
        claims = con.sql("SELECT epoch_ms(start_ts) AS a, epoch_ms(end_ts) AS b FROM coverage ORDER BY 1").df()
        assert con.sql("SELECT count(*) FROM quarantine").fetchone()[0] == stats.malformed + stats.rejected
        assert verify(con).ok
    assert stored.to_numpy().tolist() == [[round(t.ts.timestamp() * 1000), t.price, t.volume] for t in got]
    kept = Counter(map(tuple, real[~real["ms"].isin(lost["ms"])][["ms", "price", "qty"]].to_numpy().tolist()))
    assert Counter(map(tuple, stored.to_numpy().tolist())) == kept
    expected = list[Disturbed]()
    for entry in (e for e in log if CHAOS[e.kind].gap):  # without a trade between them, two are one gap
        if not expected or not expected[-1].lost or stored["ms"].between(expected[-1].last_ms, entry.first_ms, inclusive="neither").any():
            expected.append(entry)
    if expected[-1].last_ms > stored["ms"].max():  # a gap ends with the next trade; without one, nothing is claimed
        assert claims["b"].max() < expected.pop().first_ms
        lost = lost[lost["ms"] < stored["ms"].max()]
    assert len(gaps) == len(expected) == len(claims) - 1
    assert all(((gaps["a"] <= ms) & (ms <= gaps["b"])).any() and not ((claims["a"] <= ms) & (ms < claims["b"])).any() for ms in lost["ms"])
    for gap, entry in zip(gaps.itertuples(), expected, strict=True):
        assert gap.a - 100 <= entry.first_ms <= gap.b
        assert stored["ms"][(stored["ms"] > gap.a + 100) & (stored["ms"] < gap.b - 150)].empty  # apart from the margins, and 50 ms of disorder


def test_the_same_seed_disturbs_the_same_frames(real: pd.DataFrame) -> None:
    logs = []
    for seed in (7, 7, 8):
        with ReplayServer(real.head(4000), speed=math.inf, frame_ms=25, chaos=seed) as server:
            feed = FinnhubWebSocket(BTC, url=server.url, collect=False, silence_s=0.2, retry_cap_s=0.02).start()
            wait_for(lambda server=server: server.done.is_set())
            feed.stop()
        assert server.chaos is not None
        logs.append([(e.kind, e.first_ms, e.last_ms, e.lost) for e in server.chaos.log])
    assert logs[0] == logs[1] != logs[2] and len(logs[0]) > 20


@pytest.mark.slow
def test_the_command_says_that_its_disturbances_are_simulated(
    settings: Settings, real: pd.DataFrame, tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]], caplog: pytest.LogCaptureFixture
) -> None:
    file, port = tmp_path / "BTCUSDT-trades-2024-08-08.csv", _free_port()
    real.head(2000).drop(columns=["symbol", "ts"]).to_csv(file, index=False, header=False)
    with init_duckdb(settings) as con:
        process_file(con, file)
    feed = FinnhubWebSocket(BTC, url=f"ws://127.0.0.1:{port}", collect=False, silence_s=0.2, retry_base_s=0.05, retry_cap_s=0.05).start()
    words = ["replay", "BTCUSDT", "--speed", "1e9", "--port", str(port), "--chaos", "3"]
    done = command(*words, env={"DUCKDB_PATH": settings.duckdb_path})
    assert "simulated: this replay is disturbed on purpose, with seed 3" in caplog.text
    with contextlib.suppress(FeedError):
        feed.stop()
    assert done.returncode == 0, done.stderr
    assert re.search(r"[\d,]+ trades sent, [\d,]+ lost; simulated disturbances: .*reorder \d+", done.stdout), done.stdout
