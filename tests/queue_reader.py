"""What a queue holds, read back: messages, frames, and the transfers they make.

Reading consumes. Nobody can ask a broker whether a queue will get more, so a reader goes on until
as many transfers have ended (committed or aborted) as its caller knows to be coming. It trusts
the receiving half of the wire format, which has tests of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pika
from pika.spec import BasicProperties

from relay.model import Abort, Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol import reassembly, wire

WAIT: float = 60.0
"""Seconds for one more message; a test that waits longer has failed."""

PREFETCH = 200


@dataclass(frozen=True)
class Delivered:
    """A message as the broker delivered it."""

    properties: BasicProperties
    body: bytes
    redelivered: bool = False

    def decode(self) -> Frame | Abort:
        """What it carries. Raises WireError if it is no frame of relay's."""
        properties = self.properties
        return wire.decode(
            app_id=properties.app_id,
            type=properties.type,
            correlation_id=properties.correlation_id,
            timestamp=properties.timestamp,
            headers=properties.headers,
            body=self.body,
        )


@dataclass
class ReceivedPart:
    """A part put together again; ``tail`` is None while it is incomplete."""

    head: PartHead
    data: bytearray = field(default_factory=bytearray)
    tail: PartTail | None = None
    frames: int = 0


@dataclass
class Received:
    """A transfer put together again."""

    transfer: Transfer
    parts: list[ReceivedPart] = field(default_factory=list)
    totals: Totals | None = None
    aborted: str | None = None
    duplicates: int = 0

    @property
    def committed(self) -> bool:
        """Whether its commit frame came."""
        return self.totals is not None


def messages_in(url: str, queue: str, *, ended: int) -> list[Delivered]:
    """Consume ``queue`` until ``ended`` transfers have committed or aborted."""
    return list(_consume(url, queue, ended))


def frames_in(url: str, queue: str, *, ended: int) -> list[Frame | Abort]:
    """Consume ``queue`` until ``ended`` transfers have committed or aborted."""
    return [message.decode() for message in _consume(url, queue, ended)]


def transfers_in(url: str, queue: str, *, ended: int) -> dict[str, Received]:
    """Consume ``queue`` until ``ended`` transfers have committed or aborted, and reassemble."""
    return reassemble(message.decode() for message in _consume(url, queue, ended))


def reassemble(items: Iterator[Frame | Abort]) -> dict[str, Received]:
    """The transfers that frames make, by id. Any fault is an AssertionError."""
    reassembler = reassembly.Reassembler(max_open=100_000)
    transfers: dict[str, Received] = {}
    for item in items:
        for event in reassembler.feed(item, 0.0):
            _note(transfers, event)
    return transfers


def messages_now(url: str, queue: str) -> list[Delivered]:
    """Take what is ready in ``queue``, for when it will not get more.

    Not for a queue with a single active consumer: the broker does not allow it there.
    """
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        messages: list[Delivered] = []
        while True:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
            if method is None:
                return messages
            assert properties is not None
            assert body is not None
            messages.append(Delivered(properties, body, method.redelivered))
    finally:
        connection.close()


def messages_left(url: str, queue: str) -> int:
    """How many messages are ready in the queue; exact only when nobody publishes."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        method = connection.channel().queue_declare(queue, passive=True).method
        return int(method.message_count)
    finally:
        connection.close()


def _consume(url: str, queue: str, ended: int) -> Iterator[Delivered]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=PREFETCH)
        ends: set[str] = set()
        for method, properties, body in channel.consume(queue, inactivity_timeout=WAIT):
            assert method is not None, f"{len(ends)} of {ended} transfers ended, then silence"
            assert properties is not None
            assert body is not None
            channel.basic_ack(method.delivery_tag)
            yield Delivered(properties, body, method.redelivered)
            if properties.type == "abort" or (properties.headers or {}).get("commit"):
                ends.add(str(properties.correlation_id))
                if len(ends) >= ended:
                    break
        channel.cancel()
    finally:
        connection.close()


def _note(transfers: dict[str, Received], event: reassembly.Event) -> None:
    match event:
        case reassembly.TransferStarted(transfer):
            transfers[transfer.id] = Received(transfer)
        case reassembly.PartStarted(transfer_id, _, head):
            transfers[transfer_id].parts.append(ReceivedPart(head))
        case reassembly.PartData(transfer_id, part, offset, body):
            data = transfers[transfer_id].parts[part].data
            assert len(data) == offset
            data += body
        case reassembly.PartEnded(transfer_id, part, tail, frames, unchecked):
            assert not unchecked
            ended = transfers[transfer_id].parts[part]
            ended.tail, ended.frames = tail, frames
        case reassembly.Committed(transfer, totals):
            transfers[transfer.id].totals = totals
        case reassembly.Aborted(transfer_id, reason, _):
            unseen = Received(Transfer(id=transfer_id, began=0, route=""))
            transfers.setdefault(transfer_id, unseen).aborted = reason
        case reassembly.Dropped(transfer_id, _):
            transfers[transfer_id].duplicates += 1
        case _:
            raise AssertionError(f"the frames do not make transfers: {event}")
