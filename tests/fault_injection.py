"""Faults done to a broker and the network before it, while clients upload; then the oracle's word.

A round: a daemon with short deadlines behind a proxy, clients that upload without end, faults one
after the other, everything healed, one more upload, and the queue read to its end.
"""

import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

import pika
import trio

from relay.broker.publisher import CHANNEL_TIMEOUT
from relay.demo.daemon import Daemon, DaemonFailed
from relay.demo.rabbitmq import RabbitMQNode
from relay.protocol.wire import WireError
from tests.fault_oracle import (
    COMMITTED,
    HUNG,
    LEFT,
    MIB,
    Attempt,
    Client,
    Outage,
    Plan,
    find,
    judge,
    make_plan,
)
from tests.fault_proxy import Direction, Fault, FaultProxy, Kind
from tests.queue_reader import PREFETCH, WAIT, Delivered

MAX_ATTEMPTS: Final = 4
"""Of an upload with a key."""

SLACK: Final = 15.0
"""Seconds that a crowded machine may add to the deadlines."""

QUEUE_SETTLES: Final = 3.0
"""Seconds after its declaration in which a crash may cost a quorum queue all it holds, confirmed or
not: RabbitMQ 3.10 writes which log is whose (Ra's ``names.dets``) only after half a second in which
nothing changed, and gives a queue that it does not find there a new and empty log."""

HIT_TIMEOUT: Final = 5.0
"""Seconds in which an armed fault finds a byte to happen at."""

in_thread = trio.to_thread.run_sync


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """The daemon's, in seconds."""

    reconnect_grace: float = 12
    confirm_timeout: float = 4
    blocked_grace: float = 3
    heartbeat: int = 2

    @property
    def patience(self) -> float:
        """The longest that a client may see nothing move.

        An upload waits for a channel, is blocked, loses its broker, and the next connection is
        silent: each wait has its deadline, and nothing else waits.
        """
        waits = self.reconnect_grace + self.blocked_grace + 2 * self.confirm_timeout
        return CHANNEL_TIMEOUT + waits + SLACK

    @property
    def longest(self) -> float:
        """Longer than any of them alone, the loss by heartbeats included."""
        return max(self.reconnect_grace, self.confirm_timeout, 3 * self.heartbeat) + 1


def configuration(seed: int, queue_types: Sequence[str], deadlines: Deadlines) -> str:
    """The daemon's, with a route to a queue of its own for each type, named like it."""
    routes = []
    for queue_type in queue_types:
        arguments = '{ x-overflow = "reject-publish" }' if queue_type == "quorum" else "{}"
        routes.append(f"""
[routes.{queue_type}]
routing_key = "{queue_name(seed, queue_type)}"
[routes.{queue_type}.queue]
name = "{queue_name(seed, queue_type)}"
type = "{queue_type}"
arguments = {arguments}
""")
    return f"""
[amqp]
upload_window = "512 KiB"
window = "3 MiB"
heartbeat = "{deadlines.heartbeat} s"
reconnect_grace = "{deadlines.reconnect_grace} s"
blocked_grace = "{deadlines.blocked_grace} s"
confirm_timeout = "{deadlines.confirm_timeout} s"
{"".join(routes)}"""


def queue_name(seed: int, queue_type: str) -> str:
    """The queue of a round."""
    return f"faults.{queue_type}.{seed}"


# --- faults -------------------------------------------------------------------------------------


@dataclass
class Rig:
    """What faults are done to."""

    node: RabbitMQNode
    proxy: FaultProxy
    daemon: Daemon
    deadlines: Deadlines
    chance: Random
    outages: list[Outage] = field(default_factory=list)


Injection = Callable[[Rig], Awaitable[str]]
"""Does a fault and heals it; returns its name."""


async def kill(rig: Rig) -> str:
    """A crash, and a start soon after."""
    await in_thread(rig.node.kill)
    await trio.sleep(rig.chance.uniform(0, 2))
    await in_thread(rig.node.start)
    return "kill -9"


async def restart(rig: Rig) -> str:
    """An orderly restart."""
    await in_thread(rig.node.restart)
    return "restart"


