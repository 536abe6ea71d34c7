"""SIGTERM: what is connected may finish, and what does not is told to both ends."""

import os
import signal
from pathlib import Path

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.queue_reader import transfers_in
from tests.uploading import RawConnection, check_problem, request_head

CONFIG = """
[http]
drain_timeout = "1500 ms"
[routes.drained]
routing_key = "drained"
[routes.drained.queue]
name = "drained"
type = "classic"
arguments = {}
"""


def test_a_drain_lets_finish_what_can_and_aborts_the_rest(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    with (
        Daemon(rabbitmq.url, CONFIG, directory=tmp_path) as daemon,
        RawConnection(daemon.address) as stuck,
        RawConnection(daemon.address) as quick,
        RawConnection(daemon.address) as idle,
    ):
        for client in (stuck, quick):
            client.send(request_head("/upload/drained", 300_000) + bytes(200_000))
        daemon.wait_until(lambda: len(daemon.transfers()) == 2, "both are in progress")
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.wait_until(lambda: daemon.ready()[0] == 503, "it drains")
        quick.send(bytes(100_000))
        answer = quick.answer()
        assert answer.status == 201
        assert quick.at_end()
        assert idle.at_end()
        aborted = stuck.answer()
        check_problem(aborted, 503, "shutting-down")
        assert daemon.stop() == 0
    transfers = transfers_in(rabbitmq.url, "drained", ended=2)
    assert transfers[answer.json()["transfer"]].committed
    assert transfers[aborted.json()["transfer"]].aborted == "shutting-down"
