"""A file is what its content says: symbol, market, units and length are read from it, and contradictions are refused."""

from datetime import date
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from minio.error import InvalidResponseError, S3Error, ServerError

from cryptoresearch.data.archive import _explained, archive_name
from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.event_bars import event_bars, read_event_bars
from cryptoresearch.data.quality import happened
from cryptoresearch.data.series import normal_symbol
from cryptoresearch.data.status import read_trades, status
from cryptoresearch.data.store import _is_conflict, init_duckdb
from cryptoresearch.errors import ConfigError, DataNotFound, SchemaError
from cryptoresearch.features.derived import symbol_prefix
from cryptoresearch.ingest.files import process_file
from cryptoresearch.ingest.folders import find_files, process_files
from cryptoresearch.ingest.formats import inspect_file
from cryptoresearch.live.collector import plain_symbol
from cryptoresearch.live.feed import FinnhubWebSocket
from cryptoresearch.live.replay import ReplayServer
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.serving.queries import bars_page, features_page, read_predictions
from cryptoresearch.settings import Settings

FIRST_MS = 1_704_067_200_000
DAY = "trades-2024-01-01"


def written(folder: Path, name: str, *lines: str) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


# --- symbol -------------------------------------------------------------------------------------------------------------------------------

WITH_SYMBOL = "symbol,id,price,qty,time,is_buyer_maker"


def of_symbols(*symbols: str) -> list[str]:
    return [f"{s},{i},{100 + i % 3},0.5,{FIRST_MS + 1000 * i},true" for i, s in enumerate(symbols)]


@pytest.mark.parametrize("spelling", ["ETHUSDT", "ethusdt", '"ETHUSDT"', "ETH-USDT", " ETH/USDT"])
def test_a_symbol_column_contradicts_the_name(con: duckdb.DuckDBPyConnection, tmp_path: Path, spelling: str) -> None:
    file = written(tmp_path, f"BTCUSDT-{DAY}.csv", WITH_SYMBOL, *of_symbols(*[spelling] * 20))
    with pytest.raises(SchemaError, match=r"rows of BTCUSDT, as its name says; found ETHUSDT .*--symbol ETHUSDT"):
        process_file(con, file)
    assert con.execute("SELECT count(*) FROM trades").fetchone() == (0,)
    assert process_file(con, file, symbol="ETHUSDT").rows == 20
    with pytest.raises(SchemaError, match="expected rows of BTCUSDT; found ETHUSDT"):
        process_file(con, file, symbol="BTCUSDT", replace=True)


