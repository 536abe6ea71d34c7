"""What no service that publishes with pika exceeds: relay's frames from memory, no HTTP at all.

pika's SelectConnection with as many frames unconfirmed as one upload of relay's may have. The
frames have the properties and headers that relay gives them; what they carry is one buffer, again
and again, whose checksum is taken once: that is the service's work, not the client library's.

A program, so that its CPU time is its own:
``python -m tests.bench.peers.ceiling URL EXCHANGE ROUTING_KEY BYTES``.
"""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import google_crc32c
import pika
from pika.channel import Channel
from pika.connection import Connection
from pika.frame import Method

from relay.model import Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol.wire import encode_frame
from tests.bench.peers.destination import MESSAGE_BYTES, WINDOW, NotConfirmed
from tests.bench.peers.pika_publisher import settle
from tests.bench.peers.process import ROOT
from tests.observed_receiver import properties_of

PERSISTENT: Final = 2


def run(url: str, exchange: str, routing_key: str, size_bytes: int) -> tuple[float, float]:
    """Publishes so many bytes in a process of its own.

    Returns:
        Wall and CPU seconds, from the first frame to the last confirm; of connecting, nothing.

    Raises:
        NotConfirmed: the broker did not take it all.
    """
    command = [sys.executable, "-m", __name__, url, exchange, routing_key, str(size_bytes)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise NotConfirmed(done.stderr.decode(errors="replace"))
    wall, cpu = json.loads(done.stdout)
    return wall, cpu


def frames(size_bytes: int) -> Iterator[Frame]:
    """The frames of an upload of one file of so many bytes, at least one."""
    transfer = Transfer(
        id="019387a0-0000-7000-8000-000000000000", began=int(time.time()), route="bench"
    )
    body = bytes(MESSAGE_BYTES)
    crc32c = google_crc32c.value(body)
    count = -(-size_bytes // MESSAGE_BYTES)
    for seq in range(count):
        offset = seq * MESSAGE_BYTES
        head = tail = commit = None
        if seq == 0:
            head = PartHead(name="f", filename="x.bin", content_type="application/octet-stream")
        if seq == count - 1:
            body = body[: size_bytes - offset]
            crc32c = google_crc32c.value(body)
            tail = PartTail(size_bytes, {"crc32c": f"{crc32c:08x}"})
            commit = Totals(count, 1, size_bytes)
        yield Frame(transfer, seq, 0, offset, body, crc32c, head, tail, commit)


class _Publication:
    """Publishes frames as confirms make room for them, then closes the connection."""

    def __init__(self, url: str, exchange: str, routing_key: str, size_bytes: int) -> None:
        self._exchange = exchange
        self._routing_key = routing_key
        self._frames = frames(size_bytes)
        self._published = 0
        self._unconfirmed: deque[int] = deque()
        self._ended = False
        self._failure: str | None = None
        self._began = (0.0, 0.0)
        self.took: tuple[float, float] | None = None
        self._connection = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=self._connected,
            on_open_error_callback=self._on_close,
            on_close_callback=self._on_close,
        )
        self._connection.ioloop.start()

    def failure(self) -> str | None:
        """Why not all was confirmed."""
        return self._failure if self.took is None else None

    def _connected(self, connection: Connection) -> None:
        connection.channel(on_open_callback=self._opened)

    def _opened(self, channel: Channel) -> None:
        channel.add_on_return_callback(lambda *_: self._fail("unroutable"))
        channel.add_on_close_callback(lambda _, reason: self._fail(str(reason)))
        channel.confirm_delivery(
            lambda frame: self._on_confirm(channel, frame), lambda _: self._begin(channel)
        )

    def _begin(self, channel: Channel) -> None:
        self._began = _clocks()
        self._fill(channel)

    def _fill(self, channel: Channel) -> None:
        while not self._ended and len(self._unconfirmed) < WINDOW:
            frame = next(self._frames, None)
            if frame is None:
                self._ended = True
                break
            message = encode_frame(frame)
            channel.basic_publish(
                self._exchange,
                self._routing_key,
                message.body,
                properties_of(message, delivery_mode=PERSISTENT),
                mandatory=not self._exchange,
            )
            self._published += 1
            self._unconfirmed.append(self._published)

    def _on_confirm(self, channel: Channel, frame: Method[Any]) -> None:
        confirm: Any = frame.method
        if isinstance(confirm, pika.spec.Basic.Nack):
            self._fail("rejected")
            return
        settle(self._unconfirmed, confirm)
        self._fill(channel)
        if self._ended and not self._unconfirmed and self._failure is None:
            wall, cpu = _clocks()
            self.took = wall - self._began[0], cpu - self._began[1]
            channel.connection.close()

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        if self._connection.is_open:
            self._connection.close()

    def _on_close(self, connection: Connection, reason: BaseException) -> None:
        self._failure = self._failure or str(reason)
        connection.ioloop.stop()


def _clocks() -> tuple[float, float]:
    """Seconds of the wall's clock, and of CPU that this process has used."""
    times = os.times()
    return time.perf_counter(), times.user + times.system


def _main() -> int:
    url, exchange, routing_key, size = sys.argv[1:]
    publication = _Publication(url, exchange, routing_key, int(size))
    if publication.took is None:
        print(publication.failure(), file=sys.stderr)
        return 1
    print(json.dumps(publication.took))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
