"""The research pages, as a user makes them: commands in processes of their own, on real hours, looked at in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import nbformat
import pytest
from conftest import Command, examples
from cryptoresearch.runs.config import RunConfig

from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.evaluation.comparison import judge_lineup, line_up
from cryptoresearch.evaluation.overfitting import search_overfitting
from cryptoresearch.metrics.verdict import number
from cryptoresearch.evaluation.promotion import audit_of
from cryptoresearch.runs.run import Run, train_run
from cryptoresearch.runs.trials import question_of, read_trials, trial_sharpes
from cryptoresearch.serving.batch import notebook_path, outside
from cryptoresearch.settings import Settings

QUESTION = RunConfig(start="2021-01-01", end="2021-06-01", test_start="2021-04-01", refit_every="30D", horizon=4, model="ridge", features=("momentum", "returns"))
OPTIONS = ["--start", "2021-01-01", "--end", "2021-06-01", "--test-start", "2021-04-01", "--horizon", "4", "--feature", "momentum", "--feature", "returns"]
TRIALS = examples(5, 9)  # of the search
TEMPLATES = ("compare", "tune", "feature_report", "evaluate")


@dataclass(frozen=True)
class Desk:
    "A store with three runs, and what the commands said."

    settings: Settings
    runs: list[Run]
    call: Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, hours_in: Callable[[Path, str, str], Settings], command: Command) -> Desk:
    "Five real months of hours, two forecasts of volatility and one of returns."
    home = tmp_path_factory.mktemp("desk")
    s = hours_in(home, "2021-01-01", "2021-06-01")
    with init_duckdb(s) as con:
        good = replace(QUESTION, target="volatility", features=("volatility",))
        runs = [train_run(con, good, s), train_run(con, QUESTION, s)]
        time.sleep(1.1)  # records say when to the second, and the page shows the newest first
        runs.insert(1, train_run(con, replace(good, params={"penalty": 3e5}), s))

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MINIO_", "DUCKDB_", "FINNHUB_", "RUNS_DIR"))}
        env = clean | {"CRYPTORESEARCH_HOME": str(home), "DUCKDB_PATH": s.duckdb_path, "RUNS_DIR": str(s.runs_dir), "COLUMNS": "200", "NO_COLOR": "1"}
        return command(*args, env=env, timeout_s=240)

    return Desk(s, runs, call)


@pytest.fixture(scope="module")
def pages(desk: Desk) -> dict[str, tuple[Path, str, str]]:
    "Each template executed once by its command: the page, its text, what the command printed."
    asked = {
        "compare": ["compare", desk.runs[0].id, desk.runs[1].id, "--report"],
        "tune": ["tune", *OPTIONS, "--model", "ridge", "--param", "clip=6.5", "--embargo", "2h", "--weights", "recency:365D", "--refit", "30D", "--trials", str(TRIALS), "--folds", "3", "--report"],
        "feature_report": ["features", *OPTIONS, "--model", "lightgbm", "--report"],
        "evaluate": ["evaluate", desk.runs[2].id],
    }


    def make(name: str) -> tuple[Path, str, str]:
        done = desk.call(*asked[name])
        assert done.returncode == 0, done.stderr[-3000:]
        page = Path(re.findall(r"^report\s+(.+)$", done.stdout, re.MULTILINE)[-1].strip())
        return page, page.read_text(encoding="utf-8"), done.stdout

    with ThreadPoolExecutor(2) as pool:  # processes that share a store; the evaluation counts the search's trials
        halves = pool.map(lambda names: {name: make(name) for name in names}, (("tune", "evaluate"), ("compare", "feature_report")))
        return {name: made for half in halves for name, made in half.items()}


def words(page: str) -> str:
    "Text of a page without its markup and scripts."
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>|<style.*?</style>", " ", page, flags=re.DOTALL))).split())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_clean_and_travels(name: str) -> None:
    notebook = nbformat.read(notebook_path(f"research/{name}.ipynb"), as_version=4)
    assert sum("parameters" in c.metadata.get("tags", []) for c in notebook.cells) == 1
    assert not any(c.get("outputs") or c.get("execution_count") for c in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_page_stands_alone_with_the_verdict_on_top(name: str, pages: dict[str, tuple[Path, str, str]]) -> None:
    _, page, _ = pages[name]
    assert not outside(page)
    assert "Traceback" not in page and "import pandas" not in page
    assert page.count('class="verdict') == 1
    assert page.index('class="verdict') < page.index("<table") and page.index('class="verdict') < page.index('class="figure"')
    assert "The rules of the verdict" in page


@pytest.mark.slow
def test_the_comparison_says_what_the_functions_say(desk: Desk, pages: dict[str, tuple[Path, str, str]]) -> None:
    _, page, told = pages["compare"]
    found = judge_lineup(line_up(desk.runs[:2]))
    text = words(page)
    assert found.sentence in text and found.sentence in " ".join(told.split())
    assert f"Verdict: {found.label}" in text and found.label == "A is better"
    assert " har " in text  # in addition to last and ewma
    assert "params.penalty" in text and "300000.0" in text
    assert all(run.id in text for run in desk.runs[:2]) and "in the model confidence set" in text


@pytest.mark.slow
def test_the_search_tells_its_trials_and_what_it_did_not_see(desk: Desk, pages: dict[str, tuple[Path, str, str]]) -> None:
    page, html_text, told = pages["tune"]
    text = words(html_text)
    assert "everything from 2021-04-01 00:00 to 2021-06-01 00:00" in text and "which no trial has seen" in text
    study = re.search(rf"study\s+(\S+): {TRIALS} trials", told)
    assert study and study[1] in text and page.parent.name == study[1]
    with connect(desk.settings, read_only=True) as con:
        counted = con.execute("SELECT count(*) FROM trials WHERE run_id = ?", [study[1]]).fetchone()
    assert counted == (TRIALS,), "the report tried again"
    assert f"{TRIALS} , each with its returns" in text or f"{TRIALS}, each with its returns" in text
    assert "fixed: clip = 6.5" in text and "--param clip=6.5" in text and "--param penalty=" in text
    with connect(desk.settings, read_only=True) as con:
        model = json.loads(con.execute("SELECT model FROM trials WHERE run_id = ? LIMIT 1", [study[1]]).fetchone()[0])
    assert (model["embargo"], model["weights"], model["refit_every"], model["params"]["clip"]) == ("2h", "recency:365D", "30D", 6.5)
    assert html_text.count('id="figure-') >= 5  # folds of the search, history, pruning, importances, slices


@pytest.mark.slow
def test_the_feature_report_names_every_feature_and_proves_them(pages: dict[str, tuple[Path, str, str]]) -> None:
    text = words(pages["feature_report"][1])
    listed = [name for name in ("rsi_14", "macd_26", "ret_1", "ret_168", "autocorr_72") if name not in text]
    assert not listed, listed
    assert "does not look ahead 19 of 19" in text and "none of the 19 features looks ahead" in text
    assert "those from 2021-04-01 on are kept for a test" in text


@pytest.mark.slow
def test_the_evaluation_has_every_part(desk: Desk, pages: dict[str, tuple[Path, str, str]]) -> None:
    text = words(pages["evaluate"][1])
    assert desk.runs[2].id in text
    for part in ("rank IC", "Brier score of a rise", "Winkler score", "95% interval", "volatility: high", "hour: 18-23", "year: 2021", "in proportion", "interval clears the cost", "capacity", "random as good", "shuffled labels", "planted signal", "planted leak", "The audit", "probability of backtest overfitting"):
        assert part in text, part
    with connect(desk.settings, read_only=True) as con:
        asked, n = question_of(QUESTION), len(read_trials(con, question_of(QUESTION)))
        counted = len(trial_sharpes(con, asked.spec))
    assert n == TRIALS + 1 and f"trials of the same target {n}" in text  # those of the search too
    assert f"number of trials {counted}" in text and f"left out: {TRIALS} of other times" in text  # the search lies before the test
    assert "models tested on these rows 1" in text and "corrected for these models p" in text
    for part in ("quantiles of 90 days", "base rate", "IC by month", "IC by hour of the day", "above zero"):
        assert part in text, part
    assert audit_of(desk.runs[2])["verdict"].startswith("audit")  # stored next to the run, for the registry
    for cost in ("bp of half-spread a side", "square-root impact", "funding of 1 bp per 8 hours", "2 bars after the decision", "and one bar late"):
        assert cost in text, cost


@pytest.mark.slow
def test_no_sharpe_ratio_stands_alone(desk: Desk, pages: dict[str, tuple[Path, str, str]]) -> None:
    "Every page has the deflated ratio, the trials behind it and the probability of overfitting, or says that there is no strategy."
    said = {name: words(page) for name, (_, page, _) in pages.items()}
    for name in ("compare", "evaluate"):
        for part in ("deflated Sharpe ratio (probability)", "number of trials", "effective number of trials", "probability of backtest overfitting", "corrected for these models"):
            assert part in said[name], (name, part)
    for part in ("deflated Sharpe ratio of the best trial", "number of trials", "effective number of trials, search", "PBO of the search"):
        assert part in said["tune"], part
    with connect(desk.settings, read_only=True) as con:
        rows = read_trials(con, question_of(QUESTION))
        study = rows.loc[rows["trial"].str.startswith("trial "), ["run_id", "origin"]].drop_duplicates()
        found = search_overfitting(con, *study.iloc[0])
    assert len(study) == 1 and found.n_trials == TRIALS and 2 <= found.aligned.compared <= TRIALS and 0 <= found.aligned.pbo <= 1
    assert f"PBO of the search {number(found.aligned.pbo, '.0%')}" in said["tune"]
    assert said["feature_report"].count("there is no Sharpe ratio to deflate") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_run_is_audited_as_it_is(desk: Desk, number: int) -> None:
    for run in (desk.runs[number],):
        done = desk.call("audit", run.id, "--draws", "1")
        good = "audit passed" in done.stdout
        assert done.returncode == (0 if good else 6) and (good or (run.config.target == "return" and "found no leak" in done.stdout)), done.stdout + done.stderr[-2000:]  # two months of returns may be too few for a weak signal
        found = dict(re.findall(r"^ *(as it is|planted leak|random walk) .* (\d{3,}) ", done.stdout, re.MULTILINE))
        n = str(run.info["scores"]["model"]["n"])
        assert found["as it is"] == n and abs(int(found["planted leak"]) - int(n)) < 30, done.stdout  # the run's own test, in every world


@pytest.mark.slow
def test_a_report_says_whether_it_was_audited(desk: Desk) -> None:
    asked = ["train", *OPTIONS, "--refit-every", "30D", "--model", "ridge"]
    run = desk.runs[2].id
    page = desk.settings.path(desk.settings.runs_dir) / run / "report.html"
    page.with_name("audit.json").unlink(missing_ok=True)  # of another test; a report tells of a stored audit
    first = desk.call(*asked)
    assert first.returncode == 0 and f"Not audited. Run: cryptoresearch audit {run}" in words(page.read_text(encoding="utf-8")), first.stderr[-2000:]
    second = desk.call(*asked, "--audit")
    assert second.returncode == 0 and "The audit" in words(page.read_text(encoding="utf-8")) and "Not audited" not in words(page.read_text(encoding="utf-8")), second.stderr[-2000:]
    again = desk.call(*asked)
    assert "nothing to do" in again.stdout and "planted leak" in words(page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_wrong_questions_are_told_in_a_sentence(desk: Desk) -> None:
    two = desk.call("compare", desk.runs[0].id, desk.runs[2].id, "--report")
    assert two.returncode == 5 and "the same target" in two.stderr and "Traceback" not in two.stderr
    none = desk.call("features", "--feature", "crystal_ball", "--report")
    assert none.returncode == 4 and "crystal_ball" in none.stderr and "Traceback" not in none.stderr
    listed = desk.call("features", "--feature", "momentum")
    assert listed.returncode == 0 and "rsi_14" in listed.stdout


@pytest.mark.slow
@pytest.mark.browser
def test_the_pages_in_a_browser(pages: dict[str, tuple[Path, str, str]], page: Any) -> None:
    "Every figure is drawn, nothing is wider than the window, on a telephone too, nothing comes from elsewhere."
    for name, (path, text, _) in pages.items():
        page.set_viewport_size({"width": 1200, "height": 900})
        page.goto(path.as_uri())
        assert page.locator("details[open]").count() == 0, name  # everything below the verdict is folded
        page.click("#open-all")
        page.wait_for_selector(".js-plotly-plot .main-svg", timeout=90_000)
        assert page.locator(".js-plotly-plot").count() == text.count('id="figure-'), name
        for width in (1200, 390):
            page.set_viewport_size({"width": width, "height": 900})
            fits = f"document.documentElement.scrollWidth <= {width} && [...document.querySelectorAll('.js-plotly-plot .main-svg')].every(e => e.getBoundingClientRect().right <= {width} + 1)"
            page.wait_for_function(fits, timeout=60_000)
        assert text.count('"showSendToCloud":false') == 1  # of all figures: no button that uploads a figure
        assert page.locator("[data-title*='hare chart']").count() == 0
    assert not page.errors and not page.outside


@pytest.mark.slow
@pytest.mark.browser
def test_two_runs_are_compared_on_a_page_of_the_dashboard(desk: Desk, page: Any, process: Any) -> None:
    "The page offers comparable runs, shows which is better, and changes the sign when they are swapped."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    serve = "import sys; from cryptoresearch.serving.dashboards import dashboards; dashboards(port=int(sys.argv[1]))"
    server = process([sys.executable, "-c", serve, port], env={"DUCKDB_PATH": desk.settings.duckdb_path, "RUNS_DIR": str(desk.settings.runs_dir)})
    for _ in range(240):
        assert server.poll() is None, "Voila ended"
        try:
            httpx.get(f"http://127.0.0.1:{port}/voila/static/voila.js", timeout=5)
            break
        except httpx.HTTPError:
            time.sleep(0.25)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"http://127.0.0.1:{port}/voila/render/compare.ipynb", timeout=120_000)
    page.wait_for_selector(".verdict", timeout=120_000)
    verdict = page.locator(".verdict")
    before = verdict.inner_text()
    assert "B is better" in before or "B IS BETTER" in before  # the newest run is A, and it is the rough one
    lists = page.locator("select")
    assert lists.count() == 3 and lists.nth(0).locator("option").count() == 1  # the run on returns has no rival
    lists.nth(0).scroll_into_view_if_needed()
    lists.nth(1).select_option(index=1)
    page.wait_for_function("document.querySelector('.cr-provenance')?.textContent.includes('two different runs')", timeout=60_000)
    lists.nth(2).select_option(index=0)
    page.wait_for_function("/A is better/i.test(document.querySelector('.verdict')?.textContent)", timeout=60_000)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert page.errors == [] and page.outside == []
