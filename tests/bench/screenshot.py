"""The status page of a daemon at work, in headless Chromium: the picture in the README.

It needs Debian's ``chromium``, which is not installed for it: 300 MB. What it looks at besides the
picture: that the page refreshes itself, and that the browser finds nothing to complain about.
``./dev bench screenshot``.
"""

import shutil
import subprocess
import tempfile
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.uploading import RawConnection, content, request_head

PICTURE: Final = Path(__file__).with_name("status.png")
SIZE: Final = (1100, 900)
PATIENCE: Final = 120.0
MIB: Final = 1 << 20
CONFIG: Final = """
[amqp]
connections = 2
window = "32 MiB"

[routes.reports]
routing_key = "reports"
[routes.reports.queue]
name = "reports"
type = "classic"
arguments = {}

[routes.archive]
routing_key = "archive"
"""
FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
)


def main(argv: list[str]) -> int:
    """Draw the picture."""
    if argv:
        print("usage: ./dev bench screenshot")
        return 2
    chromium = shutil.which("chromium")
    if chromium is None:
        print(
            "chromium is not installed; as root: apt-get install --no-install-recommends chromium"
        )
        return 1
    with (
        tempfile.TemporaryDirectory(prefix="relay-screenshot-") as directory,
        RabbitMQNode() as node,
        Daemon(node.url, CONFIG, directory=Path(directory)) as daemon,
        _work(node, daemon),
        _counted(daemon) as (url, fetched),
    ):
        complaints = _shoot(chromium, url, Path(directory) / "profile")
    for line in complaints:
        print(f"chromium: {line}")
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes; fetched: {dict(fetched)}")
    # Once by the browser, the other times by the page's own script.
    return 0 if not complaints and fetched.keys() == {"/"} and fetched["/"] >= 3 else 1


@contextmanager
def _counted(daemon: Daemon) -> Iterator[tuple[str, Counter[str]]]:
    """The admin listener behind a server that counts what is fetched of it."""
    fetched: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched[self.path] += 1
            with urllib.request.urlopen(daemon.admin_url + self.path, timeout=10) as answer:  # noqa: S310
                body = answer.read()
                self.send_response(answer.status)
                for name in ("Content-Type", "Content-Security-Policy", "Cache-Control"):
                    self.send_header(name, answer.headers[name])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Be silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def _work(node: RabbitMQNode, daemon: Daemon) -> Iterator[None]:
    """Uploads in every state: one sends, others wait for a broker that stands still."""
    body = content(MIB)
    with ExitStack() as stack:
        _fail(daemon)
        clients = [stack.enter_context(RawConnection(daemon.address)) for _ in range(5)]
        for client in clients:
            client.send(request_head("/upload/reports", 64 * MIB) + body)
        daemon.wait_until(
            lambda: [upload["waits_for"] for upload in daemon.transfers()] == ["client"] * 5,
            "each waits for its client",
        )
        node.suspend()
        stack.callback(node.resume)
        for client in clients[1:]:
            threading.Thread(target=_send, args=(client, body * 20), daemon=True).start()
        daemon.wait_until(
            lambda: [u["waits_for"] for u in daemon.transfers()].count("window") >= 3,
            "three wait for the window",
        )
        yield


def _send(client: RawConnection, data: bytes) -> None:
    # When the picture is taken, whoever still sends is cut off.
    with suppress(OSError):
        client.send(data)


def _fail(daemon: Daemon) -> None:
    """Something for the list of errors."""
    for size in (MIB, 3 * MIB):
        with RawConnection(daemon.address) as connection:
            connection.send(request_head("/upload/archive", size) + content(size))
            connection.answer()


def _shoot(chromium: str, url: str, profile: Path) -> list[str]:
    """Takes the picture. Returns what the browser's console says."""
    done = subprocess.run(
        [
            chromium,
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--screenshot={PICTURE}",
            "--virtual-time-budget=7000",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]
