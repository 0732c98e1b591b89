"Event bars against loops that follow their definitions word by word, in any pieces, and in a store where files come in any order."
import itertools
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import NewStore
from hypothesis import given, settings
from hypothesis import strategies as st

from cryptoresearch.data.aggregation import complete_trades, TRADE_COLUMNS
from cryptoresearch.data.event_bars import event_bars, event_spec, EventFolder, make_event_bars, read_event_bars
from cryptoresearch.ingest.files import forget_file, process_file
from cryptoresearch.data.store import init_duckdb, snapshot
from cryptoresearch.settings import Settings

few = settings(max_examples=60, deadline=None, derandomize=True)
SPECS = [f"{w}{kind}:{size}" for w, sizes in (("tick", (7, 50)), ("volume", (3, 40)), ("dollar", (400, 5000))) for kind, size in (("", sizes[0]), ("", sizes[1]), ("_imbalance", 12), ("_run", 12))]


def random_trades(n: int, seed: int, exact: bool = True) -> pd.DataFrame:
    "Trades with steps in whole cents and eighths, so that a plain loop adds exactly."
    rng = np.random.default_rng(seed)
    price = 100 + np.cumsum(rng.integers(-2, 3, n)) * 0.25
    qty = rng.integers(1, 40, n) / 8 if exact else np.round(rng.lognormal(0, 1, n), 5) + 1e-5
    tick = pd.Series(np.sign(np.diff(price, prepend=price[:1]))).replace(0, np.nan).ffill().fillna(0).astype(int)
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.cumsum(rng.integers(0, 3, n)), "ms")
    return pd.DataFrame({"trade_id": np.arange(5, 5 + n), "ts": ts, "price": price, "qty": qty, "quote_qty": price * qty, "n_trades": rng.integers(1, 4, n), "side_tick": tick, "side_reported": rng.choice([-1, 1], n)})


def by_the_book(t: pd.DataFrame, spec: str, cuts: set[int]) -> list[dict[str, Any]]:
    "One bar after the other; `cuts` are ids before which trades are missing."
    kind, size = spec.split(":")
    weight, mode = kind.split("_")[0], kind.split("_")[1] if "_" in kind else "plain"
    limit, bars, hand, mean = float(size), [], [], {}
    for row in t.itertuples():
        if row.trade_id in cuts:
            hand = []
        hand.append(row)
        w = [float(r.n_trades) if weight == "tick" else r.qty if weight == "volume" else r.quote_qty for r in hand]
        ticks = sum(r.n_trades for r in hand)
        signed = sum(r.side_tick * x for r, x in zip(hand, w, strict=True))
        buys, sells = ([x for r, x in zip(hand, w, strict=True) if r.side_tick == s] for s in (1, -1))
        if mode == "plain":
            threshold = limit
            full = (ticks if weight == "tick" else sum(w)) >= limit
        elif not mean:
            threshold, full = limit, ticks >= limit
        elif mode == "imbalance":
            threshold = mean["ticks"] * max(abs(mean["signed"]), 0.05 * mean["weight"])
            full = abs(signed) >= threshold
        else:
            threshold = mean["ticks"] * max(mean["p"] * mean["buy"], (1 - mean["p"]) * mean["sell"])
            full = max(sum(buys), sum(sells)) >= threshold
        if not full:
            continue
        bars.append({"first_id": hand[0].trade_id, "last_id": row.trade_id, "open": hand[0].price, "close": row.price, "high": max(r.price for r in hand), "low": min(r.price for r in hand),
                     "volume": sum(r.qty for r in hand), "quote_volume": sum(r.quote_qty for r in hand), "trades": ticks, "threshold": threshold,
                     "buy_volume": sum(r.qty for r in hand if r.side_reported == 1), "ts": hand[0].ts, "close_ts": row.ts})  # fmt: skip
        now = {"ticks": float(ticks), "signed": signed / len(hand), "weight": sum(w) / len(hand)}
        now["p"] = len(buys) / (len(buys) + len(sells)) if buys or sells else mean.get("p", 0.0)
        now["buy"] = sum(buys) / len(buys) if buys else mean.get("buy", 0.0)
        now["sell"] = sum(sells) / len(sells) if sells else mean.get("sell", 0.0)
        if mode != "plain":
            mean = {k: mean[k] + 2 / 21 * (now[k] - mean[k]) for k in now} if mean else now | {"ticks": limit}
            mean["ticks"] = min(max(mean["ticks"], limit / 4), limit * 4)
            mean["p"] = min(max(mean["p"], 0.05), 0.95)
        hand = []
    return bars


