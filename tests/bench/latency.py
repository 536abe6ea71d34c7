"""How long forms of 1 KiB take, one at a time, alone and beside one upload of 10 GiB.

They are due at a fixed pace, and timed from when they are due: one that has to wait for the one
before it has waited (Tene's "coordinated omission"). Each system is measured idle and loaded right
after each other, and relay and its peers take turns.
"""

import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench import report, rivals
from tests.bench.destination import KINDS as QUEUES
from tests.bench.destination import Destination
from tests.bench.load import Upload, form_around, job_for, piece_of
from tests.bench.measure import Column, Runs, Target, percentile, spread
from tests.bench.meter import GIB, MIB
from tests.bench.systems import RELAY, System, relays, running
from tests.bench.turns import Turn, take

SIZE: Final = 1024
LARGE: Final = 10 * GIB
WARM: Final = 50
"""Uploads before the first round."""

LATE: Final = 3
"""Times the planned duration, after which the rest of a run is given up."""

PATIENCE: Final = 60.0
"""Seconds for an answer."""

TARGET: Final = 3.0
"""Times the idle 99th percentile."""

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class ProbeFailed(Exception):
    """A small upload was not answered as it should be; the text has what was said."""


@dataclass(frozen=True)
class Pace:
    """So many uploads, so many seconds apart."""

    count: int
    interval: float


class Probe:
    """A client with one connection that stays, and one upload of 1 KiB; a context manager."""

    def __init__(self, system: System) -> None:
        content_type, before, after = form_around("file")
        body = before + piece_of(text=False)[:SIZE] + after
        host, port = system.address
        head = (
            f"POST {system.path} HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self._socket = socket.create_connection(system.address, timeout=PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def ask(self) -> None:
        """Upload, and hear the answer to its end."""
        self._socket.sendall(self._request)
        answer = b""
        while not _is_whole(answer):
            data = self._socket.recv(65536)
            if not data:
                raise ProbeFailed(f"the connection ended: {answer.decode(errors='replace')}")
            answer += data
        if not answer.startswith(b"HTTP/1.1 2"):
            raise ProbeFailed(answer.decode(errors="replace"))

    def delays(self, pace: Pace) -> list[float]:
        """Seconds from when each upload was due to the end of its answer.

        Those that could not be sent in LATE times the time planned count with what they had waited
        until then: less than they would have.
        """
        began = time.perf_counter()
        dues = [began + number * pace.interval for number in range(pace.count)]
        end = began + LATE * pace.count * pace.interval
        delays = []
        for due in dues:
            now = time.perf_counter()
            if now < end:
                time.sleep(max(due - now, 0.0))
                self.ask()
            delays.append(time.perf_counter() - due)
        return delays


def _is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    if length := _LENGTH.search(head + b"\r\n"):
        return len(body) >= int(length[1])
    return body.endswith(b"0\r\n\r\n")


def measure(system: System, pace: Pace) -> dict[str, float]:
    """Idle, then beside a large upload; milliseconds, and the large one's MiB/s."""
    probe = Probe(system)
    try:
        idle = probe.delays(pace)
        with Upload(job_for(system, "file", LARGE)) as large:
            loaded = probe.delays(pace)
    finally:
        probe.close()
    figures = {
        f"{name}_p{percent}": 1000 * percentile(delays, percent)
        for name, delays in (("idle", idle), ("loaded", loaded))
        for percent in (50, 99)
    }
    ratio = figures["loaded_p99"] / figures["idle_p99"]
    return {**figures, "ratio": ratio, "large": large.rate / MIB}


def targets(runs: Runs) -> list[Target]:
    """What is promised of small uploads beside a large one."""
    return [
        Target(
            what=f"{case}: p99 beside a large upload / idle",
            measured=spread(runs.values(case, RELAY, "ratio")),
            bound=TARGET,
            at_most=True,
        )
        for case in runs.cases()
    ]


def columns(others: Sequence[str]) -> list[Column]:
    """Of the table."""
    return [
        Column("idle: p50 ms", "idle_p50"),
        Column("p99 ms", "idle_p99"),
        Column("loaded: p50 ms", "loaded_p50"),
        Column("p99 ms", "loaded_p99"),
        Column("p99 / best peer", "loaded_p99", bases=others, pick=min),
        Column("p99 / idle", "ratio"),
        Column("large: MiB/s", "large", 0),
    ]


def main(argv: list[str]) -> int:
    """Print the tables. Exit code 1: a target was missed."""
    parser = report.parser_of("latency", __doc__)
    add = parser.add_argument
    add("--queue", type=report.some_of(QUEUES), default=["none"])
    add("--seconds", type=float, default=4.0, help="idle, and again loaded, of a run (default 4)")
    add("--per-second", type=float, default=100.0, help="small uploads (default 100)")
    rivals.add_option(parser)
    options = parser.parse_args(argv)
    beside = rivals.chosen(options.peers)
    pace = Pace(round(options.seconds * options.per_second), 1 / options.per_second)
    with RabbitMQNode() as node:
        rivals.check(beside, node.url)
        result = report.Report(
            "latency",
            options,
            columns(list(beside.starts)),
            report.versions(node),
            Column("p99 ms beside a large upload", "loaded_p99"),
            notes=dict(beside.missing),
        )
        for queue in options.queue:
            destination = Destination(node, queue)
            destination.renew()
            where = destination.exchange, destination.routing_key
            with running({**relays([1]), **beside.starts}, node.url, *where) as systems:
                for name, system in systems.items():
                    result.versions.setdefault(name, system.version)
                    measure(system, Pace(WARM, pace.interval))
                turns = [
                    Turn(name, [f"{queue}, 1 KiB"], partial(measure, system, pace))
                    for name, system in systems.items()
                ]
                take(turns, destination, result)
    return result.finish(targets(result.runs))
