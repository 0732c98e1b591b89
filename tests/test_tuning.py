"A search shared by processes, resumed after a kill, with every trial in the ledger."
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import examples
from cryptoresearch.runs.config import RunConfig

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.runs.identity import read_data
from cryptoresearch.runs.tuning import Choice, forecast_walk, found_options, inner_search, open_study, trial_table, tune
from cryptoresearch.runs.walk_forward import first_test, prepare, walk_forward
from cryptoresearch.settings import Settings

SEARCH = """
import sys
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.tuning import tune
from cryptoresearch.settings import Settings
home, n = sys.argv[1], int(sys.argv[2])
settings = Settings(_env_file=None, duckdb_path=home + "/catalog.sqlite", runs_dir=home + "/runs")
config = RunConfig(symbol="TESTUSDT", horizon=4, model="ridge", features=("momentum",), test_start="2024-03-01")
print(tune(init_duckdb(settings), config, n, n_folds=3, settings=settings).study.study_name)
"""


def store(folder: Path, close: np.ndarray) -> Settings:
    "Make a store with hourly candles of these closes."
    opens = np.r_[100.0, close[:-1]]
    times = pd.date_range("2024-01-01", periods=len(close), freq="1h", tz="UTC")
    candles = pd.DataFrame({"open_time": times, "open": opens, "high": np.maximum(opens, close) * 1.001, "low": np.minimum(opens, close) * 0.999, "close": close, "volume": np.random.default_rng(1).lognormal(size=len(close))})
    candles.to_parquet(folder / "TESTUSDT-1h.parquet")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"))
    with init_duckdb(settings) as con:
        process_file(con, folder / "TESTUSDT-1h.parquet", kind="klines", symbol="TESTUSDT", interval="1h")
        make_bars(con, "TESTUSDT", "1h")
    return settings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store with hourly candles of a random walk, to be copied."
    folder = tmp_path_factory.mktemp("prepared")
    store(folder, 100 * np.exp(np.random.default_rng(0).normal(0, 0.01, 2500).cumsum()))
    return folder


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    "A copy of `prepared`."
    return Path(shutil.copytree(prepared, tmp_path / "home", ignore=shutil.ignore_patterns("*-shm", "*.lock")))


def start(home: Path, n: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SEARCH, str(home), str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_share_a_search_that_was_killed(home: Path) -> None:
    killed = start(home, 500)
    journals = home / "runs" / "studies"
    deadline = time.monotonic() + 200
    while not (journals.is_dir() and any(p.stat().st_size > 3000 for p in journals.glob("*.journal"))):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    workers = [start(home, 24), start(home, 24)]
    names = set()
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err[-2000:]
        names.add(out.strip())
    assert len(names) == 1
    settings = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / "runs"))
    table = trial_table(open_study(names.pop(), settings=settings))
    done = table[table["state"].isin(["COMPLETE", "PRUNED"])]
    assert 24 <= len(done) <= 26  # the other process may be at a trial when the last one ends
    with connect(settings, read_only=True) as con:
        ledger = {row[0] for row in con.execute("SELECT trial FROM trials").fetchall()}
    assert {f"trial {n}" for n in done.index} <= ledger


@pytest.mark.parametrize("n, params, test_start", [(7, {"n_estimators": 6, "n_threads": 1}, "2024-02-01"), pytest.param(9, {"n_estimators": 30}, "2024-03-01", marks=pytest.mark.heavy)])
def test_a_search_repeats_bit_for_bit(home: Path, n: int, params: dict[str, int], test_start: str) -> None:
    config = RunConfig(symbol="TESTUSDT", horizon=4, model="xgboost", params=params, features=("momentum",), test_start=test_start)
    tables = []
    for folder in ("one", "two"):
        settings = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / folder))
        with init_duckdb(settings) as con:
            tables.append(tune(con, config, n, n_folds=2, settings=settings).table)
    pd.testing.assert_frame_equal(*tables, check_exact=True)


SEARCHED = RunConfig(symbol="TESTUSDT", horizon=4, model="ridge", features=("momentum",), test_start="2024-03-01")


