"""kill -9 of `relay receive`, again and again: is each transfer there once, whole, and no more?

Mixed transfers in a queue of a private node; the receiver is killed at random moments and started
again; then the output is compared, by SHA-256, with what was sent.
``./dev bench kills [--kills N] [--gib N] [--queue TYPE] [--seed S]``. A seed repeats the transfers
and what each kill waits for. Exit code 1, and all of it kept, if anything is not as it must be.
"""

import argparse
import secrets
import shutil
import tempfile
import urllib.request
from pathlib import Path
from random import Random
from typing import Final

from relay.demo.rabbitmq import HOST, RabbitMQNode, free_ports
from tests.kill_receiver import Outcome, Rig, torture
from tests.mixed_transfers import MIB, make_mix

QUEUES: Final = ("quorum", "classic", "stream")
_REDELIVERED: Final = "rabbitmq_global_messages_redelivered_total{"


def main(argv: list[str]) -> int:
    """Torture once. Returns 0 if nothing was violated."""
    parser = argparse.ArgumentParser(prog="./dev bench kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--queue", choices=QUEUES, default="quorum")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(argv)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"seed {seed}, {options.queue} queue", flush=True)
    (port,) = free_ports(1)
    config = {"prometheus.tcp.port": str(port), "prometheus.tcp.ip": HOST}
    directory = Path(tempfile.mkdtemp(prefix="relay-kills-", dir="/var/tmp"))
    with RabbitMQNode(config=config, plugins=["rabbitmq_prometheus"]) as node:
        mix = make_mix(seed, int(options.gib * 1024 * MIB))
        rig = Rig(node, "kills", directory / "output", mix, Random(f"kills {seed}"))
        outcome = torture(rig, options.queue, options.kills)
        _report(outcome, _redeliveries(port))
        if outcome.violations:
            shutil.copy(node.log, directory / "node.log")
    if outcome.violations:
        print(f"FAIL: output, standard output and error, and the node's log are in {directory}")
        return 1
    shutil.rmtree(directory)
    print("PASS")
    return 0


def _redeliveries(port: int) -> int:
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(_REDELIVERED))


def _report(outcome: Outcome, redeliveries: int) -> None:
    print(f"{'kills':>8} {'transfers':>10} {'MiB':>8} {'redeliveries':>13} {'seconds':>8}")
    print(
        f"{outcome.kills:>8} {outcome.transfers:>10} {outcome.size / MIB:>8.0f} "
        f"{redeliveries:>13} {outcome.seconds:>8.0f}"
    )
    for moment, count in outcome.moments.most_common():
        print(f"  {count:>4} at: {moment}")
    for violation in outcome.violations:
        print(f"  VIOLATED: {violation}")
