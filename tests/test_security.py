"""The page on security says what the package does: each claim names a test, each port is listed, and what comes from elsewhere is only data."""

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from conftest import ROOT

from cryptoresearch.data.maintenance import backup, restore, tidy
from cryptoresearch.data.series import normal_symbol
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import CryptoResearchError, SchemaError
from cryptoresearch.ingest.files import process_file
from cryptoresearch.settings import Settings

PAGE = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")


# --- the page


def claims(page: str) -> list[str]:
    "Return the rows of all tables, without their heads."
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [row for k, row in enumerate(rows) if not row.startswith("| ---") and not (k + 1 < len(rows) and rows[k + 1].startswith("| ---"))]


def unproven(row: str, tests: Callable[[str], set[str]]) -> list[str]:
    "List what is wrong with the tests that a row names."
    named = re.findall(r"`(test_\w+)::(test_\w+)`", row.rsplit("|", 2)[1])
    return [f"{file}::{name}" for file, name in named if name not in tests(file)] if named else [row]


def names_of(file: str) -> set[str]:
    "Name the tests of a file that are not switched off."
    path = ROOT / "tests" / f"{file}.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return {f.name for f in body if isinstance(f, ast.FunctionDef) and not any(re.search(r"mark\.skip\b", ast.unparse(d)) for d in f.decorator_list)}


def test_no_claim_without_a_test() -> None:
    assert len(claims(PAGE)) > 35
    assert [wrong for row in claims(PAGE) for wrong in unproven(row, names_of)] == []


def test_a_claim_without_a_test_is_found() -> None:
    table = "| what | shown by |\n| --- | --- |\n| a | `test_api::test_x` |\n| b | `test_api::test_y` |\n| c | |\n"
    assert [unproven(row, lambda _: {"test_x"}) for row in claims(table)] == [[], ["test_api::test_y"], ["| c | |"]]


# calls that open a port, and programs that do
LISTENS = re.compile(
    r"uvicorn\.(?:run|Config)\(|\bserve\(self\.|start_http_server\(|HTTPServer\(|TCPServer\(|\.listen\(|\.bind\(|(?:create|start)_server\(|"
    r'"-m", "(?:voila|jupyter\w*|http\.server)"|LocalCluster\(|Scheduler\(|AsyncKernelManager\):|transport="(?:sse|streamable-http)"'
)


def test_every_port_is_on_the_page() -> None:
    section = PAGE.split("## What listens where")[1].split("\n## ")[0]
    modules = {p.relative_to(ROOT / "cryptoresearch").with_suffix("").as_posix().replace("/", ".") for p in (ROOT / "cryptoresearch").rglob("*.py") if LISTENS.search(p.read_text(encoding="utf-8"))}
    assert modules == set(re.findall(r"`([a-z]+\.[a-z_]+)`", "".join(row.split("|")[2] for row in claims(section)))), "list what opens a port in docs/SECURITY.md"
    for name, field in Settings.model_fields.items():
        if name.endswith("_port"):
            assert name.upper() in section and f"127.0.0.1:{field.default}" in section
    cli = (ROOT / "cryptoresearch/cli.py").read_text(encoding="utf-8")
    for command in re.findall(r"\ndef ([a-z]\w*)\((?:[^()]|\([^()]*\))*?\b(?:port|metrics): ", cli):
        assert f"cryptoresearch {command}" in section, command
    published = [port for service in services().values() for port in service.get("ports", ())]
    assert len(published) == 6 and all(port.startswith("127.0.0.1:") for port in published)
    assert [port for port in published if not re.search(rf"\b{port.split(':')[1]}\b", section)] == []


@pytest.mark.parametrize("text", ["page = HTTPServer((host, port), H)", "s.bind((host, 1))", "await asyncio.start_server(f)", 'run([sys.executable, "-m", "voila"])', "cluster = LocalCluster(2)"])
def test_what_opens_a_port_is_recognised(text: str) -> None:
    assert LISTENS.search(text)


# --- what listens


