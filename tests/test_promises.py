"""Check on real runs that a forecast does not depend on how much history is given, and that a leak does not train."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cryptoresearch.runs.config import RunConfig
from test_runs import put_bars, random_walk
from typer.testing import CliRunner

from cryptoresearch.cli import app
from cryptoresearch.data.event_bars import event_bars
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import ConfigError, RunMismatch, SchemaError
from cryptoresearch.evaluation.comparison import line_up
from cryptoresearch.evaluation.audit import audit
from cryptoresearch.features.pipeline import DataProcessing
from cryptoresearch.features.proof import find_leaks
from cryptoresearch.features.registry import Feature, REGISTRY
from cryptoresearch.features.user_modules import import_modules
from cryptoresearch.models.catalogue import MODELS
from cryptoresearch.runs.identity import read_data
from cryptoresearch.runs.reproduce import reproduce
from cryptoresearch.runs.run import load_run, train_run
from cryptoresearch.runs.tuning import tune
from cryptoresearch.serving.comparison_sections import lineup_trials
from cryptoresearch.serving.feature_sections import feature_report, feature_verdict
from cryptoresearch.serving.predictor import Predictor
from cryptoresearch.serving.run_sections import current_verdict, RunReport
from cryptoresearch.settings import Settings

PLAIN = RunConfig("WALKUSDT", source="simulated", horizon=6, test_start="2024-05-01", refit_every="60D", target="volatility", features=("returns", "har", "calendar"))
BOOST = {"n_estimators": 20, "early_stopping_rounds": 5}
NEEDS = {
    "har": {},
    "har_ridge": {"features": ("har", "volume_ratio_24", "volume_ratio_168", "hour_of_week")},
    "decay_ridge": {"features": ("decay", "har_720", "har_range_720", "hour_of_week_new_york")},
    "garch": {"features": ("ret_1_lags_167",)},
    "reversal": {"target": "return", "features": ("default",), "params": {"n_estimators": 20, "n_threads": 1}},
    "ridge": {},
    "ensemble": {"params": {"members": ["ridge", "har"]}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("promises")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        put_bars(con, random_walk(4000), "WALKUSDT", "simulated")
    return settings


def trained(store: Settings, model: str) -> tuple[str, pd.DataFrame]:
    asked = replace(PLAIN, model=model, **NEEDS.get(model, {"params": BOOST}))
    with connect(store) as con:
        return train_run(con, asked, store).id, read_data(con, asked).bars


@pytest.mark.parametrize("model", MODELS)
def test_a_forecast_does_not_depend_on_the_history_given(store: Settings, model: str) -> None:
    run_id, bars = trained(store, model)
    run, columns = load_run(run_id, store), ["prediction", "lower", "upper"]
    warmup = run.info["warmup"]
    assert f"{warmup} bars" in run._repr_mimebundle_()["text/html"]
    full, made = run.predict(bars)[columns], 0
    assert full.notna().all(axis=None)
    for n in (1, 30, 169, warmup - 1, warmup, warmup + 1, warmup + 40, 1400):
        given = bars.tail(n)
        if n < warmup:
            with pytest.raises(SchemaError, match=rf"at least {warmup} bars, the warm-up .*found {n} bars\. Give {warmup - n} more"):
                run.predict(given)
            continue
        part = run.predict(given)[columns]
        assert part.index.equals(given.index[warmup - 1 :]) and len(part) == n - warmup + 1
        assert np.allclose(part, full.loc[part.index], rtol=1e-9, atol=0)
        made += 1
    assert made >= 4


def test_a_gap_in_the_history_changes_nothing_either(store: Settings) -> None:
    run_id, bars = trained(store, "har_ridge")
    run, holed = load_run(run_id, store), bars.copy()
    holed.loc[holed.index[2000:2030], [c for c in holed if holed[c].dtype == float]] = np.nan
    holed.loc[holed.index[2000:2030], "gap"] = True
    full, part = run.predict(holed), run.predict(holed.tail(run.warmup + 100))
    assert len(part) == 101 and np.allclose(part["prediction"], full["prediction"].loc[part.index], rtol=1e-9, atol=0)


def test_the_remedy_of_the_error_works(store: Settings) -> None:
    run_id, bars = trained(store, "har_ridge")
    run = load_run(run_id, store)
    with pytest.raises(SchemaError) as told:
        run.predict(bars.tail(30))
    wanted = re.search(r"bars\.tail\((\d+)\)", str(told.value))
    assert wanted and run.predict(bars.tail(int(wanted[1]))).index.tolist() == [bars.index[-1]]


def test_a_live_session_waits_for_the_warmup(store: Settings, tmp_path: Path) -> None:
    run_id, bars = trained(store, "har_ridge")
    run = load_run(run_id, store)
    run.info["trained_until"] = bars.index[0].isoformat()  # so that bars of the training may be forecast
    at = len(bars) - run.warmup - 2
    live = Predictor(run, bars.iloc[at : at + 30])
    made = [live.update(bars.iloc[[k]]) for k in range(at + 30, len(bars))]
    assert live.skipped["warm-up"] == run.warmup - 1 - 30 and [len(m) for m in made[-4:]] == [0, 1, 1, 1]
    whole = run.predict(bars)["prediction"].tail(3)
    assert np.allclose(pd.concat(made[-3:])["prediction"], whole, rtol=1e-9, atol=0)


LEAKS = """
import numpy as np, pandas as pd
from cryptoresearch.features.registry import feature

