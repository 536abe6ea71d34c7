"""SIGHUP: what a running daemon takes over, what it does not, and what it leaves alone."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.notify_socket import Manager
from tests.uploading import RawConnection, check_problem, request_head, upload

DONE = 'msg="reloaded configuration, tokens and certificates"'


def config(url: str, http: str = "", more: str = "") -> str:
    return f'[http]\n{http}\n[amqp]\nurls = ["{url}"]\n[routes.plain]\nexchange = "amq.fanout"' + (
        f"\nmandatory = false\n{more}"
    )


@pytest.fixture
def daemon(rabbitmq: RabbitMQNode, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon([], config(rabbitmq.url), directory=tmp_path) as daemon:
        yield daemon


@pytest.fixture
def reload(daemon: Daemon, tmp_path: Path) -> Callable[[str, str], str]:
    """Writes the file, and waits for a line of the log that it did not have; returns that."""

    def reload(text: str, awaited: str) -> str:
        (tmp_path / "relay.toml").write_text(text)
        known = len(daemon.log)
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_until(
            lambda: any(awaited in line for line in daemon.log[known:]), f"it says {awaited}"
        )
        return next(line for line in daemon.log[known:] if awaited in line)

    return reload


def test_another_configuration_does_not_touch_uploads_in_progress(
    daemon: Daemon, reload: Callable[[str, str], str], rabbitmq: RabbitMQNode
) -> None:
    with RawConnection(daemon.address) as client:
        client.send(request_head("/upload/plain", 300_000))
        client.send(bytes(200_000))
        daemon.wait_until(lambda: bool(daemon.transfers()), "it is in progress")
        # Another URL of the same broker, another limit, another route.
        url = rabbitmq.url.replace("127.0.0.1", "localhost")
        route = '[routes.new]\nexchange = "amq.fanout"\nmandatory = false\nmax_bytes = 10\n'
        reload(config(url, "max_uploads = 1", f'{route}[log]\nlevel = "error"'), DONE)
        check_problem(upload(daemon), 503, "too-many-uploads")
        client.send(bytes(100_000))
        assert client.answer().status == 201
    assert upload(daemon, "new", b"0123456789").status == 201
    check_problem(upload(daemon, "new", b"0123456789a"), 413, "too-large")
    lines = len(daemon.log)
    assert upload(daemon).status == 201
    assert len(daemon.log) == lines, "the log level has changed, too"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[http", "relay.toml: cannot be read"),
        ("[http]\nmax_upload = 1", "relay.toml: http.max_upload: unknown key"),
        ('[auth]\ntokens_file = "/nonexistent"', "auth.tokens_file: "),
        ('[http.tls]\ncertificate_file = "/nonexistent"', "http.tls.certificate_file: "),
        ('[amqp]\nurls = ["amqps://a"]\nca_file = "/nonexistent"', "amqp.ca_file: "),
    ],
)
def test_a_bad_file_changes_nothing_and_is_reported(
    daemon: Daemon, reload: Callable[[str, str], str], text: str, reason: str
) -> None:
    assert reason in reload(text, "not reloaded, nothing has changed: ")
    assert upload(daemon).status == 201


def test_what_needs_a_restart_is_named(
    daemon: Daemon, reload: Callable[[str, str], str], rabbitmq: RabbitMQNode
) -> None:
    line = reload(config(rabbitmq.url, "max_connections = 7"), "needs a restart")
    assert '"this needs a restart: http.max_connections"' in line


def test_systemd_is_told_of_a_reload_and_of_what_became_of_it(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    manager = Manager(f"{tmp_path}/notify")
    heard: list[str] = []

    def has_heard(text: str) -> bool:
        heard.extend(line for lines in manager.heard() for line in lines)
        return any(line.startswith(text) for line in heard)

    environ = os.environ | manager.environ | {"WATCHDOG_USEC": "200000"}
    with Daemon([], config(rabbitmq.url), directory=tmp_path, env=environ) as daemon:
        daemon.wait_until(lambda: has_heard("READY=1"), "it says READY")
        heard.clear()
        (tmp_path / "relay.toml").write_text("[http")
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_until(lambda: has_heard("STATUS=not reloaded: "), "it says why not")
        assert [line for line in heard if line in ("RELOADING=1", "READY=1")] == [
            "RELOADING=1",
            "READY=1",
        ]
        heard.clear()
        (tmp_path / "relay.toml").write_text(config(rabbitmq.url))
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_until(lambda: has_heard("STATUS=0 uploads"), "the complaint is gone")
    manager.close()
