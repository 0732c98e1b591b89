"""The API as others meet it: a real server, many readers, and a writer that commits meanwhile."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pandas as pd
import pytest
import uvicorn

from cryptoresearch.data.bars import bar_frame
from cryptoresearch.data.store import init_duckdb, write
from cryptoresearch.serving.api import create_app
from cryptoresearch.settings import Settings

COLUMNS = "symbol, source, kind, spec, ts, close_ts, open, high, low, close, volume, quote_volume, trades, buy_volume, buy_volume_tick, vwap, gap"


def minutes(n: int, start: str = "2024-01-01") -> pd.DataFrame:
    "A random walk as a frame of minute bars, with a hole of three bars in it."
    rng = np.random.default_rng(7)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.001, n)))
    first = np.r_[100.0, close[:-1]]
    table = pd.DataFrame(
        {"ts": pd.date_range(start, periods=n, freq="1min", tz="UTC"), "open": first, "high": np.maximum(first, close), "low": np.minimum(first, close), "close": close, "volume": 1.0}
    )
    return bar_frame(table.drop(index=range(50, 53)), "1m", symbol="TESTUSD")


def put(con, frame: pd.DataFrame, source: str = "simulated", spec: str = "1m") -> None:
    "Commit a frame of bars."
    rows = frame.reset_index()
    rows["source"], rows["kind"], rows["spec"] = source, "time", spec
    for name in ("ts", "close_ts"):
        rows[name] = rows[name].dt.tz_localize(None)
    con.register("new_rows", rows)
    write(con, lambda c: c.execute(f"INSERT INTO bars ({COLUMNS}) SELECT {COLUMNS} FROM new_rows"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder: Path = tmp_path_factory.mktemp("api")
    chosen = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=2)
    with init_duckdb(chosen) as con:
        put(con, minutes(600))
    return chosen


@contextmanager
def served(settings: Settings) -> Iterator[httpx.Client]:
    "A client of a real server on a port of its own."
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while not server.started:
                time.sleep(0.05)
            yield http
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(settings) -> Iterator[httpx.Client]:
    with served(settings) as http:
        yield http


def test_health_tells_versions_and_snapshot(client):
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ok"
    assert answer.json()["snapshot"] > 0
    assert answer.json()["versions"]["duckdb"]


def test_pages_of_bars_are_the_whole(client):
    start, got = "2024-01-01T00:00:00Z", []
    while start:
        page = client.get("/bars", params={"symbol": "TESTUSD", "spec": "1m", "start": start, "end": "2024-01-01T10:00:00Z", "limit": 70}).json()
        got, start = got + page["bars"], page["next_start"]
    assert page["source"] == "simulated"
    assert [bar["ts"] for bar in got] == [t.strftime("%Y-%m-%dT%H:%M:%SZ") for t in minutes(600).index]
    assert [i for i, bar in enumerate(got) if bar["gap"]] == [50, 51, 52]
    assert all(got[50][name] is None for name in ("open", "close", "volume"))


@pytest.mark.parametrize(
    ("path", "status", "error", "words"),
    [
        ("/bars?symbol=NOPE", 404, "DataNotFound", "TESTUSD 1m"),
        ("/bars?symbol=TESTUSD&spec=1m&limit=10001", 422, "ValidationError", "limit"),
        ("/bars?symbol=TESTUSD&spec=1m&start=soon", 422, "ValidationError", "start"),
        ("/bars?spec=1m", 422, "ValidationError", "symbol"),
        ("/bars?symbol=TESTUSD&spec=1M", 422, "SchemaError", "bar length"),
        ("/bars?symbol=TESTUSD&spec=1m&start=2024-01-02&end=2024-01-01", 422, "ConfigError", "before the end"),
        ("/features?symbol=TESTUSD&spec=1m&names=rsi14", 404, "DataNotFound", "rsi_14"),
        ("/runs/none", 404, "DataNotFound", "no run"),
        ("/nowhere", 404, "HTTPError", "/nowhere"),
    ],
)
def test_errors_are_typed_and_say_what_to_do(client, path, status, error, words):
    answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert words in answer.json()["message"]


def test_nothing_can_be_written(client):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = client.request(method, "/bars")
        assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/health", "/metrics", "/symbols", "/bars?symbol=TESTUSD&spec=1m", "/bars?symbol=TESTUSD&spec=1m&format=arrow", "/bars?symbol=NOPE", "/bars?limit=0", "/runs/none", "/nowhere", "/predict"])
def test_head_answers_as_get_without_a_body(client, path):
    time.sleep(0.15)  # the answer of /bars is kept from here on
    full, head = client.get(path), client.head(path)
    changing = {"date", "x-request-id"}
    same = lambda answer: {name: value for name, value in answer.headers.items() if name not in changing}
    assert (head.status_code, head.content) == (full.status_code, b"")
    assert same(head) == same(full), path
    if "etag" in full.headers:
        assert client.head(path, headers={"If-None-Match": full.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("path", ["/", "/health", "/bars?symbol=TESTUSD&spec=1m", "/docs"])
def test_a_page_elsewhere_that_takes_this_machines_address_reads_nothing(client, path):
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.7"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code in (400, 421) and "TESTUSD" not in answer.text, host
    assert "ALLOWED_HOSTS" in client.get("/health", headers={"Host": "evil.example"}).json()["message"]
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert client.get(path, headers={"Host": host}).status_code == 200, host


def test_other_names_are_allowed_by_the_setting(settings):
    for allowed, fine in (("desk.example, 10.0.0.7", {"desk.example", "10.0.0.7", "localhost"}), ("*", {"evil.example", "desk.example", "10.0.0.7", "localhost"})):
        with served(settings.model_copy(update={"allowed_hosts": allowed})) as client:
            for host in ("evil.example", "desk.example", "10.0.0.7", "localhost"):
                assert client.get("/health", headers={"Host": host}).status_code == (200 if host in fine else 421), (allowed, host)


def test_a_service_without_data_is_healthy_and_says_so(tmp_path):
    empty = Settings(_env_file=None, duckdb_path=str(tmp_path / "none" / "catalog.sqlite"), runs_dir=str(tmp_path / "runs"))
    with served(empty) as client:
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"], answer.json()["snapshot"]) == (200, "no data yet", None)
        with init_duckdb(empty):
            pass
        assert client.get("/health").json()["status"] == "ok"


def test_injection_is_only_a_strange_symbol(client):
    answer = client.get("/bars", params={"symbol": "x'; DROP TABLE bars; --", "spec": "1m"})
    assert answer.status_code == 422 and "a symbol such as BTCUSDT" in answer.text
    assert len(client.get("/bars", params={"symbol": "TESTUSD", "spec": "1m", "limit": 5}).json()["bars"]) == 5


def test_openapi_describes_every_parameter_and_field(client):
    api = client.get("/openapi.json").json()
    assert {"/health", "/symbols", "/bars", "/features", "/labels", "/export", "/models", "/runs", "/runs/{run_id}", "/predictions"} <= set(api["paths"])
    for path, methods in api["paths"].items():
        for what in methods.values():
            assert what["description"], path
            assert all(p["description"] for p in what.get("parameters", [])), path
    assert api["components"]["schemas"]["Bar"]["properties"]["volume"]["description"]


def test_pages_for_people_need_no_other_host(client):
    for path in ("/", "/docs"):
        page = client.get(path, follow_redirects=True)
        assert page.status_code == 200
        assert "https://" not in page.text
        assert "//cdn" not in page.text


def test_features_equal_those_of_a_notebook(client):
    from cryptoresearch.features.pipeline import DataProcessing

    page = client.get("/features", params={"symbol": "TESTUSD", "spec": "1m", "names": "rsi_14", "limit": 3}).json()
    want = DataProcessing(features=["rsi_14"]).process_data(minutes(600)).tail(3)["rsi_14"]
    np.testing.assert_allclose([row["values"]["rsi_14"] for row in page["rows"]], want, rtol=1e-9)
    assert page["rows"][-1]["known_ts"] == "2024-01-01T10:00:00Z"


def test_prediction_matures_when_its_bars_are_there(client, settings):
    bars = minutes(600)
    made = bars.index[[100, 599]]
    with init_duckdb(settings) as con:
        for ts in made:
            row = ["r1", "TESTUSD", "1m", "return", 5, ts.tz_localize(None).to_pydatetime(), 0.002]
            write(con, lambda c, row=row: c.execute("INSERT INTO predictions (run_id, symbol, spec, target, horizon, ts, close_ts, prediction, source, made_at) SELECT ?, ?, ?, ?, ?, t, t + INTERVAL 1 MINUTE, ?, 'replay', t FROM (SELECT ?::TIMESTAMP t)", [*row[:5], row[6], row[5]]))
    first, last = client.get("/predictions", params={"run_id": "r1"}).json()["predictions"]
    assert first["outcome"] == pytest.approx(bars["close"].iloc[105] / bars["open"].iloc[101] - 1)
    assert (first["state"], last["state"], last["outcome"]) == ("matured", "waiting", None)
    assert first["outcome_ts"] == "2024-01-01T01:46:00Z"


def test_many_readers_while_a_writer_commits(client, settings):
    "Six readers see each commit whole and soon, and none gets an error."
    batches, size = 20, 30
    stop = threading.Event()

    def collect() -> None:
        frame = minutes(600, "2024-03-01").assign(symbol="LIVE")
        with init_duckdb(settings) as con:
            for i in range(batches):
                put(con, frame.iloc[i * size : (i + 1) * size], source="replay")
                time.sleep(0.05)
        stop.set()

    def ask(_: int) -> list[int]:
        seen = []
        while not stop.is_set():
            answer = client.get("/bars", params={"symbol": "LIVE", "spec": "1m", "limit": 1000})
            assert answer.status_code in (200, 404), answer.text
            if answer.status_code == 200:
                seen.append(len(answer.json()["bars"]))
        return seen

    writer = threading.Thread(target=collect)
    writer.start()
    with ThreadPoolExecutor(6) as pool:
        seen = list(pool.map(ask, range(6)))
    writer.join()
    assert all(counts == sorted(counts) for counts in seen)
    assert {count % size for counts in seen for count in counts} == {0}
    assert len({count for counts in seen for count in counts}) > 3
    assert len(client.get("/bars", params={"symbol": "LIVE", "spec": "1m"}).json()["bars"]) == batches * size


def test_parameters_that_do_not_exist_are_refused_with_the_near_miss(client):
    for path, near in (("/bars?symbl=TESTUSD", "symbol"), ("/bars?symbol=TESTUSD&spec=1m&zone=UTC", "Leave it out"), ("/runs?limits=1", "none"), ("/predictions?run=r1", "run_id")):
        answer = client.get(path)
        assert answer.status_code == 422 and near in answer.json()["detail"], (path, answer.text)
    assert client.get("/bars?symbol=TESTUSD&spec=1m&limit=1&format=json").status_code == 200


def test_errors_are_problem_details_with_the_id_of_the_request(client):
    for path, status in (("/bars?symbol=NOPE", 404), ("/bars", 422), ("/nowhere", 404)):
        answer = client.get(path, headers={"X-Request-ID": "abc-1"})
        told = answer.json()
        assert answer.headers["content-type"] == "application/problem+json" and answer.headers["x-request-id"] == "abc-1"
        assert (told["status"], told["request_id"], told["instance"], told["detail"]) == (status, "abc-1", path.split("?")[0], told["message"])
    assert len({client.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"] for given in ("", "a b", "x" * 99)}) == 3


@pytest.mark.parametrize("form", ["csv", "arrow", "parquet"])
@pytest.mark.parametrize("path", ["/bars", "/features"])
def test_tables_hold_the_rows_of_the_json(client, path, form):
    import io

    import pyarrow as pa

    asked = {"symbol": "TESTUSD", "spec": "1m", "start": "2024-01-01T00:40:00Z", "limit": 20} | ({"names": "ret_1"} if path == "/features" else {})
    answer = client.get(path, params=asked | {"format": form})
    same = client.get(path, params=asked, headers={"Accept": answer.headers["content-type"].split(";")[0]})
    assert same.content == answer.content and answer.headers["x-next-start"] == "2024-01-01T01:00:00+00:00"
    read = {"csv": lambda b: pd.read_csv(b, float_precision="round_trip"), "arrow": lambda b: pa.ipc.open_stream(b).read_pandas(), "parquet": pd.read_parquet}[form]
    table, page = read(io.BytesIO(answer.content)), client.get(path, params=asked).json()
    want = pd.DataFrame(page["bars"] if path == "/bars" else [{"ts": r["ts"], **r["values"]} for r in page["rows"]])
    assert len(table) == 20 and pd.to_datetime(table["ts"], utc=True).tolist() == pd.to_datetime(want["ts"], utc=True).tolist()
    value = "close" if path == "/bars" else "ret_1"
    np.testing.assert_array_equal(table[value].astype(float), want[value].astype(float))


def test_only_tables_may_be_long(client):
    assert client.get("/bars?symbol=TESTUSD&spec=1m&limit=20000&format=arrow").status_code == 200
    assert "format=arrow" in client.get("/bars?symbol=TESTUSD&spec=1m&limit=20000").json()["detail"]


def test_a_repeated_request_is_answered_from_memory_until_the_store_changes(settings, monkeypatch):
    from cryptoresearch.serving import api

    calls = []
    plain = api.bars_page
    monkeypatch.setattr(api, "bars_page", lambda *a, **k: calls.append(1) or plain(*a, **k))
    asked = {"symbol": "KEPT", "spec": "1m", "limit": 5}
    with init_duckdb(settings) as con, served(settings) as client:
        put(con, minutes(600).assign(symbol="KEPT"))
        time.sleep(0.15)
        first, again = client.get("/bars", params=asked), client.get("/bars", params=asked)
        assert len(calls) == 1 and again.content == first.content and first.headers["content-encoding"] == "gzip"
        assert client.get("/bars", params=asked, headers={"If-None-Match": first.headers["etag"]}).status_code == 304
        assert client.get("/bars", params=asked, headers={"Host": "evil.example"}).status_code == 421
        put(con, minutes(600, "2024-02-01").assign(symbol="KEPT"))
        changed = client.get("/bars", params=asked, headers={"If-None-Match": first.headers["etag"]})
        assert changed.status_code == 200 and changed.json()["bars"][-1]["ts"] == "2024-02-01T09:59:00Z" and len(calls) == 2


def test_health_is_answered_while_many_clients_wait(settings, monkeypatch):
    from cryptoresearch.serving import api

    page = minutes(60).iloc[-1:]
    page.attrs["source"] = "simulated"
    begun, healthy = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        begun.set()
        healthy.wait(50)
        return page, None

    monkeypatch.setattr(api, "bars_page", slow)
    with served(settings) as client, ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(client.get, "/bars", params={"symbol": "TESTUSD", "spec": "1m", "limit": 1 + k}) for k in range(60)]
        assert begun.wait(50)
        time.sleep(0.5)  # more than the threads that the server has for all of them
        assert client.get("/health").status_code == 200
        assert not any(future.done() for future in asked)
        healthy.set()
        assert {future.result().status_code for future in asked} == {200}


def test_the_stretches_of_the_store_and_the_scores_of_a_run_are_served(client, settings):
    import json

    folder = settings.path(settings.runs_dir) / "r-scored"
    folder.mkdir(parents=True)
    record = {"level": "none", "verdict": "No skill.", "baseline": "zero", "scores": {"model": {"ic": 0.1, "dm_p": None}, "zero": {"ic": None}}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert client.get("/runs/r-scored/scores").json() == record | {"run_id": "r-scored"}
    (folder / "run.json").write_text("{", encoding="utf-8")
    assert client.get("/runs/r-scored/scores").status_code == 404
    (folder / "run.json").unlink()
    assert client.get("/coverage").json() == [] and client.get("/coverage?symbol=TESTUSD").json() == []


def test_examples_fit_their_schemas(client):
    from jsonschema import Draft202012Validator

    api, seen = client.get("/openapi.json").json(), 0
    for methods in api["paths"].values():
        for what in methods.values():
            for p in what.get("parameters", []):
                for example in p["schema"].get("examples", []):
                    Draft202012Validator(p["schema"] | {"components": api["components"]}).validate(example)
            for media in what["responses"]["200"]["content"].values():
                if "example" in media:
                    seen += 1
                    Draft202012Validator(media["schema"] | {"components": api["components"]}).validate(media["example"])
    assert seen >= 8
    assert {media for methods in api["paths"].values() for what in methods.values() for code, r in what["responses"].items() if code >= "400" for media in r["content"]} == {"application/problem+json"}


def test_keys_are_needed_where_there_are_any_and_kept_as_digests(settings):
    from cryptoresearch.serving.access import new_key

    (one, first), (two, second) = new_key(), new_key()
    asked = {"symbol": "TESTUSD", "spec": "1m", "limit": 5}
    with served(settings.model_copy(update={"api_keys": f"{first}, {second}"})) as client:
        for path in ("/health", "/", "/openapi.json"):
            assert client.get(path).status_code == 200
        for key in (one, two):
            assert client.get("/bars", params=asked, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for headers in ({}, {"Authorization": f"Bearer {first}"}, {"Authorization": "Bearer"}, {"Authorization": one}, {"Authorization": b"Bearer \xe9"}):
            answer = client.get("/bars", params=asked, headers=headers)  # the response is in memory now
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), headers
            assert answer.json()["request_id"] == answer.headers["x-request-id"] and "API_KEYS" in answer.json()["detail"]


def test_no_server_for_other_machines_without_a_key(settings):
    from cryptoresearch.errors import ConfigError
    from cryptoresearch.serving.access import new_key

    for host in ("0.0.0.0", "::", "10.0.0.7", "desk.example"):
        with pytest.raises(ConfigError, match="cryptoresearch api --new-key"):
            create_app(settings.model_copy(update={"api_host": host}))
        create_app(settings.model_copy(update={"api_host": host, "api_keys": new_key()[1]}))


def test_the_printed_key_opens_the_api(settings):
    import re

    from typer.testing import CliRunner

    from cryptoresearch.cli import app

    said = CliRunner().invoke(app, ["api", "--new-key"]).output
    key, digest = re.search(r"key, shown once: (\S+)", said).group(1), re.search(r"API_KEYS=(\w+)", said).group(1)
    with served(Settings(_env_file=None, **settings.model_dump(include={"duckdb_path", "runs_dir"}), api_keys=digest)) as client:
        assert [client.get("/symbols", headers={"Authorization": f"Bearer {k}"}).status_code for k in (key, digest)] == [200, 401]


def test_requests_beyond_the_rate_wait(settings):
    with served(settings.model_copy(update={"api_requests_per_minute": 5})) as client:
        answers = [client.get("/symbols") for _ in range(7)]
        assert [a.status_code for a in answers] == [200] * 5 + [429] * 2
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 13 and client.get("/health").status_code == 200


def test_pages_of_listed_origins_may_read(settings):
    with served(settings.model_copy(update={"api_origins": "https://charts.example, http://localhost:3000"})) as client:
        for origin, fine in (("https://charts.example", True), ("http://localhost:3000", True), ("https://evil.example", False), ("null", False)):
            for path in ("/symbols", "/bars?symbol=NOPE"):
                assert (client.get(path, headers={"Origin": origin}).headers.get("access-control-allow-origin") == origin) is fine
            asked = {"Origin": origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
            assert client.options("/symbols", headers=asked).is_success is fine
        assert "X-Next-Cursor" in client.get("/symbols", headers={"Origin": "https://charts.example"}).headers["access-control-expose-headers"]
    with served(settings) as client:
        assert "access-control-allow-origin" not in client.get("/symbols", headers={"Origin": "https://charts.example"}).headers


def test_unexpected_errors_have_an_id_and_no_details(settings, monkeypatch):
    from cryptoresearch.serving import api

    monkeypatch.setattr(api, "bars_page", lambda *a, **k: 1 / 0)
    with served(settings) as client:
        answer = client.get("/bars?symbol=TESTUSD", headers={"X-Request-ID": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"], answer.json()["request_id"]) == (500, "mine", "mine")
        assert answer.json()["detail"] == "ZeroDivisionError; the server's log has the details"


def test_compression_is_only_for_those_who_take_it(client):
    for accepted, packed in (("gzip", True), ("br, gzip;q=0.5", True), ("gzip;q=0", False), ("identity", False), ("gzip; q=0.000", False)):
        answer = client.get("/bars?symbol=TESTUSD&spec=1m&limit=50", headers={"Accept-Encoding": accepted})
        assert ("content-encoding" in answer.headers) is packed and len(answer.json()["bars"]) == 50, accepted


@pytest.mark.parametrize("target", ["return", "volatility", "direction", "scaled_return", "triple_barrier", "trend", "meta"])
def test_labels_equal_those_of_a_notebook_on_any_page(client, target):
    from cryptoresearch.labels.targets import make_labels

    page = client.get("/labels", params={"symbol": "TESTUSD", "spec": "1m", "target": target, "horizon": 10, "start": "2024-01-01T09:00:00Z", "limit": 20}).json()
    want = make_labels(minutes(600), target, 10).loc["2024-01-01T09:00":"2024-01-01T09:19"]
    np.testing.assert_allclose([np.nan if row["y"] is None else row["y"] for row in page["labels"]], want["y"], rtol=1e-9)
    assert [pd.Timestamp(row["end_ts"]) for row in page["labels"]] == want["end_ts"].tolist() and page["next_start"] == "2024-01-01T09:20:00Z"


def test_an_export_is_the_whole_in_order(client, settings):
    frame = minutes(600).drop(columns="symbol")
    for what, limit in (("bars", 250), ("features", 250)):
        asked, rows, pages = {"symbol": "TESTUSD", "spec": "1m", "what": what, "limit": limit, "names": "ret_1"}, [], 0
        while pages == 0 or asked["cursor"]:
            page = client.get("/export", params=asked).json()
            rows, pages, asked = rows + page["rows"], pages + 1, asked | {"cursor": page["next_cursor"]}
        assert pages == 3 and [row["ts"] for row in rows] == [t.strftime("%Y-%m-%dT%H:%M:%SZ") for t in frame.index], what
    for cursor, words in (("x", "next_cursor"), ("WyJhIiwgbnVsbCwgIjIwMjQtMDEtMDEiXQ", "another query"), ("%00", "next_cursor")):
        answer = client.get("/export", params={"symbol": "TESTUSD", "spec": "1m", "cursor": cursor})
        assert answer.status_code == 422 and words in answer.json()["detail"], answer.text


def test_a_source_that_appears_between_two_pages_changes_none(settings):
    with init_duckdb(settings) as con, served(settings) as client:
        put(con, minutes(600).assign(symbol="TWO"), source="replay")
        asked = {"symbol": "TWO", "spec": "1m", "limit": 400}
        first = client.get("/export", params=asked).json()
        put(con, minutes(600).assign(symbol="TWO"), source="trades")
        second = client.get("/export", params=asked | {"cursor": first["next_cursor"]}).json()
        assert (first["source"], second["source"], len(second["rows"])) == ("replay", "replay", 200) and second["snapshot"] > first["snapshot"]
        assert client.get("/export", params=asked).json()["source"] == "trades"


def test_kinds_of_models_are_listed_with_their_runs(client, settings):
    import json

    folder = settings.path(settings.runs_dir) / "r-model"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"model": "har"}}), encoding="utf-8")
    found = {m["name"]: m for m in client.get("/models").json()}
    assert {"xgboost", "lightgbm", "ridge", "har", "garch", "ensemble"} <= set(found) and all(m["description"] for m in found.values())
    assert (found["har"]["runs"], found["garch"]["runs"]) == (["r-model"], [])
    (folder / "run.json").unlink()


@pytest.fixture(scope="module")
def trained(settings):
    from cryptoresearch.runs.config import RunConfig
    from cryptoresearch.runs.run import train_run

    with init_duckdb(settings) as con:
        put(con, minutes(600).assign(symbol="RUNUSD"))
        config = RunConfig(symbol="RUNUSD", spec="1m", source="simulated", target="volatility", horizon=2, end="2024-01-01 08:00", test_start="2024-01-01 07:00", refit_every="30min", model="ridge", features=("ret_1", "rv_24"))
        return train_run(con, config, settings)


def given(frame: pd.DataFrame) -> list[dict]:
    rows = frame.reset_index()[["ts", "open", "high", "low", "close", "volume"]].astype({"ts": str})
    return [{k: None if v != v else v for k, v in row.items()} for row in rows.to_dict("records")]


@pytest.mark.slow
def test_a_run_forecasts_the_bars_of_a_client(client, settings, trained):
    bars = minutes(600).assign(symbol="RUNUSD").tail(trained.warmup + 5)
    want = trained.predict(bars)
    ask = lambda rows, run=trained.id: client.post("/predict", json={"run_id": run, "bars": rows})
    for rows in (given(bars), given(bars.drop(index=bars.index[1]))[::-1]):  # a hole before the warm-up; any order
        got = ask(rows).json()
        assert [f["prediction"] for f in got["forecasts"]][-4:] == want["prediction"].tolist()[-4:]
    assert (got["warmup"], got["horizon"], pd.Timestamp(got["forecasts"][-1]["known_ts"])) == (trained.warmup, 2, want["known_ts"].iloc[-1])
    short = ask(given(bars.tail(trained.warmup - 1)))
    assert short.status_code == 422 and str(trained.warmup) in short.json()["detail"]
    assert len(ask(given(bars.tail(trained.warmup))).json()["forecasts"]) == 1
    far = given(bars) + given(bars.tail(1).shift(freq="4000D"))
    odd = [given(bars)[:1] * 30, far, [], [{"ts": "soon"}], [given(bars)[0] | {"ts": "1800-01-01"}], [row | {"close": -1} for row in given(bars)], [row | {"high": 1} for row in given(bars)]]
    for rows in odd:
        answer = ask(rows)
        assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json", answer.text
    assert ask(given(bars), "none").status_code == 404
    assert client.post("/predict", content=b"{", headers={"Content-Type": "application/json"}).status_code == 422
    assert client.post("/predict", content=b" " * 16_000_001).status_code == 413


@pytest.mark.slow
def test_a_changed_run_says_so_and_one_trained_again_is_read_again(client, settings, trained):
    import json
    import os

    bars, file = given(minutes(600).tail(trained.warmup)), trained.folder / "run.json"
    assert client.post("/predict", json={"run_id": trained.id, "bars": bars}).status_code == 200
    model, kept = trained.folder / "model.json", (trained.folder / "model.json").read_bytes()
    model.write_bytes(kept + b" ")
    os.utime(file)
    assert client.post("/predict", json={"run_id": trained.id, "bars": bars}).status_code == 409
    model.write_bytes(kept)
    file.write_text(json.dumps(json.loads(file.read_text())))
    assert client.post("/predict", json={"run_id": trained.id, "bars": bars}).status_code == 200


def test_features_that_are_named_in_full_are_described_too(client):
    page = client.get("/features", params={"symbol": "TESTUSD", "spec": "1m", "names": "ta:rsi(length=14),ret_1_lag_3", "limit": 2}).json()
    assert [f["name"] for f in page["features"]] == list(page["rows"][0]["values"]) == ["ta_rsi_length_14", "ret_1_lag_3"]
    assert all(f["warmup"] > 1 for f in page["features"])


def test_predictions_of_a_run_that_is_not_there_are_not_found(client):
    answer = client.get("/predictions", params={"run_id": "nope"})
    assert answer.status_code == 404 and "one run 'nope'" in answer.json()["detail"]


def test_a_body_that_is_too_long_too_deep_or_no_json_is_refused(client):
    for body, status in ((b"[" * 200_000, 400), (b'{"run_id":"x","bars":' + b"[" * 100_000, 400), (b"\xff\xfe", 422), (b'{"run_id": NaN}', 422), (b"[" + b"1," * 9_000_000, 413)):
        answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), body[:20]
        assert answer.json()["request_id"] == answer.headers["x-request-id"] and len(answer.content) < 2000
    assert client.get("/health").status_code == 200


def test_lines_and_control_characters_of_a_client_reach_no_header(client):
    sent = "X\r\nSet-Cookie: a=1"
    for answer in (client.get(f"/nowhere/{quote(sent)}"), client.get("/bars", params={"symbol": sent})):
        assert "set-cookie" not in answer.headers and answer.status_code in (404, 422)
    for given in ("a" * 65, "a b", "<script>", "\x1b[2J", "a;b"):
        assert client.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"] != given
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: a\rSet-Cookie: a=1\r\n\r\n")
        assert b"400 Bad Request" in raw.recv(1000)


@pytest.mark.parametrize("path", ["/static/..%2f..%2fapi.py", "/static/%2e%2e/%2e%2e/api.py", "/static//etc/passwd", "/runs/..%2f..%2fcatalog.sqlite", "/runs/..%2f/scores"])
def test_no_path_leaves_its_folder(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "DuckLake" not in answer.text and "root:" not in answer.text and "import " not in answer.text


@pytest.mark.parametrize("name", ["ta:rsi(length=__import__('os').getpid())", "ta:os.system('x')", "ta:__class__", "ta:" + "(" * 500, "ret_1_lags_99999999", "ta:rsi(length=999999999)"])
def test_the_name_of_a_feature_runs_no_code(client, name, monkeypatch):
    import os

    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a command was run"))
    answer = client.get("/features", params={"symbol": "TESTUSD", "spec": "1m", "names": name})
    assert answer.status_code in (404, 422) and str(os.getpid()) not in answer.json()["detail"]


def test_a_key_is_in_no_log_and_in_no_answer(settings, caplog):
    from cryptoresearch.serving.access import new_key

    key, digest = new_key()
    caplog.set_level("DEBUG")
    with served(settings.model_copy(update={"api_keys": digest})) as client:
        for given in (key, key + "x"):
            for path in ("/symbols", "/bars?symbol=NOPE", "/nowhere"):
                answer = client.get(path, headers={"Authorization": f"Bearer {given}"})
                assert key not in answer.text and digest not in answer.text and key not in str(answer.headers)
    assert key not in caplog.text and digest not in repr(settings.model_copy(update={"api_keys": digest}))
