"""Objects on a real S3 server, and the public archive's layout on a server that misbehaves."""

import contextlib
import datetime as dt
import hashlib
import ipaddress
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import urllib3

from cryptoresearch.ingest import files as ingest
from cryptoresearch.data.archive import (
    archive_name, download, ensure_buckets, fetch_day, file_sha256, list_objects, local_copy, minio_client, remove, stored,
    upload, verify,
)
from cryptoresearch.ingest.files import process_file
from cryptoresearch.data.simulate import simulate_trades
from cryptoresearch.data.store import init_duckdb
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


@pytest.mark.minio
def test_an_object_is_proved_by_what_the_server_knows(on_s3: Settings, tmp_path: Path) -> None:
    file, seen = tmp_path / "proved.bin", list[tuple[int, int]]()
    file.write_bytes(os.urandom(9_000_000))  # two parts: the ETag is no checksum of the content
    uri = upload(on_s3, file, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (9_000_000, 9_000_000) and len(seen) == 2  # a part is read at once
    known = stored(on_s3, uri)
    assert (known.bytes, known.sha256, "-" in known.etag) == (9_000_000, file_sha256(file), True)
    assert verify(on_s3, uri) == "sha256"
    client, bucket = minio_client(on_s3), on_s3.minio_bucket_raw
    client.put_object(bucket, "plain.bin", BytesIO(b"plain"), 5)
    assert verify(on_s3, f"s3://{bucket}/plain.bin") == "etag"
    client.put_object(bucket, "wrong.bin", BytesIO(b"wrong"), 5, metadata={"sha256": "0" * 64})
    for call in (lambda: verify(on_s3, f"s3://{bucket}/wrong.bin"), lambda: download(on_s3, f"s3://{bucket}/wrong.bin", tmp_path / "wrong.bin")):
        with pytest.raises(SchemaError, match="expected sha256 0000"):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["proved.bin"]
    with pytest.raises(DataNotFound, match=r"^object:"):
        remove(on_s3, uri, f"s3://{bucket}/no-such-object")
    assert remove(on_s3, uri, f"s3://{bucket}/wrong.bin", f"s3://{bucket}/plain.bin") == 3
    assert list_objects(on_s3, "proved").empty
    with pytest.raises(DataNotFound, match=r"^bucket:"):
        stored(on_s3, "s3://no-such-bucket/x")
    assert ensure_buckets(on_s3, f"{bucket}-made", bucket) == [f"{bucket}-made"]
    client.remove_bucket(f"{bucket}-made")


class Line:
    "A line to a server, cut after so many bytes as often as asked for."

    def __init__(self, endpoint: str, cuts: list[int]) -> None:
        host, port = endpoint.split(":")
        self.server, self.cuts, self.there = socket.create_server(("127.0.0.1", 0)), cuts, (host, int(port))
        self.endpoint = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            far = socket.create_connection(self.there)
            for pair in ((near, far, False), (far, near, True)):
                threading.Thread(target=self.pass_on, args=pair, daemon=True).start()

    def pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        sent = 0
        try:
            while piece := source.recv(65_536):
                target.sendall(piece)
                sent += len(piece)
                if answers and self.cuts and sent > self.cuts[0]:
                    self.cuts.pop(0)
                    break
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.minio
def test_an_object_comes_down_over_a_line_that_breaks(on_s3: Settings, tmp_path: Path) -> None:
    file = tmp_path / "long.bin"
    file.write_bytes(os.urandom(8_000_000))
    uri = upload(on_s3, file)
    line = Line(str(on_s3.minio_endpoint), [3_000_000, 2_000_000, 1_000_000])
    got = download(changed(on_s3, minio_endpoint=line.endpoint), uri, tmp_path / "got.bin")
    assert got.read_bytes() == file.read_bytes() and line.cuts == []
    line.server.close()


@pytest.mark.minio
def test_a_text_is_loaded_while_it_comes(on_s3: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = simulate_trades(tmp_path / "days", days=1, trades_per_day=60_000)
    uri, client = upload(on_s3, file), minio_client(on_s3)
    line = Line(str(on_s3.minio_endpoint), [3_000_000, 500_000])
    broken = changed(on_s3, minio_endpoint=line.endpoint)
    with init_duckdb(changed(on_s3, duckdb_path=str(tmp_path / "catalog.sqlite"))) as con:
        client.put_object(on_s3.minio_bucket_raw, "BTCUSDT-trades-2024-02-01.csv", BytesIO(file.read_bytes()), file.stat().st_size, metadata={"sha256": "0" * 64})
        with pytest.raises(SchemaError, match="expected sha256 0000"):  # known at the last byte only
            process_file(con, f"s3://{on_s3.minio_bucket_raw}/BTCUSDT-trades-2024-02-01.csv", settings=on_s3)
        assert con.sql("SELECT count(*) FROM trades").fetchone() == (0,) and not list((tmp_path / "catalog.sqlite.files").rglob("*.parquet"))
        with monkeypatch.context() as m:
            m.setattr(ingest, "local_file", None)  # no copy is made
            result = process_file(con, uri, settings=broken, source="trades")
        assert line.cuts == [] and (result.sha256, result.rows) == (file_sha256(file), con.sql("SELECT count(*) FROM trades").fetchone()[0])
        assert process_file(con, uri, settings=on_s3, source="trades").already_loaded
        with init_duckdb(changed(on_s3, duckdb_path=str(tmp_path / "local" / "catalog.sqlite"))) as local:
            process_file(local, file, source="trades")
            everything = "FROM trades ORDER BY ts, trade_id"
            assert con.sql(everything).fetchall() == local.sql(everything).fetchall()
    remove(on_s3, uri, f"s3://{on_s3.minio_bucket_raw}/BTCUSDT-trades-2024-02-01.csv")  # the bucket is everybody's
    line.server.close()


# --- S3 in TLS, with keys for a while, and with the bucket in the host's name ---


def authority(folder: Path, *names: str) -> Path:
    "A new authority and a server's certificate signed by it, as MinIO wants them; the authority's file."
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    start, end = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1), dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    subjects = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("an authority of one's own", "server")]

    def build(i: int) -> x509.CertificateBuilder:
        blank = x509.CertificateBuilder().subject_name(subjects[i]).issuer_name(subjects[0]).public_key(keys[i].public_key())
        return blank.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = build(0).add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True).sign(keys[0], hashes.SHA256())
    alternatives = [x509.DNSName(name) for name in names] + [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    cert = build(1).add_extension(x509.SubjectAlternativeName(alternatives), False).sign(keys[0], hashes.SHA256())
    folder.mkdir(parents=True)
    (folder / "public.crt").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    (folder / "private.key").write_bytes(keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain))
    (folder.parent / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    return folder.parent / "ca.pem"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    "A MinIO that speaks TLS with a certificate of an authority of its own, and knows its domain."
    from s3_server import NoServer, binary

    try:
        program = binary()
    except NoServer as e:
        pytest.skip(f"TLS needs a MinIO program ({e}): make minio")
    folder = tmp_path_factory.mktemp("tls")
    ca = authority(folder / "certs", "localhost", "tls-raw.localhost", "tls-lake.localhost")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    keys = {"MINIO_ROOT_USER": secrets.token_hex(8), "MINIO_ROOT_PASSWORD": secrets.token_hex(16)}
    env = {k: v for k, v in os.environ.items() if not k.startswith("MINIO_")} | keys | {"MINIO_DOMAIN": "localhost", "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, "server", "--quiet", "--certs-dir", folder / "certs", "--address", f"127.0.0.1:{port}", folder / "data"], env=env, stdout=log, stderr=log)
    settings = Settings(
        _env_file=None, minio_endpoint=f"https://localhost:{port}", minio_access_key=keys["MINIO_ROOT_USER"], minio_secret_key=keys["MINIO_ROOT_PASSWORD"],
        minio_ca_file=str(ca), minio_bucket_raw="tls-raw", minio_bucket_lake="tls-lake",
    )  # fmt: skip
    try:
        for _ in range(200):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                ensure_buckets(settings)
                break
            except ConfigError:
                time.sleep(0.05)
        yield settings
    finally:
        process.terminate()
        process.wait(20)


def goes_round(settings: Settings, tmp_path: Path) -> None:
    "Up, listed, down, proved, removed."
    file = tmp_path / "round.bin"
    file.write_bytes(os.urandom(100_000))
    uri = upload(settings, file)
    assert list_objects(settings, "round")["uri"].tolist() == [uri] and verify(settings, uri) == "sha256"
    with local_copy(uri, settings) as path:
        assert path.read_bytes() == file.read_bytes()
    assert remove(settings, uri) == 1


@pytest.mark.minio
def test_tls_with_an_authority_of_its_own(secure: Settings, tmp_path: Path) -> None:
    goes_round(secure, tmp_path)
    host = str(secure.minio_endpoint).removeprefix("https://")
    goes_round(changed(secure, minio_endpoint=host, minio_secure=True), tmp_path)
    with pytest.raises(ConfigError, match=r"^endpoint: expected a certificate .* an authority that this machine knows; found .*MINIO_CA_FILE"):
        list_objects(changed(secure, minio_ca_file=None))
    other = authority(tmp_path / "other" / "certs", "localhost")
    with pytest.raises(ConfigError, match=r"^endpoint: expected a certificate"):
        list_objects(changed(secure, minio_ca_file=str(other)))
    with pytest.raises(ConfigError, match=r"^endpoint: expected an S3 server .*\(http\)"):
        list_objects(changed(secure, minio_endpoint=host, minio_secure=False))
    (tmp_path / "no.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="PEM form in MINIO_CA_FILE"):
        list_objects(changed(secure, minio_ca_file=str(tmp_path / "no.pem")))


def for_a_while(settings: Settings) -> Settings:
    "The same with temporary keys, as the server's AssumeRole gives them."
    from minio.credentials import AssumeRoleProvider, StaticProvider
    from minio.minioadmin import MinioAdmin

    pool = urllib3.PoolManager(cert_reqs="CERT_REQUIRED", ca_certs=settings.minio_ca_file)
    host, keys = str(settings.minio_endpoint).removeprefix("https://"), (settings.minio_access_key.get_secret_value(), settings.minio_secret_key.get_secret_value())
    admin, user = MinioAdmin(endpoint=host, credentials=StaticProvider(*keys), region="us-east-1", secure=True, http_client=pool), ("researcher", secrets.token_hex(16))
    admin.user_add(*user)
    admin.attach_policy(["readwrite"], user=user[0])
    given = AssumeRoleProvider(sts_endpoint=f"https://{host}", access_key=user[0], secret_key=user[1], duration_seconds=900, region="us-east-1", http_client=pool).retrieve()
    return changed(settings, minio_access_key=given.access_key, minio_secret_key=given.secret_key, minio_session_token=given.session_token)


@pytest.mark.minio
def test_keys_for_a_while(secure: Settings, tmp_path: Path) -> None:
    temporary = for_a_while(secure)
    goes_round(temporary, tmp_path)
    for wrong in (None, "a-token-of-somebody-else"):
        with pytest.raises(ConfigError, match=r"^credentials:") as caught:
            list_objects(changed(temporary, minio_session_token=wrong))
        assert "somebody" not in str(caught.value)
    settings = changed(temporary, duckdb_path=str(tmp_path / "catalog.sqlite"))
    minio_client(secure).put_object("tls-raw", "one.csv", BytesIO(b"a\n7\n"), 4)
    assert init_duckdb(settings).sql("SELECT a FROM 's3://tls-raw/one.csv'").fetchall() == [(7,)]


@pytest.mark.minio
def test_a_lake_on_tls(secure: Settings, tmp_path: Path) -> None:
    settings = changed(secure, duckdb_path=str(tmp_path / "catalog.sqlite"), duckdb_data_path="s3://tls-lake/one/")
    con = init_duckdb(settings)
    con.execute("CREATE TABLE lake.main.seen AS SELECT unnest(range(20_000)) AS n")
    assert con.sql("SELECT sum(n) FROM lake.main.seen").fetchone() == (199_990_000,)
    assert len(list_objects(settings, "s3://tls-lake/one/")) >= 1
    con.close()


@pytest.mark.minio
def test_the_bucket_in_the_hosts_name(secure: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, look_up = [], socket.getaddrinfo

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:  # not every machine knows names below localhost
        asked.append(host)
        return look_up("127.0.0.1" if str(host).endswith(".localhost") else host, *args, **kwargs)

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    goes_round(changed(secure, minio_url_style="virtual"), tmp_path)
    assert "tls-raw.localhost" in asked
    minio_client(secure).put_object("tls-raw", "virtual.csv", BytesIO(b"a\n8\n"), 4)
    con = init_duckdb(changed(secure, minio_url_style="virtual", duckdb_path=str(tmp_path / "catalog.sqlite")))
    assert con.sql("SELECT a FROM 's3://tls-raw/virtual.csv'").fetchall() == [(8,)]
    con.close()
    asked.clear()
    goes_round(secure, tmp_path)
    assert set(asked) == {"localhost"}


def test_nobody_listens() -> None:
    start = time.monotonic()
    nobody = Settings(_env_file=None, minio_endpoint="127.0.0.1:9", minio_access_key="someone", minio_secret_key="a-secret-key")
    for call in (lambda: list_objects(nobody), lambda: ensure_buckets(nobody)):
        with pytest.raises(ConfigError, match=r"^endpoint: expected an S3 server at 127.0.0.1:9"):
            call()
    assert time.monotonic() - start < 25


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
    "Serve a configurable answer for each path; 404 otherwise."

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
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
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
    (part,) = tmp_path.iterdir()  # hidden, for the next time
    assert part.name.startswith(".") and part.suffix == ".part" and part.read_bytes() == b"zip" * 500


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
    assert time.monotonic() - start < 25
    assert not list(tmp_path.glob("BTC*"))


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
    assert time.monotonic() - start < 25


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://archive.invalid", "no scheme at all"])
def test_no_network(tmp_path: Path, url: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataNotFound, match=r"simulate_trades"):
        fetch_day("BTCUSDT", DAY, folder=tmp_path, settings=Settings(_env_file=None, archive_url=url), timeout_s=2)
    assert time.monotonic() - start < 25


def test_a_name_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: over.wait(30))
    start = time.monotonic()
    with pytest.raises(DataNotFound, match=r"no name server that knows archive\.example"):
        fetch_day("BTCUSDT", DAY, folder=tmp_path, settings=Settings(_env_file=None, archive_url="https://archive.example"), timeout_s=0.5)
    over.set()
    assert time.monotonic() - start < 25


@pytest.mark.minio
def test_names_that_s3_does_not_allow(on_s3: Settings, s3: Any) -> None:
    if s3.served_by.startswith("moto"):
        pytest.skip("moto's server allows any name")
    with pytest.raises(ConfigError, match=r"^bucket: expected names that S3 allows"):
        list_objects(on_s3, "s3://UPPER_case/x")
