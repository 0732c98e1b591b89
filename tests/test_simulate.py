"""Test the simulated exchange where a notebook cannot: every kind of corruption through the loader, a mirror on a server, memory, other processes."""

import csv
import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from conftest import NewStore
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from notebook_runner import Runner

from cryptoresearch.data.archive import fetch_day
from cryptoresearch.data.corruption import KINDS as DIRT
from cryptoresearch.data.corruption import Corruption, soil
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.simulate import _PIECE, CAPITAL, csv_text, LOWER, Market, simulate_archive, simulate_trades
from cryptoresearch.data.status import gap_table
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import SchemaError
from cryptoresearch.settings import Settings

DAY = "2024-01-02"
OpenStore = Callable[[Path], duckdb.DuckDBPyConnection]


@pytest.fixture(scope="session")
def open_store(new_store: NewStore) -> OpenStore:
    "Makes a store without rows in a folder and opens it."
    return lambda folder: init_duckdb(new_store(folder, duckdb_threads=2))


def text_of(path: Path) -> str:
    if path.suffix != ".zip":
        return path.read_text()
    with zipfile.ZipFile(path) as z:
        (name,) = z.namelist()
        assert name == f"{path.stem}.csv"
        return z.read(name).decode()


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text_of(path))))


def stored(con: duckdb.DuckDBPyConnection) -> list[Any]:
    "Trades by id, or candles by open time (µs); the tick rule's side comes last."
    if con.execute("SELECT count(*) FROM candles").fetchall() != [(0,)]:
        return con.execute("SELECT epoch_us(ts), ts, close_ts, open, high, low, close, volume, quote_volume, trades, buy_volume, NULL FROM candles ORDER BY ts").fetchall()
    return con.execute("SELECT trade_id, ts, price, qty, quote_qty, side_reported, n_trades, side_tick FROM trades ORDER BY trade_id").fetchall()


# --- corruption through the loader ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "A day of simulated trades, the same as aggregated trades, the day before, and another month's day."
    folder = tmp_path_factory.mktemp("clean")
    candles = simulate_archive(folder / "k", "SIMUSDT", "2024-01-01", 2, 6_000, kinds=("klines",), form="csv")
    (other_candles,) = simulate_archive(folder / "l", "SIMUSDT", "2023-11-20", 1, 6_000, seed=1, kinds=("klines",), form="csv")
    before, trades, _, aggregates = simulate_archive(folder / "a", "SIMUSDT", "2024-01-01", 2, 6_000, kinds=("trades", "aggTrades"), form="csv")
    other = simulate_archive(folder / "b", "SIMUSDT", "2023-11-20", 1, 6_000, seed=1, kinds=("trades", "aggTrades"), form="csv")
    (futures,) = simulate_archive(folder / "um", "SIMUSDT", DAY, 1, 6_000, venue="um", form="csv")
    return {"trades": trades, "aggTrades": aggregates, "um": futures, "other trades": other[0], "other aggTrades": other[1], "before": before, "klines": candles[1], "candles before": candles[0], "other klines": other_candles}


@pytest.fixture(scope="module")
def clean_rows(clean: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, open_store: OpenStore) -> dict[str, list[Any]]:
    out = {}
    for kind in ("trades", "aggTrades", "um", "klines"):
        with open_store(tmp_path_factory.mktemp("store")) as con:
            process_file(con, clean[kind])
            out[kind] = stored(con)
    return out


