"""Ingestion where a notebook cannot go: junk of any kind, several processes at once, a process that dies."""

import contextlib
import gzip
import os
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from conftest import examples, NewStore, Program
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cryptoresearch.ingest import files as ingest
from cryptoresearch.data.archive import minio_client
from cryptoresearch.ingest.parsing import BadRow, LAYOUTS, parse_piece, read_row
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import CryptoResearchError, DataNotFound, SchemaError
from cryptoresearch.settings import Settings

TABLES = ("trades", "candles", "gaps", "coverage", "quarantine", "ingest_ledger")
SPOT = LAYOUTS["trades"][7]


@pytest.fixture
def con(tmp_path: Path, new_store: NewStore) -> Any:
    with init_duckdb(new_store(tmp_path / "store")) as con:
        yield con


def state(con: duckdb.DuckDBPyConnection) -> list[Any]:
    return [con.execute(f"SELECT count(*), sum(hash(t)) FROM {name} t").fetchone() for name in TABLES]


def one(con: duckdb.DuckDBPyConnection, sql: str) -> Any:
    row = con.execute(sql).fetchone()
    assert row is not None
    return row


def rows(con: duckdb.DuckDBPyConnection) -> list[Any]:
    return con.execute("SELECT * EXCLUDE file_id FROM trades ORDER BY ts, trade_id").fetchall()


def trades_text(n: int, start_ms: int = 1_704_067_200_000, first_id: int = 1, scale: int = 1) -> list[str]:
    return [f"{first_id + i},{100 + (i * 7 % 11) / 100:.8f},0.50000000,50.00000000,{(start_ms + i) * scale},{i % 3 == 0},True" for i in range(n)]


