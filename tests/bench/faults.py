"""Uploads while broker and network fail: is every 201 in the queue, once, and nothing else?

Rounds of a minute or so, each with a fresh daemon and queue and a seed of its own, until the time
is over. ``./dev bench faults [--minutes N] [--seed S] [--queue TYPE] [--no-daemon-kills]``; one
round again is ``--minutes 0 --seed S``. Seeds repeat uploads and faults, not the moments at which
they meet.
"""

import argparse
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

import trio

from relay.demo.rabbitmq import RabbitMQNode
from tests.fault_injection import EACH, Deadlines, Injection, Round, kill_daemon, run_round

ROUND: Final = 60.0
"""Seconds after which no fault follows; healing and reading come on top."""

QUEUES: Final = ("quorum", "classic", "stream")


def main(argv: list[str]) -> int:
    """Run rounds until the time is over. Returns 0 if nothing was violated in any."""
    parser = argparse.ArgumentParser(prog="./dev bench faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--queue", choices=QUEUES, default="quorum")
    parser.add_argument(
        "--daemon-kills",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="kill -9 the daemon, too, and start it again",
    )
    options = parser.parse_args(argv)
    injections = [*EACH, kill_daemon, kill_daemon] if options.daemon_kills else EACH
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    end = time.monotonic() + 60 * options.minutes
    passed, rounds = True, 0
    with RabbitMQNode() as node:
        while passed and (not rounds or time.monotonic() < end):
            print(f"round {rounds + 1}: seed {seed + rounds}, {options.queue} queue", flush=True)
            outcome = trio.run(_round, node, seed + rounds, options.queue, injections)
            passed = report(outcome, node.log)
            rounds += 1
    print(f"{'PASS' if passed else 'FAIL'}: {rounds} rounds from seed {seed}")
    return 0 if passed else 1


async def _round(
    node: RabbitMQNode, seed: int, queue: str, injections: Sequence[Injection]
) -> Round:
    chance = Random(f"round {seed}")
    # With the longer grace most uploads survive a restart of the node, with the shorter few do.
    deadlines = Deadlines(reconnect_grace=chance.choice([3, 25]))
    return await run_round(
        node,
        chance.choices(injections, k=100),
        seed=seed,
        queue_types=[queue],
        deadlines=deadlines,
        until=trio.current_time() + ROUND,
    )


def report(outcome: Round, node_log: Path) -> bool:
    """Print a round, and keep the logs if anything was violated. Returns whether nothing was."""
    _table("fault", outcome.faults)
    _table("answer", outcome.codes)
    print(
        f"  slowest pause of a client {outcome.slowest_pause:.1f} s, "
        f"of one that got its 201 {outcome.slowest_success:.1f} s; "
        f"{outcome.frames} frames in the queue, {outcome.duplicates} of them twice"
    )
    if not outcome.violations:
        print("  PASS", flush=True)
        return True
    kept = Path(tempfile.mkdtemp(prefix="relay-faults-"))
    (kept / "daemon.log").write_text("\n".join(outcome.log))
    shutil.copy(node_log, kept)
    print(f"  FAIL: seed {outcome.seed}; the logs of daemon and node are in {kept}")
    for violation in outcome.violations:
        print(f"    {violation}", flush=True)
    return False


def _table(title: str, counts: Counter[str]) -> None:
    for name, count in counts.most_common():
        print(f"  {title:<7} {name:<45} {count:>6}")
