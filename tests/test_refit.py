"Refits of live runs: when they are due, what the gate decides, and what a restart finds."

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pandas as pd
import pytest

from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.errors import ConfigError
from cryptoresearch.evaluation.promotion import champion, promote, registry, registry_log
from cryptoresearch.ingest.files import process_file
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.run import question_key, Run, train_run
from cryptoresearch.serving import refit as module
from cryptoresearch.serving.predictor import Predictor, Saving
from cryptoresearch.serving.refit import Refits, resume
from cryptoresearch.settings import Settings, shared_data

HOURS = shared_data() / "BTCUSDT-1h-2017-08_2024-04.parquet"
CONFIG = RunConfig(
    spec="1h", target="volatility", horizon=4, start="2023-09-01", end="2024-02-01", test_start="2023-12-15", refit_every="30D",
    model="ridge", features=("ret_1", "rv_24"),
)  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, duckdb.DuckDBPyConnection]:
    folder = tmp_path_factory.mktemp("refit")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    con = init_duckdb(settings)
    process_file(con, HOURS, symbol="BTCUSDT", interval="1h")
    make_bars(con, "BTCUSDT", "1h", source="klines")
    return settings, con


@pytest.fixture
def case(store: Any, tmp_path: Path) -> Any:
    "A run in a folder of its own, and a session that predicts what `bars` names."
    settings, con = store[0].model_copy(update={"runs_dir": str(tmp_path / "runs")}), store[1]
    write(con, lambda c: c.execute("DELETE FROM predictions"))
    run = train_run(con, CONFIG, settings)
    return Session(settings, con, run)


class Session:
    "What refits need of a live session; the bars come from the store."

    def __init__(self, settings: Settings, con: duckdb.DuckDBPyConnection, run: Run) -> None:
        self.settings, self.con, self.run = settings, con, run
        self.live = SimpleNamespace(feed=SimpleNamespace(settings=settings, con=con, source="klines"), subscribe=self.subscribe)
        self.told: list[str] = []
        self.begin()

    def begin(self) -> None:
        "Start, or start again after a kill."
        self.line = resume(self.run, self.settings)
        self.refits = Refits(SimpleNamespace(live=self.live), [self.line], "10D")  # type: ignore[arg-type]

    def subscribe(self, callback: Any) -> None:
        self.callback = callback

    def bars(self, start: str, end: str) -> None:
        "Predict these bars by the runs of the line, then look until nothing is being trained."
        for run in self.line.runs:
            old, new = read_bars(self.con, "BTCUSDT", "1h", start="2023-11-01", end=start), read_bars(self.con, "BTCUSDT", "1h", start=start, end=end)
            rows = Predictor(run, old, source="klines").update(new)
            saving = Saving()
            saving.add(rows)
            saving.save(self.con, last=True)
            self.callback(rows)
        module._look(self.refits)
        module._look(self.refits)


class Inline:
    "Training in this process."

    def __init__(self, config: RunConfig, until: pd.Timestamp, settings: Settings, source: str) -> None:
        self.until, self.config, self.settings = until, replace(config, end=until.isoformat()), settings


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch, case: Session) -> None:
    monkeypatch.setattr(module, "Training", Inline)
    monkeypatch.setattr(module, "_outcome", lambda t: (train_run(case.con, t.config, t.settings).id, ""))
    for name in ("add_run", "drop_run", "watch_further", "forget"):
        monkeypatch.setattr(module, name, lambda session, run, name=name: case.told.append(f"{name} {run.id}"))
    monkeypatch.setattr(module, "report", lambda monitor, alert: case.told.append(alert.text))


def test_a_refit_is_due_once_a_period_and_the_gate_decides_a_period_later(case: Session) -> None:
    case.bars("2024-02-01", "2024-02-10 23:00")
    assert case.line.shadow is None and registry_log(case.settings).empty  # an hour too early
    case.bars("2024-02-10 23:00", "2024-02-11")
    shadow = case.line.shadow
    assert shadow is not None and shadow.config == replace(CONFIG, end="2024-02-11T00:00:00+00:00")
    assert registry(case.settings).loc[shadow.id, "state"] == "shadow" and f"add_run {shadow.id}" in case.told
    trials = case.con.execute("SELECT count(*) FROM trials WHERE run_id = ?", [shadow.id]).fetchall()
    assert trials == [(1,)]  # it counts as tried

    case.bars("2024-02-11", "2024-02-21")
    entry = registry_log(case.settings).query("run == @shadow.id").iloc[-1]
    assert entry["state"] == "candidate" and entry["n"] == 240 and entry["tried"] == 1
    assert case.line.current.id == case.run.id and f"drop_run {shadow.id}" in case.told
    assert case.line.shadow is not None and case.line.shadow.config.end == "2024-02-21T00:00:00+00:00"
    assert champion(*question_key(case.run), case.settings) is None


def test_a_better_challenger_replaces_the_run_and_a_restart_knows(case: Session) -> None:
    case.bars("2024-02-01", "2024-02-11")
    shadow = case.line.shadow
    assert shadow is not None
    case.bars("2024-02-11", "2024-02-20")
    spoil = "UPDATE predictions SET prediction = prediction / 5 WHERE run_id = ?"  # the run in use goes wrong
    write(case.con, lambda c: c.execute(spoil, [case.run.id]))
    case.begin()  # killed and started again
    assert [run.id for run in case.line.runs] == [case.run.id, shadow.id] and case.line.until == pd.Timestamp("2024-02-11", tz="UTC")
    case.bars("2024-02-20", "2024-02-21")
    states = registry(case.settings)["state"]
    assert states[shadow.id] == "champion" and case.line.current.id == shadow.id
    assert f"drop_run {case.run.id}" in case.told and any("is the champion now" in text for text in case.told)
    newest = case.line.shadow
    assert newest is not None
    case.begin()  # the same command again, with the name of the first run
    assert [run.id for run in case.line.runs] == [shadow.id, newest.id] and case.line.until == pd.Timestamp("2024-02-21", tz="UTC")
    assert case.con.execute("SELECT count(*) = count(DISTINCT (run_id, ts)) FROM predictions").fetchall() == [(True,)]


def test_another_champion_is_refused_and_too_few_outcomes_decide_nothing(case: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    case.bars("2024-02-01", "2024-02-11")
    shadow = case.line.shadow
    assert shadow is not None
    empty = pd.DataFrame({"y": [], "prediction": [], "state": []})
    monkeypatch.setattr(module, "live_outcomes", lambda *_, **__: empty)
    case.bars("2024-02-11", "2024-02-21")
    assert case.line.shadow is shadow and registry(case.settings).loc[shadow.id, "state"] == "shadow"
    assert any("too few outcomes" in text for text in case.told)
    other = train_run(case.con, replace(CONFIG, features=("rv_24",)), case.settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryptoresearch.evaluation.promotion.corrected_p", lambda p, n: 0.0)
        patch.setitem(other.info, "level", "skill")
        assert promote(other, case.settings).promoted
    with pytest.raises(ConfigError, match=f"Name that one: --run {other.id}"):
        resume(case.run, case.settings)
