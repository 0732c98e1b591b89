"""Check runs as processes and files: trained twice, reproduced, tampered with, killed, and executed as a notebook with a report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from cryptoresearch.runs.config import RunConfig

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import connect, init_duckdb, write
from cryptoresearch.errors import ConfigError, DataNotFound, RunMismatch, SchemaError
from cryptoresearch.evaluation.promotion import delete_run
from cryptoresearch.features import pandas_ta
from cryptoresearch.features.derived import lagged, of_symbol, on_frame, register, with_symbol
from cryptoresearch.features.pipeline import DataProcessing
from cryptoresearch.features.registry import Feature, OnColumns, REGISTRY, resolve
from cryptoresearch.models.splits import WalkForward
from cryptoresearch.runs import identity as question, run as runs
from cryptoresearch.runs.reproduce import reproduce
from cryptoresearch.runs.stored import list_runs
from cryptoresearch.runs.run import load_run, train_run
from cryptoresearch.runs.walk_forward import first_test, fit_rows, known_by
from cryptoresearch.serving.batch import notebook_path, outside, run_notebook, train_report
from cryptoresearch.serving.report_figures import plotly_js
from cryptoresearch.serving.predictor import Predictor
from cryptoresearch.settings import Settings

SMALL = {"n_estimators": 40, "learning_rate": 0.1, "early_stopping_rounds": 8, "n_threads": 1}
WALK = RunConfig("WALKUSDT", source="simulated", horizon=6, refit_every="20D", features=("returns", "calendar"), params=SMALL)

pytestmark = pytest.mark.usefixtures("warm_kernels")


def random_walk(hours: int = 1500, seed: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(0.005 * rng.standard_normal(hours)))
    opens = np.r_[100.0, close[:-1]]
    high, low = np.maximum(opens, close) * 1.002, np.minimum(opens, close) * 0.998
    times = pd.date_range("2024-01-01", periods=hours, freq="1h", tz="UTC")
    return pd.DataFrame({"open_time": times, "open": opens, "high": high, "low": low, "close": close, "volume": rng.lognormal(size=hours)})


def put_bars(con, candles: pd.DataFrame, symbol: str, source: str) -> None:
    frame = bar_frame(candles, "1h", symbol=symbol).reset_index()
    for name in ("ts", "close_ts"):
        frame[name] = frame[name].dt.tz_localize(None)
    frame["source"], frame["kind"], frame["spec"] = source, "time", "1h"

    def insert(c):
        columns = [r[0] for r in c.execute("DESCRIBE bars").fetchall() if r[0] in frame]
        c.register("frame_to_store", frame[columns])
        c.execute("INSERT INTO bars BY NAME FROM frame_to_store")
        c.unregister("frame_to_store")

    write(con, insert)


def make_store(folder: Path) -> Settings:
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    con = init_duckdb(settings)
    put_bars(con, random_walk(), "WALKUSDT", "simulated")
    con.close()
    return settings


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A store with a trained run, never changed by a test."
    settings = make_store(tmp_path_factory.mktemp("trained"))
    with connect(settings) as con:
        return settings, train_run(con, WALK, settings)


@pytest.fixture
def copied(trained, tmp_path):
    "Return a copy of the trained run's folder, next to the same store, to tamper with."
    settings, run = trained
    mine = settings.model_copy(update={"runs_dir": str(tmp_path / "runs")})
    shutil.copytree(run.folder, tmp_path / "runs" / run.id)
    return mine, run, tmp_path / "runs" / run.id


def rewrite(folder: Path, change) -> dict:
    "Change run.json, and the checksums of files along with it."
    info = json.loads((folder / "run.json").read_text())
    change(info)
    info["files"] = {name: question.sha256_of((folder / name).read_bytes()) for name in info["files"]}
    (folder / "run.json").write_text(json.dumps(info))
    return info


def test_the_same_question_is_trained_once(trained):
    settings, run = trained
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.folder.iterdir()}
    steps = []
    with connect(settings) as con:
        again = train_run(con, replace(WALK, params=dict(reversed(SMALL.items()))), settings, progress=lambda _, text: steps.append(text))
        changed = replace(WALK, seed=1)
        other = runs.find_run(changed, runs.read_data(con, changed), settings)
        trials = con.execute("SELECT count(*) FROM trials").fetchone()[0]
    assert again.reused and again.id == run.id and not run.reused
    assert not any("fold" in s for s in steps) and "trained before" in steps[-1]
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.folder.iterdir()} == before
    assert other[0] != run.id and not other[1]
    assert trials == 1


def test_a_run_on_simulated_noise_claims_nothing(trained):
    settings, run = trained
    assert run.info["simulated"] and "SIMULATED" in run.info["verdict"]
    assert run.info["level"] in ("none", "unclear")
    assert run.info["strategy"]["n_trials"] == 1
    row = list_runs(settings).loc[run.id]
    assert (row["symbol"], row["horizon"], row["simulated"]) == ("WALKUSDT", 6, True)
    p = run.predictions
    assert list(p.columns) == ["known_ts", "end_ts", "y", "prediction", "lower", "upper", "fold", "zero", "last"]
    assert p["prediction"].notna().all() and p["y"].isna().sum() == 6  # only the last outcomes are open
    decided = p.groupby("fold")["known_ts"].min()
    assert [pd.Timestamp(fold["train_end"]) for fold in run.info["folds"]] == decided.tolist()  # the label that ends then is known


def test_made_again_bit_for_bit_although_the_store_has_moved_on(store):
    with connect(store) as con:
        run = train_run(con, WALK, store)
        write(con, lambda c: c.execute("UPDATE bars SET close = close * 1.01 WHERE ts = TIMESTAMP '2024-02-01 00:00'"))
        new, there = runs.find_run(WALK, runs.read_data(con, WALK), store)
    assert new != run.id and not there  # other data, other run
    checks = reproduce(run.id, store)  # from the pinned snapshot
    assert checks["same"].all(), checks[~checks["same"]]
    assert {"bars", "reproduced forecasts", "reproduced model.ubj", "reproduced scores"} <= set(checks.index)


def test_a_rebuilt_store_with_the_same_bars_will_do_and_with_others_will_not(trained, tmp_path):
    settings, run = trained
    same = make_store(tmp_path / "same").model_copy(update={"runs_dir": settings.runs_dir})
    checks = reproduce(run.id, same)
    assert checks.drop("snapshot")["same"].all()
    other = Settings(_env_file=None, duckdb_path=str(tmp_path / "other.sqlite"), runs_dir=settings.runs_dir)
    candles = random_walk()
    candles.loc[700, "volume"] += 1e-9
    with init_duckdb(other) as con:
        put_bars(con, candles, "WALKUSDT", "simulated")
    with pytest.raises(RunMismatch, match=r"bars of run .* other values in .*volume"):
        reproduce(run.id, other)


def test_tampered_files_are_named(copied):
    settings, run, folder = copied
    for name in ("model.ubj", "model.json", "predictions.parquet"):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(RunMismatch, match=name.replace(".", r"\.")):
            load_run(run.id, settings)
        with pytest.raises(RunMismatch, match=name.replace(".", r"\.")):
            reproduce(run.id, settings)
        (folder / name).write_bytes(original)
    assert load_run(run.id[:-3], settings).id == run.id


def test_tampering_along_with_the_checksums_is_found_by_training_again(copied):
    settings, run, folder = copied
    changed = run.predictions.copy()
    changed.iloc[5, changed.columns.get_loc("prediction")] = np.nextafter(changed["prediction"].iloc[5], 1.0)
    changed.to_parquet(folder / "predictions.parquet")
    rewrite(folder, lambda info: None)
    with pytest.raises(RunMismatch, match="column prediction at 2024-02-07 17:00"):
        reproduce(run.id, settings)
    shutil.copy(run.folder / "predictions.parquet", folder)
    model = json.loads((folder / "model.json").read_text())
    model["residual_quantiles"][0] *= 2
    (folder / "model.json").write_text(json.dumps(model))
    rewrite(folder, lambda info: None)
    with pytest.raises(RunMismatch, match=r"reproduced model\.json"):
        reproduce(run.id, settings)


def test_a_changed_record_is_found(copied):
    settings, run, folder = copied
    rewrite(folder, lambda info: info["scores"]["model"].update(ic=0.5))
    with pytest.raises(RunMismatch, match="reproduced scores"):
        reproduce(run.id, settings)
    rewrite(folder, lambda info: info["identity"]["config"].update(seed=7))
    with pytest.raises(RunMismatch, match=r"run\.json"):
        reproduce(run.id, settings)
    (folder / "run.json").write_text("{")
    with pytest.raises(RunMismatch, match="cannot be read"):
        load_run(run.id, settings)
    assert list_runs(settings).loc[run.id, "level"] == "unreadable"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda info: info.pop("files"), "no files"),
        (lambda info: info.update(files=["model.ubj"], warmup="3"), "no files, warmup"),
        (lambda info: info["config"].update(audit=True), "options that this version does not know: audit"),
        (lambda info: info["config"].update(target="none"), "a configuration that is refused"),
        (lambda info: info["config"].update(horizon="six"), "a configuration that is refused"),
        (lambda info: info["files"].update({"../../../proc/kcore": "0"}), "another content or none"),
        (lambda info: info["files"].update({"/etc/passwd": "0"}), "another content or none"),
    ],
)
def test_a_record_that_is_not_complete_is_refused(copied, change, found):
    settings, run, folder = copied
    info = json.loads((folder / "run.json").read_text())
    change(info)
    (folder / "run.json").write_text(json.dumps(info))
    for use in (load_run, reproduce):
        with pytest.raises(RunMismatch, match=found if use is load_run else ".*"):
            use(run.id, settings)


def test_damaged_files_whose_checksums_are_right_are_refused(copied):
    settings, run, folder = copied
    for name in ("predictions.parquet", "model.ubj", "model.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        rewrite(folder, lambda info: None)
        with pytest.raises((RunMismatch, SchemaError), match="rain"):
            load_run(run.id, settings)
        (folder / name).write_bytes(whole)
    rewrite(folder, lambda info: None)
    assert load_run(run.id, settings).id == run.id


def test_a_run_that_is_a_link_is_deleted_without_its_target(copied, tmp_path):
    settings, run, folder = copied
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert delete_run(run.id, settings=settings) == run.id
    assert not folder.is_symlink() and (elsewhere / "run.json").is_file()
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".tmp-")]


def test_other_libraries_are_named_with_the_difference(copied):
    settings, run, folder = copied
    changed = run.predictions.assign(prediction=run.predictions["prediction"] + 1e-12)
    changed.to_parquet(folder / "predictions.parquet")
    info = rewrite(folder, lambda info: info["identity"]["libraries"].update(xgboost="2.0.0"))
    name = f"{run.id.rsplit('-', 1)[0]}-{question.sha256_of(question.canonical(info['identity']))[:10]}"
    folder.rename(folder.parent / name)
    with pytest.raises(RunMismatch, match=r"column prediction .*xgboost 2\.0\.0 then"):
        reproduce(name, settings)


@pytest.mark.parametrize("moment", ["fold 1 of", pytest.param("fitting the final model", marks=pytest.mark.heavy), "rename"])
def test_a_killed_run_leaves_nothing_that_looks_like_one(store, tmp_path, runner, moment):
    script = textwrap.dedent(f"""
        import os, pathlib, signal, sys
        from cryptoresearch.data.store import connect
        from cryptoresearch.runs.config import RunConfig
        from cryptoresearch.runs.run import train_run
        from cryptoresearch.settings import Settings
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "rename":
            pathlib.Path.rename = die
        s = Settings(_env_file=None, duckdb_path={store.duckdb_path!r}, runs_dir={store.runs_dir!r}, duckdb_threads=1)
        config = RunConfig(**{asdict(WALK)!r})
        train_run(connect(s), config, s, progress=lambda f, text: die() if {moment!r} in text else None)
    """)
    done = runner.call(script, [], os.environ | {"OMP_NUM_THREADS": "1"}, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list_runs(store).empty
    with connect(store) as con:
        run = train_run(con, WALK, store)
        assert not run.reused
        assert con.execute("SELECT count(*) FROM trials").fetchone()[0] == 1
    assert list(list_runs(store).index) == [run.id]


def test_leftovers_of_killed_runs_are_swept(store):
    old, young = (Path(store.runs_dir) / name for name in (".tmp-old", ".tmp-young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    with connect(store) as con:
        train_run(con, WALK, store)
    assert not old.exists() and young.exists()


def test_nothing_is_pickled(trained):
    _, run = trained
    assert {p.suffix for p in run.folder.iterdir()} <= {".json", ".ubj", ".parquet", ".ipynb", ".html"}
    for path in run.folder.iterdir():
        assert not path.read_bytes().startswith(b"\x80"), path.name  # a pickle's first byte
    for name in ("run.json", "model.json"):
        json.loads((run.folder / name).read_text())
    for module in (runs, sys.modules["cryptoresearch.models.boosting"]):
        assert "pickle" not in Path(module.__file__).read_text().replace("without pickle", "").replace("is a pickle", "").replace("no pickle", "")


def test_an_unknown_name_gets_the_closest(tmp_path):
    settings = Settings(_env_file=None, runs_dir=str(tmp_path))
    (tmp_path / "btcusdt-1h-volatility24-d353293e5a").mkdir()
    (tmp_path / "btcusdt-1h-volatility24-d353293e5a" / "run.json").write_text("{}")
    with pytest.raises(DataNotFound, match="1 other run, the closest btcusdt-1h-volatility24"):
        load_run("btcusdt-1h-volatilty24", settings)


def test_a_name_is_not_a_path(trained):
    settings, _ = trained
    for name in ("../runs", "/etc", "", ".tmp-x", "a/b"):
        with pytest.raises(DataNotFound):
            load_run(name, settings)


def test_the_template_is_clean_and_knows_every_field():
    notebook = nbformat.read(notebook_path("research/train.ipynb"), as_version=4)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    defaults: dict = {}
    exec(tagged[0].source, defaults)
    plain = {k: (list(v) if isinstance(v, tuple) else v) for k, v in asdict(RunConfig()).items()}
    assert {f.name for f in fields(RunConfig)} <= set(defaults)
    assert {k for k, v in plain.items() if defaults[k] != v} == {"start"}
    assert not any(c.get("outputs") or c.get("execution_count") for c in notebook.cells)


def test_a_misspelt_parameter_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="horizn"):
        run_notebook("research/train.ipynb", {"horizn": 3}, tmp_path / "out", settings=store)


def test_the_notebook_trains_with_the_parameters_it_was_given(store):
    told = []
    made = train_report(replace(WALK, horizon=3), store, progress=lambda f, text: told.append(text))
    run = load_run(made.run_id, store)
    assert run.config.horizon == 3 and made.run_id.startswith("walkusdt-1h-return3-") and not made.reused
    assert "fold 1 of 2" in told
    injected = [c for c in nbformat.read(made.notebook, as_version=4).cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "horizon = 3" in injected[0].source and 'symbol = "WALKUSDT"' in injected[0].source
    page = made.report.read_text()
    body = page.replace(plotly_js(), "")
    assert outside(page) == [] and "require.js" not in body and "MathJax" not in body
    assert "SIMULATED" in body and run.id in body and body.count('class="figure"') >= 6
    assert "import pandas" not in body and "Run it by hand" not in body  # no code, nothing meant for who runs it
    assert sorted(p.name for p in made.folder.iterdir()) == ["model.json", "model.ubj", "predictions.parquet", "report.html", "run.json", "train.ipynb"]
    assert [p.name for p in made.folder.parent.iterdir() if p.name.startswith(".tmp")] == []
    children = Path("/proc/self/task").glob("*/children") if Path("/proc/self/task").is_dir() else ()
    kernels = [pid for path in children for pid in path.read_text().split() if b"ipykernel" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert kernels == []  # the kernel is gone with its notebook
    again = train_report(replace(WALK, horizon=3), store)
    assert again.reused and again.report == made.report
    look_at(made.report)


def look_at(report: Path) -> None:
    "Open the report in a browser without a network: every figure drawn, nothing fetched, nothing wider than a phone."
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return
    from playwright.sync_api import sync_playwright

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked, wrong = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(report.as_uri())
        page.click("#open-all")
        page.wait_for_function("document.querySelectorAll('.figure .main-svg').length >= 2 * document.querySelectorAll('.figure').length", timeout=30_000)
        assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == [] and wrong == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()


@pytest.mark.parametrize(("begin", "start"), [("2023-08-15", "2023-09-01"), pytest.param("2017-08-17", "2023-06-01", marks=pytest.mark.heavy)])
def test_volatility_of_real_hours(hours_in, tmp_path, begin, start):
    settings = hours_in(tmp_path, begin, "2024-05-01" if begin < "2018" else "2024-03-10")  # more than the run reads, on both sides
    with init_duckdb(settings) as con:
        config = RunConfig(target="volatility", start=start, end="2024-03-01", test_start="2023-12-01", refit_every="45D", features=("volatility", "calendar"), params=SMALL)
        run = train_run(con, config, settings)
        kept = con.execute("SELECT kind, n, sharpe, horizon, simulated, step_s, list_avg(list_filter(returns, v -> NOT isnan(v))) FROM trials").fetchall()
    scores = run.info["scores"]  # nothing was traded; what it saved of the baseline's loss is written down
    assert kept == [("loss", scores["model"]["n"], None, 24, False, 3600.0, pytest.approx(scores["ewma"]["qlike"] - scores["model"]["qlike"]))]
    assert run.info["strategy"] is None and not run.info["simulated"] and len(run.info["identity"]["files"]) == 1
    assert (run.predictions["prediction"] > 0).all() and run.predictions.index[0] == pd.Timestamp("2023-12-01", tz="UTC")
    assert pd.Timestamp(run.info["trained_until"]) <= pd.Timestamp("2024-03-01", tz="UTC")
    assert 0.2 < run.info["scores"]["model"]["ic"] < 1
    assert reproduce(run.id, settings)["same"].all()


FACTOR = 2.0


def _times(column, by):
    return column * by


def _from_file(bars):
    return _times(bars["close"], FACTOR)


def _closing_over(value):
    return lambda bars: bars["close"] * value


class _Slotted:
    __slots__ = ("by",)

    def __init__(self, by):
        self.by = by

    def __call__(self, bars):
        return bars["close"] * self.by


def _feature(fn, name="mine"):
    return Feature(name, ("close", "close_ts"), 2, "1", "own", "own", fn)


def _digest(f):
    return question.own_features((f,))[f.name]


def test_a_feature_is_what_it_is_made_of(monkeypatch):
    "Equal parts give one digest, any other part another; a made feature takes those of what is inside it."
    eth = bar_frame(random_walk(), "1h", symbol="ETH")
    other = eth.assign(close=eth["close"].where(np.arange(len(eth)) != 700, eth["low"]))
    pairs = {
        "closure": (_closing_over(1.0), _closing_over(2.0)),
        "a frame in the closure": (_closing_over(eth["close"]), _closing_over(other["close"])),
        "slots": (_Slotted(1.0), _Slotted(2.0)),
        "parameters": (OnColumns(_times, ("close",), (("by", 1.0),)), OnColumns(_times, ("close",), (("by", 2.0),))),
    }
    for name, (a, b) in pairs.items():
        for wrap in (lambda f: f, lambda f: lagged(f, 1), lambda f: on_frame("4x", f), lambda f: of_symbol("ETH", f, eth), lambda f: lagged(on_frame("4x", f), 2)):
            assert _digest(wrap(_feature(a))) == _digest(wrap(_feature(a))), name
            assert _digest(wrap(_feature(a))) != _digest(wrap(_feature(b))), name
    assert _digest(of_symbol("ETH", "ret_24", eth)) == _digest(of_symbol("ETH", "ret_24", eth.copy()))
    assert _digest(of_symbol("ETH", "ret_24", eth)) != _digest(of_symbol("ETH", "ret_24", other))
    before = _digest(_feature(_from_file))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert _digest(_feature(_from_file)) != before
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert _digest(_feature(_from_file)) == before
    monkeypatch.setitem(globals(), "_times", _closing_over)
    assert _digest(_feature(_from_file)) != before


def test_the_packages_own_features_are_not_own_until_somebody_takes_their_name():
    assert question.own_features(("all",)) == {}
    held = REGISTRY["ret_1_lag_1"]
    try:
        register(Feature(held.name, held.inputs, held.warmup, held.unit, held.group, held.source, lagged(_feature(_closing_over(1.0)), 1).fn), replace=True)
        assert list(question.own_features(("ret_1_lag_1", "ret_1"))) == ["ret_1_lag_1"]
    finally:
        REGISTRY[held.name] = held


def test_a_digest_is_the_same_in_another_process():
    text = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_runs as t; from cryptoresearch.features.derived import lagged; print(t._digest(lagged(t._feature(t._Slotted((1, 'a', None))), 3)), t._digest(t._feature(t._from_file)))"
    found = {subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert len(found) == 1


LABELS = {"scaled_return": {"window": 48}, "direction": {}, "triple_barrier": {"window": 48, "up": 2.0}, "trend": {"least": 3}, "meta": {"window": 48, "primary": "-ret_24", "cost_bps": 10.0}}


@pytest.mark.parametrize("target", [t if t == "triple_barrier" else pytest.param(t, marks=pytest.mark.heavy) for t in LABELS])
def test_every_kind_of_label_is_trained_reported_and_made_again(trained, tmp_path, target):
    settings, _ = trained
    mine = settings.model_copy(update={"runs_dir": str(tmp_path / "runs")})
    asked = replace(WALK, target=target, label=LABELS[target])
    done = train_report(asked, mine)
    run = load_run(done.run_id, mine)
    assert done.run_id.startswith(f"walkusdt-1h-{target}6-")
    page = done.report.read_text()
    assert "Verdict" in page and run.info["verdict"].split(":")[0] in page and outside(page) == []
    assert run.info["level"] in ("none", "weak", "skill", "unclear", "suspicious") and run.info["verdict"].count(". ") <= 1
    assert run.info["strategy"]["n_trials"] >= 1  # each was traded, and counts
    p, model = run.predictions, run.info["scores"]["model"]
    if target == "scaled_return":
        assert p["lower"].notna().all() and model["rmse"] > 0.3  # in volatilities
    else:
        assert p["prediction"].between(0, 1).all() and p["lower"].isna().all() and run.model.loss == "probability"
        assert {"auc", "brier", "log_loss", "ic"} <= set(model) and set(run.info["scores"]) == {"model", "base", "half", "last"}
        assert p.groupby("fold")["base"].nunique().eq(1).all()
    if target in ("triple_barrier", "meta"):
        assert p["held"].between(1, 6).all() and (p["held"] < 6).any()
        assert ((p["end_ts"] - p["known_ts"])[p["y"].notna()] == pd.to_timedelta(p["held"][p["y"].notna()], "h")).all()
    checks = reproduce(done.run_id, mine)
    assert checks["same"].all(), checks[~checks["same"]]
    late = run.predict(read_walk(settings).iloc[-(run.info["warmup"] + 5) :]).tail(3)
    assert np.allclose(late["prediction"], run.predict(read_walk(settings)).tail(3)["prediction"], rtol=1e-6)


def read_walk(settings):
    with connect(settings) as con:
        return question.read_data(con, WALK).bars


def test_label_parameters_are_part_of_the_question(trained):
    settings, _ = trained
    asked = [replace(WALK, target="triple_barrier", label=label) for label in ({}, {"up": 1}, {"up": 1.5}, {"window": 100}, {"timeout": "zero"})]
    with connect(settings) as con:
        names = [runs.find_run(c, runs.read_data(con, c), settings)[0] for c in asked]
    assert names[0] == names[1] and len(set(names)) == 4
    for wrong in ({"up": 0}, {"up": True}, {"window": 1.5}, {"timeout": "drop"}, {"primary": "ret_24"}):
        with pytest.raises(ConfigError):
            replace(WALK, target="triple_barrier", label=wrong)
    with pytest.raises(ConfigError, match="none"):
        replace(WALK, label={"up": 1})


def test_a_label_s_own_inputs_are_purged(trained):
    "The volatility behind a barrier and the primary rule reach further back than the features do."
    bars = read_walk(trained[0])
    short = replace(WALK, target="triple_barrier", label={"window": 300})
    samples = runs.prepare(bars, short)
    reach = bars.index.get_indexer(samples.X.index) - bars.index.get_indexer(samples.intervals["start_ts"])
    assert reach.max() == 300 > max(f.warmup for f in resolve(list(samples.X.columns)))
    assert (samples.intervals["end_ts"].dropna() - samples.labels["known_ts"][samples.intervals["end_ts"].notna()] == pd.Timedelta("6h")).all()  # the planned end


@pytest.mark.parametrize("window", [None, "30D"])
def test_a_fold_trains_on_the_rows_of_a_live_model(trained, window):
    "Bars that end with the first decision of a fold: the final model on them has the same rows, features and outcomes."
    bars = read_walk(trained[0])
    config = replace(WALK, features=("returns", "rv_168"), params={}, model="ridge", mode="sliding" if window else "expanding", train_window=window)
    samples, start = runs.prepare(bars, config), first_test(config, bars)
    folds = list(WalkForward(start, config.refit_every, config.mode, window).split(samples.intervals))
    assert len(folds) > 1
    for train, test in folds:
        seen = bars[bars["close_ts"] <= samples.labels["known_ts"].iloc[test[0]]]
        live = runs.prepare(seen, replace(config, test_start=start))
        rows = known_by(config, live, live.intervals["end_ts"].max())
        assert live.X.iloc[rows].equals(samples.X.iloc[train]) and live.labels["y"].iloc[rows].equals(samples.labels["y"].iloc[train])
    assert runs.fit_last(replace(config, test_start=start), live, None).model.n_rows_ == fit_rows(config, live, rows).n_rows_


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    "Event bars of simulated trades of three days, the second of which is missing."
    folder = tmp_path_factory.mktemp("events")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        files = simulate_trades(folder / "sim", "SIMUSDT", days=3, trades_per_day=40_000)
        for file in (files[0], files[2]):
            process_file(con, str(file))
        for spec in ("tick:50", "dollar:1e5"):
            make_bars(con, "SIMUSDT", spec)
    return settings


EVENTS = RunConfig("SIMUSDT", "tick:50", horizon=8, refit_every="12h", features=("returns", "calendar"), params=SMALL)


@pytest.mark.parametrize("target, spec, label", [("return", "tick:50", {}), ("triple_barrier", "dollar:100k", {"window": 100, "trades": True})])
def test_event_bars_are_trained_and_made_again(events, target, spec, label):
    asked = replace(EVENTS, target=target, spec=spec, label=label)
    with connect(events) as con:
        bars = question.read_data(con, asked).bars
        run = train_run(con, asked, events)
        assert train_run(con, replace(asked, spec="dollar:1e5" if ":100" in spec else spec), events).reused
        sharpes = runs.trial_sharpes(con, spec, simulated=True)
        ledger = con.execute("SELECT n FROM trials WHERE run_id = ?", [run.id]).fetchone()[0]
    assert bars["gap"].sum() == 1 and not bars.index.is_unique and bars["first_id"].is_unique
    p, at = run.predictions, pd.Index(bars["first_id"]).get_indexer(run.predictions["first_id"])
    assert (np.diff(at) > 0).all() and (p.index == bars.index[at]).all() and (p["known_ts"].to_numpy() == bars["close_ts"].to_numpy()[at]).all()
    if target == "return":  # the outcome is that of the bars behind, by position
        y, last = p["y"].to_numpy(), at + 8
        known = ~np.isnan(y)
        assert np.allclose(y[known], (bars["close"].to_numpy()[last[known]] / bars["open"].to_numpy()[at[known] + 1] - 1), rtol=1e-12)
        assert (p["end_ts"].to_numpy()[known] == bars["close_ts"].to_numpy()[last[known]]).all()
    decided = p.groupby("fold")["known_ts"].min()
    for fold in run.info["folds"]:  # by the first decision, not by its open: what is known then is trained on
        assert pd.Timestamp(fold["train_end"]) <= decided[fold["fold"]]
    assert ledger < 60 < len(p) and len(sharpes) >= 1  # hours, not bars
    checks = reproduce(run.id, events)
    assert checks["same"].all(), checks[~checks["same"]]
    late = run.predict(bars.iloc[-(run.info["warmup"] + 5) :]).tail(3)
    assert np.allclose(late["prediction"], run.predict(bars).tail(3)["prediction"], rtol=1e-6)


@pytest.mark.parametrize("more", [{"interval": "scaled", "interval_params": {"volatility": "ridge", "volatility_features": ["returns"]}}, {"interval": "adaptive", "features": ("ret_1", "ret_6", "calendar")}])
def test_event_bars_can_have_the_options_too(events, more):
    from cryptoresearch.evaluation.comparison import interval_table
    from cryptoresearch.evaluation.cpcv import path_predictions, score_paths

    asked = replace(EVENTS, **more)
    with connect(events) as con:
        bars = question.read_data(con, asked).bars
        run = train_run(con, asked, events)
    p = run.predictions
    assert (p["lower"] <= p["upper"]).all() and 0.5 < interval_table(p, bars, 0.9).loc[("all", "all"), "coverage"] < 1
    assert reproduce(run.id, events)["same"].all()
    if asked.interval == "adaptive":  # whose features leave enough in addition to each group
        paths = path_predictions(asked, runs.prepare(bars, asked))
        assert len(score_paths(paths, bars, asked)) == 5 and paths[0]["first_id"].is_unique


def test_a_hole_is_spanned_by_no_label_and_no_feature(events):
    with connect(events) as con:
        bars = question.read_data(con, EVENTS).bars
    samples, k = runs.prepare(bars, EVENTS), int(np.flatnonzero(bars["gap"])[0])
    at = pd.Index(bars["first_id"]).get_indexer(samples.labels["first_id"])
    y = pd.Series(samples.labels["y"].to_numpy(), at)
    assert k not in at and y[(at >= k - 8) & (at < k)].isna().all() and y[at == k - 9].notna().all()
    one = DataProcessing(["ret_24"]).process_data(bars)["ret_24"].to_numpy()
    assert np.isnan(one[k : k + 24]).all() and np.isfinite(one[k + 25])


def test_event_bars_are_predicted_one_by_one_as_all_at_once(events):
    "A predictor that is given one bar at a time, behind stored history and across a hole, says what batch says."
    with connect(events) as con:
        run, bars = train_run(con, EVENTS, events), question.read_data(con, EVENTS).bars
    run.info["trained_until"] = bars.index[0].isoformat()  # so that bars of the training are predicted too
    k = int(np.flatnonzero(bars["gap"])[0])
    begin, end = k - 30, k + run.info["warmup"] + 60
    predictor = Predictor(run, bars.iloc[:begin])
    made = pd.concat([rows for i in range(begin, end) if not bars["gap"].iloc[i] and len(rows := predictor.update(bars.iloc[[i]]))])
    assert predictor.update(bars.iloc[begin:end]).empty and predictor.skipped["gap"] == 1
    whole = run.predict(bars)
    expected = whole[whole["first_id"].isin(bars["first_id"].iloc[begin:end])]
    assert made["first_id"].tolist() == expected["first_id"].tolist() and len(made) > 60
    assert np.allclose(made["prediction"].to_numpy(dtype=float), expected["prediction"], rtol=0, atol=1e-9)


def test_what_has_no_meaning_on_event_bars_is_refused(events):
    with connect(events) as con:
        bars = question.read_data(con, EVENTS).bars
    learned = SimpleNamespace(config=replace(EVENTS, spec="tick_imbalance:50"))
    with pytest.raises(ConfigError, match="derive their threshold"):
        Predictor(learned, pd.DataFrame())
    for asked in ("frames", "realised"):
        with pytest.raises(SchemaError, match="no common one"):
            DataProcessing(asked).process_data(bars)
    with pytest.raises(SchemaError, match="several lengths"):
        on_frame("4x", "ret_24")(bars)
    with pytest.raises(SchemaError, match="event bars"):
        with_symbol(bars, "ETH", bars)
    with pytest.raises(ConfigError, match=r"event bars such as tick:1000.*ticks:100"):  # a value that cannot work, not data that are refused
        replace(EVENTS, spec="ticks:100")


def test_a_run_on_indicators_of_pandas_ta_is_the_same_in_batch_and_live(store):
    config = replace(WALK, features=("returns", "ta:rsi(length=5)", "ta:macd(fast=3, slow=6, signal=3).MACDh"))
    with connect(store) as con:
        run = train_run(con, config, store)
        bars = question.read_data(con, config).bars
    names = ["ta_rsi_length_5", "ta_macd_fast_3_slow_6_signal_3_MACDh"]
    assert [f["name"] for f in run.info["features"]][-2:] == names
    assert {*names} <= {*run.info["identity"]["own_features"]}
    assert run.info["identity"]["libraries"]["pandas-ta"] != "absent"
    pandas_ta.MADE.clear()  # as in another process
    pandas_ta.indicator_features.cache_clear()
    later = random_walk(1600).iloc[1500:]
    more = bar_frame(pd.concat([bars.reset_index().rename(columns={"ts": "open_time"})[later.columns], later]), "1h", symbol="WALKUSDT")
    loaded = load_run(run.id, store)
    batch = loaded.predict(more).iloc[-30:]
    predictor = Predictor(loaded, more.iloc[:1570])
    live = pd.concat([predictor.update(more.iloc[[i]]) for i in range(1570, 1600)])
    assert len(live) == 30 and (live["prediction"].to_numpy() == batch["prediction"].to_numpy()).all()
    assert reproduce(run.id, store)["same"].all()