def ahead(b):
    return np.log(b["close"]).diff().shift(-1)

@feature(name="own_zscore_all", inputs="close", warmup=1)
def own_zscore_all(b):
    return (b["close"] - b["close"].mean()) / b["close"].std()

@feature(name="own_centred", inputs="close", warmup=25)
def own_centred(b):
    return np.log(b["close"]).diff().abs().rolling(25, center=True).mean()

@feature(name="own_peek", inputs="close", warmup=2)
def own_peek(b):
    noise = np.sin(1e6 * b["close"])
    return 0.1 * ahead(b).fillna(0.0) + 0.01 * noise

@feature(name="own_expanding", inputs="close", warmup=5)
def own_expanding(b):
    return b["close"] / b["close"].expanding().mean()

@feature(name="own_body", inputs=("open", "close"), warmup=1)
def own_body(b):
    return np.log(b["close"] / b["open"])
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("own") / "own_leaks.py"
    file.write_text(LEAKS)
    known = dict(REGISTRY)
    yield str(file)
    REGISTRY.clear()
    REGISTRY.update(known)


def asked(module: str, *features: str, **more: object) -> RunConfig:
    return replace(PLAIN, target="return", model="ridge", features=(*features, "ret_1", "ret_6"), modules=(module,), **more)


@pytest.mark.parametrize("name", ["own_zscore_all", "own_centred", "own_peek", "own_expanding"])
@pytest.mark.parametrize("train", [train_run, tune])
def test_a_leak_does_not_train(store: Settings, module: str, name: str, train: Callable) -> None:
    config, where = asked(module, name, "own_body"), r" at 2024-\d\d-\d\d \d\d:\d\d" if name != "own_expanding" else ""
    with connect(store) as con, pytest.raises(ConfigError, match=rf"found {name} \([^()]+{where}\)\..* --leaks allow") as told:
        train(con, config, settings=store)
    assert "own_body" not in str(told.value)


def test_an_allowed_leak_is_in_the_verdict(store: Settings, module: str) -> None:
    with connect(store) as con:
        run = train_run(con, asked(module, "own_zscore_all", leaks="allow"), store)
        honest = train_run(con, asked(module, "own_body"), store)
    assert run.info["level"] == "suspicious" and run.info["leaks"].keys() == {"own_zscore_all"}
    assert "look ahead: own_zscore_all (reads the whole sample" in run.info["verdict"]
    assert "look ahead" not in honest.info["verdict"]
    assert reproduce(run.id, store, modules=[module])["same"].all()


def test_commands_refuse_leaks_and_import_modules(store: Settings, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("duckdb_path", "runs_dir"):
        monkeypatch.setenv(name.upper(), getattr(store, name))
    monkeypatch.setenv("COLUMNS", "400")
    REGISTRY.pop("own_zscore_all", None), sys.modules.pop("own_features.own_leaks", None)
    flags = ["--symbol", "WALKUSDT", "--source", "simulated", "--module", module, "--feature", "own_zscore_all", "--model", "ridge"]
    for command in ("audit", "tune"):
        done = CliRunner().invoke(app, [command, *flags])
        assert isinstance(done.exception, ConfigError) or "own_zscore_all (reads the whole sample" in done.output, done.output


def forget_own() -> None:
    "Leave the state of a process that has imported no module of the user."
    for name in [n for n in REGISTRY if n.startswith("own_")]:
        REGISTRY.pop(name)
    sys.modules.pop("own_features.own_leaks", None)


@pytest.fixture
def own_run(store: Settings, module: str, monkeypatch: pytest.MonkeyPatch) -> str:
    "A run with a user-defined feature, in a process that does not know the feature."
    with connect(store) as con:
        run = train_run(con, asked(module, "own_body"), store)
    for name in ("duckdb_path", "runs_dir"):
        monkeypatch.setenv(name.upper(), getattr(store, name))
    monkeypatch.setenv("COLUMNS", "400")
    forget_own()
    return run.id


def bar_file(store: Settings, folder: Path) -> str:
    with connect(store) as con:
        read_data(con, PLAIN).bars.tail(200).reset_index().to_parquet(folder / "bars.parquet")
    return str(folder / "bars.parquet")


@pytest.mark.parametrize("command", ["audit RUN --draws 1", "evaluate RUN --no-audit", "predict RUN FILE", "predict RUN --source replay", "reproduce RUN"])
def test_a_command_asks_for_the_module_of_a_run(store: Settings, own_run: str, command: str, tmp_path: Path) -> None:
    words = [{"RUN": own_run, "FILE": bar_file(store, tmp_path)}.get(word, word) for word in command.split()]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError) and "--module own_leaks.py" in str(done.exception), (done.output, done.exception)


