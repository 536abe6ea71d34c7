"""Uploads beside each other: neither a large one nor a slow route holds up the others.

Counted in frames and bytes; how long it takes, ``./dev bench slow`` tells.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from relay.broker.publication import MESSAGES_MAX
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.queue_reader import transfers_in
from tests.still_queue import standing_still
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
frame_size = FRAME_SIZE
[routes.slow.queue]
name = "{SLOW_QUEUE}"
type = "classic"
arguments = {{}}
"""


@pytest.mark.parametrize("frame_size", [FRAME_SIZE, 4096])
def test_an_upload_to_a_route_that_stands_still_does_not_slow_one_to_another(
    rabbitmq: RabbitMQNode, tmp_path: Path, frame_size: int
) -> None:
    slow_body, fast_body = content(24 * MIB), content(16 * MIB)
    config = ROUTES.replace("FRAME_SIZE", str(frame_size))
    # As many as there may be, or their bytes.
    most = min(UPLOAD_WINDOW, MESSAGES_MAX * frame_size)
    with (
        Daemon(rabbitmq.url, config, directory=tmp_path) as daemon,
        ThreadPoolExecutor(1) as pool,
    ):
        with standing_still(rabbitmq, SLOW_QUEUE):
            slow = pool.submit(upload, daemon, "slow", slow_body)
            daemon.wait_until(
                lambda: daemon.metric("relay_window_bytes") > most - frame_size,
                "the slow one has all that it may have",
            )
            # Four times as much goes past it, through the same connection to the broker.
            for _ in range(4):
                assert upload(daemon, "plain", fast_body).status == 201
            assert not slow.done()
            assert daemon.metric("relay_window_bytes") <= most
            assert daemon.metric("relay_window_waiting") == 0
        answer = slow.result()
        assert answer.status == 201
        (transfer,) = transfers_in(rabbitmq.url, SLOW_QUEUE, ended=1).values()
        assert transfer.parts[0].data == slow_body


def test_many_uploads_to_a_route_that_stands_still_do_not_stop_those_to_another(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    """More of them than fill the window: what is kept for the other route is not theirs."""
    count, body = 12, content(9 * MIB)
    config = ROUTES.replace("FRAME_SIZE", str(FRAME_SIZE))
    with (
        Daemon(rabbitmq.url, config, directory=tmp_path) as daemon,
        ThreadPoolExecutor(count) as pool,
    ):
        with standing_still(rabbitmq, SLOW_QUEUE):
            slow = [pool.submit(upload, daemon, "slow", body) for _ in range(count)]
            daemon.wait_until(
                lambda: daemon.metric("relay_window_waiting") >= count // 3,
                "the window has no room for them",
            )
            for size in (5, 16 * MIB):
                assert upload(daemon, "plain", content(size)).status == 201
            assert not any(each.done() for each in slow)
        assert [each.result().status for each in slow] == [201] * count
    transfers_in(rabbitmq.url, SLOW_QUEUE, ended=count)


def test_small_uploads_go_past_a_large_one(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    large, small = 100 << 30, request("/upload/plain", b"x" * 1024)
    block = content(MIB)
    with (
        Daemon(
            rabbitmq.url, ROUTES.replace("FRAME_SIZE", str(FRAME_SIZE)), directory=tmp_path
        ) as daemon,
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
            daemon.wait_until(
                lambda: daemon.metric("relay_uploads_in_progress") == 1, "it has begun"
            )
            for _ in range(50):
                modest.send(small)
                assert modest.answer().status == 201
            (transfer,) = daemon.transfers()
            assert int(str(transfer["bytes"])) > 0
        finally:
            is_enough.append(True)
            sending.result()
