"""CPU per GiB relayed, as a ratio to a bare socket pump measured in the same run.

Frames go to an exchange without bindings, so that the broker's share is smallest and the relay's
largest. Machines are noisy and differ: the ratio is the figure to compare, taken from rounds in
which pump and relay alternate.
``./dev bench throughput [--gib N] [--rounds N] [--frame-size BYTES]``.
"""

import argparse
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.bench.pump import Pump, cpu_seconds

PIECE: Final = bytes(1 << 20)
BOUNDARY: Final = "------------------------0123456789abcdef"
CONFIG: Final = """
[routes.bench]
exchange = "amq.fanout"
mandatory = false
frame_size = {frame_size}
"""
TARGET: Final = 3.0
"""Ratio to the pump that the README promises to stay under."""


@dataclass(frozen=True)
class Measured:
    """One run: CPU seconds of the measured process and wall seconds, per GiB."""

    cpu: float
    wall: float


def measure(pid: int, gib: int, send: Callable[[int], None]) -> Measured:
    """Run ``send`` with a number of bytes; what it cost process ``pid``, per GiB."""
    began, cpu = time.perf_counter(), cpu_seconds(pid)
    send(gib << 30)
    return Measured((cpu_seconds(pid) - cpu) / gib, (time.perf_counter() - began) / gib)


def send_to_pump(port: int) -> Callable[[int], None]:
    """A sender through the pump."""

    def send(size: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as client:
            for _ in range(size // len(PIECE)):
                client.sendall(PIECE)
            client.shutdown(socket.SHUT_WR)
            client.recv(16)

    return send


def send_to_relay(address: tuple[str, int], *, multipart: bool) -> Callable[[int], None]:
    """A sender of uploads to the route ``bench``, as one raw body or as a form with one file."""
    before = after = b""
    kind = "application/octet-stream"
    if multipart:
        disposition = 'Content-Disposition: form-data; name="f"; filename="x.bin"'
        before = f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode()
        after = f"\r\n--{BOUNDARY}--\r\n".encode()
        kind = f"multipart/form-data; boundary={BOUNDARY}"

    def send(size: int) -> None:
        head = (
            "POST /upload/bench HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {size + len(before) + len(after)}\r\n\r\n"
        )
        with socket.create_connection(address) as client:
            client.sendall(head.encode() + before)
            for _ in range(size // len(PIECE)):
                client.sendall(PIECE)
            client.sendall(after)
            answer = client.recv(65536)
            if not answer.startswith(b"HTTP/1.1 201"):
                raise SystemExit(f"the upload failed: {answer.decode(errors='replace')}")

    return send


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="./dev bench throughput", description=__doc__)
    parser.add_argument("--gib", type=int, default=2, help="GiB per run (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--frame-size", type=int, default=131064, help="bytes (default 131064)")
    options = parser.parse_args(argv)
    config = CONFIG.format(frame_size=options.frame_size)
    runs: dict[str, list[Measured]] = {"pump": [], "relay, form": [], "relay, raw": []}
    with (
        tempfile.TemporaryDirectory(prefix="relay-bench-") as directory,
        RabbitMQNode() as node,
        Daemon(node.url, config, directory=Path(directory)) as daemon,
        Pump() as pump,
    ):
        senders = {
            "pump": (pump.pid, send_to_pump(pump.port)),
            "relay, form": (daemon.pid, send_to_relay(daemon.address, multipart=True)),
            "relay, raw": (daemon.pid, send_to_relay(daemon.address, multipart=False)),
        }
        for pid, send in senders.values():
            measure(pid, 1, send)  # warm
        for _ in range(options.rounds):
            for name, (pid, send) in senders.items():
                runs[name].append(measure(pid, options.gib, send))
    _report(runs)
    return 0


def _report(runs: dict[str, list[Measured]]) -> None:
    print(f"{'':<12} {'CPU s/GiB':>10} {'MiB/s':>8} {'CPU / pump':>11}")
    for name, measured in runs.items():
        cpu = statistics.median(m.cpu for m in measured)
        rate = 1024 / statistics.median(m.wall for m in measured)
        ratio = statistics.median(
            m.cpu / floor.cpu for m, floor in zip(measured, runs["pump"], strict=True)
        )
        print(f"{name:<12} {cpu:>10.2f} {rate:>8.0f} {ratio:>11.2f}")
    print(f"(medians; relay is meant to stay under {TARGET:g} times the pump)")
