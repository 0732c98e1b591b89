"""Check each option of a run in its files, its live predictor and its report: reproduced bit for bit, without look-ahead."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from cryptoresearch.runs.config import RunConfig
from test_runs import SMALL, put_bars

from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import ConfigError, RunMismatch, SchemaError
from cryptoresearch.runs import identity as question, run as runs, walk_forward as walk
from cryptoresearch.runs.reproduce import reproduce
from cryptoresearch.runs.run import load_run, train_run
from cryptoresearch.serving.batch import train_report
from cryptoresearch.serving.predictor import Predictor
from cryptoresearch.settings import Settings

QUICK = {"volatility": "ridge", "volatility_features": ["returns"]}  # whose features look back less than a week
CALM = RunConfig("CALMUSDT", source="simulated", horizon=6, test_start="2024-02-20", refit_every="20D", features=("returns", "calendar"), params=SMALL)

pytestmark = pytest.mark.usefixtures("warm_kernels")


def calm_and_storm(hours: int = 1900, seed: int = 5) -> pd.DataFrame:
    "A random walk whose volatility rises and falls within three weeks."
    rng = np.random.default_rng(seed)
    sigma = 0.003 * np.exp(1.2 * np.sin(2 * np.pi * np.arange(hours) / 500))
    close = 100 * np.exp(np.cumsum(sigma * rng.standard_normal(hours)))
    opens = np.r_[100.0, close[:-1]]
    high, low = np.maximum(opens, close) * (1 + sigma / 2), np.minimum(opens, close) * (1 - sigma / 2)
    times = pd.date_range("2024-01-01", periods=hours, freq="1h", tz="UTC")
    return pd.DataFrame({"open_time": times, "open": opens, "high": high, "low": low, "close": close, "volume": rng.lognormal(size=hours)})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        put_bars(con, calm_and_storm(), "CALMUSDT", "simulated")
    return settings


@pytest.fixture(scope="module")
def bars(store):
    with connect(store) as con:
        return question.read_data(con, CALM).bars


INTERVALS = {
    "scaled": {"interval": "scaled", "interval_params": QUICK},
    "scaled, given": {"interval": "scaled", "interval_params": QUICK | {"given": ["log_sigma", "hour_sin"]}},
    "of a scaled return": {"interval": "scaled", "interval_params": QUICK, "target": "scaled_return", "label": {"window": 200}},
    "quantile": {"interval": "quantile"},
    "quantile of volatility": {"interval": "quantile", "target": "volatility"},
    "adaptive": {"interval": "adaptive", "interval_params": {"least": 50}},
    "adaptive of volatility": {"interval": "adaptive", "interval_params": {"least": 50}, "target": "volatility"},
    "adaptive of scaled": {"interval": "adaptive", "interval_params": QUICK | {"of": "scaled", "least": 50}},
    "adaptive of quantile": {"interval": "adaptive", "interval_params": {"of": "quantile", "least": 50}},
}


ALWAYS = ("scaled", "quantile", "adaptive of scaled")  # the others: make test-all


@pytest.mark.parametrize("kind", [k if k in ALWAYS else pytest.param(k, marks=pytest.mark.heavy) for k in INTERVALS])
def test_an_interval_is_stored_made_again_and_had_live(store, bars, kind):
    asked = replace(CALM, **INTERVALS[kind])
    with connect(store) as con:
        run = train_run(con, asked, store)
        plain = train_run(con, replace(CALM, target=asked.target, label=asked.label), store)
    p = run.predictions
    assert run.id != plain.id and p["prediction"].equals(plain.predictions["prediction"])
    assert (p["lower"] <= p["upper"]).all() and not p["lower"].equals(plain.predictions["lower"])
    checks = reproduce(run.id, store)
    assert checks["same"].all(), checks[~checks["same"]]
    stored = [f.relative_to(run.folder).as_posix() for f in run.folder.rglob("*") if f.is_file()]
    assert not any(name.endswith((".pkl", ".pickle", ".joblib")) for name in stored) and sorted(run.info["files"]) == sorted(n for n in stored if n != "run.json")
    found = load_run(run.id, store)
    run_on = replace(found, info=found.info | {"trained_until": str(bars.index[1500])})  # as if it had been trained until then
    if asked.interval == "adaptive":
        assert found.predict(bars)[["lower", "upper"]].isna().all(axis=None)
        with pytest.raises(ConfigError, match="--interval scaled"):
            Predictor(run_on, bars.iloc[:1500])
        return
    live = Predictor(run_on, bars.iloc[:1600])
    rows = pd.concat([live.update(bars.iloc[[k]]) for k in range(1600, 1640)]).set_index("ts")
    batch = found.predict(bars).loc[rows.index]
    assert len(rows) == 40
    for name in ("prediction", "lower", "upper"):
        assert np.allclose(rows[name].to_numpy(float), batch[name], rtol=1e-6), name


@pytest.mark.parametrize("kind", INTERVALS)
def test_no_interval_knows_the_future(bars, kind):
    asked = replace(CALM, **INTERVALS[kind])
    start = runs.first_test(asked, bars)
    whole = walk.walk_forward(asked, runs.prepare(bars, asked), start)[0]
    for until in (1400, 1750):
        cut = walk.walk_forward(asked, runs.prepare(bars.iloc[:until], asked), start)[0]
        assert len(cut) > 100
        for name in ("prediction", "lower", "upper"):
            assert np.allclose(cut[name], whole.loc[cut.index, name], rtol=1e-9, atol=1e-12), (name, until)


def test_a_scaled_interval_is_right_in_calm_and_in_storm(bars):
    "Wherever the test begins: the residuals of a calm month are too narrow for a storm, those of a storm too wide for a calm."
    from cryptoresearch.evaluation.comparison import interval_table

    spread = {"residual": [], "scaled": []}
    knows = {"interval": "scaled", "interval_params": {"volatility": "ridge", "volatility_features": ["har_24"]}}
    for start in ("2024-02-10", "2024-02-13", "2024-02-16", "2024-02-20", "2024-02-24"):
        for kind, found in spread.items():
            asked = replace(CALM, test_start=start, **(knows if kind == "scaled" else {}))
            p = walk.walk_forward(asked, runs.prepare(bars, asked), runs.first_test(asked, bars))[0]
            part = interval_table(p, bars, 0.9).loc["volatility", "coverage"]
            found.append(part.max() - part.min())
    assert max(spread["scaled"]) < max(spread["residual"]) / 2, spread


def test_what_an_interval_is_made_of_is_part_of_the_question(store):
    asked = [replace(CALM, **kind) for kind in ({}, {"interval": "residual", "interval_params": {}}, {"interval": "scaled"}, {"interval": "scaled", "interval_params": {"volatility": "har_ridge"}}, {"interval": "scaled", "interval_params": {"given": []}}, {"interval": "quantile"})]
    with connect(store) as con:
        names = [runs.find_run(c, runs.read_data(con, c), store)[0] for c in asked]
    assert names[0] == names[1] and names[2] == names[3] and len(set(names)) == 4


def test_intervals_that_cannot_be_are_refused(bars):
    for wrong in ({"interval": "wide"}, {"interval": "scaled", "target": "volatility"}, {"interval": "quantile", "model": "ridge", "params": {}}, {"interval": "scaled", "target": "direction"}, {"interval": "residual", "interval_params": {"step": 1}}):
        with pytest.raises(ConfigError):
            replace(CALM, **wrong)
    short = replace(CALM, interval="scaled")  # har_ridge looks back a month, and there are two
    with pytest.raises((SchemaError, ConfigError), match="Load more"):
        walk.walk_forward(short, runs.prepare(bars.iloc[:1400], short), runs.first_test(short, bars))


def test_a_tampered_interval_is_named(store, tmp_path):
    import shutil

    with connect(store) as con:
        run = train_run(con, replace(CALM, **INTERVALS["scaled"]), store)
    mine = store.model_copy(update={"runs_dir": str(tmp_path / "runs")})
    shutil.copytree(run.folder, tmp_path / "runs" / run.id)
    file = tmp_path / "runs" / run.id / "interval" / "interval.json"
    file.write_text(file.read_text().replace('"log_sigma"', '"hour_sin"'))
    with pytest.raises(RunMismatch, match=r"interval/interval\.json"):
        load_run(run.id, mine)


def test_the_report_shows_the_interval_by_regime_and_over_time(store):
    done = train_report(replace(CALM, **INTERVALS["scaled"]), store)
    page = done.report.read_text()
    assert all(text in page for text in ("Winkler score", "volatility: high", "Coverage (90% nominal)", "scaled, given log_sigma, volatility ridge"))


CALIBRATED = {"direction": {}, "triple_barrier": {"label": {"window": 48}}, "meta": {"label": {"window": 48, "primary": "ret_6"}}}


@pytest.mark.parametrize("target", [t if t == "direction" else pytest.param(t, marks=pytest.mark.heavy) for t in CALIBRATED])
def test_a_probability_is_calibrated_stored_and_had_live(store, bars, target):
    method = "isotonic" if target == "meta" else "platt"
    plain = replace(CALM, target=target, **CALIBRATED[target])
    with connect(store) as con:
        before = train_run(con, plain, store)
        run = train_run(con, replace(plain, calibrate=method), store)
    p = run.predictions
    assert run.id != before.id and p["raw"].equals(before.predictions["prediction"].rename("raw")) and not p["prediction"].equals(p["raw"])
    assert p["prediction"].between(0, 1).all() and "calibrator.json" in run.info["files"] and not hasattr(before.predictions, "raw")
    for _, fold in p.groupby("fold"):  # one rising map a fold
        order = np.argsort(fold["raw"].to_numpy(), kind="stable")
        steps = np.diff(fold["prediction"].to_numpy()[order])
        assert (steps >= -1e-9).all() or (method == "platt" and (steps <= 1e-9).all())  # Platt's line falls where the model was worse than none
    checks = reproduce(run.id, store)
    assert checks["same"].all() and "reproduced calibrator.json" in checks.index
    found = load_run(run.id, store)
    live = Predictor(replace(found, info=found.info | {"trained_until": str(bars.index[1500])}), bars.iloc[:1600])
    rows = pd.concat([live.update(bars.iloc[[k]]) for k in range(1600, 1620)]).set_index("ts")
    batch = found.predict(bars).loc[rows.index]
    assert len(rows) == 20 and np.allclose(rows["prediction"].to_numpy(float), batch["prediction"], rtol=1e-6)
    assert not np.allclose(batch["prediction"], found.model.predict(found.pipeline.process_data(bars).loc[rows.index]))


def test_a_calibration_knows_neither_the_future_nor_another_target(bars):
    asked = replace(CALM, target="direction", calibrate="isotonic")
    start = runs.first_test(asked, bars)
    whole = walk.walk_forward(asked, runs.prepare(bars, asked), start)[0]
    cut = walk.walk_forward(asked, runs.prepare(bars.iloc[:1700], asked), start)[0]
    assert np.allclose(cut["prediction"], whole.loc[cut.index, "prediction"], rtol=1e-9)
    for wrong in ({"target": "return"}, {"calibrate": "beta"}):
        with pytest.raises(ConfigError, match="calibrate"):
            replace(asked, **wrong)


@pytest.mark.parametrize("text", ["{}", '{"method": "pickle", "x": [1.0], "y": []}', '{"method": "platt", "x": [1.0, null], "y": []}', "[]"])
def test_a_stored_calibrator_is_a_few_numbers_or_none(tmp_path, text):
    (tmp_path / "calibrator.json").write_text(text)
    with pytest.raises(RunMismatch, match="a calibrator"):
        runs._read_calibrator(tmp_path / "calibrator.json")


def test_the_report_shows_reliability_before_and_after(store):
    done = train_report(replace(CALM, target="direction", calibrate="platt"), store)
    page = done.report.read_text()
    assert all(text in page for text in ("as the model says", "calibrated", "Calibration: platt"))


def test_garch_is_a_model_of_runs_with_a_finite_history(store, bars):
    asked = replace(CALM, target="volatility", model="garch", params={}, features=("ret_1_lags_167",))
    with connect(store) as con:
        run = train_run(con, asked, store)
    assert run.info["warmup"] == 169 and run.info["identity"]["own_features"] == {}
    assert (run.predictions["prediction"] > 0).all() and run.info["scores"]["model"]["ic"] > 0.3  # the volatility rises and falls slowly
    stored = json.loads((run.folder / "model.garch.json").read_text())
    assert set(stored) == {"omega", "alpha", "beta", "mean", "start", "slope"} and stored["alpha"] > 0 and stored["beta"] > 0.5
    checks = reproduce(run.id, store)
    assert checks["same"].all() and "reproduced model.garch.json" in checks.index
    found = load_run(run.id, store)
    whole = found.predict(bars).tail(20)
    for k in (0, 19):  # nothing before the declared history has a part in it, and nothing is missing of it
        at = bars.index.get_loc(whole.index[k])
        alone = found.predict(bars.iloc[at - 168 : at + 1]).iloc[-1]
        assert np.allclose(alone[["prediction", "lower", "upper"]].astype(float), whole.iloc[k][["prediction", "lower", "upper"]].astype(float), rtol=1e-12)
    for wrong in ({"target": "return"}, {"params": {"horizon": 3}}):
        with pytest.raises(ConfigError):
            replace(asked, **wrong)
    assert [f.name for f in replace(asked, features=("default",)).resolved.model] == [f.name for f in asked.resolved.model]  # its fixed inputs


def test_lags_by_name_are_the_packages_own_and_join_no_group():
    from cryptoresearch.features.registry import feature_names, REGISTRY, resolve

    before = feature_names("all")
    assert question.own_features(("ret_1_lags_40", "rv_24_lag_9")) == {} and feature_names("all") == before and "rv_24_lag_9" not in REGISTRY
    assert [f.warmup for f in resolve("ret_1_lags_2")] == [2, 3, 4]


def test_paths_of_a_combinatorial_split_stand_in_the_report_and_leave_the_run_alone(store, bars):
    from cryptoresearch.evaluation.cpcv import path_predictions, score_paths

    with connect(store) as con:
        before = train_run(con, CALM, store)
    done = train_report(CALM, store, split="cpcv")
    page = done.report.read_text()
    assert done.run_id == before.id and not done.reused
    assert all(f"path {k}" in page for k in range(1, 6)) and "path 6" not in page and "walk-forward" in page
    assert train_report(CALM, store, split="cpcv").reused and train_report(CALM, store).reused
    with pytest.raises(ConfigError, match="walk or cpcv"):
        train_report(CALM, store, split="kfold")
    samples = runs.prepare(bars, CALM)
    paths = path_predictions(CALM, samples)
    table = score_paths(paths, bars, CALM)
    assert len(table) == 5 and {"ic", "break_even_bps", "r2_oos"} <= set(table) and "sharpe" not in table and f"{table['ic'].iloc[0]:.3f}".replace("-", "−") in page


@pytest.mark.parametrize("target, more", [("direction", {"calibrate": "platt"}), ("volatility", {}), ("meta", {"label": {"window": 48, "primary": "ret_6"}})])
def test_no_path_has_seen_the_rows_it_forecasts(bars, target, more):
    from cryptoresearch.evaluation.cpcv import path_predictions, score_paths

    asked = replace(CALM, target=target, features=("ret_1", "ret_6", "calendar"), **more)  # which look back a few hours: much is purged around each group
    samples = runs.prepare(bars, asked)
    table = score_paths(path_predictions(asked, samples), bars, asked)
    assert len(table) == 5 and table["ic"].notna().all()
    noise = replace(samples, X=samples.X.assign(marker=np.arange(len(samples.X), dtype=float)), labels=samples.labels.assign(y=np.where(samples.labels["y"].notna(), np.random.default_rng(1).integers(0, 2, len(samples.X)), np.nan) + (0.5 if target == "volatility" else 0)))
    if target != "meta":
        empty = score_paths(path_predictions(asked, noise), bars, asked)
        assert empty["ic"].abs().max() < 0.15  # outcomes without any order; a row's own outcome would show at once


def test_the_command_line_asks_for_every_option(monkeypatch):
    from typer.testing import CliRunner

    from cryptoresearch import cli
    from cryptoresearch.cli_research import take_symbol
    from cryptoresearch.serving import batch

    asked = []

    def keep(config, **more):
        asked.append((config, more["split"]))
        raise ConfigError("asked")

    monkeypatch.setattr(cli, "take_bars", take_symbol)
    monkeypatch.setattr(batch, "train_report", keep)
    told = CliRunner().invoke(cli.app, ["train", "--interval", "adaptive", "--interval-param", "of=scaled", "--interval-param", "given=log_sigma", "--split", "cpcv"])
    CliRunner().invoke(cli.app, ["train", "--target", "direction", "--calibrate", "platt"])
    CliRunner().invoke(cli.app, ["train", "--target", "volatility", "--model", "garch", "--feature", "ret_1_lags_167"])
    assert len(asked) == 3, told.output
    (first, split), (second, _), (third, _) = asked
    assert (first.interval, first.interval_params["given"], first.interval_params["volatility"], split) == ("adaptive", ["log_sigma"], "har_ridge", "cpcv")
    assert second.calibrate == "platt" and (third.model, third.features) == ("garch", ("ret_1_lags_167",))