async def kill_daemon(rig: Rig) -> str:
    """A crash of the daemon itself, and a start soon after, at the same address."""
    outage = Outage(trio.current_time())
    rig.outages.append(outage)
    await in_thread(rig.daemon.kill)
    await trio.sleep(rig.chance.uniform(0, 1))
    await in_thread(rig.daemon.start)
    outage.ended = trio.current_time()
    return "kill -9 of the daemon"


async def suspend_briefly(rig: Rig) -> str:
    """Silence shorter than every deadline."""
    await _suspended(rig, min(rig.deadlines.confirm_timeout, rig.deadlines.heartbeat) * 0.6)
    return "SIGSTOP, short"


async def suspend_past_confirms(rig: Rig) -> str:
    """Silence longer than ``confirm_timeout``, and than heartbeats allow."""
    await _suspended(rig, max(rig.deadlines.confirm_timeout, 2 * rig.deadlines.heartbeat) + 1)
    return "SIGSTOP, past confirms"


async def suspend_past_all(rig: Rig) -> str:
    """Silence longer than every deadline."""
    await _suspended(rig, rig.deadlines.longest + rig.deadlines.confirm_timeout)
    return "SIGSTOP, past all"


async def _suspended(rig: Rig, seconds: float) -> None:
    rig.node.suspend()
    try:
        await trio.sleep(seconds)
    finally:
        rig.node.resume()


async def close_connections(rig: Rig) -> str:
    """As an operator does."""
    await in_thread(rig.node.ctl, "close_all_connections", "fault injection")
    return "close_all_connections"


async def alarm_briefly(rig: Rig) -> str:
    """A memory alarm that is over before ``blocked_grace``."""
    await _alarm(rig, 0)
    return "memory alarm, short"


async def alarm_past_grace(rig: Rig) -> str:
    """A memory alarm for longer than ``blocked_grace``."""
    await _alarm(rig, rig.deadlines.blocked_grace + 1)
    return "memory alarm, past grace"


async def _alarm(rig: Rig, seconds: float) -> None:
    await in_thread(rig.node.ctl, "set_vm_memory_high_watermark", "0.000001")
    try:
        await trio.sleep(seconds)
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(rig.node.ctl, "set_vm_memory_high_watermark", "0.4")


async def network(rig: Rig) -> str:
    """Some fault of the network."""
    return await by_proxy(random_fault(rig.chance))(rig)


async def kill_and_network(rig: Rig) -> str:
    """A crash, with a network that fails the reconnecting daemon, too."""
    fault = random_fault(rig.chance, fresh=True)
    await in_thread(rig.node.kill)
    rig.proxy.arm(fault)
    await in_thread(rig.node.start)
    await _until_over(rig, fault)
    return f"kill -9 and {fault.summary}"


def by_proxy(fault: Fault, *, seconds: float | None = None) -> Injection:
    """That fault of the network, for a random time unless ``seconds`` tells."""

    async def inject(rig: Rig) -> str:
        rig.proxy.arm(fault)
        await _until_over(rig, fault, seconds)
        return fault.summary

    return inject


async def _until_over(rig: Rig, fault: Fault, seconds: float | None = None) -> None:
    try:
        with trio.move_on_after(HIT_TIMEOUT):
            await rig.proxy.hit.wait()
        if fault.kind not in (Kind.CUT, Kind.RESET):
            random_time = rig.chance.choice([0.5, 3, rig.deadlines.longest])
            await trio.sleep(random_time if seconds is None else seconds)
    finally:
        rig.proxy.heal()


def random_fault(chance: Random, *, fresh: bool | None = None) -> Fault:
    """Any fault of the network, at any byte."""
    if fresh is None:
        fresh = chance.random() < 0.4
    # A handshake has some 500 bytes each way; then come declarations, and then uploads.
    after = chance.choice([0, 1, 7, 8, *(chance.randrange(1200) for _ in range(8))])
    if not fresh:
        after = chance.choice([after, chance.randrange(1 << 20)])
    return Fault(
        kind=chance.choice(list(Kind)),
        direction=chance.choice(list(Direction)),
        after=after,
        fresh=fresh,
    )


