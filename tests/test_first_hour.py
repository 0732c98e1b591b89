"""The first hour of a user: a month of trades, default options, and errors whose remedies work."""

import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.simulate import simulate_archive
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import ConfigError
from cryptoresearch.ingest.files import process_file
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.identity import read_data
from cryptoresearch.runs.run import load_run, train_run
from cryptoresearch.runs.walk_forward import check_length, first_test, fold_length, prepare
from cryptoresearch.serving import batch
from cryptoresearch.settings import Settings

SMALL = {"n_estimators": 30, "learning_rate": 0.1, "early_stopping_rounds": 8, "n_threads": 1}


@pytest.fixture(scope="module")
def month(tmp_path_factory):
    "A store with the trades of one month and its hourly bars."
    folder: Path = tmp_path_factory.mktemp("month")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        for file in simulate_archive(folder / "files", "BTCUSDT", "2024-07-01", 31, 2000, monthly=True):
            process_file(con, file, settings=settings)
        make_bars(con, "BTCUSDT", "1h")
    return settings


def refusal(settings: Settings, config: RunConfig) -> str:
    "Return the error of a configuration that the month is too short for."
    with connect(settings) as con, pytest.raises(ConfigError, match="enough bars to train") as refused:
        train_run(con, config, settings)
    return str(refused.value)


@pytest.mark.parametrize("target", ["return", "volatility"])
def test_a_month_of_trades_trains_with_default_options(month, target):
    with connect(month) as con:
        run = train_run(con, RunConfig(target=target, params=SMALL), month)
    assert len(run.info["folds"]) >= 4 and run.info["fold_length"] != "90D"
    assert run.predictions["prediction"].notna().all() and len(run.info["features"]) > 20
    assert "ret_168" in run.info["features_left_out"] and run.warmup <= 87
    if run.info["level"] == "unclear":
        assert "--horizon 9 or less" in run.info["verdict"]


@pytest.mark.slow
def test_the_horizon_that_the_verdict_names_is_judged(month):
    with connect(month) as con:
        run = train_run(con, RunConfig(horizon=9, params=SMALL), month)
    assert run.info["level"] != "unclear", run.info["verdict"]


