"""One upload, from body to receipt.

The pump between ``server/`` and ``broker/``: body bytes become parts, parts become frames, frames
go to a sink. It knows neither HTTP nor AMQP; what it needs of both sides is declared here.
Waiting for the sink is what slows the client: nothing is read meanwhile.
"""

import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Protocol

from relay.errors import DigestMismatch
from relay.model import Frame, PartHead, Receipt
from relay.protocol.form_data import BodyParser, Event
from relay.protocol.framing import Framer


class FrameSink(Protocol):
    """Where frames go: ``broker.publisher.Publication``."""

    async def send(self, frame: Frame) -> None:
        """Take a frame, when there is room for it. Raises RelayError if the upload has failed."""

    async def commit(self, frame: Frame) -> None:
        """Take the last frame, once all others are safe; return when it is safe too."""


ReceiveBody = Callable[[], Awaitable[bytes]]
"""Returns the next bytes of the body, and ``b""`` at its end. Raises RelayError."""


class Upload:
    """An upload in progress."""

    def __init__(
        self,
        parser: BodyParser,
        framer: Framer,
        sink: FrameSink,
        *,
        expected_digests: Mapping[str, str] | None = None,
    ) -> None:
        """``expected_digests``: algorithm to lower-case hex that the (single) part must have."""
        self._parser = parser
        self._framer = framer
        self._sink = sink
        self._expected = expected_digests or {}

    async def run(self, receive: ReceiveBody) -> Receipt:
        """Relay the body; the transfer is committed when this returns, and never if it raises.

        Raises:
            RelayError: from the body, its parser or the sink.
            DigestMismatch: the body is not what its sender digested.
        """
        while data := await receive():
            await self._send(self._parser.feed(data))
            # A slow client must not cost a read buffer while it is waited for.
            del data
        await self._send(self._parser.finish())
        commit, receipt = self._framer.finish()
        await self._sink.commit(commit)
        return receipt

    async def _send(self, events: Iterator[Event]) -> None:
        send = self._sink.send
        for frame in self._frames(events):
            await send(frame)

    def _frames(self, events: Iterator[Event]) -> Iterator[Frame]:
        framer = self._framer
        for event in events:
            if isinstance(event, bytes):
                yield from framer.feed(event)
            elif isinstance(event, PartHead):
                yield from framer.start_part(event)
            else:
                self._check(framer.end_part().tail.digest)

    def _check(self, digest: Mapping[str, str]) -> None:
        for algorithm, expected in self._expected.items():
            if digest.get(algorithm) != expected:
                raise DigestMismatch(f"the body's {algorithm} is not the one that was sent with it")


def new_transfer_id() -> str:
    """A fresh UUID version 7 (RFC 9562, section 5.7): time-ordered, 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76 | 0b11 << 62) | 0x7 << 76 | 0b10 << 62
    text = f"{value:032x}"
    # As str(uuid.UUID(int=value)) has it, in a fifth of its time.
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
