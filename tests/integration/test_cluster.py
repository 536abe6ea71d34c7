"""A cluster of three nodes with a quorum queue: which faults a client notices, and which not."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.cluster import Cluster
from tests.private_node import must_be_installed
from tests.queue_reader import messages_now, reassemble, transfers_in
from tests.uploading import Answer, RawConnection, content, request, request_head

KIB: Final = 1 << 10
QUEUE: Final = "cluster"
CLIENTS: Final = 4
FRAME: Final = 32 * KIB
FRAMES: Final = 16
"""Frames of an upload under load: with its pace, half a second."""

PACE: Final = 0.03
"""Seconds between two frames of a client. The load is to be steady, not large."""

FAILURES: Final = {
    (503, "broker-unavailable"),
    (504, "confirm-timeout"),
    (504, "outcome-unknown"),
}
"""What uploads may fail with while there is no majority; which, depends on where the leader was."""

FAILURE_MAX: Final = 30.0
"""Seconds until a client knows. Of a node that says nothing: ``confirm_timeout``, then
``reconnect_grace``, then ``confirm_timeout`` again: 6 s; the rest is for a busy machine."""

CONFIG: Final = f"""
[routes.default]
routing_key = "{QUEUE}"
frame_size = {FRAME}
[routes.default.queue]
name = "{QUEUE}"
type = "quorum"
arguments = {{}}
[amqp]
connections = 3
window = "3 MiB"
upload_window = "256 KiB"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster to break; each test leaves it whole, and the queue empty."""
    with must_be_installed():
        cluster = Cluster()
    with cluster:
        yield cluster


class Client:
    """Uploads one body after the other, in a thread, until it is told to end.

    Attributes:
        answers: of each upload, in order.
        slowest: seconds of the longest wait, for bytes to be taken or for an answer.
    """

    def __init__(self, daemon: Daemon, number: int) -> None:
        self.answers: list[Answer] = []
        self.slowest = 0.0
        self._address = daemon.address
        self._number = number
        self._random = content(FRAME * FRAMES + number)
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def body(self, upload: int) -> bytes:
        """What it sends as upload number ``upload``: no other upload of anybody is the same."""
        return f"{self._number}.{upload}.".encode() + self._random

    def _run(self) -> None:
        while not self._is_ending.is_set():
            self._upload(memoryview(self.body(len(self.answers))))

    def _upload(self, body: memoryview) -> None:
        pace = threading.Event()
        with RawConnection(self._address) as connection:
            connection.send(request_head("/upload", len(body)))
            for start in range(0, len(body), FRAME):
                began = time.monotonic()
                connection.send(body[start : start + FRAME])
                self._waited_since(began)
                pace.wait(PACE)
            began = time.monotonic()
            self.answers.append(connection.answer())
            self._waited_since(began)

    def _waited_since(self, began: float) -> None:
        self.slowest = max(self.slowest, time.monotonic() - began)

    def end(self) -> None:
        """Let the upload in progress end."""
        self._is_ending.set()
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def upload(daemon: Daemon, body: bytes) -> Answer:
    with RawConnection(daemon.address) as connection:
        connection.send(request("/upload", body))
        return connection.answer()


def test_a_rolling_restart_fails_no_upload(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Daemon(cluster.urls, CONFIG, directory=tmp_path) as daemon:
        cluster.wait_whole(QUEUE)
        clients = [Client(daemon, number) for number in range(CLIENTS)]
        with clients[0], clients[1], clients[2], clients[3]:
            cluster.restart_in_turn(QUEUE)
        expected = {
            answer.json().get("transfer"): client.body(number)
            for client in clients
            for number, answer in enumerate(client.answers)
        }
        answers = [answer for client in clients for answer in client.answers]
        failed = [answer.body for answer in answers if answer.status != 201]
        assert not failed, "\n".join(daemon.log)
        assert len(expected) == len(answers)
        transfers = transfers_in(cluster.urls[0], QUEUE, ended=len(expected))
        assert set(transfers) == set(expected)
        assert all(transfer.committed for transfer in transfers.values())
        for name, body in expected.items():
            (part,) = transfers[name].parts
            assert part.data == body
        connects = daemon.metric("relay_broker_connects_total")
        assert connects > 3
    slowest = max(client.slowest for client in clients)
    again = sum(transfer.duplicates for transfer in transfers.values())
    with capsys.disabled():
        print(
            f"\nrolling restart: {len(answers)} uploads, all 201; slowest pause {slowest:.2f} s;"
            f" {connects:.0f} connections made; {again} frames came twice"
        )


def test_without_a_majority_uploads_fail_in_time_and_with_one_they_work_again(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG + 'reconnect_grace = "2 s"\nconfirm_timeout = "2 s"\n'
    body = content(8 * FRAME)
    with Daemon(cluster.urls, config, directory=tmp_path) as daemon:
        first = upload(daemon, body)
        assert first.status == 201
        with RawConnection(daemon.address) as connection:
            whole = memoryview(request("/upload", body))
            connection.send(whole[: 4 * FRAME])
            daemon.wait_until(
                lambda: daemon.metric("relay_uploads_in_progress") == 1, "it has begun"
            )
            cluster.at_once(RabbitMQNode.kill, cluster.nodes[1:])
            began = time.monotonic()
            connection.send(whole[4 * FRAME :])
            answers = [connection.answer()]
        answers.append(upload(daemon, body))
        assert time.monotonic() - began < len(answers) * FAILURE_MAX
        cluster.at_once(RabbitMQNode.start, cluster.nodes[1:])

        def works() -> bool:
            answers.append(upload(daemon, body))
            return answers[-1].status == 201

        daemon.wait_until(works, "uploads work again")
        *failed, last = answers
        said = Counter((answer.status, answer.json()["code"]) for answer in failed)
        with capsys.disabled():
            print(f"\nno majority: {dict(said)}")
        assert set(said) <= FAILURES, "\n".join(daemon.log)
        assert daemon.stop() == 0
    items = [message.decode() for message in messages_now(cluster.urls[0], QUEUE)]
    transfers = reassemble(iter(items))
    unknown = {a.json()["transfer"] for a in failed if a.json()["code"] == "outcome-unknown"}
    committed = {name for name, transfer in transfers.items() if transfer.committed} - unknown
    # The outcome is not known only of what was all there but for the commit frame.
    for name in unknown:
        (part,) = transfers[name].parts
        assert transfers[name].committed or part.data == body[:-FRAME]
    assert committed == {first.json()["transfer"], last.json()["transfer"]}
    assert all(transfers[name].parts[0].data == body for name in committed)
