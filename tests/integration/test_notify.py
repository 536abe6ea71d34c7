"""The daemon under Type=notify, as far as a socket shows: the unit itself is tested elsewhere."""

import os
from pathlib import Path

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.notify_socket import Manager


def test_the_daemon_tells_systemd_what_it_does(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    manager = Manager(f"{tmp_path}/notify")
    heard: list[list[str]] = []

    def listen(*lines: str) -> bool:
        heard.extend(manager.heard())
        return list(lines) in heard

    environ = os.environ | manager.environ | {"WATCHDOG_USEC": "200000"}
    config = '[http]\ndrain_timeout = "7 s"\n'
    with Daemon(rabbitmq.url, config, directory=tmp_path, env=environ) as daemon:
        daemon.wait_until(lambda: listen("READY=1"), "it says READY")
        status = "STATUS=0 uploads, 0.0 MiB/s; broker ready"
        daemon.wait_until(
            lambda: listen("READY=1") and heard.count([status, "WATCHDOG=1"]) > 2,
            "the watchdog is fed again and again",
        )
        assert daemon.stop() == 0
        assert listen("STOPPING=1", "EXTEND_TIMEOUT_USEC=13000000")
    assert heard.count(["READY=1"]) == 1
    manager.close()
