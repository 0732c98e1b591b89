"""Check the servers that other tests depend on."""

from pathlib import Path

import duckdb
import pytest
from minio import Minio

from cryptoresearch.settings import Settings


@pytest.mark.minio
def test_s3_keeps_an_object(s3, tmp_path: Path) -> None:
    client = Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=s3.secure, region=s3.region)
    (tmp_path / "a.csv").write_text("1,2\n")
    client.fput_object(s3.bucket_raw, "a.csv", str(tmp_path / "a.csv"))
    answer = client.get_object(s3.bucket_raw, "a.csv")
    assert answer.read() == b"1,2\n"
    answer.close()
    answer.release_conn()
    settings = Settings(_env_file=None, **s3.settings)
    assert settings.minio_endpoint == s3.endpoint
    assert s3.secret_key not in repr(s3)


def test_postgres_is_empty_and_reachable_from_duckdb(postgres: str) -> None:
    con = duckdb.connect()
    con.execute("SELECT 1")
    assert postgres.startswith("postgres:dbname=")


@pytest.mark.browser
def test_browser_reaches_this_machine_only(page, tmp_path: Path) -> None:
    html = tmp_path / "a.html"
    html.write_text("<title>here</title><img src='https://example.org/a.png'>")
    page.goto(html.as_uri())
    assert page.title() == "here"
    assert page.outside == ["https://example.org/a.png"]
