"""Messages that no relay publishes: malformed, contradictory, absurd, and out to do harm.

Each has a ``message_id`` of its own, to be found by among the dead letters. All but the aborts are
whole transfers as far as they can be: where the receiver took one for good, it would be seen in its
output.
"""

import struct
import uuid
from collections.abc import Iterator
from random import Random
from typing import Final

from pika.spec import BasicProperties

from relay.model import PartHead, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.framing import Framer
from relay.protocol.wire import Message, encode_frame
from tests.observed_receiver import properties_of

HUGE: Final = 2**62
BODY: Final = b"not to be trusted"

Published = tuple[BasicProperties, bytes]
"""What is published."""

_INTEGERS: Final = ("relay", "seq", "part", "offset", "crc32c", "size", "frames", "parts", "bytes")
_TEXTS: Final = ("name", "filename", "content-type", "route", "client", "idempotency-key")
_NOT_INTEGERS: Final[tuple[object, ...]] = (-1, -HUGE, "0", b"\xff\x00", True, None, [0], {"0": 0})
_NOT_TEXTS: Final[tuple[object, ...]] = (0, True, b"\xff\xfe", ["x"], {"x": "x"})
_NOT_FLAGS: Final[tuple[object, ...]] = (1, 0, "true", [True], {})
_NOT_DIGESTS: Final[tuple[object, ...]] = ("x", 1, ["crc32c"], {"crc32c": 1}, {"crc32c": None}, {})
_NOT_IDS: Final = (
    "",
    "../../../outside/victim",
    "/etc/passwd",
    ".relay-staging",
    "keys",
    "0" * 255,
    "0199D1F0-0000-7000-8000-000000000001",
    "0199d1f0-0000-7000-8000-000000000001\n",
    "0199d1f0-0000-7000-8000-000000000001/x",
    "0199d1f0-0000-7000-8000-00000000000\u0661",
    "\x1b[2J\x00\u202e",
)


class RawProperties(BasicProperties):
    """Properties whose encoding the test has made up."""

    def __init__(self, message_id: str, encoded: bytes) -> None:
        super().__init__(message_id=message_id)  # type: ignore[no-untyped-call]
        self._encoded = encoded

    def encode(self) -> list[bytes]:
        """As pika asks for it."""
        return [self._encoded]


def whole(body: bytes = BODY, *digests: str) -> Message:
    """A new transfer that is one frame, and all right."""
    framer = Framer(
        Transfer(id=str(uuid.uuid4()), began=1, route="default"), frame_size=4096, digests=digests
    )
    list(framer.start_part(PartHead(name="file", filename="hostile")))
    list(framer.feed(body))
    framer.end_part()
    return encode_frame(framer.finish()[0])


def changed(message_id: str, header: str, value: object) -> Published:
    """A whole transfer with one header changed."""
    message = whole()
    headers = {**message.headers, header: value}
    return properties_of(message, message_id=message_id, headers=headers), BODY


def not_frames(random: Random) -> Iterator[Published]:
    """Messages of which none is a frame of the format, each for one reason."""
    yield BasicProperties(message_id="bare"), random.randbytes(1000)
    yield properties_of(whole(), message_id="no headers", headers=None), random.randbytes(1000)
    yield properties_of(whole(), message_id="empty headers", headers={}), BODY
    for app_id in (None, "", "Relay", "relay ", "billing"):
        yield properties_of(whole(), message_id=f"app_id {app_id!r}", app_id=app_id), BODY
    for type_ in (None, "", "Frame", "frame\x00", "commit"):
        yield properties_of(whole(), message_id=f"type {type_!r}", type=type_), BODY
    for version in (0, 2, HUGE):
        yield changed(f"version {version}", "relay", version)
    for number, correlation_id in enumerate((None, *_NOT_IDS)):
        yield properties_of(whole(), message_id=f"id {number}", correlation_id=correlation_id), BODY
    yield from _mistyped(_INTEGERS, _NOT_INTEGERS)
    yield from _mistyped(_TEXTS, _NOT_TEXTS)
    yield from _mistyped(("last", "commit"), _NOT_FLAGS)
    yield from _mistyped(("digest",), _NOT_DIGESTS)
    for missing in _INTEGERS:
        yield _without(missing)


def _mistyped(names: tuple[str, ...], values: tuple[object, ...]) -> Iterator[Published]:
    for name in names:
        for number, value in enumerate(values):
            yield changed(f"{name} mistyped {number}", name, value)


def _without(*names: str) -> Published:
    message = whole()
    headers = {key: value for key, value in message.headers.items() if key not in names}
    return properties_of(message, message_id=f"without {names}", headers=headers), BODY


def contradictory() -> Iterator[Published]:
    """Frames that say of themselves, or of their transfer, what is not so."""
    size = len(BODY)
    yield changed("seq huge", "seq", HUGE)
    yield changed("part huge", "part", HUGE)
    yield changed("offset huge", "offset", HUGE)
    yield changed("offset 1", "offset", 1)
    yield changed("part 1", "part", 1)
    for name in ("size", "bytes"):
        for value in (0, size - 1, size + 1, HUGE):
            yield changed(f"{name} {value}", name, value)
    for name in ("frames", "parts"):
        for value in (0, 2, HUGE):
            yield changed(f"{name} {value}", name, value)
    yield changed("crc32c wrong", "crc32c", crc32c(BODY) ^ 1)
    yield changed("crc32c huge", "crc32c", crc32c(BODY) + 2**32)
    good = {"crc32c": f"{crc32c(BODY):08x}"}
    for name in ("crc32c", "sha-256", "sha-512"):
        yield changed(f"digest {name} wrong", "digest", good | {name: "0" * 64})
    yield changed("digest in capitals", "digest", {"crc32c": good["crc32c"].upper()})
    yield changed("digest unknown alone", "digest", {"md5": "0" * 32})
    yield _without("last")
    yield _without("last", "commit", "size", "digest", "digest-crc32c")[0], b""
    yield properties_of(whole(), message_id="body missing"), b""


def undecodable() -> Iterator[Published]:
    """What brokers pass on, and client libraries fail at: theirs is the decoding of headers."""
    nested = b""
    for _ in range(5000):
        nested = b"\x01nF" + struct.pack(">I", len(nested)) + nested
    for name, table in (
        ("date out of range", b"\x01tT" + struct.pack(">Q", HUGE)),
        ("headers nested deeply", nested),
    ):
        yield RawProperties(name, _encoded(name, table)), BODY
    name, table = "header of no encoding", b"\x02\xff\xfeS\x00\x00\x00\x01\xff"
    yield RawProperties(name, _encoded(name, table)), BODY


def _encoded(message_id: str, table: bytes) -> bytes:
    """Flags, headers, delivery_mode and message_id (AMQP 0-9-1, section 4.2.6.1)."""
    flags = (
        BasicProperties.FLAG_HEADERS
        | BasicProperties.FLAG_DELIVERY_MODE
        | BasicProperties.FLAG_MESSAGE_ID
    )
    name = message_id.encode()
    return struct.pack(">HI", flags, len(table)) + table + b"\x02" + bytes((len(name),)) + name
