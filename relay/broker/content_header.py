"""AMQP content headers of frames, as bytes.

pika marshals any message; of the thousands of frames of a large upload, all but a few have the
same five headers and differ in five numbers, and for those the bytes are laid out here: that
saves a sixth of the daemon's CPU. A test holds both ways to the same bytes. Pure.
"""

import struct
from typing import Final

from pika.compat import long
from pika.frame import Header
from pika.spec import FRAME_END, FRAME_HEADER, BasicProperties

from relay.protocol.wire import APP_ID, CONTENT_TYPE, LONG_HEADERS, PLAIN_HEADERS, Message

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
# A field is its name as a short string, its type ("I": 32 bits, "l": 64 bits, both signed) and
# its value (AMQP 0-9-1, section 4.2.5, with the type letters as RabbitMQ has them).
_TABLE: Final = struct.Struct(">I 7si 5sq 6si 8sq 8sq")
_TABLE_SIZE: Final = _TABLE.size - 4
_NAMES: Final = (b"\x05relayI", b"\x03seql", b"\x04partI", b"\x06offsetl", b"\x06crc32cl")
_END: Final = bytes([FRAME_END])


def properties_of(message: Message, delivery_mode: int) -> BasicProperties:
    """The message's properties as pika knows them."""
    return BasicProperties(
        app_id=APP_ID,
        content_type=CONTENT_TYPE,
        type=message.type,
        correlation_id=message.correlation_id,
        message_id=message.message_id,
        timestamp=message.timestamp,
        delivery_mode=delivery_mode,
        headers={
            key: long(value) if key in LONG_HEADERS else value  # type: ignore[arg-type]
            for key, value in message.headers.items()
        },
    )


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
        if len(message.headers) != PLAIN_HEADERS:
            properties = properties_of(message, self._delivery_mode)
            return Header(self._channel_number, len(message.body), properties).marshal()
        key = (message.correlation_id, message.timestamp, message.type)
        if key != self._key:
            self._prepare(message)
            self._key = key
        message_id = message.message_id.encode()
        # In the order in which wire.encode_frame puts them.
        relay, seq, part, offset, crc32c = message.headers.values()
        n_relay, n_seq, n_part, n_offset, n_crc32c = _NAMES
        return b"".join(
            (
                _START.pack(
                    FRAME_HEADER,
                    self._channel_number,
                    self._size + len(message_id),
                    BasicProperties.INDEX,
                    0,
                    len(message.body),
                    _FLAGS,
                ),
                _CONTENT_TYPE,
                _TABLE.pack(
                    _TABLE_SIZE,
                    n_relay,
                    relay,
                    n_seq,
                    seq,
                    n_part,
                    part,
                    n_offset,
                    offset,
                    n_crc32c,
                    crc32c,
                ),
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
        self._size = (
            _START.size - _PAYLOAD_OFFSET + _TABLE.size + sum(map(len, fixed)) + size_of_id
        ) - len(_END)


def _short(text: str) -> bytes:
    """A short string: one byte of length, then UTF-8 (AMQP 0-9-1, section 4.2.5.3)."""
    encoded = text.encode()
    return bytes((len(encoded),)) + encoded


_CONTENT_TYPE: Final = _short(CONTENT_TYPE)
