"""prove_causal neither cries wolf nor misses: known leaks and causal functions, on nasty bars"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pandas_ta as ta
import pytest
from conftest import examples
from scipy.signal import filtfilt, hilbert, lfilter, oaconvolve, savgol_filter
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectKBest, f_regression
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer, OneHotEncoder, QuantileTransformer, StandardScaler, TargetEncoder
from sklearn.tree import DecisionTreeRegressor

from cryptoresearch.data.bars import bar_frame, resample_bars
from cryptoresearch.errors import ConfigError, SchemaError
from cryptoresearch.features.causality import prove_causal
from cryptoresearch.features.derived import lagged, of_symbol, on_frame
from cryptoresearch.features.pipeline import DataProcessing
from cryptoresearch.features.proof import find_leaks
from cryptoresearch.features.registry import Feature
from cryptoresearch.labels.horizon import fixed_horizon

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


@pytest.mark.parametrize("name", LEARNING)
def test_what_was_fitted_elsewhere_is_named(name: str) -> None:
    "A model whose method does not show whether it was fitted on the past or on everything."
    for fitted_on in (BARS.iloc[:600], BARS):
        with pytest.warns(UserWarning, match="not proved"):
            table = prove_causal(LEARNING[name]().fit(fitted_on).transform, BARS, cuts=4, search=16)
        assert table["causal"].isna().all() and table["truncation_ok"].all() and table["perturbation_ok"].all()
        assert table["unseen"].str.contains("fitted").all()


def test_a_pipeline_without_learning_passes() -> None:
    assert prove_causal(make_pipeline(DataProcessing(["ret_3", "rv_24"]), FunctionTransformer(np.tanh)), BARS, cuts=2, search=16)["causal"].all()


# ------------------------------------------------------------------ pipelines that learn from outcomes
def next_return(b: Bars) -> pd.Series:
    "Return of the next five bars."
    return b["close"].shift(-5) / b["close"] - 1


def hours(b: Bars) -> pd.DataFrame:
    return pd.DataFrame({"hour": b.index.hour}, index=b.index)


class ScaledByOutcome(TransformerMixin, BaseEstimator):
    "A scaler that learns the sign of each column from the outcomes."

    def fit(self, X: Any, y: Any) -> "ScaledByOutcome":
        self.sign_ = np.sign(np.nansum(np.asarray(X) * np.asarray(y)[:, None], axis=0)) * np.abs(np.asarray(y)).sum() / max(len(y), 1)
        return self

    def transform(self, X: Any) -> Any:
        return np.asarray(X) * self.sign_


SOME = ["ret_1", "ret_3", "rv_24", "place_24"]
SUPERVISED: dict[str, tuple[Callable[[], Any], list[str]]] = {  # pipeline, columns that it must name
    "best columns": (lambda: make_pipeline(DataProcessing(SOME), SelectKBest(f_regression, k=2), StandardScaler()), []),
    "target encoder": (lambda: make_pipeline(FunctionTransformer(hours), TargetEncoder(random_state=0, target_type="continuous")), []),
    "scaled by the outcome": (lambda: make_pipeline(DataProcessing(SOME), ScaledByOutcome()), []),
    "ridge": (lambda: make_pipeline(DataProcessing(SOME), SimpleImputer(), Ridge()), ["prediction"]),
    "ridge without an imputer": (lambda: make_pipeline(DataProcessing(SOME), StandardScaler(), Ridge()), ["prediction"]),
    "tree": (lambda: make_pipeline(DataProcessing(SOME), DecisionTreeRegressor(max_depth=3, random_state=0)), ["prediction"]),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_steps_that_learn_from_everything_are_caught(name: str) -> None:
    make, columns = SUPERVISED[name]
    table = prove_causal(make(), BARS, y=next_return, cuts=2, search=0)
    assert not table["causal"].any() and (table["note"] == "reads the whole sample").all(), table
    assert not columns or table.index.tolist() == columns
    assert table["through"].str.contains("close|prices").any()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.heavy) if n == "tree" else n for n in SUPERVISED])
def test_supervised_steps_that_learn_from_the_past_pass(name: str) -> None:
    labels = prove_causal(SUPERVISED[name][0](), BARS, y=lambda b: fixed_horizon(b, 5, "return"), train_bars=600, cuts=3, search=8)
    assert labels["causal"].all() and not labels["unseen"].any(), labels  # purged by the labels' ends
    known = prove_causal(SUPERVISED[name][0](), BARS, y=fixed_horizon(BARS, 5, "return"), train_bars=600, cuts=3, search=8)
    assert known["causal"].all() and not known["unseen"].any(), known


@pytest.mark.parametrize("name", ["ridge", "scaled by the outcome", "target encoder"])
def test_a_training_that_its_outcomes_reach_over_is_caught(name: str) -> None:
    "Outcomes of five bars, learned from up to the last bar of the training: it knows five bars more."
    table = prove_causal(SUPERVISED[name][0](), BARS, y=next_return, train_bars=600, cuts=2, search=0)
    assert not table["causal"].any() and (BARS.index.get_indexer(table["where"]) == 600).all(), table


def test_outcomes_given_as_values_are_cut_and_said_to_be_unseen() -> None:
    y = next_return(BARS)
    caught = prove_causal(SUPERVISED["ridge"][0](), BARS, y=y, cuts=2, search=0).iloc[0]
    assert caught["causal"] is np.False_ or caught["causal"] is False
    assert "y" in caught["through"].split()
    with pytest.warns(UserWarning, match=r"y \(given as values\)"):
        past = prove_causal(SUPERVISED["ridge"][0](), BARS, y=y.to_numpy(), train_bars=600, cuts=2, search=0).iloc[0]
    assert past["causal"] is pd.NA and past["truncation_ok"] and past["perturbation_ok"]


def test_a_classifier_is_proven_on_its_probabilities() -> None:
    model = make_pipeline(DataProcessing(SOME), StandardScaler(), LogisticRegression())
    up = lambda b: pd.Series(np.where(next_return(b) > 0, "up", "down"), b.index).where(next_return(b).notna())
    table = prove_causal(model, BARS, y=up, cuts=2, search=0)
    assert table.index.tolist() == ["probability of down", "probability of up"] and not table["causal"].any()
    purged = lambda b: fixed_horizon(b, 5, "return").assign(y=lambda t: np.where(t["y"] > 0, "up", "down")).where(next_return(b).notna())
    assert prove_causal(model, BARS, y=purged, train_bars=600, cuts=2, search=8)["causal"].all()


def test_columns_of_a_pipeline_bear_their_names() -> None:
    table = prove_causal(make_pipeline(DataProcessing(["ret_3", "rv_24"]), StandardScaler()), BARS, cuts=2, search=0)
    assert table.index.tolist() == ["ret_3", "rv_24"]


def test_only_the_learning_column_is_named() -> None:
    half = make_pipeline(DataProcessing(["ret_1", "rv_24"]), FunctionTransformer(np.nan_to_num), KBinsDiscretizer(4, encode="ordinal", quantile_method="averaged_inverted_cdf"))
    assert not prove_causal(half, BARS, cuts=2, search=0)["causal"].any()
    codes = make_pipeline(FunctionTransformer(hours), OneHotEncoder(sparse_output=True, categories=[range(24)]))
    assert prove_causal(codes, BARS, cuts=2, search=8)["causal"].all()  # fitted, and there was nothing to learn


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: prove_causal(SUPERVISED["best columns"][0](), BARS), "needs y="),
        (lambda: prove_causal(SUPERVISED["ridge"][0](), BARS), "needs y="),
        (lambda: prove_causal(SUPERVISED["ridge"][0](), BARS, y=[1.0, 2.0]), "outcomes for"),
        (lambda: prove_causal(SUPERVISED["ridge"][0](), BARS, y=pd.Series([1.0, 2.0])), "on another index"),
        (lambda: prove_causal(lambda b: b["closes"], BARS), "KeyError: 'closes'"),
        (lambda: prove_causal(lambda b: pd.Series(np.where(b["close"] > 1, "up", "down"), b.index, name="side"), BARS), "column 'side', such as 'up'"),
        (lambda: prove_causal(lambda b: pd.cut(b["close"], [0, 1, 1e9]), BARS), "category in column 'close'"),
        (lambda: prove_causal(lambda b: b["close_ts"], BARS), "numbers; found datetime"),
    ],
)
def test_errors_are_typed_and_say_what_to_do(wrong: Callable[[], Any], told: str) -> None:
    with pytest.raises(SchemaError, match=told):
        wrong()
    with pytest.raises(ConfigError, match="to fit, with y"):
        prove_causal("ret_3", BARS, y=next_return)


# ------------------------------------------------------------------ data that a function holds
OTHER = make_bars(seed=1)
DAYS = resample_bars(OTHER, "1d")
FUNDING = pd.Series(np.random.default_rng(3).normal(0, 1e-4, len(BARS) // 8), BARS.index[::8][: len(BARS) // 8])  # known at its stamp
RAMP = np.arange(2000.0)
HOURLY_MEANS = ret(BARS).shift(-1).groupby(BARS.index.hour).mean()


class Keeps:
    "An object with a frame."

    def __init__(self, frame: Any) -> None:
        self.frame = frame

    def __call__(self, b: Bars) -> pd.Series:
        return self.frame["close"].resample("1D").last().reindex(b.index, method="ffill")


def as_default(b: Bars, frame: Bars = OTHER) -> pd.Series:
    return frame["close"].shift(-1).reindex(b.index)


HELD_DAYS = Feature("held_days", ("close",), 1, "1", "own", "own", lambda b: b["close"] / DAYS["close"].reindex(b.index, method="ffill"))

HELD_LEAKS: dict[str, tuple[Any, str]] = {
    "days of another frame, joined on their start": (lambda b: OTHER["close"].resample("1D").last().reindex(b.index, method="ffill"), "OTHER.close"),
    "days themselves, joined on their start": (lambda b: DAYS["close"].reindex(b.index, method="ffill"), "DAYS.close"),
    "the very bars, from outside": (lambda b: BARS["close"].shift(-1).reindex(b.index), "BARS.close"),
    "a frame as a default": (as_default, "frame.close"),
    "an object with a frame": (Keeps(OTHER), "frame.close"),
    "a step of a pipeline": (make_pipeline(FunctionTransformer(Keeps(OTHER))), "frame.close"),
    "a feature": ([HELD_DAYS], "DAYS.close"),
    "another symbol's leaky feature": ([of_symbol("ETH", Feature("next", ("close",), 2, "1", "own", "own", lambda b: b["close"].shift(-1)), OTHER)], "other.close"),
    "that, lagged too little": ([lagged(of_symbol("ETH", Feature("third", ("close",), 2, "1", "own", "own", lambda b: b["close"].shift(-3)), OTHER), 2)], "other.close"),
}


@pytest.mark.parametrize("name", HELD_LEAKS)
def test_leaks_through_frames_that_a_function_holds_are_caught(name: str) -> None:
    held, through = HELD_LEAKS[name]
    row = prove_causal(held, BARS, search=0).iloc[0]
    assert row["causal"] is not pd.NA and not row["causal"]
    assert through in row["through"].split(), row["through"]
    assert not row["unseen"]


def days_closed(b: Bars) -> pd.Series:
    "The other's day, from its close on."
    day = DAYS.set_index("close_ts")["close"]
    return pd.Series(day.reindex(pd.DatetimeIndex(b["close_ts"]), method="ffill").to_numpy(), b.index)


HELD_INNOCENTS: dict[str, Any] = {
    "days joined on their close": days_closed,
    "another symbol": [of_symbol("ETH", "rsi_14", OTHER), of_symbol("ETH", "ret_1", DAYS), lagged(of_symbol("ETH", "ret_1", DAYS), 3)],
    "longer bars of another symbol": [of_symbol("ETH", on_frame("4h", "ret_1"), OTHER)],
    "the same hour of another frame": lambda b: OTHER["close"].reindex(b.index) / b["close"],
}


@pytest.mark.parametrize("name", HELD_INNOCENTS)
def test_frames_that_a_function_holds_innocently_pass(name: str) -> None:
    table = prove_causal(HELD_INNOCENTS[name], BARS, search=16)
    assert table["causal"].all() and not table["unseen"].any(), table.to_string()


def test_a_frame_handed_over_as_an_argument() -> None:
    def on_start(b: Bars, daily: Bars) -> pd.Series:
        return daily["close"].reindex(b.index, method="ffill")

    bare = DAYS.drop(columns=["close_ts"])  # only the index says when its rows are known
    row = prove_causal(on_start, BARS, others={"daily": DAYS}, search=0).iloc[0]
    assert not row["causal"] and row["through"] == "daily.close"
    at_close = bare.set_index(pd.DatetimeIndex(DAYS["close_ts"]))
    assert prove_causal(on_start, BARS, others={"daily": at_close}, search=0)["causal"].all()
    funding = prove_causal(lambda b: FUNDING.reindex(b.index, method="bfill"), BARS, others={"funding": FUNDING}, search=0).iloc[0]
    assert not funding["causal"] and funding["through"] == "funding"
    assert prove_causal(lambda b: FUNDING.reindex(b.index, method="ffill"), BARS, others={"funding": FUNDING}, search=0)["causal"].all()
    with pytest.raises(ConfigError, match="reads 'weekly'"):
        prove_causal(on_start, BARS, others={"weekly": DAYS})
    with pytest.raises(SchemaError, match="a time index"):
        prove_causal(on_start, BARS, others={"daily": DAYS.drop(columns="close_ts").reset_index(drop=True)})


UNSEEN: dict[str, tuple[Any, str]] = {
    "a series without times": (lambda b: pd.Series(b.index.hour, b.index).map(HOURLY_MEANS), "HOURLY_MEANS (Series, 24 rows)"),
    "a series that nobody vouched for": (lambda b: FUNDING.reindex(b.index, method="ffill"), "FUNDING (Series, 125 rows)"),
    "an array": (lambda b: pd.Series(RAMP[: len(b)], b.index), "RAMP (ndarray, 2,000 values)"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_data_that_were_not_changed_are_named(name: str) -> None:
    fn, told = UNSEEN[name]
    with pytest.warns(UserWarning, match="not proved causal"):
        row = prove_causal(fn, BARS, search=0).iloc[0]
    assert row["causal"] is pd.NA and row["unseen"] == told and "not proved" in row["note"]


def test_a_leak_is_a_leak_beside_unseen_data() -> None:
    with pytest.warns(UserWarning, match="not proved causal"):
        row = prove_causal(lambda b: b["close"].shift(-1) + FUNDING.mean(), BARS, search=0).iloc[0]
    assert row["causal"] is not pd.NA and not row["causal"] and row["unseen"]


def test_another_symbol_on_finer_bars_has_the_warmup_that_it_needs() -> None:
    quarters = bar_frame(BARS[["open", "high", "low", "close", "volume"]].resample("15min").ffill().dropna(), "15m")
    f = of_symbol("ETH", "ret_24", OTHER, base="15m")
    assert f.warmup == 25 * 4 + 3
    assert prove_causal([f], quarters.iloc[:2000], cuts=2, search=0)["causal"].all()
    with pytest.raises(SchemaError, match="base="):
        of_symbol("ETH", "ret_24", OTHER)(quarters)
    short = Feature(f.name, f.inputs, f.warmup - 1, f.unit, f.group, f.source, f.fn)
    assert not prove_causal([short], quarters.iloc[:2000], cuts=2, search=0)["warmup_ok"].any()
    finer = of_symbol("ETH", "ret_24", quarters, base="1h")  # 25 quarters are less than 7 hours
    assert finer.warmup == 7 and prove_causal([finer], BARS.iloc[:400], cuts=2, search=0)["causal"].all()


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


EVERYDAY: dict[str, Any] = {  # pandas and SciPy as everybody uses them; some round by the whole sample
    "skew of returns": lambda b: ret(b).rolling(72).skew(),
    "kurtosis of returns": lambda b: ret(b).rolling(72).kurt(),
    "kurtosis of seven": lambda b: ret(b).fillna(0.0).rolling(7).kurt(),
    "skew of volume": lambda b: b["volume"].rolling(24).skew(),
    "kurtosis of volume": lambda b: b["volume"].rolling(24).kurt(),
    "expanding skew": lambda b: ret(b).expanding(30).skew(),
    "rolling variance": lambda b: b["close"].rolling(24).var(),
    "rolling covariance": lambda b: b["volume"].rolling(24).cov(b["close"]),
    "rolling median": lambda b: b["close"] / b["close"].rolling(24).median(),
    "rolling autocorrelation": lambda b: ret(b).rolling(48).corr(ret(b).shift(1)),
    "exponential deviation": lambda b: ret(b).ewm(span=24).std(),
    "rolling sum of tiny and huge": lambda b: (b["volume"] * 1e9 + ret(b)).rolling(24).sum() - (b["volume"] * 1e9).rolling(24).sum(),
    "convolution by Fourier": lambda b: oaconvolve(known(ret(b)), np.ones(20) / 20)[: len(b)],
    "money": lambda b: (b["close"] * b["volume"]).rolling(24).mean() / (b["close"] * b["volume"]).rolling(240).mean(),
    "pandas-ta bollinger": lambda b: ta.bbands(b["close"].ffill()) if len(b) > 60 else None,
    "pandas-ta skew": lambda b: ta.skew(b["close"].ffill()) if len(b) > 60 else None,
}
INNOCENTS |= EVERYDAY


HEAVY = ("pandas-ta supertrend", "pandas-ta kama")  # a loop of pandas over the bars; "trailing stop" is a state machine too


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.heavy) if n in HEAVY else n for n in INNOCENTS])
def test_innocents_are_not_accused(name: str) -> None:
    table = prove_causal(INNOCENTS[name], BARS, search=examples(16, 64))
    told = table[~table["causal"].fillna(True)]
    assert told.empty, told.to_string()
    assert table["causal"].any() and not table["through"].any()


def test_a_true_warmup_passes_and_a_false_one_does_not() -> None:
    def mean(b: Bars) -> pd.Series:
        return b["close"].rolling(9).mean()

    good, bad = (Feature(f"mean_{w}", ("close",), w, "1", "own", "own", mean if w == 9 else lambda b: b["close"].rolling(9, min_periods=1).mean()) for w in (9, 5))
    table = prove_causal([good, bad], BARS, cuts=2, search=0)
    assert table["warmup_ok"].tolist() == [True, False] and table["truncation_ok"].all()


# ------------------------------------------------------------------ rounding and small leaks
@pytest.mark.parametrize("name", ["skew of returns", "kurtosis of returns"])
def test_rounding_that_depends_on_the_sample_is_told_from_a_leak(name: str) -> None:
    row = prove_causal(EVERYDAY[name], BARS).iloc[0]
    assert row["causal"] and 1e-9 < row["worst_error"] < 1e-4
    assert row["note"].startswith("rounding that depends on the sample (1e-0") and "features.windows" in row["note"]


SMALL: dict[str, Any] = {  # each about a hundred-millionth of its column
    "sign of tomorrow": lambda b: ret(b) * (1 + 1e-8 * np.sign(ret(b).shift(-1).fillna(0.0))),
    "tomorrow's return": lambda b: b["close"] * (1 + 1e-7 * ret(b).shift(-1).fillna(0.0)),
    "mean of all": lambda b: ret(b) * (1 + 1e-8 * b["close"].mean() / b["close"]),
    "rank over all": lambda b: ret(b) * (1 + 3e-8 * b["close"].rank(pct=True)),
    "deviation of all": lambda b: (ret(b) + 1e-8 * ret(b).std()).rolling(24).mean(),
    "centred mean": lambda b: b["close"] + 1e-6 * (b["close"].rolling(9, center=True).mean() - b["close"]),
    "beside rounding": lambda b: ret(b).rolling(72).skew() * (1 + 1e-8 * np.sign(ret(b).shift(-1).fillna(0.0))),
    "within rounding": lambda b: ret(b).rolling(72).kurt() + 1e-6 * np.sign(ret(b).shift(-1).fillna(0.0)),
    "rare, beside rounding": lambda b: ret(b).rolling(72).skew() * (1 + 1e-3 * (ret(b).shift(-1) < 0) * (ret(b) < -0.025)),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_leaks_are_caught_and_not_taken_for_rounding(name: str) -> None:
    row = prove_causal(SMALL[name], BARS).iloc[0]
    assert not row["causal"] and "rounding" not in row["note"] and row["through"] == "close", row


def test_a_leak_without_a_value_among_the_last_bars_is_found() -> None:
    "A feature of a column that ended, or that gaps leave without a value at the end, trains on earlier bars."
    bars = make_bars(3000, gaps=tuple(range(1500, 3000, 20)))
    size = np.log(bars["close"]).diff().abs()
    assert size.tail(1400).rolling(30).mean().isna().all()
    leak = Feature("leak", ("close",), 61, "1", "own", "own", lambda b: np.log(b["close"]).diff().abs().rolling(61, center=True).mean())
    honest = Feature("honest", ("close",), 61, "1", "own", "own", lambda b: np.log(b["close"]).diff().abs().rolling(60).mean())
    assert list(find_leaks([leak, honest], bars)) == ["leak"]
    with pytest.raises(ConfigError, match="leak"):
        DataProcessing([honest, leak]).process_data(bars)
