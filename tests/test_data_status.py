"What `data status` warns of: sides, quote amounts, repeated live frames, files that are cut short."
from pathlib import Path

import duckdb
import pytest

from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.event_bars import read_event_bars
from cryptoresearch.data.quality import daily
from cryptoresearch.data.status import data_status, read_trades, source_intervals, status
from cryptoresearch.data.store import write
from cryptoresearch.errors import ConfigError
from cryptoresearch.ingest.files import process_file
from cryptoresearch.live.replay import ReplayServer
from cryptoresearch.serving.queries import bars_page, read_predictions

BEGIN_MS, DAY_MS = 1_783_036_800_000, 86_400_000  # 2026-07-03
Con = duckdb.DuckDBPyConnection


def trades(n: int, sides: str, start_ms: int = BEGIN_MS, first: int = 1) -> list[str]:
    rows = [f"{first + i},{100 + i % 7},1,{100 + i % 7},{start_ms + i * 100},{'true' if sides[i % len(sides)] == 's' else 'false'}" for i in range(n)]
    return ["id,price,qty,quote_qty,time,is_buyer_maker", *rows]


def load(con: Con, path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")
    process_file(con, path, progress=False)


def verdict(con: Con) -> tuple[str, str]:
    row = status(con).iloc[0]
    return str(row["level"]), str(row["verdict"])


@pytest.mark.parametrize(("sides", "warned"), [("s", True), ("b", True), ("sb", False), ("ssssb", False)])
def test_one_sided_trades_are_not_usable(con: Con, tmp_path: Path, sides: str, warned: bool) -> None:
    load(con, tmp_path / "ABCUSDT-trades-2026-07-03.csv", trades(11, sides))
    level, text = verdict(con)
    assert ("sides not usable: all trades of 1 day have one side" in text) == warned
    assert level != "complete" or not warned
    assert (text in str(data_status(con)._repr_html_())) and "sides" not in status(con, silences=False)["verdict"].iloc[0]


def test_one_sided_days_among_others_are_counted(con: Con, tmp_path: Path) -> None:
    for day in range(5):
        lines = trades(40, "s" if day == 2 else "sb", BEGIN_MS + day * DAY_MS, 1 + 40 * day)
        load(con, tmp_path / f"ABCUSDT-trades-2026-07-{3 + day:02d}.csv", lines)
    assert "sides not usable: all trades of 1 day have one side" in verdict(con)[1]


def test_a_thin_market_has_one_sided_days(con: Con, tmp_path: Path) -> None:
    load(con, tmp_path / "ABCUSDT-trades-2026-07-03.csv", trades(5, "s"))
    assert "sides" not in verdict(con)[1]


@pytest.mark.parametrize(("table", "change", "text"), [
    ("trades", "quote_qty = 9e9 WHERE trade_id < 4", "3 quote amounts of 11 do not fit price and quantity"),
    ("trades", "quote_qty = quote_qty * 1.02", "11 quote amounts of 11"),
    ("trades", "quote_qty = quote_qty + 1e-7", None),
    ("candles", "quote_volume = 9e9 WHERE ts = (SELECT min(ts) FROM candles)", "1 quote amount of 3"),
    ("candles", "quote_volume = low * volume", None),
])  # fmt: skip
def test_quote_amounts_that_do_not_fit_are_counted(con: Con, tmp_path: Path, table: str, change: str, text: str | None) -> None:
    "As in a store of an older version: such files are refused now."
    if table == "trades":
        load(con, tmp_path / "ABCUSDT-trades-2026-07-03.csv", trades(11, "sb"))
    else:
        lines = [f"{BEGIN_MS + i * 60_000},10,12,9,11,5.5,{BEGIN_MS + (i + 1) * 60_000 - 1},60.5,42,2.5,27.5,0" for i in range(3)]
        load(con, tmp_path / "ABCUSDT-1m-2026-07-03.csv", lines)
    write(con, lambda c: c.execute(f"UPDATE {table} SET {change}"))
    assert (text in verdict(con)[1]) if text else "quote" not in verdict(con)[1]


@pytest.mark.parametrize(("name", "days", "text"), [
    ("ABCUSDT-trades-2026-07.csv", 7, "the first or last file is cut short by 25 d"),
    ("ABCUSDT-trades-2026-07-03.csv", 1, "the first or last day is cut short"),
])  # fmt: skip
def test_a_month_that_is_cut_short_says_by_how_much(con: Con, tmp_path: Path, name: str, days: int, text: str) -> None:
    lines = [line for day in range(days) for line in trades(40, "sb", BEGIN_MS - 2 * DAY_MS * (days > 1) + day * DAY_MS, 1 + 40 * day)[day > 0 :]]
    load(con, tmp_path / name, lines)
    assert text in verdict(con)[1]


READERS = {
    "read_bars": lambda con, a, b: read_bars(con, "ABCUSDT", "1m", start=a, end=b),
    "read_event_bars": lambda con, a, b: read_event_bars(con, "ABCUSDT", "tick:5", start=a, end=b),
    "read_trades": lambda con, a, b: read_trades(con, "ABCUSDT", a, b),
    "source_intervals": lambda con, a, b: source_intervals(con, "ABCUSDT", a, b),
    "daily": lambda con, a, b: daily(con, "ABCUSDT", "um.trades", a, b),
    "bars_page": lambda con, a, b: bars_page(con, "ABCUSDT", "1m", start=a, end=b),
    "read_predictions": lambda con, a, b: read_predictions(con, start=a, end=b),
    "ReplayServer": lambda con, a, b: ReplayServer(con, "ABCUSDT", a, b),
}


@pytest.mark.parametrize("reader", list(READERS))
def test_an_empty_range_is_called_empty_and_a_reversed_one_reversed(con: Con, tmp_path: Path, reader: str) -> None:
    load(con, tmp_path / "ABCUSDT-trades-2026-07-03.csv", trades(2000, "sb"))
    make_bars(con, "ABCUSDT", "1m")
    make_bars(con, "ABCUSDT", "tick:5")
    a, b = "2026-07-03 00:01", "2026-07-03 00:02"
    with pytest.raises(ConfigError, match=r"2026-07-03 00:01:00 UTC for both, an empty range.*Move the end") as empty:
        READERS[reader](con, a, a)
    assert "Swap" not in str(empty.value)
    with pytest.raises(ConfigError, match="Swap them"):
        READERS[reader](con, b, a)
    READERS[reader](con, a, b)  # the remedies


def test_a_page_outside_of_what_is_stored_is_empty(con: Con, tmp_path: Path) -> None:
    load(con, tmp_path / "ABCUSDT-trades-2026-07-03.csv", trades(2000, "sb"))
    make_bars(con, "ABCUSDT", "1m")
    for start, end in (("2025-01-01", "2025-01-02"), ("2027-01-01", "2027-01-02"), (None, "2025-01-01")):
        assert bars_page(con, "ABCUSDT", "1m", start=start, end=end)[0].empty
