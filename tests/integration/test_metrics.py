"""What operators see of a real daemon and a real receiver: every figure moves, and is documented.

One daemon lives through most of what can happen to it; the tests look at what it showed meanwhile.
"""

import json
import re
import shutil
import subprocess
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from relay.errors import codes
from tests.integration.test_failures import Sender
from tests.private_node import must_be_installed
from tests.queue_reader import transfers_in
from tests.receiver_admin import admin_url
from tests.receiving import Receiver
from tests.uploading import RawConnection, content, request_head

ROOT: Final = Path(__file__).parents[2]
MIB: Final = 1 << 20
PARENT: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CONFIG: Final = """
[amqp]
window = "16 MiB"
reconnect_grace = "10 min"
blocked_grace = "10 min"

[routes.plain]
routing_key = "metrics.plain"
[routes.plain.queue]
name = "metrics.plain"
type = "classic"
arguments = {}

[routes.traced]
routing_key = "metrics.traced"
[routes.traced.queue]
name = "metrics.traced"
type = "classic"
arguments = {}

[routes.full]
routing_key = "metrics.full"
[routes.full.queue]
name = "metrics.full"
type = "classic"
arguments = { x-max-length = 3, x-overflow = "reject-publish" }

[routes.nowhere]
routing_key = "metrics.nowhere"
"""
FIXED: Final = {
    *("relay_build_info", "relay_uploads_limit", "relay_connections_limit"),
    *("relay_window_limit_bytes", "relay_memory_limit_bytes", "process_start_time_seconds"),
    "process_max_fds",
    "relay_connections_refused_total",  # which moves in test_crowds.py
    "relay_tls_handshakes_failed_total",  # in test_auth.py
}
"""Metrics that have one value for as long as the process lives, in these tests."""

Labels = frozenset[tuple[str, str]]
Samples = Mapping[tuple[str, Labels], float]


