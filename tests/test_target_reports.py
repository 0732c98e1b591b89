"""Audit, evaluation, search and feature report of probabilities and of event bars, by their commands."""

from __future__ import annotations

import html
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Command
from cryptoresearch.runs.config import RunConfig

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.runs.run import Run, train_run
from cryptoresearch.settings import Settings

HOURS = RunConfig(target="direction", start="2021-01-01", end="2021-06-01", test_start="2021-04-01", refit_every="30D", horizon=4, model="ridge", features=("momentum", "returns"))
MONEY = RunConfig("SIMUSDT", "dollar:100000", target="triple_barrier", label={"window": 100}, horizon=2, refit_every="12h", model="ridge", features=("returns",))
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Floor:
    "A store with a run of each kind."

    settings: Settings
    hours: Run
    money: Run
    call: Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory, hours_in: Callable[[Path, str, str], Settings], command: Command) -> Floor:
    "Five real months of hours, and four simulated days of trades in dollar bars."
    home = tmp_path_factory.mktemp("floor")
    s = hours_in(home, "2021-01-01", "2021-06-01")
    with init_duckdb(s) as con:
        for file in simulate_trades(home / "sim", "SIMUSDT", days=4, trades_per_day=30_000):
            process_file(con, str(file))
        make_bars(con, "SIMUSDT", "dollar:100000")
        runs = [train_run(con, c, s) for c in (HOURS, MONEY)]

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MINIO_", "DUCKDB_", "FINNHUB_", "RUNS_DIR"))}
        env = clean | {"CRYPTORESEARCH_HOME": str(home), "DUCKDB_PATH": s.duckdb_path, "RUNS_DIR": str(s.runs_dir), "COLUMNS": "200", "NO_COLOR": "1"}
        return command(*args, env=env, timeout_s=400)

    return Floor(s, *runs, call)


def page_of(done: subprocess.CompletedProcess[str]) -> str:
    "Text of the page that a command wrote."
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    page = Path(re.findall(r"^report\s+(.+)$", done.stdout, re.MULTILINE)[-1].strip()).read_text(encoding="utf-8")
    assert "Traceback" not in page and page.count('class="verdict') == 1
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>|<style.*?</style>", " ", page, flags=re.DOTALL))).split())


HEAVY = pytest.mark.heavy
KINDS = [pytest.param("hours", marks=HEAVY), "money"]  # hours: test_research_templates evaluates and audits runs on them


@pytest.mark.parametrize("kind", KINDS)
def test_a_probability_is_evaluated_in_full(floor: Floor, kind: str) -> None:
    text = page_of(floor.call("evaluate", getattr(floor, kind).id, "--no-audit"))
    for part in ("Brier score", "AUC", "log loss", "base", "half", "persistence", "volatility: high", "hour: 18-23", "slope", "reliability", "resolution", "in proportion", "expected return clears the cost", "and one bar late"):
        assert part in text, part
    assert ("and no impact" in text) == (kind == "money")  # event bars have no day


@pytest.mark.parametrize("kind", KINDS)
def test_a_probability_is_audited(floor: Floor, kind: str) -> None:
    run: Run = getattr(floor, kind)
    done = floor.call("audit", run.id, "--draws", "1")
    good = "audit passed" in done.stdout
    assert done.returncode == (0 if good else 6) and (good or "found no leak" in done.stdout), done.stdout + done.stderr[-2000:]  # so few rows may miss a weak signal
    assert ("walk of constant volatility" in done.stdout) == (kind == "money") and " auc " in done.stdout


BARRIERS = ["--target", "triple_barrier", "--label", "window=100", "--horizon", "4", "--test-start", "2021-04-01"]
DIRECTION = ["--symbol", "SIMUSDT", "--bars", "dollar:100000", "--target", "direction", "--horizon", "4"]
QUESTIONS = [
    ([*BARRIERS, "--start", "2021-02-01", "--end", "2021-05-01"], "14D"),
    pytest.param([*BARRIERS, "--start", "2021-01-01"], "12h", marks=HEAVY),
    pytest.param(DIRECTION, "12h", marks=HEAVY),
]


@pytest.mark.parametrize(("question", "refit"), QUESTIONS)
def test_every_target_is_searched_and_its_features_reported(floor: Floor, question: list[str], refit: str) -> None:
    few = ["--feature", "ret_1", "--feature", "ret_6", "--feature", "ret_24"]  # short warm-ups
    done = floor.call("tune", *question, *few, "--model", "ridge", "--refit", refit, "--trials", "3", "--folds", "2", "--report")
    text = page_of(done)
    assert "log loss over the inner folds" in text and "each with its returns" in text
    assert ("window 100" in text) == ("triple_barrier" in question)
    study = re.search(r"study\s+(\S+): 3 trials", done.stdout)
    with connect(floor.settings, read_only=True) as con:
        assert study and con.execute("SELECT count(*), min(kind) FROM trials WHERE run_id = ?", [study[1]]).fetchone() == (3, "return")
    text = page_of(floor.call("features", *question, *few, "--model", "lightgbm", "--report"))
    assert "Log loss of lightgbm" in text and "does not look ahead" in text and "mutual information" in text.lower()
