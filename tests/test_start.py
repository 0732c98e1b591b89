"""What a start loads: counted in modules, because times depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# libraries that take more than a tenth of a second each
HEAVY = {
    "arch", "duckdb", "fastapi", "ipywidgets", "IPython", "lightgbm", "matplotlib", "minio", "numba", "optuna", "papermill", "plotly", "scipy", "skops", "sklearn",
    "statsmodels", "xgboost",
}  # fmt: skip
FRAMES = {"numpy", "pandas", "pyarrow"}
COMMAND = """
import sys
from cryptoresearch.cli import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
"""


def loaded(code: str, home: Path, *args: str) -> tuple[set[str], str]:
    "Top-level modules that are loaded after `code`, and what it printed."
    code += "\nimport json, sys\nprint('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MINIO_", "DUCKDB_", "FINNHUB_", "RUNS_DIR"))} | {"CRYPTORESEARCH_HOME": str(home), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code, *args], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text, _, modules = done.stdout.rstrip().rpartition("\n")
    return set(json.loads(modules)), text


def write_record(home: Path, name: str) -> None:
    "Write the record of a run, without a model."
    config = {"symbol": "BTCUSDT", "spec": "1h", "target": "return", "horizon": 24}
    record = {"id": name, "config": config, "scores": {"model": {"n": 6000, "ic": 0.03, "r2_oos": None, "dm_p": 0.2}}, "level": "none", "verdict": "No skill found."}
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    times = {"created_at": "2024-05-01T00:00:00+00:00", "trained_until": "2024-04-30T00:00:00+00:00", "simulated": False}
    (folder / "run.json").write_text(json.dumps(record | times))


def test_the_package_loads_nothing_else(tmp_path: Path) -> None:
    modules, _ = loaded("import cryptoresearch", tmp_path)
    assert not modules & (HEAVY | FRAMES | {"pydantic", "pydantic_settings", "typer", "rich", "httpx"})


@pytest.mark.parametrize("order", ["cryptoresearch, pandas", "pandas, cryptoresearch"])
def test_frames_have_the_accessor_in_either_order_of_imports(tmp_path: Path, order: str) -> None:
    code = f"import {order}\nframe = pandas.DataFrame()\nprint(type(frame.cr).__name__, pandas.__spec__.loader is pandas.__loader__, pandas.__loader__)"
    modules, text = loaded(code, tmp_path)
    assert text.startswith("BarAccessor True") and "SourceFileLoader" in text and not modules & {"numba", "sklearn"}


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("runs", "--help"), ("train", "--help"), ("runs",)], ids=" ".join)
def test_commands_that_answer_at_once(tmp_path: Path, args: tuple[str, ...]) -> None:
    write_record(tmp_path, "btcusdt-1h-return24-0123456789")
    modules, text = loaded(COMMAND, tmp_path, *args)
    assert not modules & (HEAVY | FRAMES)
    if args == ("runs",):
        assert "btcusdt-1h-return24-0123456789" in text and "0.030" in text and "0.200" in text and "No skill found." in text


@pytest.mark.parametrize("line", ["scores nope", "predict nope", "live BTCUSDT --run nope", "evaluate nope", "compare a b", "reproduce nope", "runs delete nope"])
def test_a_run_that_is_not_stored_is_refused_before_libraries_load(tmp_path: Path, line: str) -> None:
    modules, _ = loaded(COMMAND.replace("if end.code:", "if end.code != 4:"), tmp_path, *line.split())
    assert not modules & (HEAVY | FRAMES)


@pytest.mark.parametrize("line", ["train BTCUST", "tune BTCUST"])
def test_bars_are_looked_for_before_models_load(tmp_path: Path, line: str) -> None:
    modules, _ = loaded(COMMAND.replace("if end.code:", "if end.code != 4:"), tmp_path, *line.split())
    assert not modules & (HEAVY - {"duckdb", "numba", "scipy"})


def test_trained_runs_load_what_they_need(tmp_path: Path) -> None:
    "Significance tests, GARCH and scikit-learn's file format are loaded on their first use."
    modules, _ = loaded("import cryptoresearch.runs.run, cryptoresearch.metrics.significance", tmp_path)
    assert not modules & {"arch", "statsmodels", "skops", "matplotlib", "optuna", "plotly", "pytest", "IPython"}
