"""The MCP server as a client meets it: a process, and JSON-RPC over its pipes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_api import minutes, put


class Session:
    "One client of one process."

    def __init__(self, home: Path, *args: str) -> None:
        env = os.environ | {"CRYPTORESEARCH_HOME": str(home), "DUCKDB_PATH": str(home / "catalog.sqlite"), "RUNS_DIR": str(home / "runs")}
        command = [sys.executable, "-c", "from cryptoresearch.cli import main; main()", "mcp", *args]
        self.process = subprocess.Popen(command, env=env, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.number = 0
        hello = self.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo={"name": "test", "version": "1"})
        assert hello["result"]["serverInfo"]["name"] == "cryptoresearch"
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def send(self, message: dict) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def ask(self, method: str, **params: object) -> dict:
        self.number += 1
        self.send({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params})
        assert self.process.stdout
        answer = json.loads(self.process.stdout.readline())
        assert answer["id"] == self.number
        return answer

    def call(self, tool: str, **arguments: object) -> dict:
        return self.ask("tools/call", name=tool, arguments=arguments)["result"]

    def refused(self, tool: str, **arguments: object) -> str:
        found = self.call(tool, **arguments)
        assert found["isError"], found
        return found["content"][0]["text"]

    def end(self) -> str:
        _, said = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, said
        return said


def candles(n: int = 400) -> pd.DataFrame:
    return minutes(n)[["open", "high", "low", "close", "volume"]].dropna().reset_index()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cryptoresearch.data.store import init_duckdb
    from cryptoresearch.settings import Settings

    folder = tmp_path_factory.mktemp("mcp")
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"))) as con:
        put(con, minutes(100))
    run = folder / "runs" / "btc-one"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"level": "none", "verdict": "No skill.", "baseline": "zero", "scores": {"model": {"ic": float("nan")}}, "config": {"model": "har"}}))
    (folder / "given").mkdir()
    candles().to_csv(folder / "given" / "bars.csv", index=False)
    candles().to_csv(folder / "outside.csv", index=False)
    (folder / "given" / "link.csv").symlink_to(folder / "outside.csv")
    return folder


@pytest.fixture(scope="module")
def session(home: Path) -> Iterator[Session]:
    started = Session(home, "--folder", str(home / "given"))
    yield started
    assert started.process.poll() is None
    started.end()


def files(folder: Path) -> dict[str, str]:
    "All files with their content; SQLite's shared memory is no content."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith("-shm")}


def test_three_tools_say_what_they_take(session):
    tools = {tool["name"]: tool for tool in session.ask("tools/list")["result"]["tools"]}
    assert set(tools) == {"what_data", "may_i_believe", "what_does_run_say"}
    assert all(tool["annotations"]["readOnlyHint"] and tool["description"] for tool in tools.values())
    assert tools["may_i_believe"]["inputSchema"]["properties"]["target"]["enum"][:2] == ["return", "volatility"]


def test_data_and_runs_are_listed(session):
    found = session.call("what_data")["structuredContent"]
    assert [(row["symbol"], row["spec"], row["bars"]) for row in found["bars"]] == [("TESTUSD", "1m", 100)]
    assert found["runs"] == [{"run_id": "btc-one", "level": "none", "verdict": "No skill."}] and found["bars"][0]["first_ts"] == "2024-01-01T00:00:00+00:00"
    run = session.call("what_does_run_say", run_id="btc")["structuredContent"]
    assert (run["run_id"], run["verdict"], run["scores"], run["config"]) == ("btc-one", "No skill.", {"model": {"ic": None}}, {"model": "har"})
    assert "one run 'none'; found btc-one. See them: cryptoresearch runs" in session.refused("what_does_run_say", run_id="none")


def test_forecasts_that_look_ahead_are_not_believed_and_honest_ones_are_not_accused(session, home):
    table = candles()
    noise = np.random.default_rng(1).normal(size=len(table))
    for prediction, believe in ((table["close"].pct_change(5).shift(-5), "no"), (noise, "no objection")):
        text = table.assign(prediction=prediction).sample(frac=1, random_state=1).to_csv(index=False)
        found = session.call("may_i_believe", csv=text, symbol="X", spec="1m", horizon=5)["structuredContent"]
        assert found["believe"] == believe, found
    assert found["reasons"] == ["What was not given was not checked"]
    nothing = session.call("may_i_believe", file="bars.csv", spec="1m")["structuredContent"]
    assert nothing["believe"] == "not checked" and "names of features" in nothing["reasons"][0]


def test_bad_input_is_an_error_with_a_remedy_and_the_server_goes_on(session):
    bars = {"csv": candles().to_csv(index=False), "spec": "1m"}
    for arguments, words in (
        ({}, "Give one of them"), (bars | {"file": "bars.csv"}, "either file or csv"), ({"csv": "a,b\n1,2\n"}, "candles"), ({"csv": '"'}, "csv"), ({"csv": "ts\n"}, "the table"),
        (bars | {"features": ["magic"]}, "magic"), (bars | {"features": ["ta:ichimoku()"]}, "ichimoku"), (bars | {"target": "luck"}, "target"), (bars | {"horizon": 0}, "horizon"),
        (bars | {"horizon": 10**9, "features": ["ret_1"]}, "horizon"), (bars | {"spec": "fortnight"}, "bar length"), ({"file": "none.csv"}, "none.csv"), ({"file": "bars.exe"}, "Correct its name"),
        (bars | {"model": "oracle"}, "model"),
    ):  # fmt: skip
        said = session.refused("may_i_believe", **arguments)
        assert words.lower() in said.lower() and "Traceback" not in said and said != "Error executing tool may_i_believe", (arguments.keys(), said)
    assert session.ask("tools/call", name="delete_everything", arguments={}).keys() & {"error", "result"}
    assert "error" in session.ask("no/such/method")
    assert session.ask("ping")["result"] == {}


def test_no_file_outside_the_folder_is_read(session, home):
    for name in ("../outside.csv", "link.csv", str(home / "outside.csv"), "/etc/passwd", "..", ".", "a\0b", "~/x.csv", "given/../../outside.csv"):
        said = session.refused("may_i_believe", file=name)
        assert "a path outside" in said or (name[0] == "~" and "found none" in said), (name, said)
        assert "root:" not in said


@pytest.mark.slow  # an audit trains a dozen models
def test_a_pipeline_is_proven_and_audited_and_nothing_is_written(home):
    before = files(home)
    one = Session(home, "--folder", "given")
    one.call("what_data")
    one.call("what_does_run_say", run_id="btc")
    found = one.call("may_i_believe", file="bars.csv", symbol="X", spec="1m", horizon=2, features=["ret_1", "rsi_14"])["structuredContent"]
    assert [(row["feature"], row["causal"]) for row in found["features"]] == [("ret_1", True), ("rsi_14", True)]
    assert set(found["audit"]["worlds"]) >= {"shuffled labels", "random walk", "planted signal", "planted leak"} and found["audit"]["verdict"]
    one.refused("may_i_believe", file="../outside.csv")
    assert one.end() == ""
    assert files(home) == before


def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch):
    from cryptoresearch.errors import ConfigError
    from cryptoresearch.serving.mcp import make_tool_server

    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    with pytest.raises(ConfigError, match=r'pip install "cryptoresearch\[mcp\]"'):
        make_tool_server()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    from cryptoresearch.errors import ConfigError
    from cryptoresearch.serving.mcp import make_tool_server

    with pytest.raises(ConfigError, match="--folder"):
        make_tool_server(folder=tmp_path / "none")
