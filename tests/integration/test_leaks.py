"""A thousand uploads, good and bad, leave no task, thread, file, channel or memory behind."""

import itertools
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.uploading import RawConnection, chunked, request, request_head

QUEUE: Final = "leaks"
UPLOADS: Final = 1000
CLIENTS: Final = 8
"""Clients at a time, each with one connection after the other."""

CONFIG: Final = f"""
[routes.plain]
routing_key = "{QUEUE}"
frame_size = 4096
max_bytes = 100_000
[routes.plain.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}

[routes.missing]
exchange = "leaks.missing"
frame_size = 4096

[routes.nowhere]
routing_key = "leaks.nowhere"
frame_size = 4096
"""

BODY: Final = bytes(range(256)) * 50
"""Four frames."""

FORM_TYPE: Final = "multipart/form-data; boundary=xyz"
FORM: Final = (
    b'--xyz\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
    + BODY
    + b"\r\n--xyz--\r\n"
)
WRONG_DIGEST: Final = "Repr-Digest: sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"

GOOD: Final = {
    "raw": request("/upload/plain", BODY),
    "form": request("/upload/plain", FORM, FORM_TYPE),
    "chunked": b"POST /upload/plain HTTP/1.1\r\nHost: relay.test\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY, [1000, 7]),
}
BAD: Final = {
    "unfinished form": (400, request("/upload/plain", FORM[:-9], FORM_TYPE)),
    "bad form": (400, request("/upload/plain", FORM.replace(b"name", b"nom"), FORM_TYPE)),
    "not HTTP": (400, b"what?\r\n\r\n"),
    "no such route": (404, request("/upload/nosuch", BODY)),
    "too large": (413, request_head("/upload/plain", 1 << 20)),
    "too large, as it turns out": (
        413,
        b"POST /upload/plain HTTP/1.1\r\nHost: relay.test\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY * 9, [10_000]),
    ),
    "wrong digest": (422, request("/upload/plain", BODY, None, WRONG_DIGEST)),
    "missing exchange": (502, request("/upload/missing", BODY)),
    "unroutable": (502, request("/upload/nowhere", BODY)),
}


def good(address: tuple[str, int]) -> str:
    """Every good upload, one after the other on the same connection."""
    with RawConnection(address) as connection:
        for data in GOOD.values():
            connection.send(data)
            assert connection.answer().status == 201
    return "good"


def bad(address: tuple[str, int], name: str) -> str:
    """An upload that is refused."""
    status, data = BAD[name]
    with RawConnection(address) as connection:
        connection.send(data)
        assert connection.answer().status == status, name
    return name


def gone(address: tuple[str, int], size: int) -> str:
    """An upload whose client leaves after so many bytes."""
    with socket.create_connection(address) as connection:
        connection.sendall(GOOD["form"][:size])
    return "gone"


def uploads(address: tuple[str, int]) -> Iterator[Callable[[], str]]:
    """What clients do, in turn and for ever; as many are good as bad."""
    for turn in itertools.count():
        yield lambda: good(address)
        for name in BAD:
            yield lambda name=name: bad(address, name)  # type: ignore[misc]
        yield lambda turn=turn: gone(address, 40 + turn * 997 % len(FORM))  # type: ignore[misc]


@dataclass(frozen=True)
class Belongings:
    """What a daemon that is at rest has."""

    threads: int
    channels: int
    memory: int


def belongings(daemon: Daemon, node: RabbitMQNode) -> Belongings:
    """Wait until all uploads and connections have ended, then count."""
    for metric in ("relay_uploads_in_progress", "relay_window_bytes", "relay_window_waiting"):
        daemon.wait_until(lambda metric=metric: daemon.metric(metric) == 0, metric)  # type: ignore[misc]
    daemon.wait_until(lambda: clients_of(daemon) == 0, "all connections have ended")
    return Belongings(
        threads=len(list(Path(f"/proc/{daemon.pid}/task").iterdir())),
        channels=len(node.ctl("list_channels", "pid").split()) - 1,
        memory=daemon.memory(),
    )


def clients_of(daemon: Daemon) -> int:
    """Connections to the upload listener that the daemon has not closed."""
    port = f"{daemon.address[1]:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    sockets = {f"socket:[{line.split()[9]}]" for line in lines if line.split()[1].endswith(port)}
    listener = 1
    return len(sockets.intersection(daemon.open_files())) - listener


def test_a_thousand_uploads_leave_nothing_behind(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    with (
        Daemon(rabbitmq.url, CONFIG, directory=tmp_path) as daemon,
        ThreadPoolExecutor(CLIENTS) as clients,
    ):
        kinds = uploads(daemon.address)

        def run(count: int) -> Counter[str]:
            calls = list(itertools.islice(kinds, count))
            return Counter(clients.map(lambda call: call(), calls))

        tasks, files = daemon.metric("relay_tasks"), len(daemon.open_files())
        run(100)
        before = belongings(daemon, rabbitmq)
        done = run(UPLOADS)
        assert sum(done.values()) == UPLOADS
        assert min(done[name] for name in ("good", "gone", *BAD)) >= UPLOADS // 12
        # Aborts may still be under way.
        daemon.wait_until(lambda: daemon.metric("relay_tasks") <= tasks, "no task is left over")
        daemon.wait_until(lambda: len(daemon.open_files()) <= files, "no file is left over")
        after = belongings(daemon, rabbitmq)
        assert after.threads <= before.threads
        # One for each upload at a time, and for each abort that was not yet confirmed meanwhile.
        assert after.channels <= 2 * CLIENTS
        assert after.memory - before.memory < 4 << 20
        assert daemon.metric("relay_broker_connects_total") == 1
        assert daemon.stop() == 0
    rabbitmq.ctl("purge_queue", QUEUE)
