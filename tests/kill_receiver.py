"""``relay receive`` killed again and again while it works, and what must hold at the end.

Judged from outside only: the files in the output, the queue, the dead letters, the process. The
moments are random, from a seed, and told by progress rather than by time: bytes written, transfers
told of, transfers that appeared, each since the process began.
"""

import hashlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Thread
from typing import Final

from relay.demo.rabbitmq import RabbitMQNode
from tests.mixed_transfers import Mix, Planned, ids
from tests.observed_receiver import (
    POLL,
    Depth,
    ObservedReceiver,
    TooLong,
    declare,
    drain,
    properties_of,
    publish,
    wait_until,
)

LEGITIMATE: Final = frozenset({"ledger", "offset"})
"""What may stay in the staging directory for good: what the receiver remembers of the past. A name
here is allowed, not expected."""

STARTING: Final = 0.5
"""Seconds in which a receiver is sure to be starting, or beginning to receive."""

_PART: Final = re.compile(r"(\d+)-")


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        violations: each a sentence; none if all is well.
        moments: kills by what they waited for.
    """

    kills: int = 0
    transfers: int = 0
    size: int = 0
    seconds: float = 0.0
    moments: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


@dataclass
class Rig:
    """Where it happens."""

    node: RabbitMQNode
    queue: str
    output: Path
    mix: Mix
    chance: Random

    @property
    def dead(self) -> str:
        """The queue of dead letters."""
        return f"{self.queue}.dead"

    def start(self) -> ObservedReceiver:
        """A receiver."""
        return ObservedReceiver(self.node.url, self.queue, self.output)

    def appeared(self) -> set[str]:
        """What is in the output for everybody to see."""
        try:
            return {name for name in os.listdir(self.output) if not name.startswith(".")}
        except FileNotFoundError:
            return set()

    def left(self) -> list[list[Planned]]:
        """Of each of these groups none is there yet."""
        appeared = self.appeared()
        return [
            group
            for group in self.mix.groups
            if not any(plan.transfer.id in appeared for plan in group)
        ]


def torture(rig: Rig, queue_type: str, kills: int) -> Outcome:
    """Publish the mix, kill the receiver so often, let the last one finish, and judge."""
    outcome = Outcome(size=rig.mix.size, transfers=len(rig.mix.groups))
    began = time.monotonic()
    arguments: dict[str, object] = {"x-queue-type": queue_type}
    if queue_type != "stream":
        declare(rig.node.url, rig.dead, {"x-queue-type": queue_type})
        arguments |= {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": rig.dead}
    declare(rig.node.url, rig.queue, arguments)
    messages = ((properties_of(message), message.body) for message in rig.mix.messages())
    publisher = Thread(target=publish, args=(rig.node.url, rig.queue, messages))
    publisher.start()
    try:
        for number in range(kills):
            _kill_once(rig, outcome, kills - number)
            if outcome.violations:
                return outcome
    finally:
        publisher.join()
    _finish(rig, outcome, queue_type)
    outcome.seconds = time.monotonic() - began
    outcome.violations += judge(rig.mix, rig.output)
    return outcome


def _kill_once(rig: Rig, outcome: Outcome, kills_left: int) -> None:
    left = rig.left()
    size = sum(max(plan.size for plan in group) for group in left)
    with rig.start() as receiver:
        name, reached = _moment(rig, receiver, size // kills_left, len(left) // kills_left)
        deadline = time.monotonic() + 60
        while receiver.exit_code is None and not reached():
            if time.monotonic() > deadline or (looks_done := not rig.left()):
                # Nothing is left that it could be killed at; it may be at its last acks.
                name = "idle" if looks_done else "no progress"
                break
            time.sleep(POLL)
        if receiver.exit_code is not None:
            outcome.violations.append(f"it exited by itself with {receiver.exit_code}")
    if name == "no progress":
        columns = ("name", "messages_ready", "messages_unacknowledged", "consumers", "state")
        queues, alarms = rig.node.ctl("list_queues", *columns), rig.node.ctl("status")
        outcome.violations.append(f"it made no progress in 60 s:\n{queues}\n{alarms}")
    outcome.kills += 1
    outcome.moments[name] += 1


def _moment(
    rig: Rig, receiver: ObservedReceiver, size: int, transfers: int
) -> tuple[str, Callable[[], bool]]:
    """A moment so far ahead that, on average, so many bytes and transfers are between two."""
    chance = rig.chance.random()
    if chance < 0.1:
        end = time.monotonic() + rig.chance.uniform(0, STARTING)
        return "starting", lambda: time.monotonic() > end
    if chance < 0.25:
        told = receiver.out.count("\n") + rig.chance.randrange(1, 2 * transfers + 2)
        return "transfer told", lambda: receiver.out.count("\n") >= told
    if chance < 0.4:
        seen = len(rig.appeared()) + rig.chance.randrange(1, 2 * transfers + 2)
        return "transfer appeared", lambda: len(rig.appeared()) >= seen
    until = rig.chance.randrange(2 * size + 1)
    return "bytes written", lambda: receiver.written() >= until


def _finish(rig: Rig, outcome: Outcome, queue_type: str) -> None:
    with rig.start() as receiver, Depth(rig.node.url, rig.queue) as depth:
        try:
            wait_until(lambda: receiver.handles(signal.SIGTERM), "it can be asked to stop")
            wait_until(lambda: not rig.left() or receiver.exit_code is not None, "all delivered")
            if queue_type != "stream":
                wait_until(lambda: depth.ready() == 0, "nothing waits in the queue")
                wait_until(lambda: _unsettled(rig) == 0, "all is acked")
        except TooLong as exc:
            outcome.violations.append(str(exc))
        code = (
            receiver.exit_code if receiver.exit_code is not None else receiver.stop(signal.SIGTERM)
        )
        if code != 0:
            outcome.violations.append(f"the last receiver exited with {code}")
    if queue_type == "stream":
        return
    with Depth(rig.node.url, rig.queue) as depth:
        if count := depth.ready():
            outcome.violations.append(f"{count} messages are left in the queue")
    _judge_dead_letters(rig, outcome)


def _judge_dead_letters(rig: Rig, outcome: Outcome) -> None:
    dead = Counter(str(properties.correlation_id) for properties in drain(rig.node.url, rig.dead))
    for transfer_id, count in dead.items():
        outcome.violations.append(f"{count} dead letters of {transfer_id}")


def _unsettled(rig: Rig) -> int:
    """Messages in the queue, also those that were delivered; asking takes a second."""
    listed = rig.node.ctl("list_queues", "name", "messages", "--no-table-headers").splitlines()
    return {name: int(count) for name, count in map(str.split, listed)}[rig.queue]


def judge(mix: Mix, output: Path) -> list[str]:
    """What is wrong with the output: each transfer once, whole, and nothing else."""
    violations = []
    found = {name for name in os.listdir(output) if not name.startswith(".")}
    for group in mix.groups:
        there = [plan for plan in group if plan.transfer.id in found]
        if len(there) != 1:
            violations.append(f"{ids(group)}: {len(there)} times in the output, not once")
        for plan in there:
            violations += _judge_transfer(mix, plan, output / plan.transfer.id)
            found -= {plan.transfer.id, f"{plan.transfer.id}.json"}
    violations += [f"{name} does not belong into the output" for name in sorted(found)]
    return violations + _judge_hidden(mix, output)


def _judge_transfer(mix: Mix, plan: Planned, directory: Path) -> list[str]:
    expected = {str(number): mix.digest(part) for number, part in enumerate(plan.parts)}
    for file in directory.iterdir():
        match = _PART.match(file.name)
        if match is None:
            if file.suffix != ".json" or plan.transfer.id not in file.read_text():
                return [f"{file} is neither a part nor a receipt"]
            continue
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != expected.pop(match[1], None):
            return [f"{file} is not what was sent, or there are two of it"]
    return [f"{directory} has no part {', '.join(expected)}"] if expected else []


def _judge_hidden(mix: Mix, output: Path) -> list[str]:
    """Staging files: none of a transfer, and what is left must be known by name."""
    transfers = {plan.transfer.id for plan in mix.plans}
    violations = []
    for directory, folders, files in os.walk(output):
        if not os.path.relpath(directory, output).startswith("."):
            continue
        if directory == str(output):
            folders[:] = [name for name in folders if name.startswith(".")]
            files = [name for name in files if name.startswith(".")]
            transfers_here: list[str] = []
        else:
            transfers_here = [
                name for name in (*folders, *files) if any(name.startswith(i) for i in transfers)
            ]
        violations += [f"{directory}/{name} is left of a transfer" for name in transfers_here]
        strange = set(files) - LEGITIMATE - set(transfers_here)
        violations += [f"{directory}/{name} is left" for name in sorted(strange)]
    return violations
