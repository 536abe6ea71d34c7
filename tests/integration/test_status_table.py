"""Each row of the table of errors, through a real socket, and what is left after it.

Of each: status and code, whether the connection goes on, no commit frame in any queue, and files,
tasks, memory, window and uploads as before within a second.
"""

import hashlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pika
import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from relay.model import Frame
from tests.private_node import must_be_installed
from tests.queue_reader import messages_now
from tests.still_queue import standing_still
from tests.uploading import RawConnection, check_problem, request, request_head

README: Final = Path(__file__).parents[2] / "relay/server/README.md"
QUEUE: Final = "status"
FULL_QUEUE: Final = "status.full"
SLACK: Final = 8 << 20
"""Bytes by which the heap may have grown for good: it takes a few uploads to find its shape."""

ROUTES: Final = f"""
[routes.plain]
routing_key = "{QUEUE}"
frame_size = 4096
max_bytes = 100_000
[routes.plain.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}

[routes.full]
routing_key = "{FULL_QUEUE}"
[routes.full.queue]
name = "{FULL_QUEUE}"
type = "classic"
arguments = {{ x-max-length = 1, x-overflow = "reject-publish" }}

[routes.missing]
exchange = "status.missing"

[routes.nowhere]
routing_key = "status.nowhere"

[routes.alices]
clients = ["alice"]

[routes.bug]
routing_key = "{QUEUE}"
"""
MAIN: Final = """
[http]
anonymous = true
max_uploads = 4
max_uploads_per_client = 2
[auth]
tokens_file = "TOKENS"
"""
HASTY: Final = """
[http]
header_timeout = "1 s"
body_idle_timeout = "1 s"
[amqp]
heartbeat = "2 s"
confirm_timeout = "3 s"
reconnect_grace = "0 s"
blocked_grace = "0 s"
"""
FULL: Final = """
[http]
max_connections = 2
drain_timeout = "0 s"
"""
BUG: Final = """
import relay.server.handler as handler

real = handler.Framer

def framer(transfer, **options):
    if transfer.route == "bug":
        raise ZeroDivisionError
    return real(transfer, **options)

handler.Framer = framer
"""
"""Run by Python as it starts: what a bug is like, which the daemon has no other of."""


