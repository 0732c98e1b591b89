"A killed load leaves nothing behind and can be continued; its memory does not grow with the file."
import json
import subprocess
import sys
import threading
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NewStore, Program

from cryptoresearch.data.maintenance import verify
from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import dead_folders, init_duckdb, work_folder
from cryptoresearch.doctor import check_leftovers, examine
from cryptoresearch.ingest.files import process_file
from cryptoresearch.settings import Settings

DRIVER = """
import json, multiprocessing, os, random, signal, sys, time
from pathlib import Path
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import dead_folders, init_duckdb, work_folder
from cryptoresearch.settings import Settings

files, stores, kills = sorted(Path(sys.argv[1]).glob("*.csv")), Path(sys.argv[2]), int(sys.argv[3])
fork = multiprocessing.get_context("fork")


def load(store, started, found, done):
    con = init_duckdb(Settings(_env_file=None, duckdb_path=str(store / "catalog.sqlite"), duckdb_threads=2))
    found.value = con.execute("SELECT count(*) FROM ingest_ledger").fetchone()[0]
    started.set()
    for done.value, file in enumerate(files):
        process_file(con, file)


def attempt(name, share=None, delay=None):
    "Load into a store, killed some seconds after the start of a file; whether it was killed, files found at its start, seconds of work."
    started, found, done = fork.Event(), fork.Value("i", 0), fork.Value("i", 0)
    child = fork.Process(target=load, args=(stores / name, started, found, done))
    child.start()
    started.wait(120)
    began = time.monotonic()
    if share is not None:
        while child.is_alive() and done.value < found.value + int(share * (len(files) - found.value)):
            time.sleep(0.005)
    child.join(delay)
    killed = child.is_alive()
    if killed:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    elif child.exitcode:
        raise SystemExit(f"a load ended with {child.exitcode}")
    return killed, found.value, time.monotonic() - began


if __name__ == "__main__":
    attempt("warm")  # compiles what is not in the cache
    whole = attempt("calm")[2]
    rng, moments, left, rounds, attempts = random.Random(7), [], [], 0, 0
    while len(moments) < kills:
        share, delay = rng.random(), rng.uniform(0, whole / len(files))
        killed, found, took = attempt(f"round-{rounds}", share, delay)
        attempts += 1
        if moments and len(left) < len(moments):
            left.append(found)  # what the kill before had left
        moments += [round(share, 2)] * killed
        rounds += not killed  # a load that ends is compared, and the next one begins with an empty store
    left.append(attempt(f"round-{rounds}")[1])
    print(json.dumps({"whole": whole, "moments": moments, "left": left, "rounds": rounds + 1, "attempts": attempts}))
"""


def state(store: Path) -> dict[str, list]:
    "All that a load leaves, but for the moments and names that differ from run to run."
    queries = {
        "rows": "SELECT count(*), count(DISTINCT trade_id), sum((price * 100)::HUGEINT), sum((qty * 1e8)::HUGEINT), min(ts), max(ts), sum(side_tick) FROM trades",
        "ledger": "SELECT sha256, rows, rejected, duplicates, corrected, digest, gaps, first_id, last_id FROM ingest_ledger ORDER BY 1",
        "gaps": "SELECT * EXCLUDE detected_at FROM gaps ORDER BY ALL",
        "coverage": "SELECT * FROM coverage ORDER BY ALL",
        "quarantine": "SELECT file_id, line, reason FROM quarantine ORDER BY ALL",
    }
    with init_duckdb(Settings(_env_file=None, duckdb_path=str(store))) as con:
        return {name: con.execute(query).fetchall() for name, query in queries.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)  # twenty kills: a minute and a half on two free cores
@pytest.mark.parametrize(("kills", "days"), [(4, 6), pytest.param(20, 16, marks=pytest.mark.heavy)])
def test_kills_leave_what_an_undisturbed_load_leaves(kills: int, days: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    "Loads are killed at work, at random moments of random files; each continues where the one before was stopped, until it is through."
    files = simulate_trades(tmp_path / "files", days=days, trades_per_day=150_000, seed=3)
    lines = files[2].read_text().splitlines()
    lines[500] = "garbage"
    del lines[1000:1100]
    lines.insert(2000, lines[1900])
    files[2].write_text("\n".join(lines))
    run = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path / "files"), str(tmp_path / "stores"), str(kills)], capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout.splitlines()[-1])
    record_property("kills", told)
    assert len(told["moments"]) == len(told["left"]) == kills, "every kill hit a load at work"
    assert len(set(told["left"])) >= kills // 4, f"kills at too few stages: {told['left']}"
    assert sum(0 < n < days for n in told["left"]) >= kills // 2, f"too few kills between two commits: {told['left']}"
    calm = state(tmp_path / "stores" / "calm" / "catalog.sqlite")
    assert len(calm["ledger"]) == days
    for i in range(told["rounds"]):
        assert state(tmp_path / "stores" / f"round-{i}" / "catalog.sqlite") == calm


