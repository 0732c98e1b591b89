"""Compare bars with a simple loop, on random trades, random holes and the store."""

from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import cache
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from conftest import NewStore
from hypothesis import given, settings
from hypothesis import strategies as st

from cryptoresearch.data.bars import bar_frame, bar_length, check_bars, NUMBERS, read_bars, resample_bars, trades_to_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.event_bars import make_event_bars, read_event_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import init_duckdb, snapshot
from cryptoresearch.errors import DataNotFound, SchemaError
from cryptoresearch.settings import Settings

T0 = pd.Timestamp("2024-01-04", tz="UTC")  # a multiple of 7 days since 1970: every length used here has a bar that begins then
EXACT = ["open", "high", "low", "close", "volume", "trades", "buy_volume", "buy_volume_tick"]


def at(ms: int) -> pd.Timestamp:
    return T0 + pd.Timedelta(milliseconds=ms)


def loop(trades: list[dict], length_ms: int, start: int, end: int, gaps: list[tuple[int, int]]) -> list[list | None]:
    "Every finished bar between start and end (ms), one after the other; None for a gap bar."
    trades = sorted(trades, key=lambda t: (t["ms"], t["trade_id"]))
    bars: list[list | None] = []
    for a in range(-(-start // length_ms) * length_ms, end // length_ms * length_ms, length_ms):
        inside = [t for t in trades if a <= t["ms"] < a + length_ms]
        if any(g0 < a + length_ms and g1 > a for g0, g1 in gaps):
            bars.append(None)
        elif inside:
            prices, sums = [t["price"] for t in inside], []
            for weight in (lambda t: 1, lambda t: t["side_reported"] == 1, lambda t: t["side_tick"] == 1):
                sums.append(float(sum((Decimal(str(t["qty"])) * int(weight(t)) for t in inside), Decimal(0))))
            bars.append([prices[0], max(prices), min(prices), prices[-1], sums[0], float(sum(t["n_trades"] for t in inside)), sums[1], sums[2]])
        else:
            last = next((t for t in reversed(trades) if t["ms"] < a), None)
            unknown = last is None or any(g1 > last["ms"] and g0 < a for g0, g1 in gaps)
            bars.append(None if last is None or unknown else [last["price"]] * 4 + [0.0] * 4)
    return bars


trade = st.fixed_dictionaries(
    {
        "ms": st.integers(0, 60_000).map(lambda ms: ms // 100 * 100),  # many share a time
        "price": st.integers(1, 100_000).map(lambda p: p / 100),
        "qty": st.integers(1, 10**9).map(lambda q: q / 1e8),
        "side_reported": st.sampled_from([1, -1]),
        "side_tick": st.sampled_from([1, -1]),
        "n_trades": st.integers(1, 9),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(trade, min_size=1, max_size=60),
    st.sampled_from([1000, 3000, 7000, 60_000]),
    st.integers(0, 5000),
    st.integers(55_000, 70_000),
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 9000)), max_size=3),
    st.randoms(use_true_random=False),
)
def test_random_trades_and_gaps_equal_the_loop(trades, length_ms, start, end, gaps, random):
    gaps = [(a, a + n) for a, n in gaps]
    trades = [t for t in trades if t["ms"] >= start and not any(a < t["ms"] < b for a, b in gaps)]
    for i, t in enumerate(random.sample(trades, len(trades))):
        t["trade_id"] = i  # ids in no order of time: the order of trades is (time, id)
    expected = loop(trades, length_ms, start, end, gaps)
    columns = ["ms", "trade_id", "price", "qty", "side_reported", "side_tick", "n_trades"]
    frame = pd.DataFrame(trades, columns=columns)
    frame["ts"] = T0 + pd.to_timedelta(frame["ms"].astype("int64"), unit="ms")
    missing = pd.DataFrame({"start_ts": [at(a) for a, _ in gaps], "end_ts": [at(b) for _, b in gaps]})
    bars = check_bars(trades_to_bars(frame, f"{length_ms // 1000}s", start=at(start), end=at(end), gaps=missing))
    assert [None if gap else row for gap, row in zip(bars["gap"], bars[EXACT].to_numpy().tolist(), strict=True)] == expected
    whole = bars[~bars["gap"]]
    assert ((whole["vwap"] >= whole["low"]) & (whole["vwap"] <= whole["high"])).all()
    quote = [sum(t["price"] * t["qty"] for t in trades if a <= at(t["ms"]) < b) for a, b in zip(whole.index, whole["close_ts"], strict=True)]
    np.testing.assert_allclose(whole["quote_volume"], quote, rtol=1e-12, atol=len(trades) * 0.5e-8)  # each product is rounded to 8 decimals


@settings(max_examples=40, deadline=None)
@given(
    st.lists(trade, min_size=1, max_size=60),
    st.sampled_from([(1000, 2000), (1000, 6000), (3000, 60_000), (2000, 2000)]),
    st.integers(0, 5000),
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 9000)), max_size=2),
    st.lists(st.sampled_from([None, 1, -1]), min_size=60, max_size=60),
)
def test_long_bars_of_short_ones_equal_those_of_trades(trades, lengths, start, gaps, sides):
    trades = [t | {"trade_id": i, "side_tick": sides[i]} for i, t in enumerate(trades) if t["ms"] >= start and not any(a < t["ms"] < a + n for a, n in gaps)]
    frame = pd.DataFrame(trades, columns=["ms", "trade_id", "price", "qty", "side_reported", "side_tick", "n_trades"])
    frame["ts"] = T0 + pd.to_timedelta(frame["ms"].astype("int64"), unit="ms")
    missing = pd.DataFrame({"start_ts": [at(a) for a, _ in gaps], "end_ts": [at(a + n) for a, n in gaps]})
    short, long = (trades_to_bars(frame, f"{ms // 1000}s", start=at(start), end=at(66_000), gaps=missing) for ms in lengths)
    made = resample_bars(short, f"{lengths[1] // 1000}s")
    unknown = made["gap"] & ~long["gap"]  # no trade between a hole, or the start, and the begin of the bar: short bars cannot show this
    for ts in made.index[unknown]:
        since = max([at(start), *(at(a + n) for a, n in gaps if at(a + n) <= ts)])
        assert short["gap"][ts] and not frame["ts"].between(since, ts, inclusive="left").any()
    equal(made[~unknown], long[~unknown])


