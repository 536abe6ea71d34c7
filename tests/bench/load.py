"""Clients that upload as fast as they are let, in a process of their own.

``sendall`` of 1 MiB pieces, one thread for each upload at a time: what a client costs beyond the
kernel's copying is next to nothing, and is told, so that it can be seen not to be the limit. A
client hears the answer's first line and closes; what else is in it is for tests.
"""

import multiprocessing
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from random import Random
from types import TracebackType
from typing import Final, Self

from tests.bench.systems import System

KINDS: Final = ("file", "field", "raw")
"""A form with one file, a form with one plain field, a body as it is."""

BOUNDARY: Final = "----WebKitFormBoundary7MA4YWxkTrZu0gW9"
DISPOSITIONS: Final = {
    "file": 'Content-Disposition: form-data; name="f"; filename="x.bin"\r\n'
    "Content-Type: application/octet-stream",
    "field": 'Content-Disposition: form-data; name="f"',
}

PIECE: Final = 1 << 20
PATIENCE: Final = 300.0
"""Seconds for a server to take or give bytes; a client that waits longer has failed."""

FLOWS: Final = 32 * PIECE
"""Bytes after which a large upload is under way."""

_SPAWN = multiprocessing.get_context("spawn")


class LoadFailed(Exception):
    """An upload was not answered as it should be; the text has what was said."""


@dataclass(frozen=True)
class Job:
    """Uploads to one address: ``clients`` at once, each ``uploads`` one after the other.

    ``size`` is of each body, without what is sent before and after it.
    """

    address: tuple[str, int]
    size: int
    before: bytes = b""
    after: bytes = b""
    clients: int = 1
    uploads: int = 1
    is_text: bool = False
    half_close: bool = False
    """Say that this was all by the socket, for who knows no HTTP."""


@dataclass(frozen=True)
class Spent:
    """Wall and CPU seconds of the clients."""

    wall: float
    cpu: float


def form_around(kind: str) -> tuple[str, bytes, bytes]:
    """Content-Type, and what comes before and after the bytes of a body of that kind."""
    if kind == "raw":
        return "application/octet-stream", b"", b""
    before = f"--{BOUNDARY}\r\n{DISPOSITIONS[kind]}\r\n\r\n".encode()
    return (
        f"multipart/form-data; boundary={BOUNDARY}",
        before,
        f"\r\n--{BOUNDARY}--\r\n".encode(),
    )


def job_for(
    system: System, kind: str, size: int, *, clients: int = 1, uploads: int = 1, header: str = ""
) -> Job:
    """Uploads of a kind to a system; ``header`` is a further line of the head."""
    content_type, before, after = form_around(kind)
    lines = [
        f"POST {system.path} HTTP/1.1",
        f"Host: {system.address[0]}:{system.address[1]}",
        "Connection: close",
        f"Content-Type: {content_type}",
        f"Content-Length: {size + len(before) + len(after)}",
        *([header] if header else []),
    ]
    head = ("\r\n".join([*lines, "", ""])).encode()
    return Job(
        system.address, size, head + before, after, clients, uploads, is_text=kind == "field"
    )


def piece_of(*, text: bool) -> bytes:
    """A piece of any file, in which a parser that looks for line ends finds some; or of text."""
    block = Random(1).randbytes(PIECE)
    letters = b"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789"
    return block.translate(letters * 4) if text else block


def upload(job: Job, piece: memoryview) -> None:
    """One, to its answer."""
    with socket.create_connection(job.address, timeout=PATIENCE) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        client.sendall(job.before)
        for _ in range(job.size // len(piece)):
            client.sendall(piece)
        client.sendall(piece[: job.size % len(piece)])
        client.sendall(job.after)
        if job.half_close:
            client.shutdown(socket.SHUT_WR)
        answer = client.recv(65536)
    if not answer.startswith((b"HTTP/1.1 2", b"done")):
        raise LoadFailed(answer.decode(errors="replace"))


def run(job: Job, piece: memoryview) -> Spent:
    """All of a job."""

    def client(_: int) -> None:
        for _ in range(job.uploads):
            upload(job, piece)

    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(job.clients) as pool:
        list(pool.map(client, range(job.clients)))
    return Spent(time.perf_counter() - began, time.process_time() - cpu)


def _serve(commands: Connection) -> None:
    pieces = {text: memoryview(piece_of(text=text)) for text in (False, True)}
    while True:
        job = commands.recv()
        try:
            commands.send(run(job, pieces[job.is_text]))
        except (LoadFailed, OSError) as exc:
            commands.send(LoadFailed(f"an upload to {job.address} failed: {exc}"))


class Load:
    """The clients' process; a context manager."""

    def __enter__(self) -> Self:
        self._commands, there = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._commands.close()

    def run(self, job: Job) -> Spent:
        """What the job cost its clients.

        Raises:
            LoadFailed: an upload was not answered as it should be.
        """
        self._commands.send(job)
        said: Spent | LoadFailed = self._commands.recv()
        if isinstance(said, LoadFailed):
            raise said
        return said


def _upload_on(job: Job, is_over: Event, told: Connection) -> None:
    """The same upload again and again; what was sent is told once it flows, and at the end."""
    piece = memoryview(piece_of(text=job.is_text))
    sent, began = 0, 0.0
    while not is_over.is_set():
        with socket.create_connection(job.address, timeout=PATIENCE) as client:
            client.sendall(job.before)
            for _ in range(job.size // len(piece)):
                if is_over.is_set():
                    break
                client.sendall(piece)
                sent += len(piece)
                if sent == FLOWS:
                    began = time.perf_counter()
                    told.send(None)
            else:
                client.sendall(job.after)
                client.recv(65536)
    told.send((sent - FLOWS) / (time.perf_counter() - began))


class Upload:
    """A large upload for the block's length, in a process of its own; a context manager.

    The last one is cut off at the block's end.

    Attributes:
        rate: bytes per second, known after the block.
    """

    def __init__(self, job: Job) -> None:
        """``job`` is sent by one client, and again if it comes to its end."""
        self.rate = 0.0
        self._is_over = _SPAWN.Event()
        self._told, there = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(
            target=_upload_on, args=(job, self._is_over, there), daemon=True
        )

    def __enter__(self) -> Self:
        """It flows when this returns."""
        self._process.start()
        self._hear()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        try:
            if exc_type is None:
                self.rate = self._hear() or 0.0
        finally:
            self._process.kill()
            self._process.join()
            self._told.close()

    def _hear(self) -> float | None:
        if not self._told.poll(PATIENCE):
            raise LoadFailed("a large upload stands still")
        try:
            said: float | None = self._told.recv()
        except EOFError:
            raise LoadFailed("a large upload failed; what its process said is above") from None
        return said
