"Barrier labels and weights against loops that follow their definitions word by word."
import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from cryptoresearch.models.barriers import trend_scanning, triple_barrier, uniqueness

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
    got = triple_barrier(bars, horizon, pd.Series(sigma, bars.index), up=widths[0], down=widths[1], side=side)
    for t in range(60):
        barrier, price, at = by_the_book(bars, t, horizon, sigma, *widths, int(side.iloc[t]))
        row = got.iloc[t]
        assert (row["barrier"] if isinstance(row["barrier"], str) else None) == barrier
        if barrier:
            assert np.isclose(row["ret"], side.iloc[t] * (price / bars["open"].iloc[t + 1] - 1), rtol=1e-12, atol=1e-15)
            assert row["end_ts"] == bars["close_ts"].iloc[at]


@few
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_a_label_is_settled_by_its_end(seed: int, horizon: int) -> None:
    "What happens behind a label's end changes nothing in it; before its decision neither."
    bars = random_bars(60, seed, 2)
    sigma = pd.Series(0.01, bars.index)
    whole = triple_barrier(bars, horizon, sigma)
    trend = trend_scanning(bars, 3, 6)
    for t in (10, 25, 40):
        for labels, again in ((whole, lambda b: triple_barrier(b, horizon, sigma.loc[b.index])), (trend, lambda b: trend_scanning(b, 3, 6))):
            if pd.isna(labels["y"].iloc[t]):
                continue
            cut = bars[(bars.index >= bars.index[t]) & (bars["close_ts"] <= labels["end_ts"].iloc[t])]
            assert again(cut).iloc[0].drop(["known_ts"]).equals(labels.iloc[t].drop(["known_ts"]))


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
