"""One HTTP/1.1 connection: h11 over a trio stream, under deadlines.

Gives its user request heads, body bytes and a way to respond, and decides when the connection can
be used again. Every head and every chunked body passes relay's own strict checks before h11 sees
it. It knows nothing of uploads.

The deadlines are about the client: they run only while this module waits for it. When an upload
waits for the broker nobody calls ``receive``, and no clock runs against the client.
"""

import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Final

import h11
import trio

from relay.config import HttpConfig
from relay.errors import BadRequest, ClientGone, TooSlow
from relay.protocol.chunked import ChunkedValidator
from relay.protocol.head import Field, HeadReader, RawHead, check_head
from relay.protocol.request import RequestHead
from relay.server.idle import Idle
from relay.server.responses import Response

READ_SIZE: Final = 64 * 1024
"""Bytes asked of the socket at once, unless the reader of a body asks for more."""

SMALL_READ_SIZE: Final = 16 * 1024
"""Likewise for heads, and for what is discarded: connections that are no uploads hold no more."""

KNOWN_HEAD_MAX: Final = 1024
"""Bytes of a head that is remembered while its connection lasts: more than most clients send."""

LINGER_TIMEOUT: Final = 10.0
LINGER_IDLE: Final = 2.0
"""Seconds for which, in all and without a byte, input is discarded after a last response."""

Understand = Callable[[bytes, bytes, list[Field], bytes], RequestHead]
"""Makes a request of the items of a ``RawHead``, or raises ClientError; of nothing else."""

_CONTINUE: Final = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")


