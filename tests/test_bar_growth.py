"""Stored bars that grow, in whatever order files, corrections, live trades and gaps arrive, against bars built from nothing."""

import itertools

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import examples
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from cryptoresearch.data import bar_updates as growth
from cryptoresearch.data.bars import bar_length, read_bars, trades_to_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.bar_updates import (
    _BAR_COLUMNS, _candle_chunks, _candle_lengths, _candle_span, _trade_chunks, _trade_span, Change, changed_since, read_ordered,
)
from cryptoresearch.data.series import Series
from cryptoresearch.data.store import connect, init_duckdb, snapshot, write
from cryptoresearch.settings import Settings

T0 = 1_704_326_400_000_000  # 2024-01-04, µs
SECOND = 1_000_000
number = itertools.count()


@pytest.fixture(scope="module")
def con(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    return init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path_factory.mktemp("growth") / "catalog.sqlite"), duckdb_threads=1))


class Market:
    "A symbol of the store and what happens to it, written as ingestion and the collector write it."

    def __init__(self, con: duckdb.DuckDBPyConnection, source: str) -> None:
        self.con, self.symbol, self.source = con, f"SYM{next(number)}", source
        self.files: dict[str, list[tuple]] = {}

    def insert(self, file_id: str, rows: list[tuple]) -> None:
        names = ["trade_id", "ts", "price", "qty", "side"]
        table = pa.table({n: pa.array(c, pa.float64() if n in ("price", "qty") else pa.int64()) for n, c in zip(names, zip(*rows, strict=True), strict=True)})
        self.con.register("arrived", table)
        self.con.execute(
            """INSERT INTO trades (symbol, source, trade_id, ts, price, qty, quote_qty, side_reported, side_tick, n_trades, file_id)
            SELECT ?, ?, trade_id, make_timestamp(ts), price, qty, price * qty, nullif(side, 0), nullif(side, 0), 1, ? FROM arrived""", [self.symbol, self.source, file_id])  # fmt: skip
        self.con.unregister("arrived")

    def remove(self, file_id: str) -> None:
        for table in ("trades", "coverage", "ingest_ledger", "gaps"):
            self.con.execute(f"DELETE FROM {table} WHERE file_id = ? AND symbol = ?", [file_id, self.symbol])
        self.files.pop(file_id)

    def file(self, file_id: str, rows: list[tuple]) -> None:
        self.files[file_id] = rows
        self.insert(file_id, rows)
        ts, ids = [r[1] for r in rows], [r[0] for r in rows]
        facts = [self.symbol, self.source, file_id, min(ts), max(ts)]
        self.con.execute("INSERT INTO coverage (symbol, source, file_id, start_ts, end_ts) VALUES (?, ?, ?, make_timestamp(?), make_timestamp(?))", facts)
        digest = abs(hash(tuple(rows))) % 2**64
        self.con.execute(
            "INSERT INTO ingest_ledger (symbol, source, file_id, first_ts, last_ts, first_id, last_id, rows, digest) VALUES (?, ?, ?, make_timestamp(?), make_timestamp(?), ?, ?, ?, ?)",
            [*facts, min(ids), max(ids), len(rows), digest])  # fmt: skip

    def live(self, session: str, start: int, end: int, rows: list[tuple]) -> None:
        if rows:
            self.insert(session, rows)
        self.con.execute("DELETE FROM coverage WHERE file_id = ? AND symbol = ? AND start_ts = make_timestamp(?)", [session, self.symbol, start])
        self.con.execute("INSERT INTO coverage (symbol, source, file_id, start_ts, end_ts) VALUES (?, ?, ?, make_timestamp(?), make_timestamp(?))", [self.symbol, self.source, session, start, end])

    def gap(self, kind: str, start: int, end: int, file_id: str | None) -> None:
        self.con.execute(
            "INSERT INTO gaps (symbol, source, kind, start_ts, end_ts, file_id) VALUES (?, ?, ?, make_timestamp(?), make_timestamp(?), ?)",
            [self.symbol, self.source, kind, start, end, file_id])  # fmt: skip

    def check(self, spec: str) -> None:
        "What is stored is what a build from nothing gives, and nothing is left to be done."
        key = Series(self.symbol, self.source, "time", spec)
        stored = self.con.execute(f"SELECT {_BAR_COLUMNS} FROM bars WHERE symbol = ? AND source = ? AND kind = ? AND spec = ? ORDER BY ts", key.values).to_arrow_table()
        assert changed_since(self.con, key).nothing
        length = bar_length(spec) // pd.Timedelta("1us")
        now = changed_since(self.con, Series(self.symbol, self.source, "time", "never built"))
        growth._CHUNK = 1_000_000
        span = _trade_span(self.con, key, now, length)
        wanted = pa.concat_tables(_trade_chunks(self.con, key, span, length)) if span and span.first <= span.last else stored.slice(0, 0)
        pd.testing.assert_frame_equal(stored.to_pandas(), wanted.to_pandas(), check_exact=True)
        assert self.con.execute("SELECT bars FROM bar_builds WHERE symbol = ? AND source = ? AND kind = ? AND spec = ?", key.values).fetchone() in [(len(stored),), None]


