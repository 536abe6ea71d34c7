"""Clients that take their time: heads and bodies a byte at a time, many on one thread.

What slowhttptest does (slowloris and "R U dead yet"), with the pace in the caller's hands, and
connected again as often as they are shaken off.
"""

import selectors
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

HEADS: Final = (
    b"POST /upload/plain HTTP/1.1\r\nHost: relay.test\r\nX-Slow: " + b"x" * 4000,
    b"POST /upload/plain HTTP/1.1\r\nHost: relay.test\r\nContent-Length: 100000\r\n\r\n"
    + b"x" * 4000,
)
"""Each goes out in full up to its last thousands of bytes, and then a byte at a time."""

AT_ONCE: Final = (60, 90)
"""Bytes of each of them that are sent at once: of the one not its head, of the other all of it."""


class SlowClients:
    """So many connections that never end by themselves; a context manager.

    One in two stays within its head, the other within its body.

    Attributes:
        reconnects: times that one of them was shaken off, and came again.
    """

    def __init__(self, address: tuple[str, int], count: int, *, pause: float = 1.0) -> None:
        """Each of ``count`` sends a byte every ``pause`` seconds."""
        self.reconnects = 0
        self._address = address
        self._count = count
        self._pause = pause
        self._selector = selectors.DefaultSelector()
        self._sent: dict[socket.socket, tuple[int, int]] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _connect(self, kind: int) -> None:
        client = socket.create_connection(self._address)
        client.setblocking(False)
        self._selector.register(client, selectors.EVENT_READ)
        self._sent[client] = (kind, self._say(client, HEADS[kind][: AT_ONCE[kind]]))

    def _say(self, client: socket.socket, data: bytes) -> int:
        # Whoever is shaken off finds out by what there is to read.
        with suppress(BlockingIOError, ConnectionError):
            return client.send(data)
        return 0

    def _run(self) -> None:
        while not self._is_over.wait(self._pause):
            for client, (kind, sent) in list(self._sent.items()):
                self._sent[client] = (kind, sent + self._say(client, HEADS[kind][sent : sent + 1]))
            for key, _ in self._selector.select(0):
                assert isinstance(key.fileobj, socket.socket)
                self._replace(key.fileobj)

    def _replace(self, client: socket.socket) -> None:
        """It has been answered, or dropped: either way it comes again."""
        kind, _ = self._drop(client)
        self.reconnects += 1
        self._connect(kind)

    def _drop(self, client: socket.socket) -> tuple[int, int]:
        self._selector.unregister(client)
        client.close()
        return self._sent.pop(client)

    def __enter__(self) -> Self:
        for number in range(self._count):
            self._connect(number % len(HEADS))
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()
        for client in list(self._sent):
            self._drop(client)
        self._selector.close()
