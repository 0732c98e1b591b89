"""The command line as a user meets it: real processes, wrong input included."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest
import typer
from conftest import Command, COMMAND_LINE, examples
from pyarrow import csv
from typer.testing import CliRunner

from cryptoresearch import cli
from cryptoresearch.cli_research import take_symbol
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.ingest.files import process_file
from cryptoresearch.runs import stored
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.run import train_run
from cryptoresearch.settings import Settings

COMMANDS = ["doctor", "ingest", "forget", "bars", "export", "simulate", "download", "data", "train", "tune", "audit", "compare", "evaluate", "features", "promote", "registry", "runs", "reproduce", "stream", "live", "scores", "replay", "predict", "api", "dashboards", "lab", "mcp", "batch", "demo"]


@pytest.fixture
def run(command: Command) -> Command:
    "Runs the command line with a home of its own: `run(home, \"ingest\", file, DUCKDB_THREADS=\"1\")`."

    def call(home: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MINIO_", "DUCKDB_", "FINNHUB_", "RUNS_DIR"))}
        return command(*args, env=clean | {"CRYPTORESEARCH_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"} | env)

    return call


@pytest.mark.parametrize("name", [name if name == "train" else pytest.param(name, marks=pytest.mark.heavy) for name in COMMANDS])
def test_a_process_that_asks_for_help_makes_no_files(run: Command, tmp_path: Path, name: str) -> None:
    done = run(tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, [name, "--help"], env={"CRYPTORESEARCH_HOME": str(tmp_path), "COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "Usage:" in done.output
    assert not list(tmp_path.iterdir()), "asking for help made files"


@pytest.mark.parametrize(
    ("args", "told", "code"),
    [
        (["ingest", "no-such-file.csv"], "no-such-file.csv", 4),
        (["ingest", "s3://btc/x.csv"], "MINIO_ENDPOINT", 3),
        (["ingest", "x.csv", "--columns", "Last=price,Size"], "found 'Size'", 3),
        (["train", "--symbol", "NOSUCH"], "a store at", 4),
        (["train", "--target", "luck"], "target", 2),
        (["train", "--param", "max_depth"], "name=value", 3),
        (["train", "--label", "up"], "--label name=value", 3),
        (["reproduce", "no-such-run"], "no-such-run", 4),
        (["bars", "BTCUSDT", "1fortnight"], "1fortnight", 3),
        (["export", "BTCUSDT", "--bars", "1x", "--to", "x.csv"], "1x", 3),
        (["predict", "no-such-run"], "no-such-run", 4),
        (["stream", "--seconds", "1", "--feed", "finnhub"], "FINNHUB_TOKEN", 3),
        (["stream", "--feed", "nasdaq"], "binance, finnhub", 3),
        (["live", "BTCUSDT", "--run", "no-such-run"], "no-such-run", 4),
        (["replay", "BTCUSDT"], "cryptoresearch", 4),
        (["replay", "BTCUSDT", "--port", "99999"], "65535", 2),
        (["forget", "no-such-file"], "a store at", 4),
        (["simulate", "files", "--start", "x"], "2024-01-01", 3),
        (["simulate", "files", "--kind", "quotes"], "quotes", 3),
        (["download", "BTCUSDT", "--from", "2022-13", "--to", "2022-14"], "2022-13", 3),
        (["compare", "no-such-run", "nor-this"], "no-such-run", 4),
        (["promote", "no-such-run"], "no-such-run", 4),
        (["runs", "delete", "no-such-run", "--yes"], "no-such-run", 4),
        (["audit", "--symbol", "NOSUCH"], "cryptoresearch", 4),
        (["audit", "BTC?USDT"], "a symbol such as", 5),
        (["tune", "BTC?USDT"], "a symbol such as", 5),
        (["tune", "--model", "oracle"], "oracle", 2),
        (["train", "DOTUSDT", "--symbol", "ETHUSDT"], "found DOTUSDT and --symbol ETHUSDT", 3),
        (["tune", "DOTUSDT", "--symbol", "BTCUSDT"], "found DOTUSDT and --symbol BTCUSDT", 3),
        (["audit", "DOTUSDT", "--symbol", "ETHUSDT"], "found DOTUSDT and --symbol ETHUSDT", 3),
        (["train", "BTCUSDT", "--symbol", "btcusdt"], "a store at", 4),
        (["data", "verify"], "cryptoresearch", 4),
    ],
)
def test_wrong_input_is_told_in_a_sentence(run: Command, tmp_path: Path, args: list[str], told: str, code: int) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert told in done.stderr, done.stderr
    assert len(done.stderr) < 900, done.stderr


@pytest.fixture(scope="module")
def hour_store(hours_in: Callable[[Path, str, str], Settings], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return hours_in(tmp_path_factory.mktemp("hours"), "2024-01-01", "2024-01-05")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--target", "triple_barrier", "--label", "up=-1"], "above 0"),
        (["--target", "direction", "--model", "har"], "probabilities"),
        (["--bars", "1x"], "1x"),
        (["--train-window", "365D"], "--train-window"),
    ],
)
def test_a_wrong_option_of_a_training_is_told(run: Command, hour_store: Settings, args: list[str], told: str) -> None:
    done = run(Path(hour_store.duckdb_path).parent, "train", *args, DUCKDB_PATH=hour_store.duckdb_path)
    assert done.returncode == 3, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert told in done.stderr and len(done.stderr) < 900, done.stderr


def test_a_file_in_the_place_of_a_folder_is_named(run: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for folder in ("taken", "taken/below"):
        done = run(tmp_path, "lab", "--folder", str(tmp_path / folder))
        assert done.returncode == 3 and f"a folder at {tmp_path / folder}; found a file there" in done.stderr, done.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_wrong_setting_is_named(run: Command, tmp_path: Path) -> None:
    done = run(tmp_path, "runs", DUCKDB_MEMORY_LIMIT="lots")
    assert done.returncode == 3
    assert "DUCKDB_MEMORY_LIMIT" in done.stderr
    assert "4GB" in done.stderr


def test_doctor_fails_only_on_what_is_broken(run: Command, tmp_path: Path) -> None:
    checks = json.loads(run(tmp_path, "doctor", "--json").stdout)
    assert len(checks) > 5 and {check["state"] for check in checks} == {"ok", "absent"}
    assert run(tmp_path, "doctor").returncode == 0
    broken = run(tmp_path, "doctor", MINIO_ENDPOINT="127.0.0.1:9", MINIO_ACCESS_KEY="k3y-a", MINIO_SECRET_KEY="k3y-b", FINNHUB_TOKEN="t0k3n")
    assert broken.returncode == 1
    assert not any(word in broken.stdout + broken.stderr for word in ("k3y-a", "k3y-b", "t0k3n"))


@pytest.mark.parametrize("short", ["5s", pytest.param("1s", marks=pytest.mark.heavy)])
def test_from_files_to_bars(run: Command, tmp_path: Path, shared: Path, short: str) -> None:
    files = [str(shared / f"BTCUSDT-trades-2024-08-0{d}.csv") for d in (8, 9)]
    first, again = run(tmp_path, "ingest", *files), run(tmp_path, "ingest", *files)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "9,738" in first.stdout
    assert "10,166" in first.stdout
    assert "already" in again.stdout
    assert run(tmp_path, "bars", "BTCUSDT", "1m", short).returncode == 0
    assert "19,904 trades" in " ".join(run(tmp_path, "doctor").stdout.split())


def test_exit_codes_are_documented_and_each_error_has_one(run: Command, tmp_path: Path) -> None:
    from cryptoresearch import errors
    from cryptoresearch.cli import EXIT_CODES

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CryptoResearchError)]
    assert all(kind.exit_code in EXIT_CODES and kind.exit_code not in (0, 2, 130) for kind in kinds)
    assert all("exit_code" in vars(kind) or kind.__mro__[1] is not errors.CryptoResearchError for kind in kinds), "a new class needs a code"
    told = " ".join(run(tmp_path, "--help").stdout.split())
    assert all(f"{code} {meaning}" in told for code, meaning in EXIT_CODES.items()), told


def all_commands(group: Any = None, above: str = "") -> dict[str, Any]:
    "Every command and group by its full name."
    found = {}
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        found[above + name] = command
        found |= all_commands(command, f"{above}{name} ") if hasattr(command, "commands") else {}
    return found


def test_the_help_page_is_a_table_of_contents(run: Command, tmp_path: Path) -> None:
    done = run(tmp_path, "--help", COLUMNS="80")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    panels = [line.split()[1] for line in lines if line.startswith("╭")]
    assert panels == ["Options", "Data", "Research", "Live", "Serve", "Check"]
    told = [line for line in lines if line.startswith("│ ") and not line.startswith(("│ --", "│  "))]
    named = [line.split()[1] for line in told]
    assert sorted(named) == sorted(COMMANDS) and named == [name for panel in cli.PAGES.values() for name in panel]
    assert all(line.rstrip("│ ").endswith(".") for line in told), "one line for each command"
    below = run(tmp_path, "data", "--help", COLUMNS="80").stdout.splitlines()
    assert all(line.rstrip("│ ").endswith(".") for line in below if line.startswith("│ ") and "--" not in line)


@pytest.mark.parametrize("name", all_commands())
def test_the_examples_of_each_command_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "find_folder", str)  # the runs of the examples are not stored here
    examples = [line.strip() for line in (all_commands()[name].epilog or "").splitlines()[1:]]
    assert examples, "a command without an example"
    for line in examples:
        assert len(line) <= 78, "wraps at 80 columns"
        parse_line(line, name)


def parse_line(line: str, name: str) -> None:
    "Parse a command line as the program does, without running the command."
    words = shlex.split(line)
    assert words.pop(0) == "cryptoresearch"
    context, command = None, typer.main.get_command(cli.app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert command.name == name.split()[-1] or command.name in name.split() or hasattr(all_commands()[name], "commands")
    if words or not command.no_args_is_help:
        command.make_context(command.name, words, parent=context)


def test_an_example_with_an_unknown_option_is_found() -> None:
    with pytest.raises(Exception, match="--modle"):
        parse_line("cryptoresearch train BTCUSDT --modle ridge", "train")


def read_json(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    "The one value on standard output, without NaN."
    assert done.returncode == code, done.stdout + done.stderr

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(done.stdout, parse_constant=refuse)


def trades(seed: int, n: int = 4_000) -> pd.DataFrame:
    "Ten hours of trades as the archive has them."
    rng = np.random.default_rng(seed)
    ms = np.sort(rng.integers(0, 600 * 60_000, n)) + 1_704_067_200_000
    price, qty = np.round(100 * np.exp(np.cumsum(rng.normal(0, 2e-4, n))), 2), np.round(rng.lognormal(0, 1, n), 3)
    return pd.DataFrame({"id": np.arange(n) + 1, "price": price, "qty": qty, "quote": price * qty, "ms": ms, "maker": rng.random(n) < 0.5, "best": True})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A home with a store of two symbols, and two runs on the first."
    folder = tmp_path_factory.mktemp("home")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "data" / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        for seed, symbol in enumerate(("AAAUSDT", "BBBUSDT")):
            trades(seed).to_csv(folder / f"{symbol}-trades-2024-01-01.csv", header=False, index=False)
            process_file(con, folder / f"{symbol}-trades-2024-01-01.csv")
        make_bars(con, "AAAUSDT", "1m")
        for seed in (1, 2):
            asked = RunConfig("AAAUSDT", "1m", horizon=3, features=("ret_1", "ret_3"), model="ridge", seed=seed, test_start="2024-01-01 05:00", refit_every="120min")
            train_run(con, asked, settings)
    return folder


def test_json_of_the_store(run: Command, home: Path, tmp_path: Path) -> None:
    found = read_json(run(home, "data", "status", "--json"))
    assert [row["symbol"] for row in found] == ["AAAUSDT", "BBBUSDT"] and found[0]["rows"] == 4_000
    assert found[0]["start"].startswith("2024-01-01T00:") and found[0]["start"].endswith("+00:00") and found[0]["interval"] is None
    events = read_json(run(home, "data", "log", "BBBUSDT", "--last", "1", "--json"))
    assert [(e["event"], e["symbol"]) for e in events] == [("loaded", "BBBUSDT")]
    missing = run(tmp_path, "data", "status", "--json")
    assert missing.returncode == 4 and not missing.stdout


def test_json_of_runs_features_and_the_registry(run: Command, home: Path, tmp_path: Path) -> None:
    found = read_json(run(home, "runs", "--json"))
    assert len(found) == 2 and found[0]["symbol"] == "AAAUSDT" and found[0]["created_at"].endswith("+00:00") and isinstance(found[0]["n"], int)
    assert read_json(run(tmp_path, "runs", "--json")) == read_json(run(tmp_path, "registry", "--json")) == []
    names = [row["feature"] for row in read_json(run(tmp_path, "features", "--feature", "momentum", "--json"))]
    assert "rsi_14" in names
    assert read_json(run(tmp_path, "features", "--feature", "ret_1", "--json"))[0]["warmup"] == 2
    assert run(tmp_path, "features", "--json", "--report").returncode == 3
    assert run(home, "promote", found[0]["run"]).returncode == 6
    assert [(row["run"], row["state"]) for row in read_json(run(home, "registry", "--json"))] == [(found[0]["run"], "candidate")]


@pytest.mark.slow
def test_json_of_verdicts(run: Command, home: Path) -> None:
    first, second = sorted(path.parent.name for path in (home / "runs").glob("*/run.json"))
    compared = read_json(run(home, "compare", first, second, "--json"))
    assert compared["runs"] == {"A": first, "B": second} and compared["rows"] > 100 and compared["verdict"]["sentence"]
    assert [row["setting"] for row in compared["settings"]] and {"measure", "A", "B", "difference"} <= set(compared["differences"]["B"][0])
    checks = read_json(run(home, "reproduce", first, "--json"))
    assert all(row["same"] for row in checks if row["check"].startswith("reproduced")) and len(checks) > 5
    done = run(home, "audit", first, "--draws", "1", "--json")
    assert read_json(done, done.returncode)["passed"] is (done.returncode == 0) and done.returncode in (0, 6)


def test_forget_names_a_file_that_the_store_does_not_have(run: Command, home: Path) -> None:
    done = run(home, "forget", "no-such-file")
    assert done.returncode == 4 and "no-such-file" in done.stderr


def completed(run: Command, home: Path, *words: str) -> list[str]:
    "What bash is offered after the words; the last one may be unfinished."
    env = {"_CRYPTORESEARCH_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("cryptoresearch", *words)), "COMP_CWORD": str(len(words))}
    return run(home, **env).stdout.split()


def test_a_shell_completes_commands_runs_and_symbols(run: Command, home: Path, tmp_path: Path) -> None:
    names = sorted(path.parent.name for path in (home / "runs").glob("*/run.json"))
    assert completed(run, home, "re") == ["registry", "replay", "reproduce"]
    of_runs = [["evaluate"], ["runs", "delete"], ["compare", names[0]], ["live", "AAAUSDT", "--run"]]
    of_symbols = [["bars"], ["data", "status"], ["train", "--symbol"]]
    if examples(0, 1):  # with --heavy
        of_runs += [["reproduce"], ["audit"]]
        of_symbols += [["train"], ["export"]]
    for words in of_runs:
        assert completed(run, home, *words, "aaa") == names, words
    for words in of_symbols:
        assert completed(run, home, *words, "A") == ["AAAUSDT"], words
    assert completed(run, tmp_path, "bars", "A") == completed(run, tmp_path, "evaluate", "a") == []
    assert not list(tmp_path.iterdir()), "completion made files"
    assert "_CRYPTORESEARCH_COMPLETE=complete_bash" in run(tmp_path, "--show-completion", "bash").stdout


ABSENT = [
    "data status", "data log", "data repairs", "data backfill X", "data report X", "data verify", "data maintain", "data backup kept", "data restore kept", "export X --to x.csv", "forget abc", "bars X",
    "features --report", "train X", "tune", "audit", "replay X", "evaluate x", "promote x", "reproduce x", "compare x y", "predict x", "live X --run x",
    "runs delete x --yes",
]  # fmt: skip


@pytest.mark.parametrize("line", ABSENT)
def test_a_store_that_is_absent_stays_so(run: Command, tmp_path: Path, line: str) -> None:
    done = run(tmp_path, *line.split())
    assert done.returncode == 4, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["runs", "registry", "features"])
def test_lists_without_a_store_are_empty_and_make_none(run: Command, tmp_path: Path, line: str) -> None:
    assert run(tmp_path, line).returncode == 0
    assert not list(tmp_path.iterdir())


def processor_s(pid: int) -> float:
    "Processor time of a process so far."
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_an_interrupted_load_ends_at_once_and_stores_nothing_of_the_file(tmp_path: Path, after_s: float) -> None:
    times = 1_704_067_200_000 + np.arange(2_000_000) // 2
    table = pa.table({"id": np.arange(len(times)), "price": np.full(len(times), 40_000.5), "qty": np.full(len(times), 0.01), "quote": np.full(len(times), 400.005), "time": times, "maker": np.arange(len(times)) % 2 == 0, "best": np.full(len(times), True)})
    file = tmp_path / "BTCUSDT-trades-2024-01-01.csv"
    csv.write_csv(table, file, csv.WriteOptions(include_header=False))
    small = tmp_path / "first" / file.name
    small.parent.mkdir()
    csv.write_csv(table[:1000], small, csv.WriteOptions(include_header=False))
    work = tmp_path / "work"
    work.mkdir()
    env = os.environ | {"CRYPTORESEARCH_HOME": str(tmp_path), "TMPDIR": str(work)}
    line = [sys.executable, "-c", COMMAND_LINE]
    first = subprocess.run([*line, "ingest", str(small)], env=env | {"CRYPTORESEARCH_HOME": str(small.parent)}, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr  # the first load after an installation compiles for seconds, which nothing interrupts
    load = subprocess.Popen([*line, "ingest", str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(work.rglob("*.parquet")) and not list(tmp_path.glob("data/lake/**/*.parquet")):
        assert load.poll() is None, load.communicate()
        time.sleep(0.02)
    time.sleep(after_s)
    assert load.poll() is None, "loaded before the interruption"
    sent, began, before = pd.Timestamp.now("UTC"), time.monotonic(), processor_s(load.pid)
    load.send_signal(signal.SIGINT)
    assert load.stderr is not None
    told = load.stderr.readline()
    took, waited = processor_s(load.pid) - before, time.monotonic() - began  # the clock's limit is wide: other tests on the same cores stretch it
    rest = load.stderr.read() + load.communicate(timeout=60)[1]  # communicate() alone would lose what readline() has read ahead
    assert took < 2 and waited < 20 and load.returncode == 130, (took, waited, load.returncode, told, rest)
    assert told.startswith("interrupted") and not rest.strip()
    with connect(Settings(_env_file=None, duckdb_path=str(tmp_path / "data" / "catalog.sqlite")), read_only=True) as con:
        stored = con.execute("SELECT count(*) FROM trades").fetchone()
        committed = con.execute("SELECT max(snapshot_time) FROM ducklake_snapshots('lake')").fetchone()[0]
    assert stored == (0,) or (after_s and stored == (len(times),) and committed < sent), (stored, committed, sent)  # unless it was complete before


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("data", "runs")])
def test_help_fits_80_columns_with_nothing_cut(name: str) -> None:
    text = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}).output
    assert "…" not in text, [line for line in text.splitlines() if "…" in line]
    broken = [line for line in text.splitlines() if re.search(r"\w\|\w", line)]
    assert not broken, "choices are broken inside words"


@pytest.mark.parametrize("command", ["ingest {file}", "simulate {below}/files --days 1"])
def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "trades.csv").write_text("id,price,qty,quote_qty,time,is_buyer_maker,is_best_match\n1,2.0,3.0,6.0,1723075200000,True,True\n")
    below = tmp_path / "file/below"
    if command.startswith("ingest"):
        monkeypatch.setenv("CRYPTORESEARCH_HOME", str(below))
    words = command.format(file=tmp_path / "trades.csv", below=below).split()
    monkeypatch.setattr(sys, "argv", ["cryptoresearch", *words, *(["--symbol", "BTCUSDT"] if words[0] == "ingest" else [])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 3 and "Traceback" not in told and "below" in told, told


def test_ctrl_c_within_a_query_ends_as_everywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    "DuckDB turns the signal into a RuntimeError."

    def stopped(message: str) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(cli, "app", lambda **_: stopped("Query interrupted"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and "interrupted: finished work is stored" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["cryptoresearch", "api"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "interrupted\n", "a server has no work to continue"
    monkeypatch.setattr(cli, "app", lambda **_: stopped("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        cli.main()


def test_training_on_several_sources_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from cryptoresearch.runs import run as runs
    from cryptoresearch.serving import batch

    info = {"data": {"sources": ["klines", "trades"]}, "verdict": "No skill."}
    monkeypatch.setattr(batch, "train_report", lambda *_, **__: SimpleNamespace(run_id="r", report="r.html", reused=False))
    monkeypatch.setattr(runs, "load_run", lambda _: SimpleNamespace(info=info))
    monkeypatch.setattr(cli, "take_bars", take_symbol)
    told = CliRunner().invoke(cli.app, ["train", "BTCUSDT"]).output
    assert "source  klines and trades" in told and "--source takes one" in told
    info["data"]["sources"] = ["klines"]
    assert "source" not in CliRunner().invoke(cli.app, ["train", "BTCUSDT"]).output


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".feather"])
def test_a_table_that_cannot_be_written_is_refused_with_a_reason(tmp_path: Path, ending: str) -> None:
    from cryptoresearch.errors import ConfigError
    from cryptoresearch.serving.queries import write_table

    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"can be written; found .*Choose another file"):
        write_table(pd.DataFrame({"a": [1.0]}), tmp_path / "file" / f"out{ending}")
    (tmp_path / f"taken{ending}").mkdir()
    with pytest.raises(ConfigError, match="can be written"):
        write_table(pd.DataFrame({"a": [1.0]}), tmp_path / f"taken{ending}")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from cryptoresearch.cli_shared import progress

    with progress("training", every_s=0) as tell:
        tell(0.25, "fold 1 of 4")
        tell(1.0, "report")
    with progress("searching", every_s=60) as tell:
        tell(0.5, "too early for a line")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "training: fold 1 of 4 (25%)\ntraining: report (100%)\n")
