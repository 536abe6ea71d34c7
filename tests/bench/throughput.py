"""CPU and rate of uploads as large as you like: relay between its floor, its ceiling and others.

The floor is a bare recv_into/sendall pump; the ceiling is pika publishing the same frames from
memory to the same queue. All take turns, in another order each round, and every ratio is taken
within a round. A queue is deleted and declared again before each run.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Final

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench import report, rivals
from tests.bench.destination import KINDS as QUEUES
from tests.bench.destination import Destination
from tests.bench.load import KINDS, Job, Load, job_for
from tests.bench.measure import Column, Spread, Target, spread
from tests.bench.meter import CORES, GIB, MIB, Meter
from tests.bench.peers import ceiling
from tests.bench.pump import Pump
from tests.bench.systems import RELAY, RELAY_TWICE, Start, System, relays, running
from tests.bench.turns import Turn, take

FLOOR: Final = "pump"
CEILING: Final = "pika, from memory"
WARM: Final = 256 * MIB

CPU_TARGETS: Final = {1: 2.4, 16: 2.7}
"""Times the floor, by uploads at once: a form to an exchange without bindings."""

RATE_TARGET: Final = 0.9
"""Of the ceiling, to a quorum queue and to a stream."""

PEERS_TARGET: Final = 1.3
"""Times the best of the others."""

TWICE_TARGET: Final = 1.7
"""Times one process, where the broker is not the limit."""


@dataclass(frozen=True)
class Shape:
    """What is uploaded: a kind of body, so many at once."""

    kind: str
    uploads: int

    def case(self, queue: str) -> str:
        """What the table is called."""
        return f"{queue}, {self.kind}, {self.uploads} at once"


class Bench:
    """One broker, one client, and the systems of one destination after the other."""

    def __init__(
        self, node: RabbitMQNode, load: Load, options: argparse.Namespace, result: report.Report
    ) -> None:
        self._node = node
        self._load = load
        self._options = options
        self._report = result
        self._size = round(options.gib * GIB)
        self._shapes = [Shape(*each) for each in product(options.kind, options.uploads)]

    def measure(self, queue: str, starts: Mapping[str, Start], pump: Pump) -> None:
        """All rounds to one destination."""
        destination = Destination(self._node, queue)
        destination.renew()
        where = destination.exchange, destination.routing_key
        with running(starts, self._node.url, *where) as systems:
            for name, system in systems.items():
                self._report.versions.setdefault(name, system.version)
                self._load.run(job_for(system, "file", min(WARM, self._size)))
            take(list(self._turns(destination, systems, pump)), destination, self._report)

    def _turns(
        self, destination: Destination, systems: Mapping[str, System], pump: Pump
    ) -> Iterator[Turn]:
        every = [shape.case(destination.kind) for shape in self._shapes]
        yield Turn(FLOOR, every, partial(self._floor, pump))
        yield Turn(CEILING, every, partial(self._ceiling, destination))
        for shape, (name, system) in product(self._shapes, systems.items()):
            # One upload is one connection, which is one process's.
            if shape.uploads > 1 or name != RELAY_TWICE:
                run = partial(self._uploads, system, shape)
                yield Turn(name, [shape.case(destination.kind)], run)

    def _floor(self, pump: Pump) -> dict[str, float]:
        # Never less than a GiB: it is over in no time, and everything is divided by it.
        size = max(self._size, GIB)
        return self._figures(Job(("127.0.0.1", pump.port), size, half_close=True), [pump.pid], size)

    def _ceiling(self, destination: Destination) -> dict[str, float]:
        with Meter([], self._node.pid) as meter:
            where = destination.exchange, destination.routing_key
            wall, cpu = ceiling.run(self._node.url, *where, self._size)
        # The meter saw nothing of a process that is gone by now.
        meter.cpu = cpu
        gib = self._size / GIB
        cores = meter.cores(0.0, wall)
        # Starting that process, and connecting, is in the meter's time and not in its own.
        del cores["others_cores"]
        return {"cpu": meter.cpu / gib, "rate": 1024 * gib / wall, **cores}

    def _uploads(self, system: System, shape: Shape) -> dict[str, float]:
        uploads = self._options.each
        size = self._size // (shape.uploads * uploads)
        job = job_for(system, shape.kind, size, clients=shape.uploads, uploads=uploads)
        return self._figures(job, system.pids, size * shape.uploads * uploads)

    def _figures(self, job: Job, pids: Sequence[int], size: int) -> dict[str, float]:
        with Meter(pids, self._node.pid) as meter:
            client = self._load.run(job)
        gib = size / GIB
        return {
            "cpu": meter.cpu / gib,
            "rate": 1024 * gib / client.wall,
            **meter.cores(client.cpu),
        }


def targets(result: report.Report, others: Sequence[str]) -> list[Target]:
    """What is promised of uploads, for the cases of this run."""
    options, runs, found = result.options, result.runs, []
    shapes = [Shape(*each) for each in product(options.kind, options.uploads)]
    for queue, shape in product(options.queue, shapes):
        case = shape.case(queue)
        if queue == "none" and shape.kind != "raw" and shape.uploads in CPU_TARGETS:
            floor = spread(runs.ratios(case, RELAY, "cpu", [FLOOR]))
            bound = CPU_TARGETS[shape.uploads]
            found.append(_target(f"{case}: CPU per GiB / pump", floor, bound, at_most=True))
        if queue in ("quorum", "stream"):
            top = spread(runs.ratios(case, RELAY, "rate", [CEILING]))
            found.append(_target(f"{case}: rate / ceiling", top, RATE_TARGET))
        best = spread(runs.ratios(case, RELAY, "rate", others))
        found.append(_target(f"{case}: rate / best peer", best, PEERS_TARGET))
        if 2 in options.processes and shape.uploads > 1:
            twice = spread(runs.ratios(case, RELAY_TWICE, "rate", [RELAY]))
            found.append(_target(f"{case}: rate of 2 processes / 1", twice, TWICE_TARGET))
    return found


def _target(what: str, measured: Spread | None, bound: float, *, at_most: bool = False) -> Target:
    return Target(what=what, measured=measured, bound=bound, at_most=at_most)


def columns(others: Sequence[str]) -> list[Column]:
    """Of the table; the cores tell what is the limit."""
    return [
        Column("CPU s/GiB", "cpu"),
        Column("/ pump", "cpu", bases=[FLOOR]),
        Column("MiB/s", "rate", 0),
        Column("/ ceiling", "rate", bases=[CEILING]),
        Column("/ best peer", "rate", bases=others),
        *CORES,
    ]


def main(argv: list[str]) -> int:
    """Print the tables. Exit code 1: a target was missed."""
    parser = report.parser_of("throughput", __doc__)
    add = parser.add_argument
    add("--queue", type=report.some_of(QUEUES), default=["none", "quorum", "stream"])
    add("--uploads", type=report.numbers, default=[1, 16], help="at once (default 1,16)")
    add("--each", type=int, default=1, help="uploads of each client, one after the other")
    add("--kind", type=report.some_of(KINDS), default=["file"], help="file (default), field, raw")
    add("--gib", type=float, default=0.25, help="of all uploads of a run together (default 0.25)")
    add("--processes", type=report.numbers, default=[1], help="of relay: 1 (default), 2, or 1,2")
    add("--frame-size", type=int, default=131064, help="bytes (default 131064)")
    rivals.add_option(parser)
    options = parser.parse_args(argv)
    beside = rivals.chosen(options.peers)
    starts = {**relays(options.processes, frame_size=options.frame_size), **beside.starts}
    with RabbitMQNode() as node, Load() as load, Pump() as pump:
        rivals.check(beside, node.url)
        result = report.Report(
            "throughput",
            options,
            columns(list(beside.starts)),
            report.versions(node),
            Column("MiB/s", "rate", 0),
            notes=dict(beside.missing),
        )
        bench = Bench(node, load, options, result)
        for queue in options.queue:
            bench.measure(queue, starts, pump)
    return result.finish(targets(result, list(beside.starts)))