def grown(market: Market, spec: str) -> None:
    growth._CHUNK = 5  # bars; the build from nothing takes them all at once
    try:
        make_bars(market.con, market.symbol, spec)
    except Exception as e:  # no bar yet: nothing may be stored then
        assert type(e).__name__ == "DataNotFound", e
    market.check(spec)


@st.composite
def history(draw: st.DrawFn) -> list[list[tuple]]:
    "Trades of a minute, cut into files; ids sometimes jump between files, several trades share a time."
    n = draw(st.integers(6, 40))
    steps = draw(st.lists(st.sampled_from([0, 0, 100_000, 400_000, 1_000_000, 5_000_000]), min_size=n, max_size=n))
    ts = np.cumsum(steps) + T0
    prices = draw(st.lists(st.integers(90, 110), min_size=n, max_size=n))
    sides = draw(st.lists(st.sampled_from([1, -1, 1, -1, 0]), min_size=n, max_size=n))
    rows = [(i + 1, int(ts[i]), prices[i] / 10, (i % 7 + 1) / 1e5, sides[i]) for i in range(n)]
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=5)))
    files = [rows[a:b] for a, b in itertools.pairwise([0, *cuts, n])]
    jump = 0
    for i, rows_of_file in enumerate(files):
        jump += draw(st.sampled_from([0, 0, 0, 5]))
        files[i] = [(r[0] + jump, *r[1:]) for r in rows_of_file]
    return files


def lengths_of(all_of_them: tuple[str, ...], step: int, last: bool) -> tuple[str, ...]:
    "Lengths of bars to build after a step: all of them after the last one and with --heavy, else one in turn."
    return all_of_them if last or examples(0, 1) else (all_of_them[step % len(all_of_them)],)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.slow
@settings(max_examples=examples(1, 5), deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=QUIET)
@given(history(), st.data())
def test_files_in_any_order_with_corrections_and_late_gaps(con: duckdb.DuckDBPyConnection, files: list[list[tuple]], data: st.DataObject) -> None:
    assume(len(files) > 2 or examples(0, 1))  # with --heavy, simple histories too
    market = Market(con, "trades")
    waiting = data.draw(st.permutations(range(len(files))))
    loaded: list[int] = []
    for step, i in enumerate(waiting):
        market.file(f"{market.symbol}-{i}", files[i])
        loaded.append(i)
        what = data.draw(st.sampled_from(["nothing", "nothing", "correct", "forget", "gap", "gap goes"]))
        j = data.draw(st.sampled_from(loaded))
        name = f"{market.symbol}-{j}"
        if what == "correct" and name in market.files:
            rows = [(r[0], r[1], r[2] + 1, *r[3:]) for r in market.files[name]][data.draw(st.integers(0, 1)) :] or market.files[name]
            market.remove(name)
            market.file(name, rows)
        elif what == "forget" and name in market.files and len(market.files) > 1:
            market.remove(name)
        elif what == "gap":
            a, b = files[j][0][1], files[j][-1][1]
            start = data.draw(st.integers(a, b))
            market.gap(data.draw(st.sampled_from(["id", "time"])), start, data.draw(st.integers(start, b)), name)
        elif what == "gap goes":
            con.execute("DELETE FROM gaps WHERE symbol = ?", [market.symbol])
        if data.draw(st.booleans()) or step == len(waiting) - 1:
            for spec in lengths_of(("1s", "5s"), step, step == len(waiting) - 1):
                grown(market, spec)