@few
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.integers(0, 3))
def test_bars_are_the_loop(spec: str, seed: int, holes: int) -> None:
    t = random_trades(400, seed)
    rng = np.random.default_rng(seed)
    at = sorted(rng.choice(np.arange(1, 400), holes, replace=False))
    t["trade_id"] += np.searchsorted(at, np.arange(400), side="right")  # an id is missing before each of these rows
    cuts = {int(t["trade_id"].iloc[i]) for i in at}
    folder = EventFolder(spec, missing=[c - 1 for c in cuts])
    got = folder.add(complete_trades(t))
    want = by_the_book(t, spec, cuts)
    assert len(got["ts"]) == len(want)
    for name in want[0] if want else []:
        mine = got[name].astype("datetime64[us]").tolist() if name in ("ts", "close_ts") else got[name].tolist()
        theirs = [b[name].tz_localize(None).to_pydatetime() if name in ("ts", "close_ts") else b[name] for b in want]
        if name == "threshold" or spec.startswith(("tick_", "volume_", "dollar_")):
            assert np.allclose(np.array(mine, dtype=float), np.array(theirs, dtype=float), rtol=1e-12) if name not in ("ts", "close_ts") else mine == theirs
        else:
            assert mine == theirs


@pytest.mark.parametrize("spec", ["tick:100", "volume:2.5", "dollar:150000", "tick_imbalance:100", "volume_imbalance:100", "dollar_imbalance:100", "tick_run:100", "volume_run:100", "dollar_run:100"])
def test_real_trades_are_the_loop(spec: str, shared: Path) -> None:
    names = ["trade_id", "price", "qty", "quote_qty", "time", "is_buyer_maker", "is_best_match"]
    text = pd.read_csv(shared / "BTCUSDT-trades-2024-08-09.csv", names=names, dtype={"qty": str, "quote_qty": str}).head(4000)
    amounts = {name: text[name].map(Decimal if "_" not in spec else float) for name in ("qty", "quote_qty")}  # sums of the file's decimals, exactly
    change = pd.Series(np.sign(np.diff(text["price"], prepend=text["price"].iloc[0]))).replace(0, np.nan).ffill().fillna(0).astype(int)
    t = text.assign(ts=pd.to_datetime(text["time"], unit="ms", utc=True), n_trades=1, side_tick=change, side_reported=np.where(text["is_buyer_maker"], -1, 1), **amounts)
    got, want = event_bars(t.astype({"qty": float, "quote_qty": float}), spec), by_the_book(t, spec, set())
    assert len(want) > 10 and len(got) == len(want)
    for name in ("first_id", "last_id", "close_ts", "open", "high", "low", "close", "trades"):
        assert got[name].tolist() == [b[name] for b in want], name
    for name in ("volume", "quote_volume", "buy_volume", "threshold"):
        theirs = np.array([float(b[name]) for b in want])
        assert (got[name].to_numpy() == theirs).all() if "_" not in spec else np.allclose(got[name], theirs, rtol=1e-12), name


@few
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.lists(st.integers(0, 600), max_size=8))
def test_any_pieces_give_the_same_bars(spec: str, seed: int, at: list[int]) -> None:
    t = complete_trades(random_trades(600, seed, exact=False))
    whole, parts, folder = EventFolder(spec).add(t), [], EventFolder(spec)
    for a, b in itertools.pairwise([0, *sorted(at), 600]):
        parts.append(folder.add({name: t[name][a:b] for name in TRADE_COLUMNS}))
        folder = EventFolder(spec, state=folder.state)
    for name, column in whole.items():
        assert np.concatenate([p[name] for p in parts]).tobytes() == column.tobytes(), name


