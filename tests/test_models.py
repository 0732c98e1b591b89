"Labels, splits, boosting, scores and the strategy: properties, oracles, and what needs a process of its own."
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from sklearn.base import clone
from sklearn.linear_model import Ridge
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from threadpoolctl import threadpool_limits

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.demo import SAMPLE
from cryptoresearch.errors import DataNotFound, SchemaError
from cryptoresearch.metrics.scores import (
    calibration_table,
    coverage_table,
    diebold_mariano,
    hac_lags,
    ic,
    ic_test,
    long_run_variance,
    rank_ic,
    score_table,
)
from cryptoresearch.metrics.strategy import deflated_sharpe, expected_max_sharpe, sign_strategy, slices
from cryptoresearch.labels.baselines import baselines
from cryptoresearch.evaluation.scorecard import known_quantiles
from cryptoresearch.models.boosting import purged_tail, XGBoostModel
from cryptoresearch.models.catalogue import MODELS
from cryptoresearch.models.conformal import adaptive_intervals, quantile_lines
from cryptoresearch.models.linear import HARRidgeModel
from cryptoresearch.labels.horizon import fixed_horizon, sample_intervals
from cryptoresearch.labels.targets import previous_outcome
from cryptoresearch.models.splits import overlaps, WalkForward
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.run import fit_last
from cryptoresearch.runs.walk_forward import prepare, sample_weights, walk_forward

HOUR = pd.Timedelta("1h")
few = settings(max_examples=60, deadline=None, derandomize=True)


def random_bars(n: int, seed: int = 0, gaps: int = 0) -> pd.DataFrame:
    "Bars of a random walk, some of them missing."
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    ts = pd.date_range("2024-01-01", periods=n, freq="h", tz="UTC", name="ts")
    bars = pd.DataFrame({"open": np.r_[100.0, close[:-1]], "close": close, "close_ts": ts + HOUR, "gap": False}, index=ts)
    holes = rng.choice(n, gaps, replace=False)
    bars.iloc[holes, bars.columns.get_loc("gap")] = True
    bars.loc[bars["gap"], ["open", "close"]] = np.nan
    return bars


@st.composite
def random_intervals(draw: st.DrawFn) -> pd.DataFrame:
    "Samples at irregular times, warm-ups and labels of unequal length, the last labels unanswered."
    n = draw(st.integers(20, 120))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.cumsum(rng.integers(1, 5, n)), "h")
    back, ahead = rng.integers(0, draw(st.integers(1, 12)), n), rng.integers(1, 1 + draw(st.integers(1, 12)), n)
    end = pd.Series(ts + pd.to_timedelta(ahead, "h"))
    end.iloc[n - draw(st.integers(0, 5)) :] = pd.NaT
    return pd.DataFrame({"start_ts": ts - pd.to_timedelta(back, "h"), "end_ts": end.to_numpy()}, index=pd.DatetimeIndex(ts, name="ts")).assign(
        end_ts=lambda d: pd.to_datetime(d["end_ts"], utc=True)
    )


def meets(a: pd.DataFrame, b: pd.DataFrame) -> np.ndarray:
    "The definition itself: closed intervals, every pair."
    forever = pd.Timestamp("2200-01-01", tz="UTC")
    other = list(zip(b["start_ts"], b["end_ts"].fillna(forever), strict=True))
    return np.array([any(s <= v and u <= e for u, v in other) for s, e in zip(a["start_ts"], a["end_ts"].fillna(forever), strict=True)], dtype=bool)


@few
@given(random_intervals(), random_intervals())
def test_overlaps_is_the_definition(a: pd.DataFrame, b: pd.DataFrame) -> None:
    assert overlaps(a, b).tolist() == meets(a, b).tolist()