def test_a_symbol_column_fills_in_the_name(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    found = process_file(con, written(tmp_path, "dump.csv", WITH_SYMBOL, *of_symbols(*["eth-usdt"] * 20)))
    assert (found.symbol, found.rows, found.rejected) == ("ETHUSDT", 20, 0)
    assert con.execute("SELECT DISTINCT symbol FROM trades").fetchall() == [("ETHUSDT",)]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_file_of_several_symbols_is_loaded_for_the_one_that_is_chosen(con: duckdb.DuckDBPyConnection, tmp_path: Path, form: str) -> None:
    rows = of_symbols("BTCUSDT", "ETHUSDT", "BTCUSDT", "ETHUSDT", "ETHUSDT")
    file = written(tmp_path, "dump.csv", WITH_SYMBOL, *rows)
    if form == "parquet":
        parts = list(zip(*(row.split(",") for row in rows), strict=True))
        names, types = WITH_SYMBOL.split(","), (str, int, float, float, int, lambda text: text == "true")
        table = pa.table({n: [kind(v) for v in p] for n, kind, p in zip(names, types, parts, strict=True)})
        pq.write_table(table, tmp_path / "dump.parquet")
        file = str(tmp_path / "dump.parquet")
    with pytest.raises(SchemaError, match=r"one symbol .*found BTCUSDT, ETHUSDT .*ingest dump\.\w+ --symbol BTCUSDT"):
        process_file(con, file)
    results = [process_file(con, file, symbol=symbol) for symbol in ("ETH/USDT", "BTCUSDT", "ethusdt")]
    assert [(r.symbol, r.rows, r.rejected, r.already_loaded) for r in results] == [
        ("ETHUSDT", 3, 0, False), ("BTCUSDT", 2, 0, False), ("ETHUSDT", 3, 0, True),
    ]  # fmt: skip
    assert con.execute("SELECT symbol, list(trade_id ORDER BY ts) FROM trades GROUP BY 1 ORDER BY 1").fetchall() == [
        ("BTCUSDT", [0, 2]), ("ETHUSDT", [1, 3, 4]),
    ]  # fmt: skip
    with pytest.raises(SchemaError, match="expected rows of XRPUSDT; found BTCUSDT, ETHUSDT"):
        process_file(con, file, symbol="XRPUSDT")


def test_another_symbol_far_into_a_file_is_found(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    rows = of_symbols(*["BTCUSDT"] * 9000, "ETHUSDT")
    with pytest.raises(SchemaError, match=r"one symbol .*found BTCUSDT, ETHUSDT"):
        process_file(con, written(tmp_path, f"BTCUSDT-{DAY}.csv", WITH_SYMBOL, *rows))
    assert con.execute("SELECT count(*) FROM trades").fetchone() == (0,)
    assert process_file(con, written(tmp_path, "all.csv", WITH_SYMBOL, *rows), symbol="ETHUSDT").rows == 1


def test_a_symbol_is_written_in_one_way() -> None:
    assert {normal_symbol(s) for s in ("btcusdt", " BTCUSDT ", "BTCUSDT\n", "BTC/USDT", "BTC-USDT", "BTC_USDT")} == {"BTCUSDT"}
    for bad in ("", "BTC USDT", "BTCUSDT;", "../../x", "BTC/USDT:USDT"):
        with pytest.raises(SchemaError, match="expected a symbol"):
            normal_symbol(bad)


# --- coin-margined futures ----------------------------------------------------------------------------------------------------------------

CONTRACTS = {  # file name, arguments, lines, and how the market is known
    "trades": ("BTCUSD_PERP-trades-2024-01-01.csv", {}, ["id,price,qty,base_qty,time,is_buyer_maker", f"1,50000.0,1,0.002,{FIRST_MS},true"], "BTCUSD_PERP"),
    "no header": ("BTCUSD_PERP-trades-2024-01-01.csv", {}, [f"1,50000.0,1,0.002,{FIRST_MS},true"], "BTCUSD_PERP"),
    "candles": ("BTCUSD_240927-1h-2024-01-01.csv", {}, [f"{FIRST_MS},5e4,5e4,5e4,5e4,4000,{FIRST_MS + 3_599_999},8.0,50,2000,4.0,0"], "BTCUSD_240927"),
    "column": ("dump.csv", {"symbol": "BTCUSDT"}, ["id,price,qty,base_qty,time,is_buyer_maker", f"1,50000.0,1,0.002,{FIRST_MS},true"], "column base_qty"),
    "argument": ("dump.csv", {"symbol": "bnbusd_perp", "market": "um"}, [f"1,50000.0,1,0.002,{FIRST_MS},true"], "BNBUSD_PERP"),
    "symbol column": ("dump.csv", {}, ["symbol,id,price,qty,time", f"ETH/USD_240329,1,50000.0,1,{FIRST_MS}"], "ETHUSD_240329"),
    "swap": ("dump.csv", {}, ["symbol,id,price,qty,time", f"BTC-USDT-SWAP,1,50000.0,1,{FIRST_MS}"], "BTCUSDTSWAP"),
    "folder": ("futures/cm/BTCUSDT-trades-2024-01-01.csv", {}, [f"1,5.0,1,5.0,{FIRST_MS},true"], "futures/cm"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRACTS)
def test_coin_margined_futures_are_refused_wherever_they_show(con: duckdb.DuckDBPyConnection, tmp_path: Path, case: str) -> None:
    name, arguments, lines, why = CONTRACTS[case]
    with pytest.raises(SchemaError, match=f"coin-margined futures or swaps by .*{why}.*contracts"):
        process_file(con, written(tmp_path, name, *lines), **arguments)
    assert con.execute("SELECT (SELECT count(*) FROM trades) + (SELECT count(*) FROM candles)").fetchone() == (0,)


def test_other_dated_contracts_are_not_coin_margined(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    file = written(tmp_path, "BTCUSDT_240927-trades-2024-01-01.csv", "id,price,qty,quote_qty,time,is_buyer_maker", f"1,5.0,1,5.0,{FIRST_MS},true")
    found = process_file(con, file)
    assert (found.symbol, found.market, found.rows) == ("BTCUSDT_240927", "um", 1)


# --- amounts in quote currency ------------------------------------------------------------------------------------------------------------

WRONG_TRADES = {  # quote_qty at price 100 and quantity 1
    "huge": "9000000000.0", "cents": "10000", "thousands": "0.1", "zero": "0", "the quantity again": "1.0", "a base amount": "0.002", "1 % off": "101",
}  # fmt: skip


@pytest.mark.parametrize("unit", WRONG_TRADES)
def test_a_quote_amount_unlike_price_times_quantity_is_not_stored(con: duckdb.DuckDBPyConnection, tmp_path: Path, unit: str) -> None:
    wrong = [f"{i},100.0,1.0,{WRONG_TRADES[unit]},{FIRST_MS + 20_000 * i},true,true" for i in range(30)]
    with pytest.raises(SchemaError, match=r"30 of 30 .*quote_qty is not price × qty: one of them has another unit"):
        process_file(con, written(tmp_path, f"ABCUSDT-{DAY}.csv", *wrong))
    assert con.execute("SELECT count(*) FROM trades").fetchone() == (0,)
    right = [f"{i},100.0,1.0,100.0,{FIRST_MS + 20_000 * i},true,true" for i in range(30)]
    result = process_file(con, written(tmp_path, f"ABCUSDT-{DAY}.csv", *right[:7], wrong[7], *right[8:]), max_rejected=0.1)
    assert (result.rows, result.rejected) == (29, 1)
    assert con.execute("SELECT line, reason FROM quarantine").fetchall() == [(8, "quote_qty is not price × qty: one of them has another unit")]


ROUNDED = [  # price, quantity, quote amount as exchanges round it
    ("61837.63", "0.02", "1236.7526"), ("0.00000001", "0.3", "0"), ("0.00000001", "0.3", "0.00000000"), ("1.2345", "0.01", "0.01"), ("68402.6", "0.024", "1641.66"),
    ("0.00065379", "153", "0.10002987"), ("99999.99", "0.00001", "0.9999999"), ("1e-8", "1e15", "1e7"), ("3000000", "0.00000333", "10"),
]  # fmt: skip


def test_rounded_quote_amounts_are_stored(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    rows = [f"{i},{price},{qty},{quote},{FIRST_MS + i},true,true" for i, (price, qty, quote) in enumerate(ROUNDED[:-2] + ROUNDED[-1:])]
    result = process_file(con, written(tmp_path, f"ABCUSDT-{DAY}.csv", *rows))
    assert (result.rows, result.rejected) == (len(rows), 0)


WRONG_CANDLES = {"huge": ("60.0", "9e9"), "base amount": ("4000", "8.0"), "above": ("60.0", "6067"), "below": ("60.0", "5933"), "zero": ("60.0", "0"), "no volume": ("0", "6000")}


@pytest.mark.parametrize("unit", WRONG_CANDLES)
def test_a_candle_whose_quote_volume_its_prices_exclude_is_not_stored(con: duckdb.DuckDBPyConnection, tmp_path: Path, unit: str) -> None:
    def candles(volume: str, quote: str) -> list[str]:
        return [f"{t},100,101,99,100.5,{volume},{t + 3_599_999},{quote},5,0,0,0" for t in range(FIRST_MS, FIRST_MS + 86_400_000, 3_600_000)]

    with pytest.raises(SchemaError, match="quote_volume is not between low and high × volume: one of them has another unit"):
        process_file(con, written(tmp_path, "ABCUSDT-1h-2024-01-01.csv", *candles(*WRONG_CANDLES[unit])))
    assert con.execute("SELECT count(*) FROM candles").fetchone() == (0,)
    for i, (volume, quote) in enumerate([("60.0", "6060.01"), ("0.01", "1"), ("0", "0"), ("60.0", "5939.99")]):
        assert process_file(con, written(tmp_path, f"A{i}CUSDT-1h-2024-01-01.csv", *candles(volume, quote))).rows == 24


# --- length of candles --------------------------------------------------------------------------------------------------------------------

HOUR_MS = 3_600_000


def hours(n: int, close: bool, step: int = HOUR_MS, unit: int = 1) -> list[str]:
    times = [FIRST_MS + step * i for i in range(n)]
    long = [f"{t * unit},100,101,99,100.5,60.0,{(t + step) * unit - 1},6000.0,5,4.0,400.0,0" for t in times]
    return long if close else [line[: line.index(",60.0") + 5] for line in long]


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("unit", [1, 1000])
@pytest.mark.parametrize("wrong", ["1m", "30m", "2h", "1d"])
def test_candles_of_another_length_are_refused(tmp_path: Path, close: bool, unit: int, wrong: str) -> None:
    for name, arguments in (("ABCUSDT-candles.csv", {"symbol": "ABCUSDT", "kind": "candles", "interval": wrong}), (f"ABCUSDT-{wrong}-2024.csv", {})):
        file = written(tmp_path, name, *hours(24, close, unit=unit))
        with pytest.raises(SchemaError, match=rf"candles of {wrong}, as (asked for|in its name); found 1h from .*--interval 1h"):
            inspect_file(file, **arguments)
        assert inspect_file(file, **arguments | {"interval": "1h"}).interval == "1h"
    backwards = written(tmp_path, "ABCUSDT-candles.csv", *reversed(hours(24, close, unit=unit)))
    with pytest.raises(SchemaError, match="found 1h from"):
        inspect_file(backwards, symbol="ABCUSDT", interval=wrong)


@pytest.mark.parametrize("step", [(60_000, "1m"), (900_000, "15m"), (86_400_000, "1d"), (604_800_000, "1w"), (43_200_000, "12h")])
@pytest.mark.parametrize("close", [True, False])
def test_the_content_states_the_length_where_nothing_else_does(tmp_path: Path, step: tuple[int, str], close: bool) -> None:
    assert inspect_file(written(tmp_path, "dump.csv", *hours(24, close, step[0])), symbol="ABCUSDT").interval == step[1]


def test_candles_with_silent_minutes_are_still_minutes(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    silent = [line for i, line in enumerate(hours(60, False, 60_000)) if i % 2 == 0 or i == 1]
    assert process_file(con, written(tmp_path, "ABCUSDT-1m-2024-01-01.csv", *silent)).rows == 31


def test_one_candle_that_lasts_too_long_is_not_stored(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    rows = hours(24, True)
    rows[3] = rows[3].replace(str(FIRST_MS + 4 * HOUR_MS - 1), str(FIRST_MS + 5 * HOUR_MS - 1))
    rows[7] = rows[7].replace(str(FIRST_MS + 8 * HOUR_MS - 1), str(FIRST_MS + 8 * HOUR_MS - 900_000))  # trading was halted
    result = process_file(con, written(tmp_path, "ABCUSDT-1h-2024-01-01.csv", *rows), max_rejected=0.1)
    assert (result.rows, result.rejected) == (23, 1)
    assert con.execute("SELECT line, reason FROM quarantine").fetchall() == [(4, "close_time is not within 1h after ts")]


# --- one spelling on every path ------------------------------------------------------------------------------------------------------------

SPELLINGS = ["btcusdt", "BTC/USDT\n", " BTCUSDT ", "BTCUSDT\n", "BTC/USDT", "BTC-USDT", "btc_usdt"]


def test_every_path_reads_a_symbol_in_the_same_way(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    for spelling in SPELLINGS:
        assert RunConfig(spelling).symbol == plain_symbol(f"BINANCE:{spelling.strip()}") == "BTCUSDT"
        assert archive_name(spelling, date(2024, 1, 1)).endswith("/BTCUSDT-trades-2024-01-01.zip")
        assert symbol_prefix(spelling) == "btcusdt"
    spellings = SPELLINGS[: examples(2, len(SPELLINGS))]
    edges = [180 * i // len(spellings) for i in range(len(spellings) + 1)]
    rows = [f"{i},100,1,{FIRST_MS + 60_000 * i}" for i in range(181)]
    for i, spelling in enumerate(spellings):
        part = rows[edges[i] : edges[i + 1] + 1]
        assert process_file(con, written(tmp_path, f"{i}.csv", "trade_id,price,qty,time", *part), symbol=spelling).symbol == "BTCUSDT"
    assert con.execute("SELECT symbol, count(*) FROM trades GROUP BY 1").fetchall() == [("BTCUSDT", 181)]
    for spelling in spellings:
        assert make_bars(con, spelling, "1h") == 3 and make_bars(con, spelling, "tick:60") == 3
        assert set(read_bars(con, spelling, "1h")["symbol"]) == set(read_event_bars(con, spelling, "tick:60")["symbol"]) == {"BTCUSDT"}
        assert len(bars_page(con, spelling, "1h")[0]) == len(features_page(con, spelling, "1h", names=["ret_1"])[0]) == 3
        assert len(read_predictions(con, symbol=spelling)[0]) == 0
        assert list(status(con, spelling)["symbol"]) == ["BTCUSDT"] and len(happened(con, spelling)) == len(spellings)
        ReplayServer(con, spelling)
        FinnhubWebSocket(spelling, token="none", con=con)
    with pytest.raises(SchemaError, match="Did you mean BTCUSDT"):
        read_bars(con, "BTC USDT", "1h")


def test_a_later_version_of_a_file_replaces_the_first_whatever_the_letters(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    for price, symbol in enumerate(("ABCUSDT", "币安人生USDT", "ÄÖUSDT"), 1):
        for version, ids in (("v1", (1, 2, 3, 4, 5)), ("v2", (1, 2, 4, 5, 6))):
            rows = [f"{i},{price},1.0,{price},{FIRST_MS + 1000 * i},true,true" for i in ids]
            process_file(con, written(tmp_path / version, f"{symbol}-{DAY}.csv", *rows))
        stored = con.execute("SELECT list(trade_id ORDER BY trade_id) FROM trades WHERE symbol = ?", [symbol]).fetchall()
        holes = con.execute("SELECT kind, first_missing_id, last_missing_id FROM gaps WHERE symbol = ?", [symbol]).fetchall()
        events = con.execute("SELECT event FROM data_log WHERE symbol = ?", [symbol]).fetchall()
        assert (symbol, stored, holes, events) == (symbol, [([1, 2, 4, 5, 6],)], [("id", 3, 3)], [("replaced",)])


# --- sums of tiny amounts -----------------------------------------------------------------------------------------------------------------

TINY = [  # price, quantity, number of trades: 120 trades of 2.5e-9 and others
    ("0.000000025", "0.1", 120), ("0.00000001", "0.00000001", 120), ("0.00012345", "1.2345", 120), ("0.00000123", "0.00000137", 700), ("61837.63", "0.00000001", 90),
    ("0.000000000123", "45678.9", 50), ("1.000000001", "1", 120),
]  # fmt: skip


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("stated", [True, False])
def test_tiny_amounts_add_up(con: duckdb.DuckDBPyConnection, tmp_path: Path, case: tuple[str, str, int], stated: bool) -> None:
    price, qty, n = case
    each = Decimal(price) * Decimal(qty)
    quote = f",{each:f}" if stated else ""
    rows = [f"{i},{price},{qty}{quote},{FIRST_MS + 1000 * i},{str(i % 2 == 0).lower()}" for i in range(n)]
    rows.append(f"{n},{price},{qty}{quote},{FIRST_MS + 3_600_000},true")
    process_file(con, written(tmp_path, "dust.csv", f"id,price,qty{',quote_qty' * stated},time,is_buyer_maker", *rows), symbol="ABCUSDT")
    for spec in ("1m", "1h"):
        make_bars(con, "ABCUSDT", spec, source="um.trades" if stated else None)
        bars = read_bars(con, "ABCUSDT", spec, source="um.trades" if stated else None).head(60 if spec == "1m" else 1)
        assert bars["quote_volume"].sum() == pytest.approx(float(n * each), rel=1e-14)
        assert bars["volume"].sum() == pytest.approx(float(n * Decimal(qty)), rel=1e-14)
        assert bars["buy_volume"].sum() == pytest.approx(float(n // 2 * Decimal(qty)), rel=1e-14)
        traded = bars[bars["volume"] > 0]
        assert traded["vwap"].to_numpy() == pytest.approx(float(price), rel=1e-14)
    if n % 4 == 0:
        events = event_bars(read_trades(con, "ABCUSDT").head(n), f"dollar:{n * each / 4:f}")
        assert len(events) == 4 and events["quote_volume"].to_numpy() == pytest.approx(float(n * each / 4), rel=1e-14)


# --- where files are found ------------------------------------------------------------------------------------------------------------------

ONE = f"1,100.0,1.0,100.0,{FIRST_MS},true,true"


def test_folders_may_have_backslashes_and_brackets(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    file = written(tmp_path / "a\\b [x]" / "c*", f"BTCUSDT-{DAY}.csv", ONE)
    for what in (file, f"{Path(file).parent}/*.csv", str(Path(file).parent), f"{tmp_path}/**/*.csv", f"{tmp_path}/a*/c*/BTC*"):
        assert find_files(what) == [file]
    assert process_file(con, file).rows == 1
    with pytest.raises(ConfigError, match="without a backslash"):
        init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "st\\ore" / "catalog.sqlite")))


def test_objects_may_have_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    there = pd.DataFrame({"uri": ["s3://b/a[1]/x.csv", "s3://b/a[1]/y[2].csv", "s3://b/a1/z.csv"]})
    monkeypatch.setattr("cryptoresearch.ingest.folders.list_objects", lambda settings, uri: there[there.uri.str.startswith(uri)])
    settings = Settings(_env_file=None)
    assert find_files("s3://b/a[1]/y[2].csv", settings) == ["s3://b/a[1]/y[2].csv"]
    assert find_files("s3://b/a[1]/", settings) == ["s3://b/a[1]/x.csv", "s3://b/a[1]/y[2].csv"]
    assert find_files("s3://b/a[0-9]/*.csv", settings) == ["s3://b/a1/z.csv"]


def test_a_folder_load_leaves_the_store_alone(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    file = written(tmp_path, f"BTCUSDT-{DAY}.csv", ONE)
    assert list(process_files(con, file).outcome) == ["loaded"]
    assert list((tmp_path / "store").rglob("*.parquet"))
    assert list(process_files(con, tmp_path).file) == [file]
    with pytest.raises(DataNotFound, match="only the store's own files"):
        process_files(con, tmp_path / "store")


def test_a_missing_file_lists_only_files_of_data(tmp_path: Path) -> None:
    written(tmp_path, "secrets.txt", "x")
    with pytest.raises(DataNotFound, match="there is no such file"):
        find_files(tmp_path / "nope.csv")
    written(tmp_path, "nope2.csv", ONE)
    with pytest.raises(DataNotFound, match=r"there is \S+nope2\.csv\. Correct"):
        find_files(tmp_path / "nope.csv")


@pytest.mark.parametrize(("status", "code"), [(403, "UnknownKey"), (401, ""), (403, "AccessDenied"), (403, "InvalidAccessKeyId")])
def test_a_refused_key_is_explained_as_credentials(status: int, code: str) -> None:
    answer = type("Answer", (), {"status": status})()
    settings = Settings(_env_file=None, minio_endpoint="127.0.0.1:9000")
    for error in (S3Error(answer, code, "", "", "", ""), InvalidResponseError(status, "text/html", ""), ServerError("", status)):
        assert str(_explained(error, settings, "btc")).startswith("credentials: ")
    assert str(_explained(ServerError("", 500), settings, "btc")).startswith("endpoint: ")


def test_candles_off_their_grid_after_a_maintenance_are_gaps(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    "The candles of BTCUSDT-1h-2018-02: an outage from 8 February, 00:28, then candles from 09:28:14.789 on, then whole hours again."
    month, hour = range(1_517_443_200_000, 1_519_862_400_000, HOUR_MS), HOUR_MS - 1
    before, off, after = [t for t in month if t <= 1_518_048_000_000], range(1_518_168_494_789, 1_518_319_694_790, HOUR_MS), [t for t in month if t >= 1_518_321_600_000]
    ends = {1_518_048_000_000: 1_518_049_694_788, 1_518_319_694_789: 1_518_321_600_999}
    rows = [f"{t},100,101,99,100.5,60.0,{ends.get(t, t + hour)},6000.0,5,4.0,400.0,0" for t in (*before, *off, *after)]
    result = process_file(con, written(tmp_path, "BTCUSDT-1h-2018-02.csv", *rows))
    assert (result.rows, result.rejected, result.gaps) == (len(before) + len(after), len(off), 1)
    make_bars(con, "BTCUSDT", "1h")
    bars = read_bars(con, "BTCUSDT", "1h")
    assert bars.index[bars["gap"]].tolist() == list(pd.date_range("2018-02-08 01:00", "2018-02-11 03:00", freq="h", tz="UTC", unit="us"))
    shifted = [f"{t + 1_694_789},100,101,99,100.5,60.0,{t + 1_694_789 + hour},6000.0,5,4.0,400.0,0" for t in month]
    with pytest.raises(SchemaError, match="ts is not the open of a 1h candle"):
        process_file(con, written(tmp_path, "ETHUSDT-1h-2018-02.csv", *shifted))


@pytest.mark.parametrize("days", [28, pytest.param(7, marks=pytest.mark.heavy)])
def test_a_month_that_is_cut_short_says_so_and_its_days_are_taken(con: duckdb.DuckDBPyConnection, tmp_path: Path, days: int) -> None:
    rows = [f"{i},100.0,1.0,100.0,{FIRST_MS + HOUR_MS * i},true,true" for i in range(31 * 24)]
    month = written(tmp_path, "BTCUSDT-trades-2024-01.csv", *rows[: days * 24])
    assert f"only {days} of the 31 days of its month: if there was trading, load its daily files too" in repr(process_file(con, month))
    for day in range(max(0, days - 7), 31):
        result = process_file(con, written(tmp_path, f"BTCUSDT-trades-2024-01-{day + 1:02}.csv", *rows[24 * day : 24 * day + 24]))
        assert result.rows == (0 if day < days else 24) and "only" not in repr(result)
    assert con.execute("SELECT count(*), count(DISTINCT trade_id) FROM trades").fetchone() == (744, 744)
    make_bars(con, "BTCUSDT", "1h")
    assert not read_bars(con, "BTCUSDT", "1h")["gap"].any()


@pytest.mark.parametrize("text", ["FEHLER:  doppelter Schlüsselwert verletzt Unique-Constraint »ducklake_snapshot_pkey«", "ERREUR (SQLSTATE 40001)", "SQLSTATE: 40P01"])
def test_a_conflict_is_known_in_every_language(text: str) -> None:
    assert _is_conflict(duckdb.Error(text)) and not _is_conflict(duckdb.Error("FEHLER:  Relation »x« existiert nicht (SQLSTATE 42P01)"))
