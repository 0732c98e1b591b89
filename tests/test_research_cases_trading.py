"Corner cases of trading, fractional differences, dropped outcomes and tiny volumes: the right values, computed by hand."

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import cryptoresearch.features.pipeline  # noqa: F401  (registers all features)
from cryptoresearch.errors import ConfigError, CryptoResearchError, SchemaError
from cryptoresearch.evaluation.scorecard import calibration_scores, reliability_table, scorecard
from cryptoresearch.evaluation.strategies import strategies, strategy_rows
from cryptoresearch.features.derived import fracdiff, fracdiff_weights, fractional_difference
from cryptoresearch.features.registry import resolve
from cryptoresearch.metrics.costs import capacity, cost_ladder, Costs, positions, random_equity, random_signals, trade
from cryptoresearch.metrics.scores import calibration_table, coverage_table, score_table
from cryptoresearch.metrics.strategy import max_drawdown, on_clock, sign_strategy, StrategyResult
from cryptoresearch.metrics.verdict import deflate, judge, with_savings
from cryptoresearch.serving.report_figures import equity_figure
from cryptoresearch.serving.research_figures import equities_figure
from cryptoresearch.serving.views import ladder_view, strategy_rows_view


def make_bars(returns: np.ndarray, scale: float = 1.0) -> pd.DataFrame:
    "Hours whose open-to-open returns are given; one more bar than returns."
    n = len(returns) + 1
    ts = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC", name="ts")
    price = 100 * np.cumprod(np.r_[1.0, 1 + returns])
    rng = np.random.default_rng(3)
    volume = rng.lognormal(0, 1, n) * scale
    bought = volume * rng.random(n)
    frame = {"open": price, "high": price * 1.002, "low": price * 0.998, "close": price * (1 + rng.normal(0, 5e-4, n))}
    frame |= {"volume": volume, "quote_volume": volume * price, "trades": 5.0, "buy_volume": bought, "buy_volume_tick": bought}
    return pd.DataFrame(frame | {"vwap": price, "close_ts": ts + pd.Timedelta("1h"), "gap": False}, index=ts)


# 6: costs and funding


def month_of_funding() -> tuple[pd.Series, pd.DataFrame, pd.Series]:
    "A long position of thirty days, the bars, and ninety rates of one basis point."
    bars = make_bars(np.zeros(30 * 24 + 3))
    rates = pd.Series(1.0, pd.date_range("2024-01-01 08:00", periods=90, freq="8h", tz="UTC"))
    return pd.Series(1.0, bars.index[: 30 * 24]), bars, rates


def test_funding_of_a_month_is_paid_in_full() -> None:
    wanted, bars, rates = month_of_funding()
    paid = trade(wanted, bars, 1, Costs(0, funding_bps=rates)).costs
    assert paid is not None and paid["funding"].sum() * 1e4 == pytest.approx(90)
    known = rates.drop(rates.index[[4, 50]])
    paid = trade(wanted, bars, 1, Costs(0, funding_bps=known)).costs
    assert paid is not None and paid["funding"].sum() * 1e4 == pytest.approx(88)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.where(r.index != r.index[4]),
        lambda r: r.replace(1.0, np.inf),
        lambda r: r.sample(frac=1.0, random_state=1),
        lambda r: r[::-1],
        lambda r: pd.concat([r, r.tail(1)]),
        lambda r: r.tz_localize(None),
        lambda r: r.reset_index(drop=True),
        lambda r: r.astype(str),
        lambda r: r.iloc[:0],
    ],
    ids=["a NaN", "infinite", "shuffled", "reversed", "twice", "no time zone", "no times", "text", "empty"],
)
def test_funding_that_would_be_paid_wrongly_is_refused(spoil: Callable[[pd.Series], pd.Series]) -> None:
    wanted, bars, rates = month_of_funding()
    with pytest.raises(SchemaError, match="funding"):
        trade(wanted, bars, 1, Costs(0, funding_bps=spoil(rates)))


