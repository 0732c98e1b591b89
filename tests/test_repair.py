"Live sessions against the archive's file of the same time: what is replaced, what is reported, and that it happens exactly once."

import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, UTC
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import duckdb
import pandas as pd
import pytest
from conftest import copy_store, NewStore

from cryptoresearch.cli import app
from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.maintenance import verify
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.errors import FeedError
from cryptoresearch.ingest.files import forget_file, IngestResult, process_file
from cryptoresearch.ingest.repair import backfill, repairs
from cryptoresearch.live.binance import parse_binance
from cryptoresearch.live.collector import Collector, Source
from cryptoresearch.live.messages import Trade, Trades
from cryptoresearch.settings import Settings, shared_data
from typer.testing import CliRunner

Con = duckdb.DuckDBPyConnection
BEGIN = datetime(2024, 8, 8, tzinfo=UTC)
CAPTURE, ARCHIVE = "binance-ws-btcusdt-2024-08-08.jsonl.gz", [f"BTCUSDT-trades-2024-08-0{day}.csv" for day in (8, 9)]


def made(n: int = 600, step_ms: int = 1000) -> list[Trade]:
    "Trades with ids 1 to n, one per second; every fifth has a twin in the same millisecond."
    out = []
    for i in range(1, n + 1):
        at = BEGIN + timedelta(milliseconds=(i - (i % 5 == 0)) * step_ms)
        price = 100.0 + (i - (i % 5 == 0)) % 7
        out.append(Trade("BINANCE:BTCUSDT", price, 1.5, at, None, i, 1 if i % 3 else -1))
    return out


def archive(folder: Path, trades: Sequence[Trade], name: str = "BTCUSDT-trades-2024-08-08.csv") -> Path:
    rows = [(t.trade_id, t.price, t.volume, t.price * t.volume, round(t.ts.timestamp() * 1000), t.side == -1, True) for t in trades]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return folder / name


def collect(con: Con, trades: Sequence[Trade], source: Source = "binance", lost_before: Sequence[int] = (), frame: int = 20) -> str:
    "Collect trades in one session, with the connection lost before some; return its id."
    collector = Collector(["BTCUSDT"], source=source, con=con, interval_s=60).start()
    cuts = [i for i, t in enumerate(trades) if i % frame == 0 or t.trade_id in lost_before]
    for a, b in zip(cuts, [*cuts[1:], len(trades)], strict=True):
        if trades[a].trade_id in lost_before:
            collector.lost()
        some = trades[a:b]
        collector.add(some if source == "binance" else [Trade(t.symbol, t.price, t.volume, t.ts) for t in some], some[0].ts)
    collector.stop()
    return collector.session.session_id


def differences(con: Con, source: str, columns: str = "ts, price, qty") -> list[Any]:
    "Rows that only one of live and archive has, within the time that both claim."
    both = "ts >= (SELECT max(a) FROM s) AND ts < (SELECT min(b) FROM s)"
    claims = "WITH s AS (SELECT min(start_ts) + INTERVAL 1 MILLISECOND AS a, max(end_ts) AS b FROM coverage GROUP BY source)"
    one, other = (f"(SELECT {columns} FROM trades WHERE source = '{s}' AND {both})" for s in (source, "trades"))
    return con.execute(f"{claims} (FROM {one} EXCEPT ALL FROM {other}) UNION ALL (FROM {other} EXCEPT ALL FROM {one})").fetchall()


def the_repair(result: IngestResult) -> Any:
    (found,) = result.repairs
    return found


def numbers(result: IngestResult) -> tuple[int, int, int, int]:
    found = the_repair(result)
    return found.missed, found.differing, found.duplicates, found.extra


# ------------------------------------------------------------------ the real capture


