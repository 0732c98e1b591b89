"""Features over arbitrary bars: gaps, dead markets, any starting point, scikit-learn, and leaks that must be caught."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.errors import ConfigError, DataNotFound, SchemaError
from cryptoresearch.features import indicators as ind
from cryptoresearch.features.causality import KINDS, live_against_batch, other_future, prove_causal
from cryptoresearch.features.pipeline import DataProcessing
from cryptoresearch.features.registry import Feature, feature, feature_names, REGISTRY, resolve
from cryptoresearch.features.registry import GROUPS

ALL = resolve(GROUPS)
QUICK = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_bars(n: int = 600, seed: int = 0, price: float = 1e4, gaps: tuple[int, ...] = (), dead: tuple[int, int] | None = None, unit: str = "1h") -> pd.DataFrame:
    "A bar frame of a random walk with every column known, missing rows and a dead stretch."
    rng = np.random.default_rng(seed)
    close = price * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    open_ = np.r_[price, close[:-1]]
    spread = np.exp(np.abs(rng.normal(0, 0.005, (2, n))))
    df = pd.DataFrame({"open": open_, "high": np.maximum(open_, close) * spread[0], "low": np.minimum(open_, close) / spread[1], "close": close})
    df["volume"] = rng.lognormal(3, 1, n)
    df["trades"] = rng.poisson(50, n) + 1.0
    df["buy_volume"], df["buy_volume_tick"] = (df["volume"] * rng.random(n) for _ in range(2))
    if dead:
        rows = slice(dead[0], dead[1] - 1)
        df.loc[rows, ["open", "high", "low", "close"]] = df.loc[dead[0], "close"]
        df.loc[rows, ["volume", "trades", "buy_volume", "buy_volume_tick"]] = 0.0
    df["quote_volume"] = df["volume"] * (df["high"] + df["low"]) / 2
    df["vwap"] = np.where(df["volume"] > 0, (df["high"] + df["low"]) / 2, df["close"])
    df.index = pd.date_range("2024-01-01", periods=n, freq=unit, tz="UTC", name="ts")
    return bar_frame(df.drop(df.index[list(gaps)]), unit, symbol="TEST")


nasty = st.builds(
    make_bars,
    n=st.just(620),
    seed=st.integers(0, 10_000),
    price=st.sampled_from([1e-8, 1.0, 7e4]),
    gaps=st.lists(st.integers(5, 600), max_size=4, unique=True).map(tuple),
    dead=st.none() | st.tuples(st.integers(280, 400), st.integers(401, 590)),
)


@QUICK
@given(bars=nasty)
def test_contract_holds_on_any_bars(bars: pd.DataFrame) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X = DataProcessing(ALL).process_data(bars)
    assert X.index.equals(bars.index) and all(t.kind == "f" for t in X.dtypes)
    assert not np.isinf(X.to_numpy()).any()
    gap = bars["gap"].to_numpy()
    for f in ALL:
        values = X[f.name].to_numpy()
        assert np.isnan(values[: f.warmup - 1]).all(), f.name
        for row in np.flatnonzero(gap):
            assert np.isnan(values[row : row + f.warmup]).all(), f.name


@QUICK
@given(bars=nasty, start=st.integers(1, 300))
def test_values_do_not_depend_on_the_start(bars: pd.DataFrame, start: int) -> None:
    whole, later = DataProcessing(ALL).transform(bars), DataProcessing(ALL).transform(bars.iloc[start:])
    for f in ALL:
        a, b = whole[f.name].iloc[start + f.warmup - 1 :].to_numpy(), later[f.name].iloc[f.warmup - 1 :].to_numpy()
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9 * float(np.nanmedian(np.abs(a))) if np.isfinite(a).any() else 0, err_msg=f.name)


@QUICK
@given(bars=nasty, cut=st.integers(0, 600), kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_another_future_is_a_valid_frame_with_the_same_past(bars: pd.DataFrame, cut: int, kind: str, seed: int) -> None:
    new = other_future(bars, cut, kind, seed)
    assert DataProcessing("returns").fit(new)
    pd.testing.assert_frame_equal(new.iloc[: cut + 1], bars.iloc[: cut + 1])
    assert new["gap"].equals(bars["gap"])


def test_scale_free_features_ignore_the_price_level() -> None:
    bars = make_bars()
    prices = ["open", "high", "low", "close", "vwap"]
    doubled = bars.assign(**{c: bars[c] * 1024 for c in prices}, quote_volume=bars["quote_volume"] * 1024)
    more = bars.assign(**{c: bars[c] * 1024 for c in ("volume", "quote_volume", "buy_volume", "buy_volume_tick", "trades")})
    X = DataProcessing(ALL).transform(bars)
    for other in (doubled, more):
        pd.testing.assert_frame_equal(DataProcessing(ALL).transform(other), X, rtol=1e-7, atol=1e-9)


def test_every_feature_has_values_and_is_documented() -> None:
    X = DataProcessing(ALL).process_data(make_bars())
    assert X.iloc[300:].drop(columns="roll_spread_72").notna().all().all()
    for f in ALL:
        assert f.unit and f.source and f.group and f.warmup >= 1 and f.inputs, f.name
    assert 40 <= len(ALL) <= 75


def test_every_feature_is_causal_on_nasty_bars() -> None:
    table = prove_causal(ALL, make_bars(620, gaps=(420, 421), dead=(500, 530)), cuts=(0, 300, 419, 420, 505, 580))
    assert table["causal"].all(), table[~table["causal"].fillna(False)]


def test_live_equals_batch_after_a_gap() -> None:
    bars = make_bars(700, gaps=(340,), dead=(560, 600))  # every window is whole again before the end
    table = live_against_batch(DataProcessing(ALL), bars, rows=12)
    assert table["equal"].all() and (table.drop(index="roll_spread_72")["values"] == 12).all() and table["values"].min() >= 1, table.nsmallest(5, "values")


# ------------------------------------------------------------------ tables by hand
def test_rsi_small_table() -> None:
    changes = np.array([1.0, -2.0, 3.0, 0.0, -1.0])
    weights = ind.ema_weights(1 / 2)
    n = len(weights)
    close = pd.Series(np.cumsum(np.r_[100.0, np.zeros(n), changes]))
    recent = changes[::-1]
    up, down = (weights[:5] * recent.clip(0)).sum(), (weights[:5] * (-recent).clip(0)).sum()
    assert ind.rsi(close, 2).iloc[-1] == pytest.approx(100 * up / (up + down), rel=1e-12)


def test_yang_zhang_constant_jump_and_body() -> None:
    # every bar opens 1 % above the last close and closes where it opened: no variance, no range
    open_ = pd.Series(100 * 1.01 ** np.arange(10.0))
    assert ind.yang_zhang(open_, open_, open_, open_, 5).iloc[-1] == pytest.approx(0, abs=1e-12)
    # alternating jumps of +-d without bodies: only the variance of the jumps is left
    d = 0.01 * np.where(np.arange(10) % 2, 1, -1)
    path = pd.Series(100 * np.exp(np.cumsum(d)))
    assert ind.yang_zhang(path, path, path, path, 4).iloc[-1] == pytest.approx(d[:4].std(ddof=1), rel=1e-12)


def test_range_estimators_on_one_bar() -> None:
    o, h, low, c = (pd.Series([x]) for x in (100.0, 110.0, 95.0, 105.0))
    u, d, k = np.log(1.10), np.log(0.95), np.log(1.05)
    assert ind.parkinson(h, low, 1).iloc[0] == pytest.approx((u - d) / np.sqrt(4 * np.log(2)))
    assert ind.garman_klass(o, h, low, c, 1).iloc[0] == pytest.approx(np.sqrt(0.5 * (u - d) ** 2 - (2 * np.log(2) - 1) * k**2))
    assert ind.rogers_satchell(o, h, low, c, 1).iloc[0] == pytest.approx(np.sqrt(u * (u - k) + d * (d - k)))


def test_adx_of_a_straight_climb_is_100() -> None:
    high = pd.Series(100.0 + np.arange(60))
    assert ind.adx(high, high - 1, 3).iloc[-1] == pytest.approx(100)
    assert ind.directional(high[::-1].reset_index(drop=True), high[::-1].reset_index(drop=True) - 1, 3).iloc[-1] == pytest.approx(-1)


def test_flat_market_is_nan_or_finite_and_its_deviation_exactly_zero() -> None:
    flat = pd.Series(np.full(50, 0.1 + 0.2))
    assert ind.window_std(flat, 20).iloc[-1] == 0.0
    assert np.isnan(ind.rsi(flat, 2).iloc[-1]) and np.isnan(ind.move_z(flat, 5).iloc[-1]) and np.isnan(ind.percent_b(flat, 20).iloc[-1])


# ------------------------------------------------------------------ pipeline
def test_sklearn_clone_pickle_pipeline() -> None:
    bars = make_bars()
    mine = Feature("mine", ("close",), 2, "1", "own", "own", REGISTRY["ret_1"].fn)
    processing = DataProcessing(["ret_3", "flow", mine])
    names = list(processing.get_feature_names_out())
    assert names[0] == "ret_3" and names[-1] == "mine"
    assert list(clone(processing).get_feature_names_out()) == names
    assert list(pickle.loads(pickle.dumps(processing)).transform(bars).columns) == names
    assert list(processing.set_output(transform="pandas").fit_transform(bars).columns) == names
    y = np.zeros(len(bars))
    assert make_pipeline(processing, SimpleImputer(keep_empty_features=True), LinearRegression()).fit(bars, y).predict(bars).shape == (len(bars),)


def test_default_needs_candles_only_and_flow_is_nan_without_flow() -> None:
    bare = bar_frame(make_bars()[["open", "high", "low", "close", "volume"]], "1h")
    X = DataProcessing(ALL).process_data(bare)
    assert X[[f.name for f in ALL if not f.candles_suffice]].isna().all().all()
    assert set(DataProcessing().get_feature_names_out()) == {f.name for f in ALL if f.candles_suffice}


def test_input_is_left_alone() -> None:
    bars = make_bars(gaps=(300,))
    before = bars.copy()
    DataProcessing(ALL).process_data(bars)
    pd.testing.assert_frame_equal(bars, before)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda b: b.drop(columns="high"),
        lambda b: b.tz_localize(None),
        lambda b: b.iloc[::-1],
        lambda b: pd.concat([b, b.iloc[-1:]]),
        lambda b: b.drop(b.index[5]),
        lambda b: b.to_numpy(),
        lambda b: b.reset_index(),
    ],
)
def test_wrong_frames_are_refused(break_it) -> None:
    with pytest.raises(SchemaError):
        DataProcessing().process_data(break_it(make_bars(50)))


def test_unknown_names_get_the_closest() -> None:
    with pytest.raises(DataNotFound, match="rsi_14"):
        DataProcessing("rsi_15").fit(make_bars(10))
    with pytest.raises(DataNotFound, match="volatility"):
        DataProcessing(["volatilty"]).fit(make_bars(10))
    with pytest.raises(ConfigError):
        DataProcessing([]).fit(make_bars(10))


def test_user_feature_registers_and_is_kept_out_of_default() -> None:
    try:

        @feature(name="test_only_body", inputs=["open", "close"], warmup=1, group="returns_of_mine")
        def body(bars: pd.DataFrame) -> pd.Series:
            return bars["close"] / bars["open"] - 1

        assert DataProcessing("test_only_body").process_data(make_bars(20)).notna().all().all()
        assert "test_only_body" not in feature_names("default") and feature_names("returns_of_mine") == ["test_only_body"]
    finally:
        REGISTRY.pop("test_only_body", None)


# ------------------------------------------------------------------ leaks
@pytest.mark.parametrize(
    ("leak", "ahead"),
    [
        (lambda b: b["close"].shift(-1), 1),
        (lambda b: b["close"].rolling(11, center=True).mean(), 5),
        (lambda b: (b["volume"].shift(-3) > 20).astype(float), 3),
        (lambda b: np.sign(b["close"].shift(-2) - b["close"]), 2),
        (lambda b: (b["buy_volume"].shift(-1) / b["volume"].shift(-1)), 1),
        (lambda b: (b["close"] > b["open"]).shift(-1, fill_value=False).astype(float) * 1e-6 + b["close"].pct_change(fill_method=None), 1),
        (lambda b: b["close"].rank(pct=True), None),
        (lambda b: b["close"] / b["close"].max(), None),
        (lambda b: b["close"].clip(upper=b["close"].quantile(0.9)), None),
        (lambda b: b["close"] - b["close"].mean(), None),
        (lambda b: b["close"].bfill(), None),
        (lambda b: b["close"].interpolate(), None),
        (lambda b: b["close"].pct_change(fill_method=None).rolling(50).std().bfill(), None),
        (lambda b: b["close"].resample("1D").transform("last"), None),
        (lambda b: b["close"][::-1].ewm(span=5).mean()[::-1], None),
    ],
)
def test_leaks_are_caught(leak, ahead) -> None:
    row = prove_causal(leak, make_bars(500, gaps=(200, 201, 350), dead=(400, 410)), cuts=6).iloc[0]
    assert not row["causal"]
    assert pd.notna(row["where"])
    if ahead is not None:
        assert row["looks_ahead"] == ahead


@pytest.mark.parametrize(
    "innocent",
    [
        lambda b: b["close"].pct_change(fill_method=None),
        lambda b: b["close"].ffill().ewm(span=50).mean(),
        lambda b: b["close"].expanding().mean(),
        lambda b: b["volume"].rolling(20).std() / b["volume"].rolling(20).mean(),
        lambda b: b["buy_volume"] / b["volume"],
        lambda b: b.loc[b["volume"] > 0, "close"].diff(),
        lambda b: b["close"].to_numpy() / b["open"].to_numpy(),
        lambda b: b["close"].resample("1D").transform("first"),
    ],
)
def test_innocents_are_not_accused(innocent) -> None:
    assert prove_causal(innocent, make_bars(500, gaps=(200, 201, 350), dead=(400, 410)), cuts=6)["causal"].all()


def test_false_warmup_and_randomness_are_found() -> None:
    bars = make_bars(400)
    short = Feature("short", ("close",), 5, "1", "own", "own", lambda b: b["close"].rolling(9, min_periods=1).mean())
    assert not prove_causal(short, bars, cuts=2).loc["short", "warmup_ok"]
    rng = np.random.default_rng(0)
    assert not prove_causal(lambda b: b["close"] * rng.normal(1, 0.1, len(b)), bars, cuts=2)["causal"].iloc[0]
