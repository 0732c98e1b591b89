"A load that is killed leaves nothing, and goes on; and its memory does not grow with the file."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.settings import Settings

KILLS = 20
DRIVER = """
import json, multiprocessing, os, random, signal, sys, time
from pathlib import Path
from cryptoresearch.data import ingest
from cryptoresearch.data.ingest import process_file
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.settings import Settings

folder, store, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
settings = Settings(_env_file=None, duckdb_path=store)
files = sorted(folder.glob("*.csv"))


def load(started):
    con = init_duckdb(settings)
    started.set()
    for file in files:
        process_file(con, file)


if __name__ == "__main__":
    fork, rng, moments = multiprocessing.get_context("fork"), random.Random(7), []
    for attempt in range(kills):
        started = fork.Event()
        child = fork.Process(target=load, args=(started,))
        child.start()
        started.wait(60)
        time.sleep(rng.uniform(0.0, 0.6))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            moments.append(attempt)
        child.join()
    child = fork.Process(target=load, args=(fork.Event(),))
    child.start()
    child.join()
    print(json.dumps({"killed": len(moments), "last": child.exitcode}))
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
def test_twenty_kills_leave_what_an_undisturbed_load_leaves(tmp_path: Path) -> None:
    files = simulate_trades(tmp_path / "files", days=5, trades_per_day=150_000, seed=3)
    lines = files[2].read_text().splitlines()
    lines[500] = "garbage"
    del lines[1000:1100]
    files[2].write_text("\n".join(lines))
    run = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path / "files"), str(tmp_path / "killed" / "catalog.sqlite"), str(KILLS)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["last"] == 0
    assert told["killed"] >= 3, "too few kills hit a load at work"
    calm = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path / "files"), str(tmp_path / "calm" / "catalog.sqlite"), "0"], capture_output=True, text=True, timeout=300)
    assert calm.returncode == 0, calm.stderr[-2000:]
    assert state(tmp_path / "killed" / "catalog.sqlite") == state(tmp_path / "calm" / "catalog.sqlite")


MEMORY = """
import sys
from pathlib import Path
from cryptoresearch.data.ingest import process_file
from cryptoresearch.data.store import init_duckdb
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
