"Corner cases of the statistics, each against a number that was computed independently."

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cryptoresearch.evaluation.comparison import baseline_table
from cryptoresearch.evaluation.promotion import Comparison
from cryptoresearch.features.drift import drift_over_time, drift_table, quantile_edges, stability_index
from cryptoresearch.metrics.scores import calibration_table, diebold_mariano, ic, ic_test, mean_test, r2_oos, same_losses, score_table
from cryptoresearch.metrics.significance import by_regime, confidence_set, effective_trials, overfitting, regimes
from cryptoresearch.metrics.strategy import deflated_sharpe, probabilistic_sharpe, return_moments, sharpe_ratio, sign_strategy
from cryptoresearch.metrics.verdict import binding, judge, with_savings


def overlapping(rng: np.random.Generator, n: int, horizon: int) -> np.ndarray:
    "Sums of `horizon` independent numbers, so that neighbours share all but one."
    total = np.cumsum(np.r_[0.0, rng.normal(size=n + horizon - 1)])
    return total[horizon:] - total[:-horizon]


@pytest.mark.parametrize(("n", "horizon"), [(30, 1), (120, 4), (720, 24)])
def test_a_true_null_is_rejected_as_often_as_claimed(n: int, horizon: int) -> None:
    rng, draws = np.random.default_rng(0), 400
    found = np.empty((draws, 3))
    for k in range(draws):
        y, (f, g) = overlapping(rng, n, horizon), rng.normal(size=(2, n)) * np.sqrt(horizon) / 2
        means = diebold_mariano(overlapping(rng, n, horizon), overlapping(rng, n, horizon), horizon)
        squares = diebold_mariano((y - f) ** 2, (y - g) ** 2, horizon)
        found[k] = means.p_value, squares.p_value, ic_test(overlapping(rng, n, horizon), y, horizon).p_value
    size = (found < 0.05).mean(axis=0)
    assert (size < 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)).all()  # Newey-West with Student's t(n - 1): 0.08 to 0.15
    assert (size > 0.02).all()


def test_the_test_is_students_where_all_cosines_are_used() -> None:
    x = np.random.default_rng(1).normal(0.2, 1, 40)
    every = mean_test(x, cosines=39)
    assert every.stat == pytest.approx(stats.ttest_1samp(x, 0).statistic) and every.df == 39
    assert every.p_value == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    half = mean_test(x).margin
    some = mean_test(x)
    assert half == pytest.approx(stats.t.ppf(0.975, some.df) * x.mean() / some.stat)


def test_equal_losses_agree() -> None:
    a = np.random.default_rng(0).gamma(2, 1, 200)
    equal = confidence_set(pd.DataFrame({"a": a, "b": a, "worse": a + np.random.default_rng(1).gamma(2, 1, 200)}), draws=100)
    assert equal["in_set"].to_dict() == {"a": True, "b": True, "worse": False}
    assert equal.loc[["a", "b"], "p_value"].eq(1).all()
    flat = confidence_set(pd.DataFrame({"a": np.zeros(50), "b": np.zeros(50), "half": np.full(50, 0.25)}), draws=100)
    assert flat["in_set"].to_dict() == {"a": True, "b": True, "half": False}