@pytest.mark.slow
@settings(max_examples=examples(1, 3), deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=QUIET)
@given(history(), st.data())
def test_live_sessions_with_late_trades_and_broken_connections(con: duckdb.DuckDBPyConnection, files: list[list[tuple]], data: st.DataObject) -> None:
    assume(len(files) > 2 or examples(0, 1))  # with --heavy, simple histories too
    market = Market(con, "finnhub")
    session, start, end, late = f"{market.symbol}-live", None, 0, []
    for i, rows in enumerate(files):
        hold = data.draw(st.booleans())  # the first trade of a batch comes with the next one
        now, late = ([*late, *rows[1:]], rows[:1]) if hold and len(rows) > 1 else ([*late, *rows], [])
        if start is None or data.draw(st.integers(0, 3)) == 0:
            broken = i > 0 and start is not None
            before, start = (end if broken else None), rows[0][1]
            if broken and before < start:
                market.gap("live", before, start, session)
        end = max(rows[-1][1], start)
        market.live(session, start, end, now)
        for spec in lengths_of(("1s", "5s"), i, i == len(files) - 1):
            grown(market, spec)
            bars = con.execute("SELECT max(close_ts) <= make_timestamp(?) FROM bars WHERE symbol = ? AND spec = ?", [end, market.symbol, spec]).fetchone()
            assert bars is not None and bars[0] in (True, None)  # no bar that continues after the last known trade


