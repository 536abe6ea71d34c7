"""Uploads beside each other: neither a large one nor a slow route holds up the others.

Counted in frames and bytes; how long it takes, ``./dev bench slow`` tells.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.queue_reader import transfers_in
from tests.uploading import FRAME_SIZE, RawConnection, content, request, request_head, upload

MIB: Final = 1 << 20
SLOW_QUEUE: Final = "fair.slow"
UPLOAD_WINDOW: Final = 8 * MIB
ROUTES: Final = f"""
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


@contextmanager
def standing_still(node: RabbitMQNode) -> Iterator[None]:
    """The slow queue takes and confirms nothing; all else at the broker goes on."""
    lookup = (
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{SLOW_QUEUE}">>))'
    )
    node.ctl("eval", f"{lookup}, sys:suspend(amqqueue:get_pid(Q)).")
    try:
        yield
    finally:
        node.ctl("eval", f"{lookup}, sys:resume(amqqueue:get_pid(Q)).")


def test_an_upload_to_a_route_that_stands_still_does_not_slow_one_to_another(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    slow_body, fast_body = content(24 * MIB), content(16 * MIB)
    with (
        Daemon(rabbitmq.url, ROUTES, directory=tmp_path) as daemon,
        ThreadPoolExecutor(1) as pool,
    ):
        with standing_still(rabbitmq):
            slow = pool.submit(upload, daemon, "slow", slow_body)
            daemon.wait_until(
                lambda: daemon.metric("relay_window_bytes") > UPLOAD_WINDOW - FRAME_SIZE,
                "the slow one has all that it may have",
            )
            # Four times as much goes past it, through the same connection to the broker.
            for _ in range(4):
                assert upload(daemon, "plain", fast_body).status == 201
            assert not slow.done()
            assert daemon.metric("relay_window_bytes") <= UPLOAD_WINDOW
            assert daemon.metric("relay_window_waiting") == 0
        answer = slow.result()
        assert answer.status == 201
        (transfer,) = transfers_in(rabbitmq.url, SLOW_QUEUE, ended=1).values()
        assert transfer.parts[0].data == slow_body


def test_small_uploads_go_past_a_large_one(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    large, small = 100 << 30, request("/upload/plain", b"x" * 1024)
    block = content(MIB)
    with (
        Daemon(rabbitmq.url, ROUTES, directory=tmp_path) as daemon,
        RawConnection(daemon.address) as greedy,
        RawConnection(daemon.address) as modest,
        ThreadPoolExecutor(1) as pool,
    ):

        def send() -> None:
            greedy.send(request_head("/upload/plain", large))
            while not is_enough:
                greedy.send(block)

        is_enough: list[bool] = []
        sending = pool.submit(send)
        try:
            daemon.wait_until(lambda: daemon.metric("relay_uploads") == 1, "it has begun")
            for _ in range(50):
                modest.send(small)
                assert modest.answer().status == 201
            (transfer,) = daemon.transfers()
            assert int(str(transfer["bytes"])) > 0
        finally:
            is_enough.append(True)
            sending.result()