@pytest.fixture(scope="module")
def captured() -> list[tuple[datetime, Trade]]:
    out = []
    with gzip.open(shared_data() / CAPTURE, "rt") as file:
        for line in file:
            at, text = line.split(" ", 1)
            if isinstance(found := parse_binance(text), Trades) and found.trades:
                out.append((datetime.fromtimestamp(int(at) / 1e9, UTC), found.trades[0]))
    return out


@pytest.mark.parametrize("source", ["binance", "finnhub"])
def test_a_real_session_that_missed_nothing_stays_as_it_is(con: Con, captured: list[tuple[datetime, Trade]], source: Source) -> None:
    collect(con, [t for _, t in captured], source)
    before = con.execute("FROM trades ORDER BY trade_id").fetchall()
    for name in ARCHIVE:
        found = the_repair(process_file(con, shared_data() / name))
        assert found.complete and found.gap_s == 0 and not found.spans
        assert str(found).endswith(f"nothing missed of {found.trades:,} trades)")
    assert con.execute("FROM trades WHERE source = ? ORDER BY trade_id", [source]).fetchall() == before
    assert differences(con, source) == []
    assert len(repairs(con)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("source", ["binance", "finnhub"])
def test_what_a_real_session_missed_is_named_and_brought_in(con: Con, captured: list[tuple[datetime, Trade]], source: Source) -> None:
    trades = [t for _, t in captured]
    gone = {*range(2000, 2600), 5000, *range(7000, 7010)}
    collect(con, [t for i, t in enumerate(trades) if i not in gone], source)
    for spec in ("1m", "1s", "tick:100"):
        make_bars(con, "BTCUSDT", spec, source=source)
    found = the_repair(process_file(con, shared_data() / ARCHIVE[0]))
    assert (found.missed, found.differing, found.duplicates, found.extra) == (len(gone), 0, 0, 0)
    if source == "binance":
        assert [n for _, _, n in found.spans] == [600, 1, 10]
        assert [(a, b) for a, b, _ in found.spans] == [(trades[a].ts, trades[b].ts) for a, b in ((2000, 2599), (5000, 5000), (7000, 7009))]
    assert sum(n for _, _, n in found.spans) == len(gone)
    assert differences(con, source, "ts, price, qty" + (", trade_id, side_reported" if source == "binance" else "")) == []
    for spec in ("1m", "1s"):
        make_bars(con, "BTCUSDT", spec, source="trades")
        one, other = (read_bars(con, "BTCUSDT", spec, source=s) for s in (source, "trades"))
        both = one.index[one.index.isin(other.index)]
        same = ["open", "high", "low", "close", "volume", "quote_volume", "trades", "buy_volume_tick", "gap"]
        assert len(both) > 3 and not one.loc[both, "gap"].any()
        pd.testing.assert_frame_equal(one.loc[both, same], other.loc[both, same], check_exact=False, rtol=1e-12)
    assert con.execute("SELECT count(*) FROM trades WHERE source = ? AND received_at IS NULL", [source]).fetchone() == (len(gone),)
    assert verify(con).ok


# ------------------------------------------------------------------ every kind of difference


@pytest.mark.parametrize("source", ["binance", "finnhub"])
def test_every_kind_of_difference_is_counted_and_replaced(con: Con, tmp_path: Path, source: Source) -> None:
    trades = made()
    odd = {100: {"price": 55.0}, 202: {"volume": 9.0}}
    live = [Trade(t.symbol, *(odd.get(t.trade_id, {}).get(k, getattr(t, k)) for k in ("price", "volume")), t.ts, None, t.trade_id, t.side) for t in trades if t.trade_id != 301]
    live.insert(400, live[400])  # the same trade again
    live.insert(450, Trade("BINANCE:BTCUSDT", 70.0, 1.0, live[450].ts, None, 10_000, 1))  # of no trade at all
    collect(con, live, source)
    make_bars(con, "BTCUSDT", "1m", source=source)
    result = process_file(con, archive(tmp_path, trades))
    assert numbers(result) == (1, 2, 1, 1)
    assert differences(con, source) == []
    make_bars(con, "BTCUSDT", "1m", source="trades")
    one, other = (read_bars(con, "BTCUSDT", "1m", source=s).iloc[1:8] for s in (source, "trades"))
    assert one[["open", "high", "low", "close", "volume", "trades"]].equals(other[["open", "high", "low", "close", "volume", "trades"]])
    assert verify(con).ok


def test_bars_follow_a_value_that_changes_while_the_number_of_trades_stays(con: Con, tmp_path: Path) -> None:
    trades = made()
    live = [Trade(t.symbol, 55.0, t.volume, t.ts, None, t.trade_id, t.side) if t.trade_id == 200 else t for t in trades]
    collect(con, live)
    make_bars(con, "BTCUSDT", "1m", source="binance")
    assert read_bars(con, "BTCUSDT", "1m", source="binance").low.min() == 55
    process_file(con, archive(tmp_path, trades))
    assert read_bars(con, "BTCUSDT", "1m", source="binance").low.min() == 100


def test_a_gap_becomes_covered_time_even_if_no_trade_was_missed(con: Con, tmp_path: Path) -> None:
    collect(con, made(), lost_before=[302])
    make_bars(con, "BTCUSDT", "1m", source="binance")
    assert read_bars(con, "BTCUSDT", "1m", source="binance").gap.any()
    found = the_repair(process_file(con, archive(tmp_path, made())))
    assert found.complete and found.gap_s == 1.0 + 0.2 and "1.2 s of gaps closed" in str(found)  # with the margins of both ends
    assert not read_bars(con, "BTCUSDT", "1m", source="binance").gap.any()
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (0,)


def test_the_part_of_a_gap_that_the_file_does_not_have_stays(con: Con, tmp_path: Path) -> None:
    trades = made()
    collect(con, [t for t in trades if not 200 < t.trade_id <= 400], lost_before=[401])
    found = the_repair(process_file(con, archive(tmp_path, trades[:300])))
    assert found.missed == 98  # the millisecond of the file's last two trades may continue in the next file
    (left,) = con.execute("SELECT start_ts, end_ts, kind FROM gaps").fetchall()
    assert left == (datetime(2024, 8, 8, 0, 4, 59), datetime(2024, 8, 8, 0, 6, 41, 100_000), "live")
    rest = process_file(con, archive(tmp_path, trades[300:], "rest.csv"), symbol="BTCUSDT", kind="trades")
    assert the_repair(rest).missed == 102
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (0,)
    assert differences(con, "binance", "ts, trade_id, price, qty") == []


def test_the_time_between_two_sessions_is_repaired_once(con: Con, tmp_path: Path) -> None:
    "The last trades of a session are in the gap before the next one, and so are the first of that."
    trades = made(3000, step_ms=30)
    one, two = collect(con, trades[:1000]), collect(con, trades[2000:])
    result = process_file(con, archive(tmp_path, trades))
    assert [(r.session_id, r.missed, r.duplicates, r.extra) for r in result.repairs] == [(one, 0, 0, 0), (two, 1000, 0, 0)]
    assert con.execute("SELECT file_id, count(*) FROM trades WHERE source = 'binance' GROUP BY 1 ORDER BY 2").fetchall() == [(one, 1000), (two, 2000)]
    assert differences(con, "binance", "ts, trade_id, price, qty") == []
    assert verify(con).ok


def test_time_for_which_the_archive_has_a_hole_is_left_alone(con: Con, tmp_path: Path) -> None:
    collect(con, made())
    file = archive(tmp_path, [t for t in made() if not 200 < t.trade_id <= 250])
    found = the_repair(process_file(con, file))
    assert found.complete
    assert con.execute("SELECT count(*) FROM trades WHERE source = 'binance'").fetchone() == (600,)


@pytest.mark.parametrize(("name", "source"), [("BTCUSDT-aggTrades-2024-08-08.csv", "binance"), ("BTCUSDT-trades-2024-08-08.csv", "replay"), ("ETHUSDT-trades-2024-08-08.csv", "binance")])
def test_other_files_repair_nothing(con: Con, tmp_path: Path, name: str, source: Source) -> None:
    collect(con, made()[::2], source)
    lines = archive(tmp_path, made()).read_text().splitlines()
    if "agg" in name:
        lines = [",".join([*(p := line.split(","))[:3], p[0], p[0], *p[4:]]) for line in lines]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    assert process_file(con, tmp_path / name).repairs == ()
    assert con.execute("SELECT count(*) FROM trades WHERE source = ?", [source]).fetchone() == (300,)


# ------------------------------------------------------------------ forecasts


def test_forecasts_that_rest_on_changed_trades_are_marked(con: Con, tmp_path: Path) -> None:
    def store(c: Con) -> None:
        for minute in range(1, 9):
            for source in ("binance", "replay"):
                ts = BEGIN.replace(tzinfo=None) + timedelta(minutes=minute)
                row = ["run", "BTCUSDT", "1m", "return", 1, ts, ts + timedelta(minutes=1), 0.1, source, ts]
                c.execute("INSERT INTO predictions (run_id, symbol, spec, target, horizon, ts, close_ts, prediction, source, made_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    collect(con, [t for t in made() if t.trade_id not in (302, 333)])
    write(con, store)
    found = the_repair(process_file(con, archive(tmp_path, made())))
    assert found.predictions == 1 and "1 forecasts" in str(found)
    marked = con.execute("SELECT minute(ts), second(changed_ts), minute(changed_ts) FROM predictions WHERE source = 'binance' ORDER BY ts").fetchall()
    assert marked == [(m, None, None) for m in range(1, 5)] + [(m, 33, 5) for m in range(5, 9)]
    assert con.execute("SELECT count(*) FROM predictions WHERE source = 'replay' AND changed_ts IS NOT NULL").fetchone() == (0,)


# ------------------------------------------------------------------ exactly once


def in_child(work: Callable[[], object]) -> int:
    "Run in a copy of this process; return the signal that ended it, 0 for none."
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


STEPS = [("_lay_out", "before"), *((step, "after") for step in ("_lay_out", "_replace", "_mark_predictions", "_close_gaps", "_record")),
         ("rebuild_live_bars", "before"), ("rebuild_live_bars", "after")]  # fmt: skip
ALWAYS = (("_record", "after"), ("rebuild_live_bars", "before"))  # the others are slow tests, or heavy ones
SLOW = (("_lay_out", "before"), ("_replace", "after"))


@pytest.fixture(scope="module")
def with_a_gap(tmp_path_factory: pytest.TempPathFactory, new_store: NewStore) -> Path:
    "Folder of a store with a session that lost a hundred trades, and its bars; to be copied."
    folder = tmp_path_factory.mktemp("gap") / "store"
    settings = new_store(folder)

    def first() -> None:
        with init_duckdb(settings) as con:
            collect(con, [t for t in made() if not 200 < t.trade_id <= 300], lost_before=[301])
            make_bars(con, "BTCUSDT", "1m", source="binance")

    assert in_child(first) == 0
    return folder


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(("step", "when"), [pytest.param(*s, marks=[] if s in ALWAYS else pytest.mark.slow if s in SLOW else pytest.mark.heavy) for s in STEPS])
def test_a_kill_between_the_steps_leaves_all_or_nothing(settings: Settings, with_a_gap: Path, tmp_path: Path, step: str, when: str) -> None:
    import cryptoresearch.ingest.files as files
    import cryptoresearch.ingest.repair as module

    def killed() -> None:
        owner: Any = files if step == "rebuild_live_bars" else module
        real = getattr(owner, step)

        def end(*args: Any) -> Any:
            if when == "after":
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, step, end)
        process_file(init_duckdb(settings), file)

    file = archive(tmp_path, made())
    copy_store(with_a_gap, Path(settings.duckdb_path).parent)
    assert in_child(killed) == signal.SIGKILL
    with init_duckdb(settings) as con:
        done = con.execute("SELECT count(*) FROM trades WHERE source = 'binance'").fetchone() == (600,)
        assert done == (step == "rebuild_live_bars")
        assert len(repairs(con)) == int(done) and con.execute("SELECT count(*) FROM ingest_ledger").fetchone() == (int(done),)
        again = process_file(con, file)
        assert again.already_loaded == done and len(again.repairs) == int(not done)
        assert len(repairs(con)) == 1 and repairs(con).missed.tolist() == [100]
        assert differences(con, "binance", "ts, trade_id, price, qty") == []
        assert not read_bars(con, "BTCUSDT", "1m", source="binance").gap.any()
        assert verify(con).ok


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("source", ["binance", "finnhub"])
def test_a_journal_that_is_recovered_later_brings_nothing_back(settings: Settings, tmp_path: Path, source: Source) -> None:
    "A session is killed after its commit, its file arrives, and only then is the journal read again."
    live = [Trade(t.symbol, 55.0 if t.trade_id == 77 else t.price, t.volume, t.ts, None, *((t.trade_id, t.side) if source == "binance" else (None, None))) for t in made() if not 200 < t.trade_id <= 300]

    def killed() -> None:
        collector = Collector(["BTCUSDT"], source=source, settings=settings, interval_s=60).start()
        for k, trade in enumerate(live):
            if k == 200:
                collector.lost()
            collector.add([trade], trade.ts)
        collector.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL
    with init_duckdb(settings) as con:
        assert numbers(process_file(con, archive(tmp_path, made()))) == (100, 1, 0, 0)
        Collector(["BTCUSDT"], source=source, con=con).start().stop()  # recovers the journal
        assert con.execute("SELECT reason FROM live_sessions ORDER BY started_at").fetchall()[0] == ("recovered",)
        assert con.execute("SELECT count(*) FROM gaps WHERE kind = 'live'").fetchone() == (0,)
        assert con.execute("SELECT count(*) FROM trades WHERE source = ?", [source]).fetchone() == (600,)
        assert differences(con, source) == []
        assert verify(con).ok


def test_a_loaded_file_repairs_a_session_that_is_recovered_after_it(con: Con, tmp_path: Path) -> None:
    file = archive(tmp_path, made())
    process_file(con, file)
    collect(con, [t for t in made() if t.trade_id != 300])
    again = process_file(con, file)
    assert again.already_loaded and the_repair(again).missed == 1
    assert process_file(con, file).repairs == ()
    assert con.execute("SELECT count(*) FROM trades WHERE source = 'binance'").fetchone() == (600,)


def test_a_file_repairs_a_gap_that_ends_after_it_was_loaded(con: Con, tmp_path: Path) -> None:
    trades, file = made(), archive(tmp_path, made())
    collector = Collector(["BTCUSDT"], source="binance", con=con, interval_s=60).start()
    for t in trades[:200]:
        collector.add([t], t.ts)
    collector.flush()
    collector.lost()
    assert the_repair(process_file(con, file)).complete
    for t in trades[400:]:
        collector.add([t], t.ts)
    collector.stop()
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (1,)
    assert the_repair(process_file(con, file)).missed == 200
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (0,)
    assert differences(con, "binance", "ts, trade_id, price, qty") == []
    assert verify(con).ok


def test_forgetting_a_session_forgets_its_repairs(con: Con, tmp_path: Path) -> None:
    session = collect(con, made()[::2])
    process_file(con, archive(tmp_path, made()))
    assert forget_file(con, session) >= 590
    make_bars(con, "BTCUSDT", "1m")
    assert len(repairs(con)) == 0 and verify(con).ok


# ------------------------------------------------------------------ the commands


def test_ingest_prints_the_report_and_the_store_keeps_it(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYPTORESEARCH_HOME", str(tmp_path))
    monkeypatch.setenv("DUCKDB_PATH", str(settings.duckdb_path))
    with init_duckdb(settings) as con:
        collect(con, [t for t in made() if t.trade_id not in (302, 303)])
    runner = CliRunner()
    assert "no live session was repaired" in runner.invoke(app, ["data", "repairs"]).output
    file = str(archive(tmp_path, made()))
    printed = runner.invoke(app, ["ingest", file])
    assert "2 of " in printed.output and "trades missed in 1 stretches (longest: 2 from 00:05:02" in printed.output
    (row,) = json.loads(runner.invoke(app, ["data", "repairs", "--json"]).output)
    assert (row["missed"], row["symbol"], row["source"], len(row["spans"])) == (2, "BTCUSDT", "binance", 1)
    assert "repaired" in runner.invoke(app, ["data", "log"]).output
    (again,) = json.loads(runner.invoke(app, ["ingest", file, "--json"]).output)
    assert (again["outcome"], again["repairs"]) == ("already loaded", [])


# ------------------------------------------------------------------ back-fill from the exchange


class Exchange:
    "Answer requests for old trades as Binance does; the first answers may be refusals: status and seconds to wait."

    def __init__(self, trades: Sequence[Trade], refusals: Sequence[tuple[int, str]] = (), body: bytes | None = None) -> None:
        self.trades, self.refusals, self.body, self.asked = trades, list(refusals), body, list[tuple[int, int]]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = parse_qs(urlsplit(self.path).query)
                assert urlsplit(self.path).path == "/api/v3/historicalTrades" and asked["symbol"] == ["BTCUSDT"]
                first, limit = int(asked["fromId"][0]), int(asked["limit"][0])
                outer.asked.append((first, limit))
                status, after = outer.refusals.pop(0) if outer.refusals else (200, "")
                page = [t for t in outer.trades if (t.trade_id or 0) >= first][:limit]
                rows = [{"id": t.trade_id, "price": f"{t.price:.8f}", "qty": f"{t.volume:.8f}", "quoteQty": "1", "time": round(t.ts.timestamp() * 1000), "isBuyerMaker": t.side == -1, "isBestMatch": True} for t in page]
                self.send_response(status)
                if after:
                    self.send_header("Retry-After", after)
                self.end_headers()
                self.wfile.write(outer.body if outer.body is not None else json.dumps(rows if status == 200 else {"code": -1003, "msg": "Too many requests"}).encode())

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Exchange":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_missed_trades_are_fetched_from_the_exchange(con: Con, tmp_path: Path) -> None:
    "Two gaps of one session and the time between two sessions; an id that the exchange has not is no trade."
    trades = [t for t in made(3000, step_ms=100) if t.trade_id != 1500]
    collect(con, [t for t in trades if t.trade_id <= 100 or 1300 < t.trade_id <= 1400], lost_before=[1301])
    collect(con, [t for t in trades if t.trade_id > 1600])
    make_bars(con, "BTCUSDT", "1m", source="binance")
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (2,)
    with Exchange(trades) as exchange:
        done = backfill(con, "BTCUSDT", url=exchange.url)
        assert [r.missed for r in done] == [1200, 199] and exchange.asked == [(101, 1000), (1101, 200), (1401, 200)]
        assert backfill(con, "BTCUSDT", url=exchange.url) == () and len(exchange.asked) == 3
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (0,)
    assert con.execute("SELECT count(*) FROM trades WHERE received_at IS NULL").fetchone() == (1399,)
    assert verify(con).ok
    filled = read_bars(con, "BTCUSDT", "1m", source="binance")
    assert the_repairs_find_nothing(con, archive(tmp_path, trades))
    make_bars(con, "BTCUSDT", "1m")
    same = ["open", "high", "low", "close", "volume", "trades", "buy_volume_tick", "gap"]
    pd.testing.assert_frame_equal(filled[same], read_bars(con, "BTCUSDT", "1m", source="trades")[same].loc[filled.index], check_exact=False, rtol=1e-12, check_freq=False)


def the_repairs_find_nothing(con: Con, file: Path) -> bool:
    return all(r.complete for r in process_file(con, file).repairs)


def test_a_gap_without_missing_ids_is_closed_without_a_request(con: Con) -> None:
    collect(con, made(), lost_before=[302])
    (done,) = backfill(con, "BTCUSDT", url="http://127.0.0.1:9")
    assert done.complete and con.execute("SELECT count(*) FROM gaps").fetchone() == (0,)


def test_the_exchange_is_asked_no_sooner_than_it_says(con: Con) -> None:
    collect(con, [t for t in made() if not 200 < t.trade_id <= 300], lost_before=[301])
    with Exchange(made(), [(429, "1"), (418, "1")]) as exchange:
        began = time.monotonic()
        assert [r.missed for r in backfill(con, "BTCUSDT", url=exchange.url)] == [100]
        assert time.monotonic() - began >= 2.0 and len(exchange.asked) == 3


@pytest.mark.parametrize(("refusal", "body", "found"), [
    ((418, "3600"), None, "HTTP 418, to be asked again in 3600 s"), ((403, ""), None, "HTTP 403"), ((200, ""), b"<html>", "cannot be read"), (None, None, "ConnectError"),
])  # fmt: skip
def test_an_exchange_without_an_answer_leaves_the_gap(con: Con, refusal: tuple[int, str] | None, body: bytes | None, found: str) -> None:
    collect(con, [t for t in made() if not 200 < t.trade_id <= 300], lost_before=[301])
    with Exchange(made(), [refusal] if refusal else [], body) as exchange, pytest.raises(FeedError, match=found):
        backfill(con, "BTCUSDT", url=exchange.url if refusal else "http://127.0.0.1:9")
    assert con.execute("SELECT count(*), any_value(kind) FROM gaps").fetchone() == (1, "live")
    assert len(repairs(con)) == 0


def test_an_answer_that_ends_too_early_leaves_the_gap(con: Con) -> None:
    collect(con, [t for t in made() if not 200 < t.trade_id <= 300], lost_before=[301])
    with Exchange([t for t in made() if t.trade_id <= 250]) as exchange, pytest.raises(FeedError, match="no trade from id 251 on, although trade 301 is stored"):
        backfill(con, "BTCUSDT", url=exchange.url)
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (1,) and len(repairs(con)) == 0
    with Exchange(made()) as exchange:
        assert [r.missed for r in backfill(con, "BTCUSDT", url=exchange.url)] == [100]


@pytest.mark.parametrize(("kept", "closed"), [((0, 200), 0), ((301, 600), 0), ((0, 600), 1)])
def test_a_gap_is_closed_only_between_trades_that_are_stored(con: Con, kept: tuple[int, int], closed: int) -> None:
    "Without a trade on either side, nothing shows which ids are missing."
    collect(con, [t for t in made() if not 200 < t.trade_id <= 300], lost_before=[301])
    con.execute("DELETE FROM trades WHERE trade_id NOT BETWEEN ? AND ?", list(kept))
    with Exchange(made()) as exchange:
        assert len(backfill(con, "BTCUSDT", url=exchange.url)) == closed
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (1 - closed,)


def test_a_running_session_is_filled_and_counted_at_its_end(con: Con) -> None:
    collector = Collector(["BTCUSDT"], source="binance", con=con, interval_s=60).start()
    for t in made():
        if t.trade_id == 301:
            collector.lost()
        if not 200 < t.trade_id <= 300:
            collector.add([t], t.ts)
    collector.flush()
    with Exchange(made()) as exchange:
        assert [r.missed for r in backfill(con, "BTCUSDT", url=exchange.url)] == [100]
    collector.stop()
    assert con.execute("SELECT trades FROM live_sessions").fetchone() == (600,) and verify(con).ok
