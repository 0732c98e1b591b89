"Purged k-fold and combinatorial splits: the invariant, and that no row is given up without a reason."
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from conftest import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

from cryptoresearch.errors import SchemaError
from cryptoresearch.models.crossval import assemble_paths, CombinatorialPurged, intervals_of, OnIntervals, path_table, PurgedKFold
from cryptoresearch.models.splits import overlaps, WalkForward

HOUR = pd.Timedelta("1h")
few = settings(max_examples=examples(20, 60), deadline=None, derandomize=True)


@st.composite
def random_intervals(draw: st.DrawFn) -> pd.DataFrame:
    "Answered samples at irregular times, warm-ups and labels of unequal length."
    n = draw(st.integers(30, 120))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.cumsum(rng.integers(1, 5, n)), "h")
    back, ahead = rng.integers(0, draw(st.integers(1, 8)), n), rng.integers(1, 1 + draw(st.integers(1, 8)), n)
    return pd.DataFrame({"start_ts": ts - pd.to_timedelta(back, "h"), "end_ts": ts + pd.to_timedelta(ahead, "h")}, index=pd.DatetimeIndex(ts, name="ts"))


def allowed(intervals: pd.DataFrame, test: np.ndarray, embargo: pd.Timedelta) -> list[int]:
    "The definition itself, pair by pair."
    keep = []
    stretches = np.split(test, np.flatnonzero(np.diff(test) > 1) + 1)
    begins, ends = ((intervals[name] - pd.Timestamp(0, tz="UTC")).to_numpy(dtype="timedelta64[ns]").astype(int).tolist() for name in ("start_ts", "end_ts"))
    last = [max(ends[i] for i in s) for s in stretches]
    for i in sorted(set(range(len(intervals))) - set(test.tolist())):
        meets = any(begins[i] <= ends[j] and begins[j] <= ends[i] for j in test.tolist())
        if not meets and not any(e < begins[i] <= e + embargo.value for e in last):
            keep.append(i)
    return keep


@few
@given(random_intervals(), st.sampled_from([PurgedKFold(2), PurgedKFold(5), CombinatorialPurged(4, 2), CombinatorialPurged(5, 1), CombinatorialPurged(6, 3)]), st.integers(0, 20))
def test_exactly_the_rows_that_leak_nothing_are_trained_on(intervals: pd.DataFrame, split: PurgedKFold | CombinatorialPurged, embargo: int) -> None:
    split = type(split)(**{**split.__dict__, "embargo": f"{embargo}h"})
    try:
        folds = list(split.split(intervals))
    except SchemaError as e:
        assert "purging left none" in str(e)
        assume(False)
    assert len(folds) == split.get_n_splits()
    for train, test in folds:
        assert train.tolist() == allowed(intervals, test, embargo * HOUR)
    times_tested = Counter(np.concatenate([test for _, test in folds]).tolist())
    assert set(times_tested) == set(range(len(intervals)))
    assert set(times_tested.values()) == {getattr(split, "n_paths", 1)}


@pytest.mark.parametrize("n_groups, k", [(6, 2), (6, 1), (5, 3), (8, 4)])
def test_each_path_is_whole_and_each_forecast_is_used_once(n_groups: int, k: int) -> None:
    split = CombinatorialPurged(n_groups, k)
    parts = np.array_split(np.arange(101), n_groups)
    forecasts = [np.concatenate([parts[g] for g in chosen]) + 1000.0 * s for s, chosen in enumerate(split.choices())]
    paths = assemble_paths(split, forecasts)
    assert paths.shape == (101, split.n_paths)
    assert (paths % 1000 == np.arange(101)[:, None]).all()
    assert sorted(paths.ravel()) == sorted(np.concatenate(forecasts))
    table = path_table(split)
    assert table.shape == (split.n_paths, n_groups)
    assert all(g in split.choices()[s] for (_, row) in table.iterrows() for g, s in enumerate(row))


def test_a_search_of_scikit_learn_uses_it() -> None:
    ts = pd.date_range("2024-01-01", periods=300, freq="h", tz="UTC", name="ts")
    intervals = pd.DataFrame({"start_ts": ts, "end_ts": ts + 5 * HOUR}, index=ts)
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=300)}, index=ts).drop(index=ts[100:120])
    search = GridSearchCV(Ridge(), {"alpha": [0.1, 1e4]}, cv=OnIntervals(PurgedKFold(4), intervals)).fit(X, 2 * X["a"])
    assert search.best_params_ == {"alpha": 0.1}
    assert search.n_splits_ == 4


@st.composite
def tied_intervals(draw: st.DrawFn) -> pd.DataFrame:
    "Samples of which several begin at one moment, as those of event bars do."
    n = draw(st.integers(40, 100))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.cumsum(rng.choice([0, 0, 1, 3], n)), "h")
    ends = ts + pd.to_timedelta(rng.integers(0, 5, n), "h")
    ends = pd.Series(ends).mask(rng.random(n) < draw(st.sampled_from([0.0, 0.05])))
    return pd.DataFrame({"start_ts": ts - pd.to_timedelta(rng.integers(0, 4, n), "h"), "end_ts": pd.DatetimeIndex(ends)}, index=pd.DatetimeIndex(ts, name="ts"))


@few
@given(tied_intervals(), st.integers(0, 10_000))
def test_rows_of_one_moment_are_split_by_position(intervals: pd.DataFrame, seed: int) -> None:
    "All rows: the splits of the intervals themselves. Some rows: never narrower than the truth, so nothing leaks."
    assert intervals_of(intervals.index, intervals).equals(intervals)
    answered = intervals.dropna()
    X = pd.DataFrame({"a": np.arange(len(answered))}, index=answered.index)
    tied, split = OnIntervals(PurgedKFold(4), answered), PurgedKFold(4)
    try:
        expected = list(split.split(answered))
    except SchemaError:
        assume(False)
    for (a, b), (c, d) in zip(tied.split(X), expected, strict=True):
        assert a.tolist() == c.tolist() and b.tolist() == d.tolist()
    some = np.sort(np.random.default_rng(seed).choice(len(intervals), int(0.8 * len(intervals)), replace=False))
    got, truth = intervals_of(intervals.index[some], intervals), intervals.iloc[some]
    assert len(got) == len(some)
    assert (got["start_ts"] <= truth["start_ts"]).all() and (got["end_ts"].isna() | (got["end_ts"] >= truth["end_ts"])).all()
    few_rows = np.sort(np.random.default_rng(seed).choice(len(answered), int(0.8 * len(answered)), replace=False))
    part, truth = X.iloc[few_rows], answered.iloc[few_rows]
    try:
        folds = list(OnIntervals(PurgedKFold(3), answered).split(part))
    except SchemaError:
        assume(False)
    for train, test in folds:
        assert max(train.max(), test.max()) < len(part)
        assert not overlaps(truth.iloc[train], truth.iloc[test]).any()


def test_walk_forward_on_intervals_counts_its_fits() -> None:
    ts = pd.date_range("2024-01-01", periods=300, freq="h", tz="UTC", name="ts")
    intervals = pd.DataFrame({"start_ts": ts, "end_ts": ts + HOUR}, index=ts)
    cv = OnIntervals(WalkForward("2024-01-06", "2D"), intervals)
    X = pd.DataFrame({"a": 0.0}, index=ts)
    assert cv.get_n_splits() == cv.get_n_splits(X) == len(list(cv.split(X))) == 4