MEMORY = """
import sys
from pathlib import Path
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.store import dead_folders, init_duckdb, work_folder
from cryptoresearch.settings import Settings
settings = Settings(_env_file=None, duckdb_path=sys.argv[1], duckdb_memory_limit="512MB", duckdb_threads=2)
result = process_file(init_duckdb(settings), sys.argv[2], check_symbol=False)
highest = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(result.rows, int(highest.split()[1]) // 1024)
"""  # not ru_maxrss: a process inherits that of the one that started it, here pytest's


def peak(store: Path, file: Path) -> tuple[int, int]:
    "Rows, and the largest resident size in MB, of a process that loads a file."
    run = subprocess.run([sys.executable, "-c", MEMORY, str(store), str(file)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    rows, megabytes = run.stdout.split()[-2:]
    return int(rows), int(megabytes)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    (small,) = simulate_trades(tmp_path / "small", days=1, trades_per_day=200_000, seed=1)
    (large,) = simulate_trades(tmp_path / "large", days=1, trades_per_day=3_000_000, seed=1)
    sizes = {name: peak(tmp_path / name / "catalog.sqlite", file) for name, file in (("small", small), ("large", large))}
    assert sizes["large"][0] > 10 * sizes["small"][0]
    assert sizes["large"][1] < sizes["small"][1] + 250  # the file is 200 MB larger, its rows in memory would be 240 MB and their text more
    assert sizes["large"][1] < 1000


LEAVE = """
import os, signal, sys, time
from cryptoresearch.ingest import files
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.settings import Settings

con = init_duckdb(Settings(_env_file=None, duckdb_path=sys.argv[1], duckdb_threads=1))
if sys.argv[3] == "committed":
    real = files.write
    files.write = lambda *a, **k: (real(*a, **k), os.kill(os.getpid(), signal.SIGKILL))
elif sys.argv[3] == "written":
    files.write = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
else:  # held
    files.write = lambda *a, **k: (print("held", flush=True), time.sleep(60))
files.process_file(con, sys.argv[2], progress=False)
"""


def parquet(store: Path) -> int:
    return len(list(store.parent.glob("lake/**/*.parquet")))


@pytest.mark.parametrize("by", ["ingest", "doctor"])
def test_what_killed_loads_leave_is_removed(by: str, tmp_path: Path, new_store: NewStore, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    "Killed before and after the commit; a load that is still running, and one of another store, keep their files."
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    store, other = tmp_path / "store" / "catalog.sqlite", tmp_path / "other" / "catalog.sqlite"
    for catalog in (store, other):
        new_store(catalog.parent)
    one, two, three, four = simulate_trades(tmp_path / "files", days=4, trades_per_day=2000, seed=3)

    def load(catalog: Path, file: Path, how: str) -> subprocess.Popen[str]:
        return program(LEAVE, catalog, file, how, stdout=subprocess.PIPE)

    assert load(store, one, "committed").wait(120) == load(other, two, "written").wait(120) == -9
    held = load(store, two, "held")
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    assert load(store, three, "written").wait(120) == -9
    settings = Settings(_env_file=None, duckdb_path=str(store), duckdb_threads=1)
    try:
        left = {path.name for path in (tmp_path / "tmp").glob("cryptoresearch-work-*")}
        assert (len(left), parquet(store), parquet(other)) == (3, 3, 1)  # the first one's folder was removed by the next load
        if by == "ingest":
            with init_duckdb(settings) as con:
                assert process_file(con, four, progress=False).rows
        else:
            found = {c.name: c for c in examine(settings)}["leftovers"]
            assert found.state == "ok" and found.found.startswith("removed what 1 killed processes left")
            assert check_leftovers(settings).found == "none"
        assert len(list((tmp_path / "tmp").glob("cryptoresearch-work-*"))) == 2  # of the running load and of the other store
        assert (parquet(store), parquet(other)) == (2 + (by == "ingest"), 1)
        with init_duckdb(settings) as con:
            assert con.execute("SELECT count(*) FROM ingest_ledger").fetchall() == [(1 + (by == "ingest"),)]
            assert verify(con).ok
    finally:
        held.kill()
        held.wait()


def test_a_search_for_dead_folders_disturbs_no_living_one(tmp_path, monkeypatch):
    "Its locks may appear in a folder that is being removed; before, the removal failed with 'Directory not empty'."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            dead_folders()

    searches = [threading.Thread(target=search) for _ in range(2)]
    for thread in searches:
        thread.start()
    try:
        for _ in range(300):
            with work_folder():
                pass
    finally:
        done.set()
        for thread in searches:
            thread.join()
    assert not list(tmp_path.glob("*/note"))
