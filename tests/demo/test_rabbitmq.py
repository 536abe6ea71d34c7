"""The private node: its life, its privacy, and that nothing of it stays behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from relay.demo import rabbitmq as module
from relay.demo.rabbitmq import RabbitMQFailed, RabbitMQMissing, RabbitMQNode

NewNode = Callable[..., RabbitMQNode]

QUEUE = "kept"


@contextmanager
def channel_to(node: RabbitMQNode) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(node.url))
    try:
        yield connection.channel()
    finally:
        connection.close()


def publish(node: RabbitMQNode, body: bytes) -> None:
    """Returns when the message is confirmed, so that it is on disk."""
    with channel_to(node) as channel:
        channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        channel.confirm_delivery()
        channel.basic_publish("", QUEUE, body, pika.BasicProperties(delivery_mode=2))


def fetch(node: RabbitMQNode) -> bytes | None:
    with channel_to(node) as channel:
        body: bytes | None = channel.basic_get(QUEUE, auto_ack=True)[2]
        return body


def processes_of(directory: Path) -> set[int]:
    """Every process whose environment or arguments name the directory."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                known = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if os.fsencode(directory) in known:
                found.add(int(process.name))
    return found


def assert_all_gone(directory: Path) -> None:
    """Waits for what the kernel and Erlang's helper processes do in their own time."""
    deadline = time.monotonic() + 60
    while directory.exists() or processes_of(directory):
        assert time.monotonic() < deadline, processes_of(directory)
        time.sleep(0.05)


def test_data_and_port_survive_a_restart_and_a_kill(new_node: NewNode) -> None:
    node = new_node()
    url = node.url
    publish(node, b"before the restart")
    node.restart()
    assert fetch(node) == b"before the restart"
    publish(node, b"before the kill")
    node.kill()
    assert node.pid is None
    node.start()
    assert fetch(node) == b"before the kill"
    assert node.url == url


def test_a_suspended_node_keeps_its_connections(new_node: NewNode) -> None:
    node = new_node()
    with channel_to(node) as channel:
        node.suspend()
        state = Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"
        node.resume()
        channel.queue_declare("declared after the pause", exclusive=True)


def test_a_suspended_node_can_still_be_stopped(new_node: NewNode) -> None:
    node = new_node()
    node.suspend()
    node.stop()
    assert node.pid is None


def test_two_nodes_share_nothing_whatever_the_callers_environment_says(
    rabbitmq: RabbitMQNode, new_node: NewNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RABBITMQ_NODENAME", rabbitmq.name)
    monkeypatch.setenv("RABBITMQ_NODE_PORT", str(rabbitmq.port))
    monkeypatch.setenv("RABBITMQ_MNESIA_BASE", str(rabbitmq.directory))
    monkeypatch.setenv("ERL_FLAGS", "-no-such-node")
    node = new_node()
    publish(node, b"")
    assert QUEUE in node.ctl("list_queues", "name")
    assert QUEUE not in rabbitmq.ctl("list_queues", "name")
    assert node.ctl("eval", "node().").strip() == f"'{node.name}'"
    assert node.port != rabbitmq.port


def test_the_nodes_config_takes_the_callers_lines(new_node: NewNode) -> None:
    node = new_node(config={"channel_max": "7"})
    assert node.ctl("eval", "application:get_env(rabbit, channel_max).").strip() == "{ok,7}"


def test_closing_leaves_no_process_and_no_file() -> None:
    with RabbitMQNode() as node:
        assert len(processes_of(node.directory)) >= 3  # Erlang, its port mapper, the guard
    node.close()
    assert_all_gone(node.directory)


def test_nothing_is_left_when_the_caller_is_killed() -> None:
    script = """if True:
        from relay.demo.rabbitmq import RabbitMQNode
        with RabbitMQNode() as node:
            print(node.directory, flush=True)
            input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        directory = Path(caller.stdout.readline().strip())
        assert processes_of(directory)
        caller.kill()
    assert_all_gone(directory)


def test_a_node_that_cannot_start_says_why_and_leaves_nothing() -> None:
    node = RabbitMQNode(config={"no.such.key": "1"})
    with pytest.raises(RabbitMQFailed, match=r"no\.such\.key"), node:
        pass
    assert_all_gone(node.directory)


def test_a_failing_command_says_why(rabbitmq: RabbitMQNode) -> None:
    with pytest.raises(RabbitMQFailed, match="no-such-command"):
        rabbitmq.ctl("no-such-command")


def test_a_missing_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RELAY_RABBITMQ_ROOT", raising=False)
    monkeypatch.setattr(module, "_PACKAGED_SCRIPTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RabbitMQMissing, match="rabbitmq-server is not installed"):
        RabbitMQNode()


def test_a_tree_without_a_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_RABBITMQ_ROOT", str(tmp_path))
    with pytest.raises(RabbitMQMissing, match=f"is installed in {tmp_path}"):
        RabbitMQNode()