def scrape(url: str) -> Samples:
    """Every sample of ``/metrics`` by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(get(url, "/metrics"))
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def get(url: str, path: str) -> str:
    with urllib.request.urlopen(url + path, timeout=10) as response:  # noqa: S310
        text: str = response.read().decode()
    return text


@dataclass
class Life:
    """What a daemon showed: scrapes and status documents by when, and its log."""

    scrapes: dict[str, Samples] = field(default_factory=dict)
    statuses: dict[str, Any] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    traced: Any = None

    def look(self, when: str, daemon: Daemon) -> None:
        self.scrapes[when] = scrape(daemon.admin_url)
        self.statuses[when] = json.loads(get(daemon.admin_url, "/status"))
        self.pages[when] = get(daemon.admin_url, "/")

    def value(self, when: str, name: str, **labels: str) -> float:
        return self.scrapes[when][name, frozenset(labels.items())]

    def grown(self, name: str, **labels: str) -> float:
        return self.value("end", name, **labels) - self.value("start", name, **labels)


@contextmanager
def private_node() -> Iterator[RabbitMQNode]:
    with must_be_installed():
        node = RabbitMQNode()
    with node:
        yield node


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    life = Life()
    directory = tmp_path_factory.mktemp("daemon")
    with private_node() as node, Daemon(node.url, CONFIG, directory=directory) as daemon:
        life.look("start", daemon)
        _requests(daemon)
        _alarm(node, daemon, life)
        _loss(node, daemon, life)
        life.look("end", daemon)
        (life.traced,) = transfers_in(node.url, "metrics.traced", ended=1).values()
        assert daemon.stop() == 0
        life.log = daemon.log
    return life


def _requests(daemon: Daemon) -> None:
    """What ends well, and what a client or a queue is to blame for."""
    trace = {"traceparent": PARENT, "tracestate": "vendor=value"}
    for headers, path, status in (
        (trace | {"Idempotency-Key": "metrics"}, "traced/a", 201),
        ({"Idempotency-Key": "metrics"}, "traced/a", 201),
        ({}, "nowhere/a", 502),
        ({}, "full/a", 507),
        *(({}, f"unknown-{number}/a", 404) for number in range(3)),
    ):
        url = f"{daemon.url}/upload/{path}"
        assert requests.put(url, content(MIB), headers=headers, timeout=60).status_code == status
    for _ in range(5):
        with RawConnection(daemon.address) as connection:
            connection.send(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n")
            assert connection.answer().status == 400


def _alarm(node: RabbitMQNode, daemon: Daemon, life: Life) -> None:
    blocked = 'relay_broker_connection_state{connection="0",state="blocked"}'
    node.ctl("set_vm_memory_high_watermark", "0.000001")
    try:
        with Sender(daemon, MIB) as sender:
            daemon.wait_until(lambda: daemon.metric(blocked) == 1, "it is blocked")
            life.look("blocked", daemon)
            node.ctl("set_vm_memory_high_watermark", "0.4")
            assert sender.answer().status == 201
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.4")


def _loss(node: RabbitMQNode, daemon: Daemon, life: Life) -> None:
    """A broker that stands still, is lost, and comes back, under three uploads."""
    body = content(MIB)
    with ExitStack() as stack:
        clients = [stack.enter_context(RawConnection(daemon.address)) for _ in range(3)]
        for client in clients:
            client.send(request_head("/upload/plain", 32 * MIB) + body)
        daemon.wait_until(
            lambda: [upload["waits_for"] for upload in daemon.transfers()] == ["client"] * 3,
            "each has its channel",
        )
        node.suspend()
        stack.callback(node.resume)
        pool = stack.enter_context(ThreadPoolExecutor())
        for client in clients:
            pool.submit(client.send, body * 31)
        daemon.wait_until(lambda: daemon.metric("relay_window_waiting") > 0, "the window is full")
        life.look("held", daemon)
        node.kill()
        daemon.wait_until(lambda: daemon.metric("relay_broker_connections") == 0, "it is lost")
        daemon.wait_until(lambda: daemon.ready()[0] == 503, "it is not ready")
        life.look("lost", daemon)
        node.start()
        assert [client.answer().status for client in clients] == [201] * 3


@pytest.fixture(scope="module")
def receiver_samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What a receiver with commands shows."""
    options = ("--admin", "127.0.0.1:0", "--exec", "true")
    output = tmp_path_factory.mktemp("receiver") / "output"
    # Where no broker is it goes on trying; a queue that is missing would end it.
    receiver = Receiver("amqp://guest:guest@127.0.0.1:1/%2f", "any", output, *options)
    try:
        return scrape(admin_url(receiver))
    finally:
        receiver.close()


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


# --- the daemon ----------------------------------------------------------------------------------


def test_every_metric_moves(life: Life) -> None:
    values: dict[str, set[float]] = defaultdict(set)
    for samples in life.scrapes.values():
        sums: dict[str, float] = defaultdict(float)
        for (name, labels), value in samples.items():
            # Of states, one is always 1: which one it is tells.
            is_state = ("state", "up") in labels or "state" not in dict(labels)
            sums[name] += value * is_state
        for name, value in sums.items():
            values[name].add(value)
    assert {name for name, seen in values.items() if len(seen) == 1} == FIXED


def test_what_happened_is_what_was_counted(life: Life) -> None:
    def ended(route: str, outcome: str) -> float:
        return life.grown("relay_uploads_total", route=route, outcome=outcome)

    assert ended("traced", "committed") == ended("traced", "replayed") == 1
    assert ended("plain", "committed") == 4
    assert ended("nowhere", "unroutable") == ended("full", "queue-full") == 1
    assert life.value("end", "relay_uploads_total", route="", outcome="not-found") == 3
    assert life.value("end", "relay_uploads_total", route="", outcome="bad-request") == 5
    assert life.grown("relay_committed_bytes_total", route="plain") == 97 * MIB
    assert life.grown("relay_upload_bytes_total", route="plain") == 97 * MIB
    assert life.grown("relay_upload_frames_total", route="plain") == 3 * 257 + 9
    assert life.grown("relay_frames_nacked_total") >= 1
    assert life.grown("relay_frames_returned_total") >= 1
    assert life.grown("relay_frames_republished_total") >= 1
    assert life.grown("relay_broker_connects_total") == 1
    assert life.grown("relay_broker_failures_total") >= 1
    for reason in ("client", "window", "broker"):
        assert life.grown("relay_upload_wait_seconds_total", reason=reason) > 0