class Site:
    """A broker of these tests' own, and the daemons at it, each started when it is asked for."""

    def __init__(self, node: RabbitMQNode, directory: Path, stack: ExitStack) -> None:
        self.node = node
        self._directory = directory
        self._stack = stack
        self._daemons: dict[str, Daemon] = {}
        tokens = (f"{name}: sha256:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in USERS)
        (directory / "tokens").write_text("".join(tokens))
        (directory / "sitecustomize.py").write_text(BUG)

    def daemon(self, config: str) -> Daemon:
        """The daemon of that configuration."""
        if config not in self._daemons:
            directory = self._directory / str(len(self._daemons))
            directory.mkdir()
            path = os.pathsep.join([str(self._directory), os.environ.get("PYTHONPATH", "")])
            daemon = Daemon(
                self.node.url,
                ROUTES + config.replace("TOKENS", str(self._directory / "tokens")),
                directory=directory,
                env={**os.environ, "PYTHONPATH": path},
            )
            self._daemons[config] = self._stack.enter_context(daemon)
        return self._daemons[config]


USERS: Final = ("alice", "bob")

Meanwhile = Callable[[Site], AbstractContextManager[object]]


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


def post(body: bytes = b"hello", *headers: str, route: str = "plain") -> bytes:
    return request(f"/upload/{route}", body, None, *headers)


def form(body: bytes, content_type: str = "multipart/form-data; boundary=x") -> bytes:
    return request("/upload/plain", body, content_type)


# --- the states of the world in which some are refused -----------------------------------------


def nothing(_: Site) -> AbstractContextManager[None]:
    return nullcontext()


def uploads(*clients: str, config: str = MAIN, key: str = "") -> Meanwhile:
    """An upload of each of these clients has been admitted; "" is an anonymous one."""

    @contextmanager
    def begun(site: Site) -> Iterator[None]:
        with ExitStack() as stack:
            for client in clients:
                connection = stack.enter_context(RawConnection(site.daemon(config).address))
                headers = [bearer(client)] if client else []
                headers += [f"Idempotency-Key: {key}"] if key else []
                head = request_head("/upload/plain", 5, None, "Expect: 100-continue", *headers)
                connection.send(head)
                assert connection.interim() == 100
            yield

    return begun


@contextmanager
def connections(site: Site) -> Iterator[None]:
    """As many as there may be."""
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(RawConnection(site.daemon(FULL).address))
            connection.send(request("/nowhere", b""))
            # It is served; what it may do next is its own affair.
            assert connection.answer().status == 404
        yield


@contextmanager
def full_queue(site: Site) -> Iterator[None]:
    site.daemon(MAIN)  # declares it
    connection = pika.BlockingConnection(pika.URLParameters(site.node.url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_publish("", FULL_QUEUE, b"in the way")
    yield
    channel.queue_purge(FULL_QUEUE)
    connection.close()


def queue_stands_still(site: Site) -> AbstractContextManager[None]:
    site.daemon(HASTY)  # declares it
    return standing_still(site.node, QUEUE)


@contextmanager
def alarm(site: Site) -> Iterator[None]:
    daemon = site.daemon(HASTY)
    site.node.ctl("set_vm_memory_high_watermark", "0.000001")
    try:
        yield
    finally:
        site.node.ctl("set_vm_memory_high_watermark", "0.4")
    daemon.wait_until(lambda: daemon.ready()[0] == 200, "the alarm is over")


@contextmanager
def broker_away(site: Site) -> Iterator[None]:
    daemon = site.daemon(HASTY)
    site.node.kill()
    daemon.wait_until(lambda: daemon.ready()[0] == 503, "the loss is noticed")
    try:
        yield
    finally:
        site.node.start()
    daemon.wait_until(lambda: daemon.ready()[0] == 200, "it is connected again")


@contextmanager
def terminated(site: Site) -> Iterator[None]:
    """The daemon is told to stop once there is an upload."""
    daemon = site.daemon(FULL)

    def tell() -> None:
        daemon.wait_until(
            lambda: daemon.metric("relay_uploads_in_progress") == 1, "the upload has begun"
        )
        os.kill(daemon.pid, signal.SIGTERM)

    thread = threading.Thread(target=tell)
    thread.start()
    yield
    thread.join()


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request, and what must come of it.

    Attributes:
        sends: all that the client says.
        closes: whether the connection ends; only after a body that was read does it go on.
        may_commit: what the README calls the one exception.
    """

    status: int
    code: str
    sends: bytes
    closes: bool = True
    meanwhile: Meanwhile = nothing
    config: str = MAIN
    may_commit: bool = False
    name: str = ""


HEAD: Final = b"POST /upload/plain HTTP/1.1\r\nHost: relay.test\r\n"
WRONG_DIGEST: Final = "Repr-Digest: sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"
THREE_FRAMES: Final = bytes(10_000)

TABLE: Final = (
    Row(status=400, code="bad-request", sends=b"what?\r\n\r\n"),
    Row(status=400, code="bad-request", sends=HEAD + b"Host: b\r\n\r\n", name="two hosts"),
    Row(status=400, code="bad-multipart", sends=form(b"--x\r\n\r\n"), closes=False),
    Row(status=400, code="bad-multipart", sends=form(b"", "multipart/form-data"), name="unbounded"),
    Row(status=401, code="unauthorized", sends=post(b"x", bearer("mallory"))),
    Row(status=403, code="forbidden", sends=post(b"x", bearer("bob"), route="alices")),
    Row(status=404, code="not-found", sends=request("/elsewhere", b"x")),
    Row(status=404, code="not-found", sends=post(route="unknown"), name="route"),
    Row(status=405, code="method-not-allowed", sends=request("/upload", b"", method="DELETE")),
    Row(status=408, code="too-slow", sends=HEAD, config=HASTY),
    Row(status=408, code="too-slow", sends=post()[:-1], config=HASTY, name="body"),
    Row(
        status=409,
        code="key-in-use",
        sends=post(b"hello", "Idempotency-Key: k"),
        meanwhile=uploads("", key="k"),
    ),
    Row(status=413, code="too-large", sends=request_head("/upload/plain", 1 << 30)),
    Row(status=415, code="unsupported-media-type", sends=post(b"x", "Content-Encoding: gzip")),
    Row(status=417, code="expectation-failed", sends=post(b"x", "Expect: more")),
    Row(status=422, code="digest-mismatch", sends=post(b"hello", WRONG_DIGEST), closes=False),
    Row(status=429, code="too-many-uploads", sends=post(), meanwhile=uploads("", "")),
    Row(status=431, code="headers-too-large", sends=HEAD + b"X: " + b"x" * 20_000),
    Row(status=500, code="internal-error", sends=post(route="bug")),
    Row(status=501, code="not-implemented", sends=HEAD + b"Transfer-Encoding: gzip\r\n\r\n"),
    Row(status=505, code="http-version", sends=HEAD.replace(b"1.1", b"3.0") + b"\r\n"),
    Row(status=502, code="unroutable", sends=post(route="nowhere"), closes=False),
    Row(status=502, code="broker-refused", sends=post(route="missing"), closes=False),
    Row(
        status=503,
        code="too-many-uploads",
        sends=post(),
        meanwhile=uploads("alice", "alice", "bob", "bob"),
    ),
    Row(
        status=503,
        code="too-many-uploads",
        sends=b"",
        meanwhile=connections,
        config=FULL,
        name="connections",
    ),
    Row(
        status=507, code="queue-full", sends=post(route="full"), meanwhile=full_queue, closes=False
    ),
    Row(
        status=504,
        code="confirm-timeout",
        sends=post(THREE_FRAMES),
        meanwhile=queue_stands_still,
        config=HASTY,
        closes=False,
    ),
    Row(
        status=504,
        code="outcome-unknown",
        sends=post(),
        meanwhile=queue_stands_still,
        config=HASTY,
        closes=False,
        may_commit=True,
    ),
    Row(
        status=503,
        code="broker-blocked",
        sends=post(THREE_FRAMES),
        meanwhile=alarm,
        config=HASTY,
        closes=False,
    ),
    Row(status=503, code="broker-unavailable", sends=post(), meanwhile=broker_away, config=HASTY),
    Row(
        status=503,
        code="shutting-down",
        sends=post()[:-1],
        meanwhile=terminated,
        config=FULL,
    ),
)


# --- the tests ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as stack:
        with must_be_installed():
            node = stack.enter_context(RabbitMQNode())
        yield Site(node, tmp_path_factory.mktemp("site"), stack)


@dataclass(frozen=True)
class Belongings:
    """What a daemon at rest has."""

    files: int
    tasks: float
    memory: int

    @classmethod
    def of(cls, daemon: Daemon) -> "Belongings":
        return cls(len(daemon.open_files()), daemon.metric("relay_tasks"), daemon.memory())

    def are_back(self, daemon: Daemon) -> bool:
        """Whether it has no more than that, and nothing of any upload."""
        now = self.of(daemon)
        metrics = ("relay_uploads_in_progress", "relay_window_bytes", "relay_window_waiting")
        return (
            now.files <= self.files
            and now.tasks <= self.tasks
            and now.memory <= self.memory + SLACK
            and all(daemon.metric(name) == 0 for name in metrics)
        )


@pytest.mark.parametrize(
    "row", TABLE, ids=lambda row: " ".join(filter(None, [str(row.status), row.code, row.name]))
)
def test_an_error_is_told_commits_nothing_and_leaves_nothing_behind(site: Site, row: Row) -> None:
    daemon = site.daemon(row.config)
    # The row before may have taken its broker away.
    daemon.wait_until(lambda: daemon.ready()[0] == 200, "it is ready")
    daemon.wait_until(lambda: daemon.metric("relay_uploads_in_progress") == 0, "it is at rest")
    before = Belongings.of(daemon)
    with row.meanwhile(site), RawConnection(daemon.address) as connection:
        connection.send(row.sends)
        check_problem(connection.answer(), row.status, row.code)
        if row.closes:
            assert connection.at_end()
        else:
            connection.send(request("/elsewhere", b""))
            check_problem(connection.answer(), 404, "not-found")
    if row.code == "shutting-down":
        assert daemon.stop() == 0
    else:
        # Counted in pauses between looks, so that a busy machine may take longer over the looks.
        text = f"it has no more than {before}"
        daemon.wait_until(lambda: before.are_back(daemon), text, seconds=1.0)
    if not row.may_commit:
        assert committed(site, QUEUE) == committed(site, FULL_QUEUE) == []
    else:
        messages_now(site.node.url, QUEUE)


def committed(site: Site, queue: str) -> list[str]:
    """The transfers in a queue that a consumer would take for complete. Empties the queue."""
    items = [message.decode() for message in messages_now(site.node.url, queue)]
    return [item.transfer.id for item in items if isinstance(item, Frame) and item.commit]


def test_the_readme_names_these_errors_and_no_others() -> None:
    section = README.read_text().partition("\n## Errors\n")[2].partition("\n## ")[0]
    named = set()
    for statuses, codes in re.findall(r"^\| ([0-9, ]+) \| ([^|]+) \|", section, re.MULTILINE):
        numbers = [int(number) for number in statuses.split(",")]
        words = re.findall(r"`([a-z-]+)`", codes)
        # Of several statuses each has its own code; one status may have several.
        assert len(numbers) in (1, len(words))
        named |= set(zip(numbers * (len(words) // len(numbers)), words, strict=True))
    assert named == {(row.status, row.code) for row in TABLE}
