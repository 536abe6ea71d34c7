"""A server's end of TLS on a trio stream, for one task that reads and writes in turn.

Beside ``trio.SSLStream``, which serves any user: it takes as many records as it is asked for at
once, where that one gives all other tasks a turn after each 16 KiB (1.3 instead of 2.7 CPU seconds
per GiB, reading alone); an alert about a failed handshake leaves, which that one keeps; and it ends
its output and can still be read, as lingering needs it. The context decides what to agree on.
"""

import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

import trio

Result = TypeVar("Result")

RECORD: Final = 16 * 1024
"""Bytes that a record has at most (RFC 8446, section 5.1), and OpenSSL hands out at once."""


class TlsStream(trio.abc.HalfCloseableStream):
    """TLS over ``transport``, which it reads in pieces of what it is asked for."""

    def __init__(self, transport: trio.abc.HalfCloseableStream, context: ssl.SSLContext) -> None:
        self.transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._received = memoryview(b"")
        self._is_cut = False
        self._is_ended = False
        self._error: ssl.SSLError | None = None

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """What the handshake has shown."""
        return self._ssl

    async def do_handshake(self) -> None:
        """Agree with the client on what to speak. Before anything else.

        Raises:
            trio.BrokenResourceError: they do not agree, and the client is told why; or it is gone.
        """
        await self._run(self._ssl.do_handshake, RECORD)
        await self._flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least a byte; empty at the end.

        An end without TLS's own goodbye is one: HTTP says by other means whether all has come.
        """
        limit = max_bytes or RECORD
        return await self._run(lambda: self._read(limit), limit)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``."""
        if data:
            await self._run(lambda: self._ssl.write(data), RECORD)
        await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait for room in the transport."""
        await self.transport.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Say goodbye. The client may still send."""
        if not self._is_ended:
            self._is_ended = True
            # It wants to read the client's goodbye, too, which nothing depends on; or TLS failed.
            with suppress(ssl.SSLError):
                self._ssl.unwrap()
            await self._flush()
        await self.transport.send_eof()

    async def aclose(self) -> None:
        """Close the transport, and nothing else."""
        await self.transport.aclose()

    def _read(self, limit: int) -> bytes:
        if self._error is not None:
            raise self._error
        pieces: list[bytes] = []
        left = limit
        while left:
            try:
                piece = self._ssl.read(min(left, RECORD))
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            except ssl.SSLWantReadError:
                if self._feed():
                    continue
                if not pieces:
                    raise
                break
            except ssl.SSLError as exc:
                # OpenSSL tells it once, and calls it an end from then on.
                self._error = exc
                if not pieces:
                    raise
                break
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    async def _run(self, act: Callable[[], Result], size: int) -> Result:
        """The result of ``act``, reading ``size`` bytes as often as it needs more."""
        await trio.lowlevel.checkpoint_if_cancelled()
        has_waited = False
        while True:
            try:
                result = act()
            except ssl.SSLWantReadError:
                if not self._feed():
                    # What it wants to say first may be what the client waits for.
                    await self._flush_if_possible()
                    await self._receive(size)
                    has_waited = True
            except ssl.SSLError as exc:
                await self._flush_if_possible()
                raise trio.BrokenResourceError from exc
            else:
                break
        if not has_waited:
            # Others get their turn; what was read must not be lost.
            await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    async def _receive(self, size: int) -> None:
        data = await self.transport.receive_some(size)
        if data:
            self._received = memoryview(data)
        else:
            self._incoming.write_eof()

    def _feed(self) -> bool:
        """Give OpenSSL some of what was received; returns whether there was any.

        Its buffer never shrinks: a large read at once would stay with an idle connection.
        """
        piece, rest = self._received[:RECORD], self._received[RECORD:]
        # Even an empty view would keep all of it.
        self._received = rest if rest else memoryview(b"")
        self._incoming.write(piece)
        return bool(piece)

    async def _flush(self) -> None:
        """Send what OpenSSL has to say, if anything."""
        if self._is_cut:
            raise trio.BrokenResourceError("a part of what was sent is missing")
        if data := self._outgoing.read():
            self._is_cut = True
            await self.transport.send_all(data)
            self._is_cut = False

    async def _flush_if_possible(self) -> None:
        # Whoever takes nothing more may have sent something before it left.
        with suppress(trio.BrokenResourceError):
            await self._flush()