def test_what_goes_on_is_what_is_shown(life: Life) -> None:
    assert life.value("held", "relay_uploads_in_progress") == 3
    assert life.value("held", "relay_connections") == 3
    limit = life.value("held", "relay_window_limit_bytes")
    assert 7 / 8 * limit < life.value("held", "relay_window_bytes") <= limit
    assert life.value("held", "relay_write_queue_bytes") > 0
    assert life.value("end", "relay_window_bytes") == 0
    assert life.value("end", "relay_uploads_in_progress") == 0
    for when, up, state in (
        ("start", 1, "up"),
        ("blocked", 0, "blocked"),
        ("lost", 0, "down"),
        ("end", 1, "up"),
    ):
        assert life.value(when, "relay_broker_up") == up
        for other in ("up", "blocked", "down"):
            shown = life.value(when, "relay_broker_connection_state", connection="0", state=other)
            assert shown == (other == state)


def test_memory_is_under_its_ceiling_and_both_are_shown(life: Life) -> None:
    ceiling = life.value("held", "relay_memory_limit_bytes")
    assert 30 * MIB < life.value("held", "process_resident_memory_bytes") < ceiling
    assert life.statuses["held"]["memory"]["ceiling"] == ceiling


def test_labels_have_only_our_own_values(life: Life) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for _, labels in life.scrapes["end"]:
        for key, value in labels:
            found[key].add(value)
    del found["le"], found["version"], found["python"]
    assert found == {
        "route": {"", "default", "plain", "traced", "full", "nowhere"},
        "outcome": codes() | {"committed", "replayed"},
        "reason": {"client", "window", "broker"},
        "connection": {"0"},
        "state": {"up", "blocked", "down"},
    }


def test_status_tells_the_same(life: Life) -> None:
    held, lost, end = (life.statuses[when] for when in ("held", "lost", "end"))
    assert held["uploads"] == {"in_progress": 3, "limit": 256}
    assert held["window"]["size"] == 16 * MIB
    assert held["window"]["used"] > 14 * MIB
    assert held["window"]["waiting"] >= 1
    assert (held["ready"], lost["ready"], end["ready"]) == (True, False, True)
    assert lost["broker"][0]["state"] == "down"
    assert lost["broker"][0]["detail"]
    assert end["broker"][0]["broker"].startswith("127.0.0.1:")
    assert end["outcomes"]["committed"] == 5
    messages = [error["msg"] for error in end["errors"]]
    assert any(message.startswith("upload failed: no queue is bound") for message in messages)
    assert (
        "3 uploads" in re.sub("<[^>]*>", "", life.pages["held"])
        or ">3 of 256" in life.pages["held"]
    )


# --- its log -------------------------------------------------------------------------------------


def ends(life: Life, outcome: str) -> list[dict[str, str]]:
    return [line for line in map(parse, life.log) if line.get("outcome") == outcome]


def parse(line: str) -> dict[str, str]:
    """A line of logfmt."""
    found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "]*)', line)
    return {key: json.loads(text) if text.startswith('"') else text for key, text in found}


def test_each_upload_has_one_line_at_its_end(life: Life) -> None:
    committed = ends(life, "committed")
    assert len(committed) == 5
    assert len({line["transfer"] for line in committed}) == 5
    for line in committed:
        assert line["msg"] == "upload committed"
        assert line["level"] == "info"
        # The line has whole milliseconds, and small uploads take few of them.
        seconds = int(line["bytes"]) / float(line["rate"])
        assert seconds == pytest.approx(float(line["seconds"]), abs=0.002)
        assert float(line["waited"]) <= float(line["seconds"])
    held = [line for line in committed if line["bytes"] == str(32 * MIB)]
    assert [line["frames"] for line in held] == ["257"] * 3
    assert {line["waited_for"] for line in held} <= {"window", "broker"}
    for outcome, status in (("unroutable", "502"), ("queue-full", "507")):
        (line,) = ends(life, outcome)
        assert (line["level"], line["status"]) == ("warning", status)
        assert line["transfer"]


