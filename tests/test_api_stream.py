"""Server-sent events of a real server and a growing store."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pandas as pd
import pytest

from cryptoresearch.data.store import write
from cryptoresearch.serving import api, stream
from cryptoresearch.serving.access import new_key
from cryptoresearch.settings import Settings
from test_api import free_port, minutes, put

ASKED = {"symbol": "TESTUSD", "spec": "1m"}
PREDICT = """INSERT INTO predictions (run_id, symbol, spec, target, horizon, ts, close_ts, prediction, source, made_at)
    SELECT ?, symbol, spec, 'return', 2, ts, close_ts, 0.001, source, close_ts FROM bars WHERE ts = ?"""


@pytest.fixture
def grown(con: Any) -> Any:
    "A store with ten bars."
    put(con, minutes(100).iloc[:10])
    return con


@contextmanager
def running(settings: Settings) -> Iterator[tuple[httpx.Client, stream.StreamServer, threading.Thread]]:
    server = api.make_server("127.0.0.1", port := free_port(), settings.model_copy(update={"log_level": "WARNING"}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while not server.started:
                time.sleep(0.01)
            yield http, server, thread
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def events(lines: Iterator[str], n: int) -> list[dict]:
    "Read n events as the standard says, comments left out."
    found, fields = [], {}
    while len(found) < n:
        line = next(lines)
        if not line and "data" in fields:
            found.append(fields | {"data": json.loads(fields["data"])})
            fields = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
    return found


def opens(found: list[dict]) -> list[str]:
    return [event["data"]["ts"] for event in found]


def stamps(frame: pd.DataFrame) -> list[str]:
    return frame.index.strftime("%Y-%m-%dT%H:%M:%SZ").tolist()


def test_bars_and_predictions_arrive_once_soon_and_in_order(settings, grown):
    frame = minutes(100)
    with running(settings) as (client, _, _), client.stream("GET", "/stream", params=ASKED) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["cache-control"] == "no-store"
        lines = answer.iter_lines()
        assert next(lines) == "retry: 1000"
        time.sleep(0.4)  # the first look is over
        for k in (10, 11, 15):
            put(grown, frame.iloc[k : k + (1 if k == 10 else 4)])
            begun = time.monotonic()
            [first, *_] = found = events(lines, 1 if k == 10 else 4)
            assert time.monotonic() - begun < 5  # 0.3 s, on a machine that may stop for a second
            assert opens(found) == stamps(frame.iloc[k : k + len(found)]) and {e["event"] for e in found} == {"bar"}
        page = client.get("/bars", params=ASKED | {"start": first["data"]["ts"], "limit": 1}).json()
        assert first["data"] == page["bars"][0] | {"symbol": "TESTUSD", "spec": "1m", "source": "simulated"}
        write(grown, lambda c: c.execute(PREDICT, ["late", frame.index[3]]))
        write(grown, lambda c: c.execute(PREDICT, ["b", frame.index[18]]))
        one, two = events(lines, 2)
        assert [(e["event"], e["data"]["run_id"], e["data"]["ts"]) for e in (one, two)] == [("prediction", r, t) for r, t in zip(("late", "b"), stamps(frame.iloc[[3, 18]]), strict=True)]
        [row] = client.get("/predictions", params={"start": two["data"]["ts"]}).json()["predictions"]
        assert two["data"] == {name: value for name, value in row.items() if name not in ("outcome", "outcome_ts", "state")}


def test_a_client_that_reconnects_misses_nothing_and_gets_nothing_twice(settings, grown):
    frame = minutes(100)
    with running(settings) as (client, _, _), client.stream("GET", "/stream", params=ASKED | {"start": "2024-01-01T00:04:00Z"}) as answer:
        first = events(answer.iter_lines(), 4)
    put(grown, frame.iloc[10:30])
    write(grown, lambda c: c.execute(PREDICT, ["a", frame.index[2]]))  # before the start: not asked for
    write(grown, lambda c: c.execute(PREDICT, ["a", frame.index[5]]))
    with running(settings) as (client, _, _):  # another process of the server
        for asked in (ASKED | {"start": "2024-01-01T00:04:00Z"}, ASKED):
            with client.stream("GET", "/stream", params=asked, headers={"Last-Event-ID": first[-1]["id"]}) as answer:
                rest = events(answer.iter_lines(), 23)
            assert opens(first) + opens(rest[:22]) == stamps(frame.iloc[4:30])
            assert [(e["event"], e["data"]["ts"]) for e in rest[22:]] == [("prediction", stamps(frame.iloc[[5 if "start" in asked else 2]])[0])]
        refused = client.get("/stream", params=ASKED, headers={"Last-Event-ID": "x"})
        assert refused.status_code == 422 and "Leave the header out" in refused.json()["detail"]


def test_a_stream_is_alive_without_events_and_ends_with_the_server(settings, grown, monkeypatch):
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.3)
    with running(settings) as (client, server, thread), client.stream("GET", "/stream", params=ASKED) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(5)] == ["retry: 1000", "", ": still here", "", ": still here"]
        server.should_exit = True
        assert set(lines) <= {"", ": still here"}  # a complete response: httpx raises for one that breaks off
        thread.join(10)
        assert not thread.is_alive()


def test_streams_are_limited_and_a_client_that_leaves_makes_room(settings, grown, monkeypatch):
    monkeypatch.setattr(api, "MAX_STREAMS", 2)
    with running(settings) as (client, server, _):
        with client.stream("GET", "/stream", params=ASKED) as one, client.stream("GET", "/stream", params=ASKED) as two:
            assert (one.status_code, two.status_code) == (200, 200)
            busy = client.get("/stream", params=ASKED)
            assert (busy.status_code, busy.json()["title"], busy.headers["retry-after"]) == (503, "TooBusy", "1")
        end = time.monotonic() + 20
        while server.streams.open and time.monotonic() < end:
            time.sleep(0.01)
        with client.stream("GET", "/stream", params=ASKED) as again:
            assert again.status_code == 200
        assert client.head("/stream", params=ASKED).headers["content-type"].startswith("text/event-stream")


def test_a_stream_of_nothing_is_refused(settings, grown):
    from fastapi.testclient import TestClient

    wrong = [
        ({"symbol": "NOPE"}, 404, "cryptoresearch ingest FILE"), (ASKED | {"spec": "5m"}, 404, "bars TESTUSD 5m"), (ASKED | {"source": "x"}, 404, "of source x"),
        (ASKED | {"run_id": "x"}, 404, "one run 'x'"), (ASKED | {"bars": "1m"}, 422, "bars"), ({}, 422, "symbol"), (ASKED | {"spec": "1M"}, 422, "bar length"),
    ]  # fmt: skip
    with TestClient(api.create_app(settings), base_url="http://127.0.0.1") as client:
        for asked, status, words in wrong:
            answer = client.get("/stream", params=asked)
            assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json") and words in answer.json()["detail"]


def test_a_stream_needs_a_key_where_others_do(settings, grown):
    key, digest = new_key()
    with running(settings.model_copy(update={"api_keys": digest})) as (client, _, _):
        assert client.get("/stream", params=ASKED).status_code == 401
        with client.stream("GET", "/stream", params=ASKED, headers={"Authorization": f"Bearer {key}"}) as answer:
            assert answer.status_code == 200


def test_many_streams_share_their_queries_and_a_still_store_costs_none(settings, grown, monkeypatch):
    calls: list[int] = []
    plain = stream.read_events
    monkeypatch.setattr(stream, "read_events", lambda *a: calls.append(1) or plain(*a))
    with running(settings) as (client, _, _), httpx.Client(base_url=client.base_url, timeout=60, limits=httpx.Limits(max_connections=50)) as many:
        opened = [many.send(many.build_request("GET", "/stream", params=ASKED), stream=True) for _ in range(8)]
        lines = [answer.iter_lines() for answer in opened]
        time.sleep(0.5)
        before = len(calls)
        time.sleep(0.5)
        assert len(calls) == before  # nothing was stored
        put(grown, minutes(100).iloc[10:12])
        assert [opens(events(each, 2)) for each in lines] == [stamps(minutes(100).iloc[10:12])] * 8
        time.sleep(0.6)
        assert len(calls) - before < 10, len(calls) - before  # of a young stamp and of the same one when it is settled
        for answer in opened:
            answer.close()


def test_event_bars_of_one_time_are_sent_each(con):
    frame = minutes(100).iloc[:4].assign(ts=pd.Timestamp("2024-01-01", tz="UTC")).set_index("ts")
    rows = frame.reset_index().assign(source="trades", kind="tick", spec="10", first_id=range(4))
    for name in ("ts", "close_ts"):
        rows[name] = rows[name].dt.tz_localize(None)
    asked = stream.Subscription("TESTUSD", "tick:10", "")
    names = ", ".join(c for c in rows if c in (*stream.BAR_COLUMNS, "symbol", "source", "kind", "spec", "first_id"))
    con.register("new_rows", rows)
    write(con, lambda c: c.execute(f"INSERT INTO bars ({names}) SELECT {names} FROM new_rows WHERE first_id < 2"))
    asked = stream.subscribe(con, asked)
    at = stream.first_position(con, asked)
    write(con, lambda c: c.execute(f"INSERT INTO bars ({names}) SELECT {names} FROM new_rows WHERE first_id >= 2"))
    found = stream.read_events(con, asked, at)
    assert [event.position.first_id for event in found] == [2, 3]


def test_events_name_the_fields_of_the_lists():
    assert set(stream.BAR_COLUMNS) == set(api.Bar.model_fields)
    assert set(stream.PREDICTION_COLUMNS) == set(api.Prediction.model_fields) - {"outcome", "outcome_ts", "state"}


def test_a_store_that_fails_ends_the_stream(settings, grown, monkeypatch, caplog):
    from cryptoresearch.errors import StoreBusy

    def fails(*_: object) -> None:
        raise StoreBusy("busy")

    monkeypatch.setattr(stream, "read_events", fails)
    with running(settings) as (client, _, _), client.stream("GET", "/stream", params=ASKED) as answer:
        assert [line for line in answer.iter_lines() if line] == ["retry: 1000"]
    assert "a stream ended: busy" in caplog.text


