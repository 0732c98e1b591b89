"""Inputs that cannot work end in a typed error with a remedy, leave nothing behind, and show no key."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from conftest import COMMAND_LINE, Command

from cryptoresearch import doctor
from cryptoresearch.data.store import connect, extension_file, init_duckdb
from cryptoresearch.doctor import check_extensions
from cryptoresearch.errors import ConfigError, DataNotFound
from cryptoresearch.live.feed import address, FinnhubWebSocket
from cryptoresearch.settings import get_settings, Settings

KEYS = ("s3cr3t-in-path", "0ther-in-query")
URL = f"ws://127.0.0.1:9/{KEYS[0]}/x?apikey={KEYS[1]}"  # nothing answers there


@pytest.fixture
def run(command: Command) -> Command:
    "Runs the command line; on request as a user whom file permissions bind, which they do not bind root."

    def call(*arguments: str, env: dict[str, str], without_rights: bool = False) -> subprocess.CompletedProcess[str]:
        if not (without_rights and os.geteuid() == 0):
            return command(*arguments, env=os.environ | env)
        drop = ("-dac_override", "-dac_read_search")
        python = ["setpriv", f"--bounding-set={','.join(drop)}", f"--inh-caps={','.join(drop)}", sys.executable, "-c", COMMAND_LINE]
        return subprocess.run([*python, *arguments], capture_output=True, text=True, timeout=120, env=os.environ | env, check=False)

    return call


def store_env(path: Path | str) -> dict[str, str]:
    return {"DUCKDB_PATH": str(path), "LOG_LEVEL": "DEBUG"}


@pytest.mark.parametrize("text", ["LOG_LEVEL=INFO\nRUNS_DIR=läufe\n".encode("latin-1"), "LOG_LEVEL=INFO\n".encode("utf-16"), "A=b\n".encode("utf-16-le")])
def test_an_env_file_in_another_encoding_is_named(tmp_path, monkeypatch, text):
    (tmp_path / ".env").write_bytes(text)
    monkeypatch.setenv("CRYPTORESEARCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"\.env in UTF-8.*Save it as UTF-8"):
        get_settings()


def test_an_env_file_may_begin_with_a_mark_of_its_encoding(tmp_path):
    (tmp_path / ".env").write_bytes("LOG_LEVEL=ERROR\n".encode("utf-8-sig"))
    assert Settings(_env_file=tmp_path / ".env").log_level == "ERROR"


@pytest.mark.parametrize("url", ["ws://[::1", "ws://127.0.0.1:99999", "ws://127.0.0.1:x", "ws://127.0.0.1:0", "ws://", "nothing", "http://h"])
def test_an_address_that_cannot_work_is_refused_at_once(settings, url):
    with pytest.raises(ConfigError, match="Correct FINNHUB_URL or --url"):
        FinnhubWebSocket(url=url, settings=settings)


def test_only_scheme_host_and_port_are_shown(settings, caplog):
    where = address(URL, settings=settings)
    assert where.shown == "ws://127.0.0.1:9" and where.full.get_secret_value() == URL
    feed = FinnhubWebSocket(url=URL, settings=settings, retry_base_s=0.01)
    package = logging.getLogger("cryptoresearch")
    propagated, package.propagate = package.propagate, True
    try:
        with caplog.at_level(logging.DEBUG), feed:
            feed.join(0.5)
    finally:
        package.propagate = propagated
    with connect(settings, read_only=True) as con:
        stored = str(con.execute("FROM live_sessions").fetchall())
    shown = f"{caplog.text} {feed!r} {feed.stats} {where} {stored}"
    assert "ws://127.0.0.1:9" in stored and "lost" in caplog.text
    assert not [key for key in KEYS if key in shown]


def test_a_stream_that_never_connected_fails(run, tmp_path):
    done = run("stream", "--url", URL, "--seconds", "1", env=store_env(tmp_path / "catalog.sqlite"))
    assert done.returncode == 7 and "expected a connection to ws://127.0.0.1:9" in done.stderr
    assert not [key for key in KEYS if key in done.stdout + done.stderr]
    data = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert not [key for key in KEYS if key.encode() in data]
    done = run("stream", "--url", "ws://127.0.0.1:99999", env=store_env(tmp_path / "other.sqlite"))
    assert done.returncode == 3 and "ConfigError" in done.stderr and not (tmp_path / "other.sqlite").exists()


@pytest.mark.parametrize("arguments", [("bars", "BTCUSDT", "1h"), ("train", "--symbol", "BTCUSDT"), ("data", "status"), ("replay", "BTCUSDT")])
def test_reading_creates_no_store(run, tmp_path, arguments):
    done = run(*arguments, env=store_env(tmp_path / "store" / "catalog.sqlite"))
    assert done.returncode == 4, done.stdout + done.stderr
    assert "expected a store at" in done.stderr and "cryptoresearch ingest FILE" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_file_that_is_not_there_makes_no_store(run, tmp_path):
    done = run("ingest", str(tmp_path / "nope.csv"), env=store_env(tmp_path / "store" / "catalog.sqlite"))
    assert done.returncode == 4 and "nope.csv; found none" in done.stderr
    assert not list(tmp_path.iterdir())


def foreign(path: Path) -> Path:
    "Make the database of another program."
    made = sqlite3.connect(path) if path.suffix == ".sqlite" else duckdb.connect(path)
    made.execute("CREATE TABLE notes (text VARCHAR)")
    made.commit()
    made.close()
    return path


@pytest.mark.parametrize("name", ["notes.sqlite", "notes.duckdb"])
def test_the_database_of_another_program_is_left_alone(tmp_path, name):
    path = foreign(tmp_path / name)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"the database of something else at .* \(tables notes\).*Set DUCKDB_PATH to another file"):
        init_duckdb(Settings(_env_file=None, duckdb_path=str(path)))
    for read_only in (True, False):
        with pytest.raises(DataNotFound, match="expected a store"):
            connect(Settings(_env_file=None, duckdb_path=str(path)), read_only=read_only)
    assert path.read_bytes() == before


def test_an_sqlite_file_without_tables_becomes_a_store_with_a_write_ahead_log(tmp_path):
    path = foreign(tmp_path / "notes.sqlite")
    with sqlite3.connect(path) as con:
        con.execute("DROP TABLE notes")
    con.close()
    init_duckdb(Settings(_env_file=None, duckdb_path=str(path))).close()
    with sqlite3.connect(path) as con:
        assert con.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    con.close()


@pytest.mark.parametrize("name", ["catalog.sqlite", "catalog.duckdb"])
@pytest.mark.parametrize("read_only", [True, False])
def test_an_empty_file_is_no_store(tmp_path, name, read_only):
    (tmp_path / name).touch()
    with pytest.raises(DataNotFound, match=r"a store at .*found none\. Run: cryptoresearch demo, or cryptoresearch ingest FILE"):
        connect(Settings(_env_file=None, duckdb_path=str(tmp_path / name)), read_only=read_only)


def test_an_empty_postgresql_database_is_no_store(tmp_path, postgres):
    given = Settings(_env_file=None, duckdb_path=postgres, duckdb_data_path=str(tmp_path / "lake"))
    for read_only in (True, False):
        with pytest.raises(DataNotFound, match="the PostgreSQL database of DUCKDB_PATH; found none"):
            connect(given, read_only=read_only)
    init_duckdb(given).close()
    connect(given).close()


def test_a_store_that_may_only_be_read(run, tmp_path, hours_in):
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may write everything, and there is no setpriv")
    folder = tmp_path / "store"
    folder.mkdir()
    hours_in(folder, "2021-01-01", "2021-01-05")
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        for arguments in (("bars", "BTCUSDT", "4h"), ("stream", "--url", "ws://127.0.0.1:9", "--seconds", "1")):
            done = run(*arguments, env=store_env(folder / "catalog.sqlite"), without_rights=True)
            assert done.returncode == 3, done.stdout + done.stderr
            assert "ConfigError: expected a store that can be written" in done.stderr, done.stderr[-800:]
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)


def test_a_duckdb_catalog_that_another_process_holds_is_reported_before_training(run, tmp_path):
    path = tmp_path / "catalog.duckdb"
    init_duckdb(Settings(_env_file=None, duckdb_path=str(path))).close()
    script = f"import duckdb, sys; con = duckdb.connect({str(path)!r}); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        done = run("train", "--symbol", "BTCUSDT", env=store_env(path))
        holder.communicate("")
    assert done.returncode == 7 and "StoreBusy" in done.stderr and "set DUCKDB_PATH to an SQLite file" in done.stderr


def test_a_file_name_that_is_not_utf_8(run, tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux has such names")
    name = os.fsencode(tmp_path) + b"/BTCUSDT-trades-2024-01-01\xff.csv"
    Path(os.fsdecode(name)).write_text("1,100.0,1.0,100.0,1704067200000,true,true\n")
    done = run("ingest", os.fsdecode(name), env=store_env(tmp_path / "catalog.sqlite"))
    assert done.returncode == 5 and r"expected a file name in UTF-8; found" in done.stderr and "Rename the file" in done.stderr, done.stderr[-800:]


def test_doctor_checks_the_signatures_that_opening_a_store_does_not(tmp_path, monkeypatch, settings):
    damaged = tmp_path / "postgres_scanner.duckdb_extension"
    data = bytearray(extension_file("postgres_scanner").read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert check_extensions(settings).state == "ok"
    monkeypatch.setattr(doctor, "extension_file", lambda name: damaged if name == "postgres_scanner" else extension_file(name))
    check = check_extensions(settings)
    assert check.state == "failed" and "postgres_scanner: signature or file damaged" in check.found and "duckdb-extension-postgres-scanner==" in check.remedy
    con = init_duckdb(settings)
    with pytest.raises(duckdb.Error, match="signature is either missing or invalid"):
        con.load_extension(str(damaged))
    con.close()
