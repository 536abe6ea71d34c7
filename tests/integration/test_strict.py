"""The tables of strict HTTP and of forms, once more: a real daemon, real sockets, a real queue.

How bytes are cut is for the tables' own tests. Here each row is a connection of its own, sent at
once and with a further request behind it; then the queue must hold what was answered with 201, in
that order, and nothing else.
"""

import socket
from collections.abc import Iterator

import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from relay.model import PartHead
from tests.form_reading import form
from tests.queue_reader import messages_left, transfers_in
from tests.scripted_client import responses
from tests.strict.form_upload import PLAIN_TYPE
from tests.strict.test_http import CASES, NEXT
from tests.strict.test_multipart import CLIENTS, REFUSED, REFUSED_TYPES, TAKEN
from tests.uploading import ANSWER_TIMEOUT

QUEUE = "strict"
CONFIG = f"""
[routes.default]
routing_key = "{QUEUE}"
[routes.default.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}
"""


@pytest.fixture(scope="module")
def daemon(rabbitmq: RabbitMQNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(rabbitmq.url, CONFIG, directory=tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


def answers(daemon: Daemon, data: bytes) -> tuple[list[str], bool]:
    """What a client gets that sends ``data`` and hangs up."""
    with socket.create_connection(daemon.address, timeout=ANSWER_TIMEOUT) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as reader:
            return responses(reader.read())


def test_a_request_has_one_reading_or_none(daemon: Daemon, rabbitmq: RabbitMQNode) -> None:
    sent: list[bytes] = []
    for name, case in CASES.items():
        assert answers(daemon, case.data) == (list(case.answers), case.closes), name
        sent += case.bodies
        more = [] if case.closes else ["201"]
        assert answers(daemon, case.data + NEXT) == ([*case.answers, *more], case.closes), name
        sent += [*case.bodies, *([b"after"] if more else [])]
    transfers = transfers_in(rabbitmq.url, QUEUE, ended=len(sent))
    assert [b"".join(part.data for part in found.parts) for found in transfers.values()] == sent
    assert messages_left(rabbitmq.url, QUEUE) == 0


def test_forms_are_taken_or_refused(daemon: Daemon, rabbitmq: RabbitMQNode) -> None:
    sent: list[PartHead] = []

    def upload(body: bytes, content_type: bytes = PLAIN_TYPE.encode()) -> list[str]:
        head = b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
        return answers(daemon, head % (content_type, len(body)) + body)[0]

    for name, (content_type, head, expected) in CLIENTS.items():
        assert upload(form(b"content", head=head + b"\r\n\r\n"), content_type.encode()) == [
            "201"
        ], name
        sent.append(expected)
    for name, (body, expected) in TAKEN.items():
        assert upload(body) == ["201"], name
        sent.append(expected)
    for name, body in REFUSED.items():
        assert upload(body) == ["400 bad-multipart"], name
    for name, (value, error) in REFUSED_TYPES.items():
        if b"\n" in value:
            continue  # no field can have it, so that the head is refused before
        assert upload(form(b"a"), value) == [f"{error.status} {error.code}"], name
    transfers = transfers_in(rabbitmq.url, QUEUE, ended=len(sent))
    assert [
        (part.head, bytes(part.data)) for found in transfers.values() for part in found.parts
    ] == [(head, b"content") for head in sent]
    assert messages_left(rabbitmq.url, QUEUE) == 0
