"""``connections = N``: uploads over several AMQP connections to a real broker."""

from pathlib import Path
from typing import Final

import requests

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.queue_reader import transfers_in
from tests.uploading import content

QUEUE: Final = "connections"
CONFIG: Final = f"""
[amqp]
connections = 3
[routes.default]
routing_key = "{QUEUE}"
[routes.default.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}
"""


def test_uploads_arrive_over_several_connections_also_when_one_is_closed(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    with Daemon(rabbitmq.url, CONFIG, directory=tmp_path) as daemon:
        daemon.wait_until(
            lambda: daemon.metric("relay_broker_connections") == 3, "it has 3 connections"
        )
        listed = rabbitmq.ctl("-q", "list_connections", "pid", "client_properties")
        ours = [line.split()[0] for line in listed.splitlines() if '"relay"' in line]
        assert len(ours) == 3
        receipts = [_put(daemon, number) for number in range(4)]
        rabbitmq.ctl("-q", "close_connection", ours[0], "the operator says so")
        receipts += [_put(daemon, number) for number in range(4)]
        daemon.wait_until(
            lambda: daemon.metric("relay_broker_connections") == 3, "it has 3 connections again"
        )
        transfers = transfers_in(rabbitmq.url, QUEUE, ended=len(receipts))
        assert set(transfers) == set(receipts)
        assert all(transfer.committed for transfer in transfers.values())


def _put(daemon: Daemon, number: int) -> str:
    """Upload a file; returns the transfer's id."""
    url = f"{daemon.url}/upload/{number}"
    response = requests.put(url, content(300_000), timeout=60)
    assert response.status_code == 201, response.text
    return str(response.json()["transfer"])
