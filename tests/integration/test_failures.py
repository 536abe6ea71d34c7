"""When client, broker or network fail: the answer is true, nothing is committed, and it goes on.

Each test ends with an upload that works, on the same daemon.
"""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from relay.model import Abort, Frame
from relay.server.uploads import READ_SIZE_MAX
from tests.private_node import must_be_installed
from tests.queue_reader import messages_left, messages_now, transfers_in
from tests.uploading import (
    FRAME_SIZE,
    READ_COPIES,
    Answer,
    Part,
    RawConnection,
    browser_form,
    check_problem,
    content,
    request,
    request_head,
    upload,
)

MIB: Final = 1 << 20
QUEUE: Final = "failures"
FULL_QUEUE: Final = "failures.full"
ROUTES: Final = f"""
[routes.plain]
routing_key = "{QUEUE}"
[routes.plain.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}

[routes.full]
routing_key = "{FULL_QUEUE}"
[routes.full.queue]
name = "{FULL_QUEUE}"
type = "classic"
arguments = {{ x-max-length = 3, x-overflow = "reject-publish" }}

[routes.missing]
exchange = "failures.missing"

[routes.nowhere]
routing_key = "failures.nowhere"
"""


@pytest.fixture(scope="module")
def daemon(rabbitmq: RabbitMQNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(rabbitmq.url, ROUTES, directory=tmp_path_factory.mktemp("daemon")) as running:
        yield running


@pytest.fixture(scope="module")
def victim() -> Iterator[RabbitMQNode]:
    """A node to break; each test leaves it running."""
    with must_be_installed():
        node = RabbitMQNode()
    with node:
        yield node


def check_next_upload(daemon: Daemon, url: str, *, ended: int) -> None:
    """One more upload works, and of all that ended in the queue it is what is committed."""
    answer = upload(daemon)
    assert answer.status == 201
    transfers = transfers_in(url, QUEUE, ended=ended + 1)
    committed = [name for name, transfer in transfers.items() if transfer.committed]
    assert committed == [answer.json()["transfer"]]
    assert messages_left(url, QUEUE) == 0


def left_in(url: str, queue: str) -> list[Frame | Abort]:
    """All messages of a queue to which nobody publishes now; consumes them."""
    return [message.decode() for message in messages_now(url, queue)]


def frames_left_in(url: str, queue: str) -> list[Frame]:
    """The frames among them: whether an abort found room depends on who was first."""
    return [item for item in left_in(url, queue) if isinstance(item, Frame)]


class Sender:
    """A client that sends a large raw body as fast as it is taken, in a thread."""

    def __init__(self, daemon: Daemon, size: int, route: str = "plain") -> None:
        self.sent = 0
        self._connection = RawConnection(daemon.address)
        self._size = size
        self._route = route
        self._thread = threading.Thread(target=self._send)
        self.block = content(MIB)

    def _send(self) -> None:
        self._connection.send(request_head(f"/upload/{self._route}", self._size))
        while self.sent < self._size:
            self._connection.send(self.block)
            self.sent += len(self.block)

    def answer(self) -> Answer:
        """Wait for the end of the body and the response."""
        self._thread.join()
        return self._connection.answer()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._thread.join()


# --- the client --------------------------------------------------------------------------------

FORM = browser_form([Part(content(9 * FRAME_SIZE), "file", "f.bin")])
BODIES = {
    "multipart": request("/upload/plain", FORM[1], FORM[0]),
    "raw": request("/upload/plain", content(9 * FRAME_SIZE)),
}


@pytest.mark.parametrize("whole", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_within_a_part_commits_nothing(
    daemon: Daemon, rabbitmq: RabbitMQNode, whole: bytes, how: str
) -> None:
    with socket.create_connection(daemon.address) as connection:
        connection.sendall(whole[: 4 * FRAME_SIZE])
        daemon.wait_until(lambda: messages_left(rabbitmq.url, QUEUE) == 3, "3 frames are queued")
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    daemon.wait_until(
        lambda: daemon.metric("relay_uploads_in_progress") == 0, "the upload has ended"
    )
    (transfer,) = transfers_in(rabbitmq.url, QUEUE, ended=1).values()
    assert not transfer.committed
    assert transfer.aborted == "client-gone"
    check_next_upload(daemon, rabbitmq.url, ended=0)


# --- the broker says no -------------------------------------------------------------------------


def test_a_missing_exchange_is_named_and_other_uploads_go_on(
    daemon: Daemon, rabbitmq: RabbitMQNode
) -> None:
    body = content(4 * FRAME_SIZE)
    with RawConnection(daemon.address) as sibling:
        sibling.send(request("/upload/plain", body)[: 2 * FRAME_SIZE])
        daemon.wait_until(lambda: daemon.metric("relay_uploads_in_progress") == 1, "it has begun")
        connects = daemon.metric("relay_broker_connects_total")
        for size in (0, 1, 9 * FRAME_SIZE):
            answer = upload(daemon, "missing", content(size))
            detail = check_problem(answer, 502, "broker-refused")
            assert "404" in detail
            assert "no exchange 'failures.missing'" in detail
        sibling.send(request("/upload/plain", body)[2 * FRAME_SIZE :])
        assert sibling.answer().status == 201
    assert daemon.metric("relay_broker_connects_total") == connects
    (transfer,) = transfers_in(rabbitmq.url, QUEUE, ended=1).values()
    assert transfer.parts[0].data == body
    check_next_upload(daemon, rabbitmq.url, ended=0)


@pytest.mark.parametrize("frames", [5, 60], ids=["some frames", "more than a window"])
def test_a_full_queue_is_said_to_be_full(
    daemon: Daemon, rabbitmq: RabbitMQNode, frames: int
) -> None:
    answer = upload(daemon, "full", content(frames * FRAME_SIZE))
    check_problem(answer, 507, "queue-full")
    # What was on its way must not find the room that reading the queue makes.
    daemon.wait_until(lambda: daemon.metric("relay_window_bytes") == 0, "all is settled")
    kept = frames_left_in(rabbitmq.url, FULL_QUEUE)
    assert 1 <= len(kept) <= 3
    assert all(frame.commit is None for frame in kept)
    # There is room again.
    assert upload(daemon, "full").status == 201
    (frame,) = frames_left_in(rabbitmq.url, FULL_QUEUE)
    assert frame.commit is not None


@pytest.mark.parametrize("size", [0, 5 * FRAME_SIZE])
def test_a_queue_that_is_not_there_is_not_a_success(
    daemon: Daemon, rabbitmq: RabbitMQNode, size: int
) -> None:
    check_problem(upload(daemon, "nowhere", content(size)), 502, "unroutable")
    check_next_upload(daemon, rabbitmq.url, ended=0)


# --- the broker is gone -------------------------------------------------------------------------


def test_a_broker_killed_within_an_upload_without_grace_fails_it(
    victim: RabbitMQNode, tmp_path: Path
) -> None:
    config = ROUTES + '[amqp]\nreconnect_grace = "0 s"\n'
    with Daemon(victim.url, config, directory=tmp_path) as daemon:
        body = content(9 * FRAME_SIZE)
        with RawConnection(daemon.address) as connection:
            connection.send(request("/upload/plain", body)[: 4 * FRAME_SIZE])
            daemon.wait_until(lambda: messages_left(victim.url, QUEUE) == 3, "3 frames are queued")
            victim.kill()
            daemon.wait_until(lambda: daemon.ready()[0] == 503, "the loss is noticed")
            connection.send(body[4 * FRAME_SIZE :])
            answer = connection.answer()
        check_problem(answer, 503, "broker-unavailable")
        failed = answer.json()["transfer"]
        check_problem(upload(daemon), 503, "broker-unavailable")
        victim.start()
        daemon.wait_until(lambda: daemon.ready()[0] == 200, "it is connected again")
        answer = upload(daemon)
        assert answer.status == 201
    items = left_in(victim.url, QUEUE)
    assert commits(items) == [answer.json()["transfer"]]
    # Whether its abort was in time for the broker's return, nobody can say.
    assert all(item.reason == "broker-unavailable" for item in aborts(items))
    assert all(item.transfer_id == failed for item in aborts(items))


def commits(items: list[Frame | Abort]) -> list[str]:
    return [item.transfer.id for item in items if isinstance(item, Frame) and item.commit]


def aborts(items: list[Frame | Abort]) -> list[Abort]:
    return [item for item in items if isinstance(item, Abort)]


def test_a_broker_killed_and_restarted_within_the_grace_costs_the_upload_nothing(
    victim: RabbitMQNode, tmp_path: Path
) -> None:
    config = ROUTES + '[amqp]\nreconnect_grace = "10 min"\n'
    with (
        Daemon(victim.url, config, directory=tmp_path) as daemon,
        Sender(daemon, 64 * MIB) as sender,
    ):
        daemon.wait_until(
            lambda: any(int(str(one["bytes"])) > 20 * MIB for one in daemon.transfers()),
            "a third is uploaded",
        )
        victim.kill()
        daemon.wait_until(lambda: daemon.ready()[0] == 503, "the loss is noticed")
        assert daemon.metric("relay_uploads_in_progress") == 1
        victim.start()
        answer = sender.answer()
        assert answer.status == 201
        assert daemon.metric("relay_broker_connects_total") == 2
        transfers = transfers_in(victim.url, QUEUE, ended=1)
        (part,) = transfers[answer.json()["transfer"]].parts
        assert part.data == sender.block * 64
        check_next_upload(daemon, victim.url, ended=0)


def test_a_daemon_that_starts_without_a_broker_says_so_until_it_is_there(
    closed_proxy: "Proxy", rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    with Daemon(closed_proxy.url, ROUTES, directory=tmp_path, wait_ready=False) as daemon:
        daemon.wait_until(lambda: "cannot connect" in daemon.ready()[1], "it has tried")
        assert daemon.ready()[0] == 503
        for expect in ([], ["Expect: 100-continue"]):
            with RawConnection(daemon.address) as connection:
                connection.send(request_head("/upload/plain", 5, None, *expect))
                # No 100 (Continue), and an answer before the body.
                check_problem(connection.answer(), 503, "broker-unavailable")
        closed_proxy.open()
        daemon.wait_until(lambda: daemon.ready()[0] == 200, "it is connected")
        check_next_upload(daemon, rabbitmq.url, ended=0)


# --- the broker is slow -------------------------------------------------------------------------


def test_a_client_faster_than_the_broker_is_slowed_and_not_buffered(
    victim: RabbitMQNode, tmp_path: Path
) -> None:
    size, upload_window = 256 * MIB, 8 * MIB
    with Daemon(victim.url, ROUTES, directory=tmp_path) as daemon:
        assert upload(daemon).status == 201
        # What is out at the broker counts twice, in the window and as it is read and cut.
        ceiling = daemon.memory() + 2 * upload_window + READ_COPIES * READ_SIZE_MAX
        victim.suspend()
        try:
            with Sender(daemon, size) as sender:
                daemon.wait_until(
                    lambda: daemon.metric("relay_window_bytes") > upload_window - FRAME_SIZE,
                    "the window is full",
                )
                daemon.wait_until(
                    lambda: daemon.transfers()[0]["waits_for"] == "window", "it waits"
                )
                assert int(str(daemon.transfers()[0]["bytes"])) < upload_window + 2 * MIB
                assert sender.sent < size
                assert daemon.memory("VmHWM") <= ceiling
                victim.resume()
                assert sender.answer().status == 201
        finally:
            victim.resume()
        assert daemon.memory("VmHWM") <= ceiling
        assert daemon.metric("relay_broker_connects_total") == 1
    victim.ctl("purge_queue", QUEUE)


def test_a_broker_with_an_alarm_takes_no_uploads_until_it_is_over(
    victim: RabbitMQNode, tmp_path: Path
) -> None:
    config = ROUTES + '[amqp]\nblocked_grace = "0 s"\n'
    with Daemon(victim.url, config, directory=tmp_path) as daemon:
        victim.ctl("set_vm_memory_high_watermark", "0.000001")
        try:
            # The broker tells of the alarm only to who publishes: the first upload finds out.
            answer = upload(daemon, body=content(9 * FRAME_SIZE))
            check_problem(answer, 503, "broker-blocked")
            assert daemon.ready()[0] == 503
            check_problem(upload(daemon), 503, "broker-blocked")
        finally:
            victim.ctl("set_vm_memory_high_watermark", "0.4")
        daemon.wait_until(lambda: daemon.ready()[0] == 200, "the alarm is over")
        transfers = transfers_in(victim.url, QUEUE, ended=1)
        assert transfers[answer.json()["transfer"]].aborted == "broker-blocked"
        check_next_upload(daemon, victim.url, ended=0)


# --- the network --------------------------------------------------------------------------------

HEARTBEAT: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"


class Proxy:
    """TCP between the daemon and the broker: counts heartbeats, cuts connections.

    Attributes:
        heartbeats: AMQP heartbeat frames seen from the daemon and from the broker.
        cut_after: bytes from the daemon after which its connection is reset, once.
    """

    def __init__(self, port: int) -> None:
        self.heartbeats = [0, 0]
        self.cut_after: int | None = None
        self._port = port
        self._listener = socket.socket()
        # Until it listens, connections to it are refused, and nobody else gets the port.
        self._listener.bind(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []

    def open(self) -> None:
        """Begin to listen."""
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The AMQP URL of the broker behind it."""
        return f"amqp://guest:guest@127.0.0.1:{self._listener.getsockname()[1]}/%2f"

    def _accept(self) -> None:
        while True:
            try:
                daemon, _ = self._listener.accept()
            except OSError:
                return
            broker = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [daemon, broker]
            for direction, ends in enumerate([(daemon, broker), (broker, daemon)]):
                threading.Thread(target=self._pump, args=(direction, *ends), daemon=True).start()

    def _pump(self, direction: int, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.heartbeats[direction] += data.count(HEARTBEAT)
                if direction == 0 and self.cut_after is not None:
                    data = data[: self.cut_after]
                    self.cut_after -= len(data)
                target.sendall(data)
                if self.cut_after == 0 and direction == 0:
                    self.cut_after = None
                    break
        except OSError:
            pass
        for end in (source, target):
            # The other direction's thread may have been first.
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        """End all connections."""
        self._listener.close()
        for one in self._sockets:
            one.close()


@pytest.fixture
def closed_proxy(rabbitmq: RabbitMQNode) -> Iterator[Proxy]:
    proxy = Proxy(rabbitmq.port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(closed_proxy: Proxy) -> Proxy:
    closed_proxy.open()
    return closed_proxy


def test_heartbeats_keep_an_idle_connection(proxy: Proxy, tmp_path: Path) -> None:
    config = ROUTES + '[amqp]\nheartbeat = "1 s"\n'
    with Daemon(proxy.url, config, directory=tmp_path) as daemon:
        # One each half interval; the broker gives up on who is silent for two intervals.
        daemon.wait_until(lambda: min(proxy.heartbeats) >= 6, "six heartbeats were exchanged")
        assert daemon.metric("relay_broker_connects_total") == 1
        assert daemon.ready()[0] == 200


@pytest.mark.parametrize("cut_after", [1, 100_000, 3 * FRAME_SIZE + 50])
def test_a_connection_cut_within_a_frame_costs_the_upload_nothing(
    proxy: Proxy, rabbitmq: RabbitMQNode, tmp_path: Path, cut_after: int
) -> None:
    body = content(9 * FRAME_SIZE)
    with Daemon(proxy.url, ROUTES, directory=tmp_path) as daemon:
        proxy.cut_after = cut_after
        answer = upload(daemon, body=body)
        assert answer.status == 201
        assert daemon.metric("relay_broker_connects_total") == 2
        (transfer,) = transfers_in(rabbitmq.url, QUEUE, ended=1).values()
        assert transfer.parts[0].data == body
        check_next_upload(daemon, rabbitmq.url, ended=0)
