"""AMQP content headers of frames, as bytes.

pika marshals any message; frames differ in few things, and for those the bytes are laid out here.
Most quickly where there are thousands: all but a few frames of a large upload have the same five
headers and differ in five numbers. That saves a sixth of the daemon's CPU for large uploads, and as
much for small ones. A test holds it to what pika makes of the same message. Pure.
"""

import struct
from functools import lru_cache
from typing import Final

from pika.spec import FRAME_END, FRAME_HEADER, BasicProperties

from relay.protocol.wire import APP_ID, CONTENT_TYPE, LONG_HEADERS, PLAIN_HEADERS, Headers, Message

_FLAGS: Final = (
    BasicProperties.FLAG_CONTENT_TYPE
    | BasicProperties.FLAG_HEADERS
    | BasicProperties.FLAG_DELIVERY_MODE
    | BasicProperties.FLAG_CORRELATION_ID
    | BasicProperties.FLAG_MESSAGE_ID
    | BasicProperties.FLAG_TIMESTAMP
    | BasicProperties.FLAG_TYPE
    | BasicProperties.FLAG_APP_ID
)

# AMQP frame type, channel, payload size; class, weight, body size, property flags.
_START: Final = struct.Struct(">BHI HHQH")
_PAYLOAD_OFFSET: Final = 7
# A field is its name as a short string, the letter of its type and its value (AMQP 0-9-1, section
# 4.2.5, with the letters as RabbitMQ has them): "I" has 32 bits and "l" 64, both signed.
_TABLE: Final = struct.Struct(">I 7si 5sq 6si 8sq 8sq")
_TABLE_SIZE: Final = _TABLE.size - 4
_NAMES: Final = (b"\x05relayI", b"\x03seql", b"\x04partI", b"\x06offsetl", b"\x06crc32cl")
_SIZE: Final = struct.Struct(">I")
_INT: Final = struct.Struct(">ci")
_LONG: Final = struct.Struct(">cq")
_TEXT: Final = struct.Struct(">cI")
_INT_MAX: Final = (1 << 31) - 1
_END: Final = bytes([FRAME_END])


class HeaderMarshaller:
    """Makes the content headers for the messages of one transfer on one channel."""

    def __init__(self, channel_number: int, delivery_mode: int) -> None:
        self._channel_number = channel_number
        self._delivery_mode = delivery_mode
        self._key: tuple[str, int, str] | None = None
        self._before_id = b""
        self._after_id = b""
        self._size = 0

    def marshal(self, message: Message) -> bytes:
        """The AMQP header frame that goes between basic.publish and the body."""
        key = (message.correlation_id, message.timestamp, message.type)
        if key != self._key:
            self._prepare(message)
            self._key = key
        headers = message.headers
        table = _plain_table(headers) if len(headers) == PLAIN_HEADERS else _table(headers)
        message_id = message.message_id.encode()
        return b"".join(
            (
                _START.pack(
                    FRAME_HEADER,
                    self._channel_number,
                    self._size + len(table) + len(message_id),
                    BasicProperties.INDEX,
                    0,
                    len(message.body),
                    _FLAGS,
                ),
                _CONTENT_TYPE,
                table,
                self._before_id,
                bytes((len(message_id),)),
                message_id,
                self._after_id,
            )
        )

    def _prepare(self, message: Message) -> None:
        """Marshal what all of a transfer's frames have in common."""
        self._before_id = bytes((self._delivery_mode,)) + _short(message.correlation_id)
        timestamp = struct.pack(">Q", message.timestamp)
        self._after_id = timestamp + _short(message.type) + _short(APP_ID) + _END
        fixed = (_CONTENT_TYPE, self._before_id, self._after_id)
        size_of_id = 1
        self._size = _START.size - _PAYLOAD_OFFSET + sum(map(len, fixed)) + size_of_id - len(_END)


def _plain_table(headers: Headers) -> bytes:
    """The headers that every frame has, in the order in which wire.encode_frame puts them."""
    relay, seq, part, offset, crc32c = headers.values()
    n_relay, n_seq, n_part, n_offset, n_crc32c = _NAMES
    return _TABLE.pack(
        _TABLE_SIZE, n_relay, relay, n_seq, seq, n_part, part, n_offset, offset, n_crc32c, crc32c
    )


def _table(headers: Headers) -> bytes:
    pieces = [b""]
    for name, value in headers.items():
        pieces.append(_name(name))
        if isinstance(value, str):
            text = value.encode()
            pieces += (_TEXT.pack(b"S", len(text)), text)
        elif isinstance(value, bool):
            pieces.append(b"t\x01" if value else b"t\x00")
        elif isinstance(value, int):
            is_long = name in LONG_HEADERS or value > _INT_MAX
            pieces.append(_LONG.pack(b"l", value) if is_long else _INT.pack(b"I", value))
        else:
            pieces += (b"F", _table(value))
    pieces[0] = _SIZE.pack(sum(map(len, pieces)))
    return b"".join(pieces)


@lru_cache(maxsize=64)  # there are some twenty
def _name(text: str) -> bytes:
    return _short(text)


def _short(text: str) -> bytes:
    """A short string: one byte of length, then UTF-8 (AMQP 0-9-1, section 4.2.5.3)."""
    encoded = text.encode()
    return bytes((len(encoded),)) + encoded


_CONTENT_TYPE: Final = _short(CONTENT_TYPE)
