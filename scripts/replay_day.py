"""Replay a simulated day as fast as a live session takes it, and compare its predictions with those of the whole day at once.

    nice python scripts/replay_day.py 20_000_000      trades of the day; about twenty minutes on two processors
"""

import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cryptoresearch.data.bars import read_bars
from cryptoresearch.data.build_bars import make_bars
from cryptoresearch.data.simulate import simulate_archive
from cryptoresearch.data.store import connect, init_duckdb
from cryptoresearch.ingest.files import process_file
from cryptoresearch.live.feed import FinnhubWebSocket
from cryptoresearch.live.replay import ReplayServer
from cryptoresearch.runs.config import RunConfig
from cryptoresearch.runs.run import Run, train_run
from cryptoresearch.serving.live import LivePredictions
from cryptoresearch.serving.scoring import parity
from cryptoresearch.settings import Settings


def store_of(folder: Path, name: str) -> Settings:
    "Settings of a store of its own, with the runs of the folder."
    return Settings(_env_file=None, duckdb_path=f"{folder}/{name}/catalog.sqlite", runs_dir=f"{folder}/runs", duckdb_memory_limit="2GB")


def trained(settings: Settings, folder: Path, trades: int) -> Run:
    "Load a simulated day, and train a run on the minutes of its first six hours."
    (file,) = simulate_archive(folder / "files", start="2024-01-01", days=1, trades_per_day=trades)
    with init_duckdb(settings) as con:
        process_file(con, file)
        make_bars(con, "SIMUSDT", "1m")
        config = RunConfig(symbol="SIMUSDT", spec="1m", target="volatility", horizon=5, model="ridge", features=("ret_1", "rv_24"),
                           end="2024-01-01 06:00", test_start="2024-01-01 04:00", refit_every="60min")  # fmt: skip
        return train_run(con, config, settings)


def played(archive: Settings, live: Settings, run: Run) -> float:
    "Play the day into a live session; return the seconds that it took."
    began = time.monotonic()
    with connect(archive, read_only=True) as con, ReplayServer(con, "SIMUSDT", speed=math.inf) as server:
        feed = FinnhubWebSocket("BINANCE:SIMUSDT", url=server.url, source="finnhub", settings=live)
        with LivePredictions(feed, [run]) as session:
            while not (server.done.is_set() and feed.stats.trades == server.sent) and not session.join(0.1):
                assert server.error is None, server.error
            print(f"{server.sent:,} trades sent, {feed.stats.trades:,} received, {feed.stats.rejected} rejected")
    return time.monotonic() - began


def compare(archive: Settings, live: Settings, run: Run) -> None:
    "Print how live predictions differ from those of the live store and of the archive's bars."
    with connect(live) as con:
        make_bars(con, "SIMUSDT", "1m")
        print(parity(con, run))
        rows = con.execute("SELECT ts, prediction, lower, upper FROM predictions ORDER BY ts").df().set_index("ts")
    with connect(archive, read_only=True) as con:
        batch = run.predict(read_bars(con, "SIMUSDT", "1m"))
    batch = batch.set_axis(batch.index.tz_convert(None)).reindex(rows.index)[rows.columns]
    difference = np.abs(rows.to_numpy() - batch.to_numpy())
    print(f"{len(rows):,} predictions, largest difference from the batch {np.nanmax(difference):.1e}, {int(np.isnan(difference).any(axis=1).sum())} without one")


def main(trades: int = 200_000) -> None:
    "Replay a day and compare."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive, live = store_of(folder, "archive"), store_of(folder, "live")
        run = trained(archive, folder, trades)
        seconds = played(archive, live, run)
        print(f"{trades / seconds:,.0f} trades per second, {seconds:,.0f} s, load {os.getloadavg()[0]:.1f}")
        compare(archive, live, run)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