@pytest.mark.parametrize("part", [slice(2, None), slice(0, 87)], ids=["begins late", "ends early"])
def test_funding_of_a_part_of_the_positions_is_refused(part: slice) -> None:
    "A part would pay nothing outside it; each remedy works."
    wanted, bars, rates = month_of_funding()
    with pytest.raises(SchemaError, match="funding rates for all positions"):
        trade(wanted, bars, 1, Costs(0, funding_bps=rates.iloc[part]))
    ends = pd.Series(0.0, rates.index[[0, -1]])
    paid = trade(wanted, bars, 1, Costs(0, funding_bps=rates.iloc[part].combine_first(ends))).costs
    assert paid is not None and paid["funding"].sum() * 1e4 == pytest.approx(len(rates.iloc[part]))
    first, last = rates.iloc[part].index[[0, -1]]
    inside = wanted.where((wanted.index >= first) & (wanted.index < last), 0.0)
    paid = trade(inside, bars, 1, Costs(0, funding_bps=rates.iloc[part])).costs
    assert paid is not None and paid["funding"].sum() * 1e4 == pytest.approx(len(rates.iloc[part]) - 1)


@pytest.mark.parametrize("name", ["fee_bps", "half_spread_bps", "impact", "capital", "funding_bps"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, "5", None])
def test_a_cost_that_is_no_cost_is_refused(name: str, value: float) -> None:
    if name == "funding_bps" and value == -1.0:  # a rate may be negative: short positions pay it
        return
    with pytest.raises(SchemaError, match=r"fee|spread|impact|capital|funding"):
        Costs(**{name: value})
    if name == "fee_bps":
        bars = make_bars(np.zeros(5))
        with pytest.raises(SchemaError, match="fee") if value != -1.0 else nullcontext():  # the measure of a losing strategy is a rebate
            sign_strategy(pd.Series(1.0, bars.index[:2]), bars, 1, value)
        with pytest.raises(SchemaError, match="cost"):
            positions(pd.DataFrame({"prediction": [1.0], "lower": [0.5], "upper": [2.0]}), "interval", cost_bps=value)


# 11: ruin


def ruined() -> tuple[pd.Series, pd.DataFrame]:
    "A short position through a bar of +150 %."
    returns = np.full(300, 0.001)
    returns[40] = 1.5
    bars = make_bars(returns)
    return pd.Series(-1.0, bars.index[:250]), bars


def both(wanted: pd.Series, bars: pd.DataFrame) -> list[StrategyResult]:
    "The strategy by both ways of trading."
    return [sign_strategy(wanted, bars, 1, 5.0), trade(wanted, bars, 1, Costs(5.0, funding_bps=1.0))]


def test_a_short_position_is_ruined_at_zero_and_trades_no_more() -> None:
    wanted, bars = ruined()
    for r in both(wanted, bars):
        assert r.equity.min() == 0.0 and r.equity.iloc[-1] == 0.0
        assert r.ruin == bars.index[40] and r.returns[r.ruin] == -1.0
        after = slice(bars.index[41], None)
        assert not r.position[after].any() and not r.turnover[after].any() and not r.returns[after].any() and not r.gross[after].any()
        assert r.max_drawdown == -1.0
        assert r.hold[after].any()  # holding goes on