def check(con: duckdb.DuckDBPyConnection, dirt: Corruption, rows: list[Any]) -> None:
    "What the table of kinds expects of a loader."
    if dirt.outcome == "refused":
        with pytest.raises(SchemaError, match=r"expected .*; found "):
            process_file(con, dirt.path)
        assert con.execute("SELECT (SELECT count(*) FROM trades), (SELECT count(*) FROM candles)").fetchone() == (0, 0)
        assert con.execute("SELECT coalesce(sum(rows), 0) FROM ingest_ledger").fetchone() == (0,)
        assert con.execute("SELECT count(*) FROM coverage").fetchone() == (0,)
        return
    result = process_file(con, dirt.path)
    have = stored(con)
    assert result.source == "simulated"
    assert result.rows == len(have) == dirt.rows
    step = 1 if result.kind != "klines" else 60_000_000
    lost = {i for first, last in dirt.lost for i in range(first, last + 1, step)}
    ends = {row[0] for row in rows} - {row[0] for row in have} - lost  # after the last good row
    assert {row[0] for row in have} | lost | ends == {row[0] for row in rows}
    whole = {row[0]: row for row in rows}
    assert all(row[:-1] == whole[row[0]][:-1] for row in have)  # the tick rule's side depends on the rows before
    # each bad line is accounted for: in quarantine with its number, or as a repetition word for word
    lines = {row[0] for row in con.execute("SELECT line FROM quarantine").fetchall()}
    (duplicates,) = con.execute("SELECT coalesce(sum(duplicates), 0) FROM ingest_ledger").fetchone() or (0,)
    assert lines <= set(dirt.bad)
    assert len(lines) + duplicates == len(dirt.bad), (len(lines), duplicates, len(dirt.bad))
    if dirt.kind != "repeated_ids":
        assert lines == set(dirt.bad)
    gaps = con.execute("SELECT first_missing_id, last_missing_id FROM gaps WHERE first_missing_id IS NOT NULL ORDER BY 1").fetchall()
    if result.kind == "klines":
        gaps = con.execute("SELECT epoch_us(start_ts), epoch_us(end_ts) - ? FROM gaps ORDER BY 1", [step]).fetchall()
    assert [g for g in gaps if g[0] <= have[-1][0]] == list(dirt.lost)


@pytest.mark.parametrize("layout", ["trades", pytest.param("aggTrades", marks=pytest.mark.heavy), "klines"])
@pytest.mark.parametrize("kind", [k for k in DIRT if k not in ("corrected", "renamed", "other_prices", "ends_early")])
def test_dirt_has_its_outcome(kind: str, layout: str, clean: dict[str, Path], clean_rows: dict[str, list[Any]], tmp_path: Path, open_store: OpenStore) -> None:
    dirt = soil(clean[layout], kind, tmp_path / "dirty", seed=3, other=clean[f"other {layout}"])
    with open_store(tmp_path / "store") as con:
        check(con, dirt, clean_rows[layout])


@pytest.mark.parametrize("kind", ["garbage_lines", "missing_ids", "bad_prices", "repeated_ids", "out_of_order"])
def test_dirt_below_a_header_has_its_outcome(kind: str, clean: dict[str, Path], clean_rows: dict[str, list[Any]], tmp_path: Path, open_store: OpenStore) -> None:
    dirt = soil(clean["um"], kind, tmp_path / "dirty", seed=3)
    with open_store(tmp_path / "store") as con:
        check(con, dirt, clean_rows["um"])


@pytest.mark.parametrize("kind", ["garbage_lines", "wrong_columns", "bad_prices", "bad_quantities", "outside_period"])
def test_too_much_dirt_refuses_the_file(kind: str, clean: dict[str, Path], tmp_path: Path, open_store: OpenStore) -> None:
    dirt = soil(clean["trades"], kind, tmp_path / "dirty", share=0.05)
    with open_store(tmp_path / "store") as con:
        with pytest.raises(SchemaError):
            process_file(con, dirt.path)
        assert con.execute("SELECT count(*) FROM trades").fetchone() == (0,)
        result = process_file(con, dirt.path, max_rejected=0.1)
        assert (result.rows, result.rejected) == (dirt.rows, len(dirt.bad))


@pytest.mark.parametrize("layout", ["trades", "klines"])
def test_a_file_that_ends_early_leaves_a_gap_to_its_end(layout: str, clean: dict[str, Path], clean_rows: dict[str, list[Any]], tmp_path: Path, open_store: OpenStore) -> None:
    dirt, end = soil(clean[layout], "ends_early", tmp_path / "dirty"), "ts" if layout == "trades" else "close_ts"
    with open_store(tmp_path / "store") as con:
        result = process_file(con, dirt.path)
        assert result.rows == dirt.rows < len(clean_rows[layout])
        (last,) = con.execute(f"SELECT max({end}) FROM {'trades' if layout == 'trades' else 'candles'}").fetchone() or (None,)
        assert con.execute("SELECT max(end_ts) FROM coverage").fetchone() == (last,)  # nothing is claimed beyond
        late = gap_table(con).query("kind == 'bounds'").iloc[-1]
        assert (late["start"].tz_localize(None), str(late["end"].date())) == (last, "2024-01-03")


@pytest.mark.parametrize("layout", ["trades", "klines"])
def test_the_same_content_under_another_name_adds_nothing(layout: str, clean: dict[str, Path], clean_rows: dict[str, list[Any]], tmp_path: Path, open_store: OpenStore) -> None:
    dirt = soil(clean[layout], "renamed", tmp_path / "dirty")
    with open_store(tmp_path / "store") as con:
        process_file(con, clean[layout])
        result = process_file(con, dirt.path)
        assert result.already_loaded and stored(con) == clean_rows[layout]


