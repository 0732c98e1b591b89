"""The API under random requests, drawn from its own OpenAPI description: documented answers only, no error of the server."""

import json
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import given, HealthCheck, Phase, settings as options, strategies as st
from hypothesis.errors import Unsatisfiable
from jsonschema import Draft202012Validator, ValidationError
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from cryptoresearch.data.store import init_duckdb
from cryptoresearch.settings import Settings
from conftest import examples
from test_api import minutes, put, served

RUN = "run-1"
GARBAGE = st.text(max_size=60) | st.sampled_from(["", " ", "\0", "null", "NaN", "-1", "1e999", "9" * 30, "'; --", "%", "../..", "ÄÖ", "0001-01-01", "9999-12-31T23:59:59Z", "2024-01-01T00:00:00+99:00", "١", "\ud7ff", "a" * 500])
ACCEPTED = ["*/*", "text/csv", "application/json;q=0", ";,", "application/vnd.apache.parquet", "application/vnd.apache.arrow.stream"]
VALID = {
    "symbol": ["TESTUSD", "testusd"],
    "spec": ["1m"],
    "source": ["simulated"],
    "names": ["ret_1", "rsi_14,ret_1", "ta:rsi(length=14)", "ret_1_lag_3"],
    "target": ["return", "volatility", "direction", "scaled_return", "triple_barrier", "trend", "meta"],
    "run_id": [RUN, "run-null", "run-list", "run-odd", "run-nan"],
    "start": ["2024-01-01", "2024-01-01T01:00:00Z", "1900-01-01"],
    "end": ["2024-01-01T02:00:00Z", "2024-01-01T05:00:00.000001+01:00", "2200-12-31T23:59:59.999999Z"],
    "horizon": ["1", "5", "20", "10000"],
    "limit": ["1", "2", "50", "10000"],
}  # fmt: skip
ODD = {
    "symbol": ["NONE", "BINANCE:TESTUSD", "FTX:TESTUSD"],
    "spec": ["5m", "60s", "tick:10", "dollar:1e6", "1M", "tick:0", "dollar:nan", "9999999999h"],
    "source": ["trades", "klines"],
    "names": ["default", ",", "ta:supertrend()", "ret_1,ret_1"],
    "start": ["2024-01-01T23:00:00Z", "0", "1704067200", "0001-01-01", "9999-12-31T23:59:59Z", "2024-01-01T00:00:00+99:00", "2024-01-01T00:00:00.0000001Z"],
    "end": ["2023-01-01", "0001-01-01", "9999-12-31T23:59:59+00:01"],
    "horizon": ["0", "-1", "10001", "1.5"],
    "limit": ["0", "-1", "10001", "1000000", "1e3"],
    "cursor": ["WyJhIiwgbnVsbCwgIjIwMjQtMDEtMDEiXQ", "bnVsbA", "W10", "eyJhIjoxfQ"],
}  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("fuzz")
    settings = Settings(_env_file=None, duckdb_path=str(folder / "catalog.sqlite"), runs_dir=str(folder / "runs"), duckdb_threads=1)
    with init_duckdb(settings) as con:
        put(con, minutes(300))
    run = folder / "runs" / RUN
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"level": "none", "verdict": "No skill.", "scores": {"model": {"ic": 0.1}}, "config": {"model": "har"}}))
    for name, text in (("run-null", "null"), ("run-list", "[1]"), ("run-odd", '{"level": 1, "scores": {"model": [1]}, "config": [], "created_at": 5}'), ("run-nan", '{"scores": {"m": {"a": NaN}}}')):
        (folder / "runs" / name).mkdir()
        (folder / "runs" / name / "run.json").write_text(text)
    with served(settings) as http:
        yield http


def requests(api: dict) -> st.SearchStrategy[tuple]:
    "Draw an operation with parameters that fit, but for one of them at most."

    def of(case: tuple[str, dict]) -> st.SearchStrategy[tuple]:
        path, what = case
        place = {p["name"]: p for p in what.get("parameters", [])}

        def fits(p: dict) -> st.SearchStrategy[str | None]:
            enum = p["schema"].get("enum") or p["schema"].get("anyOf", [{}])[0].get("enum")
            value = st.sampled_from(VALID.get(p["name"]) or enum or [None])
            return value if p.get("required") else st.one_of(st.none(), value)

        wrong = st.sampled_from([*place, *(["zone"] if place else [])]).flatmap(lambda n: st.tuples(st.just(n), GARBAGE | st.sampled_from(ODD.get(n, [""])))) if place else st.none()
        headers = st.fixed_dictionaries({}, optional={"Accept": st.sampled_from(ACCEPTED), "If-None-Match": st.sampled_from(["*", '"x"', ","]), "X-Request-ID": st.sampled_from(["a", "\xe9", ""])})
        return st.tuples(st.just(path), st.fixed_dictionaries({n: fits(p) for n, p in place.items()}), st.one_of(st.none(), wrong), headers, st.just({n for n, p in place.items() if p["in"] == "path"}))

    return st.sampled_from([(path, methods["get"]) for path, methods in api["paths"].items() if "get" in methods]).flatmap(of)


