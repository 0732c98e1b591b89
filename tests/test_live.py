"""Live collection as a user has it: real sockets on the loopback address, a real store, faults on purpose, kill -9."""

import base64
import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import socket
import subprocess
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastapi.testclient
import pandas as pd
import pytest
import websocket
from conftest import examples, NewStore, Program, wait_for
from typer.testing import CliRunner
from websockets.sync.server import ServerConnection, serve

from cryptoresearch.cli import app
from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.coverage import fold_claims
from cryptoresearch.data.event_bars import read_event_bars
from cryptoresearch.data.maintenance import upkeep, verify
from cryptoresearch.data.quality import daily
from cryptoresearch.data.series import AMOUNT_LIMIT
from cryptoresearch.data.status import coverage, gap_table, read_trades, status
from cryptoresearch.data.store import connect, init_duckdb, journal_folder, snapshot, write
from cryptoresearch.errors import ConfigError, CryptoResearchError, DataNotFound, FeedError, SchemaError
from cryptoresearch.ingest.files import forget_file, process_file
from cryptoresearch.ingest.parsing import LIMITS
from cryptoresearch.live.binance import BinanceWebSocket
from cryptoresearch.live.collector import _Upkeep, Collector, Journal, replay_journal, Session
from cryptoresearch.live import feed as feed_module
from cryptoresearch.live.feed import _note_id, _Sequence, _take, _was_taken, ConnectionLost, Feed, FinnhubWebSocket
from cryptoresearch.live.messages import Trade
from cryptoresearch.live.replay import ReplayServer
from cryptoresearch.serving.api import create_app
from cryptoresearch.serving.data_page import sessions_section
from cryptoresearch.serving.home_page import live_part
from cryptoresearch.settings import Settings, shared_data

TOKEN = "c0ffee+secret/key"
T0 = 1_721_555_886_208
BTC = "BINANCE:BTCUSDT"


def frame(*items: dict[str, Any]) -> str:
    return json.dumps({"type": "trade", "data": [{"p": 100.0, "s": BTC, "t": T0, "v": 0.5} | i for i in items]})


@pytest.fixture
def settings(tmp_path: Path, new_store: NewStore) -> Settings:
    return new_store(tmp_path, finnhub_token=TOKEN, duckdb_threads=1)


@contextlib.contextmanager
def stub(script: Callable[[ServerConnection, int], object], **kw: Any) -> Iterator[tuple[str, list[list[str]]]]:
    """A server whose n-th connection is played by `script(connection, n)` after the subscriptions came in."""
    seen: list[list[str]] = []

    def handle(c: ServerConnection) -> None:
        symbols = [json.loads(c.recv(timeout=5))["symbol"]]
        with contextlib.suppress(TimeoutError):
            while True:
                symbols.append(json.loads(c.recv(timeout=0.05))["symbol"])
        seen.append(symbols)
        with contextlib.suppress(Exception):
            script(c, len(seen))

    server = serve(handle, "127.0.0.1", 0, compression=None, close_timeout=0.2, **kw)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", seen
    finally:
        server.shutdown()


def hold(c: ServerConnection) -> None:
    with contextlib.suppress(Exception):
        c.recv(timeout=20)


def listen(url: str, settings: Settings, **kw: Any) -> FinnhubWebSocket:
    return FinnhubWebSocket(url=url, settings=settings, **{"collect": False, "retry_base_s": 0.02} | kw)


# ------------------------------------------------------------------ what can come in


