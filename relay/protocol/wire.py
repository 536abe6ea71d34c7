"""Frames to and from AMQP messages: the wire format, version 1.

Both directions live here, so that publisher and receiver cannot drift apart. A message is a
neutral value; ``broker/`` and ``receiver/`` turn it into their client library's types. The format
is described for people in ``relay/README.md``. Decoding accepts what it does not know (later
versions may add headers and types) and refuses a higher version.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from relay.model import Abort, Frame, PartHead, PartTail, Totals, Transfer

VERSION: Final = 1
APP_ID: Final = "relay"
CONTENT_TYPE: Final = "application/octet-stream"
TYPE_FRAME: Final = "frame"
TYPE_ABORT: Final = "abort"

DIGEST_PREFIX: Final = "digest-"
"""Begins the names of headers that have one digest each: ``digest-crc32c``."""

LONG_HEADERS: Final = frozenset({"seq", "offset", "crc32c", "size", "frames", "parts", "bytes"})
"""Headers whose AMQP type is always ``long`` (signed 64 bits), however small the value."""

PLAIN_HEADERS: Final = 5
"""Number of headers that every frame has; those in the middle of a part have no others."""

HeaderValue = int | str | bool | Mapping[str, str]
Headers = Mapping[str, HeaderValue]


class WireError(ValueError):
    """A message that is not a frame of this format. The text says why; it quotes no body."""


class NotRelay(WireError):
    """A message that relay's publisher never makes: another ``app_id``, type or version."""


class Message(NamedTuple):
    """An AMQP message, without the library's types.

    ``delivery_mode`` and ``content_type`` are not here: the first is the route's, the second
    always ``CONTENT_TYPE``.
    """

    type: str
    correlation_id: str
    message_id: str
    timestamp: int
    headers: Headers
    body: bytes


def encode_frame(frame: Frame) -> Message:
    """The message that carries ``frame``."""
    transfer = frame.transfer
    headers: dict[str, HeaderValue] = {
        "relay": VERSION,
        "seq": frame.seq,
        "part": frame.part,
        "offset": frame.offset,
        "crc32c": frame.crc32c,
    }
    if frame.head is not None:
        _put(headers, "name", frame.head.name)
        _put(headers, "filename", frame.head.filename)
        _put(headers, "content-type", frame.head.content_type)
    if frame.tail is not None:
        headers["last"] = True
        headers["size"] = frame.tail.size
        headers["digest"] = frame.tail.digest
        # Stream queues drop tables (RabbitMQ 3.10), and keep text.
        for algorithm, digest in frame.tail.digest.items():
            headers[DIGEST_PREFIX + algorithm] = digest
    if frame.commit is not None:
        headers["commit"] = True
        headers["frames"] = frame.commit.frames
        headers["parts"] = frame.commit.parts
        headers["bytes"] = frame.commit.bytes
    if frame.seq == 0 or frame.commit is not None:
        headers["route"] = transfer.route
        _put(headers, "client", transfer.client)
        _put(headers, "idempotency-key", transfer.idempotency_key)
        _put(headers, "traceparent", transfer.traceparent)
        _put(headers, "tracestate", transfer.tracestate)
    return Message(
        TYPE_FRAME,
        transfer.id,
        f"{transfer.id}.{frame.seq}",
        transfer.began,
        headers,
        frame.body,
    )


def encode_abort(transfer: Transfer, seq: int, reason: str) -> Message:
    """The message that tells consumers to drop ``transfer``, of which ``seq`` frames were sent."""
    headers: dict[str, HeaderValue] = {"relay": VERSION, "seq": seq, "reason": reason}
    message_id = f"{transfer.id}.{seq}"
    return Message(TYPE_ABORT, transfer.id, message_id, transfer.began, headers, b"")


def _put(headers: dict[str, HeaderValue], key: str, value: str | None) -> None:
    if value is not None:
        headers[key] = value


