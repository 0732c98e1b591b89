"""Runs on what their own bars do not know: trades inside the bars, another symbol, features of a user's module."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.identity import identity, read_data
from typer.testing import CliRunner

from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.errors import ConfigError, DataNotFound, RunMismatch
from cryptoresearch.features.inputs import read_trade_columns
from cryptoresearch.features.microstructure import trade_features
from cryptoresearch.features.registry import REGISTRY
from cryptoresearch.runs.reproduce import reproduce
from cryptoresearch.runs.run import load_run, train_run
from cryptoresearch.runs.walk_forward import prepare
from cryptoresearch.serving.predictor import Predictor
from cryptoresearch.settings import Settings

ASKED = RunConfig("AAAUSDT", "1m", horizon=5, refit_every="2h", features=("ret_3", "t_size_gini_24", "BBBUSDT:ret_3", "BBBUSDT:t_cluster_1"), model="ridge")
OWN = """from cryptoresearch.features.registry import feature


@feature(name="own_body", inputs=["open", "close"], warmup=1, unit="fraction")
def own_body(bars):
    return bars["close"] / bars["open"] - 1
"""


def trades(seed: int, n: int = 12_000, minutes: int = 600) -> pd.DataFrame:
    "Trades as the archive has them: id, price, qty, quote, ms, is_buyer_maker, is_best_match."
    rng = np.random.default_rng(seed)
    ms = np.sort(rng.integers(0, minutes * 60_000, n)) + 1_704_067_200_000
    price = np.round(100 * np.exp(np.cumsum(rng.normal(0, 2e-4, n))), 2)
    qty = np.round(rng.lognormal(0, 1, n), 3)
    return pd.DataFrame({"id": np.arange(n) + 1, "price": price, "qty": qty, "quote": price * qty, "ms": ms, "maker": rng.random(n) < 0.5, "best": True})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("joined")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    con = init_duckdb(settings)
    for seed, symbol in enumerate(("AAAUSDT", "BBBUSDT")):
        trades(seed).to_csv(folder / f"{symbol}-trades-2024-01-01.csv", header=False, index=False)
        process_file(con, folder / f"{symbol}-trades-2024-01-01.csv")
        make_bars(con, symbol, "1m")
    con.close()
    return settings


def test_a_run_on_trades_and_another_symbol(store: Settings) -> None:
    with connect(store) as con:
        data = read_data(con, ASKED)
        raw = con.execute("SELECT * FROM trades WHERE symbol = 'AAAUSDT' ORDER BY ts, trade_id").df()
        alone = read_bars(con, "AAAUSDT", "1m")
        other = read_bars(con, "BBBUSDT", "1m")
        assert read_trade_columns(con, alone).equals(trade_features(raw, alone))
        assert len(data.ledger) == 2  # the files of both symbols
        assert data.bars["bbbusdt_close"].dropna().equals(other["close"].reindex(data.bars.index).dropna().rename("bbbusdt_close"))
        samples = prepare(data.bars, ASKED)
        assert samples.X.columns.tolist() == ["ret_3", "t_size_gini_24", "bbbusdt_ret_3", "bbbusdt_t_cluster_1"] and not samples.left_out
        parts = identity(ASKED, data)
        assert {"t_size_gini", "bbbusdt_close", "bbbusdt_t_cluster"} <= set(parts["bars"])
        run = train_run(con, ASKED, store)
        again = train_run(con, ASKED, store)
        assert again.reused and again.id == run.id
        assert read_data(con, replace(ASKED, features=("ret_3",))).bars.columns.tolist() == alone.columns.tolist()  # nothing more than is asked for
    made = [f["name"] for f in run.info["features"] if f["name"].startswith("bbbusdt")]
    for name in made:
        REGISTRY.pop(name)  # as in another process
    assert load_run(run.id, store).predict(data.bars)["prediction"].notna().any()
    assert reproduce(run.id, store)["same"].all()


def test_what_cannot_be_joined_is_said(store: Settings) -> None:
    with connect(store) as con:
        with pytest.raises(DataNotFound, match="NONEUSDT"):
            read_data(con, replace(ASKED, features=("NONEUSDT:ret_3",)))
        with pytest.raises(DataNotFound, match="rett_3"):
            read_data(con, replace(ASKED, features=("BBBUSDT:rett_3",)))
        run = train_run(con, ASKED, store)
    with pytest.raises(ConfigError, match="its own bars alone"):
        Predictor(run, pd.DataFrame())


def test_a_run_on_a_users_module(store: Settings, tmp_path: Path) -> None:
    file = tmp_path / "my_features.py"
    file.write_text(OWN)
    asked = replace(ASKED, features=("ret_3", "own_body"), modules=(str(file),))
    try:
        with connect(store) as con:
            run = train_run(con, asked, store)
            assert run.info["identity"]["own_features"].keys() == {"own_body", "my_features.py"} and run.config.modules == ("my_features.py",)
            moved = tmp_path / "elsewhere" / "my_features.py"
            moved.parent.mkdir()
            shutil.copy(file, moved)
            assert train_run(con, replace(asked, modules=(str(moved),)), store).id == run.id  # wherever it lies
            REGISTRY.pop("own_body")  # as in another process
            sys.modules.pop("own_features.my_features")
            with pytest.raises(ConfigError, match=r"--module my_features\.py"):
                reproduce(run.id, store)
            assert reproduce(run.id, store, modules=[str(moved)])["same"].all()
            file.write_text(OWN.replace("- 1", "- 1.5"))
            with pytest.raises(RunMismatch, match="user-defined features"):
                reproduce(run.id, store, modules=[str(file)])
            assert train_run(con, asked, store).id != run.id
            with pytest.raises(ConfigError, match="no such file"):
                train_run(con, replace(asked, modules=("nowhere.py",)), store)
    finally:
        REGISTRY.pop("own_body", None)


def test_the_command_line_lists_features_of_a_module(tmp_path: Path) -> None:
    from cryptoresearch.cli import app

    file = tmp_path / "listed.py"
    file.write_text(OWN)
    try:
        told = CliRunner().invoke(app, ["features", "--module", str(file), "--feature", "own_body", "--feature", "ETHUSDT:ret_24"])
        assert told.exit_code == 0 and "own_body" in told.output and "ethusdt_ret_24" in told.output, told.output
        wrong = CliRunner().invoke(app, ["features", "--module", "no_such_module_at_all", "--feature", "own_body"])
        assert wrong.exit_code != 0 and isinstance(wrong.exception, ConfigError | SystemExit)
    finally:
        REGISTRY.pop("own_body", None)
        REGISTRY.pop("ethusdt_ret_24", None)
