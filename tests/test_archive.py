"""Objects on a real S3 server, and the public archive's layout on a server that misbehaves."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cryptoresearch.data.archive import archive_name, ensure_buckets, fetch_day, list_objects, local_copy, minio_client, upload
from cryptoresearch.errors import ConfigError, DataNotFound, SchemaError
from cryptoresearch.settings import Settings

DAY = date(2024, 8, 9)


# --- S3 ---


@pytest.fixture
def on_s3(s3: Any) -> Settings:
    "Settings of the S3 server, its buckets made."
    settings = Settings(_env_file=None, **s3.settings)
    ensure_buckets(settings)
    return settings


def changed(settings: Settings, **fields: Any) -> Settings:
    values = settings.model_dump() | fields
    return Settings(_env_file=None, **values)


@pytest.mark.minio
def test_a_file_goes_up_is_listed_and_comes_down(on_s3: Settings, tmp_path: Path) -> None:
    content = bytes(range(256)) * 50_000  # 12.8 MB: more than one part of an upload
    file = tmp_path / "BTCUSDT-trades-2024-08-09.csv"
    file.write_bytes(content)
    assert upload(on_s3, file) == f"s3://{on_s3.minio_bucket_raw}/{file.name}"
    uri = upload(on_s3, file, name="daily/deep down/" + file.name)
    assert ensure_buckets(on_s3) == []

    listed = list_objects(on_s3, "daily/")
    assert listed["uri"].tolist() == [uri] and listed["bytes"].tolist() == [len(content)]
    assert str(listed["modified"].dtype) == "datetime64[us, UTC]"
    assert list_objects(on_s3, f"s3://{on_s3.minio_bucket_raw}/daily/")["uri"].tolist() == [uri]
    assert list_objects(on_s3, "nothing/").empty

    seen: list[tuple[int, int]] = []
    with local_copy(uri, on_s3, progress=lambda done, total: seen.append((done, total))) as path:
        assert path.name == file.name and path.read_bytes() == content
    assert not path.exists() and not path.parent.exists()
    assert seen[-1] == (len(content), len(content)) and len(seen) > 5


@pytest.mark.minio
def test_the_copy_goes_away_when_the_reader_fails(on_s3: Settings, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    uri = upload(on_s3, tmp_path / "x.csv")
    with pytest.raises(ZeroDivisionError), local_copy(uri, on_s3) as path:
        raise ZeroDivisionError
    assert not path.exists()


@pytest.mark.minio
def test_an_error_inside_the_block_is_the_readers_own(on_s3: Settings, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    uri = upload(on_s3, tmp_path / "x.csv")
    with pytest.raises(OSError, match="disk full"), local_copy(uri, on_s3):
        raise OSError("disk full")


@pytest.mark.minio
@pytest.mark.parametrize("scheme", ["", "http://"])
def test_the_endpoint_may_carry_a_scheme(on_s3: Settings, scheme: str) -> None:
    host = str(on_s3.minio_endpoint).split("://")[-1]
    assert minio_client(changed(on_s3, minio_endpoint=scheme + host)).bucket_exists(on_s3.minio_bucket_raw)


@pytest.mark.minio
def test_errors_name_the_bucket_and_the_object(on_s3: Settings, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(DataNotFound, match=r"^bucket: expected a bucket 'no-such-bucket'"):
        upload(on_s3, tmp_path / "x.csv", bucket="no-such-bucket")
    with pytest.raises(DataNotFound, match=r"^bucket:"):
        list_objects(on_s3, "s3://no-such-bucket/x")
    with pytest.raises(DataNotFound, match=r"^object: expected s3://\S+/no-such-file.csv"), local_copy(f"s3://{on_s3.minio_bucket_raw}/no-such-file.csv", on_s3):
        pass
    with pytest.raises(DataNotFound, match="expected a file to upload"):
        upload(on_s3, tmp_path / "none.csv")


@pytest.mark.minio
def test_errors_name_the_credentials_and_show_none(on_s3: Settings, s3: Any) -> None:
    if s3.served_by.startswith("moto"):
        pytest.skip("moto's server accepts any key")
    for wrong in ({"minio_secret_key": "not-the-secret-key"}, {"minio_access_key": "nobody-known"}):
        with pytest.raises(ConfigError, match=r"^credentials:") as caught:
            list_objects(changed(on_s3, **wrong))
        assert all(secret not in str(caught.value) for secret in (*wrong.values(), s3.secret_key))


@pytest.mark.minio
def test_a_plain_server_addressed_in_tls_is_an_endpoint_error(on_s3: Settings) -> None:
    with pytest.raises(ConfigError, match=r"^endpoint: .*https"):
        list_objects(changed(on_s3, minio_secure=True))


def test_nobody_listens() -> None:
    start = time.monotonic()
    nobody = Settings(_env_file=None, minio_endpoint="127.0.0.1:9", minio_access_key="someone", minio_secret_key="a-secret-key")
    for call in (lambda: list_objects(nobody), lambda: ensure_buckets(nobody)):
        with pytest.raises(ConfigError, match=r"^endpoint: expected an S3 server at 127.0.0.1:9"):
            call()
    assert time.monotonic() - start < 5


# --- the public archive ---

Answer = Callable[[BaseHTTPRequestHandler], None]


def content(body: bytes, status: int = 200, length: int | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        request.wfile.write(body)

    return answer


class Archive:
    "A web server of which each path can be told what to answer; 404 otherwise."

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.over = threading.Event()
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                archive.asked.append(self.path)
                archive.answers.get(self.path, content(b"", 404))(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.settings = Settings(_env_file=None, archive_url=f"http://127.0.0.1:{self.server.server_port}/")

    def publish(self, body: bytes, checksum: bytes | None = None, name: str = "") -> str:
        name = "/" + (name or archive_name("BTCUSDT", DAY))
        self.answers[name] = content(body)
        text = f"{hashlib.sha256(body).hexdigest()}  {Path(name).name}\n".encode()
        self.answers[f"{name}.CHECKSUM"] = content(text if checksum is None else checksum)
        return name

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def archive() -> Iterator[Archive]:
    server = Archive()
    yield server
    server.close()


def fetch(archive: Archive, folder: Path, **options: Any) -> Path:
    return fetch_day("BTCUSDT", DAY, folder=folder, settings=archive.settings, **options)


def test_a_day_comes_down_once(archive: Archive, tmp_path: Path) -> None:
    name, body = archive.publish(b"zip" * 1_000_000), b"zip" * 1_000_000
    seen: list[tuple[int, int]] = []
    path = fetch(archive, tmp_path / "new" / "folder", progress=lambda done, total: seen.append((done, total)))
    assert path.name == "BTCUSDT-trades-2024-08-09.zip" and path.read_bytes() == body
    assert seen[-1] == (len(body), len(body))
    assert archive.asked == [f"{name}.CHECKSUM", name]
    fetch(archive, tmp_path / "new" / "folder")
    assert len(archive.asked) == 2


def test_candles_lie_by_interval(archive: Archive, tmp_path: Path) -> None:
    archive.publish(b"candles", name="data/spot/daily/klines/BTCUSDT/1h/BTCUSDT-1h-2024-08-09.zip")
    assert fetch(archive, tmp_path, kind="klines", interval="1h").read_bytes() == b"candles"


def test_a_wrong_checksum_leaves_nothing(archive: Archive, tmp_path: Path) -> None:
    archive.publish(b"damaged", checksum=b"0" * 64 + b"  BTCUSDT-trades-2024-08-09.zip\n")
    with pytest.raises(SchemaError, match="expected sha256 0000"):
        fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_page_instead_of_a_checksum(archive: Archive, tmp_path: Path) -> None:
    archive.publish(b"zip", checksum=b"<html>Welcome to the hotel's network</html>")
    with pytest.raises(SchemaError, match="a page in front of it"):
        fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_breaks_off(archive: Archive, tmp_path: Path) -> None:
    name = archive.publish(b"zip" * 1000)
    archive.answers[name] = content(b"zip" * 500, length=3000)
    with pytest.raises(DataNotFound, match="RemoteProtocolError"):
        fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "text"), [(404, "not published"), (500, "found HTTP 500"), (503, "found HTTP 503")])
def test_refusals(archive: Archive, tmp_path: Path, status: int, text: str) -> None:
    name = archive.publish(b"zip")
    archive.answers[f"{name}.CHECKSUM"] = content(b"no", status)
    with pytest.raises(DataNotFound, match=text):
        fetch(archive, tmp_path)


def test_a_zip_that_is_missing_beside_its_checksum(archive: Archive, tmp_path: Path) -> None:
    del archive.answers[archive.publish(b"zip")]
    with pytest.raises(DataNotFound, match="not published"):
        fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


def hang(archive: Archive, before: bytes = b"") -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        content(before, length=10_000_000)(request)
        archive.over.wait(30)

    return answer


@pytest.mark.parametrize("before", [b"", b"some bytes, then silence"])
def test_a_server_that_hangs_is_left_in_time(archive: Archive, tmp_path: Path, before: bytes) -> None:
    name = archive.publish(b"zip")
    archive.answers[name] = hang(archive, before)
    start = time.monotonic()
    with pytest.raises(DataNotFound, match=r"within 0\.5 s; found no answer"):
        fetch(archive, tmp_path, timeout_s=0.5)
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_drips_is_left_in_time(archive: Archive, tmp_path: Path) -> None:
    def drip(request: BaseHTTPRequestHandler) -> None:
        content(b"", length=10_000_000)(request)
        while not archive.over.wait(0.1):
            try:
                request.wfile.write(b".")
                request.wfile.flush()
            except OSError:
                return

    archive.answers[archive.publish(b"zip")] = drip
    start = time.monotonic()
    with pytest.raises(DataNotFound, match=r"bytes in 0\.5 s"):
        fetch(archive, tmp_path, timeout_s=0.5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://archive.invalid", "no scheme at all"])
def test_no_network(tmp_path: Path, url: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataNotFound, match=r"simulate_trades"):
        fetch_day("BTCUSDT", DAY, folder=tmp_path, settings=Settings(_env_file=None, archive_url=url), timeout_s=2)
    assert time.monotonic() - start < 8


def test_a_name_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: over.wait(30))
    start = time.monotonic()
    with pytest.raises(DataNotFound, match=r"no name server that knows archive\.example"):
        fetch_day("BTCUSDT", DAY, folder=tmp_path, settings=Settings(_env_file=None, archive_url="https://archive.example"), timeout_s=0.5)
    over.set()
    assert time.monotonic() - start < 5


@pytest.mark.minio
def test_names_that_s3_does_not_allow(on_s3: Settings) -> None:
    with pytest.raises(ConfigError, match=r"^bucket: expected names that S3 allows"):
        list_objects(on_s3, "s3://UPPER_case/x")
