"""Memory above base at its peak: one upload of 10 GiB, and a thousand slow ones at once.

Each measurement has a process of its own, warmed by two uploads of 64 MiB; base is what it has
then. Of several processes the peaks are added up. Slow ones send forms without end, 4 KiB every
0.25 s, all in step: they fill their frames at the same time, the worst for who gathers them.
"""

import resource
import select
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench import report, rivals
from tests.bench.destination import KINDS as QUEUES
from tests.bench.destination import Destination
from tests.bench.load import Load, job_for, piece_of
from tests.bench.measure import Column, Target, spread
from tests.bench.meter import GIB, MIB
from tests.bench.systems import RELAY, Start, System, forget_peak, peak_of, relays, resident_of
from tests.bench.turns import Turn, take
from tests.uploading import memory_ceiling

WARM: Final = 64 * MIB
PIECE: Final = 4096
INTERVAL: Final = 0.25
"""Seconds between two pieces of a slow upload."""

REST: Final = 1.0
"""Seconds in which a process that has been warmed may give back what it can."""

ONE_TARGET: Final = 16.0
SLOW_TARGET: Final = 192.0
"""MiB above base."""


def slow_uploads(system: System, count: int, seconds: float) -> None:
    """So many at once, for so long; then their clients go away.

    Raises:
        SystemExit: one was answered or dropped: they were not all there.
    """
    job = job_for(system, "file", GIB)
    piece = piece_of(text=False)[:PIECE]
    clients = []
    try:
        for _ in range(count):
            clients.append(socket.create_connection(system.address, timeout=60))
            clients[-1].sendall(job.before)
        began = time.perf_counter()
        for number in range(round(seconds / INTERVAL)):
            time.sleep(max(began + number * INTERVAL - time.perf_counter(), 0.0))
            for client in clients:
                client.sendall(piece)
        _check_open(clients)
    finally:
        for client in clients:
            client.close()


def _check_open(clients: Sequence[socket.socket]) -> None:
    poll = select.poll()
    for client in clients:
        poll.register(client, select.POLLIN)
    if answered := poll.poll(0):
        raise SystemExit(f"{len(answered)} of {len(clients)} slow uploads were not wanted")


class Bench:
    """What both measurements have in common."""

    def __init__(self, destination: Destination, load: Load, result: report.Report) -> None:
        self._destination = destination
        self._load = load
        self._report = result

    def measure(
        self, name: str, start: Start, work: Callable[[System], object]
    ) -> dict[str, float]:
        """The memory that some work takes a new process; MiB."""
        where = self._destination.exchange, self._destination.routing_key
        with start(self._destination.node.url, *where) as system:
            self._report.versions.setdefault(name, system.version)
            cold = resident_of(system.pids)
            self._load.run(job_for(system, "file", WARM, uploads=2))
            time.sleep(REST)
            base = resident_of(system.pids)
            forget_peak(system.pids)
            began = time.perf_counter()
            work(system)
            wall = time.perf_counter() - began
            peak = peak_of(system.pids)
        return {
            "cold": cold / MIB,
            "base": base / MIB,
            "peak": peak / MIB,
            "above": (peak - base) / MIB,
            "above_cold": (peak - cold) / MIB,
            "wall": wall,
        }

    def one(self, size: int, system: System) -> None:
        """One upload."""
        self._load.run(job_for(system, "file", size))


def targets(result: report.Report, cases: tuple[str, str]) -> list[Target]:
    """What is promised of memory."""
    one, slow = (spread(result.runs.values(case, RELAY, "above")) for case in cases)
    count = result.options.slow
    formula = memory_ceiling(0, connections=count, uploads=count) / MIB
    bounds = ((cases[0], one, ONE_TARGET), (cases[1], slow, SLOW_TARGET), (cases[1], slow, formula))
    return [
        Target(
            what=f"{case}: MiB above base" + ", by the formula" * (bound == formula),
            measured=measured,
            bound=round(bound, 1),
            at_most=True,
            digits=1,
        )
        for case, measured, bound in bounds
    ]


def columns(others: Sequence[str]) -> list[Column]:
    """Of the table."""
    return [
        Column("idle MiB", "cold", 1, brief=True),
        Column("base MiB", "base", 1),
        Column("peak MiB", "peak", 1),
        Column("above base", "above", 1),
        Column("above idle", "above_cold", 1),
        Column("peak / best peer", "peak", bases=others, pick=min),
        Column("s", "wall", 1, brief=True),
    ]


def main(argv: list[str]) -> int:
    """Print the tables. Exit code 1: a target was missed."""
    parser = report.parser_of("memory", __doc__)
    add = parser.add_argument
    add("--queue", choices=QUEUES, default="none")
    add("--gib", type=float, default=10.0, help="of the one upload (default 10)")
    add("--slow", type=int, default=1000, help="slow uploads at once (default 1000)")
    add("--seconds", type=float, default=20.0, help="for which they go on (default 20)")
    rivals.add_option(parser)
    options = parser.parse_args(argv)
    # A file for each client, here and in what is started from here.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    beside = rivals.chosen(options.peers)
    cases = f"one upload of {options.gib:g} GiB", f"{options.slow} slow uploads"
    with RabbitMQNode() as node, Load() as load:
        rivals.check(beside, node.url)
        result = report.Report(
            "memory",
            options,
            columns(list(beside.starts)),
            report.versions(node),
            Column("MiB above base", "above", 1),
            notes=dict(beside.missing),
        )
        destination = Destination(node, options.queue)
        bench = Bench(destination, load, result)
        works = (
            partial(bench.one, round(options.gib * GIB)),
            partial(slow_uploads, count=options.slow, seconds=options.seconds),
        )
        turns = [
            Turn(name, [case], partial(bench.measure, name, start, work))
            for case, work in zip(cases, works, strict=True)
            for name, start in {**relays([1]), **beside.starts}.items()
        ]
        take(turns, destination, result)
    return result.finish(targets(result, cases))
