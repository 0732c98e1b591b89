"""The catalogue of features: every one causal with its exact warm-up on real and on made bars, scale-free, documented; frames, symbols and trades inside bars."""

import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from cryptoresearch.data.bars import bar_frame, resample_bars
from cryptoresearch.errors import ConfigError, DataNotFound, SchemaError
from cryptoresearch.features import alpha158, derived as frames, microstructure, oscillators, recursions, volatility, windows  # noqa: F401  they register
from cryptoresearch.features.causality import live_across_gap, prove_causal
from cryptoresearch.features.pipeline import DataProcessing
from cryptoresearch.features.registry import Feature, REGISTRY, resolve
from cryptoresearch.settings import shared_data

GROUPS = ("ranges", "realised", "har", "jumps", "alpha158", "microstructure", "frames", "trends", "bands", "money_flow", "oscillators", "averages", "statistics", "decay", "breakout", "reversal")
NEW = resolve([*GROUPS, "cycles"])
SHORT = [f for f in NEW if f.warmup <= 400 or f.name == "range_reversal_return"]  # the longer one has no shorter sibling


def kind_of(f: Feature) -> tuple[object, ...]:
    "What a feature shares with those that differ from it only in numbers (window lengths) or columns."
    call, choices = f.fn, [(k, "" if isinstance(v, float | int) and not isinstance(v, bool) else v) for k, v in getattr(f.fn, "params", ())]
    return type(call), getattr(call, "fn", None), tuple(choices)


def one_of_each(features: list[Feature]) -> list[Feature]:
    "The feature with the shortest warm-up of each kind."
    return list({kind_of(f): f for f in sorted(features, key=lambda f: -f.warmup)}.values())