def test_every_measure_of_a_ruined_strategy_is_defined() -> None:
    wanted, bars = ruined()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for r in both(wanted, bars):
            table = r.table()
            assert table.loc["total return", "net"] == -1.0 and table.loc["largest drawdown", "net"] == -1.0
            assert np.isfinite(table.loc[["Sharpe ratio per year", "volatility per year", "mean return per year"], "net"]).all()
            assert table.loc["days until ruin", "net"] == pytest.approx(41 / 24)
            assert "ruined" in repr(r) and "ruined" in r._repr_html_()
            hours = on_clock(r, "2h")
            assert hours.equity.iloc[-1] == 0.0 and hours.ruin == bars.index[40] and np.isfinite(hours.returns).all()
            assert np.isfinite(deflate(r, [0.01, 0.02])[0])
            assert np.isfinite(random_signals(r, 20)).all() and (random_equity(r, 20) >= 0).all(axis=None)
        results = strategies(pd.DataFrame({"prediction": wanted, "lower": wanted, "upper": wanted}), bars, 1)
        rows = strategy_rows(results, draws=10)
        assert rows.loc["sign", "total_return"] == -1.0 and rows.loc["sign", "ruin"] == bars.index[40]
        assert pd.isna(rows.loc["holding", "ruin"])
        assert capacity(wanted[30:], bars, 1) == 0.0
        assert all(r.equity.iloc[-1] == 0.0 for r in cost_ladder(wanted, bars, 1, Costs(5, 1)).values())


def test_tables_figures_and_verdict_say_when_a_strategy_was_ruined() -> None:
    wanted, bars = ruined()
    when, costs = f"{bars.index[40]:%Y-%m-%d %H:%M}", Costs(5.0)
    results = strategies(pd.DataFrame({"prediction": wanted, "lower": wanted, "upper": wanted}), bars, 1)
    assert f"ruined on {when}" in equity_figure(results["sign"]).layout.title.text
    assert any(f"ruined on {when}" in str(line.name) for line in equities_figure(results).data)
    view = strategy_rows_view(strategy_rows(results, draws=10), costs)
    assert when in view.frame["ruined on"].tolist()
    assert all(f"ruined on {when}" in text for text in ladder_view(cost_ladder(wanted, bars, 1, costs), costs).frame["return"][:-1])
    scores = pd.DataFrame({"n": 5000, "ic": 0.01, "ic_t": 0.5, "ic_p": 0.6, "r2_oos": -0.1, "dm_stat": 1.0, "dm_p": 0.3}, index=["model"])
    assert f"lost the whole capital on {when}: not tradable" in judge(scores, results["sign"]).sentence


def test_a_drawdown_ends_at_the_whole_capital() -> None:
    assert max_drawdown([0.1, -1.5, 0.5]) == -1.0
    assert max_drawdown([0.1, -1.0, 0.5]) == -1.0


def test_a_strategy_without_ruin_is_unchanged() -> None:
    wanted, bars = ruined()
    r = sign_strategy(-wanted, bars, 1, 5.0)
    assert r.ruin is None and "days until ruin" not in r.table().index and "ruined" not in repr(r)
    assert r.equity.iloc[-1] == pytest.approx(float(np.prod(1 + r.gross - r.turnover * 5e-4)))


# 14 and 15: fractional differences


@pytest.mark.parametrize("order", [0.07, 0.2, 0.4, 0.6, 0.8])
def test_fractional_weights_are_those_of_lopez_de_prado(order: float) -> None:
    expected, k = [1.0], 1
    while True:  # Advances in Financial Machine Learning, snippet 5.3
        w = -expected[-1] / k * (order - k + 1)
        if abs(w) < 1e-4:
            break
        expected.append(w)
        k += 1
    np.testing.assert_allclose(fracdiff_weights(order), expected, rtol=1e-12)


def test_a_step_has_no_echo_in_a_fractional_difference() -> None:
    weights, at = fracdiff_weights(0.2), 1000
    price = pd.Series(np.where(np.arange(3000) < at, 100.0, 110.0))
    change = fractional_difference(price, 0.2, 1e-4).diff()
    assert change[at] == pytest.approx((1 - weights.sum()) * np.log(1.1))  # logs are measured from the newest one
    np.testing.assert_allclose(change[at + 1 : at + len(weights)], weights[1:] * np.log(1.1), atol=1e-12)
    assert abs(change[at + len(weights) - 1]) < 1e-5  # the oldest weight, and nothing piled on it
    assert change[at + len(weights) :].abs().max() < 1e-12


