"""Bars and features of one live bar at a time: what is kept between bars, and that nothing differs from batch."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryptoresearch.data.aggregation import Trades
from cryptoresearch.data.bars import bar_arrays, bar_kind, trades_to_bars
from cryptoresearch.features.pipeline import compute, DataProcessing, resolve
from cryptoresearch.features.registry import Feature, whole_rows
from cryptoresearch.serving.predictor import finish_bars, hold_trades, LiveBars

SECOND = 1_000_000
START = 1_700_000_000 * SECOND + 300_000


def trades(ts: np.ndarray, seed: int = 0) -> Trades:
    rng, n = np.random.default_rng(seed), len(ts)
    price, qty = 100 + rng.integers(-50, 50, n) / 100, rng.integers(1, 1000, n) / 1000
    sides = {name: rng.integers(-1, 2, n).astype(np.int8) for name in ("side_reported", "side_tick")}
    return {
        "ts": ts.astype(np.int64),
        "trade_id": np.arange(n),
        "price": price,
        "qty": qty,
        "quote_qty": price * qty,
        "n_trades": np.ones(n, np.int32),
        **sides,
    }


def rows(t: Trades, chosen: np.ndarray) -> Trades:
    return {name: column[chosen] for name, column in t.items()}


def frame(t: Trades) -> pd.DataFrame:
    return pd.DataFrame(t | {"ts": pd.to_datetime(t["ts"], unit="us", utc=True)})


def times(us: int) -> pd.Timestamp:
    return pd.Timestamp(us, unit="us", tz="UTC")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_live_bars_are_the_bars_of_the_trades_that_were_not_late(data: st.DataObject) -> None:
    "Trades in pieces, out of order by up to three seconds, in bars of one second, with gaps and quiet stretches."
    n = data.draw(st.integers(2, 40))
    steps = np.array(data.draw(st.lists(st.integers(0, 900), min_size=n, max_size=n))) * 4_000
    late = np.array(data.draw(st.lists(st.sampled_from([0, 0, 0, 500_000, 3_000_000]), min_size=n, max_size=n)))
    t = trades(np.maximum(START + np.cumsum(steps) - late, START), seed=data.draw(st.integers(0, 9)))
    t["ts"][0] = START
    gaps = [(int(a), int(a) + 700_000) for a in t["ts"][data.draw(st.lists(st.integers(1, n - 1), max_size=2))] + 10_000]
    live, kept, found = LiveBars("A", "1s"), [], list[pd.DataFrame]()
    for piece in [*np.array_split(np.arange(n), data.draw(st.integers(1, n))), np.empty(0, np.int64)]:
        kept.append(piece if live.since is None else piece[t["ts"][piece] >= (live.returned or live.since)])
        until = (live.newest or 0) + 5 * SECOND
        if len(piece):
            hold_trades(live, rows(t, piece))
            until = data.draw(st.sampled_from([START, live.newest, (live.newest or 0) + 1_500_000]))  # by a later trade, or by the clock
        if (bars := finish_bars(live, until, [(a, min(b, until)) for a, b in gaps if a < until])) is not None:
            found.append(bars.frame)
        assert live.since is not None and (live.folder.records["b"][1:] >= (live.returned or live.since) // SECOND).all()
    taken, ends = np.concatenate(kept), {name: [times(g[i]) for g in gaps] for i, name in enumerate(("start_ts", "end_ts"))}
    whole = trades_to_bars(frame(rows(t, taken)), "1s", symbol="A", start=times(START), end=times(until), gaps=pd.DataFrame(ends))
    assert live.late == n - len(taken)
    pd.testing.assert_frame_equal(pd.concat(found), whole, check_freq=False, rtol=0, atol=0)


def test_the_trades_of_an_open_bar_are_not_kept() -> None:
    live = LiveBars("A", "1d")
    for k in range(50):
        hold_trades(live, trades(START + k * SECOND + np.arange(2_000) * 100))
    held = sum(column.nbytes for column in (live.folder.records, live.folder.first))
    assert (live.taken, len(live.folder.records)) == (100_000, 1) and held < 1_000


def bars_of(n: int) -> pd.DataFrame:
    ts = np.sort(np.random.default_rng(3).integers(0, n * 60 * SECOND, 20 * n)) + START // (60 * SECOND) * 60 * SECOND
    return trades_to_bars(frame(trades(ts)), "1m", symbol="A")


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    out = bars_of(320)
    out.loc[out.index[40:43], [*out.columns[1:11]]] = np.nan
    out.loc[out.index[40:43], "gap"] = True
    return out


def user_written() -> Iterator[Feature]:
    yield Feature("on_a_frame", ("close", "open"), 2, "1", "own", "own", lambda b: b["close"].shift() / b["open"])
    yield Feature("on_times", ("close_ts",), 1, "1", "own", "own", lambda b: b["close_ts"].dt.hour)
    yield from resolve(["ret_1_lag_3", "rsi_14_4x"])


def test_every_feature_is_the_same_of_arrays_as_of_a_frame(bars: pd.DataFrame) -> None:
    "Bit by bit: features on arrays, on series and on frames of several columns, after a gap."
    made = [*(f for f in resolve("all") if f.warmup <= 250), *user_written()]
    expected = DataProcessing(made, leaks="allow").process_data(bars)
    found = compute(made, bar_arrays(bars, bar_kind(bars)))
    assert [
        f.name for f, row in zip(made, found, strict=True) if not np.array_equal(row, expected[f.name].to_numpy(), equal_nan=True)
    ] == []
    assert np.isfinite(expected.to_numpy()[-1]).mean() > 0.9


def test_the_default_features_need_neither_series_nor_frame(bars: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    "They are the fast path of live predictions."

    def refuse(*_: object) -> None:
        raise AssertionError("a series was made")

    arrays = bar_arrays(bars.tail(250), bar_kind(bars))
    monkeypatch.setattr(pd.Series, "__init__", refuse)
    monkeypatch.setattr(pd.DataFrame, "__init__", refuse)
    assert compute(resolve("default"), arrays).shape == (58, 250)
    assert whole_rows(arrays)[-1] == 250
