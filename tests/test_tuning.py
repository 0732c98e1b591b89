"A search shared by processes, resumed after a kill, with every trial in the ledger."
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cryptoresearch.runs.config import RunConfig

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.runs.tuning import open_study, trial_table, tune
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


@pytest.fixture
def home(tmp_path: Path) -> Path:
    "A store with hourly candles of a random walk."
    rng = np.random.default_rng(0)
    close = 100 * np.exp(rng.normal(0, 0.01, 2500).cumsum())
    opens = np.r_[100.0, close[:-1]]
    times = pd.date_range("2024-01-01", periods=2500, freq="1h", tz="UTC")
    candles = pd.DataFrame({"open_time": times, "open": opens, "high": np.maximum(opens, close) * 1.001, "low": np.minimum(opens, close) * 0.999, "close": close, "volume": rng.lognormal(size=2500)})
    candles.to_parquet(tmp_path / "TESTUSDT-1h.parquet")
    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"))
    with init_duckdb(settings) as con:
        process_file(con, tmp_path / "TESTUSDT-1h.parquet", kind="klines", symbol="TESTUSDT", interval="1h")
        make_bars(con, "TESTUSDT", "1h")
    return tmp_path


def start(home: Path, n: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SEARCH, str(home), str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_share_a_search_that_was_killed(home: Path) -> None:
    killed = start(home, 500)
    journals = home / "runs" / "studies"
    deadline = time.monotonic() + 60
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


def test_a_search_repeats_bit_for_bit(home: Path) -> None:
    config = RunConfig(symbol="TESTUSDT", horizon=4, model="xgboost", params={"n_estimators": 30}, features=("momentum",), test_start="2024-03-01")
    tables = []
    for folder in ("one", "two"):
        settings = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / folder))
        with init_duckdb(settings) as con:
            tables.append(tune(con, config, 9, n_folds=2, settings=settings).table)
    pd.testing.assert_frame_equal(*tables, check_exact=True)
