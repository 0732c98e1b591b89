"Whatever a file holds: it is loaded with every line accounted for, or refused with a reason and nothing stored."
import io
import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryptoresearch.data.ledger import stored_digest
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import DataNotFound, SchemaError
from cryptoresearch.settings import Settings

numbers = itertools.count(1)
JUNK = [b"", b",", b"\x00\xff\xfe", b"id,price,qty,quote_qty,time,is_buyer_maker", b"NaN,NaN,NaN,NaN,NaN,NaN,NaN", b"1,2,3", b"<html>", b"9" * 400, "ä,ö,ü".encode(), b'"1","2","3","4","5","6","7"']
FIELDS = [b"nan", b"inf", b"-1", b"0", b"1e400", b"", b" 1", b"0x10", b"1_0", b"99999999999999999999", b"1.5.5", b"True", b"\xef\xbb\xbf7"]


@pytest.fixture(scope="module")
def con(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path_factory.mktemp("fuzz") / "catalog.sqlite"))) as con:
        yield con


def clean_lines(first_id: int, n: int) -> list[bytes]:
    return [f"{first_id + i},{100 + i % 7}.25000000,0.50000000,{(100 + i % 7) * 0.5 + 0.125:.8f},{1_704_067_200_000 + 37 * i},{i % 3 == 0},True".encode() for i in range(n)]


def clean_candles(first: int, n: int) -> list[bytes]:
    "Candles of a minute from a day on."
    begin = [1_577_836_800_000 + first % 1000 * 86_400_000 + i * 60_000 for i in range(n)]
    return [f"{t},{100 + i % 7}.5,{110 + i % 7},{90 + i % 5},{101 + i % 7},{i % 4}.25,{t + 59_999},{i * 10}.5,{i},{i % 4}.125,{i},0".encode() for i, t in enumerate(begin)]


@st.composite
def dirty_text(draw: st.DrawFn, kind: str = "trades") -> bytes:
    "Lines of trades or candles after some accidents."
    lines = (clean_lines if kind == "trades" else clean_candles)(draw(st.integers(0, 10**12)), draw(st.integers(0, 80)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(len(lines), 1))) if lines else 0
        what = draw(st.sampled_from(["junk", "field", "cut", "repeat", "swap", "drop", "unit", "shuffle", "byte"]))
        if what == "junk" or not lines or at >= len(lines):
            lines.insert(at, draw(st.sampled_from(JUNK)))
        elif what == "field":
            parts = lines[at].split(b",")
            parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from(FIELDS))
            lines[at] = b",".join(parts)
        elif what == "cut":
            lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
        elif what == "repeat":
            lines.insert(draw(st.integers(0, len(lines))), lines[at])
        elif what == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif what == "drop":
            del lines[at : at + draw(st.integers(1, 5))]
        elif what == "unit":
            lines[at:] = [line.replace(b"17040672", b"1704067200", 1) if kind == "trades" else line.replace(b",", b"000,", 1) for line in lines[at:]]
        elif what == "shuffle":
            lines = draw(st.permutations(lines)) if len(lines) < 30 else lines[::-1]
        else:
            line = bytearray(lines[at])
            if line:
                line[draw(st.integers(0, len(line) - 1))] = draw(st.integers(0, 255))
            lines[at] = bytes(line)
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    return draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + end.join(lines) + draw(st.sampled_from([b"", end, end * 3]))


def zipped(text: bytes, name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(f"{name}.csv", text)
    return out.getvalue()


def of(con: duckdb.DuckDBPyConnection, table: str, symbol: str) -> int:
    return con.execute(f"SELECT count(*) FROM {table} WHERE symbol = ?", [symbol]).fetchall()[0][0]


def check(con: duckdb.DuckDBPyConnection, path: Path, symbol: str, lines: int | None, limit: float, kind: str = "trades") -> None:
    "Load a file and look at what it left."
    table, key = ("trades", "trade_id") if kind == "trades" else ("candles", "epoch_us(ts) // 60000000")
    try:
        result = process_file(con, path, symbol=symbol, kind=kind, interval="1m" if kind == "klines" else None, max_rejected=limit)
    except (SchemaError, DataNotFound) as e:
        assert [of(con, t, symbol) for t in ("trades", "candles", "gaps", "coverage", "ingest_ledger")] == [0, 0, 0, 0, 0]
        assert con.execute("SELECT count(*) FROM data_log WHERE event = 'refused' AND detail = ?", [str(e)]).fetchall()[0][0] >= 1
        return
    assert result.rows == of(con, table, symbol) > 0
    if lines is not None:
        assert result.rows + result.rejected + result.duplicates == lines
    row = con.execute("SELECT rows, rejected, duplicates, gaps, digest FROM ingest_ledger WHERE symbol = ?", [symbol]).fetchall()
    assert row == [(result.rows, result.rejected, result.duplicates, result.gaps, stored_digest(con, table, result.sha256))]
    assert con.execute("SELECT count(*) FROM quarantine WHERE file_id = ?", [result.sha256]).fetchall()[0][0] == result.rejected
    keys = [r[0] for r in con.execute(f"SELECT {key} FROM {table} WHERE symbol = ? ORDER BY ALL", [symbol]).fetchall()]
    assert len(set(keys)) == len(keys)
    missing = max(keys) - min(keys) + 1 - len(keys)
    size = "last_missing_id - first_missing_id + 1" if kind == "trades" else "(epoch_us(end_ts) - epoch_us(start_ts)) // 60000000"
    assert con.execute(f"SELECT coalesce(sum({size}), 0) FROM gaps WHERE symbol = ?", [symbol]).fetchall()[0][0] == missing


def count_lines(text: bytes, kind: str) -> int:
    "Lines that say something, but for a header of trades at the top of trades."
    lines = [line.rstrip(b"\r") for line in text.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    lines = [line for line in lines if line]
    return len(lines) - (1 if kind == "trades" and lines and lines[0] == JUNK[3] else 0)


@pytest.mark.parametrize("kind", ["trades", "klines"])
@settings(max_examples=examples(20, 120), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), form=st.sampled_from(["csv", "csv", "zip"]), limit=st.sampled_from([0.01, 0.5, 1.0]))
def test_every_line_of_a_dirty_file_is_accounted_for(con: duckdb.DuckDBPyConnection, tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject, form: str, limit: float) -> None:
    text = data.draw(dirty_text(kind))
    symbol = f"F{next(numbers)}USDT"
    path = tmp_path_factory.getbasetemp() / f"{symbol}-fuzzed.{form}"
    path.write_bytes(text if form == "csv" else zipped(text, f"{symbol}-fuzzed"))
    check(con, path, symbol, count_lines(text, kind), limit, kind)
    path.unlink()


@settings(max_examples=examples(12, 80), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), form=st.sampled_from(["csv", "zip", "random"]), kind=st.sampled_from(["trades", "klines"]))
def test_no_bytes_do_harm(con: duckdb.DuckDBPyConnection, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, form: str, kind: str) -> None:
    symbol = f"B{next(numbers)}USDT"
    text = b"\n".join((clean_lines if kind == "trades" else clean_candles)(data.draw(st.integers(0, 10**9)), 50))
    raw = bytearray({"csv": text, "zip": zipped(text, symbol), "random": data.draw(st.binary(max_size=300))}[form])
    for _ in range(data.draw(st.integers(0, 12))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path_factory.getbasetemp() / f"{symbol}-mutated.{'zip' if form == 'zip' else 'csv'}"
    path.write_bytes(bytes(raw))
    check(con, path, symbol, None, data.draw(st.sampled_from([0.01, 1.0])), kind)
    path.unlink()