EACH: Final[Sequence[Injection]] = (
    kill,
    restart,
    suspend_briefly,
    suspend_past_confirms,
    suspend_past_all,
    close_connections,
    alarm_briefly,
    alarm_past_grace,
    network,
    network,
    network,
    network,
    network,
    kill_and_network,
)
"""Faults of broker and network, as often as they are to come; those of the daemon are apart."""


# --- a round ------------------------------------------------------------------------------------


@dataclass
class Round:
    """What a round came to.

    Attributes:
        violations: each a sentence; none if all is well.
    """

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    attempts: list[Attempt] = field(default_factory=list)
    frames: int = 0
    duplicates: int = 0
    violations: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def codes(self) -> Counter[str]:
        """Answers by code."""
        return Counter(attempt.code for attempt in self.attempts)

    @property
    def slowest_pause(self) -> float:
        """The longest that an answered client saw nothing move, in seconds."""
        return max((attempt.pause for attempt in self.attempts), default=0.0)

    @property
    def slowest_success(self) -> float:
        """The same, of uploads that went well all the same."""
        pauses = [attempt.pause for attempt in self.attempts if attempt.code == COMMITTED]
        return max(pauses, default=0.0)


async def run_round(
    node: RabbitMQNode,
    injections: Sequence[Injection],
    *,
    seed: int,
    queue_types: Sequence[str] = ("quorum",),
    deadlines: Deadlines | None = None,
    clients: int = 16,
    gap: float = 2.0,
    until: float = float("inf"),
) -> Round:
    """Have ``injections`` done one after the other while clients upload, and judge.

    Args:
        node: running; it is left running and healed, with more queues.
        injections: at most these, in order.
        seed: of uploads and faults.
        queue_types: of ``quorum``, ``classic`` and ``stream``; clients are spread over them.
        deadlines: the daemon's.
        clients: how many upload at once.
        gap: most seconds between two faults.
        until: by trio's clock, no further fault after that.
    """
    deadlines = deadlines or Deadlines()
    outcome = Round(seed)
    async with _proxied(node) as proxy:
        with tempfile.TemporaryDirectory(prefix="relay-faults-") as directory:
            config = configuration(seed, queue_types, deadlines)
            daemon = Daemon(proxy.url, config, directory=Path(directory))
            outcome.log = daemon.log
            rig = Rig(node, proxy, daemon, deadlines, Random(f"faults {seed}"))
            try:
                await in_thread(daemon.start)
                client = Client(
                    daemon.address,
                    patience=deadlines.patience,
                    outages=rig.outages,
                )
                outcome.attempts = client.attempts
                await _upload_under_faults(
                    outcome, client, rig, injections, clients, gap, until, queue_types
                )
                await _settle(outcome, daemon, node, client, queue_types)
            finally:
                await in_thread(daemon.kill)
    return outcome


@asynccontextmanager
async def _proxied(node: RabbitMQNode) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(node.port)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.serve)
        yield proxy
        nursery.cancel_scope.cancel()


async def _upload_under_faults(
    outcome: Round,
    client: Client,
    rig: Rig,
    injections: Sequence[Injection],
    clients: int,
    gap: float,
    until: float,
    queue_types: Sequence[str],
) -> None:
    is_over = trio.Event()
    async with trio.open_nursery() as nursery:
        for number in range(clients):
            route = queue_types[number % len(queue_types)]
            nursery.start_soon(_keep_uploading, client, route, outcome.seed, number, is_over)
        try:
            if set(queue_types) != {"classic"}:
                await trio.sleep(QUEUE_SETTLES)
            for inject in injections:
                await trio.sleep(rig.chance.uniform(0, gap))
                if trio.current_time() > until:
                    break
                began = time.time()
                outcome.faults[fault := await inject(rig)] += 1
                # Between the daemon's own lines, to read how one led to the other.
                outcome.log.append(f"--- {_clock(began)} to {_clock(time.time())}: {fault}")
            await trio.sleep(gap / 2)
        finally:
            is_over.set()


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03}"


