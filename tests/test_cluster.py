"""Work on a Dask cluster: the bytes of one process, whatever becomes of a worker; also with TLS, a PostgreSQL catalog and an S3 server."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from test_archive import authority
from typer.testing import CliRunner

from cryptoresearch.cli import app
from cryptoresearch.data import workers
from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.store import connect, init_duckdb, snapshot
from cryptoresearch.data.workers import Executor, open_cluster
from cryptoresearch.errors import ConfigError, RunMismatch
from cryptoresearch.features.inputs import read_trade_columns
from cryptoresearch.ingest.files import process_file
from cryptoresearch.runs.cluster import fold_sender
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.identity import identity, read_data
from cryptoresearch.runs.run import train_run
from cryptoresearch.runs.tuning import tune
from cryptoresearch.runs.walk_forward import first_test, prepare, walk_folds
from cryptoresearch.settings import Settings

@pytest.mark.parametrize("address", ["tcp://10.0.0.7:8786", "http://127.0.0.1:8786", "tls://desk.example", "tls://[::1:8786", "desk.example:8786"])
def test_a_scheduler_of_another_machine_needs_tls(settings: Settings, address: str) -> None:
    with pytest.raises(ConfigError, match="--protocol tls"), open_cluster(settings.model_copy(update={"dask_scheduler_address": address})):
        pass


def using(settings: Settings, address: str) -> Executor:
    "The executor of an address; it is closed with its first task."
    with open_cluster(settings.model_copy(update={"dask_scheduler_address": address})) as executor:
        assert executor is not None
        executor.submit(int)
        return executor


def test_without_dask_the_remedy_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r'pip install "cryptoresearch\[cluster\]"'):
        using(settings, "tcp://127.0.0.1:1")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


Start = Callable[..., subprocess.Popen]


@contextlib.contextmanager
def started(folder: Path, env: dict[str, str]) -> Iterator[Start]:
    "Start schedulers and workers, which end with the block."
    begun: list[subprocess.Popen] = []

    def call(what: str, *args: str) -> subprocess.Popen:
        with (folder / f"{what}-{len(begun)}.log").open("w") as log:
            begun.append(subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{what}", *args], env=env, cwd=folder, stdout=log, stderr=log))
        return begun[-1]

    try:
        yield call
    finally:
        for process in begun:
            process.kill()
            process.wait()


def outcome(folder: Path) -> dict[str, Any]:
    "Read what a run depends on, and the checksums of its files."
    info = json.loads((folder / "run.json").read_text())
    return {k: info[k] for k in ("id", "identity", "files", "folds", "final", "data")}


TRADES = RunConfig(
    "AAAUSDT", horizon=5, refit_every="7D", features=("ret_3", "t_size_gini_24", "BBBUSDT:t_cluster_24"), model="lightgbm",
    params={"n_estimators": 20, "n_threads": 1},
)  # fmt: skip
SEARCHED = replace(TRADES, model="ridge", params={}, features=("ret_3", "ret_6"))


def trades(seed: int, n: int = 15_000, days: int = 100) -> pd.DataFrame:
    "Trades as the archive has them, over more than three months."
    rng = np.random.default_rng(seed)
    ms = np.sort(rng.integers(0, days * 86_400_000, n)) + 1_704_067_200_000
    price, qty = np.round(100 * np.exp(np.cumsum(rng.normal(0, 1e-3, n))), 2), np.round(rng.lognormal(0, 1, n), 3)
    return pd.DataFrame({"id": np.arange(n) + 1, "price": price, "qty": qty, "quote": price * qty, "ms": ms, "maker": rng.random(n) < 0.5, "best": True})


def write_files(home: Path, con: Any) -> None:
    "Load the trades of two symbols."
    for seed, symbol in enumerate(("AAAUSDT", "BBBUSDT")):
        trades(seed).to_csv(file := home / f"{symbol}-trades.csv", header=False, index=False)
        process_file(con, file, symbol=symbol, kind="trades", progress=False)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Settings]:
    "The settings of two equal stores with the trades of two symbols: one for this process alone, one for the cluster."
    home = tmp_path_factory.mktemp("stores")
    one = Settings(_env_file=None, duckdb_path=str(home / "one" / "catalog.sqlite"), duckdb_threads=1)
    with init_duckdb(one) as con:
        write_files(home, con)
    shutil.copytree(home / "one", home / "many")
    return one, Settings(_env_file=None, duckdb_path=str(home / "many" / "catalog.sqlite"), duckdb_threads=1)


@pytest.fixture(scope="module")
def cluster(stores: tuple[Settings, Settings], warm_kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, list[subprocess.Popen]]]:
    "The settings of a scheduler with two workers that read the second store, and the processes of the workers."
    home, many = tmp_path_factory.mktemp("cluster"), stores[1]
    env = {**os.environ, "DUCKDB_PATH": many.duckdb_path, "DUCKDB_THREADS": "1", "OMP_NUM_THREADS": "1", "CRYPTORESEARCH_HOME": str(home)}
    with started(home, env) as start:
        address = f"tcp://127.0.0.1:{(port := free_port())}"
        start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
        begun = [start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(2)]
        yield many.model_copy(update={"dask_scheduler_address": address}), begun


@pytest.fixture
def two(cluster: tuple[Settings, list[subprocess.Popen]]) -> Iterator[Executor]:
    "The executor of two workers."
    with open_cluster(cluster[0]) as executor:
        executor.client.wait_for_workers(2, timeout=120)
        yield executor


def test_bars_and_trade_columns_are_those_of_one_process(stores: tuple[Settings, Settings], two: Executor) -> None:
    found = {}
    for name, settings, executor in (("one", stores[0], None), ("many", stores[1], two)):
        with connect(settings) as con:
            number = snapshot(con)
            counts = [make_bars(con, symbol, "1h", executor=executor) for symbol in ("AAAUSDT", "BBBUSDT")]
            commits = snapshot(con) - number
            columns = read_trade_columns(con, read_bars(con, "AAAUSDT", "1h"), executor)
            found[name] = counts, commits, con.execute("FROM bars ORDER BY ALL").df(), columns, con.execute("SELECT * EXCLUDE built_at FROM bar_builds").fetchall()
    (counts, commits, bars, columns, builds), many = found["one"], found["many"]
    assert min(counts) > 3 * 720  # several months
    assert (counts, commits, builds) == (many[0], many[1], many[4])  # no commit of a worker
    pd.testing.assert_frame_equal(bars, many[2], check_exact=True)
    pd.testing.assert_frame_equal(columns, many[3], check_exact=True)
    assert columns["t_size_gini"].notna().mean() > 0.9


def test_a_run_has_the_bytes_of_one_process(stores: tuple[Settings, Settings], cluster: tuple[Settings, list[subprocess.Popen]], two: Executor) -> None:
    runs = []
    for settings in (stores[0], cluster[0]):
        with connect(settings) as con:
            runs.append(train_run(con, TRADES, settings))
    one, many = runs
    assert outcome(many.folder) == outcome(one.folder) and len(one.info["folds"]) > 2
    for name in one.info["files"]:
        assert (many.folder / name).read_bytes() == (one.folder / name).read_bytes(), name
    with connect(cluster[0], read_only=True) as con:
        data = read_data(con, TRADES)
        samples, first, parts = prepare(data.bars, TRADES), first_test(TRADES, data.bars), identity(TRADES, data)
        with pytest.raises(RunMismatch, match="versions on the workers"):
            walk_folds(TRADES, samples, first, submit=fold_sender(two, TRADES, data, parts | {"code": "another"}))


def test_a_batch_runs_on_the_workers(cluster: tuple[Settings, list[subprocess.Popen]], tmp_path: Path) -> None:
    work = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in ("n = 0", "import os\nassert not os.environ['DASK_SCHEDULER_ADDRESS']\nn / n")])
    work.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(work, tmp_path / "work.ipynb")
    (tmp_path / "grid.yaml").write_text("notebook: work.ipynb\ngrid:\n  n: [1, 0]\n")
    result = CliRunner().invoke(app, ["batch", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out"), "--cluster", cluster[0].dask_scheduler_address])
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["state"].tolist() == ["done", "failed"], result.output


def test_a_search_has_the_trials_of_one_process_although_a_worker_is_killed(
    stores: tuple[Settings, Settings], cluster: tuple[Settings, list[subprocess.Popen]], two: Executor,
) -> None:  # fmt: skip
    "Five trials: none is pruned, nor do later ones depend on how many were under way. The last test: it leaves one worker."
    settings, (victim, survivor) = cluster

    def kill(fraction: float, text: str) -> None:
        if victim.poll() is None:
            os.kill(victim.pid, signal.SIGKILL)

    found = {}
    for name, given, progress in (("one", stores[0], None), ("many", settings, kill)):
        with connect(given) as con:
            done = tune(con, SEARCHED, 5, n_folds=2, settings=given, progress=progress)
            ledger = con.execute("SELECT trial, model, returns FROM trials WHERE run_id = ? ORDER BY trial", [done.study.study_name]).fetchall()
        found[name] = done.table, done.config, ledger
    assert victim.wait(10) == -signal.SIGKILL and survivor.poll() is None
    pd.testing.assert_frame_equal(found["one"][0], found["many"][0], check_exact=True)
    assert found["one"][1:] == found["many"][1:] and len(found["one"][2]) == 5


def test_a_scheduler_that_does_not_answer_or_has_no_workers_is_reported(settings: Settings, stores: tuple[Settings, Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(workers, "CONNECT_S", 0.5)
    monkeypatch.setenv("DUCKDB_PATH", stores[0].duckdb_path)
    result = CliRunner().invoke(app, ["bars", "AAAUSDT", "2h", "--cluster", "tcp://127.0.0.1:1"])
    assert isinstance(result.exception, ConfigError) and "expected a scheduler at tcp://127.0.0.1:1; found none" in str(result.exception)
    with LocalCluster(n_workers=0, processes=True, dashboard_address=None) as empty, pytest.raises(ConfigError, match=f"Start some: dask worker {empty.scheduler_address}"):
        using(settings, empty.scheduler_address)


@contextlib.contextmanager
def tls(folder: Path) -> Iterator[list[str]]:
    "Make certificates, set them for the client, and give the arguments of scheduler and workers."
    import dask
    import distributed  # noqa: F401  (with its defaults, which are restored)

    ca = authority(folder / "tls" / "certs", "localhost")
    cert, key = folder / "tls" / "certs" / "public.crt", folder / "tls" / "certs" / "private.key"
    chosen = {"tls.ca-file": str(ca), "tls.client.cert": str(cert), "tls.client.key": str(key), "require-encryption": True}
    with dask.config.set({f"distributed.comm.{name}": value for name, value in chosen.items()}):
        yield ["--tls-ca-file", str(ca), "--tls-cert", str(cert), "--tls-key", str(key), "--host", "127.0.0.1", "--no-dashboard"]


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_tls_postgres_and_s3_give_the_bytes_of_a_laptop_and_a_killed_worker_loses_nothing(
    postgres: str, s3: Any, stores: tuple[Settings, Settings], tmp_path: Path
) -> None:
    more = {"duckdb_path": postgres, "duckdb_data_path": f"s3://{s3.bucket_lake}/c{time.time_ns()}/", "duckdb_threads": 1, "duckdb_memory_limit": "1GB"}
    port, asked = free_port(), replace(TRADES, refit_every="2D")
    laptop = stores[0].model_copy(update={"runs_dir": str(tmp_path / "one")})
    many = Settings(_env_file=None, **s3.settings, **more, runs_dir=str(tmp_path / "many"), dask_scheduler_address=f"tls://127.0.0.1:{port}")
    env = {**os.environ, **s3.env, **{k.upper(): str(v) for k, v in more.items()}, "OMP_NUM_THREADS": "1", "CRYPTORESEARCH_HOME": str(tmp_path)}
    with connect(laptop) as con:
        built = [make_bars(con, symbol, "1h") for symbol in ("AAAUSDT", "BBBUSDT")]
        alone, searched = train_run(con, asked, laptop), tune(con, SEARCHED, 5, n_folds=2, settings=laptop, storage=f"sqlite:///{tmp_path}/one.db")
    con = init_duckdb(many)
    write_files(tmp_path, con)
    with tls(tmp_path) as args, started(tmp_path, env) as start:
        start("scheduler", "--protocol", "tls", "--port", str(port), *args)
        begun = [start("worker", many.dask_scheduler_address, "--nthreads", "1", "--no-nanny", *args) for _ in range(2)]

        def kill_after_a_fold(fraction: float, text: str) -> None:
            if text.startswith("fold 2") and begun[0].poll() is None:
                os.kill(begun[0].pid, signal.SIGKILL)

        with open_cluster(many) as executor:
            executor.client.wait_for_workers(2, timeout=120)
            assert [make_bars(con, symbol, "1h", executor=executor) for symbol in ("AAAUSDT", "BBBUSDT")] == built
        together = train_run(con, asked, many, kill_after_a_fold)
        assert begun[0].wait(10) == -signal.SIGKILL and begun[1].poll() is None
        found = tune(con, SEARCHED, 5, n_folds=2, settings=many, storage=f"sqlite:///{tmp_path}/many.db")
    assert outcome(together.folder) == outcome(alone.folder) and len(together.info["folds"]) > 5
    for name in together.info["files"]:
        assert (together.folder / name).read_bytes() == (alone.folder / name).read_bytes(), name
    pd.testing.assert_frame_equal(found.table, searched.table, check_exact=True)
    with pytest.raises(ConfigError, match="a scheduler at tls://127"):  # without certificates
        train_run(con, replace(asked, seed=1), many)
