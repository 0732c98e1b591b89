"""The data report and the commands about data, as a user meets them: real processes, a real browser."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import Command
from typer.testing import CliRunner

from cryptoresearch.cli import app
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import DataNotFound
from cryptoresearch.serving.batch import outside, run_notebook
from cryptoresearch.settings import Settings

pytestmark = pytest.mark.usefixtures("warm_kernels")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Settings:
    "Two days of a thin market, one between them left out, with bad rows and missing ids; ten minutes of BTCUSDT; candles."
    home = tmp_path_factory.mktemp("report")
    s = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / "runs"), duckdb_memory_limit="1GB", duckdb_threads=1)
    con = init_duckdb(s)
    for day in (11, 13):
        name = f"XRPETH-aggTrades-2019-10-{day}.csv"
        lines = (shared / name).read_text().splitlines()
        if day == 13:
            lines[100] = "garbage"
            del lines[1000:1040]
        (home / name).write_text("\n".join(lines) + "\n")
        process_file(con, home / name)
    process_file(con, shared / "BTCUSDT-1h-2017-08_2024-04.parquet", symbol="BTCUSDT", kind="klines", interval="1h")
    con.close()
    return s


@pytest.fixture(scope="module")
def report(store: Settings, warm_kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The page about XRPETH."
    return run_notebook("research/data_report.ipynb", {"symbol": "XRPETH"}, tmp_path_factory.mktemp("out"), settings=store)["report"]


def test_the_report_tells_what_is_wrong(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert not outside(text)
    for told in ("XRPETH from aggTrades: full of holes", "2019-10-12 to 2019-10-12", "garbage", "bounds", "4,134", "agreement", "loaded"):
        assert told in text, told
    assert "Traceback" not in text


@pytest.mark.slow
def test_parameters_arrive(store: Settings, tmp_path: Path) -> None:
    done = run_notebook("research/data_report.ipynb", {"symbol": "BTCUSDT", "source": "klines", "start": "2020-01-01", "end": "2020-01-11"}, tmp_path, settings=store)
    text = done["report"].read_text(encoding="utf-8")
    assert "BTCUSDT from klines: usable with 28 gaps" in text
    assert "24 on 2020-01-01" in text and ">10<" in text  # ten days
    with pytest.raises(DataNotFound, match="NOSUCH"):
        run_notebook("research/data_report.ipynb", {"symbol": "NOSUCH"}, tmp_path / "x", settings=store)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_in_a_browser(report: Path, page, width: int) -> None:
    "Every figure is drawn, nothing is wider than the window, nothing comes from elsewhere."
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(report.as_uri())
    page.click("#open-all")
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=30_000)
    page.wait_for_timeout(500)
    assert page.locator(".js-plotly-plot").count() == text_figures(report)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.errors and not page.outside
    assert page.locator(".verdict.bad").count() == 1


def text_figures(report: Path) -> int:
    "Figures of a page."
    return report.read_text(encoding="utf-8").count('id="figure-')


@pytest.mark.parametrize(
    "args", [("data", "report", "NOSUCH"), ("data", "report", "BTCUSDT", "--source", "finnhub"), ("features", "--symbol", "NOSUCH", "--report")]
)
def test_a_report_without_data_leaves_no_folder(store: Settings, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    home = Path(store.runs_dir).parent
    for name, value in (("CRYPTORESEARCH_HOME", home), ("DUCKDB_PATH", store.duckdb_path), ("RUNS_DIR", store.runs_dir)):
        monkeypatch.setenv(name, str(value))
    before = [p for p in sorted(home.rglob("*")) if p.is_dir()]
    refused = CliRunner().invoke(app, list(args))
    assert isinstance(refused.exception, DataNotFound), refused
    assert [p for p in sorted(home.rglob("*")) if p.is_dir()] == before


@pytest.mark.slow
def test_the_commands(store: Settings, tmp_path: Path, command: Command) -> None:
    def run(store: Settings, *args: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"DUCKDB_PATH": store.duckdb_path, "RUNS_DIR": store.runs_dir, "COLUMNS": "160", "NO_COLOR": "1"}
        return command("data", *args, env=env)

    shown = run(store, "status").stdout
    assert "XRPETH" in shown and "full of holes" in shown and "usable with 28 gaps" in shown and "█" in shown
    assert "loaded" in run(store, "log", "XRPETH").stdout
    assert "as the ledger says" in run(store, "verify").stdout
    assert "snapshots expired" in run(store, "maintain", "--keep", "1d").stdout
    assert "Backup(saved.tar" in run(store, "backup", str(tmp_path / "saved.tar")).stdout
    new = store.model_copy(update={"duckdb_path": str(tmp_path / "new" / "catalog.sqlite")})
    done = run(new, "restore", str(tmp_path / "saved.tar"))
    assert done.returncode == 0, done.stderr
    assert "as the ledger says" in done.stdout