def ask(client: httpx.Client, case: tuple) -> tuple[str, httpx.Response] | None:
    "Send a request; None where its path became another one."
    path, values, wrong, headers, in_path = case
    values = values | ({wrong[0]: wrong[1]} if wrong else {})
    parts = {n: v for n, v in values.items() if n in in_path}
    if any(v in ("", ".", "..") or "/" in v for v in parts.values()):
        return None
    url = path
    for name, value in parts.items():
        url = url.replace(f"{{{name}}}", quote(value, safe=""))
    query = {n: v for n, v in values.items() if n not in in_path and v is not None}
    return path, received(client, client.build_request("GET", url, params=query, headers={k: v.encode("latin-1") for k, v in headers.items()}))


def received(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    "Send a request; a stream of events, which has no end, is closed when it has begun."
    answer = client.send(request, stream=True)
    try:
        if not answer.headers["content-type"].startswith("text/event-stream"):
            answer.read()
        return answer
    finally:
        answer.close()


def check(api: dict, path: str, method: str, answer) -> None:
    "Compare an answer with the description."
    documented = api["paths"][path][method]["responses"]
    assert answer.status_code < 500, answer.text
    assert str(answer.status_code) in documented, (answer.status_code, answer.text)
    assert answer.headers["x-request-id"]
    media = answer.headers["content-type"].split(";")[0]
    content = documented[str(answer.status_code)]["content"]
    assert media in content, (media, list(content))
    if media.endswith("json"):
        schema = content[media]["schema"] | {"components": api["components"]}
        Draft202012Validator(schema).validate(json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))


@pytest.mark.slow
def test_random_requests_get_documented_answers(client: httpx.Client) -> None:
    api = client.get("/openapi.json").json()
    statuses: Counter[tuple[str, int]] = Counter()
    wrong: dict[tuple[str, int, str], str] = {}

    @options(max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(requests(api))
    def fuzz(case: tuple) -> None:
        try:
            asked = ask(client, case)
        except httpx.ReadError:  # the server closes the connection of an answer of 500
            asked = ask(client, case)
        if asked is not None:
            path, answer = asked
            statuses[path, answer.status_code] += 1
            try:
                check(api, path, "get", answer)
            except (AssertionError, ValidationError) as e:
                wrong.setdefault((path, answer.status_code, type(e).__name__), f"{answer.request.url} {case[3]}: {str(e)[:400]}")

    fuzz()
    assert not wrong, "\n\n".join(map(str, wrong.items()))  # all of them: without shrinking, which takes long
    needs_a_model = {"/runs/{run_id}/scores/live", "/runs/{run_id}/parity"}  # the records here have none
    assert {path for path, status in statuses if status == 200} | needs_a_model == {path for path, methods in api["paths"].items() if "get" in methods}
    assert {404, 422} <= {status for _, status in statuses}


CHECKS = [
    checks.not_a_server_error, *map(lambda name: getattr(openapi_checks, name), (
        "status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance", "negative_data_rejection",
    )),
]  # fmt: skip


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_schemathesis_finds_nothing(client: httpx.Client, mode: schemathesis.GenerationMode) -> None:
    "Requests that fit the description or not; whether a name of bars or of a run means anything, only the server can know."
    api = client.get("/openapi.json").json()
    del api["paths"]["/stream"]  # has no end
    wrong, done = [], Counter[str]()
    for found in schemathesis.openapi.from_dict(api).get_all_operations():
        operation = found.ok()

        @options(max_examples=examples(4, 60), derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(operation.as_strategy(generation_mode=mode))
        def fuzz(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=str(client.base_url), checks=CHECKS, timeout=90)

        try:
            fuzz()
        except Unsatisfiable:
            assert mode.is_negative, operation.label  # nothing can be wrong about a request without parameters, or with free text only
        except Exception as e:  # all of them, as above
            wrong.append(f"{operation.label}: {e}")
        done[operation.label] += 1
    assert not wrong, "\n\n".join(wrong)
    assert len(done) == sum(map(len, api["paths"].values()))


def test_zero_bytes_reach_no_query(client: httpx.Client) -> None:
    for path, query in (("/bars", {"symbol": "TEST\0USD"}), ("/predictions", {"run_id": "\0"}), ("/coverage", {"source": "a\0"}), ("/bars", {"symbol": "TESTUSD", "source": "\0"})):
        answer = client.get(path, params=query)
        assert answer.status_code == 422 and "zero byte" in answer.json()["detail"], (path, answer.text)


def test_methods_that_a_path_lacks_are_refused(client: httpx.Client) -> None:
    api = client.get("/openapi.json").json()
    for path, methods in api["paths"].items():
        for method in sorted({"get", "post", "put", "delete", "patch", "options"} - set(methods)):
            answer = client.request(method, path.replace("{run_id}", RUN))
            assert answer.status_code == 405 and answer.headers["allow"] and answer.headers["content-type"] == "application/problem+json", (method, path)
