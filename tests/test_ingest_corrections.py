"Corrected, repeated and impossible rows: what a later file changes, what never gets in, and what verification sees."
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from conftest import NewStore

from cryptoresearch.data.bars import read_bars, trades_to_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.ledger import DIGESTED, stored_digest
from cryptoresearch.data.event_bars import event_bars, make_event_bars, read_event_bars
from cryptoresearch.ingest.folders import process_files
from cryptoresearch.ingest.files import forget_file, process_file
from cryptoresearch.data.maintenance import verify
from cryptoresearch.data.status import coverage, gap_table, source_intervals, status
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.errors import SchemaError
from cryptoresearch.settings import Settings

BEGIN_MS, DAY_MS, MINUTE_MS = 1_704_067_200_000, 86_400_000, 60_000  # 2024-01-01
Con = duckdb.DuckDBPyConnection


def trades(first: int, last: int, start_ms: int = BEGIN_MS, step_ms: int = 1000) -> list[str]:
    "Return trades with the ids first, …, last; one per second."
    return [f"{i},{100 + i % 5}.00000000,1.00000000,{100 + i % 5}.00000000,{start_ms + i * step_ms},{i % 3 == 0},True" for i in range(first, last + 1)]


def candles(n: int) -> list[str]:
    return [f"{BEGIN_MS + i * MINUTE_MS},10,12,9,11,5.5,{BEGIN_MS + (i + 1) * MINUTE_MS - 1},60.5,42,2.5,27.5,0" for i in range(n)]