async def _keep_uploading(
    client: Client, route: str, seed: int, number: int, is_over: trio.Event
) -> None:
    chance = Random(f"client {seed} {number}")
    turn = 0
    while not is_over.is_set():
        plan = make_plan(seed, number, turn)
        turn += 1
        for _ in range(MAX_ATTEMPTS if plan.key is not None else 1):
            attempt = await client.upload(plan, route)
            if attempt.code in (COMMITTED, LEFT, HUNG):
                break
            await trio.sleep(chance.uniform(0, 2))
        # Now and then one asks again, as if the answer had not reached it.
        if plan.key is not None and attempt.code == COMMITTED and chance.random() < 0.2:
            await client.upload(plan, route)
        await trio.sleep(chance.uniform(0, 0.3))


async def _settle(
    outcome: Round,
    daemon: Daemon,
    node: RabbitMQNode,
    client: Client,
    queue_types: Sequence[str],
) -> None:
    """All is healed: what must hold now?"""
    # What the network still held back has arrived when nothing but the daemon is connected.
    await _become(outcome, daemon, "ready again", lambda: daemon.ready()[0] == 200)
    await _become(outcome, daemon, "the only one connected", lambda: _connections(node) == 1)
    fences = {}
    for queue_type in queue_types:
        name = f"{outcome.seed}-fence-{queue_type}"
        fence = await client.upload(Plan(name, (3 * MIB,), False, None, 0, None, name), queue_type)
        if fence.code != COMMITTED:
            outcome.violations.append(f"the next upload does not work: {fence}")
            return
        fences[queue_type] = str(fence.transfer)
    for metric in ("relay_uploads_in_progress", "relay_window_bytes", "relay_window_waiting"):
        await _become(outcome, daemon, f"{metric} 0", partial(_is_zero, daemon, metric))
    messages: list[Delivered] = []
    for queue_type, fence_id in fences.items():
        queue, is_stream = queue_name(outcome.seed, queue_type), queue_type == "stream"
        read = read_past(node.url, queue, fence_id, is_stream=is_stream)
        messages += await in_thread(list, read)
    try:
        # A transfer is in one queue only, and a key belongs to a route.
        found = await in_thread(lambda: find(message.decode() for message in messages))
    except WireError as exc:
        outcome.violations.append(f"UNREADABLE: the queue holds what no consumer takes: {exc}")
        return
    outcome.frames, outcome.duplicates = found.frames, found.duplicates
    outcome.violations += judge(client.attempts, found)
    if (status := await in_thread(daemon.stop)) != 0:
        outcome.violations.append(f"the daemon exited with {status}")


async def _become(outcome: Round, daemon: Daemon, what: str, condition: Callable[[], bool]) -> None:
    try:
        await in_thread(daemon.wait_until, condition, what)
    except DaemonFailed:
        outcome.violations.append(f"the daemon does not become {what}")


def _is_zero(daemon: Daemon, metric: str) -> bool:
    return daemon.metric(metric) == 0


def _connections(node: RabbitMQNode) -> int:
    return len(node.ctl("list_connections", "--no-table-headers", "pid").split())


def read_past(url: str, queue: str, fence: str, *, is_stream: bool) -> Iterator[Delivered]:
    """Consume a queue of any type up to the commit frame of ``fence``, and what follows it."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=PREFETCH)
        first = {"x-stream-offset": "first"} if is_stream else {}
        is_past, silence = False, 0
        # An abort frame may still be on its way; nothing that it says depends on its coming.
        for method, properties, body in channel.consume(
            queue, inactivity_timeout=1.0, arguments=first
        ):
            if method is None:
                silence += 1
                if is_past or silence > WAIT:
                    break
                continue
            silence = 0
            assert properties is not None
            assert body is not None
            channel.basic_ack(method.delivery_tag)
            yield Delivered(properties, body, method.redelivered)
            if (properties.headers or {}).get("commit") and properties.correlation_id == fence:
                is_past = True
        channel.cancel()
    finally:
        connection.close()
