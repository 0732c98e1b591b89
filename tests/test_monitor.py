"Watching live predictions: limits and alerts, metrics, the dashboard and the unit of systemd."

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pandas as pd
import pytest

from cryptoresearch.errors import ConfigError, FeedError
from cryptoresearch.live.feed import FeedStats
from cryptoresearch.serving import monitor as module
from cryptoresearch.serving.live import LiveStats
from cryptoresearch.serving.monitor import exceeded, Limits, LiveMonitor, METRICS, serve_metrics, Watched
from cryptoresearch.serving.scoring import Parity

ROOT = Path(__file__).resolve().parent.parent
APART = Parity("run", "binance", 1440, 2e-6, 1e-3, 7, None, 0.0, 0, 0)


def session(**stats: Any) -> Any:
    "What a monitor needs of live predictions."
    feed = SimpleNamespace(stats=FeedStats(**stats), source="binance", con=None, settings=None)
    flow = SimpleNamespace(runs={"run": SimpleNamespace(config=SimpleNamespace(spec="1m"))})
    return SimpleNamespace(feed=feed, flows={("BTCUSDT", "1m"): flow}, stats=LiveStats(predictions=5, skipped={"gap": 2}, lag_s=0.1))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> LiveMonitor:
    "A monitor of one run, which the test describes itself."
    monkeypatch.setattr(module, "_look_at", lambda m, name: None)
    return LiveMonitor(session(trades=100, rejected=3, malformed=1, lag_s=0.5, silence_s={"BTCUSDT": 2.0}), every_s=3600)


@pytest.mark.parametrize(
    ("stats", "run", "kinds"),
    [
        ({"silence_s": {"A": 60.5, "B": 1.0}}, {}, ["silence"]),
        ({"lag_s": 10.5}, {}, ["lag"]),
        ({"lag_s": 9.5, "silence_s": {"A": 59.0}}, {"drift": 0.2}, []),
        ({}, {"drift": 0.3}, ["drift"]),
        ({}, {"drift": 0.6, "chance": 0.7}, []),  # as far as a day of hourly bars is without drift
        ({}, {"drift": 0.8, "chance": 0.7}, ["drift"]),
        ({}, {"parity": APART}, ["parity"]),
        ({}, {"parity": Parity("run", "binance", 10, 1e-10, 0.0, 0, None, 0.0, 0, 0)}, []),
        ({}, {"parity": Parity("run", "binance", 10, float("inf"), 0.0, 1, None, 0.0, 0, 0)}, ["parity"]),
        ({}, {"parity": Parity("run", "binance", 10, 0.0, 0.0, 0, None, 0.0, 2, 0)}, ["parity"]),
        ({}, {"parity": Parity("run", "binance", 0, float("nan"), 0.0, 0, None, 0.0, 0, 0)}, []),
        ({}, {"scores": SimpleNamespace(coverage_p=1e-4, coverage=0.6, level=0.9)}, ["coverage"]),
        ({}, {"scores": SimpleNamespace(coverage_p=float("nan"), coverage=float("nan"), level=0.9)}, []),
    ],
)
def test_each_limit_has_its_side(stats: dict[str, Any], run: dict[str, Any], kinds: list[str]) -> None:
    assert [kind for kind, _ in exceeded(FeedStats(**stats), {"run": Watched(**run)}, Limits())] == kinds