@few
@given(random_intervals(), st.integers(10, 90), st.integers(5, 80), st.sampled_from([None, 30, 100]), st.integers(0, 20))
def test_no_training_interval_meets_a_test_interval(intervals: pd.DataFrame, start: int, step: int, window: int | None, embargo: int) -> None:
    mode = "expanding" if window is None else "sliding"
    walk = WalkForward(intervals.index[0] + start * HOUR, f"{step}h", mode, None if window is None else f"{window}h", f"{embargo}h")
    try:
        folds = list(walk.split(intervals))
    except DataNotFound:
        assume(False)
    assert len(folds) == walk.get_n_splits(intervals)
    for train, test in folds:
        used, asked = intervals.iloc[train], intervals.iloc[test]
        assert len(train) and len(test) and train.max() < test.min()
        assert not meets(used, asked).any()
        assert used["end_ts"].notna().all()
        assert used["end_ts"].max() + embargo * HOUR < asked["start_ts"].min()
        if window is not None:
            assert used["start_ts"].min() >= asked["start_ts"].min() - (embargo + window) * HOUR
    # every sample from test_start on is forecast once
    tested = np.concatenate([test for _, test in folds])
    assert tested.tolist() == np.flatnonzero(intervals.index >= walk.test_start).tolist()


@few
@given(random_intervals(), st.integers(10, 90))
def test_expanding_keeps_every_sample_that_it_may(intervals: pd.DataFrame, start: int) -> None:
    walk = WalkForward(intervals.index[0] + start * HOUR, "60h")
    try:
        folds = list(walk.split(intervals))
    except DataNotFound:
        assume(False)
    for train, test in folds:
        earliest = intervals["start_ts"].iloc[test].min()
        assert train.tolist() == np.flatnonzero((intervals["end_ts"] < earliest).to_numpy()).tolist()


@st.composite
def decided_intervals(draw: st.DrawFn) -> pd.DataFrame:
    "The same with the time of each decision, after the open and no later than the end of the label."
    intervals = draw(random_intervals())
    wait = pd.to_timedelta(np.random.default_rng(draw(st.integers(0, 10_000))).integers(0, 2, len(intervals)), "h")
    return intervals.assign(known_ts=intervals.index + wait)


@few
@given(decided_intervals(), st.integers(10, 90), st.integers(5, 80), st.sampled_from([None, 30, 100]), st.integers(0, 20))
def test_a_walk_trains_on_all_labels_known_at_its_first_decision(intervals, start: int, step: int, window: int | None, embargo: int) -> None:
    "Training before the test: only labels can leak, so the warm-up of the test purges nothing."
    mode = "expanding" if window is None else "sliding"
    walk = WalkForward(intervals.index[0] + start * HOUR, f"{step}h", mode, None if window is None else f"{window}h", f"{embargo}h")
    try:
        folds = list(walk.split(intervals))
    except DataNotFound:
        assume(False)
    for train, test in folds:
        cut = intervals["known_ts"].iloc[test].min() - embargo * HOUR
        assert (intervals["end_ts"].iloc[train] <= cut).all()  # no label is open at the first decision
        known = intervals["end_ts"] <= cut
        if window is not None:
            known &= intervals["known_ts"] >= cut - window * HOUR
        assert train.tolist() == np.flatnonzero(known).tolist()  # and none that is known is left out


def tail_of(intervals: pd.DataFrame, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    "Rows to fit and tail; leaves out examples with too few rows to fit, which are refused."
    try:
        return purged_tail(len(intervals), fraction, intervals)
    except SchemaError as e:
        assert "rows to fit" in str(e)
        assume(False)
        raise


@few
@given(decided_intervals().filter(lambda d: len(d) >= 80), st.floats(0.26, 0.5))
def test_early_stopping_tail_keeps_all_labels_known_at_its_first_decision(intervals: pd.DataFrame, fraction: float) -> None:
    fit, tail = tail_of(intervals, fraction)
    known = np.flatnonzero(intervals["end_ts"] <= intervals["known_ts"].iloc[tail].min())
    assert fit.tolist() == known[known < tail[0]].tolist()


@few
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_bars_that_close_together_know_only_earlier_labels(seed: int, horizon: int) -> None:
    "Event bars that close in the same microsecond: a label of equal end is known only if its last bar is not after the decision."
    rng = np.random.default_rng(seed)
    close = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.cumsum(rng.choice([0, 0, 1, 3], 60)), "ms")
    bars = pd.DataFrame({"close_ts": close}, index=pd.DatetimeIndex(close, name="ts"))
    labels = pd.DataFrame({"end_ts": bars["close_ts"].shift(-horizon)})
    spans, last = sample_intervals(labels, bars, 3), np.arange(60) + horizon
    for at in range(60):
        assert (last[(spans["end_ts"] <= spans["known_ts"].iloc[at]).to_numpy()] <= at).all()


