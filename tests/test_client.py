"""The Python client against a real server."""

import ast
import importlib.util
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptoresearch import client as made, errors
from cryptoresearch.client import Client
from cryptoresearch.serving.access import new_key
from test_api import minutes, put, served

ASKED = ("TESTUSD", "1m")


@pytest.fixture
def stored(con, settings):
    put(con, minutes(300))
    return settings


def test_the_client_is_what_the_description_says(monkeypatch):
    spec = importlib.util.spec_from_file_location("write_client", "scripts/write_client.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["", "--check"])
    script.main()
    script.CLASS += "#"
    with pytest.raises(SystemExit, match="Run: python scripts"):
        script.main()


def test_tables_and_json_are_those_of_the_routes(stored):
    with served(stored) as http:
        client = Client(str(http.base_url))
        page = client.bars(*ASKED, start="2024-01-01T00:45:00", limit=20)
        want = minutes(300).iloc[45:65]
        pd.testing.assert_frame_equal(page[["open", "high", "low", "close"]], want[["open", "high", "low", "close"]], check_freq=False)
        assert page.attrs == {"source": "simulated", "snapshot": client.health()["snapshot"], "next_start": pd.Timestamp("2024-01-01T01:05", tz="UTC")}
        assert page["gap"].sum() == 3 and np.isnan(page["close"].iloc[6])
        again = client.bars(*ASKED, start=page.attrs["next_start"], end=pd.Timestamp("2024-01-01 01:07", tz="UTC"))
        assert again.index.tolist() == minutes(300).index[65:67].tolist() and "next_start" not in again.attrs
        assert list(client.features(*ASKED, names=["ret_1", "rsi_14"], limit=2)) == ["ret_1", "rsi_14", "known_ts"]
        assert client.labels(*ASKED, target="direction", horizon=5, limit=7)["y"].isna().sum() == 5
        assert "ts" in client.export(*ASKED[:1], "bars", "1m", limit=3) and client.predictions().empty
        assert [s["symbol"] for s in client.symbols()] == ["TESTUSD"] and client.runs() == [] and client.coverage() == []
        assert "python_info" in client.metrics() or "# HELP" in client.metrics()
        assert {"har", "garch"} <= {m["name"] for m in client.models()}
        assert [next(client.stream(*ASKED, start=page.index[k]))["data"]["close"] for k in (0, 1)] == page["close"].tolist()[:2]


def test_each_route_has_a_method():
    from cryptoresearch.serving.api import create_app
    from cryptoresearch.settings import Settings

    routes = create_app(Settings(_env_file=None)).openapi()["paths"]
    methods = {name for name, value in vars(Client).items() if callable(value) and not name.startswith("_")}
    assert len(methods) == sum(map(len, routes.values())) == 17
    literals = {node.value for node in ast.walk(ast.parse(Path(made.__file__).read_text(encoding="utf-8"))) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {path for path in routes if "{" not in path} <= literals


def test_errors_are_those_of_the_package(stored):
    with served(stored.model_copy(update={"api_requests_per_minute": 6})) as http:
        client = Client(str(http.base_url))
        for call, kind, words in (
            (lambda: client.bars("NOPE"), errors.DataNotFound, "bars NOPE 1h"),
            (lambda: client.bars(*ASKED, start="soon"), errors.ConfigError, "start"),
            (lambda: client.bars("TESTUSD", "1M"), errors.SchemaError, "bar length"),
            (lambda: client.run("x"), errors.DataNotFound, "one run 'x'"),
            (lambda: next(client.stream("NOPE")), errors.DataNotFound, "NOPE"),
            (lambda: client.predict("x", minutes(300).tail(2)), errors.DataNotFound, "x"),
            (client.symbols, errors.StoreBusy, "Try again in"),
        ):
            with pytest.raises(kind, match=words):
                call()
    with pytest.raises(errors.ConfigError, match="cryptoresearch api"):
        client.health()


@contextmanager
def answering(status: int, body: bytes, media: str) -> Iterator[str]:
    "A server that is none of ours."

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "body", "kind"), [(502, b"<html>", errors.FeedError), (404, b"[1]", errors.DataNotFound), (418, b"", errors.CryptoResearchError), (500, json.dumps({"title": "SystemExit", "detail": "odd"}).encode(), errors.CryptoResearchError)])
def test_what_another_server_says_is_typed_too(status, body, kind):
    with answering(status, body, "text/html") as url, pytest.raises(errors.CryptoResearchError) as raised:
        Client(url).health()
    assert type(raised.value) is kind


def test_the_key_opens_and_is_in_no_text(stored):
    key, digest = new_key()
    with served(stored.model_copy(update={"api_keys": digest})) as http:
        assert Client(str(http.base_url), key).symbols()
        with pytest.raises(errors.ConfigError, match="API_KEYS"):
            Client(str(http.base_url)).symbols()
    client = Client(f"http://user:{key}@127.0.0.1:9", key)
    assert key not in repr(client) + str(client) + repr(vars(client)) + repr(client.http.headers)
    with pytest.raises(errors.ConfigError) as raised:
        client.symbols()
    assert key not in str(raised.value)
    for wrong in (f"{key}\n", f"{key} x", ""):
        with pytest.raises(errors.ConfigError) as raised:
            Client("http://127.0.0.1:9", wrong)
        assert key not in str(raised.value) and raised.value.__cause__ is None
    with pytest.raises(Exception):  # noqa: B017  (a connection is not pickled, and the key with it)
        pickle.dumps(client)


@pytest.mark.slow
def test_a_run_forecasts_a_frame(stored, con):
    from cryptoresearch.runs.config import RunConfig
    from cryptoresearch.runs.run import train_run

    config = RunConfig(symbol="TESTUSD", spec="1m", source="simulated", target="volatility", horizon=2, test_start="2024-01-01 04:30", refit_every="30min", model="ridge", features=("ret_1", "rv_24"))
    run = train_run(con, config, stored)
    with served(stored) as http:
        client = Client(str(http.base_url))
        bars = client.bars(*ASKED, limit=run.warmup + 3)
        found = client.predict(run.id, bars)
    assert [f["prediction"] for f in found["forecasts"]] == run.predict(minutes(300).tail(run.warmup + 3))["prediction"].tolist()[-len(found["forecasts"]) :]
