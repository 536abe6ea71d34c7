"""The cost of sha-256 where a client asks for it: CPU and rate, beside hashlib's own.

The same form with one file, to the same process, with and without ``Want-Repr-Digest``; hashlib
takes as many bytes, 256 KiB at a time, in the same round.
"""

import hashlib
import time
from functools import partial
from typing import Final

import requests

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench import report
from tests.bench.destination import KINDS as QUEUES
from tests.bench.destination import Destination
from tests.bench.load import Load, job_for, piece_of
from tests.bench.measure import Column, Runs, Target, spread
from tests.bench.meter import CORES, GIB, Meter
from tests.bench.systems import RELAY, Relay, System
from tests.bench.turns import Turn, take

HEADER: Final = "Want-Repr-Digest: sha-256=1"
WITH: Final = "relay, sha-256"
ALONE: Final = "hashlib"
BLOCK: Final = 256 * 1024

CPU_TARGET: Final = 1.15
"""Times hashlib's own: what the daemon spends more."""

RATE_TARGET: Final = 0.7
"""Of the rate without, given two cores."""


def hash_alone(size: int) -> dict[str, float]:
    """hashlib and nothing else, in this thread."""
    block = piece_of(text=False)[:BLOCK]
    digest = hashlib.sha256()
    began, cpu = time.perf_counter(), time.thread_time()
    for _ in range(size // BLOCK):
        digest.update(block)
    gib = size // BLOCK * BLOCK / GIB
    wall = time.perf_counter() - began
    return {"cpu": (time.thread_time() - cpu) / gib, "rate": 1024 * gib / wall}


def relayed(
    node: RabbitMQNode, load: Load, system: System, size: int, header: str
) -> dict[str, float]:
    """One upload."""
    with Meter(system.pids, node.pid) as meter:
        client = load.run(job_for(system, "file", size, header=header))
    gib = size / GIB
    return {"cpu": meter.cpu / gib, "rate": 1024 * gib / client.wall, **meter.cores(client.cpu)}


def check(system: System) -> None:
    """The digest is there if it is asked for, and only then: else this measures nothing."""
    host, port = system.address
    for headers, wanted in (({}, False), (dict([HEADER.split(": ")]), True)):
        files = {"f": ("x.bin", b"hello")}
        url = f"http://{host}:{port}{system.path}"
        receipt = requests.post(url, files=files, headers=headers, timeout=60).json()
        if ("sha-256" in receipt["parts"][0]["digest"]) is not wanted:
            raise SystemExit(f"not what was asked for: {receipt}")


def targets(runs: Runs) -> list[Target]:
    """What is promised of sha-256."""
    found = []
    for case in runs.cases():
        more = [
            (asked - plain) / alone
            for asked, plain, alone in zip(
                *(runs.values(case, system, "cpu") for system in (WITH, RELAY, ALONE)), strict=True
            )
        ]
        kept = spread(runs.ratios(case, WITH, "rate", [RELAY]))
        found += [
            Target(
                what=f"{case}: CPU more / hashlib's",
                measured=spread(more),
                bound=CPU_TARGET,
                at_most=True,
            ),
            Target(what=f"{case}: rate / without", measured=kept, bound=RATE_TARGET, at_most=False),
        ]
    return found


def main(argv: list[str]) -> int:
    """Print the tables. Exit code 1: a target was missed."""
    parser = report.parser_of("digest", __doc__)
    parser.add_argument("--queue", type=report.some_of(QUEUES), default=["none"])
    parser.add_argument("--gib", type=float, default=1.0, help="per run (default 1)")
    options = parser.parse_args(argv)
    size = round(options.gib * GIB)
    columns = [
        Column("CPU s/GiB", "cpu"),
        Column("/ hashlib", "cpu", bases=[ALONE]),
        Column("MiB/s", "rate", 0),
        Column("/ without", "rate", bases=[RELAY]),
        *CORES,
    ]
    with RabbitMQNode() as node, Load() as load:
        result = report.Report(
            "digest", options, columns, report.versions(node), Column("CPU s/GiB", "cpu")
        )
        for queue in options.queue:
            destination = Destination(node, queue)
            destination.renew()
            with Relay(node.url, destination.exchange, destination.routing_key) as system:
                check(system)
                upload = partial(relayed, node, load, system, size)
                upload("")  # warm
                case = [f"{queue}, one upload"]
                turns = [
                    Turn(ALONE, case, partial(hash_alone, size)),
                    Turn(RELAY, case, partial(upload, "")),
                    Turn(WITH, case, partial(upload, HEADER)),
                ]
                take(turns, destination, result)
    return result.finish(targets(result.runs))
