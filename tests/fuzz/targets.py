"""What is fuzzed, and what must hold for any bytes.

A target is a function of bytes. It raises AssertionError where a promise is broken, and whatever
else comes out of it is a find as well. Most cut their input in pieces as the input says, and
compare with what comes of it in one piece: no answer may depend on how bytes are cut. After every
step they check that what is kept is within its limit. Limits are small, so that inputs of a few
hundred bytes reach them.
"""

import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import h11
import trio

from relay.config import HttpConfig, RouteConfig
from relay.errors import ClientError, TooLarge
from relay.protocol.chunked import MAX_SIZE_LINE, ChunkedValidator
from relay.protocol.digest_fields import given_digests
from relay.protocol.disposition import disposition_params, media_type_params
from relay.protocol.form_data import Event, FormData
from relay.protocol.head import HeadReader, check_head
from relay.protocol.request import parse_request
from relay.server.handler import UploadHandler
from relay.server.identity import Access
from relay.server.tokens import Tokens, line_of
from relay.server.uploads import Uploads
from tests.form_reading import Parsed, parse
from tests.fuzz.frames import frames
from tests.memory_broker import PEER, MemoryBroker, MemorySink
from tests.queue_reader import reassemble
from tests.scripted_client import ScriptedClient, responses
from tests.uploading import CONNECTION_COST, READ_COPIES

MAX_HEADER_BYTES = 400
MAX_HEADERS = 12
MAX_PART_HEADER_BYTES = 120
BOUNDARY = "b0"
FRAME_SIZE = 4096
REQUESTS = 4
CONFIG = HttpConfig(
    max_header_bytes=MAX_HEADER_BYTES, max_headers=MAX_HEADERS, keep_alive_requests=REQUESTS
)
TOKEN = "relay_x"
ACCESS = Access(tokens=Tokens(line_of("alice", TOKEN)), anonymous=True)
DEFAULT = RouteConfig(
    name="default",
    frame_size=FRAME_SIZE,
    max_parts=3,
    max_part_header_bytes=MAX_PART_HEADER_BYTES,
    max_part_bytes=300,
)
ROUTES = {
    "default": DEFAULT,
    "alices": replace(DEFAULT, name="alices", clients=("alice",), digests=("sha-256",)),
}
TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def in_pieces(data: bytes) -> tuple[bytes, list[bytes]]:
    """The input itself, and the pieces it asks to be cut in.

    Its first byte says how many cuts; each takes two bytes, its place modulo the size.
    """
    count = data[0] % 8 if data else 0
    body = data[1 + 2 * count :]
    places = [int.from_bytes(data[i : i + 2], "big") for i in range(1, 1 + 2 * count, 2)]
    edges = sorted({0, len(body), *(place % (len(body) + 1) for place in places)})
    return body, [body[start:end] for start, end in pairwise(edges)]


def seed(data: bytes, *cuts: int) -> bytes:
    """The input that ``in_pieces`` takes apart into ``data``, cut there."""
    return bytes([len(cuts)]) + b"".join(cut.to_bytes(2, "big") for cut in cuts) + data


def connection(data: bytes) -> None:
    """A connection's bytes: responses or an end; no body is committed that was not sent."""
    body, pieces = in_pieces(data)
    short, long = sorted([_serve([body]), _serve(pieces)], key=lambda served: len(served[0]))
    assert sum(map(len, long[1])) <= len(body)
    assert len(long[0]) <= REQUESTS
    if data[:1] >= b"\x80":
        # Not always: it takes as long as all else. By now nothing is loaded or made for the first
        # time any more.
        _check_memory(pieces, len(body))
    if short == long:
        return
    # An error in the middle of a body ends the connection, unless the body was read to its end by
    # chance; what comes before it, and the error, are the same.
    answers, bodies, closes = short
    assert answers == long[0][: len(answers)]
    assert bodies == long[1][: len(bodies)]
    assert answers[-1] >= "4"
    assert closes or long[2]


def _serve(pieces: Sequence[bytes]) -> tuple[list[str], list[bytes], bool]:
    broker, uploads = MemoryBroker(), Uploads(4)
    client = ScriptedClient(pieces)
    trio.run(UploadHandler(CONFIG, ROUTES, broker, uploads, ACCESS).serve, client, PEER)
    assert len(uploads) == 0
    assert all(sink.closed and sink.committed is not bool(sink.aborted) for sink in broker.sinks)
    assert TOKEN.encode() not in client.sent
    answers, closes = responses(client.sent)
    committed = [sink for sink in broker.sinks if sink.committed]
    _check_transfers(committed)
    return answers, [sink.body for sink in committed], closes


def _check_transfers(sinks: Sequence[MemorySink]) -> None:
    """Each goes together again, is its client's, and counts once."""
    found = reassemble(frame for sink in sinks for frame in sink.frames)
    keys = []
    for sink in sinks:
        transfer = sink.transfer
        parts = found[transfer.id].parts
        assert b"".join(part.data for part in parts) == sink.body
        assert transfer.client in ((None, "alice") if sink.route is DEFAULT else ("alice",))
        assert transfer.traceparent is None or TRACEPARENT.fullmatch(transfer.traceparent)
        assert transfer.tracestate is None or transfer.traceparent is not None
        if transfer.idempotency_key is not None:
            keys.append((transfer.client, transfer.route, transfer.idempotency_key))
    assert len(set(keys)) == len(keys)