@pytest.mark.slow
@settings(max_examples=examples(1, 2), deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=QUIET)
@given(st.data())
def test_candles_of_several_intervals_in_any_order(con: duckdb.DuckDBPyConnection, data: st.DataObject) -> None:
    symbol, key = f"CANDLE{next(number)}", []
    files = [("1m", 0, 7), ("1m", 7, 20), ("5m", 0, 15), ("5m", 15, 35), ("10m", 30, 60), ("3m", 0, 60)]
    order = data.draw(st.permutations(files))
    assume(order != files or examples(0, 1))
    for file, (interval, a, b) in enumerate(order):
        minutes = int(interval[:-1])
        opens = [m for m in range(a, b, minutes) if data.draw(st.integers(0, 9))]
        if opens:
            con.execute(
                """INSERT INTO candles BY NAME SELECT ? AS symbol, 'klines' AS source, ? AS interval, make_timestamp(? + m * 60000000) AS ts, ts + ? * INTERVAL 1 MINUTE AS close_ts,
                ? * 100.0 + m AS open, open AS high, open AS low, open AS close, m % 3 / 10 AS volume, ? AS file_id FROM (SELECT unnest(?::BIGINT[]) AS m)""",
                [symbol, interval, T0, minutes, minutes, f"{symbol}-{file}", opens])  # fmt: skip
        facts = [symbol, f"{symbol}-{file}", interval, T0 + a * 60 * SECOND, T0 + b * 60 * SECOND]
        con.execute("INSERT INTO coverage (symbol, source, file_id, interval, start_ts, end_ts) VALUES (?, 'klines', ?, ?, make_timestamp(?), make_timestamp(?))", facts)
        con.execute("INSERT INTO ingest_ledger (symbol, source, file_id, interval, rows, first_ts, last_ts) VALUES (?, 'klines', ?, ?, 5, make_timestamp(?), make_timestamp(?))", facts)
        for spec in lengths_of(("10m", "5m"), file, file == len(order) - 1):
            key = Series(symbol, "klines", "time", spec)
            length = bar_length(spec) // pd.Timedelta("1us")
            lengths = _candle_lengths(con, symbol, "klines", length)
            if not lengths:
                continue
            try:
                make_bars(con, symbol, spec)
            except Exception as e:
                assert type(e).__name__ == "DataNotFound", e
            now: Change = changed_since(con, Series(symbol, "klines", "time", "never built"))
            wanted = list(_candle_chunks(con, key, _candle_span(lengths, now, length), length, lengths))
            stored = con.execute(f"SELECT {_BAR_COLUMNS} FROM bars WHERE symbol = ? AND source = ? AND kind = ? AND spec = ? ORDER BY ts", key.values).to_arrow_table()
            pd.testing.assert_frame_equal(stored.to_pandas(), pa.concat_tables(wanted or [stored.slice(0, 0)]).to_pandas(), check_exact=True)
            opens_of = {i: {r[0] for r in con.execute("SELECT epoch_us(ts) FROM candles WHERE symbol = ? AND interval = ?", [symbol, i]).fetchall()} for i in ("10m", "5m", "3m", "1m")}
            for row in stored.to_pylist():  # the longest candles that are all there, by a plain loop
                ts = int(np.datetime64(row["ts"], "us").astype(np.int64))
                for minutes in (10, 5, 1):
                    step = minutes * 60 * SECOND
                    if length % step == 0 and all(t in opens_of[f"{minutes}m"] for t in range(ts, ts + length, step)):
                        assert (row["gap"], row["open"] // 100) == (False, minutes)
                        break
                else:
                    assert row["gap"]


@pytest.fixture
def market(con: duckdb.DuckDBPyConnection) -> Market:
    return Market(con, "trades")


def seconds(start: float, n: int, first_id: int = 1) -> list[tuple]:
    "Return four trades per second."
    return [(first_id + i, T0 + int(start * SECOND) + i * 250_000, 100.0 + i % 5, (i % 9 + 1) / 1e5, (1, -1)[i % 2]) for i in range(n)]


def test_only_bars_that_a_correction_meets_are_written_and_it_is_on_record(market: Market) -> None:
    con, name = market.con, market.symbol
    for i in range(3):
        market.file(f"{name}-{i}", seconds(i * 10, 40, 1 + 40 * i))
    grown(market, "1s")
    first = con.execute("SELECT ts, rowid FROM bars WHERE symbol = ? ORDER BY ts", [name]).fetchall()
    rows = market.files[f"{name}-1"]
    market.remove(f"{name}-1")
    market.file(f"{name}-1", [*rows[:20], (*rows[20][:2], 250.0, *rows[20][3:]), *rows[21:]])
    grown(market, "1s")
    log = con.execute("SELECT epoch_us(start_ts), epoch_us(end_ts), detail FROM data_log WHERE symbol = ? AND event = 'bars_rebuilt'", [name]).fetchall()
    assert [(a - T0, b - T0) for a, b, _ in log] == [(15 * SECOND, 16 * SECOND)]
    assert log[0][2] == f"time:1s, changed {name}-1"[:16 + len("time:1s, changed ")]
    again = con.execute("SELECT ts, rowid FROM bars WHERE symbol = ? ORDER BY ts", [name]).fetchall()
    assert [a[0] for a, b in zip(first, again, strict=True) if a != b] == [pd.Timestamp(T0 + 15 * SECOND, unit="us").to_pydatetime()]


def test_an_append_is_no_rebuild_and_carries_the_price(market: Market) -> None:
    market.file("a" + market.symbol, seconds(0, 40))
    grown(market, "1s")
    market.file("b" + market.symbol, [(41, T0 + 20 * SECOND, 7.0, 1.0, 1), (42, T0 + 22 * SECOND, 8.0, 1.0, 1)])
    grown(market, "1s")
    bars = read_bars(market.con, market.symbol, "1s")
    assert bars["close"].tolist()[10:20] == [bars["close"].iloc[9]] * 10 and not bars["gap"].any() and len(bars) == 22
    assert market.con.execute("SELECT count(*) FROM data_log WHERE symbol = ?", [market.symbol]).fetchone() == (0,)


def test_bars_that_were_taken_out_come_back(market: Market) -> None:
    market.file("c" + market.symbol, seconds(0, 80))
    grown(market, "1s")
    before = read_bars(market.con, market.symbol, "1s", ids=True)
    market.con.execute("DELETE FROM bars WHERE symbol = ? AND ts >= make_timestamp(?)", [market.symbol, T0 + 3 * SECOND])
    assert changed_since(market.con, Series(market.symbol, "trades", "time", "1s")).never
    grown(market, "1s")
    pd.testing.assert_frame_equal(read_bars(market.con, market.symbol, "1s", ids=True), before)
    assert before["first_id"].tolist()[:3] == [1, 5, 9] and before["last_id"].tolist()[:3] == [4, 8, 12]


def test_the_slower_of_two_builders_looks_again(market: Market) -> None:
    market.file("d" + market.symbol, seconds(0, 40))
    change = changed_since(market.con, Series(market.symbol, "trades", "time", "1s"))
    grown(market, "1s")
    with pytest.raises(growth.StoreBusy, match="another process has built them"):
        write(market.con, growth.record_build, Series(market.symbol, "trades", "time", "1s"), 0, None, change)
    market.check("1s")


def test_trades_are_read_in_order_however_they_lie(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(i, T0 + i // 3 * 1000, 1.0 + i, 1.0, 0) for i in range(5000)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    for part in range(0, 5000, 1000):
        market.insert("e", shuffled[part : part + 1000])
    for window in (100, 1000, 100_000):  # too many at once, and all at once
        monkeypatch.setattr(growth, "_WINDOW", window)
        got = list(read_ordered(market.con, market.symbol, "trades", T0, T0 + 1_000_000))
        assert np.concatenate([b["trade_id"] for b in got]).tolist() == [r[0] for r in rows if r[1] < T0 + 1_000_000]
        assert max(len(b["ts"]) for b in got) <= 4 * window or window == 100_000
    stopped = read_ordered(market.con, market.symbol, "trades", T0, T0 + SECOND)
    next(stopped)
    stopped.close()


def test_futures_never_fill_gaps_of_the_spot_market(con: duckdb.DuckDBPyConnection) -> None:
    spot = Market(con, "trades")
    um = Market(con, "um.trades")
    um.symbol = spot.symbol
    spot.file("f" + spot.symbol, seconds(0, 20))
    spot.file("g" + spot.symbol, seconds(10, 20, 100))
    um.file("h" + spot.symbol, [(i, t, p + 1000, q, s) for i, t, p, q, s in seconds(0, 80)])
    make_bars(con, spot.symbol, "1s")
    assert read_bars(con, spot.symbol, "1s")["gap"].sum() == 6
    assert read_bars(con, spot.symbol, "1s", market="um")["low"].min() == 1100 == read_bars(con, spot.symbol, "1s", source="um.trades")["low"].min()
    spot.remove("f" + spot.symbol)
    spot.remove("g" + spot.symbol)
    make_bars(con, spot.symbol, "1s")  # the spot market has nothing any more, and its bars are gone
    assert read_bars(con, spot.symbol, "1s").attrs["sources"] == {"um.trades": 19}


def test_a_snapshot_of_a_store_without_ids_can_be_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    given_ = Settings(_env_file=None, duckdb_path=str(tmp_path_factory.mktemp("old") / "catalog.sqlite"))
    con = init_duckdb(given_)
    market = Market(con, "trades")
    market.file("i", seconds(0, 40))
    make_bars(con, market.symbol, "1s")
    now = read_bars(con, market.symbol, "1s")
    for name in ("first_id", "last_id", "threshold"):
        con.execute(f"ALTER TABLE bars DROP COLUMN {name}")
    pinned = connect(given_, snapshot=snapshot(con))
    pd.testing.assert_frame_equal(read_bars(pinned, market.symbol, "1s"), now)
    assert read_bars(pinned, market.symbol, "1s", ids=True)["first_id"].isna().all()


def test_no_bar_in_memory_goes_on_after_what_is_known() -> None:
    rows = seconds(0.5, 40)
    frame = pd.DataFrame(rows, columns=["trade_id", "us", "price", "qty", "side_reported"]).assign(ts=lambda d: pd.to_datetime(d["us"], unit="us", utc=True))
    for us in (T0 + 4 * SECOND - 1, T0 + 4 * SECOND, T0 + 4 * SECOND + 1):
        end = pd.Timestamp(us, unit="us", tz="UTC")
        for spec in ("1s", "2s", "7s"):
            bars = trades_to_bars(frame, spec, end=end)
            assert (bars["close_ts"] <= end).all() and len(bars) == max(us // (bar_length(spec).value // 1000) - -(-rows[0][1] // (bar_length(spec).value // 1000)), 0)
