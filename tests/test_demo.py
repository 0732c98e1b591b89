"""The promise of the README: one command, the whole way, and seconds when it is repeated."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import Command
from rich.console import Console

from cryptoresearch import demo
from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.demo import run_demo
from cryptoresearch.runs.run import load_run
from cryptoresearch.serving.predictor import Predictor
from cryptoresearch.settings import Settings


@pytest.mark.slow
@pytest.mark.usefixtures("warm_kernels")
@pytest.mark.parametrize(
    ("minutes", "trades_per_day"), [pytest.param(15, 15_000, id="short"), pytest.param(demo.LIVE_MINUTES, 60_000, marks=pytest.mark.heavy, id="whole")]
)
def test_the_whole_way_twice(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, minutes: int, trades_per_day: int) -> None:
    monkeypatch.setattr(demo, "LIVE_MINUTES", minutes)
    settings = Settings(
        _env_file=None, duckdb_path=str(tmp_path / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"), archive_url="http://127.0.0.1:9",
        minio_endpoint=None, duckdb_memory_limit="1GB", duckdb_threads=2,
    )  # fmt: skip
    first, second = Console(record=True, width=200), Console(record=True, width=200)
    reports = run_demo(settings, first, trades_per_day=trades_per_day)
    again = run_demo(settings, second, trades_per_day=trades_per_day)

    told = first.export_text()
    assert "SIMULATED" in told
    assert "make dashboards" in told
    market, _, live = reports
    levels = [load_run(r.run_id, settings).info["level"] for r in reports]
    assert levels[:2] == ["skill", "none"], "real candles: the volatility can be forecast, the return cannot"
    assert told.index(str(market.report)) < told.index(str(live.report)), "the first report shows a real market"
    assert [r.run_id for r in again] == [r.run_id for r in reports]
    assert all(r.reused for r in again)
    assert "made before" in second.export_text()

    con = init_duckdb(settings)
    rows = con.execute("SELECT count(*), count(DISTINCT ts), min(ts), max(close_ts), any_value(source) FROM predictions").fetchone()
    assert rows is not None
    n, distinct, begin, end, source = rows
    assert (n, source) == (distinct, "replay")
    assert n >= minutes * 5 / 6, "a prediction for nearly each of the minutes"
    assert (end - begin).total_seconds() <= minutes * 60
    run = load_run(live.run_id, settings)
    trained_until = re.sub(r"\+00:00$", "", str(run.info["trained_until"]))
    assert str(begin) >= trained_until.replace("T", " ")[:19], "the live hour was kept back from training"
    # bars that come long after everything the store knows: nothing to predict yet, and no error
    later = read_bars(con, "SIMUSDT", "1m").tail(5).set_axis(pd.date_range("2024-06-01", periods=5, freq="1min", tz="UTC", name="ts"))
    lonely = Predictor(run, pd.DataFrame())
    assert lonely.update(later.assign(close_ts=later.index + pd.Timedelta("1min"))).empty
    assert lonely.skipped["warm-up"] == 5

    env = os.environ | {"DUCKDB_PATH": settings.duckdb_path, "RUNS_DIR": settings.runs_dir, "COLUMNS": "160", "NO_COLOR": "1"}
    for args, shown in ((["runs"], reports[1].run_id), (["reproduce", reports[1].run_id], "the same, bit for bit"), (["doctor"], "3 in ")):
        done = command(*args, env=env)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
    for report in reports:
        html = report.report.read_text(encoding="utf-8")
        assert ("SIMULATED" in html) == (report == live)
        assert not re.search(r"<(script|link)[^>]+(src|href)=.https?://", html), "the report works without internet"
        assert json.loads((report.folder / "run.json").read_text())["simulated"] is (report == live)
    trials = con.execute("SELECT run_id, trial, n FROM trials ORDER BY ALL").fetchall()
    for args, code in ((["runs", "delete", reports[1].run_id], 1), (["runs", "delete", reports[1].run_id, "--yes"], 0), (["reproduce", reports[1].run_id], 4)):
        done = command(*args, env=env)
        assert done.returncode == code, (args, done.stderr)
    assert con.execute("SELECT run_id, trial, n FROM trials ORDER BY ALL").fetchall() == trials, "what was tried stays counted"
