"""Files of other exchanges and programs, and frames in memory: each layout is loaded with the right times, prices, sides and ids."""

import gzip
import json
import zipfile
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from conftest import NewStore

import cryptoresearch
from cryptoresearch import ingest_frame
from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.status import read_trades
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import SchemaError
from cryptoresearch.ingest.files import process_file
from cryptoresearch.ingest.folders import process_files

T = 1_704_067_200  # 2024-01-01, s
STAMP = "2024-01-01T00:00:0{}.250000Z"


# three trades, at .25 s of the seconds 0, 1 and 2: bought 0.5 at 100, sold 1.5 at 101, bought 2.0 at 99
SIDES, PRICES, SIZES = ("buy", "sell", "buy"), ("100.0", "101.0", "99.0"), ("0.5", "1.5", "2.0")
MAKER = {"buy": "sell", "sell": "buy"}


def lines(header: str, row: str, maker: bool = False, newest_first: bool = False, separator: str = ",") -> str:
    sides = [MAKER[s] if maker else s for s in SIDES]
    rows = [row.format(i=i + 7, s=T + i, side=side, Side=side.title(), b=side[0], n=int(side == "sell"), p=p, q=q, v=float(p) * float(q), iso=STAMP.format(i))
            for i, (side, p, q) in enumerate(zip(sides, PRICES, SIZES, strict=True))]  # fmt: skip
    return "".join(line.replace(",", separator) + "\n" for line in ([header] if header else []) + (rows[::-1] if newest_first else rows))


TRADES = {  # file, text, arguments; source, whether sides and ids are stated
    "Tardis": ("a.csv", lines("exchange,symbol,timestamp,local_timestamp,id,side,price,amount", "coinbase,BTC-USDT,{s}250000,{s}260000,{i},{side},{p},{q}"), {}, "COINBASE:BTCUSDT trades", True, True),
    "Tardis with ids that are no numbers": ("a.csv", lines("exchange,symbol,timestamp,local_timestamp,id,side,price,amount", "bitfinex,btcusdt,{s}250000,{s}260000,x-{i},{side},{p},{q}"), {}, "BITFINEX:BTCUSDT trades", True, False),
    "Tardis, Binance": ("a.csv", lines("exchange,symbol,timestamp,local_timestamp,id,side,price,amount", "binance,btcusdt,{s}250000,{s}260000,{i},{side},{p},{q}"), {}, "trades", True, True),
    "Kraken with ids": ("a.csv", lines("price,volume,time,side,type,misc,trade_id", "{p},{q},{s}.25,{b},m,,{i}"), {"symbol": "BTCUSDT"}, "KRAKEN:BTCUSDT trades", True, True),
    "Kraken without ids": ("XBTUSD.csv", lines("", "{s}.25,{p},{q}"), {"symbol": "BTCUSDT"}, "trades", False, False),
    "Coinbase": ("a.csv", lines("time,trade_id,side,size,price", "{iso},{i},{side},{q},{p}", maker=True), {"symbol": "BTCUSDT"}, "COINBASE:BTCUSDT trades", True, True),
    "Bybit": ("BTCUSDT2024-01-01.csv", lines("timestamp,symbol,side,size,price,tickDirection,trdMatchID,grossValue,homeNotional,foreignNotional", "{s}.25,BTCUSDT,{Side},{q},{p},ZeroPlusTick,ab-{i},1e9,{q},{v}", newest_first=True), {}, "BYBIT:BTCUSDT um.trades", True, False),
    "Bybit spot": ("BTCUSDT_2024-01-01.csv", lines("id,timestamp,price,volume,side", "{i},{s}250,{p},{q},{side}"), {"symbol": "BTCUSDT"}, "BYBIT:BTCUSDT trades", True, True),
    "OKX": ("BTC-USDT-trades-2024-01-01.csv", lines("instrument_name,trade_id,side,price,size,created_time", "BTC-USDT,{i},{side},{p},{q},{s}250"), {}, "OKX:BTCUSDT trades", True, True),
    "Bitstamp": ("a.csv", lines("date,tid,price,type,amount", "{s}.25,{i},{p},{n},{q}"), {"symbol": "BTCUSDT"}, "BITSTAMP:BTCUSDT trades", True, True),
    "freqtrade": ("BTC_USDT-trades.csv", lines("timestamp,id,type,side,price,amount,cost", "{s}250,{i},,{side},{p},{q},{v}"), {}, "trades", True, True),
    "semicolons": ("a.csv", lines("time,id,price,qty,side", "{iso},{i},{p},{q},{side}", separator=";"), {"symbol": "BTCUSDT"}, "trades", True, True),
    "tabs": ("a.tsv", lines("time,id,price,qty,side", "{iso},{i},{p},{q},{side}", separator="\t"), {"symbol": "BTCUSDT"}, "trades", True, True),
    "no ids": ("a.csv", lines("time,price,qty", "{iso},{p},{q}"), {"symbol": "BTCUSDT"}, "trades", False, False),
    "own names": ("a.csv", lines("When,Last,Lot", "{iso},{p},{q}"), {"symbol": "BTCUSDT", "kind": "trades", "columns": {"When": "ts", "Last": "price", "Lot": "qty"}}, "trades", False, False),
}  # fmt: skip


