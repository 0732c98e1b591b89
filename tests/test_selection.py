"""Selection and drift as properties: planted signals are found, noise is not, and nothing is learned from test rows"""

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression, LogisticRegression

from cryptoresearch.features.drift import bin_counts, drift_over_time, drift_table, quantile_edges, silence_index, stability_index
from cryptoresearch.features.selection import (
    cluster_features, contribution_importance, contributions, filter_table, fit_folds, importance_table, mutual_information,
    permutation_importance, rank_agreement, rank_correlation, selection_table,
)
from cryptoresearch.models.boosting import XGBoostModel
from cryptoresearch.models.crossval import PurgedKFold
from cryptoresearch.models.estimators import LightGBMModel

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def planted(n: int = 1500, seed: int = 0) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    "Three views of one driver, one single driver, four columns of noise."
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, n))
    X = pd.DataFrame({f"view_{i}": first + 0.4 * rng.normal(size=n) for i in range(3)} | {"single": second} | {f"noise_{i}": rng.normal(size=n) for i in range(4)})
    X.index = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC")
    y = pd.Series(0.7 * first + 0.7 * second + 0.7 * rng.normal(size=n), X.index)
    return X, y, pd.DataFrame({"start_ts": X.index - pd.Timedelta("5h"), "end_ts": X.index + pd.Timedelta("3h")}, index=X.index)


# ------------------------------------------------------------------ importance
@pytest.mark.parametrize("seed", range(3))
def test_linear_importance_agrees_with_its_closed_form(seed: int) -> None:
    X, y, lives = planted(3000, seed)
    folds = fit_folds(LinearRegression(), X, y, PurgedKFold(4), lives)
    found = permutation_importance(folds, X, y, repeats=10, seed=seed)
    for i, fold in enumerate(folds):  # permuting x adds 2 b^2 var(x) to the squared error, less the bond with what is left
        test = X.iloc[fold.test]
        residual = y.iloc[fold.test] - fold.model.predict(test)
        b = fold.model.coef_[X.columns.get_loc("single")]
        assert found.loc["single", i] == pytest.approx(2 * b**2 * test["single"].var() / np.mean(residual**2), rel=0.15)
    assert (found.filter(like="noise", axis=0).mean(axis=1).abs() < 0.01).all()


def test_clusters_are_found_and_noise_is_not() -> None:
    X, y, lives = planted()
    clusters = cluster_features(X)
    assert clusters.groupby(clusters).size().sort_values().tolist() == [1, 1, 1, 1, 1, 3]
    folds = fit_folds(LightGBMModel(n_estimators=60, learning_rate=0.1, min_child_samples=30), X, y, PurgedKFold(4, "3h"), lives)
    by_fold = permutation_importance(folds, X, y, clusters, repeats=3)
    table = importance_table(by_fold, top=2)
    informative = {clusters["view_0"], "single"}
    assert set(table.index[:2]) == informative and (table["folds_in_top"].iloc[:2] == 1).all() and table["above_zero"].iloc[:2].all()
    assert (table["low"].iloc[2:] <= 0.002).all()
    assert (rank_agreement(by_fold).to_numpy() >= 0.3).all()
    alone = permutation_importance(folds, X, y, repeats=3).mean(axis=1)
    assert alone.filter(like="view").max() < 0.6 * by_fold.loc[clusters["view_0"]].mean()  # substitution


