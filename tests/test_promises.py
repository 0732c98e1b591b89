"""Check on real runs that a forecast does not depend on how much history is given, whatever the model."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cryptoresearch.runs.config import RunConfig
from test_runs import put_bars, random_walk

from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import SchemaError
from cryptoresearch.models.estimators import MODELS
from cryptoresearch.runs.identity import read_data
from cryptoresearch.runs.run import load_run, train_run
from cryptoresearch.serving.predictor import Predictor
from cryptoresearch.settings import Settings

PLAIN = RunConfig("WALKUSDT", source="simulated", horizon=6, test_start="2024-05-01", refit_every="60D", target="volatility", features=("returns", "har", "calendar"))
BOOST = {"n_estimators": 20, "early_stopping_rounds": 5}
NEEDS = {
    "har": {},
    "har_ridge": {"features": ("har", "volume_ratio_24", "volume_ratio_168", "hour_of_week")},
    "decay_ridge": {"features": ("decay", "har_720", "har_range_720", "hour_of_week_new_york")},
    "garch": {"features": ("ret_1_lags_167",)},
    "ridge": {},
    "ensemble": {"params": {"members": ["ridge", "har"]}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("promises")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        put_bars(con, random_walk(4000), "WALKUSDT", "simulated")
    return settings


def trained(store: Settings, model: str) -> tuple[str, pd.DataFrame]:
    asked = replace(PLAIN, model=model, **NEEDS.get(model, {"params": BOOST}))
    with connect(store) as con:
        return train_run(con, asked, store).id, read_data(con, asked).bars


@pytest.mark.parametrize("model", MODELS)
def test_a_forecast_does_not_depend_on_the_history_given(store: Settings, model: str) -> None:
    run_id, bars = trained(store, model)
    run, columns = load_run(run_id, store), ["prediction", "lower", "upper"]
    warmup = run.info["warmup"]
    assert f"{warmup} bars" in run._repr_mimebundle_()["text/html"]
    full, made = run.predict(bars)[columns], 0
    assert full.notna().all(axis=None)
    for n in (1, 30, 169, warmup - 1, warmup, warmup + 1, warmup + 40, 1400):
        given = bars.tail(n)
        if n < warmup:
            with pytest.raises(SchemaError, match=rf"at least {warmup} bars, the warm-up .*found {n} bars\. Give {warmup - n} more"):
                run.predict(given)
            continue
        part = run.predict(given)[columns]
        assert part.index.equals(given.index[warmup - 1 :]) and len(part) == n - warmup + 1
        assert np.allclose(part, full.loc[part.index], rtol=1e-9, atol=0)
        made += 1
    assert made >= 4


def test_a_gap_in_the_history_changes_nothing_either(store: Settings) -> None:
    run_id, bars = trained(store, "har_ridge")
    run, holed = load_run(run_id, store), bars.copy()
    holed.loc[holed.index[2000:2030], [c for c in holed if holed[c].dtype == float]] = np.nan
    holed.loc[holed.index[2000:2030], "gap"] = True
    full, part = run.predict(holed), run.predict(holed.tail(run.warmup + 100))
    assert len(part) == 101 and np.allclose(part["prediction"], full["prediction"].loc[part.index], rtol=1e-9, atol=0)


def test_the_remedy_of_the_error_works(store: Settings) -> None:
    run_id, bars = trained(store, "har_ridge")
    run = load_run(run_id, store)
    with pytest.raises(SchemaError) as told:
        run.predict(bars.tail(30))
    wanted = re.search(r"bars\.tail\((\d+)\)", str(told.value))
    assert wanted and run.predict(bars.tail(int(wanted[1]))).index.tolist() == [bars.index[-1]]


def test_a_live_session_waits_for_the_warmup(store: Settings, tmp_path: Path) -> None:
    run_id, bars = trained(store, "har_ridge")
    run = load_run(run_id, store)
    run.info["trained_until"] = bars.index[0].isoformat()  # so that bars of the training may be forecast
    at = len(bars) - run.warmup - 2
    live = Predictor(run, bars.iloc[at : at + 30])
    made = [live.update(bars.iloc[[k]]) for k in range(at + 30, len(bars))]
    assert live.skipped["warm-up"] == run.warmup - 1 - 30 and [len(m) for m in made[-4:]] == [0, 1, 1, 1]
    whole = run.predict(bars)["prediction"].tail(3)
    assert np.allclose(pd.concat(made[-3:])["prediction"], whole, rtol=1e-9, atol=0)
