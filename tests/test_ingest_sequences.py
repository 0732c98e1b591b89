"Random orders of loading, correcting and forgetting overlapping files against a plain model of what must be there."
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import NewStore

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import forget_file, process_file
from cryptoresearch.data.maintenance import verify
from cryptoresearch.data.status import gap_table
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import CryptoResearchError

DAY_MS, BEGIN_MS, DAYS, A_DAY = 86_400_000, 1_704_067_200_000, 4, 40  # from 2024-01-01
Row = tuple[int, float, float, int, bool]  # id, price, qty, ts (ms), buyer was the maker


def market(rng: random.Random) -> list[Row]:
    "Four days of trades without a hole."
    rows: list[Row] = []
    price = 100.0
    for day in range(DAYS):
        ts = BEGIN_MS + day * DAY_MS
        for _ in range(A_DAY):
            ts += rng.randint(1, DAY_MS // (A_DAY + 5))
            price = round(price * (1 + rng.uniform(-0.01, 0.01)), 2)
            rows.append((len(rows) + 1, price, round(rng.uniform(0.1, 2), 3), ts, rng.random() < 0.5))
    return rows


def write_rows(file: Path, rows: list[Row]) -> Path:
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{i},{p:.8f},{q:.8f},{p * q:.8f},{t},{m},True\n" for i, p, q, t, m in rows))
    return file


def make_file(rng: random.Random, folder: Path, rows: list[Row]) -> tuple[Path, list[Row]]:
    "A day, the month, a corrected day, a day with holes, or a day under another name."
    what, day = rng.choice(["day", "day", "month", "corrected", "holes", "renamed"]), rng.randrange(DAYS)
    part = [r for r in rows if what == "month" or (r[3] - BEGIN_MS) // DAY_MS == day]
    if what == "corrected":
        part = [(i, round(p + rng.choice([0, 0, 0.01]), 2), q, t, m) for i, p, q, t, m in part]
    if what == "holes":
        part = [r for r in part if rng.random() < 0.6]
    name = "BTCUSDT-trades-2024-01.csv" if what == "month" else f"BTCUSDT-trades-2024-01-{day + 1:02}.csv" if what in ("day", "corrected") else "part.csv"
    return write_rows(folder / name, part), part


def stored(con: Any) -> dict[int, tuple[float, float, int]]:
    "Trades by id; no id may be there twice."
    rows = con.sql("SELECT trade_id, price, qty, epoch_ms(ts) FROM trades").fetchall()
    assert len({r[0] for r in rows}) == len(rows), "a trade is there twice"
    return {i: (p, q, t) for i, p, q, t in rows}


def check(con: Any, model: dict[int, tuple[float, float, int]], digests: bool) -> None:
    "The store is the model, its ledger true, and its gaps are the ids that lack; with `digests`, all files are read again."
    assert stored(con) == model
    ledger = dict(con.sql("SELECT file_id, rows FROM ingest_ledger WHERE rows > 0").fetchall())
    assert ledger == dict(con.sql("SELECT file_id, count(*) FROM trades GROUP BY 1").fetchall())
    assert not digests or verify(con).ok
    told: set[int] = set()
    if model:
        gaps = gap_table(con).dropna(subset=["first_missing_id"])
        told = {i for a, b in gaps[["first_missing_id", "last_missing_id"]].to_numpy() for i in range(int(a), int(b) + 1)}
    assert told == set(range(min(model, default=0), max(model, default=0) + 1)) - set(model) - ({0} if not model else set())


def all_bars(con: Any) -> list[Any]:
    for spec in ("1h", "tick:7"):
        make_bars(con, "BTCUSDT", spec)
    # the tick rule's side depends on the file that a trade came in
    return con.sql("SELECT * EXCLUDE (buy_volume_tick, threshold) FROM bars ORDER BY kind, spec, ts, first_id").fetchall()  # type: ignore[no-any-return]


@pytest.mark.slow
# just far enough for a month, holes, a forgotten and a corrected file
@pytest.mark.parametrize(("seed", "steps"), [(15, 3), (18, 4), (23, 7), *(pytest.param(seed, 10, marks=pytest.mark.heavy) for seed in (15, 18, 23))])
def test_any_order_leaves_what_a_plain_model_says(tmp_path: Path, new_store: NewStore, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    rows, con = market(rng), init_duckdb(new_store(tmp_path / "store", duckdb_threads=2))
    model: dict[int, tuple[float, float, int]] = {}
    for step in range(steps):
        chance = rng.random()
        if chance < 0.12 and model:
            file_id = rng.choice(con.sql("SELECT file_id FROM ingest_ledger WHERE rows > 0 ORDER BY 1").fetchall())[0]
            gone = {r[0] for r in con.execute("SELECT trade_id FROM trades WHERE file_id = ?", [file_id]).fetchall()}
            assert forget_file(con, file_id) == len(gone)
            model = {i: v for i, v in model.items() if i not in gone}
        elif chance < 0.3 and model:
            all_bars(con)
        else:
            file, part = make_file(rng, tmp_path / str(step), rows)
            try:
                if not process_file(con, file, symbol="BTCUSDT", kind="trades").already_loaded:
                    replaced = set(stored(con)) ^ (set(model) | {r[0] for r in part})  # a newer version of a file takes its older rows along
                    assert replaced <= set(model) - {r[0] for r in part}
                    model = {i: v for i, v in model.items() if i not in replaced} | {i: (p, q, t) for i, p, q, t, _ in part}
            except CryptoResearchError:
                pass  # then nothing may have changed
        check(con, model, digests=step == steps - 1 or steps == 10)
    if model:
        whole = init_duckdb(new_store(tmp_path / "whole", duckdb_threads=2))
        found = con.sql("SELECT trade_id, price, qty, epoch_ms(ts), side_reported < 0 FROM trades ORDER BY trade_id").fetchall()
        process_file(whole, write_rows(tmp_path / "whole.d" / "all.csv", found), symbol="BTCUSDT", kind="trades", check_symbol=False)
        assert all_bars(con) == all_bars(whole)
