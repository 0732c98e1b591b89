"""The store under several processes: what a notebook cannot show. Each worker is a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import duckdb
import pytest
from conftest import examples, NewStore, Program

from cryptoresearch.data import store
from cryptoresearch.data.store import connect, in_turn, init_duckdb, RecycledConnection, snapshot, write
from cryptoresearch.errors import DataNotFound, StoreBusy
from cryptoresearch.settings import Settings

WORKER = r'''
import json, sys, time
from cryptoresearch.data.store import connect, init_duckdb, write
from cryptoresearch.settings import Settings
role, number, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
s = Settings(_env_file=None, **json.loads(sys.argv[4]))
INSERT = """INSERT INTO gaps (symbol, source, kind, start_ts, end_ts, first_missing_id, last_missing_id, file_id, detected_at, interval) SELECT 'W', ?, 'id', TIMESTAMP '2024-01-01', TIMESTAMP '2024-01-01', i, ?, NULL, NULL, NULL FROM range(50) r(i)"""
con = connect(s, read_only=True) if role == "reader" else init_duckdb(s)
con.execute("SELECT ?, ?", ["warm", 1]).fetchall()  # imports what binding parameters needs
print("ready", flush=True)
sys.stdin.readline()
laps, end, k = [], time.monotonic() + seconds, 0
while time.monotonic() < end:
    t = time.monotonic()
    if role == "reader":
        n, commits = con.execute("SELECT count(*), count(DISTINCT last_missing_id) FROM gaps").fetchone()
        assert n % 50 == 0, f"half a commit was read: {n}"
    else:
        write(con, lambda c: c.execute(INSERT, [str(number), k]))
    laps.append(time.monotonic() - t)
    k += 1
    if role == "killed":
        print(k, flush=True)
    elif role != "flatout":
        time.sleep(max(0.0, (0.25 if role == "writer" else 0.05) - laps[-1]))
laps.sort()
print(json.dumps({"role": role, "n": k, "p50": laps[len(laps) // 2], "p99": laps[int(len(laps) * 0.99)], "max": laps[-1]}), flush=True)
'''


@pytest.fixture
def start(program: Program) -> Program:
    "Starts a worker: its role, its number, how long it works (s), and the settings of its store."

    def call(role: str, number: int, seconds: float, options: dict) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return program(WORKER, role, number, seconds, json.dumps(options), **pipes)

    return call


def run_all(start: Program, jobs: list[tuple[str, int, float]], options: dict) -> list[dict]:
    "Start the workers, let them go together, and return what each measured."
    workers = [start(*job, options) for job in jobs]
    for w in workers:
        assert w.stdout.readline().strip() == "ready", w.communicate()[1]
    for w in workers:
        w.stdin.write("go\n")
        w.stdin.flush()
    done = []
    for w in workers:
        out, err = w.communicate(timeout=200)
        assert w.returncode == 0, err
        done.append(json.loads(out.splitlines()[-1]))
    return done


def options(tmp_path: Path, path: str | None = None) -> dict:
    return {"duckdb_path": path or str(tmp_path / "catalog.sqlite"), "duckdb_data_path": str(tmp_path / "lake"), "duckdb_threads": 1, "duckdb_memory_limit": "500MB"}


def count(opts: dict) -> dict[str, int]:
    con = init_duckdb(Settings(_env_file=None, **opts))
    return dict(con.execute("SELECT source, count(*) FROM gaps GROUP BY 1").fetchall())


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [6.0, pytest.param(30.0, marks=pytest.mark.heavy)])
def test_one_writer_and_three_readers(seconds: float, tmp_path: Path, start: Program, record_property) -> None:
    "Readers see whole commits and nobody starves. Times are recorded, not limited: they depend on the machine."
    opts = options(tmp_path)
    init_duckdb(Settings(_env_file=None, **opts)).close()
    done = run_all(start, [("writer", 0, seconds)] + [("reader", i, seconds) for i in range(3)], opts)
    record_property("laps", done)
    print(*done, sep="\n")
    assert count(opts) == {"0": done[0]["n"] * 50}
    assert done[0]["n"] > 2 * seconds, done  # twice as many when nothing else runs
    assert min(d["n"] for d in done[1:]) > 8 * seconds, done  # of at most 20 per second


@pytest.mark.parametrize("locks", [True, False])
def test_sqlites_index_is_kept_between_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    "Who rebuilds it makes others wait for a second: SQLite deletes it with the write-ahead log once it has no user."
    monkeypatch.setattr(store, "_OPEN_FILE_LOCKS", locks and store._OPEN_FILE_LOCKS)
    settings, wal = Settings(_env_file=None, **options(tmp_path)), tmp_path / "catalog.sqlite-wal"
    con, logs = init_duckdb(settings), list[int]()
    for k in range(4):
        write(con, lambda c, k=k: c.execute("INSERT INTO gaps (symbol, source, kind, first_missing_id) VALUES ('X', 'big', 'id', ?)", [k]))
        if k == 1:
            connect(settings, read_only=True).close()  # another handle of this process: ordinary locks would be lost with it
        logs += [wal.stat().st_ino] if wal.exists() else []
    assert (len(logs) == 4 and len(set(logs)) == 1) == store._OPEN_FILE_LOCKS


@pytest.mark.parametrize("catalog", ["sqlite", "postgres"])
def test_two_writers_that_collide_both_succeed(tmp_path: Path, start: Program, catalog: str, request: pytest.FixtureRequest) -> None:
    opts = options(tmp_path, request.getfixturevalue("postgres") if catalog == "postgres" else None)
    init_duckdb(Settings(_env_file=None, **opts)).close()
    seconds = examples(3, 5)
    done = run_all(start, [("flatout", 0, seconds), ("flatout", 1, seconds)], opts)
    print(*done, sep="\n")
    assert count(opts) == {str(i): d["n"] * 50 for i, d in enumerate(done)}
    assert min(d["n"] for d in done) > 3, done  # neither starves


def test_two_processes_create_the_same_store(tmp_path: Path, start: Program) -> None:
    opts = options(tmp_path)
    done = run_all(start, [("writer", i, 0.5) for i in range(3)], opts)
    assert count(opts) == {str(i): d["n"] * 50 for i, d in enumerate(done)}


@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_killed_writer_leaves_whole_commits_only(tmp_path: Path, start: Program, after: int) -> None:
    opts = options(tmp_path)
    worker = start("killed", 7, 60.0, opts)
    assert worker.stdout.readline().strip() == "ready", worker.communicate()[1]
    worker.stdin.write("go\n")
    worker.stdin.flush()
    for _ in range(after):
        worker.stdout.readline()
    time.sleep(0.004 * after)  # somewhere inside a transaction
    os.kill(worker.pid, signal.SIGKILL)
    told = [after] + [int(line) for line in worker.stdout.read().split()]
    worker.wait()
    rows = count(opts)["7"]
    assert rows % 50 == 0
    assert rows >= max(told) * 50  # what was acknowledged is there


def test_a_writer_that_waits_too_long_is_told(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, **options(tmp_path))
    con, other = init_duckdb(settings), init_duckdb(settings)

    def slow(c) -> None:
        with pytest.raises(StoreBusy, match="Try again"):
            write(other, lambda c: None, timeout_s=0.3)

    write(con, slow)


def test_a_moved_store_still_reads(tmp_path: Path) -> None:
    home = tmp_path / "a"
    con = init_duckdb(Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite")))
    write(con, lambda c: c.execute("INSERT INTO gaps (symbol, source, kind, start_ts, end_ts, first_missing_id, last_missing_id, file_id, detected_at, interval) SELECT 'X', 'big', 'id', NULL, NULL, i, NULL, NULL, NULL, NULL FROM range(5000) r(i)"))
    con.close()
    shutil.move(home, tmp_path / "b")
    moved = connect(Settings(_env_file=None, duckdb_path=str(tmp_path / "b" / "catalog.sqlite")), read_only=True)
    assert moved.execute("SELECT count(*), sum(first_missing_id) FROM gaps").fetchone() == (5000, 5000 * 4999 // 2)


def test_a_duckdb_catalog_serves_one_process(tmp_path: Path, start: Program) -> None:
    opts = options(tmp_path, str(tmp_path / "one.duckdb"))
    con = init_duckdb(Settings(_env_file=None, **opts))
    write(con, lambda c: c.execute("INSERT INTO gaps (symbol, source, kind, start_ts, end_ts, first_missing_id, last_missing_id, file_id, detected_at, interval) SELECT 'X', 's', 'id', NULL, NULL, 1, NULL, NULL, NULL, NULL"))
    other = start("writer", 0, 1.0, opts)
    _, err = other.communicate("go\n", timeout=60)
    assert other.returncode != 0
    assert "StoreBusy" in err
    assert "PostgreSQL" in err


def test_a_duckdb_catalog_serves_one_connection_of_a_process(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, **options(tmp_path, str(tmp_path / "one.duckdb")))
    con = init_duckdb(settings)
    with pytest.raises(StoreBusy, match="set DUCKDB_PATH to an SQLite file"):
        init_duckdb(settings)
    con.close()


def test_postgres_catalog_keeps_snapshots(tmp_path: Path, postgres: str) -> None:
    settings = Settings(_env_file=None, **options(tmp_path, postgres))
    con = init_duckdb(settings)
    pinned = snapshot(con)
    write(con, lambda c: c.execute("INSERT INTO gaps (symbol, source, kind, start_ts, end_ts, first_missing_id, last_missing_id, file_id, detected_at, interval) SELECT 'X', 's', 'id', NULL, NULL, 1, NULL, NULL, NULL, NULL"))
    assert connect(settings, snapshot=pinned).execute("SELECT count(*) FROM gaps").fetchone() == (0,)
    assert con.execute("SELECT count(*) FROM gaps").fetchone() == (1,)


def test_no_store_is_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match="cryptoresearch demo"):
        connect(Settings(_env_file=None, **options(tmp_path)), read_only=True)
    assert not (tmp_path / "catalog.sqlite").exists()


def test_rows_on_their_way_into_parquet_are_seen_once(tmp_path: Path) -> None:
    "While inlined rows move out of the catalog, a reader with several threads sees each of them in one place, never in none."
    s = Settings(_env_file=None, **(options(tmp_path) | {"duckdb_threads": 2}))
    con, ended, counts = init_duckdb(s), threading.Event(), set()

    def read() -> None:
        with connect(s, read_only=True) as reader:
            while not ended.is_set():
                counts.add(reader.execute("SELECT (SELECT count(*) FROM coverage), count(*) >= 0 FROM gaps").fetchall()[0])

    def replace(c) -> None:
        c.execute("DELETE FROM coverage")
        c.execute("INSERT INTO coverage (symbol, file_id) VALUES ('X', 'live')")

    write(con, replace)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for r in readers:
        r.start()
    for _ in range(examples(20, 60)):
        write(con, replace)
        in_turn(con, "CALL ducklake_flush_inlined_data('lake', table_name => 'coverage')")
    ended.set()
    for r in readers:
        r.join()
    assert counts == {(1, True)}


@pytest.fixture
def https_file(tmp_path: Path):
    "A server with a certificate of its own authority on 127.0.0.1: address of a Parquet file, and the authority's certificate."
    import http.server
    import ssl

    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out ca.pem"
    subprocess.run(["openssl", *made.split()], cwd=tmp_path, check=True, capture_output=True)
    duckdb.execute(f"COPY (SELECT 42 AS answer) TO '{tmp_path}/x.parquet' (FORMAT parquet)")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args) -> None:
            "Be silent."

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}/x.parquet", tmp_path / "ca.pem"
    server.shutdown()
    server.server_close()


def test_a_certificate_is_believed_with_its_authority_only(tmp_path: Path, https_file) -> None:
    uri, authority = https_file
    keys = {"minio_endpoint": "https://" + uri.split("/")[2], "minio_access_key": "k", "minio_secret_key": "s"}
    believing = init_duckdb(Settings(_env_file=None, **options(tmp_path), **keys, minio_ca_file=str(authority)))
    assert believing.execute(f"SELECT answer FROM '{uri}'").fetchall() == [(42,)]
    doubting = init_duckdb(Settings(_env_file=None, **options(tmp_path), **keys))
    with pytest.raises(duckdb.Error, match=r"(?i)ssl|certificate|connection"):
        doubting.execute(f"SELECT answer FROM '{uri}'").fetchall()


def test_a_connection_is_opened_again_while_cursors_are_in_use(tmp_path: Path, new_store: NewStore) -> None:
    store, cursors, opened = RecycledConnection(new_store(tmp_path / "store")), [], []
    for every_s in (60.0, 60.0, 0.0, 60.0):
        store.every_s = every_s
        cursors.append(store.cursor())
        opened.append(store._own)
    assert opened[0] is opened[1] and opened[1] is not opened[2] and opened[2] is opened[3]
    del opened
    assert [con.execute("SELECT count(*) FROM gaps").fetchall() for con in cursors] == [[(0,)]] * 4
    store.close()
    assert store.cursor().execute("SELECT count(*) FROM gaps").fetchall() == [(0,)]


def test_a_connection_that_cannot_be_opened_again_is_kept(tmp_path: Path, new_store: NewStore) -> None:
    store = RecycledConnection(new_store(tmp_path / "store"), every_s=0.0)
    store.cursor().close()
    store.settings = store.settings.model_copy(update={"duckdb_path": str(tmp_path / "nowhere" / "catalog.sqlite")})
    assert store.cursor().execute("SELECT count(*) FROM gaps").fetchall() == [(0,)]
    store.close()
    with pytest.raises(DataNotFound):
        store.cursor()


def test_cursors_of_a_given_connection_leave_it_open(tmp_path: Path, new_store: NewStore) -> None:
    settings = new_store(tmp_path / "store")
    with init_duckdb(settings) as con:
        store = RecycledConnection(settings, con)
        with store.cursor() as own:
            write(own, lambda c: c.execute("CREATE TABLE t (i BIGINT)"))
        store.close()
        assert con.execute("SELECT count(*) FROM t").fetchall() == [(0,)]