REFUSED = {
    "long warm-ups by name": RunConfig(features=("ret_168", "rv_168"), params=SMALL),
    "fixed inputs": RunConfig(model="har_ridge", target="volatility"),
    "long horizon": RunConfig(horizon=300, features=("ret_1",), params=SMALL),
    "long label": RunConfig(target="triple_barrier", label={"window": 400}, params=SMALL),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_remedies_for_too_few_bars_work(month, name):
    config = REFUSED[name]
    text = refusal(month, config)
    assert "742 bars" in text and "warm-up of" in text
    remedies = text.split(". ", 1)[1].split("; ")
    assert remedies
    for remedy in remedies:
        changed = apply(month, config, remedy)
        if changed is not None:
            with connect(month) as con:
                data = read_data(con, changed)
                check_length(changed, data.bars, data.sources)
        else:
            n = int(re.search(r"Load more data: ([\d,]+) bars", remedy)[1].replace(",", ""))
            check_length(config, hours(n))


def apply(settings: Settings, config: RunConfig, remedy: str) -> RunConfig | None:
    "Do what a remedy says; None where it asks for more data."
    if remedy.startswith("Load more data"):
        return None
    if build := re.search(r"`cryptoresearch bars (\S+) (\S+)`", remedy):
        with init_duckdb(settings) as con:
            make_bars(con, build[1], build[2])
    if "out --feature" in remedy:
        config = replace(config, features=("default",))
    words = shlex.split(remedy.replace(",", " "))
    given = {a: b for a, b in pairwise(words) if a in ("--bars", "--horizon", "--model")}
    more = {"spec": given.get("--bars", config.spec), "horizon": int(given.get("--horizon", config.horizon)), "model": given.get("--model", config.model)}
    return replace(config, **more, **({"params": {}} if "--model" in given else {}))


def hours(n: int) -> pd.DataFrame:
    "A bar frame of a random walk."
    rng = np.random.default_rng(1)
    close = 100 * np.exp(np.cumsum(0.005 * rng.standard_normal(n)))
    opens = np.r_[100.0, close[:-1]]
    high, low = np.maximum(opens, close) * 1.002, np.minimum(opens, close) * 0.998
    times = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC")
    candles = {"open_time": times, "open": opens, "high": high, "low": low, "close": close, "volume": rng.lognormal(size=n)}
    return bar_frame(pd.DataFrame(candles), "1h", symbol="BTCUSDT")


def test_too_few_bars_are_refused_before_the_notebook_runs(month, monkeypatch):
    monkeypatch.setattr(batch, "run_notebook", lambda *a, **k: pytest.fail("the notebook was started"))
    with pytest.raises(ConfigError, match="--bars"):
        batch.train_report(REFUSED["long warm-ups by name"], month)


def test_the_test_and_its_folds_follow_the_length_of_the_data():
    config = RunConfig(features=("ret_1",))
    for n, share in ((742, 0.6), (1600, 0.52), (1700, 0.55), (4000, 0.6)):
        bars = hours(n)
        start = first_test(config, bars)
        assert abs((bars.index < start).mean() - share) < 0.03, n
        samples = prepare(bars, config)
        test = samples.X.index[-1] - start
        assert test / fold_length(config, samples, start) == pytest.approx(4, abs=0.01)
        assert fold_length(replace(config, refit_every="10D"), samples, start) == pd.Timedelta("10D")


@pytest.mark.parametrize(("model", "more"), [("har", {}), ("har_ridge", {}), ("decay_ridge", {}), ("garch", {}), ("ensemble", {"members": ["har_ridge", "ridge"]})])
def test_a_model_brings_its_fixed_inputs(tmp_path, model, more):
    from test_runs import put_bars, random_walk

    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        put_bars(con, random_walk(5500), "WALKUSDT", "simulated")
        config = RunConfig("WALKUSDT", target="volatility", model=model, params=more, refit_every="200D")
        run = train_run(con, config, settings)
        bars = read_data(con, config).bars.tail(run.warmup)
    assert set(config.resolved.fixed) <= {f["name"] for f in run.info["features"]}
    assert model == "ensemble" or len(run.info["features"]) == len(config.resolved.fixed), "no features that the model ignores"
    assert len(load_run(run.id, settings).predict(bars)) == 1


def test_the_report_uses_one_loss_and_one_baseline(tmp_path):
    from test_runs import make_store

    from cryptoresearch.evaluation.comparison import baseline_table
    from cryptoresearch.evaluation.overfitting import run_overfitting
    from cryptoresearch.runs.stored import stored_runs
    from cryptoresearch.serving.run_sections import read_report, regime_section
    from cryptoresearch.serving.views import overfitting_view

    settings = make_store(tmp_path)
    config = RunConfig("WALKUSDT", target="volatility", horizon=6, features=("returns", "calendar"), params=SMALL)
    with connect(settings) as con:
        run = train_run(con, config, settings)
        found = run_overfitting(con, run)
    table, base = baseline_table(run.predictions, "volatility", 6, draws=200), run.info["baseline"]
    assert base == table.drop(index="model")["dm_stat"].idxmax(), "the hardest to beat"
    share, low, high = (f"{table.loc[base, c]:.1%}".replace("-", "−") for c in ("saved", "lower", "upper"))
    assert f"({share} of its QLIKE saved, 95 % interval {low} to {high}, " in run.info["verdict"], run.info["verdict"]
    assert "OOS R²" not in run.info["verdict"]
    assert found.dm_p == pytest.approx(table.loc[base, "dm_p"]) and f"“{base}”" in overfitting_view(found, None).frame.to_string()
    drawn = [p for p in regime_section(read_report(run, settings)).parts if getattr(p, "layout", None) and "Rising" in p.layout.title.text]
    assert len(drawn) == 1 and f"“{base}”" in drawn[0].layout.title.text and drawn[0].data[0].y[-1] == pytest.approx(table.loc[base, "saved"])
    [row] = stored_runs(settings)
    assert (row["baseline"], row["saved"]) == (base, pytest.approx(table.loc[base, "saved"]))


def test_event_bars_are_read_like_time_bars(tmp_path):
    from fastapi.testclient import TestClient
    from typer.testing import CliRunner

    from cryptoresearch import cli
    from cryptoresearch.data.bars import read_bars
    from cryptoresearch.errors import DataNotFound
    from cryptoresearch.features.pipeline import DataProcessing
    from cryptoresearch.serving.api import create_app
    from cryptoresearch.serving.queries import features_page

    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con, pytest.MonkeyPatch.context() as patch:
        for file in simulate_archive(tmp_path / "files", "BTCUSDT", "2024-07-01", 1, 3000):
            process_file(con, file, settings=settings)
        patch.setenv("DUCKDB_PATH", settings.duckdb_path)
        said = CliRunner().invoke(cli.app, ["bars", "BTCUSDT", "tick:100"])
        assert said.exit_code == 0 and "tick:100" in said.output, "no emoji"
        bars = read_bars(con, "BTCUSDT", "tick:100")
        assert len(bars) > 20 and {"first_id", "gap"} <= set(bars) and bars.attrs["spec"] == "tick:100"
        assert len(read_bars(con, "BTCUSDT", "tick:100", start=bars.index[5], end=bars.index[9])) == 4
        for more in ({"market": "spot"}, {"start": "2030-01-01"}):
            with pytest.raises(DataNotFound, match="cryptoresearch bars BTCUSDT tick:100"):
                read_bars(con, "BTCUSDT", "tick:100", **more)
        with pytest.raises(DataNotFound, match="closest symbol is BTCUSDT"):
            read_bars(con, "BTCUDST", "1h")
        values, page, following = features_page(con, "BTCUSDT", "tick:100", names=["ret_3"], start=bars.index[10], limit=5)
        whole = DataProcessing(["ret_3"]).process_data(bars)
        assert np.allclose(values["ret_3"], whole["ret_3"].iloc[10:15]) and following == bars.index[15] and len(page) == 5
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        answer = client.get("/bars", params={"symbol": "BTCUSDT", "spec": "tick:100", "limit": 3}).json()
        assert [b["ts"][:19] for b in answer["bars"]] == [f"{t:%Y-%m-%dT%H:%M:%S}" for t in bars.index[-3:]]


def test_no_console_turns_words_into_emoji():
    import ast

    import cryptoresearch

    found = []
    for path in Path(cryptoresearch.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Console":
                found.append((path.name, any(k.arg == "emoji" and k.value.value is False for k in node.keywords)))
    assert len(found) > 4 and all(ok for _, ok in found), found
