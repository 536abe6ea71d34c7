"""One request and its response: HTTP/1.1 through h11, over a trio stream.

Sends a body while it watches for the response, because a server that refuses an upload says so
before it has read it. Every wait has a deadline. Where streams and bodies come from, and what an
answer means, is for others to know.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import h11
import trio

from relay.tls import explain, is_refusal

EXPECT_FROM: Final = 1 << 20
"""Bytes of a body from which on it is worth asking first (as curl does)."""

CONTINUE_TIMEOUT: Final = 1.0
"""Seconds to wait for 100 (Continue): not all servers know it (RFC 9110, section 10.1.1)."""

PATIENCE: Final = 300.0
"""Seconds for the server to take one block of the body, and to answer after its last byte: above
the sum of a daemon's default grace periods, and of 256 KiB at its least rate, 1 KiB/s."""

LAST_WORDS: Final = 10.0
"""Seconds in which an answer is read from a server that takes no more."""

READ_SIZE: Final = 64 * 1024
MAX_HEAD: Final = 64 * 1024
MAX_ANSWER: Final = 4 * 1024 * 1024
"""Bytes of a response's body: a receipt has at most 100 parts and 16 Ki characters of names."""

_OWN_FIELDS: Final = [("User-Agent", "relay-send"), ("Connection", "close")]


class Lost(Exception):
    """There is no answer, and it is not known what became of the request: send it again."""


class Unusable(Exception):
    """The other end is none to send to: it is not trusted, or does not speak HTTP."""


class Unsendable(Exception):
    """The body cannot be read to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A POST.

    Attributes:
        target: origin form: an absolute path.
        host: for the Host field.
        fields: further ones, but those of framing.
        length: bytes of the body; None if that is not known before its end.
    """

    target: str
    host: str
    fields: Sequence[tuple[str, str]]
    length: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A final response; field names are in lower case."""

    status: int
    fields: Mapping[str, str]
    body: bytes


ReadBody = Callable[[], Awaitable[bytes]]
"""Returns the next block of the body, and ``b""`` at its end. May raise Unsendable."""


async def exchange(
    stream: trio.abc.Stream,
    request: Request,
    read_body: ReadBody,
    on_sent: Callable[[], None],
) -> Answer:
    """Send a request, return the response. The stream is of no more use afterwards.

    If the response comes before the body has been sent, nothing more of the body is read.

    Args:
        stream: to the server.
        request: its head.
        read_body: gives exactly ``request.length`` bytes, if that is not None.
        on_sent: called after each block that was sent.

    Raises:
        Lost: the connection broke, or the server missed a deadline.
        Unusable: the response is not HTTP, or over the limits.
        Unsendable: from ``read_body``.
    """
    return await _Exchange(stream, read_body, on_sent).run(request)


class _Exchange:
    def __init__(
        self, stream: trio.abc.Stream, read_body: ReadBody, on_sent: Callable[[], None]
    ) -> None:
        self._stream = stream
        self._read_body = read_body
        self._on_sent = on_sent
        self._h11 = h11.Connection(h11.CLIENT, MAX_HEAD)
        self._may_send = trio.Event()
        self._sending = trio.CancelScope()
        self._receiving = trio.CancelScope()
        self._outcome: Answer | Exception | None = None
        self._if_late = f"no answer within {PATIENCE:g} s"

    async def run(self, request: Request) -> Answer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, request)
            nursery.start_soon(self._receive)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def _settle(self, outcome: Answer | Exception) -> None:
        """Note how the exchange ended, if that is not known yet, and end it."""
        if self._outcome is None:
            self._outcome = outcome
        self._sending.cancel()
        self._receiving.cancel()

    # --- the request ---------------------------------------------------------------------------

    async def _send(self, request: Request) -> None:
        with self._sending:
            try:
                await self._send_head(request)
                await self._send_body()
                self._receiving.deadline = trio.current_time() + PATIENCE
            except trio.BrokenResourceError:
                # The server may have answered before it closed: the receiver finds out.
                self._if_late = "the connection broke before an answer came"
                self._receiving.deadline = trio.current_time() + LAST_WORDS
            except (Lost, Unsendable) as exc:
                self._settle(exc)

    async def _send_head(self, request: Request) -> None:
        length = request.length
        fields = [("Host", request.host), *_OWN_FIELDS, *request.fields]
        if length is None:
            fields.append(("Transfer-Encoding", "chunked"))
        else:
            fields.append(("Content-Length", str(length)))
        expects = length is None or length >= EXPECT_FROM
        if expects:
            fields.append(("Expect", "100-continue"))
        await self._write(h11.Request(method="POST", target=request.target, headers=fields))
        if expects:
            with trio.move_on_after(CONTINUE_TIMEOUT):
                await self._may_send.wait()

    async def _send_body(self) -> None:
        while block := await self._read_body():
            await self._write(h11.Data(data=block))
            self._on_sent()
        await self._write(h11.EndOfMessage())

    async def _write(self, event: h11.Event) -> None:
        data = self._h11.send(event)
        if not data:
            return
        with trio.move_on_after(PATIENCE) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise Lost(f"the server took nothing for {PATIENCE:g} s")

    # --- the response --------------------------------------------------------------------------

    async def _receive(self) -> None:
        with self._receiving:
            try:
                self._settle(await self._answer())
            except (Lost, Unusable) as exc:
                self._settle(exc)
        # Either there is an outcome, or the deadline has passed.
        self._settle(Lost(self._if_late))

    async def _answer(self) -> Answer:
        response: h11.Response | None = None
        body = bytearray()
        while True:
            event = await self._next_event()
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == 100:
                    self._may_send.set()
            elif isinstance(event, h11.Response):
                # Whatever it says, the rest of the body is of no interest to the server.
                self._sending.cancel()
                self._receiving.deadline = trio.current_time() + PATIENCE
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_ANSWER:
                    raise Unusable("the server's answer is too long")
            else:
                assert response is not None
                return Answer(
                    status=response.status_code,
                    fields={k.decode(): v.decode("latin-1") for k, v in response.headers},
                    body=bytes(body),
                )

    async def _next_event(self) -> h11.Event:
        at_end = False
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as exc:
                if at_end:
                    raise Lost("the server closed the connection without an answer") from exc
                raise Unusable(f"the server does not speak HTTP/1.1: {exc}") from exc
            if isinstance(event, h11.Event):
                return event
            data = await self._read()
            at_end = not data
            self._h11.receive_data(data)

    async def _read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_SIZE))
        except trio.BrokenResourceError as exc:
            cause = exc.__cause__
            # With TLS 1.3 a server refuses our certificate when we think the handshake done.
            if isinstance(cause, Exception) and is_refusal(cause):
                raise Unusable(f"no TLS with the server: {explain(cause, 'the server')}") from exc
            raise Lost("the connection broke before an answer came") from exc
