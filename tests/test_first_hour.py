"""The first hour of a user: a month of trades, default options, and errors whose remedies work."""

import importlib
import json
import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptoresearch import cli
from cryptoresearch.cli_research import take_symbol
from cryptoresearch.data.bars import bar_frame, check_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.simulate import simulate_archive
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import ConfigError, SchemaError
from cryptoresearch.evaluation.comparison import baseline_table
from cryptoresearch.ingest.files import process_file
from cryptoresearch.runs import stored
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.identity import read_data
from cryptoresearch.runs.run import load_run, train_run
from cryptoresearch.runs.walk_forward import check_length, first_test, fold_length, prepare
from cryptoresearch.serving import batch
from cryptoresearch.settings import Settings

SMALL = {"n_estimators": 30, "learning_rate": 0.1, "early_stopping_rounds": 8, "n_threads": 1}


@pytest.fixture(scope="module")
def month(tmp_path_factory):
    "A store with the trades of one month and its hourly bars."
    folder: Path = tmp_path_factory.mktemp("month")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        for file in simulate_archive(folder / "files", "BTCUSDT", "2024-07-01", 31, 2000, monthly=True):
            process_file(con, file, settings=settings)
        make_bars(con, "BTCUSDT", "1h")
    return settings


def refusal(settings: Settings, config: RunConfig) -> str:
    "Return the error of a configuration that the month is too short for."
    with connect(settings) as con, pytest.raises(ConfigError, match="enough bars to train") as refused:
        train_run(con, config, settings)
    return str(refused.value)


@pytest.mark.parametrize("target", ["return", "volatility"])
def test_a_month_of_trades_trains_with_default_options(month, target):
    with connect(month) as con:
        run = train_run(con, RunConfig(target=target, params=SMALL), month)
    assert len(run.info["folds"]) >= 4 and run.info["fold_length"] != "90D"
    assert run.predictions["prediction"].notna().all() and len(run.info["features"]) > 20
    assert "ret_168" in run.info["features_left_out"] and run.warmup <= 87
    if run.info["level"] == "unclear":
        assert "--horizon 9 or less" in run.info["verdict"]


@pytest.mark.slow
def test_the_horizon_that_the_verdict_names_is_judged(month):
    with connect(month) as con:
        run = train_run(con, RunConfig(horizon=9, params=SMALL), month)
    assert run.info["level"] != "unclear", run.info["verdict"]


