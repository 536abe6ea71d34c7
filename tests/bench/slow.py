"""Good clients beside a thousand slow ones, small uploads beside a large one, fast beside slow.

Each figure beside the same without the others, in alternating rounds. The lines about good clients
have a promise: they keep 80 % of their rate. Where slowhttptest is installed (Debian's package), it
is among the slow ones: with slow heads, slow bodies and slow reads.
``./dev bench slow [--rounds N] [--slow N] [--mib N]``.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.slow_clients import SlowClients
from tests.still_queue import standing_still
from tests.uploading import RawConnection, content, memory_ceiling, request, request_head, upload

MIB: Final = 1 << 20
GOOD: Final = 10
PROMISED: Final = 0.8
SLOW_QUEUE: Final = "bench.slow"
CONFIG: Final = f"""
[http]
max_connections = 4096
max_uploads = 2048
[routes.plain]
exchange = "amq.fanout"
mandatory = false
[routes.slow]
routing_key = "{SLOW_QUEUE}"
[routes.slow.queue]
name = "{SLOW_QUEUE}"
type = "classic"
arguments = {{}}
"""

SLOWHTTPTEST: Final = "slowhttptest"
ATTACKS: Final = {
    "heads": ("-H", "-t", "POST"),
    "bodies": ("-B", "-s", "100000"),
    # Ten requests at once, and of the answers five bytes a second into the smallest of buffers.
    "reads": ("-X", "-k", "10", "-z", "5", "-w", "1", "-y", "512"),
}
"""What slowhttptest does, by what is slow."""

Beside = Callable[[], AbstractContextManager[object]]


def rate(daemon: Daemon, clients: int, body: bytes) -> float:
    """MiB/s of so many clients, each of which uploads ``body`` to the fast route."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda _: upload(daemon, body=body), range(clients)))
    if {answer.status for answer in answers} != {201}:
        raise SystemExit(f"an upload failed: {answers}")
    return clients * len(body) / MIB / (time.perf_counter() - began)


def delay(daemon: Daemon) -> float:
    """Milliseconds that an upload of 1 KiB takes, the median of 50."""
    times = []
    with RawConnection(daemon.address) as connection:
        for _ in range(50):
            began = time.perf_counter()
            connection.send(request("/upload/plain", bytes(1024)))
            connection.answer()
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


@contextmanager
def an_upload(daemon: Daemon, route: str) -> Iterator[None]:
    """A client uploads without end, for the block's length."""
    is_over = threading.Event()
    piece = content(MIB)

    def send() -> None:
        with RawConnection(daemon.address) as connection:
            connection.send(request_head(f"/upload/{route}", 1 << 40))
            while not is_over.is_set():
                connection.send(piece)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def slow_clients(daemon: Daemon, count: int) -> Iterator[None]:
    """So many, all inside when the block begins, and back whenever they are shaken off."""
    with SlowClients(daemon.address, count, pause=5.0):
        daemon.wait_until(
            lambda: daemon.metric("relay_uploads_in_progress") == count // 2,
            "the slow ones are inside",
        )
        yield


@contextmanager
def slowhttptest(daemon: Daemon, what: str, count: int) -> Iterator[None]:
    """So many of its connections, most of them inside when the block begins.

    Whom the daemon shakes off does not come back: that begins after 10 s, which is longer than a
    round takes.
    """
    target = f"{daemon.url}/{'nowhere' if what == 'reads' else 'upload/plain'}"
    options = ("-c", str(count), "-r", str(count), "-i", "5", "-l", "60", "-p", "10", "-u", target)
    with subprocess.Popen(
        [SLOWHTTPTEST, *ATTACKS[what], *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            daemon.wait_until(
                lambda: daemon.metric("relay_connections") >= 0.9 * count, "they are inside"
            )
            yield
        finally:
            process.kill()


def compare(measure: Callable[[], float], beside: Beside, rounds: int) -> tuple[float, float]:
    """Medians of what is measured alone, and beside others, in alternating rounds."""
    alone, crowded = [], []
    for _ in range(rounds):
        alone.append(measure())
        with beside():
            crowded.append(measure())
    return statistics.median(alone), statistics.median(crowded)


def main(argv: list[str]) -> int:
    """Print the table. Exit code 1: the good ones lost their rate, or there was too much memory."""
    parser = argparse.ArgumentParser(prog="./dev bench slow", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each figure (default 5)")
    parser.add_argument("--slow", type=int, default=1000, help="slow clients (default 1000)")
    parser.add_argument("--mib", type=int, default=64, help="MiB of each good upload (default 64)")
    options = parser.parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    body = content(options.mib * MIB)
    with (
        tempfile.TemporaryDirectory(prefix="relay-bench-") as directory,
        RabbitMQNode() as node,
        Daemon(node.url, CONFIG, directory=Path(directory)) as daemon,
    ):
        base = daemon.memory()
        rate(daemon, GOOD, body)  # warm

        @contextmanager
        def still_route() -> Iterator[None]:
            # It ends after the queue has gone on: until then nobody reads it.
            with an_upload(daemon, "slow"), standing_still(node, SLOW_QUEUE):
                yield

        lines: dict[str, tuple[Callable[[], float], Beside]] = {
            f"{GOOD} good clients, MiB/s, beside {options.slow} slow ones": (
                lambda: rate(daemon, GOOD, body),
                lambda: slow_clients(daemon, options.slow),
            ),
            **{
                f"{GOOD} good clients, MiB/s, beside {SLOWHTTPTEST}, slow {what}": (
                    lambda: rate(daemon, GOOD, body),
                    partial(slowhttptest, daemon, what, options.slow),
                )
                for what in (ATTACKS if shutil.which(SLOWHTTPTEST) else ())
            },
            "1 KiB, ms, beside an upload without end": (
                lambda: delay(daemon),
                lambda: an_upload(daemon, "plain"),
            ),
            "one upload, MiB/s, beside one to a route that stands still": (
                lambda: rate(daemon, 1, body),
                still_route,
            ),
        }
        kept = []
        print(f"{'':<60} {'alone':>8} {'beside':>8} {'ratio':>6}")
        for name, (measure, beside) in lines.items():
            alone, crowded = compare(measure, beside, options.rounds)
            ratio = crowded / alone
            if "good clients" in name:
                kept.append(ratio)
            print(f"{name:<60} {alone:>8.1f} {crowded:>8.1f} {ratio:>6.2f}", flush=True)
        clients = options.slow + GOOD
        peak, ceiling = (
            daemon.memory("VmHWM"),
            memory_ceiling(base, connections=clients, uploads=clients),
        )
    print(f"peak memory {peak / MIB:.0f} MiB; the formula allows {ceiling / MIB:.0f}")
    print(
        f"(medians of {options.rounds}; good clients are meant to keep {PROMISED:g} of their rate)"
    )
    return 0 if min(kept) >= PROMISED and peak <= ceiling else 1
