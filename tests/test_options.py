"""The table of options: one place to add an option, and nothing stored changes its name by it."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import nbformat
import pytest

import cryptoresearch
from cryptoresearch.runs.config import config_record, RunConfig
from cryptoresearch.runs.identity import canonical
from cryptoresearch.errors import ConfigError
from cryptoresearch.models.catalogue import MODELS
from cryptoresearch.runs.options import Model, parameters_cell, TEMPLATES
from cryptoresearch.runs.trials import model_text
from cryptoresearch.serving.batch import check_parameters, notebook_path

PACKAGE = Path(cryptoresearch.__file__).parent
KNOWN = {  # configurations with the digests of their canonical form and of their model's text, as runs have stored them
    "default": (RunConfig(), "981da40a4055c083", "63174f5452917c03"),
    "meta": (
        RunConfig("ETHUSDT", "dollar:1e6", target="meta", label={"primary": "-ret_24", "up": 2}, features="momentum", modules="mine.py", weights="recency:365D"),
        "25c1922c844330fe", "3fcb2cab0d3a2aa4",
    ),
    "scaled": (
        RunConfig(start="2018-01-01", end="2024-01-01", test_start="2022-01-01T00:00+01:00", mode="sliding", train_window="365D", interval="scaled",
                  interval_params={"given": "log_sigma"}, params={"max_depth": 3}, seed=7, fee_bps=1),
        "dcfd0e00c54e343c", "5221e9da8b9d1b2f",
    ),
    "event": (RunConfig(target="direction", calibrate="platt", model="ridge", embargo="24h", source="binance"), "c0241b6d60be2740", "482440633dc2c3c8"),
}  # fmt: skip


def short_digest(text: str) -> str:
    "Return the first 16 digits of a text's sha256."
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", KNOWN)
def test_stored_runs_keep_their_identity(name):
    config, of_config, of_model = KNOWN[name]
    assert short_digest(canonical(config_record(config))) == of_config
    assert short_digest(model_text(config)) == of_model


def config_of(command: str) -> RunConfig:
    "Read the options of a command of the README into a configuration."
    words = shlex.split(command, comments=True)[3:]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    given = {k: dict(pairs)[f"--{k}"] for k in ("target", "model") if f"--{k}" in dict(pairs)}
    params = {name: json.loads(value) for option, text in pairs if option == "--param" for name, value in [text.split("=", 1)]}
    features = tuple(value for option, value in pairs if option == "--feature") or ("default",)
    return RunConfig("BTCUSDT", dict(pairs)["--bars"], horizon=int(dict(pairs).get("--horizon", 24)), params=params, features=features, **given)


def test_the_readme_has_a_command_for_every_model():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    configs = [config_of(line) for line in text.splitlines() if line.startswith("cryptoresearch train BTCUSDT --bars 1h") and "--model" in line]
    assert {c.model for c in configs} == set(MODELS) == set(get_args(Model)) and all(c.resolved.model for c in configs)
    assert set(re.findall(r"--model (\w+)", text)) <= set(MODELS)
    figures = text.split("## Figures")[1].split("\n## ")[0]
    assert {"ensemble", "har_ridge", "reversal"} <= set(re.findall(r"`(\w+)`", figures))


def test_a_model_of_signs_is_refused_for_volatility_and_the_remedy_works():
    with pytest.raises(ConfigError, match="such as decay_ridge"):
        RunConfig(target="volatility", model="reversal")
    assert RunConfig(target="volatility", model="decay_ridge").resolved.model


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_committed_parameters_cell_is_the_generated_one(name):
    notebook = nbformat.read(notebook_path(f"research/{name}.ipynb"), as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert cell.source == parameters_cell(TEMPLATES[name]), "run python scripts/write_parameters.py"
    check_parameters(notebook, {o.name: o.default for o in TEMPLATES[name]})  # papermill can parse each line


SHOW = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
import cryptoresearch
from cryptoresearch import cli
from cryptoresearch.cli_research import take_symbol
from cryptoresearch.runs.config import config_from, RunConfig
from cryptoresearch.runs.options import parameters_cell, TEMPLATES
from cryptoresearch.serving import batch

def keep(config, **more):
    seen["asked"] = config.patience
    raise cli.CryptoResearchError("asked")

seen = {"package": str(Path(cryptoresearch.__file__).parent), "config": RunConfig(patience=4).patience}
batch.train_report = keep
cli.take_bars = take_symbol
seen["help"] = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200"}).output
seen["refused"] = CliRunner().invoke(cli.app, ["train", "--patience", "0"]).exit_code
CliRunner().invoke(cli.app, ["train", "--patience", "5"])
variables = {}
exec(parameters_cell(TEMPLATES["train"]), variables)
seen["cell"] = [line for line in parameters_cell(TEMPLATES["train"]).splitlines() if "patience" in line]
seen["notebook"] = config_from(variables | {"patience": 6}).patience
print(json.dumps(seen))
"""


def test_an_option_added_in_one_place_is_found_in_all(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "cryptoresearch", ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "runs" / "options.py"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if line.startswith("    calibrate: "))
    lines.insert(last + 1, '    patience: int = option(3, "Folds to wait before giving up.", unit="folds", least=1)\n')
    table.write_text("".join(lines), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(tmp_path), "NO_COLOR": "1", "CRYPTORESEARCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SHOW], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["package"] == str(copy)
    assert (seen["config"], seen["asked"], seen["notebook"], seen["refused"]) == (4, 5, 6, 2)
    assert seen["cell"] == ["patience = 3  # Folds to wait before giving up. Unit: folds."]
    [line] = [line for line in seen["help"].splitlines() if "--patience" in line]
    assert "Folds to wait before giving up. Unit: folds. [default: 3]" in line


def test_the_table_loads_nothing_heavy(tmp_path):
    code = "import sys, cryptoresearch.cli; print(sorted({'pandas', 'numpy', 'sklearn', 'xgboost', 'arch', 'duckdb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
