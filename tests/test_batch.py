"""A batch in processes of its own: failures, continuation, Ctrl-C, and the client of Dask as its executor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import Command

from cryptoresearch.serving.grid import Grid, read_grid, run_grid

WORK = """import time
from pathlib import Path
from cryptoresearch.errors import DataNotFound
Path(f"begun-{n}").touch()
if n == 2 and not Path("mended").exists():
    raise DataNotFound("no bars of two")
time.sleep(seconds if n == 3 else 0)
n * 10"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    "A grid of two combinations; the second fails until there is a file `mended`. A third one would take its time."
    work = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in ("n = 0\nseconds = 0\nhome = ''", "import os\nos.chdir(home)", WORK)])
    work.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(work, tmp_path / "work.ipynb")
    (tmp_path / "grid.yaml").write_text(f"notebook: work.ipynb\ngrid:\n  n: [1, 2]\nparameters:\n  home: {tmp_path}\n")
    return tmp_path / "grid.yaml"


def environment(home: Path) -> dict[str, str]:
    "The whole environment of a command."
    return {k: v for k, v in os.environ.items() if not k.startswith(("DUCKDB_", "RUNS_DIR"))} | {"CRYPTORESEARCH_HOME": str(home), "NO_COLOR": "1"}


def states(folder: Path) -> list[str]:
    "The states in the summary."
    return pd.read_csv(folder / "summary.csv")["state"].tolist()


@pytest.mark.slow
def test_a_failure_leaves_the_others_alone_and_is_repeated(command: Command, grid: Path, tmp_path: Path) -> None:
    first = command("batch", grid, "--output", tmp_path / "out", "--workers", "1", env=environment(tmp_path))
    assert first.returncode == 4, first.stdout + first.stderr  # of DataNotFound
    assert states(tmp_path / "out") == ["done", "failed"]
    lines = [line for line in first.stderr.splitlines() if " of 2  " in line]
    assert len(lines) == 2 and sum("failed" in line and "no bars of two" in line for line in lines) == 1
    assert (tmp_path / "out" / "index.html").read_text().count(">report</a>") == 1
    (tmp_path / "mended").touch()
    again = command("batch", grid, "--output", tmp_path / "out", "--workers", "1", env=environment(tmp_path))
    assert again.returncode == 0 and [line.split()[:4] for line in again.stderr.splitlines()] == [["2", "of", "2", "done"]], again.stderr
    assert states(tmp_path / "out") == ["done"] * 2 and not list((tmp_path / "out").glob(".tmp-*"))


@pytest.mark.heavy
def test_ctrl_c_ends_a_batch_at_once_and_the_next_one_continues(grid: Path, tmp_path: Path) -> None:
    grid.write_text(grid.read_text().replace("[1, 2]", "[1, 3, 4]") + "  seconds: 100\n")
    line = [sys.executable, "-c", "from cryptoresearch.cli import main; main()", "batch", str(grid), "--output", str(tmp_path / "out"), "--workers", "1"]
    batch = subprocess.Popen(line, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun-3").exists():
        assert batch.poll() is None, batch.communicate()
        time.sleep(0.05)
    batch.send_signal(signal.SIGINT)
    began = time.monotonic()
    told = batch.communicate(timeout=60)[1]
    assert batch.returncode == 130 and time.monotonic() - began < 50 and "interrupted" in told and "Traceback" not in told, told
    assert states(tmp_path / "out") == ["done"] and not (tmp_path / "begun-4").exists()
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline")] if Path("/proc/self").exists() else []
    assert not [found for found in running if str(tmp_path).encode() in found and b"ipykernel" in found]
    ran: list[int] = []
    asked = read_grid(grid)
    table = run_grid(Grid(asked.notebook, {"n": [1]}, asked.parameters), tmp_path / "out", told=lambda done, count, outcome: ran.append(done))
    assert not ran and table["state"].tolist() == ["done"]  # finished before the interruption


@pytest.mark.heavy
def test_dask_can_be_the_executor(grid: Path, tmp_path: Path) -> None:
    import distributed

    (tmp_path / "mended").touch()
    with distributed.Client(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as client:
        table = run_grid(read_grid(grid), tmp_path / "out", executor=client)
    assert table["state"].tolist() == ["done"] * 2
