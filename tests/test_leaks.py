"""prove_causal neither cries wolf nor misses: known leaks and causal functions, on nasty bars"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pandas_ta as ta
import pytest
from scipy.signal import filtfilt, hilbert, lfilter, savgol_filter
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, QuantileTransformer, StandardScaler

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.features.causality import prove_causal
from cryptoresearch.features.pipeline import DataProcessing
from cryptoresearch.features.registry import Feature

Bars = pd.DataFrame


def make_bars(n: int = 1000, seed: int = 0, gaps: tuple[int, ...] = (400, 401, 402, 550, 900), dead: tuple[int, int] = (700, 706)) -> Bars:
    "Hours with fat tails, empty bars and gaps."
    rng = np.random.default_rng(seed)
    close = 30_000 * np.exp(np.cumsum(rng.standard_t(3, n) * 0.004))
    open_ = np.r_[30_000.0, close[:-1]]
    wick = np.exp(np.abs(rng.normal(0, 0.002, (2, n))))
    high, low, volume = np.maximum(open_, close) * wick[0], np.minimum(open_, close) / wick[1], rng.lognormal(3, 1, n)
    still = slice(*dead)
    open_[still] = close[still] = high[still] = low[still] = close[dead[0] - 1]
    open_[dead[1]] = close[dead[1] - 1]
    high[dead[1]], low[dead[1]] = max(open_[dead[1]], close[dead[1]]), min(open_[dead[1]], close[dead[1]])
    volume[still] = 0
    frame = pd.DataFrame({"open": open_, "high": high, "low": low, "close": close, "volume": volume}, index=pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC"))
    return bar_frame(frame.drop(frame.index[list(gaps)]), "1h", symbol="BTCUSDT")


BARS = make_bars()


def ret(b: Bars) -> pd.Series:
    return b["close"].pct_change(fill_method=None)


def known(x: pd.Series) -> pd.Series:
    return x.ffill().fillna(0.0)


def daily(b: Bars) -> pd.DataFrame:
    "Days stamped with their start, as most resampling gives them."
    return pd.DataFrame({"ts": b["close"].resample("1D").last().index.as_unit("ns"), "day": b["close"].resample("1D").last().to_numpy()})


def on(b: Bars, right: pd.DataFrame, key: str = "ts", **how: Any) -> pd.Series:
    left = pd.DataFrame({"ts": b.index.as_unit("ns")})
    return pd.Series(pd.merge_asof(left, right, left_on="ts", right_on=key, **how)["day"].to_numpy(), b.index)


def day_position(b: Bars) -> pd.Series:
    return b.groupby(b.index.floor("D"))["close"].transform("size") * 0.0 + b["close"] / b.groupby(b.index.floor("D"))["close"].transform("max")


def encoded_by_hour(b: Bars) -> pd.Series:
    "Mean of the next hour's return by hour of the day, over the whole sample."
    hour = b.index.hour
    return ret(b).shift(-1).groupby(hour).transform("mean")


def rare(condition: Callable[[Bars], pd.Series], column: str = "close") -> Callable[[Bars], pd.Series]:
    "A causal mean of ten bars, with tomorrow added where the condition holds."

    def leak(b: Bars) -> pd.Series:
        x = b[column]
        return (x / x.rolling(10).mean() - 1).add((x.shift(-1) / x - 1).where(condition(b), 0.0), fill_value=np.nan)

    return leak


def hidden_in_a_sum(b: Bars) -> pd.Series:
    "An endless sum, in which a look ahead hides at each crash."
    r = ret(b).fillna(0.0)
    return (r + r.shift(-1).fillna(0.0).where(r < -0.03, 0.0)).cumsum()


def after_gaps(b: Bars) -> pd.Series:
    "At the first bar after a gap, the next close instead of the one before the gap."
    first = b["gap"].shift(1, fill_value=False) & ~b["gap"]
    return (b["close"] / b["close"].shift(1)).where(~first, b["close"].shift(-1) / b["close"])


def spectrum(b: Bars) -> pd.Series:
    "Slow part of the close, by a Fourier transform of the whole."
    f = np.fft.rfft(known(ret(b)))
    f[len(f) // 8 :] = 0
    return pd.Series(np.fft.irfft(f, len(b)), b.index)


# name: (function, bars it looks ahead or None where it reads everything, inputs it must name)
LEAKS: dict[str, tuple[Any, int | None, set[str]]] = {
    "centred mean": (lambda b: b["close"].rolling(25, center=True).mean(), 12, {"close"}),
    "centred deviation of volume": (lambda b: b["volume"].rolling(9, center=True).std(), 4, {"volume"}),
    "negative shift": (lambda b: b["close"].shift(-1) / b["close"] - 1, 1, {"close"}),
    "negative shift of 200": (lambda b: np.log(b["close"].shift(-200) / b["close"]), 200, {"close"}),
    "difference forwards": (lambda b: b["high"].diff(-3), 3, {"high"}),
    "whole-sample scaling": (lambda b: (b["close"] - b["close"].mean()) / b["close"].std(), None, {"close"}),
    "share of the maximum": (lambda b: b["close"] / b["close"].max(), None, {"close"}),
    "rank over all": (lambda b: b["volume"].rank(pct=True), None, {"volume"}),
    "bins of all quantiles": (lambda b: pd.qcut(ret(b), 10, labels=False), None, {"close"}),
    "clipped at a quantile of all": (lambda b: b["volume"].clip(upper=b["volume"].quantile(0.99)), None, {"volume"}),
    "filled from behind": (lambda b: b["close"].bfill(), None, {"close"}),
    "warm-up filled from behind": (lambda b: ret(b).rolling(50).std().bfill(), None, {"close"}),
    "interpolated": (lambda b: b["close"].interpolate(), None, {"close"}),
    "filled with the mean": (lambda b: b["close"].fillna(b["close"].mean()), None, {"close"}),
    "days joined on their start": (lambda b: b["close"] / on(b, daily(b)), None, {"close"}),
    "as-of join forward": (lambda b: on(b, b["close"].rename("day").reset_index().assign(ts=b.index.as_unit("ns")).iloc[::6], direction="forward"), 5, {"close"}),
    "as-of join to the nearest": (lambda b: on(b, b["close"].rename("day").reset_index().assign(ts=b.index.as_unit("ns")).iloc[::6], direction="nearest"), None, {"close"}),
    "resampled, label left": (lambda b: b["close"].resample("4h", label="left").last().reindex(b.index, method="ffill"), 3, {"close"}),
    "group's maximum": (day_position, None, {"close"}),
    "target encoding": (encoded_by_hour, None, {"close"}),
    "Savitzky-Golay": (lambda b: pd.Series(savgol_filter(known(b["close"]), 21, 3), b.index), None, {"close"}),
    "filter both ways": (lambda b: pd.Series(filtfilt([0.1], [1, -0.9], known(ret(b))), b.index), None, {"close"}),
    "Hilbert transform": (lambda b: pd.Series(np.abs(hilbert(known(ret(b)))), b.index), None, {"close"}),
    "Fourier filter": (spectrum, None, {"close"}),
    "exponential average backwards": (lambda b: b["close"][::-1].ewm(span=5).mean()[::-1], None, {"close"}),
    "convolution, same": (lambda b: pd.Series(np.convolve(known(ret(b)), np.ones(7) / 7, "same"), b.index), 3, {"close"}),
    "a millionth of tomorrow": (lambda b: ret(b) * (1 + 1e-6 * np.sign(ret(b).shift(-1).fillna(0.0))), 1, {"close"}),
    "volume alone": (lambda b: ret(b) * (b["volume"].shift(-2) > b["volume"]), 2, {"volume"}),
    "sign of tomorrow": (lambda b: np.sign(b["close"].shift(-1) - b["close"]), 1, {"close"}),
    "missing where tomorrow falls": (lambda b: ret(b).where(~(b["close"].shift(-1) < b["close"] * 0.97)), 1, {"close"}),
    "one row in 500, by the clock": (rare(lambda b: pd.Series(np.arange(len(b)) % 500 == 333, b.index)), 1, {"close"}),
    "one row in 150, at midnight of Sundays": (rare(lambda b: pd.Series((b.index.dayofweek == 6) & (b.index.hour == 0), b.index)), 1, {"close"}),
    "at crashes": (rare(lambda b: ret(b) < -0.025), 1, {"close"}),
    "at quiet hours": (rare(lambda b: b["volume"] < b["volume"].rolling(200, min_periods=1).quantile(0.004)), 1, {"close"}),
    "rare, in volume": (rare(lambda b: b["high"] / b["low"] > 1.03, "volume"), 1, {"volume"}),
    "hidden in a sum": (hidden_in_a_sum, 1, {"close"}),
    "after gaps": (after_gaps, 1, {"close"}),
    "number of rows": (lambda b: pd.Series(np.linspace(0, 1, len(b)), b.index), None, {"number of rows"}),
    "trend through all": (lambda b: b["close"] - np.polyval(np.polyfit(np.arange(len(b)), known(b["close"]), 1), np.arange(len(b))), None, {"close"}),
    "component of all": (lambda b: PCA(1).fit_transform(pd.DataFrame({"r": known(ret(b)), "v": known(np.log1p(b["volume"]))}))[:, 0], None, {"close", "volume"}),
    "pandas-ta dpo": (lambda b: ta.dpo(b["close"]) if len(b) > 40 else None, 11, {"close"}),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_caught(name: str) -> None:
    leak, ahead, through = LEAKS[name]
    row = prove_causal(leak, BARS).iloc[0]
    assert not row["causal"], name
    assert pd.notna(row["where"]) and row["size"] > 1e-9 and row["note"]
    assert set(row["through"].split()) >= through or row["through"] in through, row["through"]
    if ahead is not None:
        assert row["looks_ahead"] == ahead, row["looks_ahead"]


def test_the_size_of_a_small_leak_is_told() -> None:
    row = prove_causal(LEAKS["a millionth of tomorrow"][0], BARS).iloc[0]
    assert 0.9e-6 < row["size"] < 2.1e-6


def test_the_offending_column_is_named_among_innocent_ones() -> None:
    def many(b: Bars) -> pd.DataFrame:
        r = ret(b)
        return pd.DataFrame({"a": r, "b": r.rolling(20).mean(), "c": r + r.shift(-2).where(b["volume"] > 200, 0.0), "d": r.ewm(span=9).mean(), "e": b["volume"].cumsum()})

    table = prove_causal(many, BARS)
    assert table.index[~table["causal"]].tolist() == ["c"]
    assert table.loc["c", "looks_ahead"] == 2 and "close" in table.loc["c", "through"]


def test_a_column_that_no_other_future_knew() -> None:
    bars = BARS.assign(funding=np.random.default_rng(1).normal(0, 1e-4, len(BARS)))
    row = prove_causal(lambda b: b["funding"].shift(-1), bars, search=0).iloc[0]
    assert not row["perturbation_ok"] and row["through"] == "funding"


# ------------------------------------------------------------------ whole pipelines
LEARNING = {
    "scaler": lambda: make_pipeline(DataProcessing(["ret_3", "rv_24"]), StandardScaler()),
    "component": lambda: make_pipeline(DataProcessing(["ret_3", "rv_24"]), FunctionTransformer(np.nan_to_num), PCA(1)),
    "quantiles": lambda: make_pipeline(DataProcessing(["ret_3", "rv_24"]), QuantileTransformer(n_quantiles=50)),
}


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("fitted", [False, True])
def test_pipelines_that_learn_from_everything_are_caught(name: str, fitted: bool) -> None:
    pipeline = LEARNING[name]()
    table = prove_causal(pipeline.fit(BARS) if fitted else pipeline, BARS, cuts=2)
    assert not table["causal"].any() and (table["note"] == "reads the whole sample").all()


@pytest.mark.parametrize("name", LEARNING)
def test_pipelines_that_learn_from_the_past_pass(name: str) -> None:
    assert prove_causal(LEARNING[name](), BARS, train_bars=600, cuts=4, search=16)["causal"].all()
    assert prove_causal(LEARNING[name]().fit(BARS.iloc[:600]).transform, BARS, cuts=4, search=16)["causal"].all()


def test_a_pipeline_without_learning_passes() -> None:
    assert prove_causal(make_pipeline(DataProcessing(["ret_3", "rv_24"]), FunctionTransformer(np.tanh)), BARS, cuts=2, search=16)["causal"].all()


# ------------------------------------------------------------------ innocents
def online_scaler(b: Bars) -> pd.Series:
    "Welford's mean and variance, bar by bar."
    out, n, mean, m2 = np.full(len(b), np.nan), 0, 0.0, 0.0
    for i, x in enumerate(ret(b).to_numpy()):
        if not np.isnan(x):
            if n > 1 and m2 > 0:
                out[i] = (x - mean) / np.sqrt(m2 / (n - 1))
            n += 1
            mean, m2 = mean + (x - mean) / n, m2 + (x - mean) * (x - mean - (x - mean) / n)
    return pd.Series(out, b.index)


def garch_filter(b: Bars) -> pd.Series:
    "A variance recursion with fixed parameters; holds its value in gaps."
    out, v = np.empty(len(b)), 1e-4
    for i, x in enumerate(ret(b).to_numpy()):
        v = v if np.isnan(x) else 1e-6 + 0.1 * x * x + 0.88 * v
        out[i] = v
    return pd.Series(out, b.index)


def trailing_stop(b: Bars) -> pd.Series:
    "A state machine: a stop that follows the highest close and turns over."
    out, side, best = np.full(len(b), np.nan), 1, np.nan
    for i, c in enumerate(b["close"].to_numpy()):
        if not np.isnan(c):
            best = c if np.isnan(best) else max(best, c) if side > 0 else min(best, c)
            if (side > 0 and c < best * 0.97) or (side < 0 and c > best * 1.03):
                side, best = -side, c
        out[i] = side
    return pd.Series(out, b.index)


def previous_day(b: Bars) -> pd.Series:
    "The last day's close from the moment it is known: joined on the time of closing."
    days = b["close"].resample("1D").last()
    right = pd.DataFrame({"known": days.index.as_unit("ns") + pd.Timedelta("1D"), "day": days.to_numpy()})
    left = pd.DataFrame({"close_ts": b["close_ts"].dt.as_unit("ns").to_numpy()})
    right["known"] = right["known"].to_numpy()
    return b["close"] / pd.merge_asof(left, right, left_on="close_ts", right_on="known")["day"].to_numpy()


def past_encoding(b: Bars) -> pd.Series:
    "Mean return by hour of the day, of earlier days only."
    return ret(b).groupby(b.index.hour).transform(lambda x: x.shift(1).expanding().mean())


INNOCENTS: dict[str, Any] = {
    "return": ret,
    "expanding mean": lambda b: b["close"].expanding().mean(),
    "expanding rank": lambda b: ret(b).expanding().rank(pct=True),
    "expanding quantile": lambda b: b["volume"].clip(upper=b["volume"].expanding(50).quantile(0.99)),
    "exponential average": lambda b: b["close"].ewm(span=50).mean(),
    "exponential average of time": lambda b: b["close"].ewm(halflife="12h", times=b.index).mean(),
    "forward fill": lambda b: b["close"].ffill(),
    "sum of all": lambda b: b["volume"].fillna(0).cumsum(),
    "product of all": lambda b: (1 + ret(b).fillna(0)).cumprod(),
    "highest so far": lambda b: b["close"] / b["close"].cummax(),
    "rolling rank": lambda b: ret(b).rolling(48).rank(pct=True),
    "rolling correlation": lambda b: ret(b).rolling(72).corr(b["volume"]),
    "rolling by time": lambda b: b["volume"].rolling("24h").sum(),
    "share of zero volume": lambda b: b["close"].diff() / b["volume"],
    "rows without trades dropped": lambda b: b.loc[b["volume"] > 0, "close"].diff(),
    "time since the last jump": lambda b: pd.Series(np.arange(len(b)), b.index).where(ret(b).abs() > 0.02).ffill().rsub(np.arange(len(b))),
    "first of the day": lambda b: b["close"] / b["open"].resample("1D").transform("first"),
    "resampled, label right": lambda b: b["close"].resample("4h", label="right").last().reindex(b.index, method="ffill"),
    "previous day": previous_day,
    "encoding from the past": past_encoding,
    "online scaler": online_scaler,
    "variance recursion": garch_filter,
    "trailing stop": trailing_stop,
    "one-way filter": lambda b: pd.Series(lfilter([0.1], [1, -0.9], known(ret(b))), b.index),
    "as-of join backward": lambda b: on(b, b["close"].rename("day").reset_index().assign(ts=b.index.as_unit("ns")).iloc[::6]),
    "clock": lambda b: pd.Series(np.sin(2 * np.pi * b.index.hour / 24), b.index),
    "row number": lambda b: np.arange(len(b)),
    "array of two": lambda b: b[["open", "close"]].to_numpy(),
    "flags": lambda b: b["close"] > b["open"],
    "pandas-ta rsi": lambda b: ta.rsi(b["close"].ffill()),
    "pandas-ta macd": lambda b: ta.macd(b["close"].ffill()) if len(b) > 60 else None,
    "pandas-ta supertrend": lambda b: ta.supertrend(b["high"].ffill(), b["low"].ffill(), b["close"].ffill()) if len(b) > 60 else None,
    "pandas-ta kama": lambda b: ta.kama(b["close"].ffill()) if len(b) > 60 else None,
    "pandas-ta obv": lambda b: ta.obv(b["close"].ffill(), b["volume"].fillna(0)),
    "refuses short frames": lambda b: b["close"].rolling(30).mean() if len(b) >= 30 else 1 / 0,
    "rare jumps of its own": lambda b: ret(b) * (1 + 99 * (ret(b).abs() > 0.03)),
}


@pytest.mark.parametrize("name", INNOCENTS)
def test_innocents_are_not_accused(name: str) -> None:
    table = prove_causal(INNOCENTS[name], BARS)
    told = table[~table["causal"].fillna(True)]
    assert told.empty, told.to_string()
    assert table["causal"].any() and not table["through"].any()


def test_a_true_warmup_passes_and_a_false_one_does_not() -> None:
    def mean(b: Bars) -> pd.Series:
        return b["close"].rolling(9).mean()

    good, bad = (Feature(f"mean_{w}", ("close",), w, "1", "own", "own", mean if w == 9 else lambda b: b["close"].rolling(9, min_periods=1).mean()) for w in (9, 5))
    table = prove_causal([good, bad], BARS, cuts=2, search=0)
    assert table["warmup_ok"].tolist() == [True, False] and table["truncation_ok"].all()
