"""`--json` of every command that ends by itself: one value on standard output, which says what was done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cryptoresearch import cli

SMALL = ["--model", "ridge", "--bars", "1h", "--horizon", "1", "--test-start", "2024-01-20", "--feature", "ret_1", "--feature", "ret_12"]
WITHOUT = {"stream", "live", "replay", "api", "dashboards", "lab", "mcp", "demo"}  # they run until they are stopped, or show their steps

Call = Callable[..., Any]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    "Runs a command in this process, in a store of the test's own, and reads its JSON."
    monkeypatch.setenv("CRYPTORESEARCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path, code: int = 0) -> Any:
        done = CliRunner().invoke(cli.app, [*map(str, words), "--json"])
        assert done.exit_code == code, (words, done.output, done.exception)
        return json.loads(done.stdout)

    return run


def test_every_command_that_ends_has_it() -> None:
    root: Any = get_command(cli.app)
    groups = {name: below for name, below in root.commands.items() if hasattr(below, "commands")}
    leaves = {name: c for name, c in root.commands.items() if name not in groups}
    leaves |= {f"{name} {sub}": c for name, group in groups.items() for sub, c in group.commands.items()}
    lacking = {name for name, c in leaves.items() if not any("--json" in p.opts for p in c.params)}
    assert lacking == WITHOUT


@pytest.mark.slow
def test_what_was_done_is_one_value(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = call("simulate", tmp_path / "files", "--days", "31", "--trades-per-day", "1000", "--monthly")
    assert len(files) == 1 and Path(files[0]).is_file()
    (loaded,) = call("ingest", tmp_path / "files")
    assert loaded["outcome"] == "loaded"
    (built,) = call("bars", "SIMUSDT", "1h")
    rows = built.pop("rows")
    assert rows > 700 and built == {"symbol": "SIMUSDT", "bars": "1h", "source": "simulated"}
    exported = call("export", "SIMUSDT", "--to", tmp_path / "bars.csv")
    assert exported == {"what": "bars", "rows": rows, "to": str(tmp_path / "bars.csv")}

    trained = call("train", "SIMUSDT", *SMALL)
    assert not trained["reused"] and Path(trained["report"]).is_file() and trained["sources"] == ["simulated"] and trained["verdict"]
    again = call("train", "SIMUSDT", *SMALL)
    assert again == trained | {"reused": True}
    forecasts = call("predict", trained["run"], tmp_path / "bars.csv")
    assert rows - 20 < len(forecasts) <= rows and {"ts", "prediction", "in_sample"} <= forecasts[0].keys()
    promoted = call("promote", trained["run"], code=6)
    assert promoted["run"] == trained["run"] and not promoted["promoted"] and promoted["reason"]

    saved = call("data", "backup", tmp_path / "saved.tar")
    assert Path(saved["path"]).is_file() and saved["files"] > 0 and saved["bytes"] > 0
    assert call("data", "verify")["ok"] is True
    tidied = call("data", "maintain", "--keep", "0d")
    assert tidied.keys() == {"before", "after", "expired", "pinned"} and tidied["after"]["files"] > 0
    assert call("forget", Path(files[0]).name)["rows"] == loaded["rows"]
    assert call("runs", "delete", trained["run"], "--yes") == {"deleted": trained["run"]}

    monkeypatch.setenv("CRYPTORESEARCH_HOME", str(tmp_path / "other"))
    restored = call("data", "restore", saved["path"])
    assert restored["ok"] is True and {row["state"] for row in restored["checks"]} == {"ok"}