def check_trades(con: duckdb.DuckDBPyConnection, series: str, sides: bool, ids: bool) -> None:
    symbol, source = series.split() if " " in series else ("BTCUSDT", series)
    rows = con.execute("SELECT symbol, source, epoch_ms(ts), price, qty, side_reported, trade_id FROM trades ORDER BY ts").fetchall()
    first = 7 if ids else (T * 1000 + 250) * 1000
    assert rows == [
        (symbol, source, (T + i) * 1000 + 250, float(p), float(q), ((1 if side == "buy" else -1) if sides else None), first + i)
        for i, (side, p, q) in enumerate(zip(SIDES, PRICES, SIZES, strict=True))
    ]


PACKED = ("Tardis", "Kraken without ids", "tabs")  # with a header, without one, with other separators; the others with --heavy
FORMS = [pytest.param(name, end, marks=[] if not end or name in PACKED else pytest.mark.heavy) for end in ("", ".gz", ".zst") for name in TRADES]


@pytest.mark.parametrize(("layout", "packed"), FORMS)
def test_trades_of_every_source(con: duckdb.DuckDBPyConnection, tmp_path: Path, layout: str, packed: str) -> None:
    name, text, arguments, source, sides, ids = TRADES[layout]
    file, data = tmp_path / (name + packed), text.encode()
    file.write_bytes({"": data, ".gz": gzip.compress(data), ".zst": bytes(pa.compress(data, "zstd", asbytes=True))}[packed])
    result = process_file(con, file, **arguments)
    assert (result.rows, result.rejected, result.gaps) == (3, 0, 0)
    check_trades(con, source, sides, ids)
    assert process_file(con, file, **arguments).already_loaded


def candles(header: str, row: str, unit: int = 1, newest_first: bool = False, separator: str = ",") -> str:
    rows = [row.format(t=(T + 3600 * i) * unit, iso=f"2024-01-01 {i:02}:00:00") for i in range(24)]
    return "".join(line.replace(",", separator) + "\n" for line in [*header.split("\n"), *(rows[::-1] if newest_first else rows)] if line)


CDD = "https://www.CryptoDataDownload.com\n"
CANDLES = {  # open 100, high 103, low 99, close 101, volume 4
    "CryptoDataDownload": ("a.csv", candles(CDD + "unix,date,symbol,open,high,low,close,Volume BTC,Volume USDT", "{t},{iso},BTC/USDT,100,103,99,101,4,402", newest_first=True), {}),
    "CryptoDataDownload, ms": ("a.csv", candles(CDD + "Unix,Date,Symbol,Open,High,Low,Close,Volume USDT,Volume BTC,tradecount", "{t},{iso},BTCUSDT,100,103,99,101,402,4,7", 1000), {}),
    "Kraken": ("XBTUSD_60.csv", candles("", "{t},100,103,99,101,4,7"), {"symbol": "BTCUSDT"}),
    "Coinbase": ("a.csv", candles("time,low,high,open,close,volume", "{t},99,103,100,101,4"), {"symbol": "BTCUSDT"}),
    "Bitstamp": ("a.csv", candles("Timestamp,Open,High,Low,Close,Volume", "{t},100,103,99,101,4"), {"symbol": "BTCUSDT"}),
    "semicolons": ("a.csv", candles("date,open,high,low,close,volume", "{iso},100,103,99,101,4", separator=";"), {"symbol": "BTCUSDT"}),
    "own names": ("a.csv", candles("Zeit,O,H,L,C,V", "{iso},100,103,99,101,4"), {"symbol": "BTCUSDT", "kind": "candles", "columns": {"Zeit": "ts", "O": "open", "H": "high", "L": "low", "C": "close", "V": "volume"}}),
}  # fmt: skip
VALUES = [[(T + 3600 * i) * 1000, 100.0, 103.0, 99.0, 101.0, 4.0] for i in range(24)]


