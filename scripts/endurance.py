"""Measure a collector that runs for weeks, in accelerated time: commits, catalog and memory by simulated day.

    nice python scripts/endurance.py 30 240 12      30 days, each of 240 commits and 12 rounds of maintenance; about an hour of a busy machine
"""

import os
import sys
import tempfile
import time
from datetime import datetime, timedelta, UTC
from pathlib import Path

import numpy as np
import pandas as pd

from cryptoresearch.data.maintenance import upkeep
from cryptoresearch.data.store import connect
from cryptoresearch.live.collector import Collector
from cryptoresearch.live.messages import Trade
from cryptoresearch.settings import Settings

BTC, T0, LARGE = "BINANCE:BTCUSDT", datetime(2024, 1, 1, tzinfo=UTC), 16_000_000


def memory_mb() -> float:
    "Resident memory of this process."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def pass_days(settings: Settings, days: int, commits: int, upkeeps: int) -> pd.DataFrame:
    """Commit through simulated days, each with the same number of commits and of rounds of maintenance.

    Event times follow the simulated clock; snapshots, whose times are of the real clock, are kept for as long as a simulated day takes."""
    rng, rows = np.random.default_rng(0), []
    collector, step = Collector([BTC], source="finnhub", settings=settings, interval_s=1e6).start(), timedelta(days=1) / commits
    catalog, number, began = settings.path(settings.duckdb_path), 0, time.monotonic()
    for day in range(days):
        wall, processor = list[float](), list[float]()
        for k in range(commits):
            at = T0 + timedelta(days=day) + k * step
            n = int(rng.choice([20, 100, 400]))  # rows of the catalog, and a file of its own
            collector.add([Trade(BTC, 100.0 + i % 7, float(number + i), at + i * step / n) for i in range(n)], at)
            number += n
            one, two = time.perf_counter(), time.process_time()
            collector.flush()
            wall.append(time.perf_counter() - one)
            processor.append(time.process_time() - two)
            if k % (commits // upkeeps) == commits // upkeeps - 1:
                keep = pd.Timedelta(seconds=(time.monotonic() - began) / (day + (k + 1) / commits))
                with connect(settings) as con:  # as the collector does
                    upkeep(con, settings, keep=keep, delete_after=keep / 24, merge_below=LARGE)
                collector.reopen()
        size = sum(f.stat().st_size for f in catalog.parent.glob(catalog.name + "*")) / 1e6
        snapshots = collector._own.execute("SELECT count(*) FROM ducklake_snapshots('lake')").fetchall()[0][0]
        files = collector._own.execute("SELECT count(*) FROM ducklake_list_files('lake', 'trades')").fetchall()[0][0]
        p50, p99 = np.quantile(processor, [0.5, 0.99]) * 1e3
        rows.append((number, p50, p99, np.quantile(wall, 0.99) * 1e3, size, memory_mb(), snapshots, files))
    collector.stop()
    names = ["trades", "p50_ms", "p99_ms", "p99_wall_ms", "catalog_mb", "memory_mb", "snapshots", "files"]
    return pd.DataFrame(rows, columns=names, index=pd.RangeIndex(1, days + 1, name="day")).round(1)


def main(days: int = 30, commits: int = 240, upkeeps: int = 12) -> None:
    "Print the figures of some days."
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(_env_file=None, duckdb_path=f"{folder}/catalog.sqlite", runs_dir=f"{folder}/runs", duckdb_memory_limit="1GB")
        print(pass_days(settings, days, commits, upkeeps).iloc[:: max(days // 10, 1)].to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