REFUSED = {
    "long warm-ups by name": RunConfig(features=("har_720", "har_range_720"), params=SMALL),
    "fixed inputs": RunConfig(model="har_ridge", target="volatility"),
    "long horizon": RunConfig(horizon=300, features=("ret_1",), params=SMALL),
    "long label": RunConfig(target="triple_barrier", label={"window": 800}, params=SMALL),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_remedies_for_too_few_bars_work(month, name):
    config = REFUSED[name]
    text = refusal(month, config)
    assert "742 bars" in text and "warm-up of" in text
    remedies = text.split(". ", 1)[1].split("; ")
    assert remedies
    for remedy in remedies:
        changed = apply(month, config, remedy)
        if changed is not None:
            with connect(month) as con:
                data = read_data(con, changed)
                check_length(changed, data.bars, data.sources)
        else:
            n = int(re.search(r"Load more data: ([\d,]+) bars", remedy)[1].replace(",", ""))
            check_length(config, hours(n))


def apply(settings: Settings, config: RunConfig, remedy: str) -> RunConfig | None:
    "Do what a remedy says; None where it asks for more data."
    if remedy.startswith("Load more data"):
        return None
    if build := re.search(r"`cryptoresearch bars (\S+) (\S+)`", remedy):
        with init_duckdb(settings) as con:
            make_bars(con, build[1], build[2])
    if "out --feature" in remedy:
        config = replace(config, features=("default",))
    words = shlex.split(remedy.replace(",", " "))
    given = {a: b for a, b in pairwise(words) if a in ("--bars", "--horizon", "--model")}
    more = {"spec": given.get("--bars", config.spec), "horizon": int(given.get("--horizon", config.horizon)), "model": given.get("--model", config.model)}
    return replace(config, **more, **({"params": {}} if "--model" in given else {}))


def hours(n: int) -> pd.DataFrame:
    "A bar frame of a random walk."
    rng = np.random.default_rng(1)
    close = 100 * np.exp(np.cumsum(0.005 * rng.standard_normal(n)))
    opens = np.r_[100.0, close[:-1]]
    high, low = np.maximum(opens, close) * 1.002, np.minimum(opens, close) * 0.998
    times = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC")
    candles = {"open_time": times, "open": opens, "high": high, "low": low, "close": close, "volume": rng.lognormal(size=n)}
    return bar_frame(pd.DataFrame(candles), "1h", symbol="BTCUSDT")


def test_too_few_bars_are_refused_before_the_notebook_runs(month, monkeypatch):
    monkeypatch.setattr(batch, "run_notebook", lambda *a, **k: pytest.fail("the notebook was started"))
    with pytest.raises(ConfigError, match="--bars"):
        batch.train_report(REFUSED["long warm-ups by name"], month)


def test_the_test_and_its_folds_follow_the_length_of_the_data():
    config = RunConfig(features=("ret_1",))
    for n, share in ((742, 0.6), (1600, 0.52), (1700, 0.55), (4000, 0.6)):
        bars = hours(n)
        start = first_test(config, bars)
        assert abs((bars.index < start).mean() - share) < 0.03, n
        samples = prepare(bars, config)
        test = samples.X.index[-1] - start
        assert test / fold_length(config, samples, start) == pytest.approx(4, abs=0.01)
        assert fold_length(replace(config, refit_every="10D"), samples, start) == pd.Timedelta("10D")


@pytest.mark.parametrize(("model", "more"), [("har", {}), ("har_ridge", {}), ("decay_ridge", {}), ("garch", {}), ("ensemble", {"members": ["har_ridge", "ridge"]}), ("reversal", {"n_estimators": 5})])
def test_a_model_brings_its_fixed_inputs(tmp_path, model, more):
    from test_runs import put_bars, random_walk

    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        put_bars(con, random_walk(5500), "WALKUSDT", "simulated")
        target = "direction" if model == "reversal" else "volatility"
        config = RunConfig("WALKUSDT", target=target, model=model, params=more, refit_every="200D")
        run = train_run(con, config, settings)
        bars = read_data(con, config).bars.tail(run.warmup)
    assert set(config.resolved.fixed) <= {f["name"] for f in run.info["features"]}
    assert model == "ensemble" or len(run.info["features"]) == len(config.resolved.fixed), "no features that the model ignores"
    assert len(load_run(run.id, settings).predict(bars)) == 1


def test_the_report_uses_one_loss_and_one_baseline(tmp_path):
    from test_runs import make_store

    from cryptoresearch.evaluation.comparison import baseline_table
    from cryptoresearch.evaluation.overfitting import run_overfitting
    from cryptoresearch.runs.stored import stored_runs
    from cryptoresearch.serving.run_sections import read_report, regime_section
    from cryptoresearch.serving.views import overfitting_view

    settings = make_store(tmp_path)
    config = RunConfig("WALKUSDT", target="volatility", horizon=6, features=("returns", "calendar"), params=SMALL)
    with connect(settings) as con:
        run = train_run(con, config, settings)
        found = run_overfitting(con, run)
    table, base = baseline_table(run.predictions, "volatility", 6, draws=200), run.info["baseline"]
    assert base == table.drop(index="model")["dm_stat"].idxmax(), "the hardest to beat"
    share, low, high = (table.loc[base, c] for c in ("saved", "lower", "upper"))
    told = f"({share:.1%} of its QLIKE saved, 95% interval {low:.1%} to {high:.1%}, " if share >= 0 else f"({-share:.1%} more QLIKE, 95% interval {-high:.1%} to {-low:.1%}, "
    assert told.replace("-", "−") in run.info["verdict"], run.info["verdict"]
    assert "OOS R²" not in run.info["verdict"]
    assert found.dm_p == pytest.approx(table.loc[base, "dm_p"]) and f"“{base}”" in overfitting_view(found, None).frame.to_string()
    drawn = [p for p in regime_section(read_report(run, settings)).parts if getattr(p, "layout", None) and "Rising" in p.layout.title.text]
    assert len(drawn) == 1 and f"“{base}”" in drawn[0].layout.title.text and drawn[0].data[0].y[-1] == pytest.approx(table.loc[base, "saved"])
    [row] = stored_runs(settings)
    assert (row["baseline"], row["saved"]) == (base, pytest.approx(table.loc[base, "saved"]))


def test_event_bars_are_read_like_time_bars(tmp_path):
    from fastapi.testclient import TestClient
    from typer.testing import CliRunner

    from cryptoresearch import cli
    from cryptoresearch.data.bars import read_bars
    from cryptoresearch.errors import DataNotFound
    from cryptoresearch.features.pipeline import DataProcessing
    from cryptoresearch.serving.api import create_app
    from cryptoresearch.serving.queries import features_page

    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con, pytest.MonkeyPatch.context() as patch:
        for file in simulate_archive(tmp_path / "files", "BTCUSDT", "2024-07-01", 1, 3000):
            process_file(con, file, settings=settings)
        patch.setenv("DUCKDB_PATH", settings.duckdb_path)
        said = CliRunner().invoke(cli.app, ["bars", "BTCUSDT", "tick:100"])
        assert said.exit_code == 0 and "tick:100" in said.output, "no emoji"
        bars = read_bars(con, "BTCUSDT", "tick:100")
        assert len(bars) > 20 and {"first_id", "gap"} <= set(bars) and bars.attrs["spec"] == "tick:100"
        assert len(read_bars(con, "BTCUSDT", "tick:100", start=bars.index[5], end=bars.index[9])) == 4
        for more in ({"market": "spot"}, {"start": "2030-01-01"}):
            with pytest.raises(DataNotFound, match="cryptoresearch bars BTCUSDT tick:100"):
                read_bars(con, "BTCUSDT", "tick:100", **more)
        for spec in ("1h", "tick:10"):
            with pytest.raises(DataNotFound, match=r"Correct the symbol, or load .* cryptoresearch ingest"):  # there is nothing to build bars of
                read_bars(con, "BTCUDST", spec)
        with pytest.raises(DataNotFound, match="closest symbol is BTCUSDT"):
            read_bars(con, "BTCUDST", "1h")
        with pytest.raises(DataNotFound, match="cryptoresearch bars BTCUSDT 1h"):
            read_bars(con, "BTCUSDT", "1h")
        values, page, following = features_page(con, "BTCUSDT", "tick:100", names=["ret_3"], start=bars.index[10], limit=5)
        whole = DataProcessing(["ret_3"]).process_data(bars)
        assert np.allclose(values["ret_3"], whole["ret_3"].iloc[10:15]) and following == bars.index[15] and len(page) == 5
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        answer = client.get("/bars", params={"symbol": "BTCUSDT", "spec": "tick:100", "limit": 3}).json()
        assert [b["ts"][:19] for b in answer["bars"]] == [f"{t:%Y-%m-%dT%H:%M:%S}" for t in bars.index[-3:]]


def test_no_console_turns_words_into_emoji():
    import ast

    import cryptoresearch

    found = []
    for path in Path(cryptoresearch.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Console":
                found.append((path.name, any(k.arg == "emoji" and k.value.value is False for k in node.keywords)))
    assert len(found) >= 4 and all(ok for _, ok in found), found  # the commands share theirs


@pytest.fixture(scope="module")
def candles_run(tmp_path_factory):
    "A store with hourly candles and a trained run."
    from test_runs import make_store

    settings = make_store(tmp_path_factory.mktemp("candles"))
    with connect(settings) as con:
        return settings, train_run(con, RunConfig("WALKUSDT", horizon=6, features=("returns", "calendar"), params=SMALL), settings)


def command(settings: Settings, *words: str):
    "Run a command of the command line on a store; return exit code, output and the error, if any."
    from typer.testing import CliRunner

    done = CliRunner().invoke(cli.app, list(words), env={"DUCKDB_PATH": settings.duckdb_path, "RUNS_DIR": settings.runs_dir, "COLUMNS": "200"})
    return done.exit_code, done.output, done.exception


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz", "feather"])
def test_exported_bars_are_forecast_like_stored_ones(candles_run, tmp_path, ending):
    settings, run = candles_run
    file, out = tmp_path / f"bars.{ending}", tmp_path / f"forecasts.{ending}"
    code, text, error = command(settings, "export", "WALKUSDT", "--what", "bars", "--bars", "1h", "--to", str(file))
    assert (code, "1,500 rows of bars" in text) == (0, True), (text, error)
    code, text, error = command(settings, "predict", run.id, str(file), "--to", str(out))
    assert code == 0, (text, error)
    with connect(settings) as con:
        wanted = run.predict(read_data(con, run.config).bars).reset_index()
    reader = {"parquet": pd.read_parquet, "feather": pd.read_feather}.get(ending, pd.read_csv)
    found = reader(out)
    assert len(found) == len(wanted) and np.allclose(found["prediction"], wanted["prediction"], rtol=1e-9)
    assert (pd.to_datetime(found["ts"], utc=True) == wanted["ts"]).all()


def test_forecasts_of_bars_of_the_training_are_marked(candles_run, tmp_path):
    settings, run = candles_run
    bars, out, whole = (tmp_path / name for name in ("bars.parquet", "out.csv", "whole.csv"))
    command(settings, "export", "WALKUSDT", "--to", str(bars))
    code, text, error = command(settings, "predict", run.id, str(bars), "--to", str(out))
    assert code == 0, (text, error)
    found = pd.read_csv(out, parse_dates=["known_ts"])
    inside = found["known_ts"] < pd.Timestamp(run.info["trained_until"])
    assert (found["in_sample"] == inside).all() and 0 < inside.sum() < len(found)
    assert f"{inside.sum():,} of {len(found):,} bars lie before" in text
    *words, _ = shlex.split(text.split("Out of sample: cryptoresearch ")[1])
    assert command(settings, *words, str(whole))[0] == 0 and "y" in pd.read_csv(whole).columns
    with connect(settings) as con:
        read_data(con, run.config).bars.tail(run.warmup).reset_index().to_csv(tmp_path / "last.csv", index=False)
    code, text, error = command(settings, "predict", run.id, str(tmp_path / "last.csv"))
    assert code == 0 and "in sample" not in text, (text, error)


def test_the_audit_of_a_run_refuses_options_of_another_configuration(candles_run):
    settings, run = candles_run
    code, text, error = command(settings, "audit", run.id, "--horizon", "3", "--symbol", "WALKUSDT", "--seed", "1")
    assert code != 0 and f"{run.id} and --symbol, --horizon. Leave" in str(error), (text, error)


def test_a_file_that_cannot_be_forecast_is_refused(candles_run, tmp_path):
    settings, run = candles_run
    with connect(settings) as con:
        bars = read_data(con, run.config).bars.reset_index()
    few, other, text = (tmp_path / name for name in ("few.parquet", "other.parquet", "bars.txt"))
    bars.tail(run.warmup - 1).to_parquet(few)
    bars.assign(symbol="ETHUSDT").to_parquet(other)
    text.write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    cases = ((few, "the warm-up of run"), (other, "bars of ETHUSDT"), (text, "a file that ends in"), (tmp_path / "none.csv", "nothing at"), (tmp_path / "broken.parquet", "a table of bars"))
    for file, told in cases:
        code, _, error = command(settings, "predict", run.id, str(file))
        assert code != 0 and told in str(error), (file.name, error)


@pytest.mark.parametrize(("what", "more", "columns"), [
    ("features", ["--feature", "ret_3", "--feature", "rsi_14"], {"ts", "known_ts", "ret_3", "rsi_14"}),
    ("predictions", ["--run"], {"ts", "y", "prediction"}),
])
def test_features_and_predictions_are_exported(candles_run, tmp_path, what, more, columns):
    settings, run = candles_run
    file = tmp_path / "out.parquet"
    code, text, error = command(settings, "export", "WALKUSDT", "--what", what, "--to", str(file), *more, *([run.id] if more == ["--run"] else []))
    assert code == 0, (text, error)
    assert columns <= set(pd.read_parquet(file))


def test_the_times_of_a_runs_forecasts_are_chosen(candles_run, tmp_path):
    settings, run = candles_run
    at, file = run.predictions.index, tmp_path / "out.parquet"
    words = ["WALKUSDT", "--what", "predictions", "--run", run.id, "--start", at[10].isoformat(), "--end", at[30].isoformat()]
    assert command(settings, "export", *words, "--to", str(file))[0] == 0
    assert list(pd.read_parquet(file)["ts"]) == list(at[10:30])


def test_wrong_arguments_of_export_are_refused_before_anything_is_read(candles_run, tmp_path):
    settings, run = candles_run
    for words, told in (
        (["WALKUSDT", "--to", str(tmp_path / "x.xlsx")], ".feather"),
        (["WALKUSD", "--to", str(tmp_path / "x.csv")], "closest symbol is WALKUSDT"),
        (["WALKUSDT", "--what", "features", "--feature", "rsi_144", "--to", str(tmp_path / "x.csv")], "rsi_14"),
        (["WALKUSDT", "--what", "predictions", "--to", str(tmp_path / "x.csv")], "--run RUN --to FILE.csv"),
        (["WALKUSDT", "--run", run.id, "--to", str(tmp_path / "x.csv")], "--run with --what predictions"),
        (["WALKUSDT", "--feature", "rsi_14", "--to", str(tmp_path / "x.csv")], "--feature with --what features"),
        (["OTHERUSDT", "--what", "predictions", "--run", run.id, "--to", str(tmp_path / "x.csv")], "WALKUSDT, the symbol of run"),
        (["WALKUSDT", "--what", "predictions", "--run", run.id, "--start", "2200-01-01", "--to", str(tmp_path / "x.csv")], "times from"),
    ):
        code, _, error = command(settings, "export", *words)
        assert code != 0 and told in str(error), (words, error)
    assert not list(tmp_path.iterdir())


def test_trades_are_exported(month, tmp_path):
    file = tmp_path / "trades.parquet"
    code, text, error = command(month, "export", "BTCUSDT", "--what", "trades", "--end", "2024-07-02", "--to", str(file))
    assert code == 0, (text, error)
    assert {"ts", "price", "qty", "trade_id"} <= set(pd.read_parquet(file)) and len(pd.read_parquet(file)) > 1000


def test_features_are_described_and_found_by_words(tmp_path):
    from cryptoresearch.features.registry import description, resolve

    assert all(description(f) for f in resolve("all"))
    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"))
    code, text, _ = command(settings, "features", "--search", "log return 24")
    assert code == 0 and "ret_24" in text and "Compute the log return over the last `horizon` bars (horizon 24)" in text and "rsi_14" not in text
    code, _, error = command(settings, "features", "--search", "rsi_41")
    assert code != 0 and "rsi_14" in str(error)


def test_bars_of_several_sources_are_counted_for_each(tmp_path):
    from cryptoresearch.ingest.files import ingest_frame

    settings = Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"))
    times = pd.date_range("2024-01-01", periods=6, freq="1h", tz="UTC")
    candles = pd.DataFrame({"time": times, "open": 1.0, "high": 1.0, "low": 1.0, "close": 1.0, "volume": 1.0})
    with init_duckdb(settings) as con:
        ingest_frame(con, candles, symbol="AUSDT", kind="candles")
        ingest_frame(con, pd.DataFrame({"time": times[:5], "price": 1.0, "qty": 1.0}), symbol="AUSDT", kind="trades")
    code, text, error = command(settings, "bars", "AUSDT", "60m", "2h")
    assert code == 0, (text, error)
    assert text.splitlines()[0] == "AUSDT 60m from klines: 6 bars" and "AUSDT 60m from trades: " in text and "AUSDT 2h from klines: 3 bars" in text


def test_candles_of_other_sources_are_forecast(candles_run, tmp_path):
    settings, run = candles_run
    with connect(settings) as con:
        bars = read_data(con, run.config).bars.reset_index()
    bars["unix"] = bars["ts"].dt.as_unit("ms").astype("int64")
    out = tmp_path / "out.csv"
    for name, separator in (("a.csv", ";"), ("b.csv.gz", "\t"), ("c.csv", ",")):
        bars[["unix", "open", "high", "low", "close", "volume"]].to_csv(tmp_path / name, sep=separator, index=False)
        code, text, error = command(settings, "predict", run.id, str(tmp_path / name), "--to", str(out))
        assert code == 0, (text, error)
        assert len(pd.read_csv(out)) == len(bars) - run.warmup + 1
    bars[["unix", "open"]].to_csv(tmp_path / "d.csv", index=False)
    code, _, error = command(settings, "predict", run.id, str(tmp_path / "d.csv"))
    assert code != 0 and "found unix, open: missing high, low, close, volume. Rename" in str(error)


def test_predict_follows_the_feed_that_live_follows(candles_run, monkeypatch):
    from cryptoresearch.serving import predictor

    settings, run = candles_run
    monkeypatch.delenv("FINNHUB_TOKEN", raising=False)
    followed = []
    monkeypatch.setattr(predictor, "predict_live", lambda *_, source, **__: followed.append(source) or 0)
    for words in ([], ["--source", "replay"]):
        assert command(settings, "predict", run.id, *words)[0] == 0
    assert followed == ["binance", "replay"]


def test_live_names_the_remedy_for_trades_that_a_run_was_trained_on(candles_run):
    from cryptoresearch import cli
    from cryptoresearch.live.binance import BinanceWebSocket
    from cryptoresearch.serving.live import LivePredictions

    settings, run = candles_run
    text = cli._trained_on(LivePredictions(BinanceWebSocket(("BINANCE:WALKUSDT",), settings=settings), [run]))
    assert f"{run.id} predicts no bar before {run.info['trained_until'][:16]}" in text and "cryptoresearch train SYMBOL --end DAY" in text


def test_runs_of_different_models_differ_in_the_list(candles_run):
    settings, _ = candles_run
    code, text, _ = command(settings, "runs", "--json")
    (row,) = json.loads(text)
    assert code == 0 and (row["model"], row["features"], row["params"]) == ("xgboost", ["returns", "calendar"], SMALL)
    assert "xgboost" in command(settings, "runs")[1]


def test_a_horizon_beyond_the_data_names_the_option():
    with pytest.raises(ConfigError, match="--horizon"):
        check_length(RunConfig(horizon=100_000, features=("ret_1",), params=SMALL), hours(9000))


def test_errors_of_options_and_frames_name_what_can_be_typed():
    for wrong, flag in (({"train_window": "365D"}, "--train-window"), ({"refit_every": "x"}, "--refit-every"), ({"spec": "1x"}, "1x"), ({"spec": "tick:x"}, "tick")):
        with pytest.raises(ConfigError, match=flag):
            RunConfig(**wrong)
    with pytest.raises(SchemaError, match=r"cryptoresearch\.data\.bars\.bar_frame"):
        check_bars(hours(50).reset_index())


def test_all_bar_specifications_are_checked_before_one_is_built(month):
    code, text, error = command(month, "bars", "BTCUSDT", "7m", "1fortnight")
    assert code != 0 and "1fortnight" in str(error) and "7m" not in text


def test_train_takes_the_symbol_as_other_commands_do(month, monkeypatch):
    asked = []

    def keep(config, **more):
        asked.append(config)
        raise ConfigError("asked")

    monkeypatch.setattr(batch, "train_report", keep)
    monkeypatch.setattr(cli, "take_bars", take_symbol)  # the month has no ETHUSDT
    command(month, "train", "ETHUSDT", "--horizon", "9")
    command(month, "train", "--symbol", "ETHUSDT")
    assert [(c.symbol, c.horizon) for c in asked] == [("ETHUSDT", 9), ("ETHUSDT", 24)]


@pytest.mark.parametrize("spec", ["1h", "dollar:100000"])
def test_train_looks_for_bars_of_every_kind(month, monkeypatch, spec):
    def keep(config, **more):
        raise ConfigError(f"asked for {config.spec}")

    monkeypatch.setattr(batch, "train_report", keep)
    code, _, error = command(month, "train", "BTCUSDT", "--bars", spec)
    assert code == 1 and str(error) == f"asked for {spec}", (code, error)


def test_runs_go_next_to_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("RUNS_DIR", raising=False)
    beside = Settings(_env_file=None, duckdb_path=str(tmp_path / "store" / "catalog.sqlite"))
    assert beside.path(beside.runs_dir) == tmp_path / "store" / "runs"
    assert Settings(_env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir="runs").runs_dir == "runs"
    for path in ("data/catalog.sqlite", "postgres:dbname=x", ":memory:"):
        assert Settings(_env_file=None, duckdb_path=path).runs_dir == "runs"
    again = batch.kernel_env(beside)
    assert again["RUNS_DIR"] == beside.runs_dir


@pytest.mark.parametrize("library", ["polars", "pyarrow"])
def test_frames_of_other_libraries_are_accepted(library):
    from cryptoresearch.features.pipeline import DataProcessing

    table = hours(300).reset_index()[["ts", "open", "high", "low", "close", "volume"]]
    convert = importlib.import_module(library)
    to = convert.from_pandas if library == "polars" else convert.Table.from_pandas
    bars = bar_frame(to(table), "1h", symbol="BTCUSDT")
    pd.testing.assert_frame_equal(bars, hours(300), check_freq=False)
    wanted = DataProcessing(["ret_3", "rsi_14"]).process_data(bars)
    pd.testing.assert_frame_equal(DataProcessing(["ret_3", "rsi_14"]).process_data(to(bars.reset_index())), wanted, check_freq=False)
    with pytest.raises(SchemaError, match="DataFrame of pandas, polars or Arrow"):
        bar_frame([1, 2, 3], "1h")


STOP = {"or", "and", "to", "again", "with", "if", "for", "does", "do", "by", "which", "on", "is", "in", "of", "at", "followed", "then", "makes", "uses", "removes", "says", "works", "–"}


def commands_in(path: Path) -> list[str]:
    "List the commands that the texts of a module name; values of f-strings become 1."
    import ast

    def text_of(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "1" for part in node.values)
        return ""

    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) not in inner and isinstance(node, ast.Constant | ast.JoinedStr):
            found += re.findall(r"cryptoresearch ((?:[a-z]+)(?: [^\n]*)?)", text_of(node))
    return found


def words_of(text: str) -> list[str]:
    "Cut a command out of a sentence."
    out = []
    for word in text.replace("`", " ` ").split():
        if word in STOP or word == "`" or word.startswith(("(", "→")):
            break
        bare = word.rstrip(".,;:)'\"")
        out.append(bare.strip("'\""))
        if bare != word:
            break
    return [w for w in out if w and w != "…"]


def refused(text: str) -> str | None:
    "Parse a command out of a text; return None if it is prose, an empty text if it parses, or the parser's error."
    import typer

    from cryptoresearch import cli

    group, words = typer.main.get_command(cli.app), words_of(text)
    context, app = group.make_context("cryptoresearch", ["runs"]), group
    while words and hasattr(group, "commands") and words[0] in group.commands:
        group, words = group.commands[words[0]], words[1:]
    if group is app:
        return None
    try:
        with group.make_context(group.name, list(words), parent=context):
            return ""
    except Exception as e:  # of the parser
        said = str(getattr(e, "message", repr(e)))
        harmless = "Missing" in type(e).__name__ or "requires an argument" in said or "'1' is not one of" in said or type(e).__name__ == "NoArgsIsHelpError"
        return "" if harmless else said


def test_the_commands_that_messages_name_parse(monkeypatch):
    import cryptoresearch

    monkeypatch.setattr(stored, "find_folder", str)  # the runs of the messages are not stored here
    assert refused("train --modle xgboost. Then") and refused("bars BTCUSDT 1h --fast") and refused("runs delete A B C"), "the test can fail"
    assert refused("bars BTCUSDT 5m, or make_bars(con)") == "" and refused("is a project") is None
    files = [p for p in sorted(Path(cryptoresearch.__file__).parent.rglob("*.py")) if p.name != "_modidx.py"]
    found = {(path.name, text): refused(text) for path in files for text in commands_in(path)}
    assert sum(error is not None for error in found.values()) > 40
    wrong = {where: error for where, error in found.items() if error}
    assert not wrong, "\n".join(f"{name}: cryptoresearch {text[:80]!r}: {error}" for (name, text), error in wrong.items())


def test_hours_without_a_move_leave_all_baselines_in_the_report() -> None:
    "An outcome of zero volatility, which QLIKE cannot judge, removes its row from the table of baselines and no forecaster."
    rng, n = np.random.default_rng(0), 400
    y = rng.lognormal(-5, 0.5, n)
    names = ("prediction", "last", "ewma", "har")
    whole = pd.DataFrame({"y": y} | {c: y * rng.lognormal(0, 0.3, n) for c in names}, index=pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC"))
    still = whole.assign(y=whole["y"].where(np.arange(n) % 100 != 7, 0.0))
    told = baseline_table(still, "volatility", 4, draws=20)
    assert set(told.index) == {"model", "last", "ewma", "har"}
    pd.testing.assert_frame_equal(told, baseline_table(still[still["y"] > 0], "volatility", 4, draws=20))