def test_a_permutation_moves_the_columns_of_a_cluster_together() -> None:
    class Difference(LinearRegression):
        def predict(self, X: pd.DataFrame) -> np.ndarray:
            return (X["a"] - X["b"]).to_numpy()

    n = 600
    x = np.random.default_rng(0).normal(size=n)
    X = pd.DataFrame({"a": x, "b": x}, pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC"))
    lives = pd.DataFrame({"start_ts": X.index, "end_ts": X.index}, index=X.index)
    y = pd.Series(1.0, X.index)
    folds = fit_folds(Difference(), X, y, PurgedKFold(3), lives)
    assert (permutation_importance(folds, X, y, pd.Series("both", X.columns)).to_numpy() == 0).all()
    assert (permutation_importance(folds, X, y).to_numpy() > 0.5).all()


def test_importance_repeats_and_leaves_its_input() -> None:
    X, y, lives = planted(400)
    before = X.copy()
    folds = fit_folds(LinearRegression(), X, y, PurgedKFold(3), lives)
    a, b = (permutation_importance(folds, X, y, seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(X, before)


def test_folds_hand_over_intervals_and_purge() -> None:
    seen = []

    class Noting(LinearRegression):
        def fit(self, X: pd.DataFrame, y: pd.Series, intervals: pd.DataFrame | None = None) -> "Noting":
            assert intervals is not None
            seen.append(intervals)
            return super().fit(X, y)

    X, y, lives = planted(400)
    folds = fit_folds(Noting(), X, y, PurgedKFold(4, "2h"), lives)
    for train, fold in zip(seen, folds, strict=True):
        test = lives.iloc[fold.test]
        assert not ((train["start_ts"] <= test["end_ts"].max()) & (train["end_ts"] >= test["start_ts"].min())).any()


def test_classifiers_are_judged_by_their_probability() -> None:
    X, y, lives = planted(800)
    up = (y > 0).astype(int)
    folds = fit_folds(LogisticRegression(), X, up, PurgedKFold(3), lives)
    table = importance_table(permutation_importance(folds, X, up, cluster_features(X)))
    assert table.loc["single", "low"] > 0.05


def test_selection_table_holds_every_feature_once_and_works_without_contributions() -> None:
    X, y, lives = planted(600)
    for model in (LinearRegression(), LightGBMModel(n_estimators=20, learning_rate=0.2, min_child_samples=30)):
        table = selection_table(X, y, model, PurgedKFold(3), lives, repeats=2)
        assert sorted(table.index.get_level_values("feature")) == sorted(X.columns)
        assert table["share"].notna().all() == isinstance(model, LightGBMModel)


# ------------------------------------------------------------------ contributions
@pytest.mark.parametrize("loss", ["mean", "probability", "quantile"])
@pytest.mark.parametrize("kind", [XGBoostModel, LightGBMModel])
def test_contributions_add_up_to_the_raw_forecast(kind: type, loss: str) -> None:
    X, y, lives = planted(600)
    model = kind(n_estimators=25, learning_rate=0.2, loss=loss).fit(X, (y > 0).astype(float) if loss == "probability" else y, lives)
    shuffled = X[X.columns[::-1]].assign(more=1.0)
    total, forecast = contributions(model, shuffled).sum(axis=1).to_numpy(), model.predict(X)
    np.testing.assert_allclose(1 / (1 + np.exp(-total)) if loss == "probability" else total, forecast, atol=2e-5)


def test_contributions_of_the_libraries_own_models() -> None:
    X, y, _ = planted(500)
    for model in (xgb.XGBRegressor(n_estimators=15, n_jobs=1), lgb.LGBMRegressor(n_estimators=15, n_jobs=1, verbosity=-1)):
        model.fit(X, y)
        np.testing.assert_allclose(contributions(model, X).sum(axis=1), model.predict(X), atol=1e-4)


def test_contribution_shares_sum_to_one() -> None:
    X, y, lives = planted(600)
    folds = fit_folds(XGBoostModel(n_estimators=30, learning_rate=0.2, min_child_weight=10), X, y, PurgedKFold(3), lives)
    shares = contribution_importance(folds, X)
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-9)
    assert shares.mean(axis=1).idxmax() == "single"


# ------------------------------------------------------------------ filters, information
@QUICK
@given(seed=st.integers(0, 1000), holes=st.floats(0, 0.6))
def test_rank_correlation_is_that_of_scipy(seed: int, holes: float) -> None:
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(rng.normal(size=(300, 3)), columns=list("abc"))
    X["b"] = np.exp(X["a"])
    X["c"] = X["c"] + X["a"]
    np.testing.assert_allclose(rank_correlation(X).loc["a"], [1, 1, spearmanr(X["a"], X["c"])[0]], atol=1e-9)
    part = X.mask(rng.random(X.shape) < holes)
    corr = rank_correlation(part).to_numpy()
    assert np.allclose(corr, corr.T) and (np.abs(corr) <= 1).all() and corr[0, 1] > 0.99


def test_filters_keep_exactly_one_of_each_kind() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000)
    X = pd.DataFrame({"a": np.where(np.arange(1000) < 50, np.nan, x), "b": x, "c": -np.exp(x), "still": 1.0, "silent": np.nan, "d": rng.normal(size=1000)})
    table = filter_table(X, warmup={"b": 50, "c": 5})
    assert table.index[table["kept"]].tolist() == ["c", "d"]
    assert table.loc["a", "same_as"] == "c" and "known more often" in table.loc["a", "why"] and "fewer bars" in table.loc["b", "why"]
    assert filter_table(X[["d"]])["kept"].tolist() == [True] and not filter_table(X[["still", "silent"]])["kept"].any()


@pytest.mark.parametrize("rho", [0.4, 0.6, 0.8])
def test_mutual_information_of_a_gaussian_pair(rho: float) -> None:
    rng = np.random.default_rng(2)
    a, b, c = rng.normal(size=(3, 4000))
    y = rho * a + np.sqrt(1 - rho**2) * c
    found = mutual_information(pd.DataFrame({"x": a, "noise": b}), pd.Series(y), shifts=6)
    assert found.loc["x", "mi"] == pytest.approx(-0.5 * np.log(1 - np.corrcoef(a, y)[0, 1] ** 2), abs=0.03)
    assert found.loc["x", "above"] and found.loc["noise", "mi"] < 0.03


def test_mutual_information_of_classes_is_at_most_their_entropy() -> None:
    a = np.random.default_rng(0).normal(size=2000)
    found = mutual_information(pd.DataFrame({"x": a}), pd.Series((a > 0).astype(int)), shifts=3)
    assert found.loc["x", "mi"] == pytest.approx(np.log(2), abs=0.05)


# ------------------------------------------------------------------ drift
values = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False) | st.just(float("nan")), min_size=1, max_size=200).filter(lambda x: np.isfinite(x).any())