def put(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def changed(line: str, column: int, value: object) -> str:
    parts = line.split(",")
    parts[column] = str(value)
    return ",".join(parts)


def one(con: Con, query: str) -> Any:
    return con.execute(query).fetchall()[0]


# --- every value that a file states can be corrected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("renamed", [False, True])
def test_a_corrected_traded_value_replaces_the_old_one(con: Con, tmp_path: Path, renamed: bool) -> None:
    name = "AAAUSDT-trades-2024-01-01.csv"
    process_file(con, put(tmp_path / "v1" / name, trades(1, 150)))
    make_bars(con, "AAAUSDT", "1m")
    lines = [changed(line, 3, f"{100 + i % 5}.05") for i, line in enumerate(trades(1, 150), 1)]  # as another rounding gives
    result = process_file(con, put(tmp_path / "v2" / ("AAAUSDT-part.csv" if renamed else name), lines), symbol="AAAUSDT", kind="trades")
    assert (result.rows, result.duplicates, result.corrected, result.replaced is not None) == ((150, 0, 150, False) if renamed else (150, 0, 0, True))
    assert one(con, "SELECT count(*), round(sum(quote_qty), 6) FROM trades") == (150, 150 * 102.05)
    make_bars(con, "AAAUSDT", "1m")
    assert read_bars(con, "AAAUSDT", "1m").quote_volume.iloc[0] == 60 * 102.05  # ids 60 to 119
    assert verify(con).ok


def test_a_file_without_the_traded_value_corrects_none(con: Con, tmp_path: Path) -> None:
    process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", [changed(line, 3, f"{100 + i % 5}.05") for i, line in enumerate(trades(1, 99), 1)]))
    header, lines = "trade_id,price,qty,time,is_buyer_maker", [",".join((p := line.split(","))[:3] + p[4:6]) for line in trades(1, 99)]
    result = process_file(con, put(tmp_path / "part.csv", [header, *lines]), symbol="AAAUSDT", kind="trades")
    assert (result.rows, result.duplicates, result.corrected) == (0, 99, 0)
    assert one(con, "SELECT round(sum(quote_qty), 6) FROM trades") == (10104.95,)


# --- verification sees every stored column ---------------------------------------------------------------------------------------------------

TAMPERED = {
    "trades": {"symbol": "'X'", "source": "'X'", "trade_id": "trade_id + 1000", "ts": "ts + INTERVAL 1 SECOND", "price": "price + 1", "qty": "qty + 1", "quote_qty": "7", "side_reported": "-side_reported",
               "side_tick": "CASE WHEN side_tick = 1 THEN NULL ELSE 1 END", "n_trades": "9", "received_at": "ts"},
    "candles": {"symbol": "'X'", "source": "'X'", "interval": "'1h'", "ts": "ts + INTERVAL 1 SECOND", "close_ts": "close_ts + INTERVAL 1 SECOND", "open": "open + 0.5", "high": "high + 1", "low": "low - 1", "close": "close - 0.5",
                "volume": "7", "quote_volume": "NULL", "trades": "trades + 1", "buy_volume": "buy_volume / 2"},
}  # fmt: skip


@pytest.mark.parametrize("table", ["trades", "candles"])
def test_verify_sees_a_change_in_any_column(con: Con, tmp_path: Path, table: str) -> None:
    lines, name = (trades(1, 99), "AAAUSDT-trades-2024-01-01.csv") if table == "trades" else (candles(99), "AAAUSDT-1m-2024-01-01.csv")
    process_file(con, put(tmp_path / name, lines))
    columns = {row[0] for row in con.execute(f"DESCRIBE {table}").fetchall()}
    assert columns - {"file_id"} == set(TAMPERED[table]), "a column that nobody thought of"
    key = "trade_id = 50" if table == "trades" else f"ts = make_timestamp({(BEGIN_MS + 50 * MINUTE_MS) * 1000})"

    class Undo(Exception):
        "Ends a transaction without a trace."

    for column, value in TAMPERED[table].items():
        def tamper(c: Con, column: str = column, value: str = value) -> None:
            c.execute(f"UPDATE {table} SET {column} = {value} WHERE {key}")
            found = verify(c)
            assert not found.ok, f"{table}.{column}"
            raise Undo

        with pytest.raises(Undo):
            write(con, tamper)
    assert verify(con).ok


def test_digests_of_older_ledgers_stay_valid(con: Con, tmp_path: Path) -> None:
    "Such a file is still checked for what its digest covers, and still corrected."
    one_file = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01.csv", trades(1, 99)))
    first = stored_digest(con, "trades", one_file.sha256, 1)
    write(con, lambda c: c.execute("UPDATE ingest_ledger SET digest = ?, digest_version = NULL", [first]))
    found = verify(con)
    assert found.ok
    assert "1 by a digest of an older version" in repr(found)
    process_file(con, put(tmp_path / "AAAUSDT-part.csv", [changed(changed(line, 2, "2.0"), 3, 200 + 2 * (i % 5)) for i, line in enumerate(trades(40, 42), 40)]), symbol="AAAUSDT", kind="trades")
    assert con.execute("SELECT rows, digest_version FROM ingest_ledger ORDER BY rows").fetchall() == [(3, max(DIGESTED)), (96, None)]
    assert verify(con).ok
    zipped = process_file(con, put(tmp_path / "again" / "AAAUSDT-trades-2024-01.csv", [*trades(1, 99), ""]), check_symbol=False)
    assert (zipped.rows, zipped.duplicates, zipped.corrected, zipped.replaced) == (99, 0, 3, one_file.sha256)
    write(con, lambda c: c.execute("UPDATE trades SET price = price + 1 WHERE trade_id = 7"))
    assert not verify(con).ok


def test_the_same_rows_are_no_newer_version_of_an_older_ledgers_file(con: Con, tmp_path: Path) -> None:
    loaded = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01.csv", trades(1, 99)))
    first = stored_digest(con, "trades", loaded.sha256, 1)
    write(con, lambda c: c.execute("UPDATE ingest_ledger SET digest = ?, digest_version = NULL", [first]))
    again = process_file(con, put(tmp_path / "again" / "AAAUSDT-trades-2024-01.csv", [*trades(1, 99), ""]))
    assert (again.rows, again.duplicates, again.replaced) == (0, 99, None)


def spoil_rejected(con: Con) -> None:
    write(con, lambda c: c.execute("DELETE FROM quarantine"))


def spoil_gaps(con: Con) -> None:
    write(con, lambda c: c.execute("DELETE FROM gaps"))


@pytest.mark.parametrize("spoil", [spoil_rejected, spoil_gaps])
def test_verify_sees_lost_notes(con: Con, tmp_path: Path, spoil: Callable[[Con], None]) -> None:
    lines = trades(1, 300)
    lines[100] = "garbage"
    process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", lines))
    assert verify(con).ok
    spoil(con)
    assert not verify(con).ok


# --- repetitions --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["one after the other", "each at once", "reversed"])
@pytest.mark.parametrize("make", [trades, lambda first, last: candles(last)], ids=["trades", "candles"])
def test_a_file_with_every_row_twice_is_no_bad_file(con: Con, tmp_path: Path, order: str, make: Callable[[int, int], list[str]]) -> None:
    lines = make(1, 499)
    twice = {"one after the other": lines * 2, "each at once": [line for line in lines for _ in range(2)], "reversed": [*lines, *lines[::-1]]}[order]
    result = process_file(con, put(tmp_path / ("AAAUSDT-trades-2024-01-01.csv" if make is trades else "AAAUSDT-1m-2024-01-01.csv"), twice))
    assert (result.rows, result.rejected, result.duplicates, result.gaps) == (499, 0, 499, 0)
    assert con.execute("SELECT rows, rejected, duplicates FROM ingest_ledger").fetchall() == [(499, 0, 499)]
    assert verify(con).ok


@pytest.mark.parametrize("column", range(6))
def test_a_repeated_id_with_any_other_value_is_a_bad_row(con: Con, tmp_path: Path, column: int) -> None:
    "At once, and far away; the first one stays."
    lines = trades(1, 499)
    value = {1: "105.5", 2: "9.0", 3: "100.05", 4: BEGIN_MS + 21_000, 5: "False" if lines[19].split(",")[5] == "True" else "True"}
    other = lines[19] if column == 0 else changed(lines[19], column, value[column])
    other = changed(other, 3, {1: "105.5", 2: "900.0"}[column]) if column in (1, 2) else other
    result = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", [*lines[:20], other, *lines[20:], other]), max_rejected=0.01)
    bad = 0 if column == 0 else 2
    assert (result.rows, result.rejected, result.duplicates) == (499, bad, 2 - bad)
    assert con.execute("SELECT line, reason FROM quarantine ORDER BY line").fetchall() == [(line, "trade_id is repeated with other values") for line in ((21, 501) if bad else ())]
    assert one(con, "SELECT price, qty, quote_qty, epoch_ms(ts) FROM trades WHERE trade_id = 20") == (100.0, 1.0, 100.0, BEGIN_MS + 20_000)


def test_repetitions_across_blocks_are_compared_with_what_was_kept(con: Con, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A block of rows may begin with repetitions of a row of the block before."
    monkeypatch.setattr("cryptoresearch.ingest.parsing._ROWS", 4)
    lines = [line for line in trades(1, 50) for _ in range(3)]
    lines[14] = changed(lines[14], 2, "3.0")
    result = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", lines))
    assert (result.rows, result.rejected, result.duplicates) == (50, 1, 99)


# --- ids that cannot be ---------------------------------------------------------------------------------------------------------------------


def day(number: int) -> list[str]:
    "299 trades of a day, five minutes each; the ids run on."
    first = 10_001 + 299 * number
    return trades(first, first + 298, BEGIN_MS + number * DAY_MS - first * 1000)


@pytest.mark.parametrize(("at", "wrong"), [(100, "1010000000101"), (100, str(2**62 - 1)), (100, "1010101"), (0, "1010000000001"), (298, "1010000000299"), (100, "0"), (150, "99151")])
def test_one_corrupt_id_does_not_lock_a_series(con: Con, tmp_path: Path, at: int, wrong: str) -> None:
    lines = day(0)
    good, lines[at] = lines[at], changed(lines[at], 0, wrong)
    first = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", lines))
    assert (first.rows, first.rejected) == (298, 1)
    assert con.execute("SELECT line, raw, reason FROM quarantine").fetchall() == [(at + 1, lines[at], "trade_id fits neither the ids nor the times around it")]
    assert con.execute("SELECT kind, first_missing_id, last_missing_id FROM gaps").fetchall() == ([("rejected", at + 10_001, at + 10_001)] if 0 < at < 298 else [])
    assert process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-02.csv", day(1))).rows == 299
    lines[at] = good
    repaired = process_file(con, put(tmp_path / "repaired" / "AAAUSDT-trades-2024-01-01.csv", lines))
    assert (repaired.rows, repaired.replaced) == (299, first.sha256)
    assert one(con, "SELECT count(*), max(trade_id) FROM trades") == (598, 10_598)
    assert con.execute("SELECT * FROM gaps").fetchall() == []
    assert verify(con).ok


def test_a_stray_id_of_an_older_store_is_grown_out_of(con: Con, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Loaded before there was the rule: the next day comes in all the same, and the repaired file replaces the damaged one."
    monkeypatch.setattr("cryptoresearch.ingest.staging.wrong_ids", lambda parts: np.empty(0, np.int64))
    lines = day(0)
    lines[100] = changed(lines[100], 0, 10_350)  # an id that the next day has
    first = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", lines))
    assert (first.rows, one(con, "SELECT max(last_id) FROM ingest_ledger")[0]) == (299, 10_350)
    second = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-02.csv", day(1)))
    assert (second.rows, second.corrected) == (299, 0)  # one id on two days is two trades
    repaired = process_file(con, put(tmp_path / "repaired" / "AAAUSDT-trades-2024-01-01.csv", day(0)))
    assert (repaired.rows, repaired.replaced) == (299, first.sha256)
    assert one(con, "SELECT count(*), max(trade_id) FROM trades") == (598, 10_598)
    assert con.execute("SELECT * FROM gaps").fetchall() == []


def test_a_repaired_file_comes_in_before_the_next_day_too(con: Con, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = day(0)
    lines[100] = changed(lines[100], 0, 1010000000101)
    with monkeypatch.context() as m:
        m.setattr("cryptoresearch.ingest.staging.wrong_ids", lambda parts: np.empty(0, np.int64))
        first = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", lines))
    assert first.rows == 299
    cut = put(tmp_path / "cut" / "AAAUSDT-trades-2024-01-01.csv", day(0)[:298])
    with pytest.raises(SchemaError, match="at least what its older version"):
        process_file(con, cut)
    assert process_file(con, put(tmp_path / "repaired" / "AAAUSDT-trades-2024-01-01.csv", day(0))).replaced == first.sha256


def test_ids_of_another_symbol_are_still_refused(con: Con, tmp_path: Path) -> None:
    process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", trades(10_000, 12_000, BEGIN_MS - 10_000_000)))
    other = put(tmp_path / "AAAUSDT-trades-2024-01-02.csv", trades(5_000, 6_000, BEGIN_MS + DAY_MS))
    with pytest.raises(SchemaError, match="ids above 12000"):
        process_file(con, other)


def test_missing_ranges_are_no_strays(con: Con, tmp_path: Path) -> None:
    lines = [line for i, line in enumerate(trades(1, 3000)) if not 500 <= i < 1500 or i in (700, 1100)]
    result = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", lines[::-1]))
    assert (result.rows, result.rejected, result.gaps) == (2002, 0, 3)


# --- values that cannot be ---------------------------------------------------------------------------------------------------------------------


def test_an_impossible_range_of_ids_is_refused(con: Con, tmp_path: Path) -> None:
    lines = [f"{i},1.5,2.0,{i * 2},{i * 2 + 1},{BEGIN_MS + i * 1000},true,True" for i in range(1, 500)]
    lines[5], lines[6], lines[7] = changed(lines[5], 4, 99_999_999_999), changed(lines[6], 4, 13), changed(lines[7], 3, -1)
    result = process_file(con, put(tmp_path / "AAAUSDT-aggTrades-2024-01-01.csv", lines))
    assert (result.rows, result.rejected) == (496, 3)
    assert con.execute("SELECT line, reason FROM quarantine ORDER BY line").fetchall() == [(6, "last_id is 1,000,000 or more above first_id"), (7, "last_id is below first_id"), (8, "first_id is not a finite number from zero on")]
    assert one(con, "SELECT min(n_trades), max(n_trades), sum(n_trades) FROM trades") == (2, 2, 992)


@pytest.mark.parametrize(("column", "name"), [(1, "price"), (2, "qty"), (3, "quote_qty")])
def test_amounts_that_no_sum_can_hold_are_refused(con: Con, tmp_path: Path, column: int, name: str) -> None:
    lines = trades(1, 299)
    lines[50], lines[70] = changed(lines[50], column, "1e19"), changed(changed(lines[70], 3, "999999999999999"), 2 if column == 2 else 1, "999999999999999")
    lines[70] = changed(lines[70], 1, "1.0") if column == 2 else lines[70]
    result = process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", lines))
    assert (result.rows, result.rejected) == (298, 1)
    assert con.execute("SELECT line, reason FROM quarantine").fetchall() == [(51, f"{name} is not below 1e+15, which is beyond any market and what exact sums hold")]
    make_bars(con, "AAAUSDT", "1m")
    assert read_bars(con, "AAAUSDT", "1m").volume.max() == (999_999_999_999_999 + 59 if name == "qty" else 60)


@pytest.mark.parametrize("make", [lambda t: trades_to_bars(t, "1m", start="2024-01-01", end="2024-01-01 00:02"), lambda t: event_bars(t, "tick:2")], ids=["time", "event"])
def test_amounts_in_memory_that_no_sum_can_hold_are_an_error(make: Callable[[pd.DataFrame], Any]) -> None:
    frame = pd.DataFrame({"ts": pd.to_datetime([BEGIN_MS, BEGIN_MS + 1000, BEGIN_MS + 61_000], unit="ms", utc=True), "price": 1.0, "qty": [1.0, 1e19, 1.0]})
    with pytest.raises(SchemaError, match="quantities that add up to less than"):
        make(frame)


# --- a day and its month -----------------------------------------------------------------------------------------------------------------------

MONTH, DAY = "AAAUSDT-trades-2024-01.csv", "AAAUSDT-trades-2024-01-01.csv"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corrected_day_beside_its_month_wins(con: Con, tmp_path: Path, workers: int) -> None:
    "`-01-01` sorts before `-01.`; the month must not undo the day for that."
    fixed = trades(1, 99)
    fixed[3] = changed(changed(fixed[3], 2, "5.00000000"), 3, "520.0")
    put(tmp_path / "files" / MONTH, trades(1, 200))
    put(tmp_path / "files" / DAY, fixed)
    found = process_files(con, tmp_path / "files", workers=workers)
    assert [Path(file).name for file in found.file] == [MONTH, DAY]
    assert found[["rows", "duplicates"]].to_numpy().tolist() == [[200, 0], [1, 98]]
    assert one(con, "SELECT qty FROM trades WHERE trade_id = 4") == (5.0,)
    assert verify(con).ok


def without(lines: list[str], *ids: int) -> list[str]:
    return [line for line in lines if int(line.split(",")[0]) not in ids]


@pytest.mark.parametrize("order", ["as it came", "reversed"])
def test_a_corrected_day_takes_back_what_it_passes_over(con: Con, tmp_path: Path, order: str) -> None:
    process_file(con, put(tmp_path / MONTH, trades(1, 200)))
    make_bars(con, "AAAUSDT", "1m")
    lines = without(trades(1, 150), 70)
    result = process_file(con, put(tmp_path / DAY, lines[::-1] if order == "reversed" else lines))
    assert (result.rows, result.duplicates, result.corrected) == (0, 149, 1)
    assert one(con, "SELECT count(*), count(*) FILTER (trade_id = 70) FROM trades") == (199, 0)
    assert con.execute("SELECT kind, first_missing_id, last_missing_id FROM gaps").fetchall() == [("id", 70, 70)]
    assert con.execute("SELECT event, detail LIKE '%or are not in it (1)' FROM data_log ORDER BY event").fetchall() == [("corrected", True), ("duplicate", False)]
    assert verify(con).ok
    make_bars(con, "AAAUSDT", "1m")
    assert read_bars(con, "AAAUSDT", "1m")[["trades", "gap"]].to_numpy().tolist() == [[59, False], [60, False]]  # one id has no effect
    again = process_file(con, put(tmp_path / DAY, lines))
    assert again.already_loaded or (again.rows, again.corrected) == (0, 0)


@pytest.mark.parametrize(("name", "lines", "why"), [
    (DAY, without(trades(1, 150), *range(60, 75)), "a long hole is a loss"),
    (DAY, without(trades(1, 150), *range(10, 80, 3)), "too many short ones"),
    (DAY, [line if i != 60 else "garbage" for i, line in enumerate(trades(1, 150))], "the row was refused"),
    (DAY, trades(1, 120), "what ends early says nothing of what follows"),
    ("AAAUSDT-part.csv", without(trades(1, 150), 70), "the name claims nothing"),
])  # fmt: skip
def test_a_day_with_holes_deletes_nothing(con: Con, tmp_path: Path, name: str, lines: list[str], why: str) -> None:
    process_file(con, put(tmp_path / MONTH, trades(1, 200)))
    result = process_file(con, put(tmp_path / name, lines), symbol="AAAUSDT", kind="trades")
    assert (result.rows, result.corrected) == (0, 0), why
    assert one(con, "SELECT count(*) FROM trades") == (200,)
    assert con.execute("SELECT count(*) FROM data_log WHERE event = 'kept'").fetchall() == [(int(why == "too many short ones"),)]
    assert verify(con).ok


def test_a_day_that_is_meant_takes_back_all_that_it_does_not_have(con: Con, tmp_path: Path) -> None:
    process_file(con, put(tmp_path / MONTH, [*trades(1, 200), *trades(201, 300, BEGIN_MS + DAY_MS)]))
    result = process_file(con, put(tmp_path / DAY, without(trades(5, 190), *range(60, 75))), replace=True)
    assert (result.rows, result.duplicates, result.corrected) == (0, 171, 29)
    assert one(con, "SELECT count(*), count(*) FILTER (trade_id > 200) FROM trades") == (271, 100)
    assert verify(con).ok


def test_a_corrected_day_of_candles_takes_back_one(con: Con, tmp_path: Path) -> None:
    process_file(con, put(tmp_path / "AAAUSDT-1m-2024-01.csv", candles(2000)))
    lines = candles(1440)
    del lines[700]
    result = process_file(con, put(tmp_path / "AAAUSDT-1m-2024-01-01.csv", lines))
    assert (result.rows, result.duplicates, result.corrected) == (0, 1439, 1)
    assert one(con, "SELECT count(*) FROM candles") == (1999,)
    assert one(con, "SELECT kind, start_ts::VARCHAR, end_ts::VARCHAR FROM gaps") == ("time", "2024-01-01 11:40:00", "2024-01-01 11:41:00")
    assert verify(con).ok


# --- one id, two trades ---------------------------------------------------------------------------------------------------------------------

SHARED_DAYS = {  # the exchange gave the aggregate id 101 to two trades, on both sides of midnight
    "ABCBTC-aggTrades-2021-02-28.csv": ["100,2.38,10.0,500,500,1614556740100,True,True", "101,2.38,20.0,501,501,1614556740101,True,True"],
    "ABCBTC-aggTrades-2021-03-01.csv": ["101,2.38,40.0,502,502,1614556800101,True,True", "102,2.38,80.0,503,503,1614556800102,True,True"],
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("split", [True, False])
def test_an_id_that_two_days_share_is_two_trades(con: Con, tmp_path: Path, order: int, split: bool) -> None:
    "Two files in either order, or one file with all rows in either order."
    files = list(SHARED_DAYS.items())[::order] if split else [("ABCBTC-aggTrades.csv", [r for rows in SHARED_DAYS.values() for r in rows][::order])]
    results = [process_file(con, put(tmp_path / name, rows), symbol="ABCBTC", progress=False) for name, rows in files]
    assert [(r.rejected, r.duplicates, r.corrected) for r in results] == [(0, 0, 0)] * len(files)
    assert one(con, "SELECT count(*), sum(qty) FROM trades") == (4, 150)
    again = process_file(con, put(tmp_path / "both" / "ABCBTC-aggTrades.csv", [*files[-1][1], *files[0][1]]), symbol="ABCBTC", progress=False)
    assert (again.rows, one(con, "SELECT count(*), sum(qty) FROM trades")) == (0, (4, 150))
    assert verify(con).ok


def test_a_correction_of_a_shared_id_changes_its_own_day_only(con: Con, tmp_path: Path) -> None:
    for name, rows in SHARED_DAYS.items():
        process_file(con, put(tmp_path / name, rows), progress=False)
    rows = [changed(SHARED_DAYS["ABCBTC-aggTrades-2021-03-01.csv"][0], 2, 41.0), SHARED_DAYS["ABCBTC-aggTrades-2021-03-01.csv"][1]]
    result = process_file(con, put(tmp_path / "part" / "ABCBTC-aggTrades.csv", rows), symbol="ABCBTC", progress=False)
    assert (result.corrected, result.duplicates) == (1, 1)
    assert con.execute("SELECT qty FROM trades ORDER BY ts").fetchall() == [(10,), (20,), (41,), (80,)]


def listed(first: int, last: int, day: str, missing: int = 0) -> list[str]:
    start = pd.Timestamp(day, tz="UTC").value // 10**6
    return [f"{i},9.0,1.0,9.0,{start + i * 1000},true,true" for i in range(first, last + 1) if i != missing]


MAY_10, MAY_31, JUNE_1 = ("ABCUSDT-trades-2022-05-10.csv", "ABCUSDT-trades-2022-05-31.csv", "ABCUSDT-trades-2022-06-01.csv")


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_ids_that_begin_again_delete_nothing(con: Con, tmp_path: Path, order: tuple[int, ...]) -> None:
    files = [(MAY_10, listed(1, 5, "2022-05-10")), (MAY_31, listed(1, 3, "2022-05-31")), (JUNE_1, listed(4, 9, "2022-06-01"))]
    for i in order:
        assert process_file(con, put(tmp_path / files[i][0], files[i][1]), progress=False).corrected == 0
    assert con.execute("SELECT ts::DATE::VARCHAR, count(*) FROM trades GROUP BY 1 ORDER BY 1").fetchall() == [
        ("2022-05-10", 5), ("2022-05-31", 3), ("2022-06-01", 6)]
    assert verify(con).ok
    assert [(s.start.day, s.end.day, s.rows) for s in coverage(con).itertuples()] == [(10, 10, 5), (31, 1, 9)]
    between = gap_table(con, silences=False).query("kind == 'between'")
    assert [(g.start.day, g.end.day) for g in between.itertuples()] == [(10, 31)]
    assert make_bars(con, "ABCUSDT", "1d")
    assert list(read_bars(con, "ABCUSDT", "1d")["gap"]) == [True] * 21  # from May 11; no day is complete
    assert make_event_bars(con, "ABCUSDT", "tick:3") == 4  # 1 to 3 of May 10, then 1 to 9


def test_ids_that_begin_again_inside_a_month(con: Con, tmp_path: Path) -> None:
    lines = [*listed(1, 50, "2022-05-10", missing=20), *listed(1, 30, "2022-05-31", missing=7)]
    result = process_file(con, put(tmp_path / "ABCUSDT-trades-2022-05.csv", lines), progress=False)
    assert (result.rows, result.rejected) == (78, 0)
    rows = con.execute("SELECT kind, first_missing_id, start_ts::DATE::VARCHAR, end_ts::DATE::VARCHAR FROM gaps ORDER BY start_ts").fetchall()
    assert rows == [("id", 20, *["2022-05-10"] * 2), ("restart", None, "2022-05-10", "2022-05-31"), ("id", 7, *["2022-05-31"] * 2)]
    day = process_file(con, put(tmp_path / MAY_31, listed(1, 30, "2022-05-31")), progress=False)  # it has the id 7
    assert (day.rows, day.duplicates, day.corrected) == (1, 29, 0)
    assert con.execute("SELECT kind, first_missing_id FROM gaps ORDER BY start_ts").fetchall() == [("id", 20), ("restart", None)]
    assert one(con, "SELECT count(*) FROM trades") == (79,)
    forget_file(con, day.sha256)
    assert con.execute("SELECT kind, first_missing_id FROM gaps ORDER BY start_ts").fetchall() == [("id", 20), ("restart", None), ("id", 7)]


def test_the_advice_for_ids_of_another_listing_deletes_nothing(con: Con, tmp_path: Path) -> None:
    "The first trades of the new listing are missing, so that it could be a file of another symbol."
    process_file(con, put(tmp_path / MAY_10, listed(1, 50, "2022-05-10")), progress=False)
    later = put(tmp_path / MAY_31, listed(8, 30, "2022-05-31"))
    with pytest.raises(SchemaError, match="check_symbol=False"):
        process_file(con, later, progress=False)
    assert process_file(con, later, progress=False, check_symbol=False).rows == 23
    assert one(con, "SELECT count(*) FROM trades") == (73,)
    assert [(s.start.day, s.rows) for s in coverage(con).itertuples()] == [(10, 50), (31, 23)]


# --- ids that the exchange never published ---------------------------------------------------------------------------------------------------

NEVER = (31, 92, 153, 214, 275, 336)


def unpublished(kind: str, never: tuple[int, ...] = NEVER, last: int = 366) -> list[str]:
    "One trade each ten seconds; the ids of `never` were not published. Aggregates are numbered without a hole, over the same trades."
    ids = [i for i in range(1, last + 1) if i not in never]
    if kind == "trades":
        return ["id,price,qty,quote_qty,time,is_buyer_maker", *(f"{i},100,1,100,{BEGIN_MS + n * 10_000},true" for n, i in enumerate(ids))]
    header = "agg_trade_id,price,quantity,first_trade_id,last_trade_id,transact_time,is_buyer_maker"
    return [header, *(f"{n + 1},100,1,{i},{i},{BEGIN_MS + n * 10_000},true" for n, i in enumerate(ids))]


@pytest.mark.parametrize("kind", ["trades", "aggTrades"])
def test_single_missing_ids_are_reported_and_void_no_bar(con: Con, tmp_path: Path, kind: str) -> None:
    result = process_file(con, put(tmp_path / f"ABCUSDT-{kind}-2024-01-01.csv", unpublished(kind)), market="um", progress=False)
    assert (result.rows, result.gaps) == (360, 6)
    assert make_bars(con, "ABCUSDT", "5m") and not read_bars(con, "ABCUSDT", "5m")["gap"].any()
    assert make_bars(con, "ABCUSDT", "tick:50") == 7
    row = status(con, silences=False).iloc[0]
    assert (row["gaps"], row["missing"], row["missing_share"]) == (7, 6, 0)  # the day is cut short, too
    assert "6 ids missing in 6 short holes without effect on bars" in row["verdict"]
    assert gap_table(con, silences=False).groupby("kind")["harmless"].agg(["size", "all"]).loc["id" if kind == "trades" else "inner"].tolist() == [6, True]
    assert len(source_intervals(con, "ABCUSDT")) == 1


@pytest.mark.parametrize(("kind", "limit", "bad"), [
    ("trades", 0, 6), ("trades", 1, 1), ("trades", 2, 0), ("aggTrades", 1, 1), *(pytest.param("aggTrades", *numbers, marks=pytest.mark.heavy) for numbers in ((0, 6), (2, 0))),
])  # fmt: skip
def test_the_setting_decides_for_every_kind_of_data(tmp_path: Path, new_store: NewStore, kind: str, limit: int, bad: int) -> None:
    "Five single ids and two ids in a row are missing."
    file = put(tmp_path / f"ABCUSDT-{kind}-2024-01-01.csv", unpublished(kind, (*NEVER, 32)))
    where: dict[str, Any] = {"_env_file": None, "duckdb_path": new_store(tmp_path / "store").duckdb_path, "duckdb_threads": 2}
    with init_duckdb(Settings(**where, harmless_missing_ids=limit)) as con:
        process_file(con, file, market="um", progress=False)
        make_bars(con, "ABCUSDT", "1m")
        bars = read_bars(con, "ABCUSDT", "1m")
        assert (bars["gap"].sum() > 0, int((~gap_table(con, silences=False).query("kind != 'bounds'")["harmless"]).sum())) == (bad > 0, bad)
        make_bars(con, "ABCUSDT", "tick:17")
        cut = len(read_event_bars(con, "ABCUSDT", "tick:17"))
    with init_duckdb(Settings(**where, harmless_missing_ids=9)) as con:  # the bars follow the setting
        make_bars(con, "ABCUSDT", "1m")
        make_bars(con, "ABCUSDT", "tick:17")
        assert not read_bars(con, "ABCUSDT", "1m")["gap"].any()
        assert (cut == 21) == (bad == 0) and len(read_event_bars(con, "ABCUSDT", "tick:17")) == 21


def test_a_single_id_missing_between_two_days_voids_no_bar(con: Con, tmp_path: Path) -> None:
    for number, (first, last) in enumerate([(10_000, 10_298), (10_300, 10_598)], 1):
        lines = trades(first, last, BEGIN_MS + (number - 1) * DAY_MS - first * 1000 + (DAY_MS - 300_000 if number == 1 else 0))
        process_file(con, put(tmp_path / f"AAAUSDT-trades-2024-01-0{number}.csv", lines), progress=False)
    make_bars(con, "AAAUSDT", "1m")
    assert not read_bars(con, "AAAUSDT", "1m")["gap"].any()
    assert status(con, silences=False)["missing"].sum() == 1