def check_candles(con: duckdb.DuckDBPyConnection) -> None:
    rows = con.execute("SELECT symbol, interval, epoch_ms(ts), open, high, low, close, volume FROM candles ORDER BY ts").fetchall()
    assert rows == [("BTCUSDT", "1h", *row) for row in VALUES]


@pytest.mark.parametrize("layout", CANDLES)
def test_candles_of_every_source(con: duckdb.DuckDBPyConnection, tmp_path: Path, layout: str) -> None:
    name, text, arguments = CANDLES[layout]
    (tmp_path / name).write_text(text)
    result = process_file(con, tmp_path / name, **arguments)
    assert (result.rows, result.rejected, result.interval) == (24, 0, "1h")
    check_candles(con)
    if "Crypto" in layout:
        assert con.execute("SELECT DISTINCT quote_volume FROM candles").fetchall() == [(402.0,)]


def test_lists_and_feather_of_ccxt_and_freqtrade(tmp_path: Path, new_store: NewStore) -> None:
    frame = pd.DataFrame(VALUES, columns=["date", "open", "high", "low", "close", "volume"]).assign(date=lambda d: pd.to_datetime(d["date"], unit="ms", utc=True))
    trades = [[T * 1000 + 250 + 1000 * i, str(7 + i), None, side, float(p), float(q), float(p) * float(q)] for i, (side, p, q) in enumerate(zip(SIDES, PRICES, SIZES, strict=True))]
    names = ["timestamp", "id", "type", "side", "price", "amount", "cost"]
    files = {
        "BTC_USDT-1h.json": lambda f: f.write_text(json.dumps(VALUES)),
        "BTC_USDT-1h-coinbase.json": lambda f: f.write_text(json.dumps([[t // 1000, low, high, o, c, v] for t, o, high, low, c, v in VALUES[::-1]])),
        "BTC_USDT-1h.feather": frame.to_feather,
        "BTC_USDT-1h.parquet": frame.to_parquet,
        "BTC_USDT-trades.json": lambda f: f.write_text(json.dumps(trades)),
        "BTC_USDT-trades.json.gz": lambda f: f.write_bytes(gzip.compress(json.dumps(trades).encode())),
        "BTC_USDT-trades.feather": pd.DataFrame(trades, columns=names).to_feather,
        "BTC_USDT-trades.parquet": pd.DataFrame(trades, columns=names).to_parquet,
        "ccxt.json": lambda f: f.write_text(json.dumps([dict(zip(names, t, strict=True)) | {"symbol": "BTC/USDT", "datetime": "x", "info": {}, "fee": None} for t in trades])),
    }  # fmt: skip
    for name, write in files.items():
        write(tmp_path / name)
        with init_duckdb(new_store(tmp_path / name.replace(".", "-"))) as con:
            result = process_file(con, tmp_path / name)
            assert (name, result.rows, result.rejected) == (name, 24 if "1h" in name else 3, 0)
            check_candles(con) if "1h" in name else check_trades(con, "trades", True, True)


UNKNOWN = {
    "When,Last,Lot\n2024-01-01,100,1\n": r"found When, Last, Lot: missing time, price, qty.* --kind trades --columns When=time,Last=price,Lot=qty",
    "time;Last;qty\n2024-01-01;100;1\n": r"found time, Last, qty: missing price\. .* --kind trades --columns Last=price",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_an_unknown_layout_prints_the_command_that_loads_it(con: duckdb.DuckDBPyConnection, tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(SchemaError, match=UNKNOWN[text]) as told:
        process_file(con, tmp_path / "a.csv", symbol="BTCUSDT", kind="trades")
    pairs = str(told.value).split("--columns ")[1].split(";")[0].split(", or")[0].split(" ")[0]
    columns = dict(pair.split("=") for pair in pairs.split(","))
    assert process_file(con, tmp_path / "a.csv", symbol="BTCUSDT", kind="trades", columns=columns).rows == 1


@pytest.mark.parametrize("content", ['{"error": "no such file"}', "[]", "[1, 2]", '[{"a": 1}]', "[[1, 2]]", "{", "[[1704067200, 1, 2, 3, 4, 5]]"])
def test_other_json_is_refused(con: duckdb.DuckDBPyConnection, tmp_path: Path, content: str) -> None:
    (tmp_path / "BTCUSDT-1h.json").write_text(content)
    with pytest.raises(SchemaError, match="expected"):
        process_file(con, tmp_path / "BTCUSDT-1h.json")


def test_contracts_of_other_exchanges_are_refused(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TRADES["Tardis"][1].replace("coinbase,BTC-USDT", "bitmex,XBTUSD"))
    with pytest.raises(SchemaError, match=r"base currency; found bitmex\. Convert contracts"):
        process_file(con, tmp_path / "a.csv")


# --- frames in memory ---------------------------------------------------------------------------------------------------------------------

FRAME = pd.DataFrame({"time": pd.to_datetime([T * 1000 + 250 + 1000 * i for i in range(3)], unit="ms", utc=True), "price": [100.0, 101.0, 99.0], "qty": [0.5, 1.5, 2.0], "side": SIDES})
KINDS = {
    "pandas": lambda d: d, "polars": pl.from_pandas, "arrow": lambda d: pa.Table.from_pandas(d, preserve_index=False), "index": lambda d: d.set_index("time"),
    "reversed": lambda d: d[::-1], "naive": lambda d: d.assign(time=d["time"].dt.tz_localize(None)), "seconds": lambda d: d.assign(time=d["time"].astype("int64") / 1e9),
    "nanoseconds": lambda d: d.assign(time=d["time"].dt.as_unit("ns").astype("int64")), "text": lambda d: d.assign(time=d["time"].astype(str)),
    "another zone": lambda d: d.assign(time=d["time"].dt.tz_convert("Asia/Tokyo")), "categories": lambda d: d.assign(side=d["side"].astype("category")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_of_trades(con: duckdb.DuckDBPyConnection, kind: str) -> None:
    frame = KINDS[kind](FRAME)
    result = ingest_frame(con, frame, symbol="btc/usdt", kind="trades")
    assert (result.symbol, result.rows, result.rejected) == ("BTCUSDT", 3, 0)
    check_trades(con, "trades", True, False)
    assert con.execute("SELECT uri FROM ingest_ledger").fetchall() == [("frame-BTCUSDT",)]
    assert ingest_frame(con, frame, symbol="BTCUSDT", kind="trades").already_loaded
    assert len(read_trades(con, "BTCUSDT")) == 3


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow"])
def test_a_frame_of_candles(con: duckdb.DuckDBPyConnection, kind: str) -> None:
    frame = pd.DataFrame(VALUES, columns=["When", "Open", "High", "Low", "Close", "Lots"])
    result = ingest_frame(con, KINDS[kind](frame), symbol="BTCUSDT", kind="candles", columns={"When": "ts", "Lots": "volume"})
    assert (result.rows, result.interval) == (24, "1h")
    check_candles(con)
    make_bars(con, "BTCUSDT", "2h")
    assert len(read_bars(con, "BTCUSDT", "2h")) == 12


def test_frames_that_cannot_be_loaded_say_why(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(SchemaError, match=r"missing qty\. .*--columns Lot=qty"):
        ingest_frame(con, FRAME.rename(columns={"qty": "Lot"}), symbol="BTCUSDT", kind="trades")
    with pytest.raises(SchemaError, match="found list"):
        ingest_frame(con, [[1, 2]], symbol="BTCUSDT", kind="trades")
    with pytest.raises(SchemaError, match="symbol"):
        ingest_frame(con, FRAME, kind="trades")
    with pytest.raises(SchemaError, match=r"3 of 3 .*a value is missing"):
        ingest_frame(con, FRAME.assign(price=float("nan")), symbol="BTCUSDT", kind="trades")
    with pytest.raises(SchemaError, match="one column of each meaning; found qty and amount"):
        ingest_frame(con, FRAME.assign(amount=1.0), symbol="BTCUSDT", kind="trades")
    assert "ingest_frame" in cryptoresearch.__all__


def test_trades_without_ids_are_not_counted_twice(con: duckdb.DuckDBPyConnection) -> None:
    n = 3000
    whole = pd.DataFrame({"time": pd.to_datetime([T * 1000 + 1000 * i for i in range(n)], unit="ms", utc=True), "price": 100.0, "qty": [1.0 + i for i in range(n)]})
    first = ingest_frame(con, whole[:1000], symbol="BTCUSDT", kind="trades")
    longer = ingest_frame(con, whole[:2000], symbol="BTCUSDT", kind="trades")
    assert (first.rows, longer.rows, longer.duplicates) == (1000, 1000, 1000)
    for part in (whole[500:2500], whole[1500:1600]):
        with pytest.raises(SchemaError, match="Without ids none can be compared"):
            ingest_frame(con, part, symbol="BTCUSDT", kind="trades")
    assert ingest_frame(con, whole[2000:], symbol="BTCUSDT", kind="trades").rows == 1000
    assert con.execute("SELECT count(*), count(DISTINCT qty), bool_and(trade_id > 0) FROM trades").fetchone() == (n, n, True)


def test_a_folder_of_a_trading_program_is_loaded_in_one_call(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    folder = tmp_path / "freqtrade"
    folder.mkdir()
    for name, length in (("BTC", 24), ("ETH", 23)):
        pd.DataFrame(VALUES[:length], columns=["date", "open", "high", "low", "close", "volume"]).to_feather(folder / f"{name}_USDT-1h.feather")
    found = process_files(con, folder)
    assert list(found.outcome) == ["loaded"] * 2
    assert con.execute("SELECT DISTINCT symbol FROM candles ORDER BY 1").fetchall() == [("BTCUSDT",), ("ETHUSDT",)]


def test_bars_of_two_exchanges_are_never_mixed(con: duckdb.DuckDBPyConnection) -> None:
    for source, price, start in (("trades", 100.0, 0), ("kraken.trades", 101.0, 7200), ("um.bybit.trades", 102.0, 7200)):
        times = pd.to_datetime([(T + start + 60 * i) * 1000 for i in range(121)], unit="ms", utc=True)
        frame = pd.DataFrame({"time": times, "price": price, "qty": 1.0})
        ingest_frame(con, frame, symbol="BTCUSDT", kind="trades", source=source, market="um" if source.startswith("um") else None)
    make_bars(con, "BTCUSDT", "1h")
    assert set(read_bars(con, "BTCUSDT", "1h")["close"].dropna()) == {100.0}
    assert set(read_bars(con, "BTCUSDT", "1h", source="kraken.trades")["close"].dropna()) == {101.0}
    assert set(read_bars(con, "BTCUSDT", "1h", market="um")["close"].dropna()) == {102.0}


def test_columns_of_no_known_kind_are_listed_with_a_command(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("foo,bar,baz\n2024-01-01,100,1\n")
    with pytest.raises(SchemaError, match=r"columns time, price, qty; found foo, bar, baz.* --kind trades --columns foo=time,bar=price,baz=qty.*--kind candles"):
        process_file(con, tmp_path / "a.csv", symbol="BTCUSDT")


def test_times_that_must_be_guessed_are_refused(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(SchemaError, match="found '01/02/2024 10:00'"):
        ingest_frame(con, FRAME.assign(time="01/02/2024 10:00"), symbol="BTCUSDT", kind="trades")
    some = FRAME.assign(time=["2024-01-01T00:00:00.25Z", "garbage", "2024-01-01T00:00:02.25Z"])
    result = ingest_frame(con, some, symbol="BTCUSDT", kind="trades", max_rejected=0.5)
    assert (result.rows, result.rejected) == (2, 1)
    assert con.execute("SELECT list(trade_id ORDER BY ts) FROM trades").fetchone() == ([(T * 1000 + 250) * 1000, (T * 1000 + 250) * 1000 + 1],)


def test_bytes_that_are_no_text_are_not_shown(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    file = tmp_path / "ETHUSDT-1h-2024-01.zip"
    file.write_bytes(np.random.default_rng(1).bytes(60_000))
    with pytest.raises(SchemaError) as told:
        process_file(con, file)
    assert str(told.value).isprintable() and file.name in str(told.value), str(told.value)


GERMAN = "Datum;open;high;low;close;volume\n" + "".join(f"2024-01-01 0{h}:00:00;1;2;1;2;{h + 1}\n" for h in range(6))


def test_named_columns_decide_the_kind(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    for name, text in (("a.csv", GERMAN), ("b.csv", GERMAN.replace(";", ",").replace(";1;", ";3;"))):
        (tmp_path / name).write_text(text)
        assert process_file(con, tmp_path / name, symbol=f"{name[0].upper()}USDT", columns={"Datum": "time"}).rows == 6
    (tmp_path / "c.csv").write_text("Wann,Kurs,qty\n2024-01-01 00:00:00,1,2\n")
    assert process_file(con, tmp_path / "c.csv", symbol="CUSDT", columns={"Wann": "time", "Kurs": "price"}).rows == 1


@pytest.mark.parametrize("separator", [";", ","])
def test_prices_of_candles_decide_what_an_unknown_header_lacks(con: duckdb.DuckDBPyConnection, tmp_path: Path, separator: str) -> None:
    (tmp_path / "a.csv").write_text(GERMAN.replace("volume", "Menge").replace(";", separator))
    for columns, pairs in (({}, "Datum=time,Menge=volume"), ({"Datum": "time"}, "Datum=time,Menge=volume")):
        with pytest.raises(SchemaError, match=f"--kind klines --columns {pairs}"):
            process_file(con, tmp_path / "a.csv", symbol="AUSDT", columns=columns)


def test_a_file_in_which_every_row_is_bad_says_how_times_are_written(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    header, row = "time,open,high,low,close,volume\n", "{},1,2,1,2,3\n"
    cases = {"04/10/2024 0{}:00": "2024-01-31 12:00:00", "2024-04-10 0{}:59:59": "those of opening", "2024-04-10 0{}:00:00,9": "--kind, --interval and --columns"}
    for time, told in cases.items():
        (tmp_path / "a.csv").write_text(header + "".join(row.format(time.format(h)) for h in range(6)))
        for most in (0.01, 1.0):
            with pytest.raises(SchemaError, match=told) as refused:
                process_file(con, tmp_path / "a.csv", symbol="AUSDT", kind="klines", interval="1h", max_rejected=most)
            assert "at most" not in str(refused.value) and "allow more" not in str(refused.value)


def test_the_same_bytes_under_another_symbol_blame_the_symbol_first(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    from cryptoresearch.ingest.files import forget_file

    (tmp_path / "a.csv").write_text(GERMAN.replace("Datum", "time"))
    process_file(con, tmp_path / "a.csv", symbol="ETHUSDT")
    with pytest.raises(SchemaError, match=r"load BTCUSDT/klines; found the same bytes loaded as ETHUSDT/klines\. Correct --symbol") as told:
        process_file(con, tmp_path / "a.csv", symbol="BTCUSDT")
    assert forget_file(con, str(told.value).split("cryptoresearch forget ")[1]) == 6
    assert process_file(con, tmp_path / "a.csv", symbol="BTCUSDT").rows == 6


@pytest.mark.parametrize(("text", "form"), [("csv", "gz"), ("csv", "zst"), ("json", "zip")])
def test_a_bomb_of_another_source_is_stopped_early(con: duckdb.DuckDBPyConnection, tmp_path: Path, text: str, form: str) -> None:
    head = b"[[1700000000000,1,2,0.5,1.5,10]" if text == "json" else lines("time,id,price,qty,side", "{iso},{i},{p},{q},{side}").encode()
    content, file = head + b"\n" * (90 << 20), tmp_path / f"a.{text}.{form}"
    if form == "gz":
        file.write_bytes(gzip.compress(content, 6))
    elif form == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("a", content)
    else:
        file.write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    with pytest.raises(SchemaError, match=r"at most 200 times as large as its archive; found (6|7|8|9)\d,\d{3},\d{3}|found [12]\d\d,\d{3},\d{3}"):
        process_file(con, file, symbol="AUSDT", kind="klines" if text == "json" else None, interval="1m" if text == "json" else None)