def some_of_each(features: list[Feature]) -> list[Feature]:
    "Of each group the features with the shortest, a medium and the longest warm-up."
    groups: dict[str, list[Feature]] = {}
    for f in sorted(features, key=lambda f: f.warmup):
        groups.setdefault(f.group, []).append(f)
    return [g[i] for g in groups.values() for i in sorted({0, len(g) // 2, len(g) - 1})]


every_feature = pytest.param(list, marks=pytest.mark.heavy)
Choose = Callable[[list[Feature]], list[Feature]]


def make_bars(n: int = 1000, seed: int = 0, price: float = 1e4, gaps: tuple[int, ...] = (), dead: tuple[int, int] | None = None) -> pd.DataFrame:
    "A bar frame of a random walk with every column known, missing rows and a dead stretch."
    rng = np.random.default_rng(seed)
    close = price * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    open_ = np.r_[price, close[:-1]]
    spread = np.exp(np.abs(rng.normal(0, 0.005, (2, n))))
    df = pd.DataFrame({"open": open_, "high": np.maximum(open_, close) * spread[0], "low": np.minimum(open_, close) / spread[1], "close": close})
    df["volume"], df["trades"] = rng.lognormal(3, 1, n), rng.poisson(50, n) + 1.0
    df["buy_volume"], df["buy_volume_tick"] = (df["volume"] * rng.random(n) for _ in range(2))
    if dead:
        rows = slice(dead[0], dead[1] - 1)
        df.loc[rows, ["open", "high", "low", "close"]] = df.loc[dead[0], "close"]
        df.loc[rows, ["volume", "trades", "buy_volume", "buy_volume_tick"]] = 0.0
    df["quote_volume"] = df["volume"] * (df["high"] + df["low"]) / 2
    df["vwap"] = np.where(df["volume"] > 0, (df["high"] + df["low"]) / 2, df["close"])
    df.index = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC", name="ts")
    return bar_frame(df.drop(df.index[list(gaps)]), "1h", symbol="TEST")


@pytest.fixture(scope="module")
def hourly() -> pd.DataFrame:
    return bar_frame(pd.read_parquet(shared_data() / "BTCUSDT-1h-2017-08_2024-04.parquet").set_index("open_time"), "1h", symbol="BTCUSDT")


# ------------------------------------------------------------------ the promises
def test_catalogue_is_large_and_documented() -> None:
    assert len(resolve("alpha158")) == 158
    assert len(NEW) >= 158 + 60
    for f in NEW:
        assert f.unit and f.source and f.inputs and f.warmup >= 1, f.name
        assert f.name.isidentifier(), f.name


def test_what_is_chosen_leaves_out_no_function_and_no_group() -> None:
    chosen, on_hours = one_of_each(SHORT), some_of_each([f for f in NEW if f.candles_suffice])
    assert {kind_of(f) for f in [*chosen, *on_hours]} == {kind_of(f) for f in NEW} and len(chosen) >= 200
    alpha = [f.name for f in chosen if f.group == "alpha158"]
    assert {"alpha_cntp_5", "alpha_cntn_5", "alpha_cntd_5"} <= {*alpha} and "alpha_cntp_60" not in alpha
    some = some_of_each(resolve(["all", "trades"]))
    assert {f.group for f in some} == {f.group for f in resolve(["all", "trades"])} and max(f.warmup for f in some) > 900


@pytest.mark.parametrize("choose", [some_of_each, every_feature])
def test_every_feature_is_causal_on_real_hours(hourly: pd.DataFrame, choose: Choose) -> None:
    bars = hourly["2018-08-20":].iloc[:1560]  # gaps, and 1,000 whole hours
    assert bars["gap"].any()
    table = prove_causal(choose([f for f in NEW if f.candles_suffice]), bars, cuts=(700, 1540), search=0)
    bad = table[~table["causal"].fillna(False)]
    assert bad.empty, bad
    assert table["worst_error"].max() <= 1e-9


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_no_feature_of_decay_or_breakout_leaks_in_rare_rows(hourly: pd.DataFrame) -> None:
    mine = [*resolve(["decay", "breakout", "reversal"]), *resolve(["hour_of_week_new_york", "weekend_ahead_24"])]
    table = prove_causal(mine, hourly.loc["2019-04":"2019-07"])
    assert table["causal"].all(), table[~table["causal"].fillna(False)]


@pytest.mark.parametrize("choose", [one_of_each, every_feature])
def test_every_feature_is_causal_on_nasty_bars(choose: Choose) -> None:
    bars = make_bars(1000, gaps=(870, 871), dead=(930, 950))
    table = prove_causal(choose(SHORT), bars, cuts=(869, 940), search=0)
    bad = table[~table["causal"].fillna(False)]
    assert bad.empty, bad


def test_same_bits_from_another_start() -> None:
    bars = make_bars(1300, dead=(900, 905), gaps=(1250,))
    exact = [f for f in NEW if f.group in ("alpha158", "har")]
    whole, later = DataProcessing(exact).transform(bars), DataProcessing(exact).transform(bars.iloc[317:])
    for f in exact:
        a, b = whole[f.name].iloc[317 + f.warmup - 1 :], later[f.name].iloc[f.warmup - 1 :]
        assert a.equals(b), f.name


def test_contract_warmup_gaps_and_no_infinities() -> None:
    bars = make_bars(1000, price=1e-8, gaps=(600, 850), dead=(880, 930))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X = DataProcessing(NEW).process_data(bars)
    assert not np.isinf(X.to_numpy()).any()
    for f in NEW:
        values = X[f.name].to_numpy()
        assert np.isnan(values[: f.warmup - 1]).all(), f.name
        for row in np.flatnonzero(bars["gap"]):
            assert np.isnan(values[row : row + f.warmup]).all(), f.name


def test_scale_free() -> None:
    bars = make_bars(900)
    prices = bars.assign(**{c: bars[c] * 1024 for c in ("open", "high", "low", "close", "vwap", "quote_volume")})
    amounts = bars.assign(**{c: bars[c] * 1024 for c in ("volume", "quote_volume", "buy_volume", "buy_volume_tick", "trades")})
    X = DataProcessing(NEW).transform(bars)
    for other in (prices, amounts):
        pd.testing.assert_frame_equal(DataProcessing(NEW).transform(other), X, rtol=1e-6, atol=1e-8)


def test_values_everywhere_on_lively_bars() -> None:
    X = DataProcessing(NEW).process_data(make_bars(2200)).iloc[-100:]
    rare = [c for c in X if c.startswith("roll_spread")]  # no value where the covariance is positive
    known = X.drop(columns=rare).notna().mean()
    assert (known == 1).all(), known[known < 1]


def test_no_two_features_are_the_same() -> None:
    X = DataProcessing([f for f in resolve("all") if f.warmup <= 800]).process_data(make_bars(1300, seed=3)).iloc[800:]
    X = X.loc[:, X.std() > 0]
    same = np.triu(X.corr().abs().to_numpy() > 1 - 1e-12, 1)
    pairs = {tuple(sorted((X.columns[i], X.columns[j]))) for i, j in zip(*np.nonzero(same), strict=True)}
    known = {p for p in pairs if any(n.startswith("alpha_") for n in p)}  # Qlib's own: SUMN = 1 - SUMP and so on
    assert pairs - known == set(), pairs - known


@pytest.mark.parametrize("choose, bars_read", [(some_of_each, 100), pytest.param(list, 1_000, marks=pytest.mark.heavy)])
def test_live_equals_batch_across_a_gap(choose: Choose, bars_read: int) -> None:
    "Registered features, from their last bars and from a growing window, before, in and after a gap."
    bars = make_bars(2150, gaps=(1070, 1071), dead=(1100, 1106))
    drawn = np.random.default_rng(2).random((len(bars), len(microstructure.TRADE_COLUMNS)))
    bars = bars.assign(**{c: np.where(bars["gap"], np.nan, drawn[:, i]) for i, c in enumerate(microstructure.TRADE_COLUMNS)})
    features = choose(resolve(["all", "trades"]))
    table = live_across_gap(features, bars, bars_read)
    every = {n: f for n, f in REGISTRY.items() if f.group not in ("own", "test")}
    assert set(table.index) >= {f.name for f in choose([*every.values()])} and len(every) >= 476 + 36
    assert table["equal"].all() and table["worst_error"].max() <= 1e-9, table[~table["equal"]]
    assert table["compared"].min() >= 8 and table["behind"].min() >= 4, table.nsmallest(5, "compared")  # values, not NaN compared with NaN
    assert (table.loc[table["warmup"] <= bars_read // 20, "compared"] >= 40).all()


def test_live_across_a_gap_finds_what_differs() -> None:
    bars = make_bars(400, gaps=(200,))
    endless = Feature("endless", ("close",), 30, "1", "own", "own", lambda b: b["close"].ewm(span=20).mean())
    loose = Feature("loose", ("close",), 30, "1", "own", "own", endless.fn, tolerance=0.5)
    whole = Feature("whole", ("close",), 2, "1", "own", "own", lambda b: b["close"] / b["close"].max())
    table = live_across_gap([endless, loose, whole, "ret_3"], bars)
    assert table["equal"].tolist() == [False, True, False, True]
    with pytest.raises(SchemaError, match="bars with a gap"):
        live_across_gap("ret_3", make_bars(50))


# ------------------------------------------------------------------ windows
def test_windows_against_pandas_with_nan() -> None:
    rng = np.random.default_rng(0)
    x, y = (pd.Series(rng.normal(size=3000).round(1)) for _ in range(2))  # rounded: many ties
    x[[700, 701, 2000]] = np.nan
    np.testing.assert_allclose(windows.std_over(x, 17), x.rolling(17).std(), atol=1e-9)
    np.testing.assert_allclose(windows.quantile_over(x, 17, 0.3), x.rolling(17).quantile(0.3), atol=1e-12)
    np.testing.assert_allclose(windows.rank_over(x, 17), x.rolling(17).rank(pct=True), atol=1e-12)
    np.testing.assert_allclose(windows.highest_over(x, 17)[1], x.rolling(17).apply(np.argmax, raw=True))
    np.testing.assert_allclose(windows.lowest_over(x, 17)[0], x.rolling(17).min())
    np.testing.assert_allclose(windows.correlation_over(x, y, 17), x.rolling(17).corr(y), atol=1e-9)
    np.testing.assert_allclose(windows.correlation_over(x, y, 17, skip=True), x.rolling(17, min_periods=9).corr(y)[16:].reindex(x.index), atol=1e-9)


@pytest.mark.parametrize("n", [0, 1, 4, 5])
def test_windows_longer_than_the_series(n: int) -> None:
    x = pd.Series(np.arange(float(n)))
    for out in (windows.sum_over(x, 5), windows.std_over(x, 5), windows.rank_over(x, 5), windows.correlation_over(x, x, 5), windows.trend_over(x, 5)[0], windows.highest_over(x, 5)[0], windows.z_over(x, 4)):
        assert len(out) == n and out.notna().sum() == (n == 5)


# ------------------------------------------------------------------ frames and symbols
@pytest.mark.parametrize("start", range(5))
def test_longer_bars_are_exact_in_every_phase(start: int) -> None:
    bars, f = make_bars(400, seed=5), frames.on_frame("4h", "cmo_14")
    whole = f(bars)
    for end in range(200, 206):
        part = bars.iloc[end - f.warmup : end]
        assert f(part).iloc[-1] == whole.iloc[end - 1]
        assert np.isnan(f(part.iloc[1 + start :]).iloc[-1])


def test_longer_bars_see_only_what_has_closed() -> None:
    bars = make_bars(200)
    value, four = frames.on_frame("4x", "ret_1")(bars), resample_bars(bars, "4h")
    for t in range(12, 200):
        closed = four[four["close_ts"] <= bars["close_ts"].iloc[t]]
        assert value.iloc[t] == pytest.approx(np.log(closed["close"].iloc[-1] / closed["close"].iloc[-2]), rel=1e-12)


def test_made_features_travel() -> None:
    bars = make_bars(300)
    both = frames.with_symbol(bars, "ETHUSDT", make_bars(300, seed=1))
    made = [frames.lagged(frames.on_frame("4h", "ret_1"), 2), frames.of_symbol("ETHUSDT", frames.lagged("rv_24", 3)), frames.fracdiff("close", 0.6), frames.correlation_to("ETHUSDT", 72)]
    X = DataProcessing(made).process_data(both)
    assert X.columns.tolist() == ["ret_1_4h_lag_2", "ethusdt_rv_24_lag_3", "fracdiff_close_60", "correlation_to_ethusdt_72"]
    assert X.iloc[-1].notna().all()
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(DataProcessing(made))).process_data(both), X)


def test_another_symbols_gap_is_a_gap() -> None:
    both = frames.with_symbol(make_bars(200), "ETHUSDT", make_bars(200, seed=1, gaps=(100,)))
    for name in ("ret_24", "cmf_20", "volume_ratio_24"):
        f = frames.of_symbol("ETHUSDT", name)
        values = f(both)
        assert values.iloc[100 : 100 + f.warmup].isna().all() and pd.notna(values.iloc[100 + f.warmup])


def test_registering_and_refusals() -> None:
    try:
        frames.register(frames.lagged("ret_3", 7), group="mine")
        frames.register(frames.lagged("ret_3", 7), group="mine")  # a cell that runs again
        assert [f.name for f in resolve("mine")] == ["ret_3_lag_7"]
    finally:
        REGISTRY.pop("ret_3_lag_7", None)
    for wrong in (lambda: frames.lagged("ret_1", 0), lambda: frames.on_frame("1h", "ret_1"), lambda: frames.on_frame("90m", "ret_1"), lambda: frames.lagged("returns", 1), lambda: frames.fracdiff("close", 0)):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(DataNotFound):
        frames.lagged("rett_1", 1)
    with pytest.raises(SchemaError, match="base="):
        frames.on_frame("1d", "ret_1", base="4h")(make_bars(100))


# ------------------------------------------------------------------ trades inside bars
def test_trades_inside_bars_by_hand() -> None:
    ts = pd.to_datetime([0, 100, 100, 400, 900, 1500], unit="ms", utc=True)
    trades = pd.DataFrame({"ts": ts, "trade_id": range(6), "price": [100.0, 101, 101, 100, 102, 50], "qty": [1.0, 1, 2, 4, 2, 9], "side_reported": [1, 1, -1, -1, -1, 1]})
    index = pd.date_range("1970-01-01", periods=3, freq="1s", tz="UTC", name="ts")
    bars = pd.DataFrame({"close_ts": index + pd.Timedelta("1s"), "gap": [False, True, False]}, index=index)
    out = microstructure.trade_features(trades, bars)
    row, q = out.iloc[0], np.array([1.0, 1, 2, 4, 2])
    assert row["t_size_median"] == 1.0 and row["t_large_share"] == 0.4
    assert row["t_size_gini"] == pytest.approx(np.abs(q[:, None] - q).sum() / (2 * 25 * 2.0))
    assert row["t_imbalance_count"] == pytest.approx(-0.2)
    money = q * [100, 101, 101, 100, 102]
    assert row["t_imbalance_money"] == pytest.approx((money[:2].sum() - money[2:].sum()) / money.sum())
    assert (row["t_run_mean"], row["t_run_longest"]) == (0.5, pytest.approx(0.6))
    assert row["t_cluster"] == 0.25 and row["t_zero_share"] == 0.25
    assert row["t_late_share"] == pytest.approx(204 / money.sum())
    assert np.isnan(row["t_imbalance_tick_count"])
    assert out.iloc[1:].isna().all(axis=None)  # a gap, and a bar without trades


def test_qlibs_names() -> None:
    ops = ["roc", "ma", "std", "beta", "rsqr", "resi", "max", "min", "qtlu", "qtld", "rank", "rsv", "imax", "imin", "imxd", "corr", "cord", "cntp", "cntn", "cntd", "sump", "sumn", "sumd", "vma", "vstd", "wvma", "vsump", "vsumn", "vsumd"]
    names = {f"alpha_{o}_{n}" for o in ops for n in alpha158.WINDOWS} | {f"alpha_{k}" for k in ["kmid", "klen", "kmid2", "kup", "kup2", "klow", "klow2", "ksft", "ksft2", "open0", "high0", "low0", "vwap0"]}
    assert names == {f.name for f in resolve("alpha158")}
