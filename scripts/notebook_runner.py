"""Run notebooks as `nbdev_test` does, and commands, each in a process of its own that need not import the large libraries again.

A runner is a process that has imported what notebooks import and has done nothing else. For each notebook or command it forks: the
child has its own memory, environment, working folder and process group, and ends as an interpreter ends. So does each kernel that a command
starts: its `sys.executable` is a small script that asks the runner for a fork. A fork is safe here because
the libraries are only imported and none of them has a thread, which the runner checks; those that start one are left out
(`NOT_AHEAD`). Where there is no safe fork (Windows, macOS), each gets a new interpreter.
"""

import argparse
import ast
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CAN_FORK = sys.platform == "linux"
# left to each notebook: duckdb and polars start a thread when they are imported, the others import polars; the package is what is tested
NOT_AHEAD = ("cryptoresearch", "duckdb", "polars", "mlflow", "arch", "statsmodels", "lightgbm")
# what notebooks need before their own imports, and libraries that are imported inside functions
FIRST = (
    "nbdev.test", "numba", "matplotlib.pyplot", "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "skops.io",
)  # fmt: skip
# jemalloc, inside pyarrow, prepares its own thread for a fork
SAFE_THREADS = ("jemalloc_bg_thd",)


@dataclass(frozen=True)
class Outcome:
    "How a notebook ended."

    code: int  # exit code, negative for a signal
    output: str  # what it wrote to standard output and standard error
    cpu_s: float = 0.0  # processor time of its process and of those it waited for


def imported_names(source: str) -> set[str]:
    "List the modules that a piece of Python imports at its top level, in full."
    try:
        tree = ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()))
    except SyntaxError:
        return set()
    found = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module and not node.level}


def modules_ahead() -> list[str]:
    "List the modules of other packages that notebooks and the package import, without what starts more than itself."
    names: set[str] = set()
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                names |= imported_names("".join(cell["source"]))
    for path in (ROOT / "cryptoresearch").rglob("*.py"):
        names |= imported_names(path.read_text(encoding="utf-8"))
    return sorted(name for name in names if name.split(".")[0] not in NOT_AHEAD)


# --- in the runner


def threads() -> list[str]:
    "Name the threads of this process besides the first, by what the kernel knows of them."
    task = Path("/proc/self/task")
    found = []
    for thread in task.iterdir():
        if int(thread.name) != os.getpid():
            with suppress(OSError):
                found.append((thread / "comm").read_text().strip())
    return found


def import_ahead() -> dict[str, Any]:
    "Import what notebooks import; report what could not be imported, and threads that a fork would lose."
    import importlib
    import warnings

    failed = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (*FIRST, *modules_ahead()):
            try:
                importlib.import_module(name)
            except Exception as e:  # the notebook will say so itself, if it matters
                failed[name] = repr(e)
        import matplotlib.backends

        matplotlib.backends.backend_registry.list_all()  # reads the entry points of all installed packages, once
    gc.collect()
    gc.freeze()  # so that a fork, which shares this memory until it writes to it, does not touch all of it when it ends
    return {"failed": failed, "threads": [name for name in threads() if name not in SAFE_THREADS]}


def settle(request: dict[str, Any]) -> None:
    "Give this fork what an interpreter of its own would have: environment, working folder, time zone, random numbers, place of temporary files."
    from numpy import random

    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["home"])
    random.seed()  # otherwise all forks would draw the same numbers
    tempfile.tempdir = None
    sys.executable = request["python"]


def run_here(request: dict[str, Any]) -> int:
    "Run one notebook or command in this process, which is a fork made for it."
    for number, name in ((1, "out"), (2, "err")):
        with Path(request[name]).open("a") as file:
            os.dup2(file.fileno(), number)
    settle(request)
    if "code" in request:
        return run_code(request["code"], request["args"], module=False)
    from nbdev.test import test_nb

    flags = request["flags"].split()
    passed, _ = test_nb(Path(request["path"]), skip_flags=request["skip_flags"].split(), force_flags=flags, basepath=ROOT)
    if not passed:  # at once: a server that the notebook did not come to stop would keep the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 0


def run_code(code: str, args: list[str], module: bool) -> int:
    "Run a piece of Python as `python -c` does, or a module as `python -m`; return its exit code."
    import runpy
    import traceback
    import warnings

    warnings.resetwarnings()  # the runner was started with PYTHONWARNINGS=ignore; these are Python's own
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    sys.argv[:] = [sys.argv[0] if module else "-c", *args]
    sys.path.insert(0, str(Path.cwd()) if module else "")
    try:
        if module:
            runpy.run_module(code, run_name="__main__", alter_sys=True)
        else:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# --- processes that others start by the script below: `python -m MODULE`, such as kernels, and `python --program CODE` of the tests

