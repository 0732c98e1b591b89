"""The mirror of the public archive, against a server with its layout that misbehaves on demand."""

import hashlib
import os
import random
import re
import signal
import subprocess
import threading
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND_LINE, NewStore, Program
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cryptoresearch.data.archive import archive_name, download, ensure_buckets, list_objects, minio_client, remove, stored, verify
from cryptoresearch.ingest.folders import find_files, process_files
from cryptoresearch.data.mirror import mirror_archive, MirrorResult, plan_mirror
from cryptoresearch.data.store import init_duckdb
from cryptoresearch.errors import ConfigError, DataNotFound
from cryptoresearch.settings import Settings

Fault = Callable[[BaseHTTPRequestHandler, bytes, int], None]  # request, body, first byte asked for


class Archive:
    "Serves files with Range, If-Range and ETag; `faults[path]` are answered first, one a request."

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.sent: Counter[str] = Counter()  # bytes of bodies by path
        self.over = threading.Event()
        self.pause_s = 0.0  # after each 16 kB
        self.ignores_range = False
        archive = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                archive.asked.append((self.command, self.path, self.headers.get("Range")))
                body = archive.files.get(self.path)
                start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
                queue = archive.faults[self.path]
                fault = queue.pop(0) if queue else archive.always.get(self.path)
                try:
                    if fault:
                        self.close_connection = True
                        fault(self, body or b"", start)
                    else:
                        self.answer(body, start)
                except OSError:
                    self.close_connection = True

            do_HEAD = do_GET

            def answer(self, body: bytes | None, start: int) -> None:
                if body is None:
                    return self.head(404, 0)
                etag = f'"{hashlib.md5(body).hexdigest()}"'
                if archive.ignores_range or self.headers.get("If-Range", etag) != etag:
                    start = 0
                if start and start >= len(body):
                    return self.head(416, 0, {"Content-Range": f"bytes */{len(body)}"})
                span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
                self.head(206 if start else 200, len(body) - start, span | {"ETag": etag})
                if self.command == "GET":
                    self.body(body[start:])

            def head(self, status: int, length: int | None, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                if self.close_connection:
                    self.send_header("Connection", "close")
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()

            def body(self, content: bytes) -> None:
                for i in range(0, len(content), 16_384):
                    self.wfile.write(content[i : i + 16_384])
                    archive.sent[self.path] += len(content[i : i + 16_384])
                    if archive.pause_s and archive.over.wait(archive.pause_s):
                        return

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that are killed

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.settings = Settings(_env_file=None, archive_url=self.url, minio_endpoint=None)

    def publish(self, day: str, size: int = 60_000, **options: Any) -> str:
        "A file of random bytes under the name of a day or a month."
        monthly = len(day) == 7
        name = "/" + archive_name("BTCUSDT", date.fromisoformat(day + "-01" * monthly), monthly=monthly, **options)
        self.put(name, random.Random(day + str(size)).randbytes(size))
        return name

    def put(self, name: str, body: bytes) -> None:
        self.files[name] = body
        self.files[f"{name}.CHECKSUM"] = f"{hashlib.sha256(body).hexdigest()}  {Path(name).name}\n".encode()

    def zips_asked(self) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET" and path.endswith(".zip")]


@pytest.fixture
def archive() -> Iterator[Archive]:
    server = Archive()
    yield server
    server.over.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    "The waits between attempts, a hundredth of what they are."
    from cryptoresearch.data import archive as module

    pause = module.Patience._pause_s
    monkeypatch.setattr(module.Patience, "_pause_s", lambda self, state: pause(self, state) / 100)


def mirror(archive: Archive, folder: Path, start: str, end: str, **options: Any) -> MirrorResult:
    return mirror_archive("BTCUSDT", start, end, folder=folder, settings=archive.settings, **{"timeout_s": 5.0} | options)


def final(folder: Path) -> dict[str, bytes]:
    "Content of the files under their final names, by their place below the folder."
    return {"/" + p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.zip")}


# --- what is planned ---


@given(first=st.dates(date(2017, 8, 1), date(2024, 12, 31)), days=st.integers(0, 500))
def test_a_plan_covers_each_day_once(first: date, days: int) -> None:
    last = first + timedelta(days)
    plan = plan_mirror("BTCUSDT", first, last, today=date(2026, 6, 15))
    covered = [w.first + timedelta(i) for w in plan for i in range((w.last - w.first).days + 1)]
    assert covered == [first + timedelta(i) for i in range(days + 1)]
    for w in plan:
        assert ("monthly" in w.name) == bool(w.days)
        if w.days:
            assert w.first.day == 1 and (w.last + timedelta(1)).day == 1 and [d.first for d in w.days] == [w.first + timedelta(i) for i in range(len(w.days))]
    assert sum(bool(w.days) for w in plan) == sum(1 for d in covered if d.day == 1 and all((d + timedelta(i)) in covered for i in range(31) if (d + timedelta(i)).month == d.month))


def test_the_running_month_goes_until_yesterday() -> None:
    plan = plan_mirror("BTCUSDT", "2024-02", "2024-03", today=date(2024, 3, 1))
    assert [w.first for w in plan] == [date(2024, 2, 1)]
    with pytest.raises(ConfigError, match="days that are over"):
        plan_mirror("BTCUSDT", "2024-03", "2024-03", today=date(2024, 3, 1))


# --- a good day ---


@pytest.mark.parametrize(("kind", "market"), [("trades", "spot"), ("aggTrades", "um"), ("klines", "spot")])
def test_months_and_days_come_down_and_stay(archive: Archive, tmp_path: Path, kind: str, market: str) -> None:
    names = [archive.publish(day, kind=kind, market=market) for day in ("2024-01-31", "2024-02", "2024-03-01")]
    options = {"kind": kind, "market": market}
    first = mirror(archive, tmp_path, "2024-01-31", "2024-03-01", **options)
    assert [f.state for f in first.files] == ["fetched"] * 3 and first.received == 180_000
    assert final(tmp_path) == {name: archive.files[name] for name in names}
    assert first.uris == [str(tmp_path) + name for name in names]
    asked = len(archive.asked)
    again = mirror(archive, tmp_path, "2024-01-31", "2024-03-01", **options)
    assert [f.state for f in again.files] == ["there"] * 3 and len(archive.asked) == asked and again.received == 0


def test_a_month_without_its_file_is_its_days(archive: Archive, tmp_path: Path) -> None:
    for day in range(1, 28):
        archive.publish(f"2024-02-{day:02}", size=1000)
    got = mirror(archive, tmp_path, "2024-02", "2024-02")
    assert Counter(f.state for f in got.files) == {"fetched": 27, "not published": 2} and not got.failed
    assert [f.first.day for f in got.files] == list(range(1, 30))
    # the month's file appears when all days are there: it holds nothing new
    archive.publish("2024-02-28", size=1000), archive.publish("2024-02-29", size=1000)
    mirror(archive, tmp_path, "2024-02-28", "2024-02-29")
    archive.publish("2024-02")
    archive.asked.clear()
    assert Counter(f.state for f in mirror(archive, tmp_path, "2024-02", "2024-02").files) == {"there": 29} and archive.asked == []


@pytest.mark.parametrize("code", [401, 403])
def test_refused_access_is_not_told_as_not_published(archive: Archive, tmp_path: Path, code: int) -> None:
    name = archive.publish("2024-01-05")
    archive.always[f"{name}.CHECKSUM"] = lambda request, body, start: request.head(code, 0)
    (file,) = mirror(archive, tmp_path, "2024-01-05", "2024-01-06").failed
    assert file.first.day == 5
    assert f"access to it is refused (HTTP {code})" in file.reason
    assert sum(path.endswith(f"{Path(name).name}.CHECKSUM") for _, path, _ in archive.asked) == 1  # asking again changes nothing
    assert not list(tmp_path.rglob("*.zip*"))


def test_a_dry_run_tells_sizes_and_fetches_nothing(archive: Archive, tmp_path: Path) -> None:
    archive.publish("2024-02", size=123_456), archive.publish("2024-01-31", size=1000)
    mirror(archive, tmp_path, "2024-01-31", "2024-01-31")
    before = sorted(tmp_path.rglob("*"))
    archive.asked.clear()
    dry = mirror(archive, tmp_path, "2024-01-31", "2024-03-01", dry_run=True)
    assert [(f.state, f.bytes) for f in dry.files] == [("there", 1000), ("to fetch", 123_456), ("not published", 0)]
    assert "1 to fetch (123.5 kB)" in repr(dry) and sorted(tmp_path.rglob("*")) == before and archive.zips_asked() == []
    assert "1 to fetch" in dry._repr_html_()


def test_a_corrected_file_comes_when_asked_for(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")
    mirror(archive, tmp_path, "2024-01-05", "2024-01-05")
    archive.put(name, b"PK corrected")
    assert mirror(archive, tmp_path, "2024-01-05", "2024-01-05").received == 0
    assert mirror(archive, tmp_path, "2024-01-05", "2024-01-05", refresh=True).received == 12
    assert final(tmp_path)[name] == b"PK corrected"
    assert mirror(archive, tmp_path, "2024-01-05", "2024-01-05", refresh=True).received == 0


def test_bytes_that_rot_are_found_by_rehash(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")
    file = Path(mirror(archive, tmp_path, "2024-01-05", "2024-01-05").uris[0])
    when = file.stat().st_mtime_ns
    file.write_bytes(b"x" + file.read_bytes()[1:])
    os.utime(file, ns=(when, when))  # as a disk does it: the content did not change
    assert mirror(archive, tmp_path, "2024-01-05", "2024-01-05").received == 0
    assert mirror(archive, tmp_path, "2024-01-05", "2024-01-05", rehash=True).received == 60_000
    assert file.read_bytes() == archive.files[name]


def test_a_copied_mirror_is_proved_and_not_fetched(archive: Archive, tmp_path: Path) -> None:
    archive.publish("2024-01-05")
    file = Path(mirror(archive, tmp_path, "2024-01-05", "2024-01-05").uris[0])
    os.utime(file, (1, 1))
    asked = len(archive.asked)
    assert [f.state for f in mirror(archive, tmp_path, "2024-01-05", "2024-01-05").files] == ["there"]
    file.with_name(file.name + ".CHECKSUM").unlink()  # put there by other means: the archive is asked for its checksum
    got = mirror(archive, tmp_path, "2024-01-05", "2024-01-05")
    assert ([f.state for f in got.files], got.received, len(archive.asked)) == (["there"], 0, asked + 1)


# --- bad days ---


def status(code: int, **headers: str) -> Fault:
    return lambda request, body, start: request.head(code, 0, {k.replace("_", "-"): v for k, v in headers.items()})


def cut(after: int, promised: int | None = None) -> Fault:
    "The right length in the header, and then the line breaks."

    def answer(request: Any, body: bytes, start: int) -> None:
        span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        request.head(206 if start else 200, promised or len(body) - start, span)
        request.body(body[start : start + after])

    return answer


def hang(request: Any, body: bytes, start: int) -> None:
    request.head(200, len(body))
    time.sleep(1.5)


def drip(request: Any, body: bytes, start: int) -> None:
    request.head(200, len(body))
    for i in range(20):
        request.wfile.write(body[i : i + 1])
        time.sleep(0.1)


def page(request: Any, body: bytes, start: int) -> None:
    request.head(200, 26)
    request.body(b"<html>Please log in</html>")


def other_range(request: Any, body: bytes, start: int) -> None:
    request.head(206, len(body) - 7, {"Content-Range": f"bytes 7-{len(body) - 1}/{len(body)}"})
    request.body(body[7:])


PASSING: dict[str, list[Fault]] = {
    "500s": [status(500), status(502), status(504)],
    "asked to wait": [status(503, Retry_After="1"), status(429, Retry_After=format_datetime(datetime(2015, 1, 1, tzinfo=UTC)))],
    "breaks": [cut(20_000), cut(20_000), cut(0)],
    "more breaks than attempts": [cut(4_000)] * 12,
    "hangs": [hang],
    "drips": [drip],
    "a page once": [page],
    "another range": [cut(20_000), other_range],
    "a longer promise": [cut(60_000, promised=70_000)],
}


@pytest.mark.parametrize("what", PASSING)
def test_what_passes_is_overcome(archive: Archive, tmp_path: Path, what: str) -> None:
    name = archive.publish("2024-01-05")
    archive.faults[name] = list(PASSING[what])
    got = mirror(archive, tmp_path, "2024-01-05", "2024-01-05", timeout_s=2)
    assert [f.state for f in got.files] == ["fetched"], got.files
    assert final(tmp_path) == {name: archive.files[name]} and archive.faults[name] == []
    assert not list(tmp_path.rglob("*.part"))
    if what in ("breaks", "more breaks than attempts"):
        assert archive.sent[name] == 60_000  # not a byte twice


def test_the_checksum_may_need_several_attempts_too(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")
    archive.faults[f"{name}.CHECKSUM"] = [status(500), cut(3), status(503)]
    assert [f.state for f in mirror(archive, tmp_path, "2024-01-05", "2024-01-05").files] == ["fetched"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [(status(500), "HTTP 500"), (status(418), "HTTP 418"), (cut(0), "RemoteProtocolError"), (page, "expected sha256"), (status(302, Location="/loop"), "TooManyRedirects")],
    ids=["500", "418", "cut", "page", "redirects"],
)
def test_what_stays_is_a_failure_of_that_file_only(archive: Archive, tmp_path: Path, fault: Fault, told: str) -> None:
    names = [archive.publish(f"2024-01-{day:02}") for day in (4, 5, 6)]
    archive.always[names[1]] = fault
    archive.always["/loop"] = status(302, Location="/loop")
    got = mirror(archive, tmp_path, "2024-01-04", "2024-01-06", attempts=3)
    assert [f.state for f in got.files] == ["fetched", "failed", "fetched"]
    assert told in got.failed[0].reason and "\n" not in got.failed[0].reason
    assert set(final(tmp_path)) == {names[0], names[2]}
    archive.always.clear()
    assert [f.state for f in mirror(archive, tmp_path, "2024-01-04", "2024-01-06").files] == ["there", "fetched", "there"]


def test_a_wrong_checksum_leaves_no_trace(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")
    archive.files[f"{name}.CHECKSUM"] = b"0" * 64 + b"  x.zip\n"
    got = mirror(archive, tmp_path, "2024-01-05", "2024-01-05")
    assert "expected sha256 0000" in got.failed[0].reason and archive.zips_asked() == [name] * 2
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_dead_archive_is_given_up_soon(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, archive_url="http://127.0.0.1:9", minio_endpoint=None)
    got = mirror_archive("BTCUSDT", "2023-01-01", "2023-12-30", folder=tmp_path, settings=settings, workers=2, attempts=2)
    assert len(got.failed) == len(got.files)
    assert sum("not tried after" in f.reason for f in got.failed) > 20


def test_no_name_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: over.wait(30))
    settings = Settings(_env_file=None, archive_url="http://archive.example", minio_endpoint=None)
    with pytest.raises(DataNotFound, match=r"no name server that knows archive\.example"):
        mirror_archive("BTCUSDT", "2023-01-01", "2023-01-01", folder=tmp_path, settings=settings, timeout_s=0.5)
    over.set()


# --- resuming an interrupted download ---


def broken_off(archive: Archive, tmp_path: Path, name: str, after: int = 25_000) -> Path:
    "A run that ends with a part on disk."
    archive.faults[name] = [cut(after)]
    got = mirror(archive, tmp_path, "2024-01-05", "2024-01-05", attempts=1)
    assert [f.state for f in got.files] == ["failed"] and final(tmp_path) == {}
    (part,) = tmp_path.rglob(".*.part")
    assert part.stat().st_size == after
    return part


def test_another_run_goes_on(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")
    broken_off(archive, tmp_path, name)
    got = mirror(archive, tmp_path, "2024-01-05", "2024-01-05")
    assert got.received == 35_000 and final(tmp_path) == {name: archive.files[name]} and archive.asked[-1][2] == "bytes=25000-"


def test_a_server_that_ignores_range(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")
    broken_off(archive, tmp_path, name)
    archive.ignores_range = True
    assert mirror(archive, tmp_path, "2024-01-05", "2024-01-05").received == 60_000
    assert final(tmp_path) == {name: archive.files[name]}


def test_a_file_that_changed_meanwhile(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")
    broken_off(archive, tmp_path, name)
    archive.put(name, random.Random(1).randbytes(50_000))
    assert mirror(archive, tmp_path, "2024-01-05", "2024-01-05").received == 50_000
    assert final(tmp_path) == {name: archive.files[name]} and not list(tmp_path.rglob("*.part"))


def test_a_file_that_changes_while_it_comes(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish("2024-01-05")

    def change(request: Any, body: bytes, start: int) -> None:
        cut(25_000)(request, body, start)
        archive.put(name, random.Random(2).randbytes(70_000))

    archive.faults[name] = [change]
    got = mirror(archive, tmp_path, "2024-01-05", "2024-01-05")
    assert [f.state for f in got.files] == ["fetched"] and final(tmp_path) == {name: archive.files[name]}


@pytest.mark.parametrize("damage", ["other bytes", "too long", "complete"])
def test_a_part_that_cannot_be_trusted(archive: Archive, tmp_path: Path, damage: str) -> None:
    name = archive.publish("2024-01-05")
    part = broken_off(archive, tmp_path, name)
    part.write_bytes({"other bytes": bytes(25_000), "too long": bytes(99_000), "complete": archive.files[name]}[damage])
    assert next(f.state for f in mirror(archive, tmp_path, "2024-01-05", "2024-01-05").files) in ("fetched", "there")
    assert final(tmp_path) == {name: archive.files[name]} and not list(tmp_path.rglob("*.part"))


DOWNLOAD = ("download", "BTCUSDT")


@pytest.fixture
def begin(archive: Archive, program: Program, tmp_path: Path) -> Program:
    "Starts the command line in a process of its own, in the folder of the test: `begin(*words, **more_environment)`."

    def call(*words: str, **more: str) -> subprocess.Popen[str]:
        own = {"CRYPTORESEARCH_HOME": str(tmp_path), "ARCHIVE_URL": archive.url, "COLUMNS": "200", "NO_COLOR": "1"}
        return program(COMMAND_LINE, *words, env=own | more, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return call


def ended(running: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    "Wait for the end of a command."
    out, err = running.communicate(timeout=60)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def test_killed_and_repeated(archive: Archive, tmp_path: Path, begin: Program) -> None:
    names = [archive.publish(f"2024-01-{day:02}", size=600_000) for day in (1, 2, 3, 4)]
    archive.pause_s, words = 0.02, (*DOWNLOAD, "--from", "2024-01-01", "--to", "2024-01-04", "--to-folder", str(tmp_path / "mirror"), "--workers", "2")
    rng, kills = random.Random(0), 0
    for _ in range(3):
        before = sum(archive.sent.values())
        running = begin(*words)
        goal = before + rng.randint(200_000, 700_000)
        while running.poll() is None and sum(archive.sent.values()) < goal:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        kills += ended(running).returncode == -signal.SIGKILL
        for name, body in final(tmp_path / "mirror").items():
            assert body == archive.files[name]
    assert kills >= 2
    archive.pause_s = 0.0
    done = ended(begin(*words))
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "mirror") == {name: archive.files[name] for name in names}
    assert not list(tmp_path.rglob("*.part"))
    assert sum(archive.sent[name] for name in names) < 4 * 600_000 + kills * 1_500_000  # what was there was not fetched again


def test_two_processes_take_turns(archive: Archive, tmp_path: Path, begin: Program) -> None:
    name = archive.publish("2024-01-05", size=400_000)
    archive.pause_s = 0.02
    both = [begin(*DOWNLOAD, "--from", "2024-01-05", "--to", "2024-01-05", "--to-folder", str(tmp_path)) for _ in range(2)]
    assert [ended(p).returncode for p in both] == [0, 0]
    assert final(tmp_path) == {name: archive.files[name]} and archive.sent[name] == 400_000


def test_ctrl_c_ends_soon_and_leaves_the_part(archive: Archive, tmp_path: Path, begin: Program) -> None:
    archive.publish("2024-01-05", size=4_000_000)
    archive.pause_s = 0.05
    running = begin(*DOWNLOAD, "--from", "2024-01-05", "--to", "2024-01-05", "--to-folder", str(tmp_path))
    while not archive.sent:
        time.sleep(0.05)
        assert running.poll() is None, ended(running).stderr
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) != 0 and final(tmp_path) == {} and list(tmp_path.rglob("*.part"))


# --- on the command line ---


def test_the_exit_code_is_that_of_failures_only(archive: Archive, tmp_path: Path, begin: Program) -> None:
    archive.publish("2024-01-05")
    asked = [*DOWNLOAD, "--from", "2024-01-05", "--to", "2024-01-06", "--to-folder", "there"]
    dry, good = ended(begin(*asked, "--dry-run")), ended(begin(*asked))
    assert dry.returncode == good.returncode == 0, dry.stderr + good.stderr
    assert "BTCUSDT-trades-2024-01-05.zip  60.0 kB  to fetch" in dry.stdout and "1 not published" in dry.stdout
    assert "1 fetched (60.0 kB in" in good.stdout and "1 not published" in good.stdout and good.stderr == ""
    assert (tmp_path / "there/data/spot/daily/trades/BTCUSDT/BTCUSDT-trades-2024-01-05.zip").stat().st_size == 60_000
    archive.files[archive.publish("2024-01-06")] = b"damaged"
    bad = ended(begin(*asked))
    assert bad.returncode == 5 and "expected sha256" in bad.stderr and "1 there already" in bad.stdout and "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"start": "2022-03", "end": "2022-01"}, "the other way round"),
        ({"start": "2022-03", "end": "2999-01"}, "days that are over"),
        ({"start": "March"}, "such as 2022-01"),
        ({"start": "2022-02-30"}, "such as 2022-01"),
        ({"start": "1999-01"}, "from 2017 on"),
        ({"symbol": "BYBIT:BTCUSDT"}, "such as BTCUSDT"),
        ({"kind": "book"}, "trades, aggTrades, klines"),
        ({"market": "cm"}, "spot, um"),
        ({"kind": "klines", "interval": "7m"}, "1s, 1m"),
        ({"bucket": "btc"}, "a folder or a bucket"),
        ({"bucket": "btc", "folder": None}, "MINIO_ENDPOINT"),
        ({"workers": 0}, "1 to 64 workers"),
    ],
)
def test_wrong_words_are_told(archive: Archive, tmp_path: Path, words: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        mirror_archive(**{"symbol": "BTCUSDT", "start": "2022-01", "end": "2022-04", "folder": tmp_path, "settings": archive.settings} | words)
    assert archive.asked == [] and not list(tmp_path.iterdir())


def test_wrong_words_are_told_in_a_sentence(archive: Archive, begin: Program) -> None:
    done = ended(begin(*DOWNLOAD, "--from", "2022-03", "--to", "2022-01"))
    assert done.returncode == 3 and "the other way round" in done.stderr and "Traceback" not in done.stderr and archive.asked == []


def test_progress_shows_rate_and_remaining_time(archive: Archive, tmp_path: Path) -> None:
    for day in (1, 2, 3):
        archive.publish(f"2024-01-{day:02}", size=400_000)
    archive.pause_s, screen = 0.02, StringIO()
    mirror(archive, tmp_path, "2024-01-01", "2024-01-03", workers=1, progress=Console(file=screen, force_terminal=True, width=120))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "2 of 3 files" in shown and re.search(r"[\d.]+ [kM]B/s", shown) and re.search(r"/1\.2 MB", shown) and re.search(r"0:00:0\d", shown)


# --- into a bucket ---


@pytest.mark.minio
def test_a_bucket_gets_whole_files_only(archive: Archive, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYPTORESEARCH_HOME", str(tmp_path))
    settings = Settings(_env_file=None, archive_url=archive.url, **s3.settings)
    bucket = f"{s3.bucket_raw}-mirror"
    names = [archive.publish("2024-01-31", size=60_000), archive.publish("2024-02", size=20_000_000)]
    options = {"bucket": bucket, "settings": settings, "timeout_s": 5.0}
    dry = mirror_archive("BTCUSDT", "2024-01-31", "2024-03-01", dry_run=True, **options)
    assert Counter(f.state for f in dry.files) == {"to fetch": 2, "not published": 1} and not minio_client(settings).bucket_exists(bucket)

    archive.faults[names[1]] = [cut(5_000_000)]
    first = mirror_archive("BTCUSDT", "2024-01-31", "2024-03-01", attempts=1, **options)
    assert [f.state for f in first.files] == ["fetched", "failed", "not published"]
    assert list_objects(settings, f"s3://{bucket}/")["uri"].tolist() == [f"s3://{bucket}{names[0]}"]

    second = mirror_archive("BTCUSDT", "2024-01-31", "2024-03-01", **options)
    assert [f.state for f in second.files] == ["there", "fetched", "not published"] and second.received == 15_000_000
    uri = second.uris[1]
    assert stored(settings, uri).sha256 == hashlib.sha256(archive.files[names[1]]).hexdigest() and verify(settings, uri) == "sha256"
    assert download(settings, uri, tmp_path / "again.zip").read_bytes() == archive.files[names[1]]
    assert not (tmp_path / "data/download").exists()

    archive.asked.clear()
    third = mirror_archive("BTCUSDT", "2024-01-31", "2024-02", **options)
    assert [f.state for f in third.files] == ["there"] * 2 and archive.asked == []
    # a file that was put there without a checksum is not trusted
    minio_client(settings).put_object(bucket, names[0][1:], BytesIO(b"half"), 4)
    assert [f.state for f in mirror_archive("BTCUSDT", "2024-01-31", "2024-01-31", **options).files] == ["fetched"]
    for item in list_objects(settings, f"s3://{bucket}/")["uri"]:
        minio_client(settings).remove_object(bucket, item.split("/", 3)[3])
    minio_client(settings).remove_bucket(bucket)


@pytest.mark.minio
def test_killed_while_it_goes_into_a_bucket(archive: Archive, s3: Any, begin: Program) -> None:
    settings = Settings(_env_file=None, archive_url=archive.url, **s3.settings)
    ensure_buckets(settings)
    names = [archive.publish(f"2024-01-{day:02}", size=3_000_000) for day in (7, 8)]
    archive.pause_s, words = 0.005, (*DOWNLOAD, "--from", "2024-01-07", "--to", "2024-01-08", "--bucket", s3.bucket_raw, "--workers", "1")
    running = begin(*words, **s3.env)
    while archive.sent[names[1]] < 1_000_000:
        time.sleep(0.01)
        assert running.poll() is None, ended(running).stderr
    running.kill()
    assert ended(running).returncode == -signal.SIGKILL
    there = list_objects(settings, names[0].rsplit("/", 1)[0][1:])
    assert there["bytes"].tolist() == [3_000_000]
    archive.pause_s = 0.0
    done = ended(begin(*words, **s3.env))
    assert done.returncode == 0, done.stderr
    assert "1 there already" in done.stdout and archive.sent[names[0]] == 3_000_000
    assert all(verify(settings, f"s3://{s3.bucket_raw}{name}") == "sha256" for name in names)


# --- what was mirrored is loaded ---


def trades(first_id: int, day: str, n: int = 500, price: float = 100.0) -> str:
    "Return lines of the archive's trades, one per second from the day's start."
    start = int(datetime.fromisoformat(day + "T00:00:00+00:00").timestamp() * 1000)
    return "".join(f"{first_id + i},{price + i % 7:.2f},0.5,{(price + i % 7) / 2:.3f},{start + 1000 * i},{'True' if i % 3 else 'False'},True\n" for i in range(n))


def write_zip(path: Path, csv: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(f"{path.stem}.csv", csv)
    return path


def content(con: Any) -> list[Any]:
    "What the store holds of trades and of files."
    rows = con.execute("SELECT symbol, source, count(*), sum(trade_id), sum(qty), min(ts), max(ts) FROM trades GROUP BY ALL ORDER BY ALL").fetchall()
    return rows + con.execute("SELECT file_id, rows FROM ingest_ledger ORDER BY ALL").fetchall()


@pytest.mark.parametrize("days", [2, pytest.param(6, marks=pytest.mark.heavy)])
def test_several_at_once_is_the_same_as_one_by_one(tmp_path: Path, new_store: NewStore, days: int) -> None:
    for symbol in ("BTCUSDT", "ETHUSDT"):
        for day in range(1, days + 1):
            write_zip(tmp_path / "raw" / f"{symbol}-trades-2024-01-{day:02}.zip", trades(10_000 * day, f"2024-01-{day:02}"))
    (tmp_path / "raw/BTCUSDT-trades-2024-01-07.zip").write_bytes(b"PK not a zip")
    (tmp_path / "raw/BTCUSDT-trades-2024-01-08.zip").write_bytes(b"")
    found, order = [], []
    for n in (1, 4) if days == 2 else (1, 2, 4):
        con = init_duckdb(new_store(tmp_path / str(n), duckdb_threads=2))
        summary = process_files(con, tmp_path / "raw", workers=n, told=lambda uri, result: order.append(uri))
        assert [Path(f).name[:7] for f in summary.file] == ["BTCUSDT"] * (days + 2) + ["ETHUSDT"] * days
        assert summary.outcome.tolist() == ["loaded"] * days + ["refused"] * 2 + ["loaded"] * days
        assert summary.error[days].startswith("SchemaError") and summary.rows.sum() == 1000 * days
        found.append(content(con))
        con.close()
    assert all(content == found[0] for content in found) and len(order) == len(found) * (2 * days + 2)


@pytest.mark.parametrize("days", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_a_month_and_its_days_keep_their_order(tmp_path: Path, new_store: NewStore, days: int) -> None:
    "Whichever is loaded later wins, however many workers there are."
    parts = [(f"2024-01-{d:02}", 10_000 * d) for d in range(1, days + 1)]
    write_zip(tmp_path / "raw/BTCUSDT-trades-2024-01.zip", "".join(trades(first, day, price=200.0) for day, first in parts))
    for day, first in parts:
        write_zip(tmp_path / f"raw/BTCUSDT-trades-{day}.zip", trades(first, day))
    found = []
    for n in (1, 4):
        con = init_duckdb(new_store(tmp_path / str(n), duckdb_threads=2))
        process_files(con, tmp_path / "raw", workers=n, max_rejected=1.0)
        found.append(content(con) + con.execute("SELECT sum(price) FROM trades").fetchall())
        assert con.execute("SELECT count(*), count(DISTINCT trade_id) FROM trades").fetchone() == (500 * days,) * 2
        con.close()
    assert found[0] == found[1]


def test_nothing_that_matches_says_what_is_there(tmp_path: Path) -> None:
    write_zip(tmp_path / "BTCUSDT-trades-2024-01-01.zip", trades(1, "2024-01-01"))
    for wrong in ("ETHUSDT-*.zip", "no/such/*.zip", "no-such-file.zip"):
        with pytest.raises(DataNotFound, match=r"BTCUSDT-trades-2024-01-01\.zip"):
            find_files(tmp_path / wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFound, match="there is nothing at all"):
        find_files(tmp_path / "empty")


@pytest.mark.minio
def test_from_the_archive_through_a_bucket_into_the_store(archive: Archive, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYPTORESEARCH_HOME", str(tmp_path))
    bucket = f"{s3.bucket_raw}-whole-way"  # others use s3.bucket_raw
    settings = Settings(_env_file=None, archive_url=archive.url, **s3.settings | {"minio_bucket_raw": bucket}, duckdb_path=str(tmp_path / "catalog.sqlite"))
    for day in (1, 2, 3):
        archive.put("/" + archive_name("BTCUSDT", date(2022, 1, day)), write_zip(tmp_path / f"BTCUSDT-trades-2022-01-{day:02}.zip", trades(10_000 * day, f"2022-01-{day:02}")).read_bytes())
    got = mirror_archive("BTCUSDT", "2022-01-01", "2022-01-03", settings=settings)
    assert got.where == f"s3://{bucket}" and len(got.uris) == 3
    con = init_duckdb(settings)
    summary = process_files(con, f"s3://{bucket}/BTCUSDT-trades-2022-*.zip", settings=settings)
    assert summary.file.tolist() == got.uris and summary.rows.tolist() == [500] * 3
    again = process_files(con, f"s3://{bucket}/data/spot/daily/trades/", settings=settings)
    assert set(again.outcome) == {"already loaded"}, again.to_dict("records")
    with pytest.raises(DataNotFound, match="BTCUSDT-trades-2022-01-0"):
        process_files(con, f"s3://{bucket}/BTCUSDT-trades-2023-*.zip", settings=settings)
    with pytest.raises(DataNotFound, match=r"^bucket:"):
        process_files(con, "s3://no-such-bucket/*.zip", settings=settings)
    con.close()
    remove(settings, *got.uris)


def test_ingest_takes_folders_on_the_command_line(tmp_path: Path, begin: Program) -> None:
    for day in (1, 2):
        write_zip(tmp_path / f"raw/BTCUSDT-trades-2024-01-{day:02}.zip", trades(10_000 * day, f"2024-01-{day:02}"))
    (tmp_path / "raw/BTCUSDT-trades-2024-01-03.zip").write_text("<html></html>")
    first = ended(begin("ingest", "raw"))
    assert first.returncode == 5 and "3 files: 2 loaded, 1 refused" in first.stdout and "SchemaError: raw/BTCUSDT-trades-2024-01-03.zip" in first.stderr, first
    again = ended(begin("ingest", "raw/*-0[12].zip"))
    assert again.returncode == 0 and "2 files: 2 already loaded" in again.stdout, again