def test_what_strangers_repeat_is_told_once_with_a_count(life: Life) -> None:
    first, rest = ends(life, "bad-request")
    assert first["msg"] == rest["msg"] == "refused: the Host field is invalid"
    assert "repeated" not in first
    assert rest["repeated"] == "4"
    told = ends(life, "not-found")
    assert sum(int(line.get("repeated", "1")) for line in told) == 3
    assert not any("unknown-" in line for line in life.log)


def test_a_trace_goes_into_frames_and_log(life: Life) -> None:
    transfer = life.traced.transfer
    assert (transfer.traceparent, transfer.tracestate) == (PARENT, "vendor=value")
    traced = [line for line in map(parse, life.log) if line.get("trace") == PARENT[3:35]]
    assert [line["outcome"] for line in traced] == ["committed"]


# --- documents -----------------------------------------------------------------------------------


def test_every_metric_is_documented_and_every_documented_one_is_there(
    life: Life, receiver_samples: Samples
) -> None:
    readmes = [ROOT / "systemd" / "README.md", ROOT / "relay" / "receiver" / "README.md"]
    lines = [line for readme in readmes for line in readme.read_text().splitlines()]
    rows = [line for line in lines if line.startswith("| `")]
    documented, named = (
        set(re.findall(r"`((?:relay|process)_[a-z_]+)", "\n".join(text))) for text in (rows, lines)
    )
    there = {
        re.sub("_(bucket|sum|count)$", "", name)
        for name in names(life.scrapes["end"]) | names(receiver_samples)
    }
    assert there == documented
    assert named <= documented


def test_every_log_field_is_documented(life: Life) -> None:
    readme = (ROOT / "systemd" / "README.md").read_text()
    table = readme.partition("### Logs")[2].partition("\n### ")[0]
    documented = set(re.findall(r"`([a-z_]+)`", table))
    fields = {key for line in life.log for key in parse(line)}
    assert fields <= documented
    ending = {"transfer", "route", "peer", "outcome", "status", "bytes", "frames", "seconds"}
    assert ending | {"rate", "waited_for", "waited", "trace", "repeated"} <= fields


# --- dashboard and alerts ------------------------------------------------------------------------


def expressions(file: str) -> list[str]:
    text = (ROOT / "systemd" / file).read_text()
    if not file.endswith(".json"):
        return re.findall(r"^ *expr: (.*)$", text, re.MULTILINE)
    panels = json.loads(text)["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


@pytest.mark.parametrize(
    ("file", "least"), [("grafana-dashboard.json", 40), ("prometheus-alerts.yml", 15)]
)
def test_what_dashboard_and_alerts_look_at_is_there(
    file: str, least: int, life: Life, receiver_samples: Samples
) -> None:
    samples = [*life.scrapes["end"], *receiver_samples]
    found = expressions(file)
    assert len(found) >= least
    for expression in found:
        used = re.findall(r"\b((?:relay|process)_[a-z_]+)(?:\{([^}]*)\})?", expression)
        assert used, expression
        for name, matchers in used:
            assert name in {there for there, _ in samples}, expression
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                for one in [] if value.startswith("$") else value.split("|"):
                    assert any(
                        there == name and re.fullmatch(one, dict(labels).get(label, ""))
                        for there, labels in samples
                    ), f"{expression}: {label} is never {one}"


def test_the_dashboard_is_one_that_grafana_lays_out() -> None:
    dashboard = json.loads((ROOT / "systemd" / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_alerts_name_a_row_of_the_runbook() -> None:
    runbook = (ROOT / "systemd" / "README.md").read_text().partition("## Runbook")[2]
    rows = set(re.findall(r"^### (.*)$", runbook, re.MULTILINE))
    text = (ROOT / "systemd" / "prometheus-alerts.yml").read_text()
    named = [row for rows in re.findall(r'runbook: "(.*)"', text) for row in rows.split("; ")]
    assert len(named) >= text.count("alert:")
    assert {row.lower() for row in rows} >= set(named)


def test_prometheus_takes_the_rules_and_they_fire_when_they_should() -> None:
    """Needs promtool; what the rules look at is tested without it above."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus, 100 MB)")
    for what, file in (("check", "prometheus-alerts.yml"), ("test", "prometheus-alerts.test.yml")):
        done = subprocess.run(
            [promtool, what, "rules", file],
            cwd=ROOT / "systemd",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