def test_a_baseline_that_loses_nothing_saves_no_share() -> None:
    index = pd.date_range("2024-01-01", periods=200, freq="h", tz="UTC", name="ts")
    still = pd.DataFrame({"y": 0.0, "prediction": 0.0, "zero": 0.0, "last": 0.0}, index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = with_savings(score_table(still, "return", 4), still, "return", 4, draws=20)
        table = baseline_table(still, "return", 4, draws=20)
    assert scores[["saved", "saved_lower", "saved_upper"]].isna().all(axis=None)
    assert judge(scores, target="return", horizon=4).level == "none" and "nan" not in judge(scores, target="return", horizon=4).sentence
    assert table["in_set"].all() and table["saved"].drop("model").isna().all()


def test_equal_runs_agree_and_untestable_ones_do_not() -> None:
    a = np.random.default_rng(0).gamma(2, 1, 200)
    assert same_losses(a, np.nextafter(a, 9)) and not same_losses(a, a + 0.1) and not same_losses(np.r_[np.inf, a], np.r_[np.inf, a])
    for other, words in ((a, "forecast the same"), (a + 0.1, "cannot be tested")):
        losses = pd.DataFrame({"a": a, "b": other})
        found = Comparison("A", "B", pd.DataFrame(), pd.DataFrame(), diebold_mariano(a, other), losses)
        assert words in found.verdict


@pytest.mark.parametrize("level", [np.full(300, 0.02), np.r_[np.zeros(250), np.linspace(1, 2, 50)], np.full(300, np.nan)])
def test_a_volatility_without_terciles_has_fewer_regimes(level: np.ndarray) -> None:
    index = pd.date_range("2024-01-01", periods=300, freq="h", tz="UTC")
    parts = regimes(index, level)
    table = by_regime(lambda g: {"mean": float(g["y"].mean())}, pd.DataFrame({"y": np.arange(300.0)}, index), parts)
    volatility = table.loc["volatility"] if "volatility" in table.index.get_level_values(0) else table.iloc[:0]
    expected = {"low": 250, "high": 50} if np.nanmax(np.nan_to_num(level)) > 1 else {}
    assert volatility["n"].to_dict() == expected


def test_rounding_noise_has_no_p_value() -> None:
    rng = np.random.default_rng(0)
    y, never = rng.normal(size=500), np.zeros(500)
    noisy = y.copy()
    noisy[::2] = np.nextafter(noisy[::2], 9)  # the same losses, the last digit of each second one rounded up
    assert np.isnan(diebold_mariano(noisy, y).p_value)
    assert np.isnan(diebold_mariano(never + 1e-12, never).p_value)  # base rate 0 against a probability of 1e-6
    f = 0.1 + 1e-17 * rng.normal(size=500) + np.where(rng.random(500) < 0.5, 0.0, 1.4e-17)
    assert np.isnan(ic(f, y)) and np.isnan(ic_test(f, y).p_value)
    steady = 0.02 + 3e-18 * rng.integers(-1, 2, 500)
    assert steady.std() > 0 and np.isnan(r2_oos(np.full(500, 0.02), steady, np.full(500, 0.02 + 4e-18)))
    frame = pd.DataFrame({"y": never, "prediction": 1e-6, "base": 0.0, "half": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(score_table(frame, "direction", 1).loc["model", "dm_p"])


def test_prices_that_grow_evenly_have_no_sharpe_ratio() -> None:
    price = 20_000 * 1.001 ** np.arange(400)
    index = pd.date_range("2024-01-01", periods=400, freq="h", tz="UTC", name="ts")
    bars = pd.DataFrame({"open": price, "gap": False, "close_ts": index + pd.Timedelta("1h")}, index)
    result = sign_strategy(pd.Series(1.0, index[:380]), bars, 1, fee_bps=0.0)
    steady = result.returns.iloc[1:-1]
    assert steady.nunique() > 1 and np.isnan(sharpe_ratio(steady))
    m = return_moments(steady)
    assert np.isnan([m["sr"], m["skew"], m["kurtosis"]]).all()
    assert np.isnan(probabilistic_sharpe(m["sr"], m["n"], m["skew"], m["kurtosis"]))
    assert np.isnan(deflated_sharpe(m["sr"], m["n"], m["skew"], m["kurtosis"], 3, 0.01))
    other = np.random.default_rng(0).normal(0, 1e-3, len(steady))
    noise, none = (overfitting(np.c_[x, other], 4).logits for x in (steady, np.zeros(len(steady))))
    assert (noise == none).all()  # a trial of rounding noise is not chosen for its Sharpe ratio


NOISE = np.random.default_rng(3).normal(size=(400, 4))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([0], 1), ([0, 0], 1), ([0, 1], 2), ([0, 0, 0], 1), ([0, 0, 1, 1], 2), ([0, 0, 0, 1], 2), ([0, 0, 1, 1, 2, 2], 3), ([0, 1, 2, 3], 4),
    ],
)  # fmt: skip
def test_equal_trials_count_once(columns: list[int], expected: int) -> None:
    assert effective_trials(NOISE[:, columns]) == expected


def test_scaled_and_negative_trials() -> None:
    a = NOISE[:, 0]
    assert effective_trials(np.c_[a, 3 * a + 0.1]) == 1  # the same trial with more capital
    assert effective_trials(np.c_[a, -a]) == 2  # the opposite is another trial
    assert effective_trials(np.c_[a, a, -a]) == 2
    assert effective_trials(np.c_[np.zeros(400), np.zeros(400)]) == 1
    close = a + 0.02 * NOISE[:, 1]
    assert effective_trials(np.c_[a, close]) == 1


def index_by_hand(old: list[int], new: list[int]) -> float:
    "Population stability index of counts, half a row added to each bin."
    p, q = ((np.array(c) + 0.5) / (sum(c) + 0.5 * len(c)) for c in (old, new))
    return float(((q - p) * np.log(q / p)).sum())


def test_drift_of_a_feature_that_was_constant() -> None:
    later = np.random.default_rng(0).normal(size=1000)
    index = stability_index(np.zeros(1000), later)
    assert index == pytest.approx(index_by_hand([0, 1000, 0], [int((later < 0).sum()), 0, int((later > 0).sum())]))
    assert index > 5 and stability_index(np.zeros(1000), np.zeros(500)) == pytest.approx(0, abs=0.02)
    table = drift_table(pd.DataFrame({"x": np.zeros(1000)}), pd.DataFrame({"x": later}))
    assert table.loc["x", "verdict"] == "much"
    ts = pd.date_range("2024-01-01", periods=2000, freq="h", tz="UTC")
    assert (drift_over_time(pd.DataFrame({"x": np.r_[np.zeros(1000), later]}, ts), ts[1000], "QS") > 5).all(axis=None)


def test_drift_of_a_feature_with_ties() -> None:
    old, new = np.r_[np.zeros(950), np.ones(50)], np.r_[np.zeros(950), np.full(50, -1.0)]
    assert stability_index(old, new) == pytest.approx(index_by_hand([0, 950, 50], [50, 950, 0]))
    assert stability_index(old, np.r_[np.zeros(950), np.full(50, 7.0)]) == pytest.approx(0)  # a larger mode, in the same bin
    assert quantile_edges(np.arange(10.0)).tolist() == list(range(9))


@pytest.mark.parametrize(("scale", "told"), [(1.0, ""), (1.15, "below the forecasts"), (0.9, "above the forecasts")])
def test_the_verdict_of_a_volatility_states_its_bias_by_the_loss_that_it_counts(scale: float, told: str) -> None:
    rng = np.random.default_rng(4)
    sigma = np.exp(rng.normal(-4, 0.5, 5000))
    predictions = pd.DataFrame({"y": sigma * np.sqrt(rng.chisquare(3, 5000) / 3), "prediction": scale * sigma})
    predictions["ewma"] = float(np.sqrt(np.mean(predictions["y"] ** 2)))
    predictions["har"] = sigma * np.exp(rng.normal(0, 0.25, 5000))
    scores = with_savings(score_table(predictions, "volatility", 1), predictions, "volatility", 1, draws=20)
    said, dots = judge(scores, target="volatility"), calibration_table(predictions, target="volatility")
    assert said.level == "skill" and binding(scores, "volatility") == "har" and "beat HAR" in said.sentence
    assert (told in said.sentence) and ("biased" in said.sentence) == bool(told)
    assert (dots["outcome"] / dots["forecast"] * scale).mean() == pytest.approx(1, abs=0.02)
    assert (scores.loc["model", "mz_p"] < 0.05) == bool(told)


def test_the_verdict_leads_with_the_best_baseline_not_with_the_one_that_a_noisy_test_leaves_least_clear() -> None:
    rng = np.random.default_rng(1)
    sigma = np.exp(rng.normal(-4, 0.5, 4000))
    predictions = pd.DataFrame({"y": sigma * np.sqrt(rng.chisquare(3, 4000) / 3), "prediction": sigma})
    predictions["har"] = sigma * 1.12  # a little worse, always
    predictions["ewma"] = np.where(rng.random(4000) < 0.01, sigma / 6, sigma * 1.02)  # worse on the whole, by a few rows
    scores = with_savings(score_table(predictions, "volatility", 1), predictions, "volatility", 1, draws=20)
    assert scores.loc["har", "saved"] < scores.loc["ewma", "saved"] and binding(scores, "volatility") == "ewma"
    said = judge(scores, target="volatility").sentence
    assert f"beat HAR ({scores.loc['har', 'saved']:.1%} of its QLIKE saved" in said and "the best of the baselines, and EWMA (" in said, said


@pytest.mark.parametrize(("target", "told"), [("return", "20.0 bp below the forecasts"), ("direction", "5.0% less often than forecast")])
def test_the_verdict_of_returns_and_events_states_a_bias(target: str, told: str) -> None:
    rng, n = np.random.default_rng(5), 6000
    p = rng.uniform(0.2, 0.8, n)
    y = {"return": rng.normal(0, 0.01, n), "direction": (rng.random(n) < p).astype(float)}[target]
    exact = {"return": y * 0.3 + rng.normal(0, 0.003, n), "direction": p}[target]
    shift = y.mean() - exact.mean() + {"return": 0.002, "direction": 0.05}[target]
    predictions = pd.DataFrame({"y": y, "prediction": exact + shift, "zero": 0.0, "base": 0.5, "half": 0.5, "last": 0.5})
    scores = score_table(predictions, target, 1)
    assert told in judge(scores, target=target, intraday=False).sentence
    honest = score_table(predictions.assign(prediction=exact + y.mean() - exact.mean()), target, 1)
    assert "biased" not in judge(honest, target=target, intraday=False).sentence
