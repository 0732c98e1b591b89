"Scores of live predictions: every target, both kinds of bars, gaps, waiting rows and sources."

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.errors import ConfigError, DataNotFound
from cryptoresearch.ingest.files import process_file
from cryptoresearch.labels.targets import make_labels, TARGETS
from cryptoresearch.metrics.scores import REFERENCE
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.run import Run, train_run
from cryptoresearch.serving.predictor import Predictor, Saving
from cryptoresearch.serving.queries import read_predictions
from cryptoresearch.serving.scoring import EXACT, live_drift, live_outcomes, live_scores, parity, rolling_scores
from cryptoresearch.settings import Settings, shared_data

HOURS = shared_data() / "BTCUSDT-1h-2017-08_2024-04.parquet"
START = pd.Timestamp("2024-03-01", tz="UTC")
CONFIG = RunConfig(
    spec="1h", target="return", horizon=5, start="2023-09-01", end="2024-03-01", test_start="2024-01-15", refit_every="30D", model="ridge",
    features=("ret_1", "rv_24"),
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("scoring")
    return Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)


@pytest.fixture(scope="module")
def con(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    "A store with the hourly candles since August 2023."
    some = tmp_path_factory.mktemp("hours") / HOURS.name
    whole = pd.read_parquet(HOURS)
    time = next(c for c in whole if "time" in c or c == "ts")
    at = pd.to_datetime(whole[time], utc=True) if not pd.api.types.is_numeric_dtype(whole[time]) else pd.to_datetime(whole[time], unit="ms", utc=True)
    whole[(at >= pd.Timestamp("2023-08-01", tz="UTC")).to_numpy()].to_parquet(some)
    store = init_duckdb(settings)
    process_file(store, some, symbol="BTCUSDT", interval="1h")
    make_bars(store, "BTCUSDT", "1h", source="klines")
    return store


def predicted(con: duckdb.DuckDBPyConnection, settings: Settings, config: RunConfig, source: str = "klines") -> Run:
    "A trained run with stored predictions from March 2024 on."
    run = train_run(con, config, settings)
    bars = read_bars(con, "BTCUSDT", "1h")
    saving = Saving()
    saving.add(Predictor(run, bars[bars.index < START], source=source).update(bars[bars.index >= START]))
    saving.save(con, last=True)
    return run


@pytest.mark.parametrize("target", list(TARGETS))
def test_every_target_is_scored_with_the_labels_of_the_training(con: duckdb.DuckDBPyConnection, settings: Settings, target: str) -> None:
    run = predicted(con, settings, replace(CONFIG, target=target))
    rows, bars = live_outcomes(con, run, last="90D"), read_bars(con, "BTCUSDT", "1h")
    labels = make_labels(bars, target, 5, run.config.label)
    assert (rows["state"] == "waiting").tolist() == [False] * (len(rows) - 5) + [True] * 5  # also where a barrier was hit early
    known = rows[rows["state"] == "matured"]
    assert len(known) > 1000 and rows["y"].notna().sum() == len(known)
    np.testing.assert_allclose(known["y"], labels["y"].reindex(known.index), rtol=0, atol=1e-9)
    found = live_scores(con, run, last="90D")
    assert found.table.index[0] == "model" and REFERENCE[target] in found.table.index
    assert found.states == {"matured": len(known), "waiting": 5, "gap": 0} and 0 < found.scored <= len(known)
    assert np.isnan(found.coverage) == TARGETS[target].event
    assert np.isfinite(found.saved) and np.isfinite(found.bias.size)
    page, _ = read_predictions(con, run_id=run.id, limit=5000, settings=settings)
    np.testing.assert_allclose(page["y"], rows["y"], rtol=0, atol=1e-9)
    assert page["state"].tolist() == rows["state"].tolist()


def test_a_label_with_parameters_needs_the_stored_run(con: duckdb.DuckDBPyConnection, settings: Settings, tmp_path: Path) -> None:
    run = predicted(con, settings, replace(CONFIG, target="triple_barrier"))
    gone = settings.model_copy(update={"runs_dir": str(tmp_path)})
    for without in (None, gone):
        assert set(read_predictions(con, run_id=run.id, settings=without)[0]["state"]) == {"unscored"}


def test_a_gap_is_counted_and_never_scored(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    run = predicted(con, settings, CONFIG)
    before = live_scores(con, run, last="90D")
    where = "source = 'klines' AND spec = '1h' AND ts = TIMESTAMP '2024-03-20 12:00'"
    con.execute(f"CREATE OR REPLACE TEMP TABLE kept AS SELECT * FROM bars WHERE {where}")
    write(con, lambda c: c.execute(f"DELETE FROM bars WHERE {where}"))
    try:
        rows, after = live_outcomes(con, run, last="90D"), live_scores(con, run, last="90D")
    finally:
        write(con, lambda c: c.execute("INSERT INTO bars SELECT * FROM kept"))
    lost = rows.index[rows["state"] == "gap"]
    assert lost[0] == pd.Timestamp("2024-03-20 07:00", tz="UTC") and len(lost) == 5  # those whose outcome spans it
    assert rows.loc[lost, "y"].isna().all()
    assert after.states == {"matured": before.states["matured"] - 5, "waiting": 5, "gap": 5}
    assert after.scored == before.scored - 10  # the baseline of the last return misses five rows after the gap, and all are scored on the same


def test_outcomes_of_a_spot_feed_never_come_from_futures(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    run = predicted(con, settings, replace(CONFIG, horizon=4), source="binance")
    write(con, lambda c: c.execute("UPDATE bars SET source = 'um.klines' WHERE source = 'klines' AND spec = '1h'"))
    try:
        assert set(read_predictions(con, run_id=run.id)[0]["state"]) == {"waiting"}
        assert set(live_outcomes(con, run)["state"]) == {"waiting"}
    finally:
        write(con, lambda c: c.execute("UPDATE bars SET source = 'klines' WHERE source = 'um.klines'"))
    assert "matured" in set(live_outcomes(con, run)["state"])


def test_scores_by_day_add_up_and_drift_finds_a_shift(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    run = predicted(con, settings, CONFIG)
    rows = live_outcomes(con, run, last="20D")
    days = rolling_scores(rows, run)
    assert days["n"].sum() == (rows["state"] == "matured").sum() and len(days) in (20, 21)
    assert days["coverage"].between(0, 1).all()
    same = live_drift(con, run, last="20D")
    assert list(same.columns)[:2] == ["psi", "verdict"] and set(same.index) == {"ret_1", "rv_24"}
    assert same.loc["rv_24", "psi"] > same.loc["ret_1", "psi"] >= 0  # the volatility of March is above that of the autumn


def test_refusals_name_the_remedy(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    run = train_run(con, replace(CONFIG, horizon=3), settings)
    with pytest.raises(DataNotFound, match=r"live predictions of run .* found none.*cryptoresearch live BTCUSDT --run"):
        live_scores(con, run)
    run = predicted(con, settings, CONFIG)
    with pytest.raises(DataNotFound, match="from finnhub"):
        live_scores(con, run, source="finnhub")
    for wrong in ("soon", "-1D", "0s", "7"):
        with pytest.raises(ConfigError, match="last to be a length of time such as 1D"):
            live_scores(con, run, last=wrong)


def test_before_any_outcome_is_known_nothing_is_scored(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    for target in ("return", "direction", "volatility"):
        run = train_run(con, replace(CONFIG, horizon=6, target=target), settings)
        bars, saving = read_bars(con, "BTCUSDT", "1h"), Saving()
        saving.add(Predictor(run, bars.iloc[:-3], source="klines").update(bars.iloc[-3:]))
        saving.save(con, last=True)
        found = live_scores(con, run)
        assert (found.scored, found.states["waiting"], str(found)) == (0, 3, "none scored yet")
        assert rolling_scores(live_outcomes(con, run), run).empty


def test_parity_is_exact_and_sees_a_changed_bar_a_lost_and_a_strange_prediction(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    run = predicted(con, settings, replace(CONFIG, horizon=2))
    same = parity(con, run)
    assert same.exact and (same.compared, same.missing, same.extra) == (24, 0, 0) and max(same.largest, same.relative, same.features) < EXACT
    mine = f"run_id = '{run.id}' AND ts"
    write(con, lambda c: c.execute(f"DELETE FROM predictions WHERE {mine} = TIMESTAMP '2024-04-21 03:00'"))
    write(con, lambda c: c.execute(f"UPDATE predictions SET ts = ts + INTERVAL 7 MINUTE WHERE {mine} = TIMESTAMP '2024-04-21 05:00'"))
    write(con, lambda c: c.execute(f"UPDATE predictions SET upper = upper + 1e-6 WHERE {mine} = TIMESTAMP '2024-04-21 07:00'"))
    found = parity(con, run)
    assert (found.compared, found.differing, found.missing, found.extra, found.exact) == (22, 1, 2, 1, False)
    assert found.largest == pytest.approx(1e-6, rel=1e-3) and found.worst == pd.Timestamp("2024-04-21 07:00", tz="UTC")
    assert parity(con, run, last="2h").exact  # the last hours have none of them


def test_bars_whose_trades_came_later_are_repaired_and_not_missing(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    run = predicted(con, settings, replace(CONFIG, horizon=6))
    names = 'symbol, source, session_id, start, "end", missed_start, missed_end, missed_trades, repaired_at, file_id'
    row = "'BTCUSDT', 'klines', 's', TIMESTAMP '2024-04-21 02:30', TIMESTAMP '2024-04-21 03:30', [], [], [], now()::TIMESTAMP, NULL"
    lost = "('2024-04-21 00:00', '2024-04-21 03:00', '2024-04-21 09:00')"
    write(con, lambda c: c.execute(f"DELETE FROM predictions WHERE run_id = '{run.id}' AND strftime(ts, '%Y-%m-%d %H:%M') IN {lost}"))
    write(con, lambda c: c.execute(f"INSERT INTO repairs ({names}) VALUES ({row})"))
    try:
        found = parity(con, run)
    finally:
        write(con, lambda c: c.execute("DELETE FROM repairs"))
    assert (found.missing, found.repaired) == (1, 2)  # the features of 09:00 reach back to the gap
    assert str(found).endswith("1 missing, 2 repaired")


@pytest.fixture(scope="module")
def ticks(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[duckdb.DuckDBPyConnection, Run]:
    "A store with a live session of real trades, and a run on bars of 20 trades with predictions of it."
    import threading

    from cryptoresearch.serving.predictor import predict_live

    folder = tmp_path_factory.mktemp("ticks")
    own = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    store = init_duckdb(own)
    for day in ("08", "09"):
        process_file(store, shared_data() / f"BTCUSDT-trades-2024-08-{day}.csv")
    make_bars(store, "BTCUSDT", "tick:20", source="trades")
    config = RunConfig(
        spec="tick:20", target="direction", horizon=3, end="2024-08-08 23:59:50", model="ridge", features=("ret_1", "rv_24"), embargo="0s",
        refit_every="20s",
    )  # fmt: skip
    run = train_run(store, config, own)

    def session(c: duckdb.DuckDBPyConnection) -> None:
        columns = [r[0] for r in c.execute("DESCRIBE trades").fetchall()]
        values = ", ".join({"source": "'binance'", "file_id": "'session-1'"}.get(n, n) for n in columns)
        c.execute(f"INSERT INTO trades SELECT {values} FROM trades WHERE source = 'trades' AND ts >= TIMESTAMP '2024-08-09'")
        c.execute("INSERT INTO live_sessions (session_id, source, symbols, started_at) VALUES ('session-1', 'binance', ['BTCUSDT'], now()::TIMESTAMP)")

    write(store, session)
    ended = threading.Event()
    ended.set()
    assert predict_live(own, run.id, source="binance", stop=ended) > 300
    return store, run


@pytest.mark.slow
def test_event_bars_are_scored_by_the_bars_of_their_session(ticks: tuple[duckdb.DuckDBPyConnection, Run]) -> None:
    con, run = ticks
    rows = live_outcomes(con, run)
    assert (rows["state"] == "waiting").sum() == 3 and (rows["state"] == "matured").sum() == len(rows) - 3 > 300
    trades = con.execute("SELECT price FROM trades WHERE source = 'binance' ORDER BY trade_id").df()["price"].to_numpy()
    first = con.execute("SELECT min(trade_id) FROM trades WHERE source = 'binance'").fetchall()[0][0]
    at = (rows["first_id"].iloc[0] - first) + 20  # the trade that opens the next bar
    assert rows["y"].iloc[0] == float(trades[at + 3 * 20 - 1] > trades[at])
    found = live_scores(con, run)
    assert found.table.index.tolist()[:2] == ["model", "base"] and found.scored == len(rows) - 3
    same = parity(con, run)
    assert same.exact and same.compared == len(rows) and max(same.largest, same.features) < EXACT
    taken = con.execute("SELECT trade_id FROM trades WHERE source = 'binance' ORDER BY trade_id LIMIT 1 OFFSET 5000").fetchall()[0][0]
    write(con, lambda c: c.execute(f"UPDATE trades SET price = price * 1.01 WHERE source = 'binance' AND trade_id BETWEEN {taken} AND {taken} + 19"))
    assert parity(con, run).differing > 0


def test_the_api_returns_scores_and_parity_of_live_predictions(con: duckdb.DuckDBPyConnection, settings: Settings) -> None:
    from fastapi.testclient import TestClient

    from cryptoresearch.serving.api import create_app

    run = predicted(con, settings, replace(CONFIG, target="triple_barrier", horizon=7))
    found, same = live_scores(con, run), parity(con, run)
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        scores = client.get(f"/runs/{run.id}/scores/live").json()
        assert scores["states"] == found.states and scores["baseline"] == found.baseline and scores["coverage"] is None
        assert scores["scores"]["model"]["brier"] == pytest.approx(found.table.loc["model", "brier"], abs=1e-12)
        assert sum(part["n"] for part in scores["stretches"]) == found.states["matured"]
        told = client.get(f"/runs/{run.id}/parity", params={"last": "1D"}).json()
        assert (told["exact"], told["compared"], told["largest"]) == (True, same.compared, same.largest)
        other = train_run(con, replace(CONFIG, horizon=3), settings)
        assert [client.get(f"/runs/{other.id}/{path}").status_code for path in ("parity", "scores/live")] == [404, 404]
        assert client.get(f"/runs/{run.id}/parity", params={"last": "soon"}).status_code == 422
        page = client.get("/metrics")
        stored = con.execute("SELECT count(*) FROM predictions WHERE run_id = ?", [run.id]).fetchall()[0][0]
        assert page.headers["content-type"].startswith("text/plain")
        assert f'cryptoresearch_stored_predictions{{run="{run.id}",source="klines"}} {float(stored)}' in page.text


def test_the_command_prints_scores_and_parity(con: duckdb.DuckDBPyConnection, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from typer.testing import CliRunner

    from cryptoresearch.cli import app

    run = predicted(con, settings, replace(CONFIG, target="volatility", horizon=8))
    monkeypatch.setenv("DUCKDB_PATH", settings.duckdb_path)
    monkeypatch.setenv("RUNS_DIR", settings.runs_dir)
    plain, as_json = (CliRunner().invoke(app, ["scores", run.id, *more]) for more in ([], ["--json", "--last", "2D"]))
    assert plain.exit_code == 0, plain.output
    assert "168 compared with the store, largest difference" in plain.stdout and "coverage" in plain.stdout and "har" in plain.stdout
    told = json.loads(as_json.stdout)
    assert told["parity"]["exact"] and told["parity"]["compared"] == 48
    assert told["scores"][0]["forecaster"] == "model" and told["states"]["waiting"] == 8