@pytest.mark.parametrize("layout", ["trades", "klines"])
@pytest.mark.parametrize("first", ["clean", "corrected"])
def test_the_later_version_of_a_file_wins(first: str, layout: str, clean: dict[str, Path], clean_rows: dict[str, list[Any]], tmp_path: Path, open_store: OpenStore) -> None:
    dirt = soil(clean[layout], "corrected", tmp_path / "dirty")
    both = [clean[layout], dirt.path]
    with open_store(tmp_path / "store") as con:
        for path in both if first == "clean" else both[::-1]:
            process_file(con, path)
        have = stored(con)
        assert len(have) == len(clean_rows[layout])
        changed = {row[0] for row, was in zip(have, clean_rows[layout], strict=True) if row[3] != was[3] or row[7] != was[7]}
        assert changed == (set(dirt.changed) if first == "clean" else set())
        assert con.execute("SELECT sum(rows) FROM ingest_ledger").fetchone() == (len(have),)


@pytest.mark.parametrize("layout", ["trades", "klines"])
def test_prices_of_another_symbol_are_refused_beside_known_ones(layout: str, clean: dict[str, Path], tmp_path: Path, open_store: OpenStore) -> None:
    dirt = soil(clean[layout], "other_prices", tmp_path / "dirty")
    with open_store(tmp_path / "store") as con:
        process_file(con, clean["before" if layout == "trades" else "candles before"])
        before = stored(con)
        with pytest.raises(SchemaError):
            process_file(con, dirt.path)
        assert stored(con) == before