def random_trades(n: int, seed: int, first_id: int = 1, hours: float = 30) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    ms = np.sort(rng.integers(0, int(hours * 3_600_000), n)) // 250 * 250
    price = np.round(60_000 * np.exp(np.cumsum(rng.normal(0, 1e-5, n))), 2)
    qty = np.round(rng.exponential(0.01, n) + 1e-5, 5)
    sides = pd.array(rng.choice([1, -1], n), dtype="Int8")
    return pd.DataFrame(
        {"trade_id": first_id + np.arange(n), "ts": T0 + pd.to_timedelta(ms, unit="ms"), "price": price, "qty": qty, "quote_qty": np.round(price * qty, 8),
         "side_reported": sides, "side_tick": sides, "n_trades": 1}
    )  # fmt: skip


def put(con: duckdb.DuckDBPyConnection, trades: pd.DataFrame, file_id: str, source: str = "trades", symbol: str = "BTCUSDT") -> None:
    "Trades of one file as ingestion leaves them: rows, coverage from first to last, ids in the ledger."
    rows = trades.assign(symbol=symbol, source=source, file_id=file_id, ts=trades["ts"].dt.tz_localize(None))
    con.execute("INSERT INTO trades BY NAME SELECT * FROM rows")
    facts = [symbol, source, rows["ts"].min(), rows["ts"].max(), file_id]
    con.execute("INSERT INTO coverage (symbol, source, start_ts, end_ts, file_id) VALUES (?, ?, ?, ?, ?)", facts)
    ids = [int(rows["trade_id"].min()), int(rows["trade_id"].max())]
    con.execute("INSERT INTO ingest_ledger (symbol, source, first_ts, last_ts, file_id, first_id, last_id, rows) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [*facts, *ids, len(rows)])


def equal(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True, check_freq=False)


def test_files_of_one_day_each_give_the_bars_of_one_file(settings: Settings) -> None:
    con, trades = init_duckdb(settings), random_trades(5000, seed=1, hours=54)
    for i, (_, day) in enumerate(trades.groupby(trades["ts"].dt.floor("7h"))):
        put(con, day, f"file{i}")
    for spec in ("10s", "1m", "7min", "1h", "1d"):
        make_bars(con, "BTCUSDT", spec)
        equal(read_bars(con, "BTCUSDT", spec), trades_to_bars(trades, spec, symbol="BTCUSDT"))


def test_a_file_that_is_missing_is_a_gap(settings: Settings) -> None:
    con, trades = init_duckdb(settings), random_trades(20_000, seed=2)
    parts = trades["ts"] < at(10 * 3_600_000), trades["ts"] >= at(13 * 3_600_000)
    for i, part in enumerate(parts):
        put(con, trades[part], f"file{i}")
    make_bars(con, "BTCUSDT", "1h")
    bars = check_bars(read_bars(con, "BTCUSDT", "1h"))
    # the bar before the hole is not whole either: the store knows trades until 09:59:5x only
    assert [t.hour for t in bars.index[bars["gap"]]] == [9, 10, 11, 12, 13]


def test_ids_that_are_missing_spoil_their_bars(settings: Settings) -> None:
    con, trades = init_duckdb(settings), random_trades(20_000, seed=3)
    put(con, trades, "file")
    a, b = trades["ts"][9000], trades["ts"][9001]
    con.execute("INSERT INTO gaps (symbol, source, kind, start_ts, end_ts) VALUES ('BTCUSDT', 'trades', 'id', ?, ?)", [a.tz_localize(None), b.tz_localize(None)])
    make_bars(con, "BTCUSDT", "1s")
    bars = read_bars(con, "BTCUSDT", "1s")
    spoilt = bars.index[bars["gap"] & (bars.index >= trades["ts"][100])]
    assert spoilt.tolist() == list(pd.date_range(a.floor("s"), b.floor("s"), freq="1s"))


def test_bars_come_out_the_same_to_the_last_bit_with_any_number_of_threads(settings: Settings) -> None:
    con, trades = init_duckdb(settings), random_trades(400_000, seed=4)
    trades["quote_qty"] = trades["price"] * trades["qty"]  # 53 bits each: a sum of doubles would depend on the order
    put(con, trades.sample(frac=1, random_state=0), "file")
    seen = []
    for threads in (1, 2, 4, 4):
        con.execute(f"SET threads = {threads}")
        con.execute("DELETE FROM bars")
        make_bars(con, "BTCUSDT", "1h")
        seen.append(read_bars(con, "BTCUSDT", "1h"))
    for other in seen[1:]:
        equal(seen[0], other)
    whole = seen[0][~seen[0]["gap"]]
    inside = trades["ts"].between(whole.index[0], whole["close_ts"].iloc[-1], inclusive="left")
    np.testing.assert_allclose(whole["quote_volume"].sum(), trades.loc[inside, "quote_qty"].sum(), rtol=1e-12)


def test_nothing_new_writes_nothing_and_a_new_day_appends(settings: Settings) -> None:
    con, trades = init_duckdb(settings), random_trades(10_000, seed=5)
    put(con, trades[:8000], "day1")
    n = make_bars(con, "BTCUSDT", "1m")
    before, pinned = read_bars(con, "BTCUSDT", "1m"), snapshot(con)
    assert make_bars(con, "BTCUSDT", "60s") == n and snapshot(con) == pinned
    put(con, trades[8000:], "day2")
    assert make_bars(con, "BTCUSDT", "1m") > n
    after = read_bars(con, "BTCUSDT", "1m")
    equal(after.iloc[: len(before)], before)
    equal(after, trades_to_bars(trades, "1m", symbol="BTCUSDT"))
    assert con.execute("SELECT count(*) - count(DISTINCT ts) FROM bars").fetchone() == (0,)


@pytest.mark.parametrize("spread", [1, 10**6, 4 * 10**9, 10**15])
def test_ids_may_lie_far_apart(spread: int) -> None:
    trades = random_trades(3000, seed=6)
    ids = np.random.default_rng(0).permutation(len(trades)).astype("int64")
    near, far = (trades.assign(trade_id=ids * factor + 10**9) for factor in (1, spread))
    for spec in ("1s", "1d", "7h"):
        equal(trades_to_bars(near, spec), trades_to_bars(far, spec))


def test_candles_give_the_longer_bars_that_trades_give(settings: Settings) -> None:
    con, trades = init_duckdb(settings), random_trades(3000, seed=7)  # 100 per hour: many empty minutes
    put(con, trades, "file")
    make_bars(con, "BTCUSDT", "1m")
    con.execute(
        """INSERT INTO candles BY NAME SELECT symbol, 'klines' AS source, '1m' AS interval, ts, close_ts, open, high, low, close, volume, quote_volume, trades, buy_volume
        FROM bars WHERE NOT gap""")  # fmt: skip
    for spec in ("5m", "1h"):
        make_bars(con, "BTCUSDT", spec)
        ours, theirs = (read_bars(con, "BTCUSDT", spec, source=s) for s in ("trades", "klines"))
        whole = ~ours["gap"] & ~theirs["gap"].reindex(ours.index, fill_value=True)
        assert whole.sum() > 20
        columns = [c for c in NUMBERS if c not in ("buy_volume_tick", "vwap", "quote_volume")]
        equal(ours.loc[whole, columns], theirs.loc[whole, columns])
        np.testing.assert_allclose(ours.loc[whole, "vwap"], theirs.loc[whole, "vwap"], rtol=1e-9)


def test_hourly_candles_keep_their_holes(settings: Settings, shared: Path) -> None:
    con = init_duckdb(settings)
    con.execute(
        f"""INSERT INTO candles BY NAME SELECT 'BTCUSDT' AS symbol, 'klines' AS source, '1h' AS interval, open_time::TIMESTAMP AS ts, ts + INTERVAL 1 HOUR AS close_ts,
        open, high, low, close, volume FROM '{shared}/BTCUSDT-1h-2017-08_2024-04.parquet'""")  # fmt: skip
    make_bars(con, "BTCUSDT", "1h")
    make_bars(con, "BTCUSDT", "1d")
    hours, days = (check_bars(read_bars(con, "BTCUSDT", spec)) for spec in ("1h", "1d"))
    assert (len(hours), int(hours["gap"].sum())) == (58_419 + 128, 128)
    whole = (~hours["gap"]).resample("1D").sum() == 24
    assert (days["gap"] == ~whole.loc[days.index]).all()
    sums = hours["volume"].resample("1D").sum()[days.index][~days["gap"]]
    np.testing.assert_allclose(days["volume"][~days["gap"]], sums, rtol=1e-12)


def test_the_better_source_gives_each_bar(settings: Settings) -> None:
    con, trades = init_duckdb(settings), random_trades(20_000, seed=8)
    put(con, trades[trades["ts"] < at(7_200_000)], "archive")
    put(con, trades.assign(side_reported=pd.NA), "live", source="finnhub")
    make_bars(con, "BTCUSDT", "1m")
    bars = read_bars(con, "BTCUSDT", "1m")
    known = bars["buy_volume"].notna()
    assert known[:118].all() and not known[118:].any() and not bars["gap"].any()
    live = read_bars(con, "BTCUSDT", "1m", source="finnhub")
    assert live["buy_volume"].isna().all() and not live["gap"].any()


def test_unknown_sides_are_nan_and_not_zero() -> None:
    trades = random_trades(1000, seed=9).drop(columns=["side_reported", "side_tick", "quote_qty", "n_trades", "trade_id"])
    bars = check_bars(trades_to_bars(trades, "1m"))
    assert bars[["buy_volume", "buy_volume_tick"]].isna().all(axis=None)
    assert (bars.loc[bars["trades"] == 0, "volume"] == 0).all() and (bars["trades"] == 0).any()


def test_no_trades_but_a_connection_gives_gap_bars() -> None:
    bars = check_bars(trades_to_bars(random_trades(10, seed=0)[:0], "1m", start=T0, end=at(180_000)))
    assert bars["gap"].tolist() == [True] * 3
    assert bar_length("1m") * 3 == bars["close_ts"].iloc[-1] - bars.index[0]


@pytest.mark.parametrize("order", [1, -1])
def test_real_files_join_over_midnight(settings: Settings, shared: Path, order: int) -> None:
    con = init_duckdb(settings)
    for file in sorted(shared.glob("BTCUSDT-trades-*.csv"))[::order]:
        process_file(con, str(file))
    make_bars(con, "BTCUSDT", "1m")
    bars = check_bars(read_bars(con, "BTCUSDT", "1m"))
    assert bars["gap"].tolist() == [False] * 10
    assert (bars.index[0], bars["close_ts"].iloc[-1]) == (pd.Timestamp("2024-08-08 23:55", tz="UTC"), pd.Timestamp("2024-08-09 00:05", tz="UTC"))
    trades = con.execute("FROM trades ORDER BY ts, trade_id").df()
    for ts, bar in bars[~bars["gap"]].iterrows():
        inside = trades[trades["ts"].dt.tz_localize("UTC").between(ts, bar["close_ts"], inclusive="left")]
        prices = [inside["price"].iloc[0], inside["price"].max(), inside["price"].min(), inside["price"].iloc[-1]]
        bought = inside["qty"][inside["side_reported"] == 1].map(lambda q: Decimal(str(q))).sum()
        assert bar[["open", "high", "low", "close", "trades", "buy_volume"]].tolist() == [*prices, len(inside), float(bought)]


CUTS = [0, 7, 9, 11, 12, 4000, 4001, 4010, 9000, 10_166]  # of a real day
FEW_CUTS = [0, 9, 13, 1500, 3000]


def bars_of_parts(settings: Settings, parts: list[list[str]]) -> tuple[int, pd.DataFrame, pd.DataFrame]:
    "Load files one after the other, and build bars after each; return the trades without a side, and the bars."
    con, folder = init_duckdb(settings), Path(settings.duckdb_path).parent
    for i, part in enumerate(parts):
        (folder / f"part{i}.csv").write_text("".join(part))
        process_file(con, folder / f"part{i}.csv", symbol="BTCUSDT", kind="trades")
        with suppress(DataNotFound):  # no whole second yet
            make_bars(con, "BTCUSDT", "1s")
        make_event_bars(con, "BTCUSDT", "tick_imbalance:50")
    (unsigned,) = con.execute("SELECT count(*) FROM trades WHERE side_tick IS NULL").fetchall()[0]
    return unsigned, read_bars(con, "BTCUSDT", "1s"), read_event_bars(con, "BTCUSDT", "tick_imbalance:50")


def first_lines(shared: Path, n: int) -> list[str]:
    "The first n trades of a real day."
    lines = (shared / "BTCUSDT-trades-2024-08-09.csv").read_text().splitlines(keepends=True)[:n]
    assert len(lines) == n
    return lines


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, shared: Path, new_store: NewStore) -> Callable[[int], tuple[int, pd.DataFrame, pd.DataFrame]]:
    "What one file with the first lines of the day gives."

    @cache
    def whole(n: int) -> tuple[int, pd.DataFrame, pd.DataFrame]:
        return bars_of_parts(new_store(tmp_path_factory.mktemp("whole") / "store"), [first_lines(shared, n)])

    return whole


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("cuts", [FEW_CUTS, pytest.param(CUTS, marks=pytest.mark.heavy)], ids=["few", "many"])
def test_bars_do_not_depend_on_where_the_files_are_cut(tmp_path: Path, shared: Path, new_store: NewStore, uncut: Callable, cuts: list[int], order: int) -> None:
    lines = first_lines(shared, cuts[-1])
    parts = [lines[a:b] for a, b in pairwise(cuts)][::order]
    assert any(len(part) > 1 and len({line.split(",")[1] for line in part}) == 1 for part in parts), "no file has one price only"
    found = bars_of_parts(new_store(tmp_path / "cut"), parts)
    whole = uncut(len(lines))
    assert found[0] > whole[0] and len(whole[1]) > 20 and len(whole[2]) > 20
    equal(found[1], whole[1])
    equal(found[2], whole[2])


