"""Whether the broker is ready for a route: its exchange, its queue, what is bound, what is safe.

Looks from where a publisher stands, over AMQP, and says so where that does not show the truth.
Nothing here decides what follows from a finding, and nothing is repaired.
"""

import string
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import trio

from relay.broker.queues import DELIVERY_LIMIT, QUEUE_TYPE, Properties, compare, inquire
from relay.broker.session import Address, Session
from relay.config import RouteConfig
from relay.errors import BrokerError, BrokerRefused
from relay.model import Transfer
from relay.protocol.confirms import Outcome
from relay.protocol.wire import Message, encode_abort

PROBE_TIMEOUT: Final = 15.0
"""Seconds for the broker to confirm a probe."""

PROBE_REASON: Final = "probe"
"""What the abort frame that serves as a probe gives as its reason."""

NOT_FOUND: Final = 404
PRECONDITION_FAILED: Final = 406

_LIMITS: Final = ("x-max-length", "x-max-length-bytes")
_REJECTS: Final = ("reject-publish", "reject-publish-dlx")
_VARYING: Final = ("transfer", "client")


class Severity(Enum):
    """How bad a finding is."""

    ERROR = "error"
    """Uploads will fail, or the queue is not what the configuration says."""
    WARNING = "warning"
    """Uploads work, and what was confirmed can be lost."""
    NOTE = "note"
    """AMQP does not show whether all is well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to know about a route, or (in ``relay check``) about a broker.

    Attributes:
        subject: ``route NAME``.
        what: what is the case.
        remedy: what to do about it.
    """

    severity: Severity
    subject: str
    what: str
    remedy: str

    def __str__(self) -> str:
        text = f"{self.subject}: {self.what}; {self.remedy}"
        # Names come from others: whatever they contain, this is one line.
        return "".join(c if c.isprintable() else "?" for c in text)


async def verify_routes(
    session: Session,
    routes: Iterable[RouteConfig],
    refusals: Mapping[str, BrokerRefused],
    probe_id: str,
) -> list[Finding]:
    """Look at all there is to see of ``routes``, whose queues have been declared.

    Publishes one abort frame for each route, of a transfer that nobody knows, which consumers
    ignore. For the default exchange it goes where no queue is.

    Args:
        session: open; uploads may use it at the same time.
        routes: to look at.
        refusals: why queues could not be declared, by the name of the route.
        probe_id: a transfer id that was not used before.

    Raises:
        BrokerUnavailable: the connection is lost.
    """
    checks = [_RouteCheck(session, route, refusals.get(route.name)) for route in routes]
    for check in checks:
        await check.inspect()
    # An alarm stops the broker from reading what comes after a message: nothing may.
    for check in checks:
        await check.probe(probe_id)
    return [finding for check in checks for finding in check.findings]


