"""Forms of 1 KiB over 16 connections that stay: requests per second, and CPU for each.

wrk (https://github.com/wg/wrk) is the client, with one thread: how busy it was is told, so that it
can be seen not to be the limit. relay and its peers take turns.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench import report, rivals
from tests.bench.destination import KINDS as QUEUES
from tests.bench.destination import Destination
from tests.bench.load import form_around, piece_of
from tests.bench.measure import Column, Runs, Target, spread
from tests.bench.meter import CORES, Meter
from tests.bench.systems import RELAY, System, relays, running
from tests.bench.turns import Turn, take

SCRIPT: Final = Path(__file__).with_name("small.lua")
SIZE: Final = 1024
WARM: Final = 1.0
"""Seconds of the same, before the first round."""

TARGETS: Final = {"aiohttp": 2.5, "node": 0.5}
"""Times the requests per second of those."""


class Client:
    """wrk, with so many connections, for so many seconds."""

    def __init__(self, node: RabbitMQNode, directory: Path, connections: int) -> None:
        self._node = node
        self._connections = connections
        self._content_type, before, after = form_around("file")
        self._body = directory / "body"
        self._body.write_bytes(before + piece_of(text=False)[:SIZE] + after)

    def run(self, system: System, seconds: float) -> dict[str, float]:
        """One run; a request that fails ends the bench."""
        host, port = system.address
        command = ["wrk", "--threads", "1", "--connections", str(self._connections)]
        command += ["--duration", f"{seconds:g}s", "--timeout", "60s", "--script", str(SCRIPT)]
        command += ["--latency", f"http://{host}:{port}{system.path}", "--"]
        command += [self._content_type, str(self._body)]
        with tempfile.TemporaryFile("w+") as said, Meter(system.pids, self._node.pid) as meter:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            text = said.read()
        if process.returncode:
            raise SystemExit(f"wrk failed:\n{text}")
        told = json.loads(text.splitlines()[-1])
        if told["failed"] or not told["requests"]:
            raise SystemExit(f"requests failed:\n{text}")
        return {
            "rate": told["requests"] / told["seconds"],
            "cpu": 1e6 * meter.cpu / told["requests"],
            "p50": told["p50"],
            "p99": told["p99"],
            **meter.cores(usage.ru_utime + usage.ru_stime),
        }


def targets(runs: Runs) -> list[Target]:
    """What is promised of small uploads."""
    return [
        Target(
            what=f"{case}: requests/s / {peer}",
            measured=spread(runs.ratios(case, RELAY, "rate", [peer])),
            bound=bound,
            at_most=False,
        )
        for case in runs.cases()
        for peer, bound in TARGETS.items()
    ]


def columns(others: Sequence[str]) -> list[Column]:
    """Of the table."""
    return [
        Column("requests/s", "rate", 0),
        *(Column(f"/ {peer}", "rate", bases=[peer]) for peer in TARGETS if peer in others),
        Column("µs CPU each", "cpu", 0),
        Column("p50 ms", "p50", brief=True),
        Column("p99 ms", "p99", brief=True),
        *CORES,
    ]


def main(argv: list[str]) -> int:
    """Print the tables. Exit code 1: a target was missed; 2: there is no wrk."""
    parser = report.parser_of("small", __doc__)
    add = parser.add_argument
    add("--queue", type=report.some_of(QUEUES), default=["none"])
    add("--seconds", type=float, default=4.0, help="of each run (default 4; whole ones)")
    add("--connections", type=int, default=16, help="default 16")
    add("--processes", type=report.numbers, default=[1], help="of relay: 1 (default), 2, or 1,2")
    rivals.add_option(parser)
    options = parser.parse_args(argv)
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed (Debian: apt install wrk)")
    beside = rivals.chosen(options.peers)
    starts = {**relays(options.processes), **beside.starts}
    with RabbitMQNode() as node, tempfile.TemporaryDirectory(prefix="relay-bench-") as directory:
        rivals.check(beside, node.url)
        result = report.Report(
            "small",
            options,
            columns(list(beside.starts)),
            {**report.versions(node), "wrk": report.package_version("wrk")},
            Column("requests/s", "rate", 0),
            notes=dict(beside.missing),
        )
        client = Client(node, Path(directory), options.connections)
        for queue in options.queue:
            destination = Destination(node, queue)
            destination.renew()
            where = destination.exchange, destination.routing_key
            with running(starts, node.url, *where) as systems:
                case = [f"{queue}, 1 KiB, {options.connections} connections"]
                for name, system in systems.items():
                    result.versions.setdefault(name, system.version)
                    client.run(system, WARM)
                turns = [
                    Turn(name, case, partial(client.run, system, options.seconds))
                    for name, system in systems.items()
                ]
                take(turns, destination, result)
    return result.finish(targets(result.runs))