def test_a_fractional_difference_is_that_of_lopez_de_prado_on_any_currency() -> None:
    price, weights = pd.Series(np.exp(np.random.default_rng(0).normal(0, 0.01, 600).cumsum())), fracdiff_weights(0.4)
    logs = np.log(price.to_numpy())
    made = fractional_difference(price, 0.4, 1e-4)
    for t in (300, 450, 599):
        past = logs[t - len(weights) + 1 : t + 1][::-1]
        assert made[t] == pytest.approx(float(weights @ (past - past[0])), abs=1e-12)
    np.testing.assert_allclose(fractional_difference(price * 1024, 0.4, 1e-4), made, atol=1e-11)


@pytest.mark.parametrize("hundredths", range(1, 101))
def test_every_order_in_hundredths_is_accepted(hundredths: int) -> None:
    made = fracdiff("close", hundredths / 100, threshold=1e-2)
    assert made.name == f"fracdiff_close_{hundredths}"


@pytest.mark.parametrize("order", [0.0, 1.01, 0.075, 0.2000001, np.nan, -0.2])
def test_other_orders_are_refused(order: float) -> None:
    with pytest.raises(ConfigError, match="hundredths"):
        fracdiff("close", order)


# 18: outcomes of zero


def with_still_hours(n: int = 400, still: int = 300) -> pd.DataFrame:
    "Predictions of a volatility, most outcomes of which are zero."
    rng = np.random.default_rng(1)
    index = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC", name="ts")
    y = rng.lognormal(-5, 0.3, n)
    y[rng.permutation(n)[:still]] = 0.0
    frame = {"y": y, "prediction": 0.007, "ewma": 0.008, "last": 0.006, "har": 0.009, "lower": 0.001, "upper": 0.02}
    return pd.DataFrame(frame, index=index)


def test_outcomes_that_no_score_counts_are_reported() -> None:
    p = with_still_hours()
    scores = score_table(p, "volatility", 1)
    assert scores.loc["model", "n"] == 100
    said = judge(with_savings(scores, p, "volatility", 1), None, "volatility").sentence
    assert "300 of 400 outcomes were zero" in said
    clean = p[p["y"] > 0]
    scores = score_table(clean, "volatility", 1)
    assert "zero" not in judge(with_savings(scores, clean, "volatility", 1), None, "volatility").sentence


# 19: few rows, no rows, nothing but NaN