def test_no_bar_is_handed_out_before_it_is_full() -> None:
    t = random_trades(200, 1)
    for spec in SPECS:
        whole = event_bars(t, spec)
        for n in (1, 50, 199):
            some = event_bars(t.iloc[:n], spec)
            assert len(some) == (whole["last_id"] <= t["trade_id"].iloc[n - 1]).sum()
            assert some.equals(whole.iloc[: len(some)])


def write_day(folder: Path, t: pd.DataFrame, name: str) -> Path:
    "A file in the archive's layout."
    path = folder / f"SIMUSDT-{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    ms = t["ts"].astype("datetime64[ms, UTC]").astype("int64")
    lines = [f"{i},{p:.8f},{q:.8f},{p * q:.8f},{m},{s < 0},True" for i, p, q, m, s in zip(t["trade_id"], t["price"], t["qty"], ms, t["side_reported"], strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


STORED = ("dollar:5000", "volume_imbalance:40", "dollar_run:40")
ORDERS = [  # seeds that load the parts in the orders 2, 0, 1; 1, 2, 0; and 1, 0
    (0, 3, STORED[:1], True, False),
    (5, 3, STORED[1:2], False, True),
    (3, 2, STORED[2:], True, False),
    *(pytest.param(seed, 4, STORED, True, True, marks=pytest.mark.heavy) for seed in range(4)),
]


@pytest.mark.parametrize(("seed", "parts", "specs", "correct", "forget"), ORDERS)
def test_stored_bars_equal_a_build_from_nothing(tmp_path: Path, new_store: NewStore, seed: int, parts: int, specs: tuple[str, ...], correct: bool, forget: bool) -> None:
    rng, n = np.random.default_rng(seed), 500 * parts
    order, cuts = rng.permutation(parts).tolist(), np.cumsum(rng.integers(150, 600, parts - 1)).tolist()
    t = random_trades(n, seed).assign(n_trades=1)
    edges = [0, *cuts, n]
    files = [write_day(tmp_path / "files", t.iloc[a:b], f"part{k}") for k, (a, b) in enumerate(pairwise(edges))]
    first, end = edges[1:3] if parts > 2 else edges[:2]  # of a file with one behind it
    corrected = t.iloc[first:end].copy()
    corrected.loc[corrected.index[-1], "qty"] += 5
    options = {"symbol": "SIMUSDT", "kind": "trades", "source": "simulated"}

    def built(con: Any) -> dict[str, pd.DataFrame]:
        for spec in specs:
            make_event_bars(con, "SIMUSDT", spec)
        return {spec: read_event_bars(con, "SIMUSDT", spec) for spec in specs}

    def built_anew(con: Any, before: dict[str, pd.DataFrame] | None = None) -> dict[str, pd.DataFrame]:
        "Build, and compare with a store that gets the same files before its first build, and with the bars before a change."
        now = built(con)
        with init_duckdb(new_store(tmp_path / f"anew-{len(list(tmp_path.iterdir()))}")) as other:
            for path in loaded:
                process_file(other, path, **options)
            whole = built(other)
        for spec in specs:
            pd.testing.assert_frame_equal(now[spec], whole[spec], check_exact=True)
            assert before is None or not now[spec].equals(before[spec])
        return now

    with init_duckdb(new_store(tmp_path / "grown")) as con:
        loaded = [files[k] for k in order]
        for path in loaded:
            process_file(con, path, **options)
            built(con)
        grown = built_anew(con)
        assert all(len(table) > 10 for table in grown.values())
        assert make_event_bars(con, "SIMUSDT", specs[0]) == len(grown[specs[0]])
        if correct:
            loaded.append(write_day(tmp_path / "late", corrected, "corrected"))
            process_file(con, loaded[-1], **options)
            grown = built_anew(con, grown)
            assert con.execute("SELECT count(*) FROM data_log WHERE event = 'bars_rebuilt' AND detail LIKE ?", [f"{specs[0]}%"]).fetchall()[0][0] >= 1
        if forget:
            loaded.remove(files[-1])
            forget_file(con, con.execute("SELECT file_id FROM ingest_ledger WHERE uri = ?", [str(files[-1])]).fetchall()[0][0])
            built_anew(con, grown)


def test_ids_out_of_order_in_time_are_no_hole(tmp_path: Path) -> None:
    "Two trades whose times are exchanged lose nothing; a missing id still ends the current bar."
    t = random_trades(40, 6).assign(n_trades=1)
    t["ts"] = pd.date_range("2024-03-01", periods=40, freq="1s", tz="UTC")
    t["trade_id"] = np.arange(1, 41)
    t.loc[t.index[[5, 6]], "ts"] = t["ts"].iloc[[6, 5]].to_numpy()
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "store" / "catalog.sqlite"))) as con:
        process_file(con, write_day(tmp_path / "files", t, "swapped"), symbol="SIMUSDT", kind="trades", source="simulated")
        make_event_bars(con, "SIMUSDT", "tick:4")
        bars = read_event_bars(con, "SIMUSDT", "tick:4")
    assert bars["trades"].sum() == 40
    assert bars["volume"].sum() == pytest.approx(t["qty"].sum())
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "holed" / "catalog.sqlite"))) as con:
        process_file(con, write_day(tmp_path / "files", t.drop(t.index[20]), "holed"), symbol="SIMUSDT", kind="trades", source="simulated")
        make_event_bars(con, "SIMUSDT", "tick:4")
        bars = read_event_bars(con, "SIMUSDT", "tick:4")
    assert not ((bars["first_id"] < 21) & (bars["last_id"] > 21)).any()
    assert 22 in set(bars["first_id"])


