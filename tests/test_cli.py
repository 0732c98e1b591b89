"""The command line as a user meets it: real processes, wrong input included."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import Command

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
    ("args", "told"),
    [
        (["ingest", "no-such-file.csv"], "no-such-file.csv"),
        (["ingest", "s3://btc/x.csv"], "MINIO_ENDPOINT"),
        (["train", "--symbol", "NOSUCH"], "a store at"),
        (["train", "--target", "luck"], "target"),
        (["train", "--param", "max_depth"], "name=value"),
        (["train", "--label", "up"], "--label name=value"),
        (["train", "--target", "triple_barrier", "--label", "up=-1"], "above 0"),
        (["train", "--target", "direction", "--model", "har"], "probabilities"),
        (["reproduce", "no-such-run"], "no-such-run"),
        (["bars", "BTCUSDT", "1fortnight"], "1fortnight"),
        (["predict", "no-such-run"], "no-such-run"),
        (["stream", "--seconds", "1", "--feed", "finnhub"], "FINNHUB_TOKEN"),
        (["stream", "--feed", "nasdaq"], "binance, finnhub"),
        (["live", "BTCUSDT", "--run", "no-such-run"], "no-such-run"),
        (["replay", "BTCUSDT"], "cryptoresearch"),
        (["replay", "BTCUSDT", "--port", "99999"], "65535"),
        (["forget", "no-such-file"], "no-such-file"),
        (["simulate", "files", "--start", "x"], "2024-01-01"),
        (["simulate", "files", "--kind", "quotes"], "quotes"),
        (["download", "BTCUSDT", "--from", "2022-13", "--to", "2022-14"], "2022-13"),
        (["compare", "no-such-run", "nor-this"], "no-such-run"),
        (["promote", "no-such-run"], "no-such-run"),
        (["runs", "delete", "no-such-run", "--yes"], "no-such-run"),
        (["audit", "--symbol", "NOSUCH"], "cryptoresearch"),
        (["tune", "--model", "oracle"], "oracle"),
        (["data", "verify"], "cryptoresearch"),
    ],
)
def test_wrong_input_is_told_in_a_sentence(run: Command, tmp_path: Path, args: list[str], told: str) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert told in done.stderr, done.stderr
    assert len(done.stderr) < 900, done.stderr


def test_a_wrong_setting_is_named(run: Command, tmp_path: Path) -> None:
    done = run(tmp_path, "runs", DUCKDB_MEMORY_LIMIT="lots")
    assert done.returncode == 2
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
