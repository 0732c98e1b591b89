"Barrier labels and weights against loops that follow their definitions word by word."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryptoresearch.data.bars import trades_to_bars
from cryptoresearch.errors import SchemaError
from cryptoresearch.metrics.strategy import slices
from cryptoresearch.labels.barriers import covered_bars, doubtful_bars, trend_scanning, triple_barrier, uniqueness
from cryptoresearch.labels.horizon import sample_intervals
from cryptoresearch.models.splits import WalkForward

HOUR = pd.Timedelta("1h")
few = settings(max_examples=80, deadline=None, derandomize=True)


def random_bars(n: int, seed: int, gaps: int) -> pd.DataFrame:
    "Bars on a coarse price grid, so that barriers are often met exactly, some of them missing."
    rng = np.random.default_rng(seed)
    close = np.round(100 + rng.normal(0, 0.6, n).cumsum(), 1)
    open_ = np.round(np.r_[100, close[:-1]] + rng.choice([0, 0, 0, 0.5, -0.5], n), 1)
    high = np.maximum(open_, close) + np.round(np.abs(rng.normal(0, 0.4, n)), 1)
    low = np.minimum(open_, close) - np.round(np.abs(rng.normal(0, 0.4, n)), 1)
    ts = pd.date_range("2024-01-01", periods=n, freq="h", tz="UTC", name="ts")
    bars = pd.DataFrame({"open": open_, "high": high, "low": low, "close": close, "close_ts": ts + HOUR, "gap": False}, index=ts)
    bars.iloc[rng.choice(n, gaps, replace=False), bars.columns.get_loc("gap")] = True
    bars.loc[bars["gap"], ["open", "high", "low", "close"]] = np.nan
    return bars


def by_the_book(bars: pd.DataFrame, t: int, horizon: int, sigma: float, up: float, down: float, side: int) -> tuple[str | None, float, int]:
    "Follow one label bar by bar: barrier, exit price, position of the exit."
    if bars["gap"].iloc[t] or t + 1 >= len(bars) or side == 0:
        return None, np.nan, -1
    entry = bars["open"].iloc[t + 1]
    target, stop = entry * (1 + side * up * sigma), entry * (1 - side * down * sigma)
    for j in range(t + 1, t + horizon + 1):
        if j >= len(bars) or bars["gap"].iloc[j]:
            return None, np.nan, -1
        bar = bars.iloc[j]
        if j > t + 1 and (bar["open"] <= stop if side > 0 else bar["open"] >= stop):
            return "stop", bar["open"], j
        if j > t + 1 and (bar["open"] >= target if side > 0 else bar["open"] <= target):
            return "target", bar["open"], j
        if bar["low"] <= stop if side > 0 else bar["high"] >= stop:
            return "stop", stop, j
        if bar["high"] >= target if side > 0 else bar["low"] <= target:
            return "target", target, j
    return "timeout", bars["close"].iloc[t + horizon], t + horizon


@few
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(0, 4), st.sampled_from([0.002, 0.01]), st.sampled_from([(1.0, 1.0), (2.0, 0.5)]))
def test_triple_barrier_is_the_loop(seed: int, horizon: int, gaps: int, sigma: float, widths: tuple[float, float]) -> None:
    bars = random_bars(60, seed, gaps)
    side = pd.Series(np.random.default_rng(seed).choice([-1, 0, 1], 60), bars.index)
    got = triple_barrier(bars, horizon, pd.Series(sigma, bars.index), up=widths[0], down=widths[1], side=side, whole=False)
    kept = triple_barrier(bars, horizon, pd.Series(sigma, bars.index), up=widths[0], down=widths[1], side=side)
    for t in range(60):
        barrier, price, at = by_the_book(bars, t, horizon, sigma, *widths, int(side.iloc[t]))
        row = got.iloc[t]
        assert (row["barrier"] if isinstance(row["barrier"], str) else None) == barrier
        known = t + horizon < 60 and not bars["gap"].iloc[t + 1 : t + horizon + 1].any()  # of the bars, whatever the outcome
        assert pd.notna(kept["y"].iloc[t]) == (barrier is not None and known)
        if barrier:
            assert row["held"] == at - t
            assert np.isclose(row["ret"], side.iloc[t] * (price / bars["open"].iloc[t + 1] - 1), rtol=1e-12, atol=1e-15)
            assert row["end_ts"] == bars["close_ts"].iloc[at]