@pytest.mark.parametrize("command", ["audit RUN --draws 1", "predict RUN FILE", "reproduce RUN"])
def test_a_command_takes_the_module_of_a_run(store: Settings, module: str, own_run: str, command: str, tmp_path: Path) -> None:
    words = [{"RUN": own_run, "FILE": bar_file(store, tmp_path)}.get(word, word) for word in command.split()]
    done = CliRunner().invoke(app, [*words, "--module", module])
    assert done.exit_code in (0, 6) and (done.exception is None or isinstance(done.exception, SystemExit)), (done.output, done.exception)
    assert {"audit": "audit", "predict": "forecasts", "reproduce": "bit for bit"}[words[0]] in done.output


def test_a_changed_module_is_refused(own_run: str, module: str, store: Settings, tmp_path: Path) -> None:
    other = tmp_path / "own_leaks.py"
    other.write_text(LEAKS.replace('b["close"] / b["open"]', 'b["open"] / b["close"]'))
    for words in (["audit", own_run], ["evaluate", own_run], ["predict", own_run, bar_file(store, tmp_path)]):
        done = CliRunner().invoke(app, [*words, "--module", str(other)])
        assert isinstance(done.exception, RunMismatch) and "own_body" in str(done.exception), (done.output, done.exception)


def test_commands_that_need_no_features_need_no_module(own_run: str, store: Settings, tmp_path: Path) -> None:
    with connect(store) as con:
        other = train_run(con, replace(PLAIN, target="return", model="ridge", features=("ret_1", "ret_6")), store).id
    for words in (["compare", own_run, other], ["promote", own_run], ["runs"]):
        done = CliRunner().invoke(app, words)
        assert done.exception is None or isinstance(done.exception, SystemExit), (done.output, done.exception)
    line = line_up([own_run, other], store)
    assert set(lineup_trials(line, store).results) == {"A", "B"}


def test_own_features_are_exported_with_their_module(own_run: str, module: str, tmp_path: Path) -> None:
    words = ["export", "WALKUSDT", "--to", str(tmp_path / "x.parquet"), "--what", "features", "--feature", "own_body", "--source", "simulated"]
    done = CliRunner().invoke(app, [*words, "--module", module])
    assert done.exit_code == 0 and "own_body" in pd.read_parquet(tmp_path / "x.parquet"), (done.output, done.exception)


@pytest.mark.slow  # executes a notebook
@pytest.mark.parametrize("command", ["evaluate RUN --audit", "compare RUN OTHER --report"])
def test_a_page_of_a_run_with_own_features_is_written(store: Settings, module: str, own_run: str, command: str, tmp_path: Path) -> None:
    with connect(store) as con:
        other = train_run(con, replace(PLAIN, target="return", model="ridge", features=("ret_1", "ret_6")), store).id
    words = [{"RUN": own_run, "OTHER": other}.get(word, word) for word in command.split()] + ["--output", str(tmp_path / "page")]
    done = CliRunner().invoke(app, words + (["--module", module] if words[0] == "evaluate" else []))
    assert done.exit_code == 0 and list((tmp_path / "page").glob("*.html")), (done.output, done.exception)


def centred(length: int) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda b: np.log(b["close"]).diff().abs().rolling(length, center=True).mean()


def peeking(strength: float) -> Callable[[pd.DataFrame], pd.Series]:
    "The mean size of the last day's returns, with a little of the next one's."

    def leak(b: pd.DataFrame) -> pd.Series:
        size = np.log(b["close"]).diff().abs()
        return size.rolling(24).mean() + strength * size.shift(-1).fillna(0.0)

    return leak


VOLATILITY_LEAKS = {f"centred_{n}": centred(n) for n in (3, 25, 101)} | {f"peek_{s:g}": peeking(s) for s in (1.0, 0.1, 1e-2, 1e-4, 1e-6)}


def as_feature(name: str, fn: Callable[[pd.DataFrame], pd.Series]) -> Feature:
    return Feature(name, ("close",), 125, "1", "own", "own", fn)


