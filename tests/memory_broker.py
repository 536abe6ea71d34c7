"""Both ends of an upload in memory: a broker that keeps what it is given, and an HTTP client.

With trio's memory streams between them and the code under test, a test decides what happens when,
and with trio's mock clock also how long it takes.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from typing import Any, Final

import trio
from trio.testing import (
    lockstep_stream_one_way_pair,
    memory_stream_one_way_pair,
    memory_stream_pair,
)

from relay.config import RouteConfig
from relay.errors import RelayError
from relay.model import Frame, Transfer
from relay.server.identity import Peer
from relay.waits import Wait, Waits

Stream = trio.abc.HalfCloseableStream
NewPair = Callable[[], tuple[Stream, Stream]]
Serve = Callable[[Stream, Peer], Awaitable[None]]

PEER: Final = Peer(address="192.0.2.1:5000")
"""What the server is told of the client."""


class MemorySink:
    """Keeps the frames of one transfer; a ``server.handler.Sink``."""

    def __init__(
        self, broker: "MemoryBroker", transfer: Transfer, route: RouteConfig, waits: Waits
    ) -> None:
        self.transfer = transfer
        self.route = route
        self.frames: list[Frame] = []
        self.committed = False
        self.aborted: list[str] = []
        self.closed = False
        self.may_be_committed = False
        self._broker = broker
        self._waits = waits

    @property
    def body(self) -> bytes:
        """The bytes of all frames, whichever part they are of."""
        return b"".join(frame.body for frame in self.frames)

    async def send(self, frame: Frame) -> None:
        """Take a frame."""
        assert not self.closed
        assert not self.aborted
        self._waits.begin(Wait.WINDOW)
        await self._broker.before_send(frame)
        self._waits.end()
        self.frames.append(frame)

    async def commit(self, frame: Frame) -> None:
        """Take the commit frame."""
        await self.send(frame)
        self.may_be_committed = True
        self._waits.begin(Wait.BROKER)
        await self._broker.before_commit(frame)
        self._waits.end()
        self.committed = True

    def abort(self, reason: str) -> None:
        """Note that the transfer failed, unless it may be committed."""
        assert not self.closed
        if not self.may_be_committed:
            self.aborted.append(reason)


class MemoryBroker:
    """Hands out sinks; a ``server.handler.Broker``.

    Attributes:
        sinks: every sink it has opened, oldest first.
        refused: what ``refusal`` returns.
        before_open, before_send, before_commit: awaited first; they may wait, or raise.
    """

    def __init__(self) -> None:
        self.sinks: list[MemorySink] = []
        self.refused: RelayError | None = None
        self.before_open: Callable[[Transfer], Awaitable[None]] = _checkpoint
        self.before_send: Callable[[Frame], Awaitable[None]] = _checkpoint
        self.before_commit: Callable[[Frame], Awaitable[None]] = _checkpoint

    @property
    def sink(self) -> MemorySink:
        """The newest sink."""
        return self.sinks[-1]

    def refusal(self) -> RelayError | None:
        """Why an upload cannot be admitted."""
        return self.refused

    @asynccontextmanager
    async def open(
        self, transfer: Transfer, route: RouteConfig, waits: Waits
    ) -> AsyncGenerator[MemorySink, None]:
        """A sink for the length of the block."""
        waits.begin(Wait.BROKER)
        await self.before_open(transfer)
        waits.end()
        sink = MemorySink(self, transfer, route, waits)
        self.sinks.append(sink)
        try:
            yield sink
        finally:
            sink.closed = True


async def _checkpoint(_: object) -> None:
    await trio.lowlevel.checkpoint()


@dataclass(frozen=True)
class Answer:
    """A response as a client sees it; field names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def closes(self) -> bool:
        """Whether it says that the connection ends."""
        return self.headers.get("connection") == "close"


class MemoryClient:
    """A client that decides what leaves when."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._input = b""

    async def send(self, data: bytes, *, size: int | None = None) -> None:
        """Send ``data``, in pieces of ``size`` bytes if given."""
        for start in range(0, len(data), size or len(data) or 1):
            await self.stream.send_all(data[start : start + (size or len(data))])

    async def answer(self, *, to_head: bool = False) -> Answer:
        """Receive one response, an interim one too. ``to_head``: it has no body."""
        while b"\r\n\r\n" not in self._input:
            await self._receive()
        head, _, self._input = self._input.partition(b"\r\n\r\n")
        line, _, fields = head.partition(b"\r\n")
        version, status, _ = line.split(b" ", 2)
        assert version == b"HTTP/1.1"
        message = BytesHeaderParser().parsebytes(fields)
        headers = {name.lower(): value for name, value in message.items()}
        assert len(headers) == len(message.keys()), "a field is sent twice"
        length = 0 if to_head else int(headers.get("content-length", 0))
        while len(self._input) < length:
            await self._receive()
        body, self._input = self._input[:length], self._input[length:]
        return Answer(int(status), headers, body)

    async def _receive(self) -> None:
        data = await self.stream.receive_some()
        assert data, f"the server ended the connection; before it: {self._input!r}"
        self._input += data

    async def ends(self) -> bool:
        """Wait for the server's next word; returns whether it is the end of the connection."""
        return not self._input and not await self.stream.receive_some()

    async def exchange(self, data: bytes) -> Answer:
        """Send a request and receive its response."""
        await self.send(data)
        return await self.answer()


@asynccontextmanager
async def connected(
    serve: Serve, new_pair: NewPair = memory_stream_pair, *, patience: float = 120.0
) -> AsyncGenerator[MemoryClient, None]:
    """A client of ``serve``, which must return by itself once the client has hung up.

    A test that takes longer than ``patience``, in seconds of its clock, has failed.
    """
    client_stream, server_stream = new_pair()

    async def run() -> None:
        try:
            await serve(server_stream, PEER)
        finally:
            await trio.aclose_forcefully(server_stream)

    with trio.fail_after(patience):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield MemoryClient(client_stream)
            await trio.aclose_forcefully(client_stream)


def slow_upstream_pair() -> tuple[Stream, Stream]:
    """What the client sends stays with it until it is read; answers are buffered, as by TCP."""
    client_send, server_receive = lockstep_stream_one_way_pair()
    server_send, client_receive = memory_stream_one_way_pair()
    return (
        trio.StapledStream(client_send, client_receive),
        trio.StapledStream(server_send, server_receive),
    )
