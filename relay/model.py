"""The values that travel through relay: transfers, parts, frames and receipts.

Small and frozen; they know nothing of HTTP, AMQP or I/O. Sizes and offsets are in bytes. The
words are those of the wire format in ``relay/README.md``. Frames, which are many, are named tuples:
a frozen dataclass takes five times as long to make.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What is known of an upload before its first byte.

    Attributes:
        id: UUID version 7, lower case.
        began: Unix time in whole seconds.
        route: name of the route it was sent to.
        client: authenticated identity, None if anonymous.
        idempotency_key: as the client sent it, None if it sent none.
        traceparent, tracestate: of the trace that it belongs to (W3C Trace Context), if any.
    """

    id: str
    began: int
    route: str
    client: str | None = None
    idempotency_key: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartHead:
    """How the client described a part; each is None where it said nothing.

    Attributes:
        name: the form field's name; None for a raw upload.
        filename: opaque and untrusted, never a path; None for a plain field.
        content_type: the part's media type, with parameters.
    """

    name: str | None = None
    filename: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class PartTail:
    """What is known of a part after its last byte.

    Attributes:
        size: bytes of the whole part.
        digest: algorithm to lower-case hex over the whole part; always has ``crc32c``.
    """

    size: int
    digest: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a whole transfer, carried by its commit frame."""

    frames: int
    parts: int
    bytes: int


class Frame(NamedTuple):
    """One AMQP message: up to ``frame_size`` consecutive bytes of one part.

    Attributes:
        transfer: the transfer it belongs to.
        seq: 0, 1, 2 … over the whole transfer.
        part: 0, 1, 2 … within the transfer.
        offset: of the first byte within its part.
        body: the bytes; empty only for an empty part.
        crc32c: of the body, unsigned 32 bits.
        head: on the first frame of a part, else None.
        tail: on the last frame of a part, else None.
        commit: on the last frame of the transfer, else None.
    """

    transfer: Transfer
    seq: int
    part: int
    offset: int
    body: bytes
    crc32c: int
    head: PartHead | None = None
    tail: PartTail | None = None
    commit: Totals | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """The transfer failed after ``seq`` frames; consumers drop what they have of it."""

    transfer_id: str
    seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReceipt:
    """One part as the receipt lists it."""

    part: int
    head: PartHead
    tail: PartTail
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a committed transfer consisted of.

    ``parts`` is bounded: it lists the first ones and ``parts_omitted`` counts the rest.
    """

    transfer: Transfer
    totals: Totals
    parts: tuple[PartReceipt, ...]
    parts_omitted: int = 0