class HttpConnection:
    """A client's connection, for one request after the other.

    Attributes:
        awaits_response: whether a request has begun to arrive, and its last response has not.
        read_was_full: whether the last read of a body brought all that it had asked for.
    """

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        config: HttpConfig,
        idle: Idle | None = None,
    ) -> None:
        """``idle`` may end the waits for further requests, as if the client had ended them."""
        self._stream = stream
        self._config = config
        self._idle = idle or Idle()
        self._h11 = h11.Connection(h11.SERVER)
        self._unread = b""
        self._head = b""
        # The last head, and what it asks for; never shared between connections.
        self._known_head = b""
        self._known: RequestHead | None = None
        self._heads = 0
        self._is_head = False
        self.awaits_response = False
        self.read_was_full = False
        # Of the body in progress:
        self._waits_for_100 = False
        self._left = 0
        self._chunked: ChunkedValidator | None = None
        self._waited = 0.0
        self._received = 0

    async def next_request(self, understand: Understand) -> RequestHead | None:
        """Read a request's head, and prepare ``receive`` for its body. None: nothing comes.

        A head that is byte for byte the last one means what that meant: most clients of many small
        uploads send the same again. Each other one goes through ``understand``, and through h11.

        Raises what ``next_head``, ``understand`` and ``begin_body`` do.
        """
        if not await self._gather_head():
            return None
        if self._known is not None and self._head == self._known_head:
            self._begin_body(self._known.content_length)
            return self._known
        bytes_read = self._head
        request = understand(*self._check_head())
        self.begin_body(request.content_length)
        # Not those in whose exchange h11 takes part later.
        if len(bytes_read) <= KNOWN_HEAD_MAX and not (request.chunked or request.expect_continue):
            self._known_head, self._known = bytes_read, request
        return request

    async def next_head(self) -> RawHead | None:
        """Read a request head. None: there is no further request.

        Raises:
            ClientError: it is not acceptable HTTP; the connection must be closed.
            ClientGone: the client left in the middle of it.
        """
        return self._check_head() if await self._gather_head() else None

    def _check_head(self) -> RawHead:
        raw = check_head(self._head, max_headers=self._config.max_headers)
        self._is_head = raw.method == b"HEAD"
        return raw

    async def _gather_head(self) -> bool:
        """Read a head's bytes into ``_head``; False if no further request comes."""
        self._is_head = False
        is_first = self._heads == 0
        self._heads += 1
        timeout = self._config.header_timeout if is_first else self._config.keep_alive_timeout
        deadline = trio.current_time() + timeout
        if not self._unread and not await self._read_head(deadline, started=False):
            return False
        if self._known is not None and self._unread.startswith(self._known_head):
            # As the reader would have it: a head ends with the first empty line in it.
            self.awaits_response = True
            self._head, self._unread = self._known_head, self._unread[len(self._known_head) :]
            return True
        reader = HeadReader(max_bytes=self._config.max_header_bytes)
        while not reader.done:
            if not self._unread and not await self._read_head(deadline, started=reader.started):
                return False
            self.awaits_response = True
            had_started = reader.started
            self._unread = self._unread[reader.feed(self._unread) :]
            if reader.started and not had_started:
                deadline = trio.current_time() + self._config.header_timeout
        self._head = reader.head
        return True

    async def _read_head(self, deadline: float, *, started: bool) -> bool:
        """Fill ``_unread``; False if the client ended or sat out the time between requests."""
        waiting = trio.move_on_at if started else self._idle.until
        with waiting(deadline) as scope:
            self._unread = await self._receive_some(SMALL_READ_SIZE)
        if scope.cancelled_caught:
            if started:
                raise TooSlow("the request's headers took too long")
            return False
        if not self._unread and started:
            raise ClientGone("the client left in the middle of a request's headers")
        return bool(self._unread)

    # --- the body ------------------------------------------------------------------------------

    def begin_body(self, content_length: int | None) -> None:
        """Prepare ``receive`` for a body of that many bytes, or a chunked one (None).

        Raises:
            BadRequest: h11 finds something wrong with the head.
        """
        # One h11 connection per request: with pipelined input kept on our side, nothing of one
        # request can reach the next.
        self._h11 = h11.Connection(h11.SERVER, self._config.max_header_bytes * 2)
        # Not before its user has understood the head, whose errors are more precise than h11's.
        self._h11.receive_data(self._head)
        try:
            self._h11.next_event()
        except h11.RemoteProtocolError as exc:
            raise BadRequest(f"malformed request: {exc}") from exc
        self._begin_body(content_length)
        self._waits_for_100 = self._h11.they_are_waiting_for_100_continue

    def _begin_body(self, content_length: int | None) -> None:
        self._head = b""
        self._waits_for_100 = False
        self._waited = 0.0
        self._received = 0
        self.read_was_full = False
        self._left = content_length or 0
        self._chunked = None
        if content_length is None:
            self._chunked = ChunkedValidator(
                max_trailer_bytes=self._config.max_header_bytes,
                max_trailers=self._config.max_headers,
            )

    @property
    def body_read(self) -> bool:
        """Whether the body has been received to its end."""
        return not self._left and self._chunked is None

    @property
    def reusable(self) -> bool:
        """Whether a further request may follow the one in progress, as far as it is known here."""
        return self.body_read and self._heads < self._config.keep_alive_requests

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        """The next bytes of the body, at most ``max_bytes``; empty at its end.

        Raises:
            BadRequest, HeadersTooLarge: the chunked coding is not acceptable.
            TooSlow: the client missed a deadline.
            ClientGone: the client left before the end.
        """
        if self.body_read:
            return b""
        if self._chunked is not None:
            return await self._receive_chunked(self._chunked, max_bytes)
        # A body with a Content-Length is its own bytes: h11 would only copy them three times.
        data = await self._read_body(max_bytes)
        if len(data) > self._left:
            data, self._unread = data[: self._left], data[self._left :]
        self._left -= len(data)
        return data

    async def _receive_chunked(self, validator: ChunkedValidator, max_bytes: int) -> bytes:
        while True:
            data = self._decoded()
            if data or self._chunked is None:
                return data
            coded = await self._read_body(max_bytes)
            used = validator.feed(coded)
            self._unread = coded[used:]
            self._h11.receive_data(coded[:used])
            if self._unread:
                # Of very many chunks: they were counted, and others have had to wait for them.
                self._received -= len(self._unread)
                await trio.lowlevel.checkpoint()

    def _decoded(self) -> bytes:
        """The data of all chunks that have been taken, as one; notes the body's end."""
        found: list[bytes] = []
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as exc:
                raise BadRequest(f"malformed chunked body: {exc}") from exc
            if isinstance(event, h11.Data):
                found.append(event.data)
                continue
            if isinstance(event, h11.EndOfMessage):
                # Not h11's state: where the client offered an upgrade, it would wait for our yes.
                self._chunked = None
            return b"".join(found)

    async def _read_body(self, max_bytes: int) -> bytes:
        if self._unread:
            data, self._unread = self._unread, b""
            self._received += len(data)
            return data
        config = self._config
        began = trio.current_time()
        with trio.move_on_at(began + config.body_idle_timeout) as scope:
            data = await self._receive_some(max_bytes)
        if scope.cancelled_caught:
            raise TooSlow(f"no byte of the body for {config.body_idle_timeout:g} s")
        if not data:
            raise ClientGone("the client left before the end of its body")
        self._waited += trio.current_time() - began
        self.read_was_full = len(data) == max_bytes
        self._received += len(data)
        if (
            self._waited > config.min_body_rate_grace
            and self._received < config.min_body_rate * self._waited
        ):
            raise TooSlow(f"the body came at less than {config.min_body_rate} bytes per second")
        return data

    async def _receive_some(self, max_bytes: int) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as exc:
            raise ClientGone("the client's connection broke") from exc

    # --- responses -----------------------------------------------------------------------------

    async def send_continue(self) -> None:
        """Send 100 (Continue), if the client waits for it."""
        if self._waits_for_100 and not self._unread:
            self._waits_for_100 = False
            await self._send(self._h11.send(_CONTINUE))

    async def respond(self, response: Response, *, close: bool) -> None:
        """Send a final response; with ``close``, end the connection so that it is received.

        Raises:
            ClientGone: the client does not take it.
        """
        self.awaits_response = False
        head = _response_head(
            response.status,
            response.content_type,
            len(response.body),
            tuple(response.headers.items()),
            is_last=close,
            second=int(time.time()),
        )
        await self._send(head if self._is_head else head + response.body)
        if close:
            await self._linger()

    async def _send(self, data: bytes) -> None:
        with trio.move_on_after(self._config.body_idle_timeout) as scope:
            try:
                await self._stream.send_all(data)
            except trio.BrokenResourceError as exc:
                raise ClientGone("the client's connection broke") from exc
        if scope.cancelled_caught:
            raise ClientGone("the client did not take the response")

    async def _linger(self) -> None:
        # Nothing is kept while it lasts: a client that is not served must not cost a read buffer.
        self._unread = b""
        self._h11 = h11.Connection(h11.SERVER)
        await linger(self._stream)