def test_weights_and_refit_period_are_searched_unless_they_are_given(home: Path) -> None:
    settings = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / "runs"))
    with init_duckdb(settings) as con:
        free = tune(con, SEARCHED, 10, n_folds=3, settings=settings)
        by_name = tune(con, SEARCHED, examples(1, 3), n_folds=3, settings=settings, fixed=("weights", "refit_every"))
        by_value = tune(con, replace(SEARCHED, weights="uniqueness", refit_every="5D"), examples(1, 3), n_folds=3, settings=settings)
        models = con.execute("SELECT trial, model FROM trials WHERE run_id = ?", [free.study.study_name]).fetchall()
    assert free.study.best_params.keys() == {"penalty", "clip", "weights", "refit_every"}
    assert set(free.table["weights"]) == {"none", "recency:30D", "recency:10D", "recency:3D"} and set(free.table["refit_every"]) == {"7D", "90D"}
    ledger = {name: json.loads(model) for name, model in models}
    assert len(ledger) == 10
    for number, row in free.table.iterrows():
        asked = ledger[f"trial {number}"]
        assert (asked["weights"] or "none", asked["refit_every"]) == (row["weights"], row["refit_every"])
    best = free.table.iloc[0]
    assert (free.config.weights or "none", free.config.refit_every) == (best["weights"], best["refit_every"])
    assert found_options(free.config).endswith(f" --weights {best['weights']} --refit {best['refit_every']}")
    for found, weights, period in ((by_name, "none", "90D"), (by_value, "uniqueness", "5D")):
        assert set(found.study.best_params) == {"penalty", "clip"}
        assert set(found.table["weights"]) == {weights} and set(found.table["refit_every"]) == {period}
    assert len({found.study.study_name for found in (free, by_name, by_value)}) == 3  # another space is another study


def test_a_study_is_not_continued_with_other_choices(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / "runs"))
    with init_duckdb(settings) as con:
        before = tune(con, SEARCHED, 1, n_folds=3, settings=settings)
        monkeypatch.setattr("cryptoresearch.runs.tuning.PERIODS", ("7D", "8D", "30D"))
        after = tune(con, SEARCHED, 1, n_folds=3, settings=settings)
    assert after.study.study_name != before.study.study_name and after.n_trials == 1


@pytest.mark.parametrize("n, kept", [(10, ("refit_every",)), pytest.param(16, (), marks=pytest.mark.heavy)])
def test_recent_outcomes_count_more_where_the_law_changes(tmp_path: Path, n: int, kept: tuple[Choice, ...]) -> None:
    "Momentum for 32 days, then reversal: what is old misleads."
    rng, returns = np.random.default_rng(0), np.zeros(2500)
    for t in range(1, len(returns)):
        returns[t] = (0.4 if t < 770 else -0.4) * returns[t - 1] + rng.normal(0, 0.01)
    settings = store(tmp_path, 100 * np.exp(returns.cumsum()))
    asked = replace(SEARCHED, horizon=1, features=("ret_1",))
    with init_duckdb(settings) as con:
        found = tune(con, asked, n, n_folds=3, settings=settings, fixed=kept)
        equal = tune(con, asked, n // 2, n_folds=3, settings=settings, fixed=("weights", *kept))
    assert found.config.weights in ("recency:10D", "recency:3D")
    assert found.study.best_value < equal.study.best_value - 0.02  # IC


def test_an_inner_fold_is_walked_as_a_run_is(home: Path) -> None:
    settings = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"))
    asked = replace(SEARCHED, refit_every="3D", weights="recency:10D")
    with connect(settings, read_only=True) as con:
        bars = read_data(con, asked).bars
    search = inner_search(prepare(bars, asked), asked, first_test(asked, bars), 3)
    rows = search.folds[-1][1]
    walked = walk_forward(asked, search.samples, search.samples.X.index[rows[0]])[0]
    found = forecast_walk(asked, search.samples, rows, 3)
    np.testing.assert_array_equal(found["prediction"], walked["prediction"])
    once = forecast_walk(replace(asked, refit_every="90D"), search.samples, rows, 3)
    assert not np.array_equal(once["prediction"], walked["prediction"])