@pytest.mark.parametrize("layout", ["trades", pytest.param("klines", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("kind", DIRT)
def test_dirt_is_deterministic_and_says_so(kind: str, layout: str, clean: dict[str, Path], tmp_path: Path) -> None:
    made = [soil(clean[layout], kind, tmp_path / str(i), seed=5, other=clean[f"other {layout}"]) for i in (1, 2)]
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    assert (made[0].bad, made[0].lost, made[0].changed) == (made[1].bad, made[1].lost, made[1].changed)
    assert "SIMULATED" in (made[0].path.parent / "SIMULATED.txt").read_text()
    if kind != "renamed":
        assert made[0].path.read_bytes() != clean[layout].read_bytes()


# --- files -----------------------------------------------------------------------------------------------------------------------------------


@hypothesis_settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20), st.integers(0, 8), st.booleans())
def test_text_of_numbers_is_exact(numbers: list[int], decimals: int, padded: bool) -> None:
    whole, flags = np.array(numbers, np.int64), np.arange(len(numbers)) % 2 == 0
    lines = bytes(csv_text([whole, whole, flags, flags], [0, decimals, CAPITAL, LOWER], 8 if padded else None)).decode().splitlines()
    for n, flag, line in zip(numbers, flags.tolist(), lines, strict=True):
        tail = f"{n % 10**decimals:0{decimals}d}" if decimals else ""
        point = f"{n // 10**decimals}.{tail}" + ("0" * (8 - decimals) if padded else "") if decimals else str(n)
        assert line == f"{n},{point},{flag},{str(flag).lower()}"


def scaled(path: Path, columns: dict[int, int]) -> list[np.ndarray]:
    "Columns of a file as whole numbers, each times ten to the given power."
    header = None if text_of(path)[0].isdigit() else 0
    frame = pd.read_csv(path, header=header)
    return [np.rint(frame.iloc[:, i].to_numpy(float) * 10**power).astype(np.int64) for i, power in columns.items()]


@pytest.mark.parametrize("venue", ["spot", "um"])
def test_aggregated_trades_and_candles_are_those_of_the_trades(venue: str, tmp_path: Path) -> None:
    paths = simulate_archive(tmp_path, "SIMUSDT", "2024-12-31", 2, 220_000, kinds=("trades", "aggTrades", "klines"), intervals=("1m", "8h", "1d"), venue=venue)
    next_id = 1
    for i in range(2):
        trades, aggregates, *candles = paths[i::2]
        assert text_of(trades)[0].isalpha() == (venue == "um")
        ids, price, qty, quote, time, sold = scaled(trades, {0: 0, 1: 2, 2: 5, 3: 7, 4: 0, 5: 0})
        assert len(ids) > 100_000 and (ids == np.arange(next_id, next_id + len(ids))).all() and (np.diff(time) >= 0).all() and (quote == price * qty).all()
        next_id += len(ids)
        a_price, a_qty, first, last, a_time, a_sold = scaled(aggregates, {1: 2, 2: 5, 3: 0, 4: 0, 5: 0, 6: 0})
        first, last = first - ids[0], last - ids[0]
        assert first[0] == 0 and last[-1] == len(ids) - 1 and (first[1:] == last[:-1] + 1).all() and (last > first).mean() > 0.1
        assert (np.add.reduceat(qty, first) == a_qty).all()
        for one, many in ((a_price, price), (a_time, time), (a_sold, sold)):
            assert (np.repeat(one, last - first + 1) == many).all()
        unit = 1000 if venue == "spot" and i == 1 else 1
        for path, length in zip(candles, (60_000 * unit, 28_800_000 * unit, 86_400_000 * unit), strict=True):
            opens, o, h, low, c, volume, close_time, quote_volume, count, bought, bought_quote = scaled(path, {0: 0, 1: 2, 2: 2, 3: 2, 4: 2, 5: 5, 6: 0, 7: 7, 8: 0, 9: 5, 10: 7})
            assert (np.diff(opens) == length).all() and len(opens) == 86_400_000 * unit // length and (close_time == opens + length - 1).all()
            at = np.flatnonzero(np.diff(time // length, prepend=-1))
            full, end = count > 0, np.append(at[1:], len(ids)) - 1
            assert (opens[full] == time[at] // length * length).all()
            assert (o[full] == price[at]).all() and (c[full] == price[end]).all()
            assert (h[full] == np.maximum.reduceat(price, at)).all() and (low[full] == np.minimum.reduceat(price, at)).all()
            for have, want in ((volume, qty), (quote_volume, quote), (count, np.ones_like(qty)), (bought, qty * (1 - sold)), (bought_quote, quote * (1 - sold))):
                assert (have[full] == np.add.reduceat(want, at)).all()


def test_quiet_markets_have_candles_without_trades(tmp_path: Path) -> None:
    (trades, _, candles, second) = simulate_archive(tmp_path, days=2, trades_per_day=200, kinds=("trades", "klines"), form="csv")
    rows = rows_of(candles)
    empty = [i for i, row in enumerate(rows) if row[8] == "0"]
    assert len(empty) > 1000 and all(rows[i][1:6] == [rows[i - 1][4]] * 4 + ["0.00000000"] for i in empty)
    first = int(rows_of(trades)[0][4]) // 60_000 * 60_000
    opens = [int(row[0]) for path in (candles, second) for row in rows_of(path)]
    assert opens == list(range(first, 1_704_067_200_000 + 2 * 86_400_000, 60_000))


def test_months_hold_the_days(tmp_path: Path) -> None:
    daily = simulate_archive(tmp_path / "d", start="2024-01-30", days=4, trades_per_day=2_000, kinds=("trades", "klines"), intervals=("1h",), form="csv")
    monthly = simulate_archive(tmp_path / "m", start="2024-01-30", days=4, trades_per_day=2_000, kinds=("trades", "klines"), intervals=("1h", "1w"), form="csv", monthly=True)
    assert [p.name for p in monthly] == [f"SIMUSDT-{kind}-2024-0{m}.csv" for kind in ("trades", "1h") for m in (1, 2)]  # no whole week is in it
    for kind in ("trades", "1h"):
        text = "".join(p.read_text() for p in daily if f"-{kind}-" in p.name)
        assert text == "".join(p.read_text() for p in monthly if f"-{kind}-" in p.name)
    weeks = simulate_archive(tmp_path / "w", start="2024-01-01", days=22, trades_per_day=500, kinds=("klines",), intervals=("1w", "3d"), form="csv", monthly=True)
    opens = [date.fromtimestamp(int(row[0]) // 1000) for row in rows_of(weeks[0])]
    assert [d.isoweekday() for d in opens] == [1, 1, 1]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_tree_is_a_mirror(settings: Settings, tmp_path: Path, open_store: OpenStore) -> None:
    paths = simulate_archive(tmp_path / "mirror", "SIMUSDT", DAY, 1, 2_000, kinds=("trades", "klines"), tree=True)
    for path in paths:
        digest, name = (path.parent / f"{path.name}.CHECKSUM").read_text().split()
        assert (digest, name) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.name)
    with served(tmp_path / "mirror") as url, open_store(tmp_path / "store") as con:
        got = [fetch_day("SIMUSDT", date.fromisoformat(DAY), kind, folder=tmp_path / "got", settings=settings.model_copy(update={"archive_url": url})) for kind in ("trades", "klines")]
        assert [p.read_bytes() for p in got] == [p.read_bytes() for p in paths]
        # a downloaded zip has no SIMULATED.txt next to it, and is still marked as simulated
        assert not (tmp_path / "got" / "SIMULATED.txt").exists()
        assert process_file(con, got[0]).source == "simulated"


@pytest.mark.slow
@pytest.mark.parametrize(("days", "trades_per_day"), [(1, 210_000), pytest.param(2, 450_000, marks=pytest.mark.heavy)])  # two pieces a day, and three
def test_the_text_is_the_same_in_another_process_and_on_one_thread(tmp_path: Path, runner: Runner, days: int, trades_per_day: int) -> None:
    assert trades_per_day > _PIECE, "one piece a day: threads have nothing to share"
    code = f"import sys\nfrom cryptoresearch.data.simulate import simulate_archive\nsimulate_archive(sys.argv[1], days={days}, trades_per_day={trades_per_day}, kinds=('trades', 'aggTrades', 'klines'))"
    one = "import os\nos.cpu_count = lambda: 1\n" + code
    other = os.environ | {"PYTHONHASHSEED": "1"}  # another order of sets; forks of the runner share theirs
    for done in (
        runner.call(code, [str(tmp_path / "a")], dict(os.environ), tmp_path),
        subprocess.run([sys.executable, "-c", one, str(tmp_path / "b")], env=other, capture_output=True, text=True, check=False),
    ):
        assert done.returncode == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / "a").glob("*.zip"))
    assert len(files) == 3 * days and [text_of(tmp_path / "a" / n) for n in files] == [text_of(tmp_path / "b" / n) for n in files]


def test_nothing_is_left_of_an_interrupted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptoresearch.data import simulate

    def broken(*args: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(simulate, "_aggregate_rows", broken)
    with pytest.raises(OSError, match="no space"):
        simulate_archive(tmp_path, days=1, trades_per_day=1_000, kinds=("trades", "aggTrades"))
    assert [p.name for p in tmp_path.iterdir()] == ["SIMULATED.txt"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process's memory from Linux's /proc")
def test_memory_does_not_grow_with_the_size(tmp_path: Path) -> None:
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom cryptoresearch.data.simulate import simulate_archive\n"
        "simulate_archive(sys.argv[1], days=1, trades_per_day=int(sys.argv[2]), form='zip')\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"  # kB; ru_maxrss would count this process's memory at the fork
    )
    peak = [int(subprocess.run([sys.executable, "-c", code, str(tmp_path / n), n], check=True, capture_output=True, text=True).stdout) * 1024 for n in ("400000", "4000000")]
    assert peak[1] - peak[0] < 150e6 and peak[1] < 700e6, peak


# --- the planted signal -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_signal_shows_in_the_order_flow_and_only_when_planted(tmp_path: Path) -> None:
    "Ten minutes' balance of orders against the next minute's return, five seeds of three days each."
    found = {}
    for signal in (0.0, 0.1, 0.3):
        found[signal] = np.array([balance_ic(simulate_trades(tmp_path / f"{signal}-{seed}", "SIMUSDT", days=3, trades_per_day=30_000, seed=seed, signal=signal)) for seed in range(5)])
    error = 1 / np.sqrt(5 * 3 * 1440)
    assert abs(found[0.0].mean()) < 4 * error, found
    assert found[0.1].mean() > 4 * error and found[0.3].mean() > 8 * error, found


def balance_ic(paths: list[Path]) -> float:
    con = duckdb.connect()
    columns = "{'id': 'BIGINT', 'price': 'DOUBLE', 'qty': 'DOUBLE', 'quote': 'DOUBLE', 't': 'BIGINT', 'sold': 'BOOLEAN', 'best': 'BOOLEAN'}"
    frame = con.execute(
        f"SELECT t // 60000 AS m, arg_max(price, id) AS close, avg(CASE WHEN sold THEN -1.0 ELSE 1.0 END) AS balance FROM read_csv({[str(p) for p in paths]}, header=false, columns={columns}) GROUP BY 1 ORDER BY 1"
    ).df()
    balance, ahead = frame.balance.rolling(10).mean(), np.log(frame.close).diff().shift(-1)
    return float(balance.corr(ahead))


def test_a_market_without_volatility_of_activity_still_runs(tmp_path: Path) -> None:
    (path,) = simulate_trades(tmp_path, days=1, trades_per_day=1_000, market=Market(activity_sd=0.0, memory=0.0, half_spread_bps=5.0), start="2024-01-06")
    assert 300 < len(rows_of(path)) < 2_000
