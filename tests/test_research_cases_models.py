"""Corner cases of models, intervals, calibration and searches: the unit of the label, one class, empty columns, few rows, failed trials."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cryptoresearch.features.selection import contributions
from cryptoresearch.models.boosting import TailModel
from cryptoresearch.models.conformal import Calibrator, conformal_margin
from cryptoresearch.models.garch import Garch
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.identity import read_data
from cryptoresearch.runs.run import train_run
from cryptoresearch.runs.tuning import MOST_FAILED, open_study, trial_table, tune
from cryptoresearch.runs.walk_forward import first_test, prepare, walk_forward
from scipy import stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import ConfigError, CryptoResearchError, DataNotFound, InputError
from cryptoresearch.ingest.files import process_file
from cryptoresearch.labels.targets import as_returns
from cryptoresearch.models.catalogue import MODELS
from cryptoresearch.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # small samples

ROUNDS = {"n_estimators": 20, "learning_rate": 0.3, "early_stopping_rounds": 10}
SMALL = {
    "xgboost": ROUNDS | {"min_child_weight": 20, "n_threads": 1},
    "lightgbm": ROUNDS | {"min_child_samples": 20, "n_threads": 1},
    "histgb": ROUNDS | {"min_samples_leaf": 20},
    "gb": ROUNDS | {"min_samples_leaf": 20},
    "reversal": {"n_estimators": 20, "learning_rate": 0.3, "min_child_samples": 20, "penalty": 10.0, "n_threads": 1},
    "ensemble": {"members": ("ridge", "lightgbm", "gb"), "member_params": {"lightgbm": ROUNDS | {"n_threads": 1}, "gb": ROUNDS}},
}
THREADS = {"xgboost": {"n_threads": 1}, "lightgbm": {"n_threads": 1}, "ensemble": {"member_params": {"lightgbm": {"n_threads": 1}}}}
TREES = ("xgboost", "lightgbm", "histgb", "gb")
QUANTILES = TREES
EVENTS = (*TREES, "ridge", "ensemble")
SPLIT = ("ridge", "har", "har_ridge", "decay_ridge", "garch")  # models without rounds


def make(name: str, **more: object) -> TailModel:
    return MODELS[name](**SMALL.get(name, {}), **more)


def features(name: str, n: int = 700, seed: int = 0) -> pd.DataFrame:
    "Features that the model can use, in order of time."
    rng = np.random.default_rng(seed)
    index = pd.date_range("2024-01-01", periods=n, freq="h", tz="UTC")
    names = getattr(MODELS[name], "needs", tuple("abcd"))
    if name == "garch":
        r = np.r_[np.zeros(168), 0.01 * rng.normal(size=n) * np.exp(0.5 * np.sin(np.arange(n) / 40))]
        return pd.DataFrame({c: r[168 - k : 168 - k + n] for k, c in enumerate(names)}, index)
    X = pd.DataFrame(rng.normal(size=(n, len(names))), index, names)
    if names[-1].startswith("hour_of_week"):
        X[names[-1]] = np.arange(n) % 168
    return X


def outcomes(X: pd.DataFrame, seed: int = 0) -> np.ndarray:
    "Positive outcomes that depend on the first feature; outcomes of either sign for the model of signs."
    first = X.iloc[:, 0].to_numpy()
    y = np.exp(0.5 * first / first.std() + 0.3 * np.random.default_rng(seed + 1).normal(size=len(X)))
    return y - 1.0 if X.columns[0] == "std_return" else y


def numbers(model: TailModel, X: pd.DataFrame) -> np.ndarray:
    "Forecasts, and the interval where the model has one."
    return np.array([model.predict(X), *(model.predict_interval(X) if model.loss == "mean" else ())])


# the unit of the label


@pytest.mark.parametrize("unit", [1e-6, pytest.param(7e-5, marks=pytest.mark.heavy), 1e6, 1e-150])
@pytest.mark.parametrize(("name", "log_target"), [(n, log) for n in MODELS for log in (False, True) if (n, log) != ("reversal", True)])
def test_a_forecast_scales_with_its_label(name, log_target, unit):
    X = features(name)
    y = outcomes(X)
    now, then = (numbers(make(name, log_target=log_target).fit(X, v), X) for v in (y * unit, y))
    assert np.ptp(then[0]) > (0.02 if name == "garch" else 0.1)
    assert np.abs(now / unit - then).max() < 1e-6 * np.abs(then).max()


@pytest.mark.parametrize("unit", [1e-6, 1e6])
@pytest.mark.parametrize("name", QUANTILES)
def test_a_quantile_scales_with_its_label(name, unit):
    X = features(name)
    y = outcomes(X)
    now, then = (make(name, loss="quantile", alpha=0.8).fit(X, v).predict(X) for v in (y * unit, y))
    assert np.ptp(then) > 0.1 and abs((y < then).mean() - 0.8) < 0.08
    assert np.abs(now / unit - then).max() < 1e-6 * np.abs(then).max()


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("garch", "reversal")])  # reversal: the sign, about zero
def test_a_forecast_moves_with_the_level_of_its_label(name):
    X = features(name)
    y = outcomes(X)
    now, then = (numbers(make(name).fit(X, v), X) for v in (y + 1000.0, y))
    assert np.abs(now - 1000.0 - then).max() < 1e-6


@pytest.mark.parametrize("unit", [1e-9, 1e9])
@pytest.mark.parametrize("name", MODELS)
def test_a_forecast_does_not_depend_on_the_unit_of_the_weights(name, unit):
    X = features(name)
    y, w = outcomes(X), np.linspace(0.2, 1.8, len(X))
    now, then = (numbers(make(name).fit(X, y, sample_weight=v), X) for v in (w * unit, w))
    assert np.abs(now - then).max() < 1e-6 * np.abs(then).max()


def test_weights_that_leave_nothing_to_fit_or_to_stop_by_are_refused():
    X = features("ridge")
    late = np.arange(len(X)) >= 595  # the tail
    for weight in (late, ~late):
        for name in EVENTS:
            with pytest.raises(InputError, match="weight"):
                make(name).fit(X, outcomes(X), sample_weight=weight.astype(float))


def test_the_default_booster_finds_what_a_ridge_finds_in_seconds():
    rng = np.random.default_rng(0)
    r = 5e-5 * rng.normal(size=6000)
    for t in range(1, len(r)):
        r[t] -= 0.15 * r[t - 1]
    X, y = pd.DataFrame({f"ret_{k}": np.roll(r, k) for k in range(3)})[3:-1], r[4:]
    for name in ("xgboost", "ridge"):
        found = MODELS[name]().fit(X[:4000], y[:4000]).predict(X[4000:])
        assert np.corrcoef(found, y[4000:])[0, 1] > 0.08, name


@pytest.mark.parametrize("value", [0.0, 3.7e-7, -5.0, 1e9])
@pytest.mark.parametrize("name", MODELS)
def test_a_constant_label_is_forecast(name, value, tmp_path):
    X = features(name)
    noise = 1.0 + 1e-16 * np.arange(len(X))  # rounding noise is no signal
    model = make(name).fit(X, value * noise)
    assert np.allclose(numbers(model, X), value, rtol=1e-9, atol=1e-300)
    model.save(tmp_path)
    assert np.array_equal(numbers(MODELS[name].load(tmp_path), X), numbers(model, X))


@pytest.mark.parametrize("name", MODELS)
def test_a_stored_model_keeps_the_unit_and_an_older_one_has_none(name, tmp_path):
    X = features(name)
    model = make(name).fit(X, 1e-5 * outcomes(X))
    model.save(tmp_path)
    assert np.array_equal(numbers(MODELS[name].load(tmp_path), X), numbers(model, X))
    file = tmp_path / "model.json"
    info = json.loads(file.read_text())
    scale, centre = info.pop("scale"), info.pop("centre")
    file.write_text(json.dumps(info))
    old = MODELS[name].load(tmp_path)
    assert (old.scale_, old.centre_) == (1.0, 0.0)
    assert np.allclose(centre + scale * old.predict(X), model.predict(X), rtol=1e-12)
    for change in ({"scale": 0.0}, {"scale": float("inf")}, {"scale": "1"}, {"centre": float("nan")}, {"scale": None}):
        file.write_text(json.dumps(info | {"scale": scale, "centre": centre} | change))
        with pytest.raises(CryptoResearchError, match="rain the run again"):
            MODELS[name].load(tmp_path)


# rows in a leaf


def rare(n: int = 4000, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    "Features, and an event that happens in about 3 % of the rows."
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(rng.normal(size=(n, 4)), columns=list("abcd"))
    return X, (rng.random(n) < expit(-4.0 + 1.0 * X["a"])).astype(float).to_numpy()


@pytest.mark.parametrize("name", EVENTS)
def test_a_rare_event_is_forecast(name):
    X, y = rare(6000)
    assert 0.015 < y.mean() < 0.05
    p = MODELS[name](loss="probability", **THREADS.get(name, {})).fit(X[:3000], y[:3000]).predict(X[3000:])
    assert roc_auc_score(y[3000:], p) > 0.65
    assert abs(p.mean() - y.mean()) < 0.01


@pytest.mark.parametrize("loss", ["mean", "probability", "quantile"])
@pytest.mark.parametrize("name", ["xgboost", "lightgbm", "histgb", "gb"])
def test_a_leaf_has_as_many_rows_as_asked(name, loss):
    X, event = rare(3000)
    y = event if loss == "probability" else 1e-4 * (X["a"].to_numpy() + event)
    leaf = {"xgboost": "min_child_weight", "lightgbm": "min_child_samples"}.get(name, "min_samples_leaf")
    column = {"gb": "max_features", "histgb": "max_features"}.get(name, "colsample_bytree")
    plain = {column: 1.0} | ({} if name == "histgb" else {"subsample": 1.0})
    asked = {"n_estimators": 1, "learning_rate": 1.0, "early_stopping_rounds": 1, "loss": loss, "alpha": 0.7} | plain | THREADS.get(name, {})
    least = {}
    for rows in (60, 400):
        p = MODELS[name](**asked, **{leaf: rows}).fit(X, y).predict(X)
        least[rows] = int(np.unique(p.round(12), return_counts=True)[1].min())
        share = 0.25 if name == "xgboost" and loss == "quantile" else 0.9  # rows of average curvature
        assert share * rows <= least[rows] < len(X) / 2, (rows, least)  # more than one leaf, none smaller


# one class


@pytest.mark.parametrize("happened", [0.0, 1.0])
@pytest.mark.parametrize("name", EVENTS)
def test_one_class_gives_a_probability_near_it(name, happened, tmp_path):
    X = features(name)
    model = make(name, loss="probability").fit(X, np.full(len(X), happened))
    n = len(X)
    expected = (n * happened + 0.5) / (n + 1)
    assert np.all(model.predict(X) == expected) and model.predict(X).shape == (n,)
    assert (model.importance() == 0).all() and model.best_iteration_ == 0
    model.save(tmp_path)
    assert np.array_equal(MODELS[name].load(tmp_path).predict(X), model.predict(X))


@pytest.mark.parametrize("name", EVENTS)
def test_one_class_until_the_tail_is_learned_from_all_rows(name):
    X = features(name)
    late = (np.arange(len(X)) >= 640).astype(float)
    p = make(name, loss="probability").fit(X, late).predict(X)
    assert np.isfinite(p).all() and 0 < p.min() <= p.max() < 1 and abs(p.mean() - late.mean()) < 0.1
    weighted = make(name, loss="probability").fit(X, late, sample_weight=np.where(late > 0, 1e-300, 1.0))
    assert np.isfinite(weighted.predict(X)).all() and weighted.predict(X).max() < 0.01


def test_a_class_without_weight_is_no_class():
    X = features("ridge")
    y = np.tile([0.0, 1.0], len(X) // 2)
    for name in EVENTS:
        p = make(name, loss="probability").fit(X, y, sample_weight=y).predict(X)
        assert np.all(p == (len(X) + 0.5) / (len(X) + 1)), name


def test_a_member_that_sees_one_class_is_averaged(tmp_path):
    X = features("ridge")
    first = (np.arange(len(X)) < 200).astype(float)  # the fold that leaves out the beginning has one class
    model = make("ensemble", loss="probability", folds=3).fit(X, first)
    assert 0 < model.predict(X).min() <= model.predict(X).max() < 1
    model.save(tmp_path)
    assert np.array_equal(MODELS["ensemble"].load(tmp_path).predict(X), model.predict(X))


@pytest.mark.parametrize("text", ['{"probability": 2.0}', '{"probability": "x"}', '{"probability": 0.5, "more": 1}', '{"probability": NaN}'])
def test_a_damaged_constant_is_refused(text, tmp_path):
    import hashlib

    X = features("gb")
    make("gb", loss="probability").fit(X, np.ones(len(X))).save(tmp_path)
    info = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / MODELS["gb"].file).write_text(text)
    (tmp_path / "model.json").write_text(json.dumps(info | {"trees_sha256": hashlib.sha256(text.encode()).hexdigest()}))
    with pytest.raises(CryptoResearchError, match="do not load this file"):
        MODELS["gb"].load(tmp_path)


# calibration without information


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize("forecast", [0.3, 0.5, 0.999, 0.0, 1.0])
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-5])
def test_a_constant_forecast_is_calibrated_to_the_base_rate(method, forecast, noise):
    rng = np.random.default_rng(0)
    happened = (rng.random(5000) < 0.6).astype(float)
    p = np.clip(forecast + noise * rng.normal(size=5000), 0, 1)
    found = Calibrator(method).fit(p, happened)(np.array([0.0, 0.1, 0.3, forecast, 0.5, 0.9, 1.0]))
    within = 0.25 if noise and method == "isotonic" else 0.12 if noise else 1e-3  # steps at the ends of noise hold few rows
    assert np.abs(found - happened.mean())[3] < 0.03
    assert np.abs(found - happened.mean()).max() < (0.45 if within == 0.25 else within)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize("happened", [0.0, 1.0])
def test_one_class_is_calibrated_to_a_probability_near_it(method, happened):
    rng = np.random.default_rng(0)
    found = Calibrator(method).fit(rng.random(200), np.full(200, happened))
    assert np.allclose(found(np.array([0.0, 0.2, 0.7, 1.0])), (200 * happened + 0.5) / 201, rtol=1e-12)
    kept = Calibrator(method, found.x, found.y)
    assert np.array_equal(kept([0.1, 0.9]), found([0.1, 0.9]))


def test_platt_finds_the_curve_and_does_not_go_beyond_what_it_saw():
    rng = np.random.default_rng(0)
    z = 0.02 * rng.normal(size=200_000)  # in a narrow range too
    happened = (rng.random(len(z)) < expit(0.5 + 20 * z)).astype(float)
    found = Calibrator("platt").fit(expit(z), happened)
    grid = np.linspace(-0.05, 0.05, 11)
    assert np.allclose(found(expit(grid)), expit(0.5 + 20 * grid), atol=0.01)
    assert found([0.0])[0] == pytest.approx(found([expit(z.min())])[0]) and found([1.0])[0] == pytest.approx(found([expit(z.max())])[0])
    assert Calibrator("platt", (2.0, 0.5))([0.9])[0] == pytest.approx(expit(2 * np.log(9) + 0.5))  # as older runs stored it


# intervals of few rows


@pytest.mark.parametrize("rows", [20, 50, 100])
def test_the_default_interval_covers_with_few_rows_in_the_tail(rows):
    rng, covered = np.random.default_rng(rows), []
    X = np.zeros((2 * rows, 1))
    for _ in range(150):
        y = rng.normal(size=2 * rows)
        low, high = MODELS["ridge"](validation_fraction=0.5).fit(X, y).predict_interval(X[:1])
        covered.append(stats.norm.cdf(high[0]) - stats.norm.cdf(low[0]))
    error = np.std(covered) / np.sqrt(len(covered))
    assert 0.9 - 2 * error < np.mean(covered) < 0.94


@pytest.mark.parametrize(("level", "rows"), [(0.9, 20), (0.95, 39), (0.95, 38), (0.99, 199), (0.99, 198), (0.5, 20)])
def test_an_interval_that_the_tail_cannot_give_is_infinite(level, rows, tmp_path):
    X, y = np.zeros((2 * rows, 1)), np.random.default_rng(0).normal(size=2 * rows)
    model = MODELS["ridge"](validation_fraction=0.5, level=level).fit(X, y)
    rank = int(np.floor((rows + 1) * (1 - level) / 2 + 1e-9))
    low, high = (v[0] - model.predict(X)[0] for v in model.predict_interval(X))
    residual = np.sort(y[rows:] - y[:rows].mean())
    expected = (residual[rank - 1], residual[rows - rank]) if rank else (-np.inf, np.inf)
    assert (low, high) == pytest.approx(expected)
    model.save(tmp_path)
    json.loads((tmp_path / "model.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert [v[0] for v in MODELS["ridge"].load(tmp_path).predict_interval(X)] == [v[0] for v in model.predict_interval(X)]


def test_the_rank_of_a_margin_is_not_one_too_high_by_rounding():
    for level in (0.07, 0.29, 0.57, 0.58, 0.7, 0.9, 0.95):
        n = 99
        assert conformal_margin(np.arange(1.0, n + 1), level) == round(level * 100)
    assert conformal_margin(np.arange(8.0), 0.9) == np.inf and conformal_margin(np.arange(9.0), 0.9) == 8


# typed errors, and columns without values


@pytest.mark.parametrize("name", MODELS)
def test_no_rows_give_no_forecasts(name):
    X = features(name)
    for loss in ("mean", "probability", "quantile"):
        if loss == "mean" or name in (EVENTS if loss == "probability" else QUANTILES):
            y = outcomes(X)
            model = make(name, loss=loss).fit(X, (y > 1).astype(float) if loss == "probability" else y)
            assert model.predict(X[:0]).shape == (0,) and model.predict(X[:0]).dtype == np.float64
            if loss == "mean":
                assert [v.shape for v in model.predict_interval(X[:0])] == [(0,), (0,)]


@pytest.mark.parametrize("part", ["all", "fit", "tail", "all columns"])
@pytest.mark.parametrize("name", MODELS)
def test_a_column_without_values_is_no_column(name, part, tmp_path):
    X = features(name)
    y = outcomes(X)
    empty = X.astype(float)
    rows = {"fit": slice(0, 640), "tail": slice(560, None)}.get(part, slice(None))
    empty.iloc[rows, slice(None) if part == "all columns" else 1] = np.nan
    for loss in ("mean", "probability"):
        if loss == "probability" and name not in EVENTS:
            continue
        try:
            model = make(name, loss=loss).fit(empty, (y > 1).astype(float) if loss == "probability" else y)
        except CryptoResearchError as e:  # models that need this very feature
            assert name not in EVENTS and "expected" in str(e), e
            continue
        assert np.isfinite(model.predict(empty)).all() and np.isfinite(model.predict(X)).all()
        model.save(tmp_path)
        assert np.array_equal(MODELS[name].load(tmp_path).predict(empty), model.predict(empty))


@pytest.mark.parametrize("name", MODELS)
def test_constant_features_give_a_constant_forecast(name, tmp_path):
    X = features(name)
    y = outcomes(X)
    flat = X * 0.0 + 3.0
    for loss in ("mean", "probability"):
        if loss == "probability" and name not in EVENTS:
            continue
        try:
            model = make(name, loss=loss).fit(flat, (y > 1).astype(float) if loss == "probability" else y)
        except CryptoResearchError as e:
            assert name == "garch", e
            continue
        p = model.predict(flat)
        assert np.ptp(p) < 1e-9 and abs(p[0] - ((y > 1) if loss == "probability" else y).mean()) < 0.05
        model.save(tmp_path)
        assert np.array_equal(MODELS[name].load(tmp_path).predict(flat), p)


@pytest.mark.parametrize("name", MODELS)
def test_features_beyond_single_precision_are_refused(name):
    X = features(name)
    X.iloc[3, 0] = 1e39
    with pytest.raises(InputError, match=str(X.columns[0])):
        make(name).fit(X, outcomes(X.fillna(0).clip(-3, 3)))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("xgboost", {"learning_rate": -1.0, "max_depth": -2}), ("xgboost", {"subsample": 2.0}), ("lightgbm", {"num_leaves": 1}),
        ("histgb", {"min_samples_leaf": 0}), ("gb", {"subsample": 2.0}), ("ridge", {"penalty": -1.0}), ("har_ridge", {"penalty": -1.0}),
        ("ensemble", {"members": ["gb"], "member_params": {"gb": {"subsample": 2.0}}}),
    ],
)  # fmt: skip
def test_parameters_that_a_library_refuses_are_a_typed_error(name, params):
    X = features(name)
    with pytest.raises(CryptoResearchError, match="expected"):
        MODELS[name](**params).fit(X, outcomes(X))


@pytest.mark.parametrize("returns", [np.zeros(900), np.full(900, 0.001), 0.001 + 1e-19 * np.arange(900), np.full(900, np.nan)])
@pytest.mark.parametrize("log_linear", [True, False])
def test_garch_of_returns_that_do_not_vary_is_a_typed_error(returns, log_linear):
    with pytest.raises(InputError, match="expected"):
        Garch(horizon=5, log_linear=log_linear).fit(returns)


@pytest.mark.parametrize("horizon", [899, 900, 901, 5000])
def test_garch_of_a_horizon_beyond_its_returns_is_a_typed_error(horizon):
    r = 0.01 * np.random.default_rng(0).normal(size=900)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="horizon"):
            Garch(horizon=horizon).fit(r)
        assert np.isfinite(Garch(horizon=horizon, log_linear=False).fit(r).predict(r)).all()


@pytest.mark.parametrize("loss", ["mean", "quantile", "probability"])
@pytest.mark.parametrize("name", ["xgboost", "lightgbm"])
def test_contributions_sum_to_the_forecast_in_the_unit_of_the_label(name, loss):
    X = features(name)
    y = 1e-4 * outcomes(X) + 5.0
    for outcome in (y, np.ones(len(X))):
        model = make(name, loss=loss).fit(X, (outcome > 5.0001).astype(float) if loss == "probability" else outcome)
        total = contributions(model, X).sum(axis=1).to_numpy()
        p = model.predict(X)
        assert np.allclose(total, np.log(p / (1 - p)) if loss == "probability" else p, rtol=0, atol=1e-5 if loss == "probability" else 1e-9)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "garch"])
def test_a_feature_that_is_constant_until_the_forecast_changes_nothing(name):
    X = features(name)
    X.iloc[:, 1] = 0.1  # the mean of many of these differs by rounding
    y = outcomes(X)
    later = X.assign(**{X.columns[1]: np.linspace(-5.0, 5.0, len(X))})
    model = make(name).fit(X, y)
    assert np.allclose(model.predict(later), model.predict(X), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("name", MODELS)
def test_a_handful_of_rows_gives_forecasts_or_a_typed_error(name, n, tmp_path):
    X = features(name)[:n]
    for loss, y in (("mean", outcomes(X)), ("probability", np.ones(n)), ("probability", (np.arange(n) > 0).astype(float))):
        if loss == "mean" or name in EVENTS:
            try:
                model = make(name, loss=loss).fit(X, y)
            except CryptoResearchError as e:
                assert name == "garch" and "expected" in str(e)
                continue
            assert np.isfinite(model.predict(X)).all()
            model.save(tmp_path)
            assert np.array_equal(MODELS[name].load(tmp_path).predict(X), model.predict(X))


@pytest.mark.parametrize("returns", [np.r_[np.inf, np.full(900, 0.01)], np.zeros((900, 2)), ["a"] * 900, None])
def test_garch_of_something_else_is_a_typed_error(returns):
    with pytest.raises(InputError, match="expected"):
        Garch(horizon=5).fit(returns)


# searches, and runs of one class


def store(home: Path, close: np.ndarray) -> Settings:
    "A store with hourly candles of the closes given."
    opens, n = np.r_[close[0], close[:-1]], len(close)
    times = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC")
    volume = np.random.default_rng(1).lognormal(size=n)
    high, low = np.maximum(opens, close), np.minimum(opens, close)
    pd.DataFrame({"open_time": times, "open": opens, "high": high, "low": low, "close": close, "volume": volume}).to_parquet(home / "TESTUSDT-1h.parquet")
    settings = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / "runs"))
    with init_duckdb(settings) as con:
        process_file(con, home / "TESTUSDT-1h.parquet", kind="klines", symbol="TESTUSDT", interval="1h")
        make_bars(con, "TESTUSDT", "1h")
    return settings


def walk(n: int = 2500, drift: float = 0.0, sd: float = 0.01) -> np.ndarray:
    return 100 * np.exp(drift * np.arange(n) + np.random.default_rng(0).normal(0, sd, n).cumsum())


SEARCHED = RunConfig(symbol="TESTUSDT", horizon=4, model="ridge", features=("momentum",), test_start="2024-03-20")


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Settings:
    return store(tmp_path_factory.mktemp("walk"), walk())


@pytest.mark.parametrize("target", ["return", "volatility", "direction"])
def test_a_search_on_a_constant_price_stops_and_says_why(tmp_path, target):
    settings = store(tmp_path, np.full(2500, 100.0))
    with connect(settings) as con, pytest.raises(CryptoResearchError, match="outcomes that differ"):
        tune(con, replace(SEARCHED, target=target), 4, settings=settings)


def test_a_search_whose_folds_have_no_loss_stops_and_says_why(tmp_path):
    close = walk()
    close[1300:] = close[1300]  # the last inner folds have no volatility
    settings = store(tmp_path, close)
    asked = replace(SEARCHED, target="volatility", features=("volatility",))
    with connect(settings) as con, pytest.raises(DataNotFound, match=r"trials in a row without one: the QLIKE of inner fold \d is undefined"):
        tune(con, asked, 40, settings=settings)
    [journal] = (tmp_path / "runs" / "studies").glob("*.journal")
    table = trial_table(open_study(journal.stem, settings=settings))
    assert table["state"].tolist() == ["FAIL"] * MOST_FAILED


def test_fixed_parameters_are_in_the_table_and_not_searched(walked):
    with connect(walked) as con:
        one = tune(con, replace(SEARCHED, params={"penalty": 10.0, "validation_fraction": 0.2}), 3, n_folds=2, settings=walked)
        assert (one.table["penalty"] == 10.0).all() and (one.table["validation_fraction"] == 0.2).all() and one.table["clip"].nunique() == 3
        assert set(one.study.best_params) == {"clip", "weights", "refit_every"} and one.config.params["penalty"] == 10.0
        members = {"members": ["ridge", "lightgbm"], "member_params": {"ridge": {"clip": 5.0}, "lightgbm": {"n_estimators": 5, "num_leaves": 4}}}
        many = tune(con, replace(SEARCHED, model="ensemble", params=members), 2, n_folds=2, settings=walked)
        assert (many.table["ridge.clip"] == 5.0).all() and (many.table["lightgbm.num_leaves"] == 4).all() and many.table["ridge.penalty"].nunique() == 2
        assert many.config.params["member_params"]["ridge"]["clip"] == 5.0 and "ridge.clip" not in many.study.best_params
        with pytest.raises(ConfigError, match="penalty, clip"):
            tune(con, replace(SEARCHED, params={"penalty": 10.0, "clip": 4.0}), 3, settings=walked)
        with pytest.raises(ConfigError, match="fixed"):
            only = {"members": ["ridge"], "member_params": {"ridge": {"clip": 5.0, "penalty": 1.0}}}
            tune(con, replace(SEARCHED, model="ensemble", params=only), 3, settings=walked)


def forecasts(settings: Settings, asked: RunConfig) -> pd.DataFrame:
    with connect(settings) as con:
        bars = read_data(con, asked).bars
    return walk_forward(asked, prepare(bars, asked), first_test(asked, bars))[0].dropna(subset=["y"])


META = replace(SEARCHED, target="meta", label={"primary": "ret_3", "window": 100, "cost_bps": 9000.0})  # a cost that no trade pays


@pytest.mark.parametrize("more", [{}, {"calibrate": "isotonic"}, {"calibrate": "platt"}, {"weights": "recency:1D"}, {"model": "gb"}], ids=str)
def test_a_meta_label_that_never_paid_is_not_traded(walked, more):
    p = forecasts(walked, replace(META, **more))
    assert (p["y"] == 0).all() and p["prediction"].between(1e-6, 0.01).all() and np.allclose(p["prediction"], p["base"], rtol=1e-9)
    assert (as_returns(p, "meta")["prediction"] == 0).all()


@pytest.mark.parametrize("model", ["xgboost", "lightgbm", "histgb", "gb", "ridge", "ensemble"])
def test_an_event_that_always_happened_is_forecast_and_not_sold(rising, model):
    for target, side in (("direction", 1), ("triple_barrier", 0)):
        p = forecasts(rising, replace(RISING, model=model, target=target, label={} if target == "direction" else {"window": 100}))
        assert p["prediction"].min() > 0.998 and (p["prediction"] < 1).all()
        assert set(np.sign(as_returns(p, target)["prediction"])) == {side}


RISING = replace(SEARCHED, test_start="2024-02-10", target="triple_barrier", label={"window": 100})


@pytest.fixture(scope="module")
def rising(tmp_path_factory) -> Settings:
    return store(tmp_path_factory.mktemp("rising"), walk(1500, 0.004, 0.001))


@pytest.mark.parametrize("asked", ["never", "always"])
def test_a_run_of_one_class_is_judged(walked, rising, asked):
    settings = walked if asked == "never" else rising
    with connect(settings) as con:
        run = train_run(con, META if asked == "never" else RISING, settings)
    assert run.info["strategy"]["turnover"] == 0 and run.info["strategy"]["total_return"] == 0
    assert run.info["level"] in ("none", "unclear")


def test_a_base_rate_of_no_or_all_events_gives_no_position():
    index = pd.date_range("2024-01-01", periods=4, freq="h", tz="UTC")
    said = pd.DataFrame({"prediction": [1e-6, 0.5, 0.6, 0.9], "base": [0.0, 1.0, 0.5, 0.95], "side": 1.0, "lower": np.nan, "upper": np.nan}, index)
    assert np.allclose(as_returns(said, "meta")["prediction"], [0, 0, 0.1, 0])
    assert np.allclose(as_returns(said, "triple_barrier")["prediction"], [0, 0, 0.1, -0.05])
    assert np.allclose(as_returns(said, "direction")["prediction"], [1e-6 - 0.5, 0, 0.1, 0.4])
