"""Folds on a Dask cluster with TLS, a PostgreSQL catalog and an S3 server: the bytes of one process, whatever becomes of a worker."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_archive import authority

from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.store import connect, init_duckdb, snapshot
from cryptoresearch.errors import ConfigError, RunMismatch
from cryptoresearch.ingest.files import process_file
from cryptoresearch.runs.cluster import fold_sender, open_cluster
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.identity import identity, read_data
from cryptoresearch.runs.run import train_run
from cryptoresearch.runs.walk_forward import first_test, prepare, walk_folds
from cryptoresearch.settings import Settings

ASKED = RunConfig(
    "BTCUSDT", start="2020-01-01", test_start="2022-06-01", refit_every="60D", features=("returns", "har", "calendar"),
    target="volatility", model="lightgbm", params={"n_estimators": 100, "n_threads": 1},
)  # fmt: skip


@pytest.mark.parametrize("address", ["tcp://10.0.0.7:8786", "http://127.0.0.1:8786", "tls://desk.example", "tls://[::1:8786", "desk.example:8786"])
def test_a_scheduler_of_another_machine_needs_tls(settings: Settings, address: str) -> None:
    with pytest.raises(ConfigError, match="--protocol tls"), open_cluster(settings.model_copy(update={"dask_scheduler_address": address})):
        pass


def test_without_dask_the_remedy_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r'pip install "cryptoresearch\[cluster\]"'), open_cluster(settings.model_copy(update={"dask_scheduler_address": "tcp://127.0.0.1:1"})):
        pass


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    "Start a scheduler or a worker; all end with the test."
    begun: list[subprocess.Popen] = []

    def call(what: str, *args: str, env: dict[str, str]) -> subprocess.Popen:
        with (tmp_path / f"{what}-{len(begun)}.log").open("w") as log:
            begun.append(subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{what}", *args], env=env, cwd=tmp_path, stdout=log, stderr=log))
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.wait()


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


def outcome(folder: Path) -> dict[str, Any]:
    "Read what a run depends on, and the checksums of its files."
    info = json.loads((folder / "run.json").read_text())
    return {k: info[k] for k in ("id", "identity", "files", "folds", "final", "data")}


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_a_cluster_gives_the_bytes_of_one_process_and_survives_a_worker(postgres: str, s3, start: Start, tmp_path: Path, shared: Path, record_property) -> None:
    more = {"duckdb_path": postgres, "duckdb_data_path": f"s3://{s3.bucket_lake}/c{time.time_ns()}/", "duckdb_threads": 1, "duckdb_memory_limit": "1GB"}
    one = Settings(_env_file=None, **s3.settings, **more, runs_dir=str(tmp_path / "one"))
    con = init_duckdb(one)
    process_file(con, shared / "BTCUSDT-1h-2017-08_2024-04.parquet", symbol="BTCUSDT", interval="1h", progress=False)
    make_bars(con, "BTCUSDT", "1h", source="klines")
    alone = train_run(con, ASKED, one)
    port = free_port()
    env = {**os.environ, **s3.env, **{k.upper(): str(v) for k, v in more.items()}, "OMP_NUM_THREADS": "1", "CRYPTORESEARCH_HOME": str(tmp_path)}
    with tls(tmp_path) as args:
        start("scheduler", "--protocol", "tls", "--port", str(port), *args, env=env)
        address = f"tls://127.0.0.1:{port}"
        workers = [start("worker", address, "--nthreads", "1", "--no-nanny", *args, env=env) for _ in range(2)]
        many = one.model_copy(update={"dask_scheduler_address": address, "runs_dir": str(tmp_path / "many")})
        data, now = read_data(con, ASKED), snapshot(con)
        samples, first, parts = prepare(data.bars, ASKED), first_test(ASKED, data.bars), identity(ASKED, data)
        with open_cluster(many) as executor:
            executor._client.wait_for_workers(2, timeout=120)
            with pytest.raises(RunMismatch, match="versions on the workers"):
                walk_folds(ASKED, samples, first, submit=fold_sender(executor, ASKED, data.snapshot, parts | {"code": "another"}))
            walked, seconds = {}, {}
            for n in (2, 1, 2):  # the first prepares the samples
                names = list(executor._client.scheduler_info()["workers"])[:n]
                chosen = executor._client.get_executor(pure=False, workers=names)
                begun = time.monotonic()
                walked[n] = walk_folds(ASKED, samples, first, submit=fold_sender(chosen, ASKED, data.snapshot, parts))
                seconds[n] = time.monotonic() - begun
            assert snapshot(con) == now, "a worker has written to the store"
        for n in (1, 2):
            pd.testing.assert_frame_equal(walked[n][0], walked[1][0], check_exact=True)
        efficiency = seconds[1] / (2 * seconds[2])
        record_property("efficiency", round(efficiency, 2))
        print(f"{len(walked[1][1])} folds: one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s, efficiency {efficiency:.2f}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")

        def kill_after_a_fold(fraction: float, text: str) -> None:
            if text.startswith("fold 2") and workers[0].poll() is None:
                os.kill(workers[0].pid, signal.SIGKILL)

        together = train_run(con, ASKED, many, kill_after_a_fold)
        assert workers[0].wait(10) == -signal.SIGKILL and workers[1].poll() is None
    assert outcome(together.folder) == outcome(alone.folder) and len(together.info["folds"]) > 10
    for name in together.info["files"]:
        assert (together.folder / name).read_bytes() == (alone.folder / name).read_bytes(), name
    with connect(one) as reader:
        assert reader.execute("SELECT count(DISTINCT run_id), count(*) FROM trials").fetchone() == (1, 1)
    refused = replace(ASKED, seed=1)
    with pytest.raises(ConfigError, match="a scheduler at tls://127"):  # without certificates
        train_run(con, refused, many)