class _RouteCheck:
    """One route under examination."""

    def __init__(self, session: Session, route: RouteConfig, refusal: BrokerRefused | None) -> None:
        self.findings: list[Finding] = []
        self._session = session
        self._route = route
        self._refusal = refusal
        self._is_hopeless = False

    def _find(self, severity: Severity, what: str, remedy: str) -> None:
        subject = f"route {self._route.name}"
        self.findings.append(Finding(severity=severity, subject=subject, what=what, remedy=remedy))

    def _key(self, name: str) -> str:
        """A configuration key of the route."""
        return f"routes.{self._route.name}.{name}"

    @property
    def _is_key_fixed(self) -> bool:
        parsed = string.Formatter().parse(self._route.routing_key)
        return not any(field in _VARYING for _, field, _, _ in parsed)

    def _routing_key(self, transfer: str) -> str:
        return self._route.routing_key.format(transfer=transfer, route=self._route.name, client="")

    # --- exchange and queue --------------------------------------------------------------------

    async def inspect(self) -> None:
        """Look without publishing."""
        route = self._route
        if route.exchange:
            await self._inspect_exchange()
        if route.queue is not None:
            await self._inspect_declared()
        if not route.exchange and self._is_key_fixed:
            target = self._routing_key("")
            if route.queue is None or route.queue.name != target:
                await self._inspect_target(target)

    async def _inspect_exchange(self) -> None:
        exchange = self._route.exchange
        try:
            await self._session.find_exchange(exchange)
        except BrokerRefused as exc:
            self._is_hopeless = True
            if exc.reply_code == NOT_FOUND:
                what = f"exchange {exchange!r} does not exist"
            else:
                what = f"exchange {exchange!r} cannot be used: {exc.detail}"
            self._find(
                Severity.ERROR,
                what,
                f"declare it at the broker, or correct {self._key('exchange')}",
            )
            return
        self._find(
            Severity.NOTE,
            f"which queues exchange {exchange!r} feeds, and their limits, cannot be seen over AMQP",
            "rabbitmqctl list_bindings and list_queues name type durable arguments policy tell",
        )

    async def _inspect_declared(self) -> None:
        queue = self._route.queue
        assert queue is not None
        wanted = Properties(arguments={QUEUE_TYPE: queue.type, **queue.arguments})
        if self._refusal is None:
            self._judge(queue.name, wanted)
            return
        if self._refusal.reply_code != PRECONDITION_FAILED:
            self._find(
                Severity.ERROR,
                f"queue {queue.name!r} cannot be declared: {self._refusal.detail}",
                f"permit the user to configure it, or remove [{self._key('queue')}]"
                " if somebody else declares it",
            )
            return
        has = await compare(self._session, queue.name, wanted)
        self._differences(queue.name, wanted, has)
        if not has.unseen:
            self._judge(queue.name, has)

    def _differences(self, queue: str, wanted: Properties, has: Properties) -> None:
        names = {"durable", "auto_delete", *wanted.arguments, *has.arguments}
        for name in sorted(names):
            ours, theirs = wanted.get(name), has.get(name)
            if ours == theirs:
                continue
            remedy = "delete the queue, so that relay declares it"
            if name.startswith("x-"):
                key = "queue.type" if name == QUEUE_TYPE else "queue.arguments"
                remedy = f"correct {self._key(key)}, or {remedy}"
            self._find(
                Severity.ERROR,
                f"queue {queue!r} exists otherwise: {name} is {_shown(theirs)} at the broker"
                f" and {_shown(ours)} in the configuration",
                remedy,
            )
        if has.unseen:
            self._find(
                Severity.ERROR,
                f"queue {queue!r} cannot be declared as configured: {has.unseen}",
                f"correct [{self._key('queue')}], or delete the queue, so that relay declares it",
            )

    async def _inspect_target(self, queue: str) -> None:
        """The queue that the default exchange leads to, which is not one that relay declares."""
        try:
            properties = await inquire(self._session, queue)
        except BrokerRefused as exc:
            if exc.reply_code == NOT_FOUND:
                self._unroutable(f"there is no queue {queue!r}", "declare it at the broker")
            else:
                self._find(
                    Severity.ERROR,
                    f"queue {queue!r} cannot be used: {exc.detail}",
                    f"correct {self._key('routing_key')}",
                )
            return
        if properties.unseen:
            self._find(
                Severity.NOTE,
                f"the properties of queue {queue!r} cannot be seen over AMQP: {properties.unseen}",
                "rabbitmqctl list_queues name type durable arguments policy tells",
            )
        self._judge(queue, properties)

    def _judge(self, queue: str, properties: Properties) -> None:
        """What a queue with such properties does to confirmed frames."""
        self._judge_lifetime(queue, properties)
        arguments = properties.arguments
        overflow = arguments.get("x-overflow", "drop-head")
        limits = [f"{name} {arguments[name]}" for name in _LIMITS if name in arguments]
        if limits and overflow not in _REJECTS and properties.type != "stream":
            self._find(
                Severity.WARNING,
                f"queue {queue!r} has {' and '.join(limits)} with overflow {overflow}: when it is"
                " full, it deletes frames that were confirmed",
                'give it x-overflow "reject-publish", which makes uploads fail instead (507)',
            )
        if properties.type == "quorum" and not properties.unseen:
            self._judge_delivery_limit(queue, arguments.get(DELIVERY_LIMIT))
        known = not properties.unseen or QUEUE_TYPE in arguments
        if properties.type == "classic" and known:
            self._judge_classic(queue)

    def _judge_delivery_limit(self, queue: str, limit: str | int | bool | None) -> None:
        """Consumers that fail again and again can cost confirmed frames."""
        # https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling: new in version 4 are
        # the default, and that a negative number is no limit; before, the first redelivery is over.
        has_default = (self._session.rabbitmq_major or 0) >= 4
        if limit is None and has_default:
            self._find(
                Severity.NOTE,
                f"queue {queue!r} drops frames that were delivered 20 times and never acked, by"
                " RabbitMQ 4's default, unless a policy, which cannot be seen over AMQP, has"
                " another limit",
                "set a policy with delivery-limit -1, or give the queue x-delivery-limit -1",
            )
        elif isinstance(limit, int) and (limit >= 0 or not has_default):
            better = "-1" if has_default else "none"
            self._find(
                Severity.WARNING,
                f"queue {queue!r} has x-delivery-limit {limit}: it drops confirmed frames that were"
                " delivered more often and never acked",
                f"give it {better}, so that consumers that fail again and again cost nothing",
            )

    def _judge_lifetime(self, queue: str, properties: Properties) -> None:
        reasons = []
        if not properties.durable:
            reasons.append("is not durable: a restart of the broker deletes it")
        if properties.auto_delete:
            reasons.append("is auto-delete: it goes with its last consumer")
        if "x-expires" in properties.arguments:
            reasons.append(f"is deleted when unused for {properties.arguments['x-expires']} ms")
        for reason in reasons:
            self._find(
                Severity.WARNING,
                f"queue {queue!r} {reason}, and confirmed frames with it",
                "declare it durable, without auto-delete and x-expires",
            )

    def _judge_classic(self, queue: str) -> None:
        if self._route.persistent:
            what = f"queue {queue!r} is classic: its frames are on one node, and lost with it"
            remedy = "use a quorum queue, unless one node is enough"
        else:
            what = (
                f"queue {queue!r} is classic and the route not persistent: frames are confirmed"
                " before they are on disk"
            )
            remedy = f"set {self._key('persistent')} = true, or use a quorum queue"
        self._find(Severity.WARNING, what, remedy)

    # --- bindings and permission ---------------------------------------------------------------

    async def probe(self, transfer: str) -> None:
        """Publish, and see what comes back."""
        if self._is_hopeless:
            return
        if self._session.blocked_reason is not None:
            self._blocked(self._session.blocked_reason)
            return
        route = self._route
        # Whether the default exchange leads to a queue is known already. Nobody needs to get a
        # message for the question that is left: may we publish there?
        is_default = not route.exchange and self._is_key_fixed
        key = transfer if is_default else self._routing_key(transfer)
        try:
            outcome = await self._publish(transfer, key)
        except BrokerRefused as exc:
            self._find(
                Severity.ERROR,
                f"publishing to exchange {route.exchange!r} fails: {exc.detail}",
                "permit the user to write to it, or correct the route",
            )
            return
        if outcome is None:
            self._unconfirmed()
        elif outcome is Outcome.NACKED:
            self._find(
                Severity.ERROR,
                f"a queue behind exchange {route.exchange!r} is full: uploads fail with 507",
                "have its consumers catch up, or raise its limit",
            )
        elif outcome is Outcome.RETURNED and not is_default:
            self._unbound(key)

    async def _publish(self, transfer: str, key: str) -> Outcome | None:
        """What became of the probe; None if the broker says nothing in time."""
        route = self._route
        channel = await self._session.acquire()
        probe = _Probe()
        try:
            channel.assign(
                probe,
                # Not on disk: it may be lost without harm.
                Address(exchange=route.exchange, routing_key=key, mandatory=True, delivery_mode=1),
            )
        except BrokerRefused:
            self._session.release(channel)
            raise
        about = Transfer(id=transfer, began=int(time.time()), route=route.name)
        channel.publish(encode_abort(about, 0, PROBE_REASON), mandatory=True)
        with trio.move_on_after(PROBE_TIMEOUT):
            await probe.settled.wait()
        if probe.outcome is None and probe.error is None:
            channel.close()
        elif probe.error is not None:
            raise probe.error
        else:
            self._session.release(channel)
        return probe.outcome

    def _unconfirmed(self) -> None:
        if self._session.blocked_reason is not None:
            self._blocked(self._session.blocked_reason)
            return
        self._find(
            Severity.ERROR,
            f"the broker confirmed nothing for {PROBE_TIMEOUT:g} s",
            "see whether a majority of the queue's nodes is up (rabbitmq-diagnostics status)",
        )

    def _blocked(self, reason: str) -> None:
        self._find(
            Severity.ERROR,
            f"the broker takes no messages ({reason}): bindings are not verified",
            "end its alarm (rabbitmq-diagnostics alarms), then check again",
        )

    def _unbound(self, key: str) -> None:
        exchange = self._route.exchange
        what = f"nothing is bound to exchange {exchange!r} for routing key {key!r}"
        if self._is_key_fixed:
            self._unroutable(what, "bind a queue")
        else:
            self._find(
                Severity.WARNING,
                f"{what}, which was only a probe: the key differs with each transfer",
                f"bind a queue for all that {self._route.routing_key!r} can be",
            )

    def _unroutable(self, what: str, remedy: str) -> None:
        if self._route.mandatory:
            severity, follows = Severity.ERROR, "uploads fail with 502 unroutable"
        else:
            severity, follows = Severity.WARNING, "frames are confirmed and gone"
        keys = f"{self._key('exchange')} and routing_key"
        self._find(severity, f"{what}: {follows}", f"{remedy}, or correct {keys}")


class _Probe:
    """The owner of the channel that a probe is published on."""

    def __init__(self) -> None:
        self.settled = trio.Event()
        self.outcome: Outcome | None = None
        self.error: BrokerError | None = None

    def on_settled(self, _message: Message, outcome: Outcome) -> None:
        self.outcome = outcome
        self.settled.set()

    def on_channel_lost(self, _unknown: list[Message], error: BrokerError) -> None:
        self.error = error
        self.settled.set()


def _shown(value: str | int | bool | None) -> str:
    if value is None:
        return "not set"
    return repr(value) if isinstance(value, str) else str(value).lower()