@few
@given(random_intervals().filter(lambda d: len(d) >= 80), st.floats(0.26, 0.5))
def test_early_stopping_tail_is_purged(intervals: pd.DataFrame, fraction: float) -> None:
    fit, tail = tail_of(intervals, fraction)
    assert not meets(intervals.iloc[fit], intervals.iloc[tail]).any()
    assert tail.tolist() == list(range(len(intervals) - len(tail), len(intervals)))


@few
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(0, 6))
def test_labels_are_the_loop(seed: int, horizon: int, gaps: int) -> None:
    bars = random_bars(40, seed, gaps)
    got = {target: fixed_horizon(bars, horizon, target) for target in ("return", "volatility")}
    close, open_, gap = bars["close"].to_numpy(), bars["open"].to_numpy(), bars["gap"].to_numpy()
    for t in range(40):
        ahead = slice(t + 1, t + horizon + 1)
        ends, holed = t + horizon >= 40, gap[ahead].any()
        y, vol = got["return"]["y"].iloc[t], got["volatility"]["y"].iloc[t]
        assert np.isnan(y) == (ends or holed)
        assert np.isnan(vol) == (ends or holed or gap[t])
        if not np.isnan(y):
            assert y == close[t + horizon] / open_[t + 1] - 1
        if not np.isnan(vol):
            assert vol == pytest.approx(np.sqrt((np.diff(np.log(close[t : t + horizon + 1])) ** 2).sum()), rel=1e-12)
        if not ends:
            assert got["return"]["end_ts"].iloc[t] == bars["close_ts"].iloc[t + horizon]


def test_baselines_know_nothing_of_the_future() -> None:
    bars = random_bars(600, gaps=5)
    spoiled = bars.copy()
    spoiled.iloc[400:, spoiled.columns.get_indexer(["open", "close"])] *= 3
    for target in ("return", "volatility"):
        pd.testing.assert_frame_equal(baselines(bars, 8, target).iloc[:400], baselines(spoiled, 8, target).iloc[:400])
        pd.testing.assert_frame_equal(baselines(bars, 8, target).iloc[:400], baselines(bars.iloc[:400], 8, target))


FIT = """
import hashlib, json, sys
import numpy as np, pandas as pd
from cryptoresearch.models.boosting import XGBoostModel
rng = np.random.default_rng(0)
X = pd.DataFrame(rng.normal(size=(3000, 8)), columns=list("abcdefgh")); X[rng.random(X.shape) < 0.1] = np.nan
y = np.exp(0.3 * X["a"].fillna(0) - 0.2 * X["b"].fillna(0) ** 2 + rng.normal(0, 0.5, 3000))
ts = pd.date_range("2024-01-01", periods=3000, freq="h", tz="UTC")
spans = pd.DataFrame({"start_ts": ts - pd.Timedelta("9h"), "end_ts": ts + pd.Timedelta("25h")}, index=ts)
folder, what = sys.argv[1:]
if what == "fit":
    model = XGBoostModel(n_estimators=60, log_target=True).fit(X, y, spans); model.save(folder)
else:
    model = XGBoostModel.load(folder)
out = np.concatenate([model.predict(X), *model.predict_interval(X)])
print(json.dumps([hashlib.sha256(out.tobytes()).hexdigest(), model.best_iteration_]))
"""


