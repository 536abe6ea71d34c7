"""What a broker refuses, and what its operator does to it: uploads are held, saved, or told why."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQFailed, RabbitMQNode
from tests.private_node import must_be_installed
from tests.queue_reader import Received, messages_left, transfers_in
from tests.uploading import (
    Answer,
    RawConnection,
    check_problem,
    content,
    request,
    request_head,
    upload,
)

KIB: Final = 1 << 10
MIB: Final = 1 << 20
QUEUE: Final = "refusals"
MAX_MESSAGE: Final = 64 * KIB
FRAME: Final = 32 * KIB
ROUTES: Final = f"""
[routes.plain]
routing_key = "{QUEUE}"
frame_size = {FRAME}
[routes.plain.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}

[routes.small]
routing_key = "{QUEUE}"
frame_size = 4096

[routes.large]
routing_key = "{QUEUE}"
frame_size = {2 * MAX_MESSAGE}
"""
ATTEMPTS_MAX: Final = 8
"""Attempts to connect in a grace of 3 s. Doubling from 0.125 s, eight take 16 s at the least; a
loop without backoff makes hundreds."""


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQNode]:
    """A node whose operator we are; each test leaves it as it was."""
    with must_be_installed():
        node = RabbitMQNode(config={"max_message_size": str(MAX_MESSAGE)})
    with node:
        yield node


def check_next_upload(daemon: Daemon, url: str) -> None:
    answer = upload(daemon)
    assert answer.status == 201
    assert received(url, answer).parts[0].data == b"hello"


def received(url: str, answer: Answer) -> Received:
    """What the queue has of the only transfer in it."""
    transfers = transfers_in(url, QUEUE, ended=1)
    assert list(transfers) == [answer.json()["transfer"]]
    assert messages_left(url, QUEUE) == 0
    (transfer,) = transfers.values()
    return transfer


@contextmanager
def begun(daemon: Daemon, url: str, body: bytes) -> Iterator[RawConnection]:
    """A client whose upload has frames in the queue and most of its body still to send."""
    with RawConnection(daemon.address) as connection:
        connection.send(request("/upload/plain", body)[: 4 * FRAME])
        daemon.wait_until(lambda: messages_left(url, QUEUE) == 3, "3 frames are queued")
        yield connection


def rest_of(body: bytes) -> memoryview:
    """What ``begun`` has not sent."""
    head = len(request("/upload/plain", body)) - len(body)
    return memoryview(body)[4 * FRAME - head :]


@contextmanager
def sending(connection: RawConnection, data: memoryview) -> Iterator[None]:
    """``data`` goes out from a thread of its own, as fast as it is taken."""
    thread = threading.Thread(target=connection.send, args=(data,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def memory_alarm(node: RabbitMQNode) -> Iterator[None]:
    node.ctl("set_vm_memory_high_watermark", "0")
    try:
        yield
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.4")


# --- alarms -------------------------------------------------------------------------------------


def test_an_alarm_holds_an_upload_and_refuses_new_ones_before_their_body(
    node: RabbitMQNode, tmp_path: Path
) -> None:
    config = ROUTES + '[amqp]\nblocked_grace = "10 min"\nupload_window = "1 MiB"\n'
    body = content(8 * MIB)
    with (
        Daemon(node.url, config, directory=tmp_path) as daemon,
        begun(daemon, node.url, body) as held,
    ):
        with memory_alarm(node), sending(held, rest_of(body)):
            daemon.wait_until(lambda: daemon.ready()[0] == 503, "the alarm is known")
            assert "broker-blocked" in daemon.ready()[1]
            assert "low on memory" in daemon.ready()[1]
            daemon.wait_until(
                lambda: daemon.metric("relay_window_bytes") > MIB - FRAME, "the window is full"
            )
            daemon.wait_until(lambda: daemon.transfers()[0]["waits_for"] == "broker", "it waits")
            for expect in ([], ["Expect: 100-continue"]):
                with RawConnection(daemon.address) as late:
                    late.send(request_head("/upload/plain", MIB, None, *expect))
                    # No 100 (Continue), and an answer before the body.
                    detail = check_problem(late.answer(), 503, "broker-blocked")
                    assert "low on memory" in detail
            assert int(str(daemon.transfers()[0]["bytes"])) < 4 * MIB
            assert not held.has_answer()
            node.ctl("set_vm_memory_high_watermark", "0.4")
            daemon.wait_until(lambda: daemon.ready()[0] == 200, "the alarm is over")
        answer = held.answer()
        assert answer.status == 201
        assert received(node.url, answer).parts[0].data == body
        assert daemon.metric("relay_broker_connects_total") == 1
        check_next_upload(daemon, node.url)


def test_an_alarm_that_outlasts_the_grace_fails_the_upload_and_its_abort_follows(
    node: RabbitMQNode, tmp_path: Path
) -> None:
    config = ROUTES + '[amqp]\nblocked_grace = "1 s"\n'
    body = content(2 * MIB)
    with (
        Daemon(node.url, config, directory=tmp_path) as daemon,
        begun(daemon, node.url, body) as held,
    ):
        with memory_alarm(node):
            held.send(rest_of(body))
            answer = held.answer()
            check_problem(answer, 503, "broker-blocked")
            assert daemon.ready()[0] == 503
        daemon.wait_until(lambda: daemon.ready()[0] == 200, "the alarm is over")
        transfer = received(node.url, answer)
        assert transfer.aborted == "broker-blocked"
        assert not transfer.committed
        assert daemon.metric("relay_broker_connects_total") == 1
        check_next_upload(daemon, node.url)


# --- connections --------------------------------------------------------------------------------


PACE: Final = 0.002
"""Seconds between two blocks of an endless upload: frames of 4 KiB are under way all the same."""


class EndlessUpload:
    """A client that sends until it is told to end; its frames are under way at any moment."""

    def __init__(self, daemon: Daemon, route: str) -> None:
        self.blocks = 0
        self.block = content(10_000)
        self._connection = RawConnection(daemon.address)
        self._head = f"PUT /upload/{route}/f HTTP/1.1\r\nHost: relay.test\r\n".encode()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        self._connection.send(self._head + b"Transfer-Encoding: chunked\r\n\r\n")
        # Paced: while rabbitmqctl takes its time, a client at full speed would send gigabytes.
        while not self._is_ending.wait(PACE):
            self._connection.send(b"%x\r\n%b\r\n" % (len(self.block), self.block))
            self.blocks += 1
        self._connection.send(b"0\r\n\r\n")

    def end(self) -> Answer:
        """End the body and wait for the response."""
        self._is_ending.set()
        self._thread.join()
        return self._connection.answer()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending.set()
        self._connection.close()
        self._thread.join()


def close_all_connections(node: RabbitMQNode) -> None:
    node.ctl("close_all_connections", "--global", "maintenance")


def close_connection(node: RabbitMQNode) -> None:
    listed = node.ctl("list_connections", "pid", "client_properties")
    (ours,) = [line.split()[0] for line in listed.splitlines() if '"relay"' in line]
    node.ctl("close_connection", ours, "maintenance")


def test_connections_closed_by_the_operator_cost_an_upload_nothing(
    node: RabbitMQNode, tmp_path: Path
) -> None:
    config = ROUTES + '[amqp]\nupload_window = "256 KiB"\n'
    with (
        Daemon(node.url, config, directory=tmp_path) as daemon,
        EndlessUpload(daemon, "small") as client,
    ):
        for connects, close in enumerate([close_all_connections, close_connection] * 2, 2):
            before = client.blocks
            daemon.wait_until(lambda least=before: client.blocks > least + 10, "it goes on")  # type: ignore[misc]
            close(node)
            daemon.wait_until(
                lambda goal=connects: daemon.metric("relay_broker_connects_total") == goal,  # type: ignore[misc]
                "it is connected again",
            )
        answer = client.end()
        assert answer.status == 201
        transfer = received(node.url, answer)
        assert transfer.committed
        assert transfer.parts[0].data == client.block * client.blocks
        check_next_upload(daemon, node.url)


# --- logins and virtual hosts -------------------------------------------------------------------

VHOST: Final = "doomed"
USER: Final = "uploader"


def make_vhost(node: RabbitMQNode) -> None:
    node.ctl("add_vhost", VHOST)
    for user in (USER, "guest"):
        node.ctl("set_permissions", "--vhost", VHOST, user, ".*", ".*", ".*")


def make_user(node: RabbitMQNode) -> None:
    node.ctl("add_user", USER, "right")
    node.ctl("set_permissions", "--vhost", VHOST, USER, ".*", ".*", ".*")


@pytest.fixture
def tenant(node: RabbitMQNode) -> Iterator[str]:
    """The URL of a virtual host, for a user that there may be no more tomorrow."""
    node.ctl("add_user", USER, "right")
    make_vhost(node)
    yield f"amqp://{USER}:right@127.0.0.1:{node.port}/{VHOST}"
    for what, name in (("vhost", VHOST), ("user", USER)):
        # Of a test that failed, either may be gone.
        with suppress(RabbitMQFailed):
            node.ctl(f"delete_{what}", name)


def delete_vhost(node: RabbitMQNode) -> None:
    node.ctl("delete_vhost", VHOST)


def change_password(node: RabbitMQNode) -> None:
    node.ctl("change_password", USER, "wrong")
    # Who is logged in stays so.
    node.ctl("close_all_connections", "--global", "your password has changed")


def change_password_back(node: RabbitMQNode) -> None:
    node.ctl("change_password", USER, "right")


def delete_user(node: RabbitMQNode) -> None:
    node.ctl("delete_user", USER)


@pytest.mark.parametrize(
    ("take", "give_back", "reason"),
    [
        (delete_vhost, make_vhost, "vhost doomed not found"),
        (change_password, change_password_back, "refused the login"),
        (delete_user, make_user, "refused the login"),
    ],
    ids=["vhost deleted", "password changed", "user deleted"],
)
def test_who_is_refused_at_reconnect_is_told_why_and_does_not_hammer(
    node: RabbitMQNode,
    tenant: str,
    tmp_path: Path,
    take: Callable[[RabbitMQNode], None],
    give_back: Callable[[RabbitMQNode], None],
    reason: str,
) -> None:
    config = ROUTES + '[amqp]\nreconnect_grace = "3 s"\n'
    body = content(MIB)
    with Daemon(tenant, config, directory=tmp_path) as daemon:
        with begun(daemon, tenant, body) as client:
            log_before = node.log.stat().st_size
            take(node)
            client.send(rest_of(body))
            answer = client.answer()
        attempts = node.log.read_bytes()[log_before:].count(b"accepting AMQP connection")
        assert 1 <= attempts <= ATTEMPTS_MAX
        assert reason in check_problem(answer, 503, "broker-unavailable")
        status, why = daemon.ready()
        assert status == 503
        assert reason in why
        assert reason in check_problem(upload(daemon), 503, "broker-unavailable")
        give_back(node)
        daemon.wait_until(lambda: daemon.ready()[0] == 200, "it is connected again")
        # The failed upload's abort may come before or after it, or was given up: not looked at.
        assert upload(daemon).status == 201


# --- messages -----------------------------------------------------------------------------------


def test_a_frame_larger_than_the_broker_takes_is_told_and_other_uploads_go_on(
    node: RabbitMQNode, tmp_path: Path
) -> None:
    body = content(MIB)
    with (
        Daemon(node.url, ROUTES, directory=tmp_path) as daemon,
        begun(daemon, node.url, body) as sibling,
    ):
        for size in (2 * MAX_MESSAGE, 4 * MIB):
            answer = upload(daemon, "large", content(size))
            detail = check_problem(answer, 502, "broker-refused")
            assert f"message size {2 * MAX_MESSAGE}" in detail
            assert str(MAX_MESSAGE) in detail
        # What is small enough is taken, on the same route.
        small = upload(daemon, "large")
        assert small.status == 201
        sibling.send(rest_of(body))
        answer = sibling.answer()
        assert answer.status == 201
        assert daemon.metric("relay_broker_connects_total") == 1
        transfers = transfers_in(node.url, QUEUE, ended=2 + 1)
        committed = {name for name, transfer in transfers.items() if transfer.committed}
        assert committed == {small.json()["transfer"], answer.json()["transfer"]}
        assert transfers[answer.json()["transfer"]].parts[0].data == body
        check_next_upload(daemon, node.url)
