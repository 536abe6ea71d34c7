"""The broker of this machine on a port of the lab's: there is no other way between the two."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

from tests.systemd.lab import Lab

READ_SIZE = 256 * 1024


class Bridge:
    """Passes connections to ``port`` of 127.0.0.1 in there to one of 127.0.0.1 out here."""

    def __init__(self, lab: Lab, port: int, target: int) -> None:
        with lab.network():
            self._listener = socket.create_server(("127.0.0.1", port))
        self._target = target
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        # Closing the listener ends it.
        with contextlib.suppress(OSError):
            while True:
                inside, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(inside,), daemon=True).start()

    def _connect(self, inside: socket.socket) -> None:
        with inside, socket.create_connection(("127.0.0.1", self._target)) as outside:
            back = threading.Thread(target=_pass, args=(outside, inside), daemon=True)
            back.start()
            _pass(inside, outside)
            back.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(READ_SIZE):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
