"""Runs that an earlier layout of the package stored: they load, forecast and are listed, and `reproduce` names the changed code."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cryptoresearch.runs.identity import code_version
from cryptoresearch.runs.reproduce import changed_code, reproduce
from cryptoresearch.runs.run import load_run
from cryptoresearch.runs.stored import list_runs

from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.store import connect
from cryptoresearch.errors import RunMismatch

ARCHIVE = Path(__file__).parent / "data" / "old_runs" / "old_runs.zip"
RUNS = {
    "volatility": "btcusdt-1h-volatility24-af5c32acf0",
    "scaled": "btcusdt-1h-return6-16d2243a80",
    "ensemble": "btcusdt-1h-volatility6-ac80b4755a",
    "direction": "btcusdt-1h-direction6-84f14c4098",
}


@pytest.fixture(scope="module")
def old(tmp_path_factory, hours_in):
    "Settings of a store rebuilt from real data, with the old runs next to it."
    home = tmp_path_factory.mktemp("old")
    settings = hours_in(home, "2021-01-01", "2021-07-11")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(home)
    return settings


@pytest.fixture(scope="module")
def bars(old):
    with connect(old) as con:
        return read_bars(con, "BTCUSDT", "1h")


def test_old_runs_are_listed(old):
    table = list_runs(old)
    assert set(table.index) == set(RUNS.values())
    assert table["level"].isin(["none", "unclear", "weak", "skill", "suspicious"]).all(), table["verdict"].tolist()
    assert table["created_at"].notna().all() and table["n"].between(200, 300).all()


@pytest.mark.parametrize("kind", RUNS)
def test_an_old_run_keeps_its_report_and_predictions(old, kind):
    run = load_run(RUNS[kind], old)
    assert run.report is not None and run.id in run.report.read_text(encoding="utf-8")
    assert run.info["scores"]["model"]["n"] == run.predictions["y"].notna().sum()
    assert list(run.predictions.columns[:4]) == ["known_ts", "end_ts", "y", "prediction"]
    assert run.predictions["prediction"].notna().all() and len(run.predictions) == 240
    assert run.id in run._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("kind", RUNS)
def test_an_old_run_forecasts_as_it_did(old, bars, kind):
    run = load_run(RUNS[kind], old)
    then = pd.read_parquet(Path(old.runs_dir).parent / "forecasts" / f"{kind}.parquet")
    now = run.predict(bars).loc[then.index]
    assert len(then) == 48 and then["prediction"].notna().all()
    assert now["known_ts"].tolist() == then["known_ts"].tolist()
    for name in ("prediction", "lower", "upper"):
        assert np.allclose(now[name], then[name], rtol=1e-9, atol=0, equal_nan=True), name


def test_reproduce_names_the_changed_code(old, kind="volatility"):
    then = json.loads((Path(old.runs_dir) / RUNS[kind] / "run.json").read_text())["identity"]["code"]
    try:
        checks, message = reproduce(RUNS[kind], old), ""
    except RunMismatch as e:
        checks, message = None, str(e)
    if code_version() == then:  # the same code that trained the run
        assert checks is not None, message
        assert checks.drop("snapshot")["same"].all(), checks[~checks["same"]]
    elif checks is None:  # one sentence names both versions
        assert any(then in s and code_version() in s for s in re.split(r"(?<=[.;]) ", message)), message
    else:  # other code, the same bits
        assert checks.loc["code", ["expected", "found", "same"]].tolist() == [then, code_version(), False]
        assert checks.drop(["code", "snapshot"])["same"].all(), checks[~checks["same"]]
        text = changed_code(checks)  # one sentence names both versions
        assert then in text and code_version() in text and text.count(". ") == 0, text