@few
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_a_label_is_settled_by_its_end(seed: int, horizon: int) -> None:
    "What happens behind a label's end changes nothing in it; before its decision neither."
    bars = random_bars(60, seed, 2)
    sigma = pd.Series(0.01, bars.index)
    whole = triple_barrier(bars, horizon, sigma, whole=False)
    trend = trend_scanning(bars, 3, 6)
    for t in (10, 25, 40):
        for labels, again in ((whole, lambda b: triple_barrier(b, horizon, sigma.loc[b.index], whole=False)), (trend, lambda b: trend_scanning(b, 3, 6))):
            if pd.isna(labels["y"].iloc[t]):
                continue
            cut = bars[(bars.index >= bars.index[t]) & (bars["close_ts"] <= labels["end_ts"].iloc[t])]
            drop = ["known_ts", *(["planned_ts"] if "planned_ts" in labels else [])]  # may lie behind the cut
            assert again(cut).iloc[0].drop(drop).equals(labels.iloc[t].drop(drop))


@few
@given(st.integers(0, 10_000))
def test_uniqueness_is_the_mean_over_hours(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ts = pd.date_range("2024-01-01", periods=40, freq="h", tz="UTC")
    labels = pd.DataFrame({"y": np.where(rng.random(40) < 0.1, np.nan, 1.0), "known_ts": ts, "end_ts": ts + pd.to_timedelta(rng.integers(1, 9, 40), "h")}, index=ts)
    got, known = uniqueness(labels), labels.dropna()
    hours = pd.date_range("2024-01-01", periods=60, freq="h", tz="UTC")
    alive = np.array([((known["known_ts"] <= h) & (known["end_ts"] > h)).sum() for h in hours])
    for stamp, row in labels.iterrows():
        if pd.isna(row["y"]):
            assert np.isnan(got[stamp])
        else:
            inside = (hours >= row["known_ts"]) & (hours < row["end_ts"])
            assert np.isclose(got[stamp], (1 / alive[inside]).mean())


@few
@given(st.integers(0, 10_000))
def test_labels_of_a_moment_share_it(seed: int) -> None:
    "Labels that begin and end at one moment are weighted by how many are open then; no weight is zero."
    rng = np.random.default_rng(seed)
    begin = np.sort(rng.integers(0, 12, 30))
    end = begin + rng.choice([0, 0, 1, 2, 5], 30)
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(begin, "h")
    labels = pd.DataFrame({"y": np.where(rng.random(30) < 0.1, np.nan, 1.0), "known_ts": ts, "end_ts": pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(end, "h")}, index=ts)
    got, known = uniqueness(labels).to_numpy(), labels["y"].notna().to_numpy()
    assert (np.isnan(got) == ~known).all() and (got[known] > 0).all() and (got[known] <= 1).all()
    for t in np.flatnonzero(known):
        if begin[t] == end[t]:
            assert np.isclose(got[t], 1 / (known & (begin <= begin[t]) & ((end > begin[t]) | (begin == end) & (begin == begin[t]))).sum())
        else:
            hours = np.arange(begin[t], end[t])
            assert np.isclose(got[t], np.mean([1 / (known & (begin <= h) & (end > h)).sum() for h in hours]))


def random_trades(seed: int, n: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.sort(rng.integers(0, 20 * 60, n)), "s")
    return pd.DataFrame({"trade_id": np.arange(n), "ts": ts, "price": np.round(100 + rng.normal(0, 0.05, n).cumsum(), 2), "qty": np.round(rng.exponential(1, n) + 1e-3, 3)})


@few
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_with_all_trades_the_label_is_the_walk_through_them(seed: int, horizon: int) -> None:
    trades = random_trades(seed)
    bars = trades_to_bars(trades, "1m")
    sigma = pd.Series(0.0008, bars.index)
    got = triple_barrier(bars, horizon, sigma, trades=trades)
    for t in np.flatnonzero(got["y"].notna()):
        entry = bars["open"].iloc[t + 1]
        path = trades[(trades["ts"] >= bars.index[t + 1]) & (trades["ts"] < bars["close_ts"].iloc[t + horizon])]
        up, down = np.flatnonzero(path["price"] >= entry * 1.0008), np.flatnonzero(path["price"] <= entry * 0.9992)
        first = min([("target", k) for k in up[:1]] + [("stop", k) for k in down[:1]] + [("timeout", len(path))], key=lambda x: x[1])[0]
        assert got["barrier"].iloc[t] == first


@few
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_trades_that_cannot_tell_are_refused(seed: int, other: int) -> None:
    "Out of order, or a part of a doubtful bar: an error. A bar without any: the rule for bars."
    trades, rng = random_trades(seed), np.random.default_rng(other)
    bars = trades_to_bars(trades, "1m")
    sigma = pd.Series(0.0003, bars.index)
    doubtful = doubtful_bars(bars, 4, sigma)
    shuffled = trades.sample(frac=1, random_state=other)
    if not shuffled["trade_id"].is_monotonic_increasing:
        with pytest.raises(SchemaError, match="in order"):
            triple_barrier(bars, 4, sigma, trades=shuffled)
    if not len(doubtful):
        return
    k = int(rng.choice(doubtful))
    inside = np.flatnonzero((trades["ts"] >= bars.index[k]) & (trades["ts"] < bars["close_ts"].iloc[k]))
    part = trades.drop(index=rng.choice(inside, int(rng.integers(1, len(inside))), replace=False))
    assert covered_bars(bars, part)[k] == -1 and (np.delete(covered_bars(bars, part), k) >= 0).all()
    with pytest.raises(SchemaError, match="all trades of a bar or none"):
        triple_barrier(bars, 4, sigma, trades=part)
    without = triple_barrier(bars, 4, sigma, trades=trades.drop(index=inside))
    exits = triple_barrier(bars, 4, sigma)
    at = exits["end_ts"] == bars["close_ts"].iloc[k]
    assert without[at].equals(exits[at])


@few
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(0, 3))
def test_who_is_trained_on_does_not_depend_on_the_outcome(seed: int, horizon: int, gaps: int) -> None:
    "Another path of prices with the same gaps: other labels, the same rows."
    rows = []
    for path in (seed, seed + 10_001):
        bars = random_bars(80, path, 0)
        for k in np.random.default_rng(seed).choice(80, gaps, replace=False):
            bars.loc[bars.index[k], ["open", "high", "low", "close"]] = np.nan
            bars.loc[bars.index[k], "gap"] = True
        labels = triple_barrier(bars, horizon, pd.Series(0.01, bars.index))
        intervals = sample_intervals(labels, bars, 3)
        (train, _), *_ = WalkForward(bars.index[50], "100D").split(intervals)
        rows.append([t for t in train if pd.notna(labels["y"].iloc[t])])
    assert rows[0] == rows[1]


@few
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 2))
def test_slices_are_held_as_long_as_their_trades(seed: int, horizon: int, latency: int) -> None:
    "Each decision's slice, put bar by bar into the position; with every slice held to the horizon, the usual strategy."
    bars, rng = random_bars(50, seed, 0), np.random.default_rng(seed)
    wanted = pd.Series(rng.choice([-1.0, 0.0, 1.0], 30), bars.index[8:38])
    held = pd.Series(rng.integers(1, horizon + 1, 30).astype(float), wanted.index)
    position = np.zeros(60)
    for k, (w, h) in enumerate(zip(wanted, held, strict=True)):
        position[8 + k + latency : 8 + k + latency + int(h)] += w / horizon
    got = slices(wanted, bars, horizon, latency, held)["position"]
    assert np.allclose(got, position[8 : 8 + len(got)], atol=1e-9)
    assert slices(wanted, bars, horizon, latency, held * 0 + horizon)["position"].round(9).equals(slices(wanted, bars, horizon, latency)["position"].round(9))