@lru_cache(maxsize=128)
def _response_head(
    status: int,
    content_type: str,
    length: int,
    fields: tuple[tuple[str, str], ...],
    *,
    is_last: bool,
    second: int,
) -> bytes:
    """A response's head: within a second the same for very many, and none of it is a client's."""
    headers = [
        ("Date", formatdate(second, usegmt=True)),
        ("Server", "relay"),
        ("Content-Type", content_type),
        ("Content-Length", str(length)),
        *fields,
    ]
    if is_last:
        headers.append(("Connection", "close"))
    reason = HTTPStatus(status).phrase.encode("ascii")
    head = h11.Response(status_code=status, headers=headers, reason=reason)
    return h11.Connection(h11.SERVER).send(head) or b""


async def linger(stream: trio.abc.HalfCloseableStream) -> None:
    """End a connection's output, and discard its input for a while (RFC 9112, section 9.6).

    Closing with unread input makes the kernel send a reset, which can reach the client before
    what was sent last and erase it.
    """
    with trio.move_on_after(LINGER_TIMEOUT):
        try:
            await stream.send_eof()
            goes_on = True
            while goes_on:
                goes_on = False
                with trio.move_on_after(LINGER_IDLE):
                    goes_on = bool(await stream.receive_some(SMALL_READ_SIZE))
        except trio.BrokenResourceError:
            return