def test_an_alert_is_sent_once_and_once_more_when_it_is_over(watched: LiveMonitor, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(module, "send_alert", lambda url, alert: sent.append((url, alert.kind, alert.raised)))
    watched.alert_url = "https://hooks.example/SECRET"
    watched.look()
    watched.watched["run"] = Watched(parity=APART)
    watched.look()
    watched.look()
    watched.watched["run"] = Watched()
    watched.look()
    assert sent == [("https://hooks.example/SECRET", "parity", True), ("https://hooks.example/SECRET", "parity", False)]
    assert (watched.alerts, watched.looks) == (1, 4)
    assert "alert raised: parity of run: 7 predictions differ" in caplog.text and "alert over" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_webhook_that_fails_and_a_run_that_fails_do_not_end_the_monitor(
    watched: LiveMonitor, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setattr(module, "wait_exponential", lambda _: lambda state: 0.0)
    monkeypatch.setattr(module, "_look_at", lambda m, name: 1 / 0)
    watched.alert_url = "http://127.0.0.1:9/T0-SECRET"  # nothing listens there
    watched.watched["run"] = Watched(drift=0.9)
    watched.look()
    assert "ZeroDivisionError" in caplog.text and "an alert was not delivered" in caplog.text
    assert "127.0.0.1" in caplog.text and "SECRET" not in caplog.text
    with pytest.raises(FeedError, match=r"a webhook at 127\.0\.0\.1"):
        module.send_alert(watched.alert_url, module.Alert("drift", "run", True, "", pd.Timestamp(0, tz="UTC").to_pydatetime()), attempts=1)


def test_an_alert_goes_to_a_service_of_apprise_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, Any]] = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if len(taken) == 1 else 500)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, alert = f"json://127.0.0.1:{server.server_port}/SECRET", module.Alert("drift", "run", True, "too far", pd.Timestamp(0, tz="UTC").to_pydatetime())
    try:
        module.send_alert(module.check_alert_url(url), alert)
        with pytest.raises(FeedError, match="a service at json") as refused:
            module.send_alert(url, alert)
    finally:
        server.shutdown()
    assert (taken[0]["title"], taken[0]["message"]) == ("cryptoresearch: drift of run", "too far")
    assert "SECRET" not in str(refused.value)
    for wrong in ("nonsense://x", "hooks.example", "http://", ""):
        with pytest.raises(ConfigError, match="that Apprise knows"):
            module.check_alert_url(wrong)
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ConfigError, match=r"cryptoresearch\[alerts\]"):
        module.check_alert_url(url)


def test_the_page_has_the_numbers_and_leaves_out_what_is_unknown(watched: LiveMonitor) -> None:
    watched.watched["run"] = Watched(parity=APART)
    with serve_metrics(watched, 0) as page:
        with urlopen(f"http://127.0.0.1:{page.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        with pytest.raises(ConfigError, match="--metrics PORT"), serve_metrics(watched, page.port):
            pass
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("cryptoresearch_"))
    assert values["cryptoresearch_trades_total"] == "100.0" and values["cryptoresearch_refused_total"] == "4.0"
    assert values['cryptoresearch_skipped_bars_total{reason="gap"}'] == "2.0"
    assert values['cryptoresearch_parity{run="run"}'] == "2e-06" and values['cryptoresearch_silence_seconds{symbol="BTCUSDT"}'] == "2.0"
    assert not [name for name in values if "drift" in name or "coverage" in name]  # unknown, not zero
    assert {name.split("{")[0] for name in values} <= set(METRICS)


def test_the_dashboard_names_existing_metrics_and_shows_all() -> None:
    panels = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))["panels"]
    named = {name for panel in panels for target in panel["targets"] for name in re.findall(r"cryptoresearch_\w+", target["expr"])}
    assert named == set(METRICS)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit() -> None:
    unit = ROOT / "deploy" / "cryptoresearch-live.service"
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


def test_the_unit_starts_a_command_that_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer.main

    from cryptoresearch.cli import app

    monkeypatch.setattr("cryptoresearch.runs.stored.find_folder", str)  # the run of the unit is not stored here
    text = (ROOT / "deploy" / "cryptoresearch-live.service").read_text(encoding="utf-8")
    line = re.search(r"^ExecStart=.*/cryptoresearch (.*)$", text, re.MULTILINE)
    assert line is not None
    name, *args = line[1].split()
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # a group
    assert command.make_context(name, args).params["metrics"] == "9464"