@QUICK
@given(old=values, new=values, bins=st.integers(2, 20))
def test_index_is_zero_on_the_same_and_never_negative(old: list[float], new: list[float], bins: int) -> None:
    a, b = np.array(old), np.array(new)
    assert stability_index(a, a, bins) == 0 and silence_index(a, a) == 0
    assert stability_index(a, b, bins) >= 0 and silence_index(a, b) >= 0
    edges = quantile_edges(a, bins)
    assert (np.diff(edges) > 0).all() and len(edges) < bins
    assert bin_counts(b, edges).sum() == np.isfinite(b).sum()
    assert stability_index(np.tile(a, 2), np.tile(a, 2)[::-1], bins) == 0


@QUICK
@given(seed=st.integers(0, 1000), shift=st.floats(0.5, 3))
def test_index_grows_with_the_shift_and_ignores_units(seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 2000))
    assert stability_index(a, b) < 0.05 < stability_index(a, b + shift) < stability_index(a, b + 2 * shift) + 0.5
    assert stability_index(a, b + shift) == pytest.approx(stability_index(8 * a, 8 * (b + shift)), rel=1e-9)


def test_index_of_a_shifted_normal_is_its_divergence() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200_000))
    assert stability_index(a, b + 0.5, bins=100) == pytest.approx(0.25, rel=0.03)  # symmetric divergence of N(0, 1) and N(d, 1): d^2


def test_drift_table_and_course_agree() -> None:
    rng = np.random.default_rng(0)
    index = pd.date_range("2022-01-01", "2022-12-31 23:00", freq="1h", tz="UTC")
    X = pd.DataFrame({"stays": rng.normal(size=len(index)), "moves": rng.normal(size=len(index)) + np.arange(len(index)) / 3000, "silent": np.where(index.month > 6, np.nan, 1.0)}, index)
    course = drift_over_time(X, "2022-04-01", "MS")
    assert course["moves"].is_monotonic_increasing and (course["stays"] < 0.05).all() and course["silent"].isna().sum() == 6
    table = drift_table(X[:"2022-03-31"], X["2022-12-01":])
    assert table.loc["moves", "psi"] == pytest.approx(course["moves"].iloc[-1]) and table.index[0] == "moves"
    assert table.loc["silent", "verdict"] == "unknown" and table.loc["silent", "psi_missing"] > 1