def in_a_process(folder: Path, what: str) -> list:
    done = subprocess.run([sys.executable, "-c", FIT, str(folder), what], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


def test_two_processes_fit_the_same_model_and_a_third_reads_it(tmp_path: Path) -> None:
    one, two = in_a_process(tmp_path / "one", "fit"), in_a_process(tmp_path / "two", "fit")
    assert one == two == in_a_process(tmp_path / "one", "load")
    assert one[1] > 5
    for name in ("model.ubj", "model.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["model.json", "model.ubj"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 3))
    XGBoostModel(n_estimators=20).fit(X, X[:, 0] + rng.normal(size=400)).save(folder)
    return folder


@pytest.mark.parametrize("change", ["params", "unknown param", "format", "list", "truncated", "pickle"])
def test_a_wrong_file_is_refused(stored: Path, tmp_path: Path, change: str) -> None:
    info, trees = json.loads((stored / "model.json").read_text()), (stored / "model.ubj").read_bytes()
    if change == "params":
        del info["params"]
    elif change == "unknown param":
        info["params"]["depth"] = 4
    elif change == "format":
        info["format"] = "another/1"
    elif change == "list":
        info = [info]
    elif change == "truncated":
        trees = trees[:-10]
    (tmp_path / "model.json").write_text(json.dumps(info))
    (tmp_path / "model.ubj").write_bytes(b"\x80\x04N." if change == "pickle" else trees)
    with pytest.raises(SchemaError):
        XGBoostModel.load(tmp_path)


def test_a_random_walk_cannot_be_forecast() -> None:
    "Past returns as features, the next ten hours as the label: skill here would be a leak of ours."
    bars = random_bars(6000, seed=3)
    r = np.log(bars["close"]).diff()
    X = pd.DataFrame({f"r{n}": r.rolling(n).sum() for n in (1, 2, 5, 10, 20)})
    labels = fixed_horizon(bars, 10)
    rows = labels["y"].notna() & X.notna().all(axis=1)
    X, y, spans = X[rows], labels["y"][rows], sample_intervals(labels, bars, 21)[rows]
    parts = []
    for train, test in WalkForward(bars.index[3000], "1000h").split(spans):
        model = XGBoostModel(n_estimators=100, n_threads=1).fit(X.iloc[train], y.iloc[train], spans.iloc[train])
        parts.append(pd.DataFrame({"y": y.iloc[test], "prediction": model.predict(X.iloc[test]), "zero": 0.0}))
    out = pd.concat(parts)
    assert abs(ic_test(out["prediction"], out["y"], 10).z) < 3
    assert score_table(out, "return", 10).loc["model", "r2_oos"] < 0.01


@few
@given(st.integers(0, 1000), st.sampled_from([(1, 0), (1, 5), (12, 11), (12, 40)]))
def test_newey_west_is_statsmodels(seed: int, how: tuple[int, int]) -> None:
    horizon, lags = how
    x = np.random.default_rng(seed).gamma(2, 1, 150)
    fit = sm.OLS(x, np.ones(150)).fit(cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": False})
    assert np.sqrt(long_run_variance(x, lags) / 150) == pytest.approx(fit.bse[0], rel=1e-9)
    assert hac_lags(150, horizon) >= horizon - 1


@few
@given(st.integers(0, 1000), st.sampled_from([1, 4, 12]))
def test_diebold_mariano_is_the_mean_over_that_of_the_low_frequencies(seed: int, horizon: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.gamma(2, 1, 150), rng.gamma(2, 1, 150)
    got = diebold_mariano(a, b, horizon)
    assert got.df == {1: 11, 4: 11, 12: 5}[horizon]
    angle = np.pi * np.outer(np.arange(150) + 0.5, np.arange(1, got.df + 1)) / 150
    fit = sm.OLS(a - b, np.cos(angle)).fit()  # orthogonal regressors: the coefficients are those of the cosine transform
    stat = (a - b).mean() / np.sqrt((fit.params**2).mean() * 150 / 2 / 150)
    assert got.stat == pytest.approx(stat, rel=1e-9)
    assert got.p_value == pytest.approx(2 * stats.t.sf(abs(stat), got.df))
    assert diebold_mariano(b, a, horizon).stat == pytest.approx(-got.stat)


def test_nothing_to_score_is_nan_and_silent() -> None:
    frame = pd.DataFrame({"y": [0.01, -0.02, 0.03] * 10, "prediction": 0.001, "zero": 0.0, "lower": -1.0, "upper": 1.0, "fold": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for some in (frame, frame.iloc[:2], frame.iloc[:0], frame.assign(y=np.nan)):
            table = score_table(some, "return", 5)
            assert table[["ic", "rank_ic", "ic_t", "ic_p"]].isna().all(axis=None)
            calibration_table(some)
            coverage_table(some)
        assert np.isnan(ic([1.0] * 5, range(5))) and np.isnan(rank_ic([1.0] * 5, range(5)))


def by_slices(prediction: pd.Series, bars: pd.DataFrame, horizon: int) -> pd.Series:
    "Each forecast's own trade, one after another, from open to open."
    total = pd.Series(0.0, bars.index)
    for ts, f in prediction.dropna().items():
        entry = bars.index.get_loc(ts) + 1
        for i in range(entry, min(entry + horizon, len(bars) - 1)):
            total.iloc[i] += np.sign(f) / horizon * (bars["open"].iloc[i + 1] / bars["open"].iloc[i] - 1)
    return total


@few
@given(st.integers(0, 1000), st.integers(1, 8))
def test_strategy_is_the_sum_of_its_slices(seed: int, horizon: int) -> None:
    bars = random_bars(60, seed)
    rng = np.random.default_rng(seed)
    prediction = pd.Series(rng.normal(size=30), bars.index[10:40]).where(rng.random(30) < 0.9)
    result = sign_strategy(prediction, bars, horizon, fee_bps=7)
    slow = by_slices(prediction, bars, horizon)
    assert result.gross.to_numpy() == pytest.approx(slow.loc[result.gross.index].to_numpy(), abs=1e-12)
    assert result.gross.sum() == pytest.approx(slow.sum(), abs=1e-12)
    assert result.position.iloc[-1] == 0 or result.gross.index[-1] < prediction.index[-1] + (horizon + 1) * HOUR
    paid = (result.gross - result.returns).sum()
    assert paid == pytest.approx(result.turnover.sum() * 7e-4)
    if result.turnover.sum() > 0:
        even = sign_strategy(prediction, bars, horizon, fee_bps=result.break_even_bps)
        assert even.returns.sum() == pytest.approx(0, abs=1e-12)


def test_a_gap_is_held_through_and_its_move_is_paid() -> None:
    bars = random_bars(30, seed=1)
    bars.iloc[12:16, bars.columns.get_loc("gap")] = True
    bars.loc[bars["gap"], ["open", "close"]] = np.nan
    held = slices(pd.Series(1.0, bars.index[:25]), bars, 3)
    assert held["market"].iloc[11] == pytest.approx(bars["open"].iloc[16] / bars["open"].iloc[11] - 1)
    assert (held["market"].iloc[12:16] == 0).all() and (held["position"].iloc[3:25] == 1).all()
    assert np.prod(1 + held["market"]) == pytest.approx(bars["open"].iloc[len(held)] / bars["open"].iloc[0])


def test_a_forecast_earns_nothing_before_the_next_open() -> None:
    "Knowing the bar that just closed is worth nothing: the entry comes after it."
    bars = random_bars(4000, seed=5)
    past = bars["close"] / bars["open"] - 1
    assert abs(sign_strategy(past, bars, 1, 0).moments()["sr"]) < 0.06
    ahead = past.shift(-1).dropna()
    assert sign_strategy(ahead, bars, 1, 0).moments()["sr"] > 0.5


def test_deflated_sharpe_of_the_paper() -> None:
    sr, variance = 2.5 / np.sqrt(250), 0.5 / 250
    assert expected_max_sharpe(100, variance) == pytest.approx(0.113172, abs=5e-7)
    assert deflated_sharpe(sr, 1250, -3, 10, 100, variance) == pytest.approx(0.900397, abs=5e-7)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.booleans(), st.floats(0.0, 300.0))
def test_a_ridge_from_sums_is_a_fresh_ridge(seed: int, weighted: bool, penalty: float) -> None:
    "Each submodel, with columns of any level, one of them constant, and rows of which some columns are unknown."
    rng = np.random.default_rng(seed)
    n, names = 400, list(HARRidgeModel.needs)
    X = pd.DataFrame(rng.normal(size=(n, len(names))) * rng.uniform(0.1, 3, len(names)) + rng.normal(0, 30, len(names)), columns=names)
    X["har_24"], X["hour_of_week"] = -5.3, rng.integers(0, 168, n)
    y, weight = X["har_168"] - X["har_720"] + rng.normal(size=n), rng.uniform(0.2, 2, n) if weighted else None
    X.loc[rng.random(n) < 0.3, ["har_720", "har_range_720"]] = np.nan
    model = HARRidgeModel(penalty=penalty + 1e-3).fit(X, y, sample_weight=weight)
    design = np.c_[X[names[:-1]], X[names[-1]].to_numpy()[:, None] == np.arange(168)]
    assert len(model.booster_) == 3
    for sub in model.booster_[:-1]:
        rows = ~np.isnan(design[:, sub["columns"]]).any(axis=1)
        Z = design[rows][:, sub["columns"]]
        scale = np.where(np.ptp(Z, axis=0) > 0, Z.std(axis=0), 1.0)
        fresh = Ridge(alpha=penalty + 1e-3, solver="cholesky").fit((Z - Z.mean(axis=0)) / scale, y[rows], None if weight is None else (weight / weight.mean())[rows])
        made = (Z - np.array(sub["mean"])) / np.array(sub["scale"]) @ np.array(sub["coef"]) + sub["intercept"]
        made = model.centre_ + model.scale_ * made  # the outcomes were standardised
        assert np.allclose(made, fresh.predict((Z - Z.mean(axis=0)) / scale), rtol=1e-9, atol=1e-9)


def _hours_with_gaps(names: list[str], n: int = 1400) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    "Features of which the longer windows are unknown after two gaps, outcomes above zero of the next day, and their spans."
    rng, index = np.random.default_rng(5), pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC", name="ts")
    X = pd.DataFrame(rng.normal(size=(n, len(names))) + rng.normal(0, 9, len(names)), index, names)
    y = pd.Series(np.exp(0.3 * X[names[0]] - 0.2 * X[names[1]] + rng.normal(size=n)), index, name="y")
    if "hour_of_week" in names[-1]:
        X[names[-1]] = np.arange(n) % 168.0
    for begin in (300, 1010):
        for k, length in enumerate((5, 30, 90)):
            X.iloc[begin : begin + length, k] = np.nan
        y.iloc[begin - 24 : begin] = np.nan
    y.iloc[-24:] = np.nan
    known_ts = index + pd.Timedelta("1h")
    spans = pd.DataFrame({"start_ts": known_ts, "known_ts": known_ts, "end_ts": known_ts + pd.Timedelta("24h")}, index)
    return X, y, spans


@pytest.mark.parametrize("mode", ["expanding", "sliding"])
@pytest.mark.parametrize("weights", [None, "recency:20D", "uneven"])
@pytest.mark.parametrize("model", ["har", "har_ridge", "decay_ridge"])
def test_fits_that_carry_sums_equal_fresh_fits(model: str, weights: str | None, mode: str) -> None:
    "Forecasts, interval ends and rows of each fold, also for rows after a gap and where the weights are not those of before times a factor."
    made = MODELS[model](log_target=True)
    X, y, spans = _hours_with_gaps(list(made.needs))
    known, rng, refits = np.flatnonzero(y.notna()), np.random.default_rng(1), made.refits(X, y, spans)
    for cut in range(700, 1400, 48):
        rows = known[(known < cut - 24) & (known >= (cut - 620 if mode == "sliding" else 0))]
        weight = rng.uniform(0.5, 2, len(rows)) if weights == "uneven" else sample_weights(spans.assign(y=y).iloc[rows], weights)
        fresh = clone(made).fit(X.iloc[rows], y.iloc[rows], intervals=spans.iloc[rows], sample_weight=weight)
        fast = refits.fit(rows, weight)
        asked = X.iloc[cut - 24 : cut + 24]
        np.testing.assert_allclose(np.array(fast.predict_all(asked)), np.array(fresh.predict_all(asked)), rtol=1e-9)
        assert np.allclose(fast.predict(X.iloc[300:400]), fresh.predict(X.iloc[300:400]), rtol=1e-9)
        assert (fast.n_rows_, fast.floor_, fast.best_iteration_) == (fresh.n_rows_, fresh.floor_, fresh.best_iteration_)
    assert fast.predict_all(asked)[0][0] != made.refits(X, y, spans).fit(known[known < 900]).predict(asked)[0]


def test_what_sums_cannot_carry_gets_a_fit_of_its_own() -> None:
    "Outcomes of zero, which each fit raises to its own smallest one; rows that are too few are refused as by a fresh fit."
    made = MODELS["har"](log_target=True)
    X, y, spans = _hours_with_gaps(list(made.needs), 400)
    y.iloc[[5, 200]] = 0.0
    rows = np.flatnonzero(y.notna())[:250]
    fresh = clone(made).fit(X.iloc[rows], y.iloc[rows], intervals=spans.iloc[rows])
    assert np.array_equal(made.refits(X, y, spans).fit(rows).predict(X), fresh.predict(X))
    with pytest.raises(SchemaError, match="20 rows to fit"):
        made.refits(X, y.where(y > 0), spans).fit(rows[10:60])
    few = X.assign(har_24=np.where(np.arange(400) == 30, X["har_24"], np.nan))
    with pytest.raises(SchemaError, match="more than 3 rows with all of"):
        made.refits(few, y.where(y > 0), spans).fit(rows[10:190])


def _closing_together(seed: int, n: int = 400, horizon: int = 3) -> tuple[pd.DataFrame, np.ndarray]:
    "Events of event bars of which many close in the same microsecond, and the position of the bar that ends each outcome."
    rng = np.random.default_rng(seed)
    close = pd.Series(pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.cumsum(rng.choice([0, 0, 1, 3], n)), "ms"))
    y = pd.Series(rng.integers(0, 2, n), dtype=float).where(close.shift(-horizon).notna())
    return pd.DataFrame({"known_ts": close, "end_ts": close.shift(-horizon), "y": y}), np.arange(n) + horizon


@pytest.mark.parametrize("at", [150, 201, 260, 333])
def test_nothing_forecast_at_a_bar_changes_with_outcomes_of_later_bars(at: int) -> None:
    "Of event bars that close in the same microsecond too: the last outcome, the naive quantiles and an adapted interval."
    labels, last = _closing_together(at)
    at += int(np.argmax(labels["known_ts"].iloc[at:-1].to_numpy() == labels["known_ts"].iloc[at + 1 :].to_numpy()))
    later = labels.assign(y=labels["y"].where(last <= at, 1 - labels["y"]))
    event_bars = pd.DataFrame(index=pd.DatetimeIndex([labels["known_ts"].iloc[0]] * 2))
    ends = {"lower": -0.5, "upper": 0.5}
    for made, changed in (
        (previous_outcome(labels, labels), previous_outcome(later, later)),
        *((a[c], b[c]) for a, b in [(known_quantiles(labels, event_bars, "direction", 3), known_quantiles(later, event_bars, "direction", 3))] for c in a),
        *((a[c], b[c]) for a, b in [[adaptive_intervals(d.assign(**ends), 3, least=50, step=0.3) for d in (labels, later)]] for c in a),
    ):
        pd.testing.assert_series_equal(made.iloc[: at + 1], changed.iloc[: at + 1])
        assert made.iloc[at] == made.iloc[at]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_bounds_learned_from_few_rows_cover_their_share(k: int) -> None:
    "In the mean over many samples of 60 rows, of which plain quantiles cover .87 and, with three columns, .85."
    rng, covered = np.random.default_rng(k), []
    for _ in range(60 if k > 1 else 600):
        design = np.c_[np.ones(2060), rng.normal(size=(2060, k - 1))] * np.exp(rng.normal(0, 0.5, (2060, 1)))
        y = design[:, 0] * rng.standard_t(4, size=2060)
        low, high = (design[60:] @ line for line in quantile_lines(design[:60], y[:60], 0.9))
        covered.append(((y[60:] >= low) & (y[60:] <= high)).mean())
    assert abs(np.mean(covered) - 0.9) < 0.012
    with pytest.raises(SchemaError, match="lower the level"):
        quantile_lines(design[:60], y[:60], 0.98)


@pytest.mark.parametrize("model", ["ridge", "har_ridge", "har"])
def test_a_walk_is_the_same_bit_for_bit_on_one_thread_of_linear_algebra_and_on_two(model: str) -> None:
    bars = bar_frame(pd.read_parquet(SAMPLE), "1h", symbol="BTCUSDT").iloc[:9000]
    config = RunConfig(target="volatility", horizon=24, model=model, refit_every="60D", test_start=str(bars.index[6000]))
    made = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            samples = prepare(bars, config)
            made.append((walk_forward(config, samples, bars.index[6000])[0], fit_last(config, samples, None).model.booster_))
    pd.testing.assert_frame_equal(made[0][0], made[1][0], check_exact=True)
    assert json.dumps(made[0][1]) == json.dumps(made[1][1])