def test_an_unknown_symbol_is_told_with_the_closest(tmp_path):
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"))) as con:
        for file in simulate_trades(tmp_path, "SIMUSDT", days=1, trades_per_day=500):
            process_file(con, str(file))
        with pytest.raises(DataNotFound, match="no trades or candles of SIMUSD, the closest is SIMUSDT"):
            make_bars(con, "SIMUSD", "1h")
        with pytest.raises(DataNotFound, match=r"no trades or candles of XRPETH\. Load"):
            make_bars(con, "XRPETH", "1h")


def test_candles_of_read_csv_make_bars_without_a_conversion(tmp_path: Path) -> None:
    numbers = {name: [1.0, 2.0] for name in ("Open", "High", "Low", "Close", "Volume")}
    texts = [("2024-01-01 00:00", "2024-01-01 01:00:00"), ("2024-01-01T01:00+01:00", "2024-01-01T01:00Z"), ("2024-01-01", "2024-01-01 01:00")]
    for first, second in texts:
        pd.DataFrame({"Date": [first, second], **numbers}).to_csv(tmp_path / "candles.csv", index=False)
        table = pd.read_csv(tmp_path / "candles.csv")
        expected = [pd.Timestamp("2024-01-01", tz="UTC"), pd.Timestamp("2024-01-01 01:00", tz="UTC")]
        assert bar_frame(table, "1h").index.tolist() == bar_frame(table.set_index("Date"), "1h").index.tolist() == expected


@pytest.mark.parametrize("times", [[1704067200], [1704067200000], [1704067200000000], [1704067200000000000], ["01/01/2024 00:00"]])
def test_the_remedy_for_times_that_say_too_little_works(times: list) -> None:
    df = pd.DataFrame({"Date": times, **{name: 1.0 for name in ("Open", "High", "Low", "Close", "Volume")}})
    for table in (df, df.set_index("Date")):
        with pytest.raises(SchemaError, match="expected open times") as refused:
            bar_frame(table, "1h")
        exec(str(refused.value).partition("Convert it: ")[2], {"pd": pd, "df": table})
        assert bar_frame(table, "1h").index[0] == pd.Timestamp("2024-01-01", tz="UTC")
    with pytest.raises(SchemaError, match="expected open, high, low, close, volume"):
        bar_frame(pd.DataFrame([[1.0, 2.0]]), "1h")