def put(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


# --- real files ---------------------------------------------------------------------------------------------------------------------------


def test_real_trades_have_no_hole(con: duckdb.DuckDBPyConnection, shared: Path) -> None:
    results = [process_file(con, shared / f"BTCUSDT-trades-2024-08-0{day}.csv") for day in (8, 9)]
    assert [(r.rows, r.rejected, r.gaps) for r in results] == [(9738, 0, 0), (10166, 0, 0)]
    assert one(con, "SELECT min(trade_id), max(trade_id), count(DISTINCT trade_id) FROM trades") == (3735683259, 3735703162, 19904)
    assert str(results[0].first_ts) == "2024-08-08 23:54:15.342000+00:00"


def test_real_values_are_exact(con: duckdb.DuckDBPyConnection, shared: Path) -> None:
    file = shared / "BTCUSDT-trades-2024-08-08.csv"
    process_file(con, file)
    want = [line.split(",") for line in file.read_text().splitlines()]
    got = con.execute("SELECT trade_id, price, qty, quote_qty, epoch_us(ts), side_reported FROM trades ORDER BY trade_id").fetchall()
    assert got == [(int(i), float(p), float(q), float(v), int(t) * 1000, -1 if maker == "True" else 1) for i, p, q, v, t, maker, _ in want]


def test_tick_rule_against_a_plain_loop(con: duckdb.DuckDBPyConnection, shared: Path) -> None:
    process_file(con, shared / "XRPETH-aggTrades-2019-10-11.csv")
    sign, before = None, None
    for price, side in con.execute("SELECT price, side_tick FROM trades ORDER BY trade_id").fetchall():
        if before is not None and price != before:
            sign = 1 if price > before else -1
        before = price
        assert side == sign


def test_real_agg_trades(con: duckdb.DuckDBPyConnection, shared: Path) -> None:
    results = [process_file(con, file) for file in sorted(shared.glob("XRPETH-aggTrades-*.csv"))]
    assert [r.rows for r in results] == [5929, 4134, 2414]
    assert one(con, "SELECT sum(n_trades), min(n_trades) FROM trades") == (14672, 1)
    assert one(con, "SELECT count(*) FROM gaps") == (0,)


def test_real_candles(con: duckdb.DuckDBPyConnection, shared: Path) -> None:
    result = process_file(con, shared / "BTCUSDT-1h-2017-08_2024-04.parquet")
    assert (result.rows, result.gaps, result.kind, result.source) == (58419, 28, "klines", "klines")
    assert one(con, "SELECT sum(epoch(end_ts - start_ts) / 3600) FROM gaps") == (128.0,)
    assert one(con, "SELECT count(*) FROM candles WHERE close_ts - ts <> INTERVAL 1 HOUR OR trades IS NOT NULL") == (0,)


# --- one content, many forms --------------------------------------------------------------------------------------------------------------


def test_the_same_bytes_again_are_a_no_op(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    file = put(tmp_path / "BTCUSDT-trades-2024-01-01.csv", trades_text(500))
    first = process_file(con, file)
    before = state(con), one(con, "FROM ducklake_current_snapshot('lake')")
    again = process_file(con, file)
    assert again.already_loaded and not first.already_loaded and again.rows == first.rows
    assert (state(con), one(con, "FROM ducklake_current_snapshot('lake')")) == before


@pytest.mark.parametrize("form", ["csv.gz", "zip", "parquet"])
def test_forms_are_equal(tmp_path: Path, form: str, new_store: NewStore) -> None:
    plain = put(tmp_path / "BTCUSDT-trades-2024-01-01.csv", trades_text(3000))
    packed = tmp_path / f"BTCUSDT-trades-2024-01-01.{form}"
    if form == "csv.gz":
        packed.write_bytes(gzip.compress(plain.read_bytes()))
    elif form == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
            z.write(plain, plain.name)
    else:
        names = "{'id': 'BIGINT', 'price': 'DOUBLE', 'qty': 'DOUBLE', 'quote_qty': 'DOUBLE', 'time': 'BIGINT', 'is_buyer_maker': 'BOOLEAN', 'best': 'BOOLEAN'}"
        duckdb.sql(f"COPY (FROM read_csv('{plain}', header=false, columns={names})) TO '{packed}' (FORMAT parquet)")
    with init_duckdb(new_store(tmp_path / "a")) as a, init_duckdb(new_store(tmp_path / "b")) as b:
        process_file(a, plain)
        process_file(b, packed)
        assert rows(a) == rows(b)
        assert len(rows(a)) == 3000


def test_milliseconds_and_microseconds_are_told_by_value(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    lines = trades_text(10) + trades_text(10, 1_704_067_300_000, 11, scale=1000)
    process_file(con, put(tmp_path / "BTCUSDT-trades-2024-01-01.csv", lines))
    assert one(con, "SELECT min(ts)::VARCHAR, max(ts)::VARCHAR FROM trades") == ("2024-01-01 00:00:00", "2024-01-01 00:01:40.009")
    assert one(con, "SELECT ts_unit FROM ingest_ledger") == ("mixed",)


def test_futures_header_and_lower_case(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    lines = ["id,price,qty,quote_qty,time,is_buyer_maker", "5053880937,68402.6,0.024,1641.6624,1717113600031,false", "5053880938,68402.5,0.1,6840.25,1717113600032,true"]
    result = process_file(con, put(tmp_path / "BTCUSDT-trades-2024-05-31.csv", lines))
    assert (result.rows, result.rejected) == (2, 0)
    assert con.execute("SELECT trade_id, price, side_reported, side_tick FROM trades ORDER BY ts").fetchall() == [(5053880937, 68402.6, 1, None), (5053880938, 68402.5, -1, -1)]


def test_kline_dump(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    hour = 3_600_000
    lines = [f"{1704067200000 + i * hour},10,12,9,11,5.5,{1704067200000 + (i + 1) * hour - 1},60.5,42,2.5,27.5,0" for i in (0, 1, 2, 5, 6)]
    result = process_file(con, put(tmp_path / "BTCUSDT-1h-2024-01.csv", [*lines, lines[0], "x"]), max_rejected=0.5)
    assert (result.rows, result.rejected, result.gaps) == (5, 1, 1)  # the repeated line counts as a duplicate
    assert one(con, "SELECT trades, buy_volume, quote_volume, close_ts - ts = INTERVAL 1 HOUR FROM candles LIMIT 1") == (42, 2.5, 60.5, True)
    assert one(con, "SELECT start_ts::VARCHAR, end_ts::VARCHAR FROM gaps") == ("2024-01-01 03:00:00", "2024-01-01 05:00:00")
    assert one(con, "SELECT end_ts::VARCHAR FROM coverage") == ("2024-01-01 07:00:00",)


# --- corruption ---------------------------------------------------------------------------------------------------------------------------


def test_dirty_rows_are_kept_with_line_and_reason(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    lines = trades_text(2000)
    lines[9] = lines[9].replace("0.50000000", "nan")
    lines[19] = "half,a,row"
    lines[29] = lines[28]
    lines[39] = lines[39].replace("50.00000000", "1e400")
    lines[49] = "9" * 300 + lines[49]
    result = process_file(con, put(tmp_path / "BTCUSDT-trades-2024-01-01.csv", lines))
    assert (result.rows, result.rejected, result.duplicates, result.gaps) == (1995, 4, 1, 5)
    kept = con.execute("SELECT line, raw, reason FROM quarantine ORDER BY line").fetchall()
    assert [(line, reason) for line, _, reason in kept] == [
        (10, "qty is not a finite number above zero"),
        (20, "3 columns instead of 7"),
        (40, "quote_qty is not a finite number from zero on"),
        (50, "trade_id cannot be read"),
    ]
    assert kept[1][1] == "half,a,row"


def test_gaps_lie_between_their_neighbours(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    lines = trades_text(100)
    process_file(con, put(tmp_path / "BTCUSDT-trades-2024-01-01.csv", lines[:40] + lines[50:]))
    assert one(con, "SELECT kind, first_missing_id, last_missing_id, epoch_ms(start_ts) % 1000, epoch_ms(end_ts) % 1000 FROM gaps") == ("id", 41, 50, 39, 50)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("BTCUSDT-trades-2024-01-01.csv", b""),
        ("BTCUSDT-trades-2024-01-02.csv", b"<html><body>404</body></html>"),
        ("BTCUSDT-trades-2024-01-03.csv", b"1,2,3\n4,5,6\n"),
        ("BTCUSDT-trades-2024-01-04.zip", b"PK\x03\x04 this is no zip"),
        ("BTCUSDT-trades-2024-01-05.csv.gz", gzip.compress("\n".join(trades_text(9000)).encode())[:-3000]),
        ("BTCUSDT-trades-2024-01-06.csv", bytes(range(256)) * 10_000),
        ("BTCUSDT-aggTrades-2024-01-07.csv", "\n".join(trades_text(100)).encode()),
        ("BTCUSDT-1h-2024-01-08.csv", "\n".join(trades_text(100)).encode()),
        ("BTCUSDT-trades-2024-01-09.csv", "\n".join(["junk"] * 20 + trades_text(100)).encode()),
        ("BTCUSDT-trades-2024-01-10.parquet", b"PAR1 and nothing else"),
        ("dump.csv", "\n".join(trades_text(100)).encode()),
        ("BTCUSDT-1mo-2024-01.csv", b"1704067200000,10,12,9,11,5.5,1704070799999,60.5,42,2.5,27.5,0\n"),
    ],
)
def test_refused_files_leave_everything_as_it_was(con: duckdb.DuckDBPyConnection, tmp_path: Path, name: str, content: bytes) -> None:
    process_file(con, put(tmp_path / "ETHUSDT-trades-2024-01-01.csv", trades_text(50)))
    before, files = state(con), set(tmp_path.rglob("*.parquet"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SchemaError):
        process_file(con, tmp_path / name)
    assert state(con) == before
    assert set(tmp_path.rglob("*.parquet")) - {tmp_path / name} == files


def test_several_members_are_refused(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    file = tmp_path / "BTCUSDT-trades-2024-01.zip"
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a.csv", "\n".join(trades_text(10)))
        z.writestr("b.csv", "\n".join(trades_text(10)))
    with pytest.raises(SchemaError, match="found 2 files"):
        process_file(con, file)


# --- objects ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.minio
@pytest.mark.parametrize("on_s3", [False, True])
def test_objects_in_and_out(s3: Any, tmp_path: Path, on_s3: bool, new_store: NewStore) -> None:
    file = put(tmp_path / "BTCUSDT-trades-2024-01-01.csv", trades_text(3000))
    late = put(tmp_path / "BTCUSDT-trades-2024-01-02.csv", trades_text(3000, 1_704_153_600_000, first_id=4001)[::-1])  # the careful way writes there too
    where = {"duckdb_data_path": f"s3://{s3.bucket_lake}/{tmp_path.name}/"} if on_s3 else {}
    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "store" / "catalog.sqlite"), **s3.settings, **where)
    client = minio_client(settings)
    with init_duckdb(settings) as con, init_duckdb(new_store(tmp_path / "plain")) as plain:
        for path in (file, late):
            client.fput_object(s3.bucket_raw, path.name, str(path))
            process_file(plain, path)
            result = process_file(con, f"s3://{s3.bucket_raw}/{path.name}", settings=settings)
            assert (result.rows, result.symbol) == (3000, "BTCUSDT")
        assert rows(con) == rows(plain)
        assert process_file(con, file, settings=settings).already_loaded  # known by content, wherever it lies
        with pytest.raises(DataNotFound):
            process_file(con, f"s3://{s3.bucket_raw}/BTCUSDT-trades-1999-01-01.csv", settings=settings)
        files = con.execute("FROM ducklake_list_files('lake', 'trades')").fetchall()
        assert all(str(row[0]).startswith("s3://") == on_s3 for row in files)


# --- any junk -----------------------------------------------------------------------------------------------------------------------------

fields = st.sampled_from(["", "0", "1", "-1", "1.5", "1e5", "1e400", "nan", "inf", ".", "1.", ".5", "0x1", "1_0", " 1", "9" * 18, "9" * 19, "9" * 40, "True", "truely", "false",
                          "1704067200000", "1704067200000000", "2024-01-01", "61837.63000000", "90071992547409.93", "9007199254740993", "\x00", "é", '"1"', "1;2"])  # fmt: skip
junk_lines = st.one_of(st.lists(fields, min_size=1, max_size=9).map(",".join), st.text(max_size=30).filter(lambda t: "\n" not in t and "\r" not in t))
good_lines = st.builds(
    lambda i, p, q, t, m: f"{i},{p},{q},1.0,{t},{m},True",
    st.integers(0, 30), st.sampled_from(["1.5", "2", "1.50000000"]), st.sampled_from(["0.1", "7"]), st.integers(1_704_067_200_000, 1_704_067_200_050), st.booleans(),
)  # fmt: skip


@given(st.lists(st.one_of(junk_lines, good_lines), max_size=15))
@hypothesis_settings(max_examples=300, deadline=None)
def test_fast_loop_and_plain_reader_agree(lines: list[str]) -> None:
    piece = "".join(line + "\n" for line in lines).encode()
    blocks = list(parse_piece(piece, SPOT, 1))
    got = {int(n): {k: float(v[i]) for k, v in b.columns.items()} for b in blocks for i, n in enumerate(b.line)}
    want = {}
    for n, line in enumerate(lines, 1):
        try:
            want[n] = {k: float(v) for k, v in read_row(line, SPOT).items()}
        except BadRow:
            continue
    assert set(got) == set(want)
    for n, row in want.items():
        assert np.array_equal(list(row.values()), [got[n][k] for k in row], equal_nan=True)


@given(st.lists(st.one_of(junk_lines, good_lines), max_size=15), st.sampled_from([0.0, 1.0]))
@hypothesis_settings(max_examples=examples(8, 25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_never_changes_the_store_without_a_ledger_row(con: duckdb.DuckDBPyConnection, tmp_path: Path, lines: list[str], limit: float) -> None:
    file = tmp_path / "BTCUSDT-trades-2024-01-01.csv"
    file.write_bytes("".join(line + "\n" for line in lines).encode())
    before = state(con)
    try:
        result = process_file(con, file, max_rejected=limit)
    except CryptoResearchError:
        assert state(con) == before
        return
    if result.already_loaded:
        assert state(con) == before
        return
    ledger = one(con, f"SELECT rows, rejected FROM ingest_ledger WHERE file_id = '{result.sha256}'")
    assert ledger == one(con, f"SELECT (SELECT count(*) FROM trades WHERE file_id = '{result.sha256}'), (SELECT count(*) FROM quarantine WHERE file_id = '{result.sha256}')")
    assert one(con, "SELECT count(*) - count(DISTINCT trade_id) FROM trades") == (0,)
    assert sum(ledger) == sum(1 for line in lines if line)


# --- processes ----------------------------------------------------------------------------------------------------------------------------

LOAD = """
    import sys
    from cryptoresearch.ingest.files import process_file
    from cryptoresearch.data.store import init_duckdb
    from cryptoresearch.settings import Settings
    con = init_duckdb(Settings(_env_file=None, duckdb_path=sys.argv[1]))
    for file in sys.argv[2:]:
        print(process_file(con, file).rows, flush=True)
"""


@pytest.fixture
def load(program: Program) -> Callable[..., subprocess.Popen[str]]:
    "Starts a process that loads files: `load(settings, *files)`."
    return lambda settings, *files: program(LOAD, settings.duckdb_path, *files, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_load_at_once(tmp_path: Path, load: Callable[..., subprocess.Popen[str]], new_store: NewStore) -> None:
    settings = new_store(tmp_path / "store")
    files = simulate_trades(tmp_path / "files", days=4, trades_per_day=3000)
    loaders = [load(settings, *files[0::2], files[3], files[0]), load(settings, *files[1::2], files[2], files[1])]  # two files in both, and one twice in each
    for loader in loaders:
        out, err = loader.communicate(timeout=120)
        assert loader.returncode == 0, err
        assert not err.strip(), "a batch stays quiet"
        assert len(out.split()) == 4
    with init_duckdb(settings) as con:
        assert one(con, "SELECT count(*), count(DISTINCT file_id) FROM ingest_ledger") == (4, 4)
        count, distinct, last = one(con, "SELECT count(*), count(DISTINCT trade_id), max(trade_id) FROM trades")
        assert count == distinct == last == one(con, "SELECT sum(rows) FROM ingest_ledger")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("days", "trades_per_day", "kills"),  # after how many files, and after what part of the time that the last of them took
    [(6, 20_000, ((2, 0.2), (4, 0.7))), pytest.param(12, 60_000, ((2, 0.4), (5, 0.1), (8, 0.8)), marks=pytest.mark.heavy)],
)
def test_a_killed_loader_leaves_whole_files_only(
    tmp_path: Path, load: Callable[..., subprocess.Popen[str]], days: int, trades_per_day: int, kills: tuple[tuple[int, float], ...], new_store: NewStore
) -> None:
    settings = new_store(tmp_path / "store")
    files = simulate_trades(tmp_path / "files", days=days, trades_per_day=trades_per_day)
    expected = {file.name: sum(1 for _ in file.open()) for file in files}
    for done, share in kills:
        loader = load(settings, *files)
        assert loader.stdout is not None
        for _ in range(done):
            began = time.monotonic()
            assert loader.stdout.readline()
        time.sleep(share * (time.monotonic() - began))  # within the next file
        assert loader.poll() is None, "ended before it was killed"
        os.kill(loader.pid, signal.SIGKILL)
        loader.communicate()
        with init_duckdb(settings) as con:
            ledger = con.execute("SELECT parse_filename(uri), file_id, rows FROM ingest_ledger").fetchall()
            stored = dict(con.execute("SELECT file_id, count(*) FROM trades GROUP BY ALL").fetchall())
        assert {file_id: n for _, file_id, n in ledger} == stored
        assert all(expected[name] == n for name, _, n in ledger)
    loader = load(settings, *files)
    _, err = loader.communicate(timeout=200)
    assert loader.returncode == 0, err
    with init_duckdb(settings) as con:
        assert one(con, "SELECT count(*), count(DISTINCT trade_id) FROM trades") == (sum(expected.values()),) * 2


def test_two_hosts_load_the_same_file_at_the_same_moment(tmp_path: Path, postgres: str, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "PostgreSQL writers take no turns: both look, neither sees the other, and still only one may load it."
    settings = Settings(_env_file=None, duckdb_path=postgres, duckdb_data_path=str(tmp_path / "lake"), duckdb_memory_limit="1GB", duckdb_threads=1)
    cons, together, real = [init_duckdb(settings) for _ in range(2)], threading.Barrier(2), ingest._loaded

    def look(con: duckdb.DuckDBPyConnection, job: Any, *rest: Any) -> Any:
        found = real(con, job, *rest)
        if found is None and not together.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(5)  # both look before either continues
        return found

    monkeypatch.setattr(ingest, "_loaded", look)
    file, results = shared / "BTCUSDT-trades-2024-08-08.csv", []
    threads = [threading.Thread(target=lambda c=con: results.append(process_file(c, file))) for con in cons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(r.already_loaded for r in results) == [False, True]
    assert init_duckdb(settings).execute("SELECT count(*), count(DISTINCT trade_id) FROM trades").fetchone() == (9738, 9738)


def test_a_progress_bar_leaves_standard_output_to_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ingest, "_PATIENCE_S", 0.0)
    with ingest._progress("file.csv", True) as report:
        report(1, 2)
        report(2, 2)
    told = capsys.readouterr()
    assert told.out == "" and told.err  # a line end where it is no terminal