def decode(
    *,
    app_id: object,
    type: object,
    correlation_id: object,
    timestamp: object,
    headers: Mapping[object, object] | None,
    body: bytes,
) -> Frame | Abort:
    """The frame or abort that a delivered message carries.

    Takes the properties as the client library delivers them and trusts none of them.
    ``Frame.transfer`` has route, client and key only where the format carries them (``seq`` 0 and
    the commit frame); elsewhere ``route`` is empty.

    Raises:
        NotRelay: not a message of this format, or of a version that this code does not know.
        WireError: claims to be one, but a header is missing, of the wrong type or out of range.
    """
    if app_id != APP_ID or not isinstance(headers, Mapping):
        raise NotRelay("app_id is not relay, or the message has no headers")
    fields = _Fields(headers)
    if (version := fields.integer("relay")) != VERSION:
        raise NotRelay(f"wire format version {version}; this receiver knows {VERSION}")
    if not isinstance(correlation_id, str) or not 1 <= len(correlation_id) <= 255:
        raise WireError("correlation_id is not a transfer id")
    if type == TYPE_ABORT:
        return Abort(correlation_id, fields.integer("seq"), fields.text("reason") or "unknown")
    if type != TYPE_FRAME:
        raise NotRelay("a message type that this receiver does not know")
    return _decode_frame(fields, correlation_id, timestamp, body)


def _decode_frame(fields: "_Fields", transfer_id: str, timestamp: object, body: bytes) -> Frame:
    offset = fields.integer("offset")
    transfer = Transfer(
        id=transfer_id,
        began=timestamp if isinstance(timestamp, int) else 0,
        route=fields.text("route") or "",
        client=fields.text("client"),
        idempotency_key=fields.text("idempotency-key"),
        traceparent=fields.text("traceparent"),
        tracestate=fields.text("tracestate"),
    )
    head = tail = commit = None
    if offset == 0:
        head = PartHead(
            name=fields.text("name"),
            filename=fields.text("filename"),
            content_type=fields.text("content-type"),
        )
    if fields.flag("last"):
        tail = PartTail(fields.integer("size"), fields.digests())
    if fields.flag("commit"):
        commit = Totals(fields.integer("frames"), fields.integer("parts"), fields.integer("bytes"))
    return Frame(
        transfer,
        fields.integer("seq"),
        fields.integer("part"),
        offset,
        body,
        fields.integer("crc32c"),
        head,
        tail,
        commit,
    )


class _Fields:
    """Typed access to headers that anybody may have written."""

    def __init__(self, headers: Mapping[object, object]) -> None:
        self._headers = headers

    def integer(self, key: str) -> int:
        value = self._headers.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise WireError(f"header {key} is missing or not a non-negative integer")
        return value

    def text(self, key: str) -> str | None:
        value = self._headers.get(key)
        if value is None or isinstance(value, str):
            return value
        raise WireError(f"header {key} is not text")

    def flag(self, key: str) -> bool:
        value = self._headers.get(key, False)
        if not isinstance(value, bool):
            raise WireError(f"header {key} is not a boolean")
        return value

    def digests(self) -> Mapping[str, str]:
        """The table ``digest``; where a stream has dropped it, what the single headers say."""
        table = self._headers.get("digest")
        if table is None:
            prefixed = {key: value for key, value in self._headers.items() if _is_digest(key)}
            table = {str(key)[len(DIGEST_PREFIX) :]: value for key, value in prefixed.items()}
            table = table or None
        if not isinstance(table, Mapping):
            raise WireError("header digest is missing or not a table")
        digests: dict[str, str] = {}
        for algorithm, digest in table.items():
            if not isinstance(algorithm, str) or not isinstance(digest, str):
                raise WireError("header digest holds something other than text")
            digests[algorithm] = digest
        return digests


def _is_digest(key: object) -> bool:
    return isinstance(key, str) and key.startswith(DIGEST_PREFIX)