def frames() -> dict[str, pd.DataFrame]:
    "Degenerate predictions with the baselines of every target."
    columns = ["y", "prediction", "lower", "upper", "zero", "last", "ewma", "har", "base", "half", "raw"]
    index = pd.date_range("2024-01-01", periods=40, freq="1h", tz="UTC", name="ts")
    same = pd.DataFrame(0.5, index=index, columns=columns)
    empty, unknown = same.iloc[:0], same * np.nan
    return {"empty": empty, "one": same.head(1), "two": same.head(2), "same": same, "zero": same * 0, "unknown": unknown}


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("value", [1.0, 0.0, np.nan])
def test_a_strategy_of_a_row_has_a_table(rows: int, value: float) -> None:
    bars = make_bars(np.full(rows - 1, 0.01))
    wanted = pd.Series([value], bars.index[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for r in both(wanted, bars):
            assert list(r.table().columns) == ["net", "gross", "hold"]
            repr(r), r._repr_html_(), r.equity, r.max_drawdown, r.sharpe, r.moments(), deflate(r, [0.1])
            assert len(on_clock(r).returns) == min(rows - 1, len(r.returns))
        predictions = pd.DataFrame({"prediction": wanted, "lower": wanted, "upper": wanted})
        if np.isnan(value):
            with pytest.raises(SchemaError, match="forecasts to trade"):
                strategies(predictions, bars, 1)
        else:
            strategy_rows(strategies(predictions, bars, 1), draws=10)


SCORED: dict[str, Callable[[pd.DataFrame, str], object]] = {
    "score_table": lambda p, t: score_table(p, t, 1),
    "judge": lambda p, t: judge(with_savings(score_table(p, t, 1), p, t, 1), None, t),
    "scorecard": lambda p, t: scorecard(p, t, 1, draws=10),
    "calibration_scores": lambda p, t: calibration_scores(p, 1, draws=10),
    "reliability_table": lambda p, t: reliability_table(p, 1),
    "calibration_table": lambda p, t: calibration_table(p),
    "coverage_table": lambda p, t: coverage_table(p),
    "strategies": lambda p, t: strategy_rows(strategies(p, make_bars(np.zeros(45)), 1), draws=10),
}


@pytest.mark.parametrize("target", ["return", "volatility", "direction"])
@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("kind", frames())
def test_degenerate_predictions_give_a_result_or_a_typed_error(kind: str, name: str, target: str) -> None:
    try:
        SCORED[name](frames()[kind], target)
    except CryptoResearchError as e:
        assert "expected" in str(e) and "found" in str(e)


# 22: tiny volumes


@pytest.mark.parametrize("scale", [1e-6, 1e-8, 1e-9])
def test_features_of_longer_bars_do_not_depend_on_the_unit_of_volume(scale: float) -> None:
    bars = make_bars(np.random.default_rng(0).normal(0, 0.01, 1500))
    amounts = ["volume", "quote_volume", "buy_volume", "buy_volume_tick"]
    tiny = bars.assign(**{c: bars[c] * scale for c in amounts})
    for f in resolve("frames"):
        if f.name.endswith(("_4x", "_24x")):
            a, b = f.values(bars), f.values(tiny)
            np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-8, err_msg=f.name)


def test_a_result_can_be_changed_and_stays_stopped() -> None:
    wanted, bars = ruined()
    r = replace(sign_strategy(wanted, bars, 1), horizon=2)
    assert r.equity.iloc[-1] == 0.0 and r.ruin is not None


# forecasts of volatility that are too good


def of_volatility(share: float, n: int = 2000) -> pd.DataFrame:
    "Predictions that know a share of the next outcome's surprise, and baselines that know nothing of it."
    rng = np.random.default_rng(5)
    index = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC", name="ts")
    surprise = rng.normal(0, 0.5, n)
    frame = {"y": 0.01 * np.exp(surprise), "prediction": 0.0125 * np.exp(share * surprise + rng.normal(0, 0.05, n))}
    return pd.DataFrame(frame | {name: 0.0125 * np.exp(rng.normal(0, 0.05, n)) for name in ("ewma", "har", "last")}, index=index)


@pytest.mark.parametrize(("share", "level"), [(0.0, "none"), (0.1, "skill"), (0.5, "suspicious"), (1.0, "suspicious")])
def test_volatility_is_too_good_to_believe_from_a_third_of_the_loss_on(share: float, level: str) -> None:
    p = of_volatility(share)
    scores = with_savings(score_table(p, "volatility", 1), p, "volatility", 1, draws=20)
    said = judge(scores, None, "volatility")
    assert said.level == level, (said, scores["saved"])
    assert ("check for leakage" in said.sentence) == (level == "suspicious")


def test_the_limit_of_volatility_needs_a_test_and_har() -> None:
    p = of_volatility(0.5)
    assert judge(score_table(p, "volatility", 1), None, "volatility").level == "suspicious"
    assert judge(score_table(p.drop(columns="har"), "volatility", 1), None, "volatility").level == "skill"
    few = p.head(31)
    few = few.assign(prediction=np.where(np.arange(31) == 3, few["y"], few["har"]), y=few["y"].where(np.arange(31) != 3, 0.2))
    assert judge(score_table(few, "volatility", 1), None, "volatility").level != "suspicious"
