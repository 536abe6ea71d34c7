"""Whether a peer is worth being measured: it publishes what it is sent, and answers for it.

``./dev bench`` runs it before it measures: what forgets confirms or bytes is fast.
"""

import random
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import pika
import requests

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench.peers import PEERS, available
from tests.bench.peers.destination import MESSAGE_BYTES
from tests.bench.peers.process import PeerFailed, PeerProcess
from tests.queue_reader import Delivered, messages_now

TIMEOUT: Final = 60.0
"""Seconds for an answer."""

PERSISTENT: Final = 2
FILE: Final = random.Random(1).randbytes(2 * MESSAGE_BYTES + 1000)
# Text, because most frameworks decode a plain field; beyond ASCII, and of several messages.
FIELD: Final = ("für das Archiv, " * 10_000).encode()
RAW: Final = random.Random(2).randbytes(3 * MESSAGE_BYTES)


def main(argv: list[str]) -> int:
    """Checks the peers named, or all, against a broker of its own; 1 if one of them fails."""
    if strange := set(argv) - set(PEERS):
        print(f"no peer {', '.join(sorted(strange))}; there are: {', '.join(PEERS)}")
        return 2
    failed = False
    with RabbitMQNode() as node:
        for name in argv or PEERS:
            missing = available(name)
            if missing is not None:
                print(f"{name:<10} {missing}")
                continue
            try:
                check(name, node.url)
            except PeerFailed as exc:
                failed = True
                print(exc)
            else:
                print(f"{name:<10} {PEERS[name](node.url, '', '').version}")
    return int(failed)


def check(name: str, url: str) -> None:
    """Sends a peer a form and a raw body, to be found as they were, and two to be refused.

    Args:
        name: of the peer.
        url: a broker's; what is declared there is removed again.

    Raises:
        PeerFailed: it lost or changed a byte, cut it otherwise, or said 201 of what is not safe.
    """
    try:
        _check_published(name, url)
        _check_refused(name, url, {"x-max-length": 1, "x-overflow": "reject-publish"})
        _check_refused(name, url, None)
    except PeerFailed as exc:
        raise PeerFailed(f"the peer {name}: {exc}") from exc


def _check_published(name: str, url: str) -> None:
    with _queue(url, {}) as queue, PEERS[name](url, "", queue) as peer:
        for send, sent in ((_send_form, {"f": FILE, "note": FIELD}), (_send_raw, {"": RAW})):
            answer = send(peer)
            if answer.status_code != requests.codes.created:
                raise PeerFailed(f"{answer.status_code} {answer.text}\n{peer.log()}")
            _compare(messages_now(url, queue), sent)


def _check_refused(name: str, url: str, arguments: Mapping[str, object] | None) -> None:
    """A queue that rejects, or none at all: no 201."""
    with _queue(url, arguments) as queue, PEERS[name](url, "", queue, mandatory=True) as peer:
        for send in (_send_form, _send_raw):
            if (status := send(peer).status_code) < requests.codes.internal_server_error:
                raise PeerFailed(f"{status} for what the broker did not take")


def _compare(messages: Sequence[Delivered], sent: Mapping[str, bytes]) -> None:
    parts: dict[str, list[bytes]] = defaultdict(list)
    for message in messages:
        if message.properties.delivery_mode != PERSISTENT:
            raise PeerFailed("a message that is not persistent")
        assert message.properties.headers is not None
        parts[str(message.properties.headers["name"])].append(message.body)
    for name in sorted({*parts, *sent}):
        if b"".join(parts[name]) != sent.get(name, b""):
            raise PeerFailed(f"the bytes of {name!r} are not what was sent")
        sizes = {len(body) for body in parts[name][:-1]}
        if sizes - {MESSAGE_BYTES} or len(parts[name][-1]) > MESSAGE_BYTES:
            raise PeerFailed(f"{name!r} is cut in messages of {sizes}")


def _send_form(peer: PeerProcess) -> requests.Response:
    return requests.post(
        _url(peer),
        files={"f": ("x.bin", FILE, "application/octet-stream")},
        data={"note": FIELD},
        timeout=TIMEOUT,
    )


def _send_raw(peer: PeerProcess) -> requests.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(_url(peer), data=RAW, headers=headers, timeout=TIMEOUT)


def _url(peer: PeerProcess) -> str:
    host, port = peer.address
    return f"http://{host}:{port}{peer.path}"


@contextmanager
def _queue(url: str, arguments: Mapping[str, object] | None) -> Iterator[str]:
    """The name of a queue of such arguments; with None, of one that does not exist."""
    name = f"bench-check-{secrets.token_hex(6)}"
    if arguments is None:
        yield name
        return
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(name, durable=True, arguments={**arguments})
    try:
        yield name
    finally:
        channel.queue_delete(name)
        connection.close()
