"""Messages from a queue in which anybody may have written: decoded, and put together.

The input is a program. Each of its steps delivers a message to a decoder and a reassembler: the
next one of a good transfer, an earlier or a later one, or one of which something was changed; or
lets time pass. What the reassembler tells of is held against what was delivered.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from relay.model import Frame, PartHead, Transfer
from relay.protocol.framing import Framer
from relay.protocol.reassembly import (
    Aborted,
    Committed,
    Event,
    Expired,
    Failed,
    Parked,
    PartData,
    PartEnded,
    PartStarted,
    Reassembler,
    Repeated,
    TransferStarted,
)
from relay.protocol.wire import APP_ID, Message, WireError, decode, encode_abort, encode_frame

TRANSFERS: Final = 6
MAX_OPEN: Final = 3
MAX_REMEMBERED: Final = 6
EXPIRE_AFTER: Final = 50.0
KEYS: Final = (
    *("relay", "seq", "part", "offset", "crc32c", "name", "filename", "content-type", "route"),
    *("client", "idempotency-key", "last", "size", "digest", "digest-crc32c", "commit", "frames"),
    *("parts", "bytes", "reason", 7),
)
VALUES: Final[tuple[object, ...]] = (
    *(None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, 2**64, 0.5, "", "x", "crc32c", "\udcff"),
    *(b"x", [], {}, {"crc32c": "0"}, {"crc32c": 0}, {7: "x"}, {"sha-256": "x"}, ("x",)),
)


def frames(data: bytes) -> None:
    """A program of deliveries; see the module."""
    program = iter(data)
    at = [0] * TRANSFERS
    watch = _Watch()
    for step in program:
        number, action = step % TRANSFERS, step // TRANSFERS % 8
        messages = _messages(number)
        if action == 7:
            watch.let_time_pass(next(program, 0))
            continue
        if action == 6:
            at[number] = next(program, 0) % len(messages)
        elif action == 5:
            watch.deliver(_properties(encode_abort(_transfer(number), at[number], "client-gone")))
            continue
        properties = _properties(messages[at[number] % len(messages)])
        if action == 4:
            _spoil(properties, next(program, 0), next(program, 0))
        else:
            at[number] += 1
        watch.deliver(properties)


def _transfer(number: int) -> Transfer:
    key = "key" if number in (1, 2) else None
    return Transfer(id=f"transfer-{number}", began=0, route="default", idempotency_key=key)


@cache
def _messages(number: int) -> list[Message]:
    """A good transfer of up to three parts, the first one of several frames."""
    framer = Framer(_transfer(number), frame_size=4, digests=("sha-256",), receipt_parts=1)
    found: list[Frame] = []
    for part in range(1 + number % 3):
        found += framer.start_part(PartHead(name=f"n{part}"))
        found += framer.feed(b"0123456789"[: 10 - 5 * part])
        framer.end_part()
    found.append(framer.finish()[0])
    return [encode_frame(frame) for frame in found]


def _properties(message: Message) -> dict[str, Any]:
    return {
        "app_id": APP_ID,
        "type": message.type,
        "correlation_id": message.correlation_id,
        "timestamp": message.timestamp,
        "headers": dict(message.headers),
        "body": message.body,
    }


def _spoil(properties: dict[str, Any], what: int, how: int) -> None:
    value = VALUES[how % len(VALUES)]
    if what < 128:
        properties["headers"][KEYS[what % len(KEYS)]] = value
    elif what < 192:
        properties["headers"].pop(KEYS[what % len(KEYS)], None)
    elif what < 208:
        properties["body"] = bytes([how]) * (what % 5)
    else:
        names = ("app_id", "type", "correlation_id", "timestamp", "headers")
        properties[names[what % len(names)]] = value


class _Watch:
    """A reassembler whose words are checked."""

    def __init__(self) -> None:
        self._now = 0.0
        self._reassembler = Reassembler(
            max_open=MAX_OPEN, max_remembered=MAX_REMEMBERED, expire_after=EXPIRE_AFTER
        )
        # Of each transfer that is open: its parts' sizes so far.
        self._open: dict[str, list[int]] = {}

    def deliver(self, properties: dict[str, Any]) -> None:
        """One message, to decoder and reassembler."""
        try:
            item = decode(**properties)
        except WireError:
            return
        self._check(self._reassembler.feed(item, self._now))

    def let_time_pass(self, seconds: int) -> None:
        """And forget what was silent for too long."""
        self._now += seconds
        self._check(self._reassembler.expire(self._now))

    def _check(self, events: list[Event]) -> None:
        for event in events:
            self._follow(event)
        reassembler = self._reassembler
        assert len(reassembler) == len(self._open) <= MAX_OPEN
        assert len(reassembler._past) <= MAX_REMEMBERED
        assert len(reassembler._keys) <= MAX_REMEMBERED

    def _follow(self, event: Event) -> None:
        match event:
            case TransferStarted(transfer):
                assert transfer.id not in self._open
                self._open[transfer.id] = []
            case PartStarted(id_, part, _):
                assert part == len(self._open[id_])
                self._open[id_].append(0)
            case PartData(id_, part, offset, body):
                assert (part, offset) == (len(self._open[id_]) - 1, self._open[id_][-1])
                assert body
                self._open[id_][-1] += len(body)
            case PartEnded(id_, part, tail, _, _):
                assert (part, tail.size) == (len(self._open[id_]) - 1, self._open[id_][-1])
            case Committed(transfer, totals):
                sizes = self._open.pop(transfer.id)
                assert (totals.parts, totals.bytes) == (len(sizes), sum(sizes))
            case Repeated(transfer, _):
                del self._open[transfer.id]
            case Aborted(id_, _, _) | Failed(id_, _, _, _) | Expired(id_, _) | Parked(id_, _):
                self._open.pop(id_, None)


def program(*steps: tuple[int, int]) -> bytes:
    """The input that takes those steps: transfer and action."""
    return bytes(number + TRANSFERS * action for number, action in steps)


def seeds() -> Iterator[bytes]:
    """Whole transfers, one after the other and side by side; aborts, duplicates, spoilt ones."""
    for number in range(TRANSFERS):
        yield program(*[(number, 0)] * len(_messages(number)))
    yield program(*[(number, 0) for _ in range(8) for number in range(TRANSFERS)])
    yield program((0, 0), (0, 5), (0, 0))
    yield program((0, 0), (0, 0)) + bytes([TRANSFERS * 6, 0]) + program(*[(0, 0)] * 4)
    for what in range(0, 256, 5):
        yield program((0, 0)) + bytes([TRANSFERS * 4, what, what // 5]) + program(*[(0, 0)] * 4)
    yield program((0, 0)) + bytes([TRANSFERS * 7, 60]) + program((0, 0))