def test_every_case_reaches_the_store_as_it_should(settings: Settings) -> None:
    ahead = round((datetime.now(UTC) + timedelta(days=2)).timestamp() * 1000)
    frames = [
        frame({"c": None}),
        frame({}),
        frame({"c": ["1", "12"]}),
        frame({"p": 100.5}, {"s": "BINANCE:ETHUSDT", "p": 7.0}),
        frame({"p": 100.5}, {"p": 100.5}),  # two equal trades in one millisecond
        frame({"v": 0}),
        '{"type":"ping"}',
        '{"msg":"Subscribing to too many symbols","type":"error"}',
        '{"type":"news","data":[1]}',
        "<html>",
        frame({"t": T0 + 1000}, {"t": T0 - 1000}),  # out of order
        frame({"t": ahead}),
        frame({"s": "BINANCE:DOGEUSDT"}),
        frame({"p": None}),
        frame(*[{"t": T0 + 2000 + i // 7, "v": 1} for i in range(60_000)]),  # several megabytes
    ]
    assert len(frames[-1]) > 3_000_000

    def script(c: ServerConnection, n: int) -> None:
        for text in frames:
            c.send(text)
        hold(c)

    with stub(script) as (url, seen), listen(url, settings, symbols=(BTC, "BINANCE:ETHUSDT"), collect=True) as feed:
        wait_for(lambda: feed.stats.frames == len(frames))
        stats = feed.stats
    assert seen == [[BTC, "BINANCE:ETHUSDT"]]
    assert (stats.trades, stats.quotes, stats.pings, stats.server_errors, stats.malformed, stats.rejected) == (60_009, 1, 1, 1, 2, 3)
    assert stats.state == "connected" and "too many symbols" in stats.last_problem
    assert set(stats.silence_s) == {BTC, "BINANCE:ETHUSDT"}
    con = init_duckdb(settings)
    rows = con.execute("SELECT symbol, count(*), count(DISTINCT trade_id), sum(qty) FROM trades GROUP BY 1 ORDER BY 1").fetchall()
    assert rows == [("BTCUSDT", 60_008, 60_008, 60_004.0), ("ETHUSDT", 1, 1, 0.5)]
    assert con.execute("SELECT list(DISTINCT source), bool_and(side_reported IS NULL), bool_and(received_at IS NOT NULL) FROM trades").fetchone() == (["replay"], True, True)
    reasons = [r[0] for r in con.execute("SELECT reason FROM quarantine ORDER BY line").fetchall()]
    assert reasons == ["unknown type news", "not JSON (JSONDecodeError)", "dated in the future", "not subscribed", "p is not a number"]
    order = [r[0] for r in con.execute("SELECT epoch_ms(ts) FROM trades WHERE symbol = 'BTCUSDT' ORDER BY trade_id LIMIT 8").fetchall()]
    assert order == [T0] * 6 + [T0 + 1000, T0 - 1000]  # by arrival, not by time


def test_a_frame_that_is_delivered_again_counts_once(settings: Settings) -> None:
    "Equal trades inside a frame stay, and so does a single trade that arrives twice at once: real trades do."
    several = frame({}, {}, {"p": 101.0, "t": T0 + 1})
    calls: list[Trade] = []

    def script(c: ServerConnection, n: int) -> None:
        time.sleep(1.0 if n == 2 else 0.0)  # what is delivered again after a second is recognised however little it has
        for f in (frame({}), frame({}), *[several] * (3 if n == 1 else 1), '{"type":"ping"}', '{"type":"ping"}', frame({"t": T0 + 5 + n})):
            c.send(f)
        if n == 2:
            hold(c)

    with stub(script) as (url, _):
        feed = listen(url, settings, collect=True, on_trades=calls.extend).start()
        wait_for(lambda: feed.stats.pings == 4 and len(calls) == 7)
        feed.stop()
    assert (feed.stats.trades, feed.stats.repeated, feed.stats.malformed) == (7, 5, 0)
    with init_duckdb(settings) as con:
        assert con.execute("SELECT count(*), sum(qty) FROM trades").fetchall() == [(7, 3.5)]
        assert con.execute("SELECT symbol, detail FROM data_log WHERE event = 'repeated'").fetchall() == [
            ("BTCUSDT", "11 trades in frames that were received again, left out")]
        assert "11 trades of repeated live frames left out" in status(con)["verdict"].iloc[0]


@pytest.mark.parametrize(("trades", "text"), [(3, "6 trades of 9 in repeated live frames"), (1, "2 trades of 3 in equal live frames")])
def test_frames_that_an_older_version_stored_again_are_reported(settings: Settings, trades: int, text: str) -> None:
    collector = Collector([BTC], settings=settings).start()
    frame_of = [Trade(BTC, 100.0 + i, 0.5, datetime.fromtimestamp(T0 / 1000, UTC)) for i in range(trades)]
    for _ in range(3):
        collector.add(frame_of, datetime.now(UTC))
        time.sleep(0.001)
    collector.stop()
    with init_duckdb(settings) as con:
        assert text in status(con)["verdict"].iloc[0]


def test_real_trades_in_frames_of_any_size_are_all_kept(settings: Settings, real: pd.DataFrame) -> None:
    "One in six equals an earlier one in time, price and volume."
    rows = [{"p": r.price, "v": r.qty, "t": r.ms} for r in real.head(4000).itertuples()]
    for size in (1, 2, 7):

        def script(c: ServerConnection, n: int, size: int = size) -> None:
            for i in range(0, len(rows), size):
                c.send(frame(*rows[i : i + size]))
            hold(c)

        with stub(script) as (url, _):
            feed = listen(url, settings).start()
            wait_for(lambda feed=feed: feed.stats.trades + feed.stats.repeated >= len(rows), 60)
            feed.stop()
        assert (feed.stats.trades, feed.stats.repeated) == (len(rows), 0)


BYBIT = "BYBIT:BTCUSDT"


def two_exchanges(settings: Settings, minutes: int = 3) -> None:
    "Collect trades of one pair at two exchanges, at the same times: prices of 100 and of 250."
    times = [T0 // 60_000 * 60_000 + i * 10_000 for i in range(-1, 6 * minutes + 2)]  # whole minutes lie inside what is claimed
    items = [{"s": s, "p": p, "t": t} for t in times for s, p in ((BTC, 100.0), (BYBIT, 250.0))]

    def script(c: ServerConnection, n: int) -> None:
        for i in range(0, len(items), 2):
            c.send(frame(*items[i : i + 2]))
        hold(c)

    with stub(script) as (url, _):
        feed = listen(url, settings, symbols=(BTC, BYBIT), collect=True).start()
        wait_for(lambda: feed.stats.trades == len(items))
        feed.stop()


def test_two_exchanges_of_one_pair_are_two_series(settings: Settings) -> None:
    "In store, status, bars of both kinds, trades and the API; the plain symbol and BINANCE: name the same series."
    two_exchanges(settings)
    with init_duckdb(settings) as con:
        rows = con.execute("SELECT symbol, count(*), min(price), max(price) FROM trades GROUP BY 1 ORDER BY 1").fetchall()
        assert rows == [("BTCUSDT", 21, 100.0, 100.0), ("BYBIT:BTCUSDT", 21, 250.0, 250.0)]
        for names, price in ((("BTCUSDT", BTC, "binance:btc/usdt"), 100.0), ((BYBIT, "bybit:btcusdt"), 250.0)):
            for name in names if examples(0, 1) else names[1:2]:
                assert make_bars(con, name, "1m") == 3 and make_bars(con, name, "tick:6") == 3
                for spec, read in (("1m", read_bars), ("tick:6", read_event_bars)):
                    bars = read(con, name, spec)
                    assert set(bars["close"]) == {price} and set(bars["trades"]) == {6} and set(bars["symbol"]) == {names[0]}
                assert set(read_trades(con, name)["price"]) == {price}
                assert status(con, name)[["symbol", "rows"]].to_numpy().tolist() == [[names[0], 21]]
                assert daily(con, name, "replay")["close"].tolist() == [price]
    with fastapi.testclient.TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        for name, price in (("BTCUSDT", 100.0), (BTC, 100.0), (BYBIT, 250.0)):
            answer = client.get("/bars", params={"symbol": name, "spec": "1m", "source": "replay"}).json()
            assert {row["close"] for row in answer["bars"]} == {price}


def test_a_replay_of_another_exchange_keeps_its_name(settings: Settings) -> None:
    two_exchanges(settings, 1)
    with init_duckdb(settings) as con, ReplayServer(con, BYBIT, speed=math.inf) as server:
        feed = listen(server.url, settings, symbols=(BYBIT,)).start()
        wait_for(lambda: feed.stats.trades == 9)
        feed.stop()


def test_files_of_another_exchange_are_a_series_of_their_own(settings: Settings, tmp_path: Path) -> None:
    header = "id,price,qty,quote_qty,time,is_buyer_maker"
    binance = [header, *(f"{i},100,1,100,{T0 + i},true" for i in range(5))]
    other = [header + ",symbol", *(f"{i},250,1,250,{T0 + i},false,BTCUSDT" for i in range(5))]
    with init_duckdb(settings) as con:
        for name, rows, symbol in (("BTCUSDT-trades-2024-07-21.csv", binance, None), ("other.csv", other, BYBIT)):
            (tmp_path / name).write_text("\n".join(rows) + "\n")
            process_file(con, tmp_path / name, symbol=symbol, progress=False)
        assert con.execute("SELECT symbol, min(price), count(*) FROM trades GROUP BY 1 ORDER BY 1").fetchall() == [
            ("BTCUSDT", 100.0, 5), (BYBIT, 250.0, 5)]


def numbered(number: int) -> Trade:
    return Trade(BTC, 100.0, 1.0, datetime(2024, 8, 10, tzinfo=UTC), None, number, 1)


@pytest.mark.parametrize("seed", range(20))
def test_ids_that_were_taken_are_told_from_those_that_may_still_arrive(seed: int) -> None:
    "Against a plain set, with holes, late trades and repetitions."
    rng, sequence, taken, last = random.Random(seed), _Sequence(), set[int](), 1000
    for step in range(400):
        number = rng.choice([last + 1, last + 1, last + rng.randint(2, 40), rng.randint(1000, last)]) if step else last
        assert _was_taken(sequence, numbered(number)) == (number in taken), (step, number)
        missing = _note_id(sequence, numbered(number))
        assert missing == max(number - last - 1, 0)
        taken.add(number)
        last = max(last, number)


def test_missing_ids_do_not_fill_the_memory() -> None:
    "Of a feed that runs for weeks; a hole that is forgotten counts as taken, so that nothing is stored twice."
    sequence, last = _Sequence(), 0
    tracemalloc.start()
    for last in (*range(0, 60_000_000, 30_000), *range(60_000_000, 10**12, 10**9)):
        _note_id(sequence, numbered(last))
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 2_000_000, f"{used:,} bytes"
    assert not _was_taken(sequence, numbered(last - 10**8)) and _was_taken(sequence, numbered(15))
    for number in range(last - 10**8, last, 2000):  # each of which splits a hole
        _note_id(sequence, numbered(number))
    assert _was_taken(sequence, numbered(last - 2000)) and not _was_taken(sequence, numbered(last - 1000))


@pytest.mark.parametrize(("price", "volume"), [(1e16, 1.0), (1.0, 1e19), (1e8, 1e8)])
def test_impossible_trades_go_into_quarantine(settings: Settings, price: float, volume: float) -> None:
    assert AMOUNT_LIMIT == LIMITS["price"] == LIMITS["qty"] == LIMITS["quote_qty"]
    with stub(lambda c, n: (c.send(frame({"p": price, "v": volume}, {})), hold(c))) as (url, _):
        feed = listen(url, settings, collect=True).start()
        wait_for(lambda: feed.stats.trades == 1)
        assert feed.collector is not None
        feed.collector.add([Trade(BTC, price, volume, datetime.now(UTC))], datetime.now(UTC))  # not through a frame
        feed.stop()
    assert feed.stats.rejected == 1
    with init_duckdb(settings) as con:
        assert con.execute("SELECT price, qty FROM trades").fetchall() == [(100.0, 0.5)]
        reasons = con.execute("SELECT reason FROM quarantine").fetchall()
        assert reasons == [("price, volume or their product is not below 1e+15, which is beyond any market",)] * 2


@pytest.mark.parametrize("number", [2**63, -1])
def test_a_trade_id_that_no_column_holds_goes_into_quarantine(settings: Settings, number: int) -> None:
    "No matter which feed passes it: in the journal it would stop this collector and the recovery of the next one."
    now = datetime.now(UTC)
    with init_duckdb(settings) as con:
        collector = Collector([BTC], source="binance", settings=settings, con=con).start()
        collector.add([Trade(BTC, 100.0, 1.0, now, None, n, 1) for n in (7, number, 8)], now)
        collector.stop()
        assert con.execute("SELECT trade_id FROM trades ORDER BY ALL").fetchall() == [(7,), (8,)]
        (raw, reason) = con.execute("SELECT raw, reason FROM quarantine").fetchone()
    assert str(number) in raw and "trade id" in reason


def test_impossible_trades_of_an_older_version_are_named_and_the_remedy_removes_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    "A session that stored 1e16 x 1e19 blocks the bars of its symbol until it is forgotten; the other session stays."
    t0 = datetime(2024, 8, 10, tzinfo=UTC)
    for hour, price, volume in ((0, 100.0, 1.0), (2, 1e16, 1e19)):
        with monkeypatch.context() as patch:
            patch.setattr("cryptoresearch.live.collector.impossible", lambda price, volume: None)
            collector = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
            collector.add([Trade(BTC, price, volume, t0 + timedelta(hours=hour, minutes=m)) for m in range(4)], datetime.now(UTC))
            collector.stop()
    with init_duckdb(settings) as con:
        with pytest.raises(SchemaError, match="cryptoresearch data verify"):
            make_bars(con, "BTCUSDT", "1m")
        (bad,) = verify(con).bad.itertuples()
        assert (bad.check, bad.what) == ("session", collector.session.session_id)
        assert "4 with a price or volume beyond any market" in bad.detail
    remedy = re.search(r"cryptoresearch (forget \S+)$", bad.detail)
    assert remedy is not None
    done = CliRunner().invoke(app, remedy[1].split(), env={"DUCKDB_PATH": settings.duckdb_path})
    assert done.exit_code == 0 and "4 rows removed" in done.output, done.output
    with init_duckdb(settings) as con:
        assert verify(con).ok and make_bars(con, "BTCUSDT", "1m") >= 1
        tables = ("trades", "coverage", "gaps", "live_sessions")
        left = [con.execute(f"SELECT count(*) FROM {t} WHERE {'session_id' if t == 'live_sessions' else 'file_id'} = ?", [bad.what]).fetchone() for t in tables]
        assert left == [(0,)] * 4
        assert con.execute("SELECT event, symbol, detail FROM data_log").fetchall() == [("forgotten", "BTCUSDT", "4 trades of a live session taken out")]


def test_a_session_that_collects_is_not_forgotten(settings: Settings) -> None:
    collector = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
    collector.add([Trade(BTC, 100.0, 1.0, datetime.now(UTC))], datetime.now(UTC))
    collector.flush()
    with init_duckdb(settings) as con:
        with pytest.raises(ConfigError, match="Stop its collector first"):
            forget_file(con, collector.session.session_id)
        collector.stop()
        assert forget_file(con, collector.session.session_id) == 1


def test_a_quiet_session_is_not_forgotten_while_its_collector_runs(settings: Settings) -> None:
    "Neither before its first trade nor hours after the last one, which a market without trades may take."
    collector = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
    try:
        with init_duckdb(settings) as con:
            with pytest.raises(ConfigError, match="Stop its collector first"):
                forget_file(con, collector.session.session_id)
            collector.add([Trade(BTC, 100.0, 1.0, datetime.fromtimestamp(T0 / 1000, UTC))], datetime.fromtimestamp(T0 / 1000, UTC))
            collector.flush()
            with pytest.raises(ConfigError, match="whose collector runs"):
                forget_file(con, collector.session.session_id)
    finally:
        collector.stop()
    with init_duckdb(settings) as con:
        assert con.execute("SELECT count(*) FROM trades").fetchone() == (1,)
        assert forget_file(con, collector.session.session_id) == 1


@pytest.mark.parametrize(("hours", "refused"), [(1, True), (25, False)])
def test_a_session_of_another_machine_is_forgotten_a_day_after_its_last_trade(settings: Settings, hours: int, refused: bool) -> None:
    "Its lock is not visible here."
    at = datetime.now(UTC) - timedelta(hours=hours)
    collector = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
    collector.add([Trade(BTC, 100.0, 1.0, at)], at)
    collector.flush()
    name = collector.session.session_id
    with init_duckdb(settings) as con:
        (lock,) = journal_folder(con, settings).glob("*.session.lock")
        lock.unlink()
        if refused:
            with pytest.raises(ConfigError, match=r"another machine may hold.* start one of its symbols there"):
                forget_file(con, name)
        else:
            assert forget_file(con, name) == 1
    collector.stop()


def test_a_killed_session_that_was_forgotten_does_not_come_back_from_its_journal(settings: Settings) -> None:
    con, an_hour_ago = init_duckdb(settings), datetime.now(UTC) - timedelta(hours=1)
    killed = Collector([BTC], source="replay", settings=settings, con=con, interval_s=60).start()
    killed.add([Trade(BTC, 100.0, 1.0, an_hour_ago)], an_hour_ago)
    killed.flush()
    for lock in killed._locks._held:
        lock.release()  # as the operating system does for a killed process
    assert forget_file(con, killed.session.session_id) == 1
    Collector([BTC], source="replay", settings=settings, con=con).start().stop()
    assert con.execute("SELECT count(*) FROM trades").fetchone() == (0,)
    assert con.execute("SELECT count(*) FROM live_sessions WHERE session_id = ?", [killed.session.session_id]).fetchone() == (0,)
    assert not killed.journal.path.exists()
    killed._locks._held = []
    con.close()


def test_pages_tell_a_killed_collector_from_one_that_runs(settings: Settings) -> None:
    con = init_duckdb(settings)
    runs, killed = (Collector([symbol], source="replay", settings=settings, con=con).start() for symbol in (BTC, ETH))
    for lock in killed._locks._held:
        lock.release()  # as the operating system does for a killed process
    home, states = live_part(con), sessions_section(con).parts[0].frame["ended"]
    assert re.search(r"Open sessions: BTCUSDT [^;.]*\. Killed: ETHUSDT [^;.]*\.", home)
    assert sorted(states) == ["killed", "running"]
    runs.stop()
    (journal_folder(con, settings) / f"{killed.session.session_id}.session.lock").unlink()
    assert "Open sessions: ETHUSDT" in live_part(con)  # of another machine, as far as this one can see
    killed._locks._held = []
    killed.stop()
    con.close()


@pytest.mark.parametrize(("bad", "covers"), [
    ('{"data":[{"p":101,"s":"BINANCE:BTCUSDT","t":17', False),  # cut off
    ('{"type":"trade"}', False),
    (frame({"p": "101"}), False),
    (frame({"t": T0 + 400_000_000_000}), False),  # dated in the future, as all are where the local clock is slow
    (frame({"p": 1e16, "v": 1e19}, {"t": T0 + 2500}), False),
    (frame({"s": "BINANCE:DOGEUSDT"}), True),
    ('{"type":"news","data":[1]}', True),
])  # fmt: skip
def test_what_may_have_been_a_trade_and_was_refused_is_a_gap(settings: Settings, bad: str, covers: bool) -> None:
    def script(c: ServerConnection, n: int) -> None:
        for text in (frame({}, {"t": T0 + 1000}), bad, frame({"t": T0 + 5000}, {"t": T0 + 6000})):
            c.send(text)
        hold(c)

    with stub(script) as (url, _), listen(url, settings, collect=True) as feed:
        wait_for(lambda: feed.stats.frames == 3)
    with init_duckdb(settings) as con:
        spans = con.execute("SELECT epoch_ms(start_ts) - $t, epoch_ms(end_ts) - $t FROM coverage ORDER BY ALL", {"t": T0}).fetchall()
        gaps = con.execute("SELECT epoch_ms(start_ts) - $t, epoch_ms(end_ts) - $t FROM gaps ORDER BY ALL", {"t": T0}).fetchall()
    assert (spans, gaps) == (([(100, 5900)], []) if covers else ([(100, 900), (5100, 5900)], [(900, 5100)]))  # with a margin of 100 ms


def test_refusals_beyond_those_that_are_kept_are_gaps_too(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    "After as many refusals as are kept there is still the gap; a journal gives the same."
    monkeypatch.setattr(Session, "max_quarantine", 3)
    collector = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
    for k in range(6):
        now = datetime.fromtimestamp(T0 / 1000 + k, UTC)
        collector.add([Trade(BTC, 100.0, 1.0, now)], now)
        collector.refuse([("{", "not JSON")])
    again = replay_journal(collector.journal.path)
    assert again is not None and again.tracks == collector.session.tracks and again.batch.gaps == collector.session.batch.gaps
    collector.stop()
    with init_duckdb(settings) as con:
        assert con.execute("SELECT count(*) FROM quarantine").fetchone() == (3,)
        assert (again.refused, collector.session.refused) == (6, 6)  # all are counted
        detail = "6 items that are not valid trades; the first 3 are in quarantine"
        assert con.execute("SELECT event, detail FROM data_log").fetchall() == [("refused", detail)]
        assert con.execute("SELECT count(*), max(epoch(end_ts - start_ts)) FROM coverage").fetchone() == (6, 0.0)
        assert con.execute("SELECT count(*) FROM gaps").fetchone() == (5,)


@pytest.mark.parametrize("seed", range(3))
def test_no_lost_trade_lies_in_what_is_claimed(seed: int) -> None:
    "Trades arrive up to 50 ms out of order; what is sent during an outage is lost, and belongs to no claim."
    rng = random.Random(seed)
    sent = [int(i * 1000 + rng.uniform(0, 1000)) for i in range(60_000)]  # µs, a minute
    session, lost, out = Session("s", "replay", "", ["X"], 0, 0), [], False
    for at, ts in sorted((ts + rng.uniform(0, 50_000), ts) for ts in sent):
        now = at % 3_000_000 > 2_500_000
        if now and not out:
            session.lost()
        if now:
            lost.append(ts)
        else:
            session.add([("X", 100.0, 1.0, ts)], int(at))
        out = now
    claims = sorted((start, end) for (_, start), end in session.drain().coverage.items())
    assert len(lost) > 9000 and len(claims) >= 20
    assert not [ts for ts in lost if any(a <= ts <= b for a, b in claims)]
    assert sum(b - a for a, b in claims) > 60_000_000 * 2.2 / 3  # two margins and the disorder are the price


def test_claims_mean_the_same_before_and_after_they_are_folded(settings: Settings) -> None:
    collector = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
    for minute in range(6):
        at = [datetime.fromtimestamp(T0 // 60_000 * 60 + minute * 60 + s, UTC) for s in range(0, 60, 5)]
        collector.add([Trade(BTC, 100.0 + minute, 1.0, t) for t in at], datetime.now(UTC))
        collector.flush()
        if minute == 3:
            collector.lost()
    with init_duckdb(settings) as con:

        def answers() -> list[pd.DataFrame]:
            make_bars(con, "BTCUSDT", "1m")
            make_bars(con, "BTCUSDT", "tick:5")
            bars = read_bars(con, "BTCUSDT", "1m"), read_event_bars(con, "BTCUSDT", "tick:5")
            return [*bars, status(con).drop(columns="verdict"), coverage(con), gap_table(con)]

        before, rows = answers(), con.execute("SELECT count(*) FROM coverage").fetchone()
        assert rows == (6,) and write(con, fold_claims) == 2
        assert con.execute("SELECT count(*) FROM coverage").fetchone() == (2,)
        for table in ("bars", "bar_builds", "bar_inputs"):
            write(con, lambda c, table=table: c.execute(f"DELETE FROM {table}"))
        for one, other in zip(before, answers(), strict=True):
            pd.testing.assert_frame_equal(one, other)
        assert len(before[0]) == 4 and before[0]["gap"].sum() == 2  # the hole meets two minutes
    collector.stop()


def test_a_part_that_is_replayed_again_counts_once(settings: Settings) -> None:
    "Trades in the margins of the second session are those of the first, which claims their time."
    minute = T0 // 60_000 * 60_000
    for a, b in ((-5, 300), (60, 180)):
        collector = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
        at = [datetime.fromtimestamp(minute / 1000 + i / 20, UTC) for i in range(a * 20, b * 20)]
        collector.add([Trade(BTC, 100.0, 1.0, t) for t in at], datetime.now(UTC))
        collector.stop()
        time.sleep(1.1 if a < 0 else 0)  # sessions are ordered by the second in which they began
    with init_duckdb(settings) as con:
        make_bars(con, "BTCUSDT", "1m")
        assert read_bars(con, "BTCUSDT", "1m")["trades"].tolist() == [1200] * 4


def test_a_frame_in_pieces_and_pings_of_the_protocol(settings: Settings) -> None:
    def script(c: ServerConnection, n: int) -> None:
        text = frame({})
        for _ in range(5):
            c.ping()
            time.sleep(0.05)
        c.send([text[:20], text[20:40], text[40:]])  # a fragmented message
        hold(c)

    with stub(script) as (url, _), listen(url, settings) as feed:
        wait_for(lambda: feed.stats.frames == 1)
        assert feed.stats.trades == 1


def on_the_wire(data: bytes, first: int = 0x81) -> bytes:
    """A frame as a server sends it: text, not fragmented, unless the first byte says otherwise."""
    n = len(data)
    length = bytes([n]) if n < 126 else b"\x7e" + n.to_bytes(2) if n < 65_536 else b"\x7f" + n.to_bytes(8)
    return bytes([first]) + length + data


@contextlib.contextmanager
def raw_server(*writes: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that sends its bytes exactly in these writes, 50 ms apart; and what the client sent afterwards."""
    server, heard = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def play() -> None:
        with server.accept()[0] as c, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += c.recv(4096)
            key = next(line[19:] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
            answer = base64.b64encode(hashlib.sha1(key.strip() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            c.sendall(b"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + answer + b"\r\n\r\n")
            c.recv(4096)  # the subscription
            for data in writes:
                c.sendall(data)
                time.sleep(0.05)
            while data := c.recv(4096):
                heard.append(data)

    threading.Thread(target=play, daemon=True).start()
    yield f"ws://127.0.0.1:{server.getsockname()[1]}", heard
    server.close()


@pytest.mark.parametrize("cuts", [(), (1,), (3,), (200,), (700, 701, 70_000)])
def test_frames_of_any_kind_that_arrive_together_keep_their_order(settings: Settings, cuts: tuple[int, ...]) -> None:
    texts = [frame({"p": 100.0 + i}).encode() for i in range(5)]
    long = frame(*({"p": 105.0, "t": T0 + i} for i in range(1500))).encode()
    assert len(long) > 65_536
    data = on_the_wire(texts[0]) + on_the_wire(b"are you there", 0x89) + on_the_wire(texts[1][:20], 0x01) + on_the_wire(b"", 0x89)
    data += on_the_wire(texts[1][20:], 0x80) + b"".join(map(on_the_wire, texts[2:])) + on_the_wire(long) + on_the_wire(texts[0], 0x82)
    data += on_the_wire(b'{"type":"ping"}') + on_the_wire(b"\x03\xe8", 0x88)  # the last before the close counts too
    ends, got = (*cuts, len(data)), list[Trade]()
    writes = [data[a:b] for a, b in zip((0, *cuts), ends, strict=True)]
    with raw_server(*writes) as (url, heard), listen(url, settings, on_trades=got.extend, retry_base_s=60) as feed:
        wait_for(lambda: feed.stats.state == "waiting")
        assert [t.price for t in got] == [100.0, 101.0, 102.0, 103.0, 104.0, *[105.0] * 1500, 100.0]
        assert (feed.stats.frames, feed.stats.pings, feed.stats.last_problem) == (8, 1, "the server closed the connection")
        wait_for(lambda: [b"".join(heard)[:1], b"".join(heard)[19:20]] == [b"\x8a", b"\x8a"])  # two pongs


def test_a_frame_inside_a_fragmented_one_ends_the_connection(settings: Settings) -> None:
    text, got = frame({}).encode(), list[Trade]()
    data = on_the_wire(text) + on_the_wire(text[:20], 0x01) + on_the_wire(b"", 0x89) + on_the_wire(text) + on_the_wire(text[20:], 0x80)
    with raw_server(data) as (url, _), listen(url, settings, on_trades=got.extend, retry_base_s=60) as feed:
        wait_for(lambda: feed.stats.state == "waiting")
        assert (len(got), "Illegal frame" in feed.stats.last_problem) == (1, True)


def test_frames_read_together_are_stored_as_if_they_came_one_by_one(settings: Settings, tmp_path: Path) -> None:
    def event(number: int, **more: Any) -> bytes:
        data = {"e": "trade", "s": "BTCUSDT", "t": number, "p": str(100 + number), "q": "1", "T": T0 + 200 * number, "m": True}
        return on_the_wire(json.dumps({"data": data | more}).encode())

    frames = [event(1), event(2), event(2), event(5), event(3), event(6, s="ETHUSDT"), event(6), on_the_wire(b"{"), event(7), event(8)]
    frames += [event(9, p="-1"), event(10), event(11, T=T0 * 2), event(12)]
    found = []
    for number, writes in enumerate((frames, [b"".join(frames)])):
        own = settings.model_copy(update={"duckdb_path": str(tmp_path / f"{number}.sqlite")})
        with raw_server(*writes) as (url, _):
            with BinanceWebSocket("BTCUSDT", url=url, settings=own) as feed:
                wait_for(lambda feed=feed: feed.stats.frames == len(frames))
            stats = feed.stats
        queries = (
            "SELECT trade_id, ts, price, side_tick, side_reported FROM trades ORDER BY trade_id",
            "SELECT symbol, start_ts, end_ts FROM gaps ORDER BY ALL", "SELECT symbol, start_ts, end_ts FROM coverage ORDER BY ALL",
            "SELECT line, reason FROM quarantine ORDER BY line",
        )  # fmt: skip
        with init_duckdb(own) as con:
            rows = [con.execute(q).fetchall() for q in queries]
            reads = con.execute("SELECT count(DISTINCT received_at) FROM trades").fetchone()
        found.append((rows, stats.trades, stats.repeated, stats.missing, stats.rejected, stats.malformed))
        assert reads == ((1,) if number else (9,))
    assert found[0] == found[1]
    assert found[0][1:] == (9, 1, 4, 3, 1)


# ------------------------------------------------------------------ connections that die


@pytest.mark.parametrize("how", ["no code", "code", "garbage", "reset"])
def test_reconnects_and_subscribes_again(settings: Settings, how: str) -> None:
    def script(c: ServerConnection, n: int) -> None:
        c.send(frame({"p": 100.0 + n}))
        if n > 1:
            return hold(c)
        if how == "no code":
            c.socket.shutdown(socket.SHUT_RDWR)
        elif how == "code":
            c.close(1012, "restart")
        elif how == "garbage":
            c.socket.sendall(b"\xff\xff\xff\xff not a frame")
            time.sleep(0.2)
        else:
            c.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            time.sleep(0.05)
            c.socket.close()

    got: list[Trade] = []
    with stub(script) as (url, seen), listen(url, settings, on_trades=got.extend, symbols=(BTC, "BINANCE:ETHUSDT")) as feed:
        wait_for(lambda: feed.stats.trades == 2)
    assert [t.price for t in got] == [101.0, 102.0]
    assert seen == [[BTC, "BINANCE:ETHUSDT"]] * 2
    assert feed.stats.reconnects == 1


def test_one_socket_at_a_time(settings: Settings) -> None:
    """Finnhub closes a second connection of one key, so the old one must be gone before the new one comes."""
    open_now, most, guard = 0, 0, threading.Lock()

    def script(c: ServerConnection, n: int) -> None:
        nonlocal open_now, most
        with guard:
            open_now += 1
            most = max(most, open_now)
        if n < 4:
            with contextlib.suppress(Exception):
                c.recv(timeout=3)  # silent: the client's watchdog must close it
        else:
            c.send('{"type":"ping"}')
        with guard:
            open_now -= 1
        if n >= 4:
            hold(c)

    with stub(script) as (url, seen), listen(url, settings, silence_s=0.2) as feed:
        wait_for(lambda: feed.stats.pings >= 1)
    assert most == 1 and len(seen) >= 4


def test_silence_is_noticed_although_the_protocol_pings(settings: Settings) -> None:
    def script(c: ServerConnection, n: int) -> None:
        if n > 1:
            c.send('{"type":"ping"}')
            return hold(c)
        with contextlib.suppress(Exception):
            for _ in range(100):  # a proxy that answers for a stalled server
                c.ping()
                time.sleep(0.05)

    with stub(script) as (url, _), listen(url, settings, silence_s=0.4) as feed:
        wait_for(lambda: feed.stats.pings >= 1)
        assert feed.stats.last_problem == "nothing received for 0.4 s"


def test_application_pings_keep_a_quiet_market_alive(settings: Settings) -> None:
    def script(c: ServerConnection, n: int) -> None:
        for _ in range(8):
            c.send('{"type":"ping"}')
            time.sleep(0.4)
        hold(c)

    with stub(script) as (url, seen), listen(url, settings, silence_s=2.5) as feed:  # a busy machine may stop for a second
        wait_for(lambda: feed.stats.pings == 8)
        assert len(seen) == 1


# ------------------------------------------------------------------ refusals


def count_handshakes(status: int, then: int | None = None, headers: dict[str, str] | None = None) -> tuple[Any, list[float]]:
    calls: list[float] = []

    def admit(c: ServerConnection, request: Any) -> Any:
        calls.append(time.monotonic())
        if then is not None and len(calls) > then:
            return None
        response = c.respond(HTTPStatus(status), "no\n")
        for k, v in (headers or {}).items():
            response.headers[k] = v
        return response

    return admit, calls


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_not_tried_again(settings: Settings, status: int) -> None:
    admit, calls = count_handshakes(status)
    with stub(lambda c, n: None, process_request=admit) as (url, _):
        feed = listen(url, settings, token=TOKEN).start()
        with pytest.raises(FeedError, match=rf"{status}.*FINNHUB_TOKEN"):
            feed.join(5)
        time.sleep(0.2)
        assert len(calls) == 1
        assert isinstance(feed.error, FeedError) and feed.stats.state == "failed"
        with pytest.raises(FeedError):
            feed.stop()


@pytest.mark.parametrize("status", [429, 503, 524 - 20, 200])
def test_other_refusals_are_tried_again(settings: Settings, status: int) -> None:
    admit, calls = count_handshakes(status, then=2)
    with stub(lambda c, n: (c.send(frame({})), hold(c)), process_request=admit) as (url, _), listen(url, settings) as feed:
        wait_for(lambda: feed.stats.trades == 1)
    assert len(calls) == 3


def test_retry_after_is_kept(settings: Settings) -> None:
    admit, calls = count_handshakes(429, then=1, headers={"Retry-After": "1"})
    with stub(lambda c, n: (c.send(frame({})), hold(c)), process_request=admit) as (url, _), listen(url, settings) as feed:
        wait_for(lambda: feed.stats.trades == 1)
    assert calls[1] - calls[0] >= 1


@contextlib.contextmanager
def mute_listener() -> Iterator[tuple[str, list[socket.socket]]]:
    """Accepts and never answers."""
    held: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                held.append(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"ws://127.0.0.1:{server.getsockname()[1]}", held
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for s in held:
            s.close()


def test_a_server_that_never_answers_is_left(settings: Settings) -> None:
    with mute_listener() as (url, held), listen(url, settings, connect_timeout_s=0.2) as feed:
        wait_for(lambda: len(held) >= 3)
        assert feed.stats.connections == 0 and "Timeout" in feed.stats.last_problem


@pytest.mark.parametrize("where", ["before it has a socket", "in the handshake", "between tries", "while reading"])
def test_stop_is_quick(settings: Settings, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        if where == "before it has a socket":
            connect = websocket._core.connect

            def slow(*args: Any) -> Any:
                made = connect(*args)
                time.sleep(0.3)  # the server has accepted, and the client does not know its socket yet
                return made

            monkeypatch.setattr(websocket._core, "connect", slow)
        if where in ("before it has a socket", "in the handshake"):
            url, held = stack.enter_context(mute_listener())
            feed = listen(url, settings, connect_timeout_s=60).start()
            wait_for(lambda: held)
        elif where == "between tries":
            feed = listen("ws://127.0.0.1:9", settings, retry_base_s=60, retry_cap_s=60).start()
            wait_for(lambda: feed.stats.state == "waiting")
        else:
            url, _ = stack.enter_context(stub(lambda c, n: hold(c)))
            feed = listen(url, settings).start()
            wait_for(lambda: feed.stats.state == "connected")
        began = time.monotonic()
        feed.stop()
        assert time.monotonic() - began < 20
        assert feed._thread is not None and not feed._thread.is_alive()
        assert feed.stats.state == "stopped"


def test_an_error_in_the_callers_function_is_raised_by_stop(settings: Settings) -> None:
    def fails(trades: list[Trade]) -> None:
        raise ValueError("mine")

    with stub(lambda c, n: (c.send(frame({})), hold(c))) as (url, _):
        feed = listen(url, settings, on_trades=fails).start()
        wait_for(lambda: feed.error)
        with pytest.raises(FeedError, match="ValueError: mine"):
            feed.stop()


def test_can_be_started_again(settings: Settings) -> None:
    with stub(lambda c, n: (c.send(frame({"p": 100.0 + n})), hold(c))) as (url, _):
        feed = listen(url, settings, collect=True)
        for _ in range(2):
            assert feed.start() is feed and feed.start() is feed
            wait_for(lambda: feed.stats.trades == 1)
            feed.stop()
    con = init_duckdb(settings)
    assert con.execute("SELECT price, count(*) FROM trades GROUP BY 1 ORDER BY 1").fetchall() == [(101.0, 1), (102.0, 1)]
    assert con.execute("SELECT count(*), bool_and(reason = 'stopped') FROM live_sessions").fetchone() == (2, True)


# ------------------------------------------------------------------ the key


def test_the_key_is_nowhere(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Not in logs (the websocket library's trace included), errors, reprs or counters."""
    caplog.set_level(logging.DEBUG)
    asked: list[str] = []

    def admit(c: ServerConnection, request: Any) -> Any:
        asked.append(request.path)
        return c.respond(HTTPStatus.UNAUTHORIZED, f"bad key {TOKEN}\n") if len(asked) > 1 else None

    websocket.enableTrace(True, handler=logging.NullHandler())
    try:
        quiet = logging.getLogger("test.wire")
        quiet.propagate = False
        with stub(lambda c, n: c.send(json.dumps({"type": "error", "msg": f"not with {TOKEN}"})), process_request=admit, logger=quiet) as (url, _):
            feed = listen(url, settings, token=TOKEN, collect=True).start()
            with pytest.raises(FeedError) as caught:
                feed.join(10)
            with contextlib.suppress(FeedError):
                feed.stop()
    finally:
        websocket.enableTrace(False)
    assert asked[0] == "/?token=c0ffee%2Bsecret%2Fkey"  # it was sent
    assert "GET /?token=***" in caplog.text  # the trace was on
    shown = [caplog.text, str(caught.value), repr(caught.value), repr(feed), str(feed.stats), repr(feed.address), repr(feed.__dict__)]
    for text in shown:
        assert TOKEN not in text and "c0ffee" not in text


def test_a_replay_never_gets_the_key(settings: Settings) -> None:
    paths: list[str] = []
    with stub(lambda c, n: hold(c), process_request=lambda c, r: paths.append(r.path)) as (url, _), listen(url, settings):
        wait_for(lambda: paths)
    assert paths == ["/"]


# ------------------------------------------------------------------ replay into the store


@pytest.fixture(scope="module")
def real() -> pd.DataFrame:
    try:
        files = sorted(shared_data().glob("BTCUSDT-trades-*.csv"))
    except DataNotFound as e:
        pytest.skip(str(e))
    names = ["trade_id", "price", "qty", "quote_qty", "ms", "buyer_maker", "best"]
    df = pd.concat(pd.read_csv(f, names=names) for f in files).reset_index(drop=True)
    return df.assign(symbol="BTCUSDT", ts=pd.to_datetime(df["ms"], unit="ms", utc=True))


def test_replayed_real_trades_equal_the_originals(settings: Settings, real: pd.DataFrame) -> None:
    with ReplayServer(real, speed=math.inf) as server, FinnhubWebSocket(url=server.url, settings=settings) as feed:
        wait_for(lambda: server.done.is_set() and feed.stats.trades == server.sent)
    con = init_duckdb(settings)
    stored = con.execute("SELECT * FROM trades ORDER BY trade_id").df()
    assert len(stored) == len(real) == 19_904
    assert stored["price"].tolist() == real["price"].tolist()
    assert stored["qty"].tolist() == real["qty"].tolist()
    assert (stored["ts"].astype("int64") // 1000).tolist() == real["ms"].tolist()
    assert set(stored["source"]) == {"replay"} and set(stored["symbol"]) == {"BTCUSDT"}
    assert stored["trade_id"].is_monotonic_increasing and stored["trade_id"].is_unique
    assert con.execute("SELECT epoch_ms(start_ts), epoch_ms(end_ts) FROM coverage").fetchall() == [(real["ms"].iloc[0] + 100, real["ms"].iloc[-1] - 100)]
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (0,)
    assert con.execute("SELECT reason, trades FROM live_sessions").fetchall() == [("stopped", 19_904)]


def test_a_drop_leaves_a_gap_row(settings: Settings, real: pd.DataFrame) -> None:
    server = ReplayServer(real, speed=math.inf, faults={100: lambda s: s.drop(lose_frames=50)})
    with server, FinnhubWebSocket(url=server.url, settings=settings, retry_base_s=0.02) as feed:
        wait_for(lambda: server.done.is_set() and feed.stats.trades == server.sent)
    assert server.lost > 0 and feed.stats.reconnects == 1
    con = init_duckdb(settings)
    ((kind, start, end),) = con.execute("SELECT kind, epoch_ms(start_ts), epoch_ms(end_ts) FROM gaps").fetchall()
    heard = con.execute("SELECT epoch_ms(ts) FROM trades ORDER BY trade_id").df().iloc[:, 0]
    missing, there = real[(real["ms"] > start) & (real["ms"] < end)], heard[(heard > start) & (heard < end)]
    assert kind == "live" and len(missing) - len(there) == server.lost == len(real) - len(heard)
    assert ((there <= start + 100) | (there >= end - 100)).all()  # in the margins
    assert con.execute("SELECT epoch_ms(end_ts) FROM coverage ORDER BY start_ts").fetchall() == [(start,), (real["ms"].iloc[-1] - 100,)]


# ------------------------------------------------------------------ the collector dies


CHILD = textwrap.dedent(
    """
    import sys, time
    from datetime import UTC, datetime, timedelta
    from cryptoresearch.live.collector import Collector
    from cryptoresearch.live.messages import Trade
    from cryptoresearch.settings import Settings
    c = Collector(["BTCUSDT"], source="replay", settings=Settings(_env_file=None, duckdb_path=sys.argv[1], duckdb_threads=1), interval_s=0.02).start()
    t0, n = datetime(2024, 1, 1, tzinfo=UTC), 0
    while True:
        c.add([Trade("BINANCE:BTCUSDT", 100.0 + (n + k) % 7, 1.0, t0 + timedelta(milliseconds=n + k)) for k in range(10)], datetime.now(UTC))
        n += 10
        print(n, flush=True)   # from here on these trades count as received
        time.sleep(0.001)
    """
)


def run_and_kill(program: Program, path: str, after: int) -> int:
    """Trades that a collector had received when it was killed with signal 9."""
    child = program(CHILD, path, stdout=subprocess.PIPE)
    assert child.stdout is not None
    received = 0
    for line in child.stdout:
        received = int(line)
        if received >= after:
            child.kill()
            break
    rest = [int(line) for line in child.stdout if re.fullmatch(r"\d+\n", line)]
    child.wait(10)
    return max([received, *rest])


def test_kill_9_loses_nothing_and_doubles_nothing(settings: Settings, tmp_path: Path, program: Program) -> None:
    settings = settings.model_copy(update={"duckdb_path": str(tmp_path / "none yet" / "catalog.sqlite")})  # the first collector makes the store
    path = str(settings.path(settings.duckdb_path))
    received = [run_and_kill(program, path, after) for after in (500, 2500)]
    Collector(["BTCUSDT"], source="replay", settings=settings).start().stop()
    con = init_duckdb(settings)
    counts = "count(*), count(DISTINCT trade_id), count(DISTINCT ts)"
    rows = con.execute(f"SELECT s.reason, s.trades, {counts} FROM live_sessions s JOIN trades ON file_id = session_id GROUP BY s.reason, s.trades, started_at ORDER BY started_at").fetchall()
    assert [r[0] for r in rows] == ["recovered", "recovered"]
    for want, (_, noted, n, ids, times) in zip(received, rows, strict=True):
        assert want <= n <= want + 10  # the frame that was being announced may be there too
        assert noted == n == ids == times
    spans = con.execute("SELECT min(trade_id), max(trade_id) FROM trades GROUP BY file_id ORDER BY 1").fetchall()
    assert spans[0][1] < spans[1][0]
    assert con.execute("SELECT count(*) FROM coverage").fetchone() == (2,)
    assert not list((Path(path).parent / "journal").glob("*.jsonl"))


MARKET = textwrap.dedent(
    """
    import os, sys, time
    from datetime import UTC, datetime
    from cryptoresearch.live.collector import Collector
    from cryptoresearch.live.messages import Trade
    from cryptoresearch.settings import Settings

    def collect():  # 5,000 trades per second; the volume is the number of the trade
        settings = Settings(_env_file=None, duckdb_path=sys.argv[1], duckdb_threads=1)
        c, n = Collector(["BTCUSDT"], source="finnhub", settings=settings, interval_s=0.1).start(), 0
        began = time.monotonic()
        while True:
            now = datetime.now(UTC)
            c.add([Trade("BINANCE:BTCUSDT", 100.0 + k % 7, float(n + k + 1), now) for k in range(50)], now)
            n += 50
            os.write(1, f"{n}\\n".encode())  # from here on these trades count as received
            time.sleep(max(0.0, began + n / 5000 - time.monotonic()))

    for line in sys.stdin:  # this process opens nothing, so that a copy of it starts at once
        if (pid := os.fork()) == 0:
            collect()
        os.write(1, f"pid {pid}\\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"dead\\n")
    """
)


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(200, marks=[pytest.mark.heavy, pytest.mark.timeout(2400)])])
def test_kills_at_random_moments_at_5000_trades_per_second(settings: Settings, program: Program, kills: int) -> None:
    "Every trade that was announced is stored once, and what was not received lies in a gap."
    rng, path, received = random.Random(kills), str(settings.path(settings.duckdb_path)), list[int]()
    init_duckdb(settings).close()
    market = program(MARKET, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert market.stdin is not None and market.stdout is not None
    for _ in range(kills):
        print("go", file=market.stdin, flush=True)
        pid, seen, end = int(market.stdout.readline().split()[1]), 0, math.inf
        for line in market.stdout:
            if line == "dead\n":
                break
            seen, end = int(line), min(end, time.monotonic() + rng.uniform(0.01, 2.0))
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                end = math.inf
        received.append(seen)
    market.stdin.close()
    market.wait(10)
    Collector([BTC], source="finnhub", settings=settings).start().stop()
    with init_duckdb(settings) as con:
        stored = con.execute("""SELECT count(*), count(DISTINCT qty), min(qty), max(qty), count(DISTINCT trade_id), epoch_us(max(ts))
            FROM trades GROUP BY file_id ORDER BY min(trade_id)""").fetchall()
        claims = con.execute("SELECT epoch_us(start_ts), epoch_us(end_ts) FROM coverage ORDER BY start_ts").fetchall()
        gaps = con.execute("SELECT epoch_us(start_ts), epoch_us(end_ts) FROM gaps ORDER BY start_ts").fetchall()
        assert con.execute("SELECT count(*), bool_and(reason = 'recovered' OR trades = 0) FROM live_sessions").fetchone() == (kills + 1, True)
        assert verify(con).ok
    assert len(stored) == len(claims) == kills
    for announced, (rows, numbers, first, last, ids, _) in zip(received, stored, strict=True):
        assert announced <= rows <= announced + 50  # the frame of the kill may be there too: 10 ms of the market
        assert rows == numbers == ids == last and first == 1
    assert gaps == [(a[1], b[0]) for a, b in itertools.pairwise(claims)]
    assert all(claim[1] <= max(row[5] - 100_000, claim[0]) for claim, row in zip(claims, stored, strict=True))
    print(f"{kills} kills, {sum(received):,} trades announced, {sum(row[0] for row in stored):,} stored")


def test_upkeep_is_due_at_quiet_moments() -> None:
    upkeep = _Upkeep(0.0, every_s=600.0)
    assert not any(upkeep.due(float(t), 1000) for t in range(1, 900))  # busy
    assert upkeep.due(900.0, 100)  # quiet
    assert not any(upkeep.due(float(t), 1000) for t in range(901, 2100))
    assert upkeep.due(2100.0, 1000)  # busy for too long


def test_a_running_collector_maintains_its_store(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Claims are folded, rows leave the catalog, old snapshots expire except one that a run pins, and no trade is lost."
    settings = settings.model_copy(update={"runs_dir": str(tmp_path / "runs")})
    monkeypatch.setattr("cryptoresearch.live.collector.upkeep", partial(upkeep, keep="0s"))
    with init_duckdb(settings) as con:
        collector = Collector([BTC], source="replay", settings=settings, con=con, interval_s=0.01).start()
        for k in range(8):
            at = datetime.fromtimestamp(T0 / 1000 + k, UTC)
            collector.add([Trade(BTC, 100.0, 1.0, at)], at)
            wait_for(lambda k=k: collector.commits > k)
            if k == 3:
                pinned = snapshot(con)
                (tmp_path / "runs" / "a").mkdir(parents=True)
                (tmp_path / "runs" / "a" / "run.json").write_text(json.dumps({"snapshot": pinned}))
        assert con.execute("SELECT count(*) FROM coverage").fetchone() == (8,)
        collector._upkeep.every_s = 0.0
        wait_for(lambda: con.execute("SELECT count(*) FROM coverage").fetchone() == (1,))
        collector.add([Trade(BTC, 100.0, 1.0, at)], at)  # it still collects
        collector.stop()
        assert con.execute("SELECT count(*) FROM trades").fetchone() == (9,)
        assert con.execute("SELECT count(*) FROM data_log WHERE event = 'expired'").fetchone()[0] >= 1
    with connect(settings, snapshot=pinned) as then:
        assert then.execute("SELECT count(*) FROM trades").fetchone() == (4,)
    assert list(tmp_path.glob("lake/main/trades/*.parquet"))


def test_a_running_collector_opens_the_store_again_when_it_maintains_it(settings: Settings) -> None:
    "Trades that arrive, and symbols that change, meanwhile are not lost."
    collector = Collector([BTC], source="replay", settings=settings, interval_s=0.01).start()
    opened, sent, collector._upkeep.every_s = [collector._own], 0, 0.0

    def add() -> bool:
        nonlocal sent
        at = datetime.fromtimestamp(T0 / 1000 + sent, UTC)
        collector.add([Trade(BTC, 100.0, 1.0, at)], at)
        if sent % 20 == 10:
            collector.follow([BTC] if sent == 30 else [BTC, "BINANCE:ETHUSDT"])
        if collector._own is not opened[-1]:
            opened.append(collector._own)
        sent += 1
        return len(opened) > 3 and sent > 40

    wait_for(add, timeout_s=60)
    collector.stop()
    with connect(settings) as con:
        assert con.execute("SELECT count(*), count(DISTINCT ts) FROM trades").fetchone() == (sent, sent)


def test_a_store_that_cannot_be_maintained_still_collects(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings.model_copy(update={"runs_dir": str(tmp_path / "runs")})
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text("{")
    collector = Collector([BTC], source="replay", settings=settings, interval_s=0.01).start()
    collector._upkeep.every_s = 0.0
    at = datetime.fromtimestamp(T0 / 1000, UTC)
    wait_for(lambda: "the store was not maintained" in caplog.text)
    collector.add([Trade(BTC, 100.0, 1.0, at)], at)
    collector.stop()
    assert collector.stored == 1


def test_a_second_collector_is_refused(settings: Settings) -> None:
    one = Collector(["BTCUSDT"], source="replay", settings=settings).start()
    try:
        with pytest.raises(FeedError, match="another"):
            Collector(["BTCUSDT"], source="replay", settings=settings).start()
        Collector(["BTCUSDT"], source="finnhub", settings=settings).start().stop()
    finally:
        one.stop()


def test_a_store_that_breaks_ends_the_feed_in_words(settings: Settings) -> None:
    with stub(lambda c, n: ([c.send(frame({"t": T0 + i})) or time.sleep(0.01) for i in range(500)], hold(c))) as (url, _):
        feed = listen(url, settings, collect=True).start()
        wait_for(lambda: feed.collector is not None and feed.collector.commits >= 1)
        assert feed.collector is not None
        feed.collector._own.close()
        wait_for(lambda: feed.error)
        with pytest.raises(CryptoResearchError, match="journal"):
            feed.stop()
    Collector([BTC], source="replay", settings=settings).start().stop()
    con = init_duckdb(settings)
    n, ids = con.execute("SELECT count(*), count(DISTINCT trade_id) FROM trades").fetchone() or (0, 0)
    assert n == ids == feed.stats.trades


def test_the_readme_streams_the_symbol_that_its_replay_plays(settings: Settings, real: pd.DataFrame) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (played,) = re.findall(r"^cryptoresearch replay (\S+)", readme, re.MULTILINE)
    (streamed,) = re.findall(r"^cryptoresearch live (\S+) --run RUN --url", readme, re.MULTILINE)
    server = ReplayServer(real.head(500), played, speed=math.inf)
    with server, FinnhubWebSocket((f"BINANCE:{streamed}",), url=server.url, settings=settings) as feed:
        wait_for(lambda: server.done.is_set() and feed.stats.trades == 500)


def test_a_second_start_changes_nothing_and_a_stopped_collector_is_not_started(settings: Settings) -> None:
    one = Collector(["BTCUSDT"], source="replay", settings=settings).start()
    session = one.session
    assert one.start().session is session
    with pytest.raises(FeedError, match="Stop the other one"):  # the locks are still held
        Collector(["BTCUSDT"], source="replay", settings=settings).start()
    one.stop()
    with pytest.raises(FeedError, match="not stopped"):
        one.start()


@pytest.fixture
def turning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Journal, Session]:
    "A journal that begins a new file at each call of `turn`; its current file has events that are not flushed."
    monkeypatch.setattr(Journal, "limit_bytes", 0)
    session = Session("demo", "replay", "", ["A"], 0, 0)
    journal = Journal(tmp_path, session)
    journal.append({"e": "refused", "d": [["x" * 1000, "not JSON"]]})
    return journal, session


def test_a_journal_file_that_begins_during_a_flush_is_flushed_later(
    turning: tuple[Journal, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    (journal, session), flushed, real = turning, list[int](), os.fsync

    def fsync(number: int) -> None:
        if not flushed:  # while the operating system flushes, another thread begins a new file
            journal.turn(session)
        real(number)
        flushed.append(os.fstat(number).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    journal.sync()
    journal.append({"e": "lost"})
    journal.sync()
    assert journal.path.stat().st_ino in flushed
    journal.end()


def test_a_journal_is_flushed_while_a_new_file_begins(turning: tuple[Journal, Session], monkeypatch: pytest.MonkeyPatch) -> None:
    (journal, session), real = turning, Path.open

    def open_file(path: Path, *args: Any, **kw: Any) -> Any:
        journal.sync()  # as the flushing thread, which had its turn
        return real(path, *args, **kw)

    with monkeypatch.context() as m:
        m.setattr(Path, "open", open_file)
        journal.turn(session)
    journal.end()


def test_a_replay_of_a_time_without_trades_is_refused_before_it_listens(settings: Settings) -> None:
    with init_duckdb(settings) as con:
        process_file(con, min(shared_data().glob("BTCUSDT-trades-*.csv")))
        with pytest.raises(DataNotFound, match=r"those from 2024-08-08 23:5.* Choose another --start"):
            ReplayServer(con, "BTCUSDT", "2030-01-01")
        with ReplayServer(con, "BTCUSDT", "2024-08-08", speed=math.inf) as server:
            assert server.url


# ------------------------------------------------------------------ other symbols while it runs

ETH, XRP = "BINANCE:ETHUSDT", "BINANCE:XRPUSDT"


def test_symbols_are_added_and_dropped_while_running(settings: Settings) -> None:
    "The server is asked, a dropped symbol's trades are left out, and the time until it comes back is a gap."
    asked: list[dict[str, str]] = []

    def script(c: ServerConnection, n: int) -> None:
        c.send(frame({"t": T0}, {"t": T0 + 2000}))
        asked.append(json.loads(c.recv(timeout=10)))
        c.send(frame({"s": ETH, "t": T0 + 2100}))
        asked.append(json.loads(c.recv(timeout=10)))
        c.send(frame({"t": T0 + 2200}))
        c.send(frame({"s": ETH, "t": T0 + 4300}))
        asked.append(json.loads(c.recv(timeout=10)))
        c.send(frame({"t": T0 + 9000}))
        hold(c)

    with stub(script) as (url, _), listen(url, settings, collect=True, symbols=BTC) as feed:
        for symbols, trades in (([BTC, ETH], 2), ([ETH], 3), ([BTC, ETH], 4)):
            wait_for(lambda n=trades: feed.stats.trades == n)
            feed.follow(symbols)
        wait_for(lambda: feed.stats.trades == 5)
        assert feed.stats.rejected == 1 and set(feed.stats.silence_s) == {BTC, ETH}
    assert asked == [{"type": kind, "symbol": s} for kind, s in (("subscribe", ETH), ("unsubscribe", BTC), ("subscribe", BTC))]
    with connect(settings) as con:
        kept = con.execute("SELECT symbol, epoch_ms(ts) - ? FROM trades ORDER BY ts", [T0]).fetchall()
        assert kept == [("BTCUSDT", 0), ("BTCUSDT", 2000), ("ETHUSDT", 2100), ("ETHUSDT", 4300), ("BTCUSDT", 9000)]
        ((symbol, start, end),) = con.execute("SELECT symbol, epoch_ms(start_ts) - $1, epoch_ms(end_ts) - $1 FROM gaps", [T0]).fetchall()
        assert symbol == "BTCUSDT" and start <= 2000 and end >= 9000
        assert con.execute("SELECT symbols FROM live_sessions").fetchall() == [(["BTCUSDT", "ETHUSDT"],)]


def test_a_symbol_that_another_collector_has_changes_nothing(settings: Settings) -> None:
    one, two = (Collector([s], source="replay", settings=settings, interval_s=60).start() for s in (BTC, ETH))
    with pytest.raises(FeedError, match="another that collects replay-ETHUSDT"):
        one.follow([XRP, ETH])
    assert one.symbols == ["BTCUSDT"]
    three = Collector([XRP], source="replay", settings=settings, interval_s=60).start()  # its lock was given back
    two.stop()
    one.follow([ETH])
    with connect(settings) as con:
        recovered = replay_journal(one.journal.path)
        assert recovered is not None and recovered.symbols == ["BTCUSDT", "ETHUSDT"]
        rows = con.execute("SELECT symbols FROM live_sessions WHERE session_id = ?", [one.session.session_id]).fetchall()
        assert rows == [(["BTCUSDT", "ETHUSDT"],)]
    four = Collector([BTC], source="replay", settings=settings, interval_s=60).start()
    for collector in (one, three, four):
        collector.stop()


def test_a_feed_of_binance_asks_for_streams(settings: Settings) -> None:
    feed = BinanceWebSocket(["BTCUSDT", "ETHUSDT"], settings=settings, collect=False)
    feed.follow(["ETHUSDT", "XRPUSDT"])
    assert feed.symbols == (ETH, XRP)
    assert feed._requests.get_nowait() == {"method": "SUBSCRIBE", "params": ["xrpusdt@trade"], "id": 1}
    assert feed._requests.get_nowait() == {"method": "UNSUBSCRIBE", "params": ["btcusdt@trade"], "id": 1}
    with pytest.raises(ConfigError, match="Name at least one"):
        feed.follow([])


# ------------------------------------------------------------------ trades that cannot be right


def read(feed: Feed, text: str) -> None:
    "Let a feed take one frame, as its thread does."
    _take(feed, [text.encode()], time.monotonic())


def dated(ahead_s: float, **more: Any) -> str:
    "A trade of Binance, dated after the local clock."
    event = {"e": "trade", "s": "BTCUSDT", "p": "100.0", "q": "1.0", "m": True, "T": round((time.time() + ahead_s) * 1000)}
    return json.dumps({"stream": "btcusdt@trade", "data": event | more})


def test_a_trade_dated_ahead_of_the_others_hides_no_gap(settings: Settings) -> None:
    feed = BinanceWebSocket("BTCUSDT", settings=settings, source="replay", on_trades=(rows := list[Trade]()).extend)
    feed.collector = Collector(["BTCUSDT"], source="replay", settings=settings).start()
    for number in range(20):
        read(feed, dated(-1.0, t=number))
    read(feed, dated(30, t=20))
    feed.collector.lost()  # the connection
    read(feed, dated(1.0, t=21))
    gaps = feed.collector.gaps("BTCUSDT")
    feed.collector.stop()
    assert len(gaps) == 1 and gaps[0][1] is not None
    assert feed.stats.rejected == 1 and len(rows) == 21
    with connect(settings) as con:
        assert con.execute("SELECT count(*) FROM quarantine WHERE reason = 'dated in the future'").fetchall() == [(1,)]


@pytest.mark.parametrize("slow_s", [1.3, 30.0])
def test_a_slow_clock_refuses_nothing(settings: Settings, slow_s: float) -> None:
    feed = BinanceWebSocket("BTCUSDT", settings=settings, collect=False)
    for number in range(20):
        read(feed, dated(slow_s + 0.05 * (number % 3), t=number))
    assert (feed.stats.trades, feed.stats.rejected) == (20, 0)


@pytest.mark.parametrize("odd", [2**62, 2**63 - 1, 5_000_000, 3])
def test_an_id_far_from_the_others_is_refused_and_hides_no_hole(settings: Settings, odd: int) -> None:
    feed = BinanceWebSocket("BTCUSDT", settings=settings, collect=False)
    for number in (1_000_000, 1_000_001, odd, 1_000_002, 1_000_005, 1_000_006):
        read(feed, dated(-0.1, t=number))
    assert (feed.stats.trades, feed.stats.rejected, feed.stats.repeated, feed.stats.missing) == (5, 1, 0, 2)


@pytest.mark.parametrize("numbers", [(2**62, 7, 8, 9), (7, 2**62, 2**62 + 1, 2**62 + 2), (5_000_000, 7, 8, 9)])
def test_ids_that_begin_anew_are_believed_with_the_second(settings: Settings, numbers: tuple[int, ...]) -> None:
    feed = BinanceWebSocket("BTCUSDT", settings=settings, collect=False)
    for number in numbers:
        read(feed, dated(-0.1, t=number))
    assert (feed.stats.trades, feed.stats.rejected, feed.stats.repeated) == (3, 1, 0)


def test_the_wait_grows_until_a_connection_delivers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, waits, clock = BinanceWebSocket("BTCUSDT", settings=settings, collect=False), list[int](), itertools.count(0, 30)
    delivered = iter([0.0, 0.0, 9.0, 11.0, 0.0])  # seconds; each connection, or the try to open one, lasts longer

    def connect_once(feed: Feed) -> None:
        feed._delivered_s = next(delivered)
        raise ConnectionLost("lost")

    def wait(feed: Feed, lost: ConnectionLost, attempt: int) -> None:
        waits.append(attempt)
        if len(waits) == 5:
            feed._stop.set()

    monkeypatch.setattr(feed_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(feed_module, "_connect", connect_once)
    monkeypatch.setattr(feed_module, "_wait", wait)
    feed_module._reconnect(feed)
    assert waits == [0, 1, 2, 0, 1]


def test_a_connection_delivers_from_its_opening_to_its_last_frame(settings: Settings) -> None:
    def script(c: ServerConnection, n: int) -> None:
        if n == 1:
            time.sleep(0.3)
            c.send('{"type":"ping"}')
            time.sleep(0.1)
        else:
            hold(c)

    with stub(script) as (url, seen):
        feed = listen(url, settings).start()
        wait_for(lambda: feed.stats.frames == 1)
        first = feed._delivered_s
        wait_for(lambda: len(seen) == 2)
        feed.stop()
    assert first >= 0.3 and feed._delivered_s == 0


@pytest.mark.parametrize("exchange", ["BINANCE:", ""])
def test_the_command_names_a_symbol_without_trades_after_seconds(settings: Settings, monkeypatch: pytest.MonkeyPatch, exchange: str) -> None:
    def script(c: ServerConnection, n: int) -> None:
        c.send(frame({}))
        hold(c)

    monkeypatch.setattr("cryptoresearch.cli._WAIT_S", 0.6)
    monkeypatch.setenv("DUCKDB_PATH", settings.duckdb_path)
    with stub(script) as (url, _):
        said = CliRunner().invoke(app, ["stream", "--symbol", f"{exchange}BTCUSDT", "--symbol", f"{exchange}BTCUSTD", "--url", url, "--seconds", "1.2"])
    assert said.exit_code == 0 and said.output.count("no trade of BINANCE:BTCUSTD yet") == 1, said.output
    assert "1 trades received" in said.output


@pytest.mark.parametrize("command", [["stream", "--symbol", "BTCUSTD"], ["live", "BTCUSTD", "--run", "x"]])
def test_a_symbol_that_the_exchange_does_not_trade_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr("cryptoresearch.live.binance.urlopen", lambda url, timeout: contextlib.closing(io.BytesIO(b'[{"symbol":"BTCUSDT"}]')))
    monkeypatch.setattr("cryptoresearch.runs.stored.find_folder", str)
    monkeypatch.setattr("cryptoresearch.cli._live_runs", lambda *_: ([], []))
    monkeypatch.setattr("cryptoresearch.serving.live._check", lambda *_: None)
    said = CliRunner().invoke(app, [*command, "--feed", "binance"])
    assert isinstance(said.exception, ConfigError) and "found BTCUSTD. Did you mean BTCUSDT?" in str(said.exception)
