"""The command line as a user meets it: real processes, wrong input included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import Command
from pyarrow import csv

from cryptoresearch.data.store import connect
from cryptoresearch.settings import Settings

COMMANDS = ["doctor", "ingest", "forget", "bars", "export", "simulate", "download", "data", "train", "tune", "audit", "compare", "evaluate", "features", "promote", "registry", "runs", "reproduce", "stream", "live", "replay", "predict", "api", "dashboards", "demo"]


@pytest.fixture
def run(command: Command) -> Command:
    "Runs the command line with a home of its own: `run(home, \"ingest\", file, DUCKDB_THREADS=\"1\")`."

    def call(home: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MINIO_", "DUCKDB_", "FINNHUB_", "RUNS_DIR"))}
        return command(*args, env=clean | {"CRYPTORESEARCH_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"} | env)

    return call


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run: Command, tmp_path: Path, name: str) -> None:
    done = run(tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert not list(tmp_path.iterdir()), "asking for help made files"


@pytest.mark.parametrize(
    ("args", "told", "code"),
    [
        (["ingest", "no-such-file.csv"], "no-such-file.csv", 4),
        (["ingest", "s3://btc/x.csv"], "MINIO_ENDPOINT", 3),
        (["train", "--symbol", "NOSUCH"], "a store at", 4),
        (["train", "--target", "luck"], "target", 2),
        (["train", "--param", "max_depth"], "name=value", 3),
        (["train", "--label", "up"], "--label name=value", 3),
        (["train", "--target", "triple_barrier", "--label", "up=-1"], "above 0", 3),
        (["train", "--target", "direction", "--model", "har"], "probabilities", 3),
        (["reproduce", "no-such-run"], "no-such-run", 4),
        (["bars", "BTCUSDT", "1fortnight"], "1fortnight", 5),
        (["predict", "no-such-run"], "no-such-run", 4),
        (["stream", "--seconds", "1", "--feed", "finnhub"], "FINNHUB_TOKEN", 3),
        (["stream", "--feed", "nasdaq"], "binance, finnhub", 3),
        (["live", "BTCUSDT", "--run", "no-such-run"], "no-such-run", 4),
        (["replay", "BTCUSDT"], "cryptoresearch", 4),
        (["replay", "BTCUSDT", "--port", "99999"], "65535", 2),
        (["forget", "no-such-file"], "no-such-file", 4),
        (["simulate", "files", "--start", "x"], "2024-01-01", 3),
        (["simulate", "files", "--kind", "quotes"], "quotes", 3),
        (["download", "BTCUSDT", "--from", "2022-13", "--to", "2022-14"], "2022-13", 3),
        (["compare", "no-such-run", "nor-this"], "no-such-run", 4),
        (["promote", "no-such-run"], "no-such-run", 4),
        (["runs", "delete", "no-such-run", "--yes"], "no-such-run", 4),
        (["audit", "--symbol", "NOSUCH"], "cryptoresearch", 4),
        (["tune", "--model", "oracle"], "oracle", 2),
        (["data", "verify"], "cryptoresearch", 4),
    ],
)
def test_wrong_input_is_told_in_a_sentence(run: Command, tmp_path: Path, args: list[str], told: str, code: int) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert told in done.stderr, done.stderr
    assert len(done.stderr) < 900, done.stderr


def test_a_wrong_setting_is_named(run: Command, tmp_path: Path) -> None:
    done = run(tmp_path, "runs", DUCKDB_MEMORY_LIMIT="lots")
    assert done.returncode == 3
    assert "DUCKDB_MEMORY_LIMIT" in done.stderr
    assert "4GB" in done.stderr


def test_doctor_fails_only_on_what_is_broken(run: Command, tmp_path: Path) -> None:
    assert run(tmp_path, "doctor").returncode == 0
    broken = run(tmp_path, "doctor", MINIO_ENDPOINT="127.0.0.1:9", MINIO_ACCESS_KEY="k3y-a", MINIO_SECRET_KEY="k3y-b", FINNHUB_TOKEN="t0k3n")
    assert broken.returncode == 1
    assert not any(word in broken.stdout + broken.stderr for word in ("k3y-a", "k3y-b", "t0k3n"))


def test_from_files_to_bars(run: Command, tmp_path: Path, shared: Path) -> None:
    files = [str(shared / f"BTCUSDT-trades-2024-08-0{d}.csv") for d in (8, 9)]
    first, again = run(tmp_path, "ingest", *files), run(tmp_path, "ingest", *files)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "9,738" in first.stdout
    assert "10,166" in first.stdout
    assert "already" in again.stdout
    assert run(tmp_path, "bars", "BTCUSDT", "1m", "1s").returncode == 0
    assert "19,904 trades" in " ".join(run(tmp_path, "doctor").stdout.split())


def test_exit_codes_are_documented_and_each_error_has_one(run: Command, tmp_path: Path) -> None:
    from cryptoresearch import errors
    from cryptoresearch.cli import EXIT_CODES

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CryptoResearchError)]
    assert all(kind.exit_code in EXIT_CODES and kind.exit_code not in (0, 2, 130) for kind in kinds)
    assert all("exit_code" in vars(kind) or kind.__mro__[1] is not errors.CryptoResearchError for kind in kinds), "a new class needs a code"
    told = " ".join(run(tmp_path, "--help").stdout.split())
    assert all(f"{code} {meaning}" in told for code, meaning in EXIT_CODES.items()), told


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_an_interrupted_load_ends_at_once_and_stores_nothing_of_the_file(tmp_path: Path, after_s: float) -> None:
    times = 1_704_067_200_000 + np.arange(2_000_000) // 2
    table = pa.table({"id": np.arange(len(times)), "price": np.full(len(times), 40_000.5), "qty": np.full(len(times), 0.01), "quote": np.full(len(times), 400.005), "time": times, "maker": np.arange(len(times)) % 2 == 0, "best": np.full(len(times), True)})
    file = tmp_path / "BTCUSDT-trades-2024-01-01.csv"
    csv.write_csv(table, file, csv.WriteOptions(include_header=False))
    work = tmp_path / "work"
    work.mkdir()
    env = os.environ | {"CRYPTORESEARCH_HOME": str(tmp_path), "TMPDIR": str(work)}
    line = [sys.executable, "-c", "from cryptoresearch.cli import main; main()"]
    load = subprocess.Popen([*line, "ingest", str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(work.rglob("*.parquet")) and not list(tmp_path.glob("data/lake/**/*.parquet")):
        assert load.poll() is None, load.communicate()
        time.sleep(0.02)
    time.sleep(after_s)
    assert load.poll() is None, "loaded before the interruption"
    load.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert load.stderr is not None
    told = load.stderr.readline()
    took = time.monotonic() - begun
    rest = load.communicate(timeout=60)[1]
    assert took < 2 and load.returncode == 130, (took, load.returncode, told, rest)
    assert told.startswith("interrupted") and not rest.strip()
    with connect(Settings(_env_file=None, duckdb_path=str(tmp_path / "data" / "catalog.sqlite")), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM trades").fetchone() == (0,)