def _check_memory(pieces: Sequence[bytes], size: int) -> None:
    """The most that is allocated is what the README's formula has for one upload, at this size."""
    nothing, most = (_peak(sent) for sent in ([], pieces))
    assert most - nothing <= CONNECTION_COST + READ_COPIES * size + 2 * min(FRAME_SIZE, size)


def _peak(pieces: Sequence[bytes]) -> int:
    handler = UploadHandler(CONFIG, ROUTES, MemoryBroker(), Uploads(4), ACCESS)
    client = ScriptedClient(pieces)

    async def serve() -> int:
        # Only in here: what trio takes to start would hide what comes after it.
        tracemalloc.start()
        try:
            await handler.serve(client, PEER)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return trio.run(serve)


def head(data: bytes) -> None:
    """A request's head: what is asked for, or a ClientError."""
    body, pieces = in_pieces(data)
    assert _read_head(pieces) == _read_head([body])


def _read_head(pieces: Sequence[bytes]) -> object:
    reader = HeadReader(max_bytes=MAX_HEADER_BYTES)
    try:
        for piece in pieces:
            used = reader.feed(piece)
            assert len(reader.head) <= MAX_HEADER_BYTES
            if reader.done:
                raw = check_head(reader.head, max_headers=MAX_HEADERS)
                return parse_request(*raw)
            assert used == len(piece)
    except ClientError as exc:
        return type(exc), exc.detail
    return "incomplete"


def chunked(data: bytes) -> None:
    """A chunked body: the same end, data and trailers as h11 finds, or a ClientError."""
    body, pieces = in_pieces(data)
    whole = _validate([body])
    assert _validate(pieces) == whole
    if isinstance(whole[0], int):
        assert _h11_end(body) == whole
    elif whole[0] == "incomplete":
        assert _h11_end(body) is None


def _validate(pieces: Sequence[bytes]) -> tuple[object, ...]:
    validator = ChunkedValidator(max_trailer_bytes=MAX_HEADER_BYTES, max_trailers=MAX_HEADERS)
    consumed = 0
    try:
        for piece in pieces:
            taken = 0
            while taken < len(piece) and not validator.done:
                taken += validator.feed(piece[taken:])
            consumed += taken
            assert len(validator._carry) <= MAX_SIZE_LINE + 2
            assert len(validator._section.buffer) <= MAX_HEADER_BYTES + 2
            if validator.done:
                given_digests(validator.trailers)
                return consumed, validator.trailers
    except ClientError as exc:
        return type(exc), exc.detail
    return ("incomplete",)


def _h11_end(coded: bytes) -> tuple[int, list[tuple[bytes, bytes]]] | None:
    """Where h11 sees the body's end, and its trailers; None if it sees none."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    reader.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + coded)
    reader.next_event()
    while isinstance(event := reader.next_event(), h11.Data):
        pass
    if event is h11.NEED_DATA:
        return None
    assert isinstance(event, h11.EndOfMessage)
    return len(coded) - len(reader.trailing_data[0]), list(event.headers)


def form(data: bytes) -> None:
    """A form: parts whose bytes were sent, or a ClientError."""
    body, pieces = in_pieces(data)
    whole = parse(_Watched(), [body] if body else [])
    cut = parse(_Watched(), pieces)
    if whole.error is TooLarge:
        # What of a part was passed on before it was too large is nobody's any more.
        assert (cut.error, _heads_and_ends(cut)) == (TooLarge, _heads_and_ends(whole))
    else:
        assert cut == whole
    sent = sum(len(event) for event in whole.events if isinstance(event, bytes))
    assert sent <= len(body)


def _heads_and_ends(parsed: Parsed) -> list[Event]:
    return [event for event in parsed.events if not isinstance(event, bytes)]


class _Watched(FormData):
    """The daemon's parser, which must not keep more than a delimiter or a part's headers."""

    def __init__(self) -> None:
        route = ROUTES["default"]
        super().__init__(
            BOUNDARY,
            max_parts=route.max_parts,
            max_part_bytes=route.max_part_bytes,
            max_part_header_bytes=MAX_PART_HEADER_BYTES,
        )

    def feed(self, data: bytes) -> Iterator[Event]:
        yield from super().feed(data)
        assert len(self._parser.carry) <= MAX_PART_HEADER_BYTES + len(BOUNDARY) + 6


def disposition(data: bytes) -> None:
    """Content-Disposition and Content-Type: values, or a ValueError."""
    text = data.decode("utf-8", "replace")
    try:
        found = disposition_params(text)
    except ValueError:
        found = None
    if found is not None:
        assert "\0" not in f"{found.name}{found.filename}"
        # What came out can be sent again, and is the same.
        again = found.type
        for key, value in (("name", found.name), ("filename", found.filename)):
            if value is not None:
                again += f"; {key}*=utf-8''" + "".join(f"%{byte:02x}" for byte in value.encode())
        assert disposition_params(again) == found
    try:
        media_type_params(text)
    except ValueError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "connection": connection,
    "head": head,
    "chunked": chunked,
    "form": form,
    "disposition": disposition,
    "frames": frames,
}
