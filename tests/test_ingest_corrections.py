"Corrected, repeated and impossible rows: what a later file changes, what never gets in, and what verification sees."
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from cryptoresearch.data.bars import make_bars, read_bars
from cryptoresearch.data.corrections import DIGESTED, stored_digest
from cryptoresearch.data.ingest import process_file
from cryptoresearch.data.maintenance import verify
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.settings import Settings

BEGIN_MS, DAY_MS, MINUTE_MS = 1_704_067_200_000, 86_400_000, 60_000  # 2024-01-01
Con = duckdb.DuckDBPyConnection


@pytest.fixture
def con(tmp_path: Path) -> Iterator[Con]:
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "store" / "catalog.sqlite"), duckdb_threads=2)) as con:
        yield con


def trades(first: int, last: int, start_ms: int = BEGIN_MS, step_ms: int = 1000) -> list[str]:
    "Trades with the ids first, …, last; one a second."
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
    lines = [changed(line, 3, 200 + i) for i, line in enumerate(trades(1, 150))]
    result = process_file(con, put(tmp_path / "v2" / ("AAAUSDT-part.csv" if renamed else name), lines), symbol="AAAUSDT", kind="trades")
    assert (result.rows, result.duplicates, result.corrected, result.replaced is not None) == ((150, 0, 150, False) if renamed else (150, 0, 0, True))
    assert one(con, "SELECT count(*), sum(quote_qty) FROM trades") == (150, sum(range(200, 350)))
    make_bars(con, "AAAUSDT", "1m")
    assert read_bars(con, "AAAUSDT", "1m").quote_volume.iloc[0] == sum(range(259, 319))  # ids 60 to 119
    assert verify(con).ok


def test_a_file_without_the_traded_value_corrects_none(con: Con, tmp_path: Path) -> None:
    process_file(con, put(tmp_path / "AAAUSDT-trades-2024-01-01.csv", [changed(line, 3, 77) for line in trades(1, 99)]))
    header, lines = "trade_id,price,qty,time,is_buyer_maker", [",".join((p := line.split(","))[:3] + p[4:6]) for line in trades(1, 99)]
    result = process_file(con, put(tmp_path / "part.csv", [header, *lines]), symbol="AAAUSDT", kind="trades")
    assert (result.rows, result.duplicates, result.corrected) == (0, 99, 0)
    assert one(con, "SELECT sum(quote_qty) FROM trades") == (99 * 77,)


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
    process_file(con, put(tmp_path / "AAAUSDT-part.csv", [changed(line, 2, "2.0") for line in trades(40, 42)]), symbol="AAAUSDT", kind="trades")
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
