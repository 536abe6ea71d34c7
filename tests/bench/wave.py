"""A wave of slow uploads: slots join one after the other, and leave in the same order.

It is the clients' side only: it knows HTTP and a clock, not what serves it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11
import trio
from urllib3.filepost import encode_multipart_formdata

MIB = 1024 * 1024
PIECE_BYTES = 64 * 1024
READ_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    """The shape of a wave.

    Attributes:
        slots: most uploads at once.
        uploads_per_slot: how many each slot sends, one after the other.
        stagger: seconds between the starts of two slots.
        file_bytes: size of the file in each form.
        field_bytes: size of the plain field after it.
        rate: bytes per second at which one upload is sent.
    """

    slots: int = 24
    uploads_per_slot: int = 3
    stagger: float = 0.5
    file_bytes: int = 12 * MIB
    field_bytes: int = 4 * MIB
    rate: int = 2 * MIB


@dataclass(slots=True)
class Tally:
    """What has become of the uploads: how many are under way, and the answers so far."""

    under_way: int = 0
    statuses: list[int] = field(default_factory=list)


async def run_wave(url: str, wave: Wave, tally: Tally) -> None:
    """Sends the wave to `url`/upload and returns when its last answer is in.

    Raises:
        trio.BrokenResourceError: the service broke a connection (in an exception group).
    """
    file, plain_field = _text(wave.file_bytes), _text(wave.field_bytes)
    body, content_type = encode_multipart_formdata(
        [("file", ("file.bin", file)), ("field", plain_field)]
    )
    async with trio.open_nursery() as nursery:
        for number in range(wave.slots):
            delay = number * wave.stagger
            nursery.start_soon(_run_slot, url, wave, tally, delay, body, content_type)


async def _run_slot(
    url: str, wave: Wave, tally: Tally, delay: float, body: bytes, content_type: str
) -> None:
    await trio.sleep(delay)
    for _ in range(wave.uploads_per_slot):
        tally.under_way += 1
        tally.statuses.append(await _upload(url, body, content_type, wave.rate))
        tally.under_way -= 1


async def _upload(url: str, body: bytes, content_type: str, rate: int) -> int:
    """Sends one form, no faster than `rate`, and returns the status of the answer."""
    target = urlsplit(url)
    assert target.hostname is not None
    assert target.port is not None
    connection = h11.Connection(h11.CLIENT)
    headers = [
        ("Host", target.netloc),
        ("Content-Type", content_type),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    async with await trio.open_tcp_stream(target.hostname, target.port) as stream:
        request = h11.Request(method="POST", target="/upload", headers=headers)
        await stream.send_all(connection.send(request) or b"")
        start = trio.current_time()
        for end, piece in _pieces(body):
            await stream.send_all(connection.send(h11.Data(data=piece)) or b"")
            await trio.sleep_until(start + end / rate)
        await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
        return await _status(connection, stream)


async def _status(connection: h11.Connection, stream: trio.abc.ReceiveStream) -> int:
    """Reads an answer to its end and returns its status."""
    status = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(READ_BYTES)))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.EndOfMessage):
            return status


def _pieces(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the body in pieces, each with its end's offset."""
    for offset in range(0, len(body), PIECE_BYTES):
        piece = body[offset : offset + PIECE_BYTES]
        yield offset + len(piece), piece


def _text(size: int) -> bytes:
    """Makes plain ASCII: the kind of field that costs Python's `str` the least."""
    line = b"the quick brown fox jumps over the lazy dog\n"
    return (line * (size // len(line) + 1))[:size]
