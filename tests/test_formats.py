"""The reader against anything: random rows, random bytes, damaged archives; every line accounted for."""

import gzip
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cryptoresearch.data.store import init_duckdb
from cryptoresearch.ingest import formats
from cryptoresearch.ingest.files import process_file
from cryptoresearch.ingest.formats import FileSpec, inspect_file, open_text, read_blocks
from cryptoresearch.ingest.parsing import BadRow, check_values, fields_of, LAYOUTS, parse_piece, possible_time, read_row
from cryptoresearch.errors import DataNotFound, SchemaError
from cryptoresearch.settings import Settings

NAME = "BTCUSDT-trades-2024-01-05"
FIRST_MS = 1_704_412_800_000
ALL_LAYOUTS = [(kind, layout) for kind, by_width in LAYOUTS.items() for layout in by_width.values()]
fuzz = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def trades(n: int, best: bool = True) -> list[str]:
    return [f"{i},{100 + i % 7}.5,2,{201 + 2 * (i % 7)}.0,{FIRST_MS + i},{i % 3 == 0}" + (",True" if best else "") for i in range(1, n + 1)]


def data(rows: list[str]) -> bytes:
    return "".join(row + "\n" for row in rows).encode()


def zipped(content: bytes, member: str = NAME + ".csv", how: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as z:
        z.writestr(zipfile.ZipInfo(member), content, how)
    return out.getvalue()


def outcome(path: Path, **arguments: str) -> tuple[int, list[tuple[int, str, str]]] | None:
    "Number of good rows and the bad ones; None where the file is refused. Any other exception fails the test."
    try:
        blocks = list(read_blocks(path, inspect_file(path, **arguments)))
    except (SchemaError, DataNotFound) as e:
        assert "expected" in str(e) and "found" in str(e)
        return None
    return sum(len(b.line) for b in blocks), [row for b in blocks for row in b.bad]


# --- one row: the compiled loop is the definition ------------------------------------------------------------------------------------------

digits = st.text("0123456789", min_size=1, max_size=21)
numbers = st.one_of(
    digits,
    st.builds("{}.{}".format, digits, digits),
    st.builds("{}.{}".format, st.text("0123456789", max_size=6), st.text("0", max_size=22)),
    st.floats(allow_nan=True, allow_infinity=True).map(str),
    st.sampled_from(["", ".", "1.", ".5", "-1", "+1", "1e5", " 1", "1_0", "0x1", "nan", "9007199254740993", "90071992547409.93", "9223372036854775807", "9223372036854775808", '"2.5"', "2024-01-05T00:00:01Z", "１"]),
)  # fmt: skip
cells = st.one_of(
    numbers, st.sampled_from(["True", "False", "true", "false", "TRUE", "tRUE", "Truely", "1704412800000", "1704412800000000"])
)
ends = st.sampled_from(["", "\r", " ", "\t", "\x00"])


@given(st.sampled_from(ALL_LAYOUTS), st.data())
@hypothesis_settings(max_examples=400, deadline=None)
def test_the_compiled_loop_reads_what_the_definition_reads(layout: tuple[str, formats.Columns], draw: st.DataObject) -> None:
    width = len(layout[1])
    row = st.one_of(st.lists(cells, min_size=width, max_size=width), st.lists(cells, max_size=width + 2)).map(",".join)
    lines = [line + end for line, end in draw.draw(st.lists(st.tuples(row, ends), max_size=12))]
    got = {
        int(n): [float(b.columns[name][i]) for name in b.columns]
        for b in parse_piece(data(lines), layout[1], 1)
        for i, n in enumerate(b.line)
    }
    bad = [row for b in parse_piece(data(lines), layout[1], 1) for row in b.bad]
    want = {}
    for n, line in enumerate(lines, 1):
        try:
            want[n] = [float(v) for v in read_row(line, layout[1]).values()]
        except BadRow as e:
            assert not line.strip() or (n, str(e)) in {(at, reason) for at, _, reason in bad}
    assert set(got) == set(want)
    assert all(np.array_equal(want[n], got[n], equal_nan=True) for n in want)


@given(st.lists(st.tuples(st.integers(0, 10**17), st.integers(0, 22)), min_size=1, max_size=200))
@hypothesis_settings(max_examples=100, deadline=None)
def test_decimals_are_the_nearest_float(pairs: list[tuple[int, int]]) -> None:
    texts = [f"{value // 10**places}.{value % 10**places:0{places}d}" if places else str(value) for value, places in pairs]
    (block,) = parse_piece(data([f"{i},{text},1,1,{FIRST_MS},True,True" for i, text in enumerate(texts)]), LAYOUTS["trades"][7], 1)
    assert block.columns["price"].tolist() == [float(text) for text in texts]


def test_every_length_of_digits() -> None:
    rows = [(("123456789" * 3)[:n], ("987654321" * 3)[:m]) for n in range(1, 25) for m in range(0, 25)]
    lines = [f"{i},{a}.{b},1,1,{FIRST_MS},True,True" for i, (a, b) in enumerate(rows)]
    (block,) = parse_piece(data(lines), LAYOUTS["trades"][7], 1)
    assert block.columns["price"].tolist() == [float(f"{a}.{b}") for a, b in rows]


@given(st.integers(-(2**63), 2**63 - 1) | st.integers(10**9, 4 * 10**9) | st.integers(10**12, 5 * 10**12) | st.integers(10**18, 5 * 10**18))
@example(1_230_768_000_000)
@example(4_102_444_800_000)
@hypothesis_settings(max_examples=200, deadline=None)
def test_times_are_judged_alike_one_by_one_and_in_blocks(ts: int) -> None:
    (block,) = parse_piece(data([f"1,1,1,1,{ts},True,True"]), LAYOUTS["trades"][7], 1)
    check_values(block, "trades")
    assert [reason for _, _, reason in block.bad] == ([possible_time(ts)] if possible_time(ts) else [])


# --- any bytes ----------------------------------------------------------------------------------------------------------------------------


@given(st.one_of(st.binary(max_size=400), st.lists(st.one_of(st.sampled_from(trades(3)), st.text(max_size=40), st.lists(cells, max_size=9).map(",".join)), max_size=20).map(lambda r: "\n".join(r).encode("utf-8", "replace"))),
       st.sampled_from(["csv", "zip", "csv.gz", "parquet"]), st.sampled_from([NAME, "BTCUSDT-aggTrades-2024-01", "BTCUSDT-1m-2024-01", "dump"]))  # fmt: skip
@hypothesis_settings(fuzz, max_examples=400)
def test_any_bytes_are_rows_or_a_typed_error(tmp_path: Path, content: bytes, suffix: str, name: str) -> None:
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(content)
    outcome(path, symbol="BTCUSDT")


@contextmanager
def small_pieces(size: int) -> Iterator[None]:
    "Read in pieces of a few bytes, so that small files cross their borders."
    with pytest.MonkeyPatch.context() as patch:
        whole = formats.pieces
        patch.setattr(formats, "pieces", lambda stream: whole(stream, size))
        yield


@given(
    st.lists(st.one_of(st.sampled_from(trades(40)), st.sampled_from(["", " ", "x", "1,2", "\x00", "é,é", "1,nan,1,1,1,True,True", "id,price,qty,quote_qty,time,is_buyer_maker"])), max_size=60),
    st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.sampled_from(["csv", "zip", "csv.gz"]), st.sampled_from([7, 64, 1 << 21]),
)  # fmt: skip
@hypothesis_settings(fuzz, max_examples=150)
def test_every_line_is_accounted_for(tmp_path: Path, rows: list[str], end: str, mark: bool, header: bool, suffix: str, size: int) -> None:
    head = ["id,price,qty,quote_qty,time,is_buyer_maker,is_best_match"] if header else []
    lines = [*head, *trades(1), *rows]
    content = (b"\xef\xbb\xbf" if mark else b"") + end.join(lines).encode()
    path = tmp_path / f"{NAME}.{suffix}"
    path.write_bytes({"csv": content, "zip": zipped(content), "csv.gz": gzip.compress(content, 1)}[suffix])
    with small_pieces(size):
        blocks = list(read_blocks(path, inspect_file(path)))
    good, bad = [int(n) for b in blocks for n in b.line], [row for b in blocks for row in b.bad]
    empty = [n for n, line in enumerate(lines, 1) if not line.strip()]
    assert sorted([*good, *(n for n, _, _ in bad), *empty]) == list(range(1 + header, len(lines) + 1))
    assert all(text == lines[n - 1].replace("\x00", "\\x00") for n, text, _ in bad)
    assert all(b.text(i) == lines[int(n) - 1] for b in blocks for i, n in enumerate(b.line))


CLEAN = data(trades(3_000))
ARCHIVES = {
    "deflated.zip": zipped(CLEAN), "stored.zip": zipped(CLEAN, how=zipfile.ZIP_STORED), "csv.gz": gzip.compress(CLEAN, 6, mtime=0), "bzip2.zip": zipped(CLEAN, how=zipfile.ZIP_BZIP2),
}  # fmt: skip


def parquet() -> bytes:
    out = io.BytesIO()
    n = 3_000
    table = {
        "id": np.arange(n),
        "price": np.full(n, 1.5),
        "qty": np.ones(n),
        "quote_qty": np.full(n, 1.5),
        "time": FIRST_MS + np.arange(n),
        "is_buyer_maker": np.arange(n) % 3 == 0,
    }
    pq.write_table(pa.table(table), out, data_page_size=4096)
    return out.getvalue()


ARCHIVES["parquet"] = parquet()
WHOLE = {name: name != "bzip2.zip" for name in ARCHIVES}


@pytest.mark.parametrize("form", [name for name in ARCHIVES if name != "bzip2.zip"])
def test_whole_archives_are_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"{NAME}.{form}"
    path.write_bytes(ARCHIVES[form])
    result = outcome(path, symbol="BTCUSDT")
    assert result is not None and result[0] + len(result[1]) == 3_000


@given(
    st.sampled_from(sorted(ARCHIVES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
    st.floats(0, 1),
)
@hypothesis_settings(fuzz, max_examples=300)
def test_damaged_archives_never_pass_for_whole(tmp_path: Path, form: str, flips: list[tuple[float, int]], cut: float) -> None:
    clean = ARCHIVES[form]
    content = bytearray(clean)
    for at, change in flips:
        content[int(at * len(content))] ^= change
    content = content[: round((0.5 + cut) * len(content))]
    path = tmp_path / f"{NAME}.{form}"
    path.write_bytes(content)
    result = outcome(path, symbol="BTCUSDT")
    if result is not None and "parquet" not in form:  # Parquet has no checksum by default; text behind a checksum is what was written
        assert result == (3_000, [])


@given(st.binary(max_size=200), st.binary(max_size=60))
@hypothesis_settings(fuzz, max_examples=150)
def test_zip_and_gzip_heads_with_any_rest(tmp_path: Path, content: bytes, end: bytes) -> None:
    path = tmp_path / f"{NAME}.zip"
    for head in (b"PK\x03\x04", b"\x1f\x8b\x08", b"PK\x05\x06"):
        path.write_bytes(head + content + end)
        outcome(path)
        path.write_bytes(head + content + b"PK\x01\x02" + end + b"PK\x05\x06" + end)
        outcome(path)


# --- archives -----------------------------------------------------------------------------------------------------------------------------


def test_a_bomb_is_stopped_early(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open(f"{NAME}.csv", "w", force_zip64=True) as member:
        member.write(data(trades(10)))
        for _ in range(200):
            member.write(b"\n" * (1 << 20))
    packed = tmp_path / f"{NAME}.csv.gz"
    packed.write_bytes(gzip.compress(data(trades(10)) + b"\n" * (200 << 20), 9))
    for file in (path, packed):
        taken = 0
        with pytest.raises(SchemaError, match="200 times"), open_text(file) as (stream, _):
            while piece := stream.read(1 << 20):
                taken += len(piece)
        assert taken <= 66 << 20


def test_the_thread_ends_with_its_reader(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.zip"
    path.write_bytes(zipped(data(trades(100_000))))
    reader = read_blocks(path, inspect_file(path))
    next(reader)
    reader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decompress")]


def test_a_zip_longer_than_four_gigabytes_is_told_by_its_directory(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open(f"{NAME}.csv", "w", force_zip64=True) as member:
        member.write(data(trades(500)))
    assert outcome(path) == (500, [])


@pytest.mark.parametrize(
    ("name", "member", "good"),
    [
        (NAME, NAME, True), ("dump", NAME, True), (NAME, "dump", True), (NAME + "-copy", NAME, True), (NAME, "ETHUSDT-trades-2024-01-05", False), (NAME, "BTCUSDT-aggTrades-2024-01-05", False), (NAME, "BTCUSDT-trades-2024-01-06", False),
    ],
)  # fmt: skip
def test_a_member_must_be_what_the_zip_says(tmp_path: Path, name: str, member: str, good: bool) -> None:
    path = tmp_path / f"{name}.zip"
    path.write_bytes(zipped(data(trades(10)), member + ".csv"))
    assert (outcome(path) == (10, [])) == good
    if good:
        assert inspect_file(path).symbol == "BTCUSDT" and inspect_file(path).period == (FIRST_MS * 1000, FIRST_MS * 1000 + 86_400_000_000)


# --- markets and periods ------------------------------------------------------------------------------------------------------------------

UM = {
    "trades": "id,price,qty,quote_qty,time,is_buyer_maker\n1,5.0,1,5,1704412800000,false\n",
    "aggTrades": "agg_trade_id,price,quantity,first_trade_id,last_trade_id,transact_time,is_buyer_maker\n1,5.0,1,7,9,1704412800000,true\n",
    "1h": "open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume,ignore\n1704412800000,1,2,1,2,5,1704416399999,7,3,2,3,0\n",
}  # fmt: skip


@pytest.mark.parametrize("what", UM)
@pytest.mark.parametrize("header", [True, False])
def test_futures_are_told_where_they_can_be(tmp_path: Path, what: str, header: bool) -> None:
    path = tmp_path / f"BTCUSDT-{what}-2024-01-05.csv"
    path.write_text(UM[what] if header else UM[what].split("\n", 1)[1])
    told = header or what != "1h"  # candles without a header look like spot's
    assert inspect_file(path).market == ("um" if told else "spot")
    assert inspect_file(path, market="um").market == inspect_file(path, f"s3://raw/data/futures/um/daily/{path.name}").market == "um"
    assert inspect_file(path, f"s3://raw/data/spot/daily/{path.name}").market == "spot"
    assert outcome(path) == (1, [])


def test_rows_outside_the_period_of_the_name_are_bad(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.csv"
    path.write_bytes(
        data(
            [
                *trades(3),
                f"4,1,1,1,{FIRST_MS - 1},True,True",
                f"5,1,1,1,{FIRST_MS + 86_400_000},True,True",
                f"6,1,1,1,{FIRST_MS * 1000},True,True",
            ]
        )
    )
    result = outcome(path)
    assert result is not None and (result[0], [n for n, _, _ in result[1]]) == (4, [4, 5])
    assert {reason for _, _, reason in result[1]} == {"ts is outside the file's period, 2024-01-05T00:00 to 2024-01-06T00:00"}


def test_a_week_may_begin_before_its_month(tmp_path: Path) -> None:
    path = tmp_path / "BTCUSDT-1w-2024-02.csv"
    monday = 1_706_486_400_000  # 2024-01-29
    path.write_text(f"{monday},1,2,1,2,5,{monday + 604_799_999},7,3,2,3,0\n{monday - 604_800_000},1,2,1,2,5,{monday - 1},7,3,2,3,0\n")
    result = outcome(path)
    assert result is not None and (result[0], [n for n, _, _ in result[1]]) == (1, [2])


def test_spec_has_defaults() -> None:
    spec = FileSpec("BTCUSDT", "trades", None, "text", LAYOUTS["trades"][7], False)
    assert (spec.market, spec.period) == ("spot", None)


def test_a_path_may_be_text_and_seconds_get_their_remedy(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.csv"
    path.write_bytes(data(trades(3)))
    assert inspect_file(str(path)) == inspect_file(path)
    path.write_text(f"1,100.5,2,201.0,{FIRST_MS // 1000},True,True\n")
    with pytest.raises(SchemaError, match="Multiply the times by 1000"):
        inspect_file(path)


HEADERS = {  # of candles, with what must become of open and close, or a word of the refusal
    "Datetime,Close,High,Low,Open,Volume": (95.0, 105.0),
    "date,close,high,low,open,volume": (95.0, 105.0),
    "Zeit,Close,High,Low,Open,Volume": "not understood Zeit",
    "date,close,high,low,open,vol": "missing volume, not understood vol",
    "when,last,top,bottom,first,amount": "missing",
    '"When","Close","High","Low","Open","Volume"': "When",
    "time,timestamp,high,low,open,volume": "time and timestamp",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_never_read_by_position(tmp_path, header):
    file = tmp_path / "ABCUSD-1h.csv"
    rows = [f"2024-01-{1 + h // 24:02}T{h % 24:02}:00:00+00:00,105,110,90,95,10" for h in range(240)]
    file.write_text("\n".join([header, *rows]) + "\n")
    wanted = HEADERS[header]
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"))) as con:
        if isinstance(wanted, str):
            with pytest.raises(SchemaError, match=wanted):
                process_file(con, str(file), symbol="ABCUSD", kind="klines", interval="1h")
            assert con.execute("SELECT count(*) FROM candles").fetchone() == (0,)
        else:
            found = process_file(con, str(file), symbol="ABCUSD", kind="klines", interval="1h")
            assert (found.rows, found.rejected) == (240, 0)
            assert con.execute("SELECT DISTINCT open, close FROM candles").fetchall() == [wanted]


def test_a_kind_that_does_not_exist_is_told_with_the_nearest(tmp_path):
    (tmp_path / "a.csv").write_text("date,open,high,low,close,volume\n")
    with pytest.raises(SchemaError, match=r"found 'candels'\. Did you mean candles\?"):
        inspect_file(tmp_path / "a.csv", symbol="ABCUSD", kind="candels", interval="1h")

@pytest.mark.parametrize("symbol", ["BTC,USDT", "BTCUSDT,", '"BTCUSDT"', "BTC USDT!", "BTC\nUSDT"])
def test_a_symbol_that_is_none_is_refused_in_parquet_as_in_text(tmp_path, symbol):
    rows = pa.table({"note": ["a,b"] * 9, "trade_id": range(1, 10), "price": [1.0] * 9, "qty": [1.0] * 9, "time": range(FIRST_MS, FIRST_MS + 9)})
    pq.write_table(rows.append_column("symbol", [[symbol] * 9]), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match="a symbol such as BTCUSDT"):
        inspect_file(tmp_path / "a.parquet", kind="trades")


def test_commas_of_a_parquet_file_do_not_shift_its_columns(tmp_path):
    columns = {"note, by hand": ["a,b"] * 9, "trade_id": [*range(1, 9), None], "symbol": ["BTCUSDT"] * 9, "price": [1.0] * 9, "qty": [2.0] * 9}
    pq.write_table(pa.table(columns | {"time": range(FIRST_MS, FIRST_MS + 9)}), tmp_path / "a.parquet")
    spec = inspect_file(tmp_path / "a.parquet", kind="trades")
    (block,) = read_blocks(tmp_path / "a.parquet", spec)
    assert spec.symbol == "BTCUSDT" and set(block.columns["price"]) == {1.0}
    ((_, raw, _),) = block.bad
    assert fields_of(raw)[:3] == ["a,b", "None", "BTCUSDT"]