def test_a_correction_rewrites_only_what_differs(tmp_path: Path) -> None:
    "Bars before the corrected trade stay as they lie in the store."
    t = random_trades(2000, 4).assign(n_trades=1)
    files = [write_day(tmp_path / "files", t.iloc[a:b], f"part{a}") for a, b in ((0, 1500), (1500, 2000))]
    corrected = t.iloc[1500:].copy()
    corrected.loc[corrected.index[7], "qty"] += 5
    options = {"symbol": "SIMUSDT", "kind": "trades", "source": "simulated"}
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "store" / "catalog.sqlite"))) as con:
        for file in files:
            process_file(con, file, **options)
        total = make_event_bars(con, "SIMUSDT", "volume:20")
        process_file(con, write_day(tmp_path / "late", corrected, "corrected"), **options)
        before = snapshot(con)
        make_event_bars(con, "SIMUSDT", "volume:20")
        gone = con.execute(f"SELECT count(*) FROM ducklake_table_deletions('lake', 'main', 'bars', {before + 1}, {snapshot(con)})").fetchall()[0][0]
    assert 0 < gone < total / 3


def test_names_have_one_spelling() -> None:
    assert {event_spec(s).spec for s in ("dollar:1000000", "dollar:1e6", "dollar:1M", "dollar:1000k")} == {"1000000"}


def test_a_replay_does_not_stand_before_what_was_replayed(tmp_path: Path) -> None:
    "A session's ids tell no holes, so runs cannot use its bars while there are better ones."
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"))) as con:
        process_file(con, write_day(tmp_path, random_trades(500, 1), "part0"), symbol="SIMUSDT", kind="trades", source="simulated")
        make_event_bars(con, "SIMUSDT", "tick:50")
        con.execute("INSERT INTO bars SELECT * REPLACE ('replay' AS source) FROM bars")
        assert read_event_bars(con, "SIMUSDT", "tick:50").attrs["source"] == "simulated"
        assert read_event_bars(con, "SIMUSDT", "tick:50", source="replay").attrs["source"] == "replay"