PYTHON = """#!{python} -ISs
import json, os, signal, socket, sys
if sys.argv[1:2] not in (["-m"], ["--program"]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
runner = socket.socket(socket.AF_UNIX)
runner.connect({address!r})
request = json.dumps({{"python": sys.argv[0], "module": sys.argv[1] == "-m", "args": sys.argv[2:], "env": dict(os.environ), "home": os.getcwd()}}).encode()
socket.send_fds(runner, [len(request).to_bytes(4)], [0, 1, 2])
runner.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: runner.sendall(bytes([number])))
code = int.from_bytes(runner.recv(4) or bytes([1]), signed=True)
if code < 0:
    if code != -signal.SIGKILL:  # how that one is handled cannot be set
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def fork_kernel(asked: socket.socket) -> int | None:
    "Fork for one request and return its exit code; in the fork, run the module and return None."
    size, streams, _, _ = socket.recv_fds(asked, 4, 3)
    data = b""
    while len(data) < int.from_bytes(size) and (piece := asked.recv(1 << 16)):
        data += piece
    request = json.loads(data)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        asked.close()
        settle(request)
        end(run_code(request["args"][0], request["args"][1:], request["module"]))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    while ended not in select.select([asked, ended], [], [])[0]:
        number = asked.recv(1)
        with suppress(ProcessLookupError):
            os.killpg(pid, number[0] if number else signal.SIGKILL)  # a signal to pass on; nothing: the asking process is gone
        if not number:
            break
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end(code: int) -> None:
    "End this process as an interpreter ends."
    raise SystemExit(code)


def serve_kernels(address: str, alive: int) -> None:
    "Fork for each request at a socket, until the runner ends."
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    while alive not in select.select([listener, alive], [], [])[0]:
        asked, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            with suppress(OSError):  # the asking process is gone
                asked.sendall(fork_kernel(asked).to_bytes(4, signed=True))
            end(0)
        asked.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def start_kernels(folder: Path) -> str:
    "Start the process that forks for kernels; return the path of the script that takes the place of `sys.executable`."
    address, python = folder / "kernels", folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, address=str(address)))
    python.chmod(0o755)
    alive, mine = os.pipe()
    if os.fork() == 0:
        os.setpgid(0, 0)
        os.close(mine)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        serve_kernels(str(address), alive)
        end(0)
    os.close(alive)
    return str(python)


def serve(cache: Path, private: Path) -> int:
    "Import ahead, then run the notebooks and commands that arrive as lines of JSON on standard input, each in a fork."
    import numba_cache

    report = import_ahead()
    numba_cache.install(cache)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    python = start_kernels(private)
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what a library prints must not come between them
    os.dup2(2, 1)
    print(json.dumps(report), file=answers)
    while line := sys.stdin.readline():
        request = json.loads(line) | {"python": python}
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            answers.close()
            os.close(0)
            os.open(os.devnull, os.O_RDONLY)
            code = run_here(request)
            sys.stdout.flush()
            return code
        with suppress(OSError):  # here and in the child: whichever comes first
            os.setpgid(pid, pid)
        print(json.dumps({"pid": pid}), file=answers)
        _, status, usage = os.wait4(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2)}), file=answers)
    return 0


# --- in the tests


class Runner:
    "Runs notebooks one after another, each in its own process: `with Runner() as runner: runner.run(...)`."

    def __init__(self, cache: Path | None = None) -> None:
        import numba_cache

        self.cache = cache or numba_cache.cache_folder()
        self.cache.mkdir(parents=True, exist_ok=True)
        numba_cache.prune(self.cache)
        self.process: subprocess.Popen | None = None
        self.running: int | None = None  # process group of the notebook that runs
        self.report: dict[str, Any] = {}
        self.turn = threading.Lock()  # a test may call from several threads

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        "End the runner, and the notebook that it runs."
        self._kill_running()
        if self.process is not None:
            with suppress(OSError):
                self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            self.process = None
            shutil.rmtree(self.private, ignore_errors=True)

    def _kill_running(self) -> None:
        if self.running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.running, signal.SIGKILL)

    def _answer(self, timeout_s: float) -> dict[str, Any] | None:
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if ready else b"null"
        if not line:
            raise RuntimeError(f"the notebook runner ended with code {self.process.wait()}")
        return json.loads(line)

    @property
    def python(self) -> str:
        "Path of a script that does `python -m MODULE` in a fork, and all else with the interpreter."
        self.start()
        return str(self.private / "python") if CAN_FORK else sys.executable

    def program(
        self,
        code: str,  # Python
        *args: object,  # sys.argv[1:]
    ) -> list[str]:  # for Popen
        "Return the command that does `python -c code args` in a fork. SIGINT, SIGTERM, SIGHUP and its own death by SIGKILL reach the fork, others do not."
        return [self.python, "--program" if CAN_FORK else "-c", textwrap.dedent(code), *map(str, args)]

    def start(self) -> None:
        "Start the process that imports ahead, unless it runs."
        if self.process is None and CAN_FORK:
            # read when a library is loaded, so for all notebooks alike; OpenBLAS would start its threads at once
            env = os.environ | {"PYTHONWARNINGS": "ignore", "MPLBACKEND": "agg", "OPENBLAS_NUM_THREADS": "1"}
            self.private = Path(tempfile.mkdtemp(prefix="runner-"))  # a short path: a Unix socket's name has 107 characters at most
            command = [sys.executable, __file__, "--cache", str(self.cache), "--private", str(self.private)]
            # unbuffered: select sees what readline will find
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            self.report = self._answer(300) or {}
            if self.report.get("threads"):
                raise RuntimeError(f"importing ahead started threads {self.report['threads']}; add the library to NOT_AHEAD in {__file__}")

    def run(
        self,
        path: Path,  # notebook
        home: Path,  # copy of the project that it belongs to: the working folder
        env: dict[str, str],  # its whole environment
        out: Path,  # file for its output
        flags: str = "",  # directives to run that tests leave out otherwise, separated by spaces
        skip_flags: str = "",  # directives to leave out
        timeout_s: float = 900,
    ) -> Outcome:
        "Run a notebook to its end, or kill it with its children after `timeout_s`."
        if not CAN_FORK:
            return self._run_in_a_new_interpreter(path, home, env, out, flags, timeout_s)
        out.write_text("")
        done, late = self._fork({"path": str(path), "home": str(home), "env": env, "out": str(out), "err": str(out), "flags": flags, "skip_flags": skip_flags}, timeout_s)
        return Outcome(done["code"], out.read_text(errors="replace") + (f"\nnot finished after {timeout_s:.0f} s" if late else ""), done["cpu_s"])

    def _fork(self, request: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], bool]:
        "Run a request in a fork; tell how it ended, and whether it had to be killed."
        self.start()
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.running = self._answer(60)["pid"]
        done = self._answer(timeout_s)
        late = done is None
        if late:
            self._kill_running()
            done = self._answer(60)
        self._kill_running()  # what it left running ends with it
        self.running = None
        return done, late

    def call(
        self,
        code: str,  # Python, as for `python -c`
        args: Sequence[str],  # behind it
        env: dict[str, str],  # its whole environment
        folder: Path,  # for its output
        home: Path = ROOT,  # working folder
        timeout_s: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        "Run `python -c code args`, with closed standard input; TimeoutExpired after `timeout_s`."
        command = [sys.executable, "-c", code, *args]
        if not CAN_FORK:
            return subprocess.run(command, env=env, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False)
        out, err = folder / "stdout.txt", folder / "stderr.txt"
        with self.turn:
            for file in (out, err):
                file.write_text("")
            done, late = self._fork({"code": code, "args": [*map(str, args)], "home": str(home), "env": env, "out": str(out), "err": str(err)}, timeout_s)
            told = [file.read_text(errors="replace") for file in (out, err)]
        if late:
            raise subprocess.TimeoutExpired(command, timeout_s, *told)
        return subprocess.CompletedProcess(command, done["code"], *told)

    def _run_in_a_new_interpreter(self, path: Path, home: Path, env: dict[str, str], out: Path, flags: str, timeout_s: float) -> Outcome:
        command = [Path(sys.executable).parent / "nbdev_test", "--path", path, "--n_workers", "0", "--flags", flags]
        with out.open("w") as file:
            try:
                code = subprocess.run(command, cwd=home, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=timeout_s, check=False).returncode
            except subprocess.TimeoutExpired:
                return Outcome(1, out.read_text(errors="replace") + f"\nnot finished after {timeout_s:.0f} s")
        return Outcome(code, out.read_text(errors="replace"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for compiled functions of cells")
    parser.add_argument("--private", type=Path, required=True, help="empty folder for a socket")
    sys.exit(serve(**vars(parser.parse_args())))