@pytest.mark.parametrize("name", VOLATILITY_LEAKS)
def test_a_leak_of_volatility_of_any_strength_is_found(store: Settings, name: str) -> None:
    with connect(store) as con:
        bars = read_data(con, PLAIN).bars.tail(1500)
    honest = as_feature("trailing", lambda b: np.log(b["close"]).diff().abs().rolling(24).mean())
    leak = as_feature(name, VOLATILITY_LEAKS[name])
    assert list(find_leaks([leak, honest], bars)) == [name]
    with pytest.raises(ConfigError, match=name):
        DataProcessing([honest, leak]).process_data(bars)


VOLATILE = """
import numpy as np
from cryptoresearch.features.registry import feature

def size(b):
    return np.log(b["close"]).diff().abs()

@feature(name="own_sized", inputs="close", warmup=25)
def own_sized(b):
    return size(b).rolling(25, center=True).mean()

@feature(name="own_weak", inputs="close", warmup=25)
def own_weak(b):
    return size(b).rolling(24).mean() + 1e-3 * size(b).shift(-1).fillna(0.0)
"""


@pytest.mark.parametrize("name", ["own_sized", "own_weak"])
@pytest.mark.parametrize("use", ["train", "tune", "audit", "command"])
def test_a_leak_of_volatility_is_refused_everywhere(store: Settings, name: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own_volatile.py"
    file.write_text(VOLATILE)
    config = replace(PLAIN, model="ridge", features=(name, "ret_1"), modules=(str(file),))
    import_modules(config.modules)
    try:
        if use == "command":
            for setting in ("duckdb_path", "runs_dir"):
                monkeypatch.setenv(setting.upper(), getattr(store, setting))
            flags = ["--symbol", "WALKUSDT", "--source", "simulated", "--target", "volatility", "--module", str(file), "--feature", name, "--model", "ridge"]
            assert name in str(CliRunner().invoke(app, ["audit", *flags]).exception)
            return
        with connect(store) as con, pytest.raises(ConfigError, match=rf"{name} \(.*--leaks allow"):
            {"train": train_run, "tune": tune}[use](con, config, settings=store) if use != "audit" else audit(read_data(con, config).bars, config)
    finally:
        REGISTRY.pop(name, None), sys.modules.pop("own_features.own_volatile", None)


def test_a_run_on_an_allowed_leak_of_volatility_stays_suspicious_when_evaluated(store: Settings, tmp_path: Path) -> None:
    file = tmp_path / "own_volatile.py"
    file.write_text(VOLATILE)
    config = replace(PLAIN, model="ridge", features=("own_sized", "ret_1"), modules=(str(file),), leaks="allow")
    with connect(store) as con:
        run = train_run(con, config, store)
        data = read_data(con, config)
    said = current_verdict(RunReport(run, data, 20, 0), [], None)
    assert said.level == "suspicious" and "own_sized" in said.sentence
    REGISTRY.pop("own_sized", None), REGISTRY.pop("own_weak", None), sys.modules.pop("own_features.own_volatile", None)


def test_the_feature_report_proves_own_features(store: Settings, tmp_path: Path) -> None:
    file = tmp_path / "own_volatile.py"
    file.write_text(VOLATILE)
    config = replace(PLAIN, model="lightgbm", params=BOOST, features=("own_weak", "ret_1", "ret_6"), modules=(str(file),))
    import_modules(config.modules)
    try:
        with connect(store) as con:
            report = feature_report(read_data(con, config), config, 2)
        assert feature_verdict(report).label == "leak" and report.proof["causal"].to_dict() == {"own_weak": False, "ret_1": True, "ret_6": True}
    finally:
        REGISTRY.pop("own_sized", None), REGISTRY.pop("own_weak", None), sys.modules.pop("own_features.own_volatile", None)


def test_event_bars_that_share_an_open_are_proven_too() -> None:
    "A leak in an own feature is found on tick bars of which several open in one second."
    rng, n = np.random.default_rng(0), 3_000
    times = pd.to_datetime(1_700_000_000 + np.sort(rng.integers(0, 200, n)), unit="s", utc=True)
    trades = pd.DataFrame({"ts": times, "price": 100 + 0.01 * rng.normal(size=n).cumsum(), "qty": 1.0, "quote_qty": 100.0, "trade_id": np.arange(n)})
    bars = event_bars(trades.assign(side_tick=1, side_reported=1, n_trades=1), "tick:3", symbol="X")
    mean = {name: Feature(name, ("close",), 5, "1", "own", "own", lambda b, c=c: b["close"] / b["close"].rolling(5, center=c).mean()) for name, c in (("centred", True), ("trailing", False))}
    assert bars.index.has_duplicates and list(find_leaks(mean.values(), bars)) == ["centred"]
    with pytest.raises(ConfigError, match="centred"):
        DataProcessing(list(mean.values())).process_data(bars)
    assert DataProcessing(list(mean.values()), leaks="allow").process_data(bars).shape == (1_000, 2)