def test_a_replay_survives_its_clients(con: duckdb.DuckDBPyConnection, shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    from cryptoresearch.live.replay import ReplayServer

    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv", progress=False)
    with ReplayServer(con, "BTCUSDT", speed=100) as server:
        assert server.url.startswith("ws://127.0.0.1:")
        for sent in ("[" * 100_000, '{"a":' * 50_000, "null", "[]", '{"type":"subscribe","symbol":""}', '{"type":"exec"}', b"\x00\xff"):
            with connect(server.url) as client:
                client.send(sent)
                assert "Invalid message" in str(client.recv(timeout=5))
        with connect(server.url) as client, pytest.raises(ConnectionClosed, match="1009"):
            client.send("x" * 10_000_000)
            client.recv(timeout=5)
        with connect(server.url) as client:
            client.send('{"type":"subscribe","symbol":"BINANCE:BTCUSDT"}')
            assert '"type":"trade"' in str(client.recv(timeout=10))
    assert "Traceback" not in caplog.text


def test_metrics_listen_on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from cryptoresearch.serving import monitor

    asked: dict[str, Any] = {}

    def started(port: int, **given: Any) -> Any:
        asked.update(given)
        nothing = SimpleNamespace(server_port=port, shutdown=lambda: None, server_close=lambda: None, join=lambda: None)
        return nothing, nothing

    monkeypatch.setattr(monitor, "start_http_server", started)
    with monitor.serve_metrics(SimpleNamespace(), 9464):
        assert asked["addr"] == "127.0.0.1"
    assert monitor.metrics_address("9464") == ("127.0.0.1", 9464)


@pytest.mark.skipif(os.name != "posix", reason="Unix sockets")
def test_kernels_of_notebooks_listen_on_no_port(tmp_path: Path) -> None:
    from cryptoresearch.serving.batch import _ThisPython

    kernel = type("Kernel", (_ThisPython,), {"sockets": str(tmp_path)})()
    assert (kernel.transport, kernel.ip) == ("ipc", f"{tmp_path}/k") and len(kernel.session.key) >= 32
    assert "tempfile.TemporaryDirectory(prefix=\"kernel-\")" in (ROOT / "cryptoresearch/serving/batch.py").read_text(encoding="utf-8")  # readable by its user only


def test_the_lab_keeps_its_token_and_the_loopback() -> None:
    commands = [line for file in ("Makefile", "docker-compose.yml", "cryptoresearch/serving/lab.py") for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if "lab" in line]
    assert commands and not [line for line in commands if re.search(r"token=|password=|disable_check|allow_origin|allow_remote", line)]
    assert "\t@$(BIN)/jupyter lab $(ARGS)" in commands  # without an address: JupyterLab's own is localhost, with a new token at each start


# --- files from elsewhere


def test_names_inside_an_archive_are_no_paths(con: duckdb.DuckDBPyConnection, tmp_path: Path, shared: Path) -> None:
    rows = (shared / "BTCUSDT-trades-2024-08-08.csv").read_bytes().splitlines(keepends=True)[:50]
    (tmp_path / "in").mkdir()
    for name in ("../../BTCUSDT-trades-2024-08-08.csv", "/tmp/cryptoresearch-evil/BTCUSDT-trades-2024-08-08.csv"):
        file, before = tmp_path / "in" / "BTCUSDT-trades-2024-08-08.zip", {p for p in tmp_path.rglob("*.csv")}
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr(name, b"".join(rows))
        with contextlib.suppress(SchemaError):
            process_file(con, file, progress=False)
        assert {p for p in tmp_path.rglob("*.csv")} == before and not Path("/tmp/cryptoresearch-evil").exists()


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "+1", "-2+3", "=CMD|'/C calc'!A0", "\t=1", "\r=1", "BINANCE:=1", "=HYPERLINK(\"http://x\")", "BTC\n=1"])
def test_no_symbol_is_a_formula(text: str, con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(SchemaError):
        normal_symbol(text)
    with pytest.raises(CryptoResearchError):
        process_frame(con, text)


def process_frame(con: duckdb.DuckDBPyConnection, symbol: str) -> None:
    "Load a trade of a symbol that a column states."
    from cryptoresearch import ingest_frame

    ingest_frame(con, pd.DataFrame({"time": ["2024-01-01T00:00:00Z"], "price": [1.0], "qty": [1.0], "symbol": [symbol]}), kind="trades")


def test_deep_frames_are_malformed() -> None:
    from cryptoresearch.live.binance import parse_binance
    from cryptoresearch.live.messages import Malformed, parse_message

    for text in ("[" * 100_000, '{"type":"trade","data":' + "[" * 100_000, '{"stream":' * 100_000):
        assert isinstance(parse_message(text), Malformed)
        assert isinstance(parse_binance(text), Malformed)


RECORD = {
    "id": "evil-1m-return5-0123456789", "created_at": "2024-01-01T00:00:00+00:00", "level": "none", "verdict": "<script>alert(1)</script>", "trained_until": "2024-01-01T00:00:00+00:00", "simulated": False,
    "config": {"symbol": "<img src=x>", "spec": "1m", "target": "return", "horizon": 5, "model": "ridge", "params": {}, "features": ["ret_1"], "modules": ["evil_module", "/tmp/evil_module.py"]},
    "scores": {"model": {"n": 1, "ic": 0.0, "r2_oos": 0.0, "dm_p": 1.0}}, "files": {}, "snapshot": 1,
}  # fmt: skip


def test_a_record_of_a_run_runs_nothing(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptoresearch.runs.run import load_run
    from cryptoresearch.serving.home_page import runs_part
    from cryptoresearch.serving.runs_page import runs_table

    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = Path(settings.runs_dir) / RECORD["id"]
    folder.mkdir(parents=True)
    for text in (json.dumps(RECORD), "[" * 100_000):
        (folder / "run.json").write_text(text)
        for html in (runs_part(settings), runs_table(settings)):
            assert "evil-1m" in html and "<script" not in html and "<img" not in html
        with pytest.raises(CryptoResearchError):
            load_run(RECORD["id"], settings)
    assert not (tmp_path / "ran").exists()


# --- backups from elsewhere


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "A small backup in one file."
    folder = tmp_path_factory.mktemp("saved")
    one = Settings(_env_file=None, duckdb_path=str(folder / "store" / "c.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(one) as con:
        con.execute("INSERT INTO trades (symbol, source, trade_id, ts, price, qty, file_id) SELECT 'X', 's', i, TIMESTAMP '2024-01-01' + to_seconds(i), 1, 1, 'f' FROM range(5000) r(i)")
        yield backup(con, folder / "backup.tar", one).path


def changed(saved: Path, to: Path, more: dict[str, bytes], catalog: str = "") -> Path:
    "Write a backup with more files, and with a statement carried out on its catalog; all checksums are right."
    with tarfile.open(saved) as old:
        parts = {m.name: old.extractfile(m).read() for m in old.getmembers()}
    if catalog:
        file = to.with_suffix(".sqlite")
        file.write_bytes(parts["catalog"])
        subprocess.run([sys.executable, "-c", "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.executescript(sys.argv[2]); c.commit()", file, catalog], check=True)
        parts["catalog"] = file.read_bytes()
    manifest = json.loads(parts.pop("manifest.json"))
    parts |= more
    manifest["files"] = [{"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in parts.items()]
    with tarfile.open(to, "w") as new:
        for name, data in (parts | {"manifest.json": json.dumps(manifest).encode()}).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return to


def place(folder: Path) -> Settings:
    return Settings(_env_file=None, duckdb_path=str(folder / "new" / "c.sqlite"), runs_dir=str(folder / "new-runs"), duckdb_threads=1)


@pytest.mark.parametrize("name", ["{victim}", "../../victim", "data/../../../victim", "runs/../../victim", "other/victim", "data//victim", "runs/./victim", "", "data/"])
def test_a_backup_writes_only_inside_the_new_store(saved: Path, tmp_path: Path, name: str) -> None:
    evil = changed(saved, tmp_path / "evil.tar", {name.format(victim=tmp_path / "victim"): b"evil"})
    with pytest.raises(SchemaError, match="a backup of format 1"):
        restore(evil, place(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar"]


OUTSIDE = {
    "absolute": "UPDATE ducklake_data_file SET path = '/etc/passwd', path_is_relative = 0",
    "above": "UPDATE ducklake_data_file SET path = '../../../../etc/passwd'",
    "elsewhere": "UPDATE ducklake_table SET path = 'https://evil.example/', path_is_relative = 0",
    "above its table": "UPDATE ducklake_schema SET path = '../'",
    "no catalog": "DROP TABLE ducklake_data_file",
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_catalog_names_files_of_its_store_only(saved: Path, tmp_path: Path, case: str) -> None:
    with pytest.raises(SchemaError, match="inside its data path"):
        restore(changed(saved, tmp_path / "evil.tar", {}, OUTSIDE[case]), place(tmp_path))
    assert not (tmp_path / "new" / "c.sqlite").exists() and not (tmp_path / "new" / "lake").exists()


def test_a_restored_catalog_deletes_nothing_elsewhere(saved: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.parquet"
    victim.write_bytes(b"mine")
    leaving = f"INSERT INTO ducklake_files_scheduled_for_deletion SELECT 7777, '{victim}', 0, '2020-01-01 00:00:00+00'"
    one = place(tmp_path)
    restore(changed(saved, tmp_path / "evil.tar", {}, leaving), one)
    with init_duckdb(one) as con:
        tidy(con, one, keep="0s", delete_after="0s")
        assert con.execute("SELECT count(*) FROM trades").fetchone() == (5000,)
    assert victim.read_bytes() == b"mine"


# --- secrets, network, containers


def test_settings_show_no_secret() -> None:
    words = {"finnhub_token": "t0p-1", "minio_access_key": "t0p-2", "minio_secret_key": "t0p-3", "minio_session_token": "t0p-4", "duckdb_path": "postgres:password=t0p-5", "api_keys": "a" * 64, "archive_url": "https://u:t0p-6@x"}
    shown = repr(Settings(_env_file=None, **words)) + str(Settings(_env_file=None, **words))
    assert "t0p" not in shown and "aaaa" not in shown
    for wrong in ({"minio_secret_key": None}, {"duckdb_memory_limit": "t0p"}, {"api_keys": "t0p-7"}):
        with pytest.raises(CryptoResearchError) as told:
            Settings(_env_file=None, **words | wrong)
        assert "t0p" not in str(told.value)


def test_env_goes_into_no_image_and_no_commit() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert next(line for line in ignored if line and not line.startswith("#")) == "*" and not [line for line in ignored if line.startswith("!") and (".env" in line or line in ("!.", "!*"))]
    assert ".env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_files_bars_and_features_need_no_network(con: duckdb.DuckDBPyConnection, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptoresearch import DataProcessing
    from cryptoresearch.data.bars import read_bars
    from cryptoresearch.data.build_bars import make_bars

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refused)
    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv", progress=False)
    make_bars(con, "BTCUSDT", "1m")
    assert len(DataProcessing().process_data(read_bars(con, "BTCUSDT", "1m")))


def services() -> dict[str, Any]:
    import yaml
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def test_containers_have_no_more_rights_than_they_need() -> None:
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "user"} & set(service), name
        assert not [volume for volume in service.get("volumes", ()) if "docker.sock" in volume], name
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8").rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER research$", image, re.MULTILINE) and "sudo" not in image and "uv" not in image.replace("uvicorn", "").split("\nUSER")[1]


def test_services_have_a_health_check() -> None:
    for name, service in services().items():
        check = service.get("healthcheck", {})
        assert ("test" in check and "start_period" in check) or service["restart"] == "no", name
        for port in re.findall(r"127\.0\.0\.1:(\d+)/", " ".join(check.get("test", ()))):
            assert any(published.endswith(f":{port}") for published in service["ports"]), name
