"""``relay demo``: the whole path on this machine, with figures at the end.

A private RabbitMQ node, a daemon and a receiver, each a process of its own; one upload through
them; everything gone afterwards, also after Ctrl-C. It uses what a user would use: HTTP, the
commands, /proc.
"""

import contextlib
import hashlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import quote

from tqdm import tqdm

from relay.demo.daemon import Daemon, DaemonFailed
from relay.demo.rabbitmq import RabbitMQFailed, RabbitMQMissing, RabbitMQNode

MADE_UP: Final = 256 << 20
"""Bytes uploaded if no file is given."""

PIECE: Final = 1 << 20
QUEUE: Final = "uploads"


class DemoFailed(Exception):
    """The demo did not show what it should. One line."""


@dataclass(frozen=True)
class Source:
    """What is uploaded: a name, a size in bytes, and the bytes again and again the same."""

    name: str
    size: int
    path: Path | None = None

    def pieces(self) -> Iterator[bytes]:
        """The bytes, up to PIECE at a time."""
        if self.path is None:
            yield from _made_up(self.size)
            return
        with self.path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece


def _made_up(size: int) -> Iterator[bytes]:
    """Random bytes that differ from piece to piece and cost next to nothing."""
    noise = os.urandom(PIECE)
    for number in range(size // PIECE):
        yield number.to_bytes(8) + noise[8:]


def demo(path: Path | None) -> int:
    """Run the demo with ``path``, or with bytes made up. Returns the exit code."""
    try:
        _run(_source(path))
    except (DemoFailed, DaemonFailed, RabbitMQMissing, RabbitMQFailed) as exc:
        print(f"relay demo: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("relay demo: interrupted; everything is stopped and removed", file=sys.stderr)
        return 130
    return 0


def _source(path: Path | None) -> Source:
    if path is None:
        return Source("made-up.bin", MADE_UP)
    if not path.is_file():
        raise DemoFailed(f"{path}: not a file")
    return Source(path.name, path.stat().st_size, path)


def _run(source: Source) -> None:
    with contextlib.ExitStack() as stack:
        directory = Path(
            # Not in memory, as /tmp often is.
            stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-demo-", dir="/var/tmp"))
        )
        _say("starting a private RabbitMQ node")
        node = stack.enter_context(RabbitMQNode())
        _say(f"starting the daemon, which speaks AMQP to 127.0.0.1:{node.port}")
        daemon = stack.enter_context(Daemon(node.url, directory=directory))
        written = daemon.io("write_bytes")
        output = directory / "received"
        receiver = stack.enter_context(_receiver(node.url, output))
        _say(f"PUT {daemon.url}/upload/{quote(source.name)}")
        began = time.monotonic()
        receipt, digest = _upload(daemon.address, source)
        seconds = time.monotonic() - began
        _say("relay receive puts it together again")
        if receiver.wait() != 0:
            raise DemoFailed("relay receive failed; its messages are above")
        seconds_in_all = time.monotonic() - began
        # From when it was ready: loading its modules can update their access times.
        written = daemon.io("write_bytes") - written
        equal = digest == _digest_of(output)
        _report(daemon, receipt, seconds, seconds_in_all, written=written, equal=equal)


@contextlib.contextmanager
def _receiver(url: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "relay", "receive", "--amqp", url, "--queue", QUEUE]
    command += ["--output", str(output), "--count", "1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _upload(address: tuple[str, int], source: Source) -> tuple[dict[str, Any], str]:
    """PUT the source. Returns the receipt and the SHA-256 of what was sent."""
    sha256 = hashlib.sha256()

    def body(bar: "tqdm[NoReturn]") -> Iterator[bytes]:
        for piece in source.pieces():
            sha256.update(piece)
            yield piece
            bar.update(len(piece))

    connection = http.client.HTTPConnection(*address)
    progress = tqdm(
        total=source.size, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False
    )
    with contextlib.closing(connection), progress as bar:
        headers = {"Content-Length": str(source.size), "Content-Type": "application/octet-stream"}
        connection.request("PUT", f"/upload/{quote(source.name)}", body(bar), headers)
        response = connection.getresponse()
        document = json.loads(response.read())
    if response.status != 201:
        raise DemoFailed(f"the upload was answered with {response.status}: {document['detail']}")
    return document, sha256.hexdigest()


def _digest_of(output: Path) -> str:
    """SHA-256 of the one file that was received."""
    files = [path for path in output.rglob("0-*") if path.is_file()]
    if len(files) != 1:
        raise DemoFailed(f"expected one received file, found {len(files)}")
    with files[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _report(
    daemon: Daemon,
    receipt: dict[str, Any],
    seconds: float,
    seconds_in_all: float,
    *,
    written: int,
    equal: bool,
) -> None:
    mib = receipt["bytes"] / (1 << 20)
    rows = {
        "transfer": receipt["transfer"],
        "bytes": f"{receipt['bytes']:,}",
        "frames": f"{receipt['frames']:,}",
        "confirmed after": f"{seconds:.2f} s, {mib / seconds:.0f} MiB/s (201: every frame is safe)",
        "received after": f"{seconds_in_all:.2f} s",
        "daemon's peak memory": f"{daemon.memory('VmHWM') / (1 << 20):.1f} MiB",
        "daemon wrote to disk": f"{written} bytes",
        "digests": "equal (SHA-256 of what was sent and what was received)" if equal else "DIFFER",
    }
    print()
    for key, value in rows.items():
        print(f"  {key:<22}{value}")
    if not equal:
        raise DemoFailed("what was received is not what was sent")
    if written:
        raise DemoFailed("the daemon wrote to disk")


def _say(text: str) -> None:
    print(f"- {text}", flush=True)
