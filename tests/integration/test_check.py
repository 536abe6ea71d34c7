"""``relay check`` as a process, and the daemon's start: each finding provoked at a real broker."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pika
import pytest
import trustme
from pika.adapters.blocking_connection import BlockingChannel

import relay
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from relay.model import Abort
from relay.protocol.reassembly import Aborted, Reassembler
from relay.protocol.wire import decode
from tests.certificates import save_ca


@dataclass
class Result:
    """What a run of the command came to."""

    code: int
    out: str
    err: list[str]

    def about(self, *words: str) -> str:
        """The one line on standard error that has all these words."""
        lines = [line for line in self.err if all(word in line for word in words)]
        assert len(lines) == 1, self.err
        return lines[0]


Check = Callable[..., Result]


@pytest.fixture
def check(rabbitmq: RabbitMQNode, tmp_path: Path) -> Check:
    """Runs ``relay check`` with this configuration, against the session's node by default."""

    def run(toml: str, *options: str, urls: list[str] | None = None) -> Result:
        path = tmp_path / "relay.toml"
        path.write_text(f"[amqp]\nurls = {urls or [rabbitmq.url]}\n{toml}")
        done = subprocess.run(
            [sys.executable, "-m", "relay", "check", "--config", str(path), *options],
            env=os.environ | {"PYTHONPATH": str(Path(relay.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Result(done.returncode, done.stdout, done.stderr.splitlines())

    return run


@pytest.fixture
def channel(rabbitmq: RabbitMQNode) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        yield connection.channel()


@pytest.fixture
def name(rabbitmq: RabbitMQNode) -> Iterator[str]:
    """Of a queue, an exchange, or both, of the test's own."""
    name = f"check-{uuid.uuid4()}"
    yield name
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        connection.channel().queue_delete(name)
        connection.channel().exchange_delete(name)


def default(name: str, arguments: str = '{ x-overflow = "reject-publish" }') -> str:
    """The default route, with a queue of that name to declare."""
    return (
        f'[routes.default]\nrouting_key = "{name}"\n'
        f'[routes.default.queue]\nname = "{name}"\narguments = {arguments}\n'
    )


def by_exchange(name: str, more: str = "") -> str:
    """The default route, by an exchange of that name."""
    return f'[routes.default]\nexchange = "{name}"\nrouting_key = "key"\n{more}\n'


def test_a_route_whose_queue_is_declared_passes_and_nothing_is_left_in_it(
    check: Check, channel: BlockingChannel, name: str
) -> None:
    result = check(default(name))
    assert (result.code, result.err) == (0, [])
    assert "1 route, 0 errors, 0 warnings" in result.out
    assert channel.queue_declare(name, passive=True).method.message_count == 0


def test_every_argument_that_differs_is_named_with_both_values(
    check: Check, channel: BlockingChannel, name: str
) -> None:
    channel.queue_declare(name, durable=True, arguments={"x-max-length": 10, "x-max-priority": 3})
    result = check(default(name))
    assert result.code == 1
    wanted = {
        "x-max-length is 10 at": "not set in",
        "x-max-priority is 3 at": "not set in",
        "x-overflow is not set at": "'reject-publish' in",
        "x-queue-type is": "'quorum' in",  # 'classic' since RabbitMQ 4, not set before
    }
    for broker, configuration in wanted.items():
        line = result.about(broker, configuration)
        assert line.startswith(f"error: route default: queue '{name}'")
        assert "routes.default.queue." in line
    assert sum(line.startswith("error:") for line in result.err) == len(wanted)
    result.about("warning:", "x-max-length 10", "deletes frames that were confirmed")


def test_a_transient_queue_is_refused_as_declared_and_warned_of_as_found(
    check: Check, channel: BlockingChannel, name: str
) -> None:
    channel.queue_declare(name, auto_delete=True, arguments={"x-expires": 600_000})
    declared = check(default(name))
    assert declared.code == 1
    declared.about("error:", "durable is false at the broker and true", "delete the queue")
    declared.about("error:", "auto_delete is true at the broker and false", "delete the queue")
    found = check(f'[routes.default]\nrouting_key = "{name}"\n')
    assert found.code == 0
    found.about("warning:", "is not durable")
    found.about("warning:", "is auto-delete")
    found.about("warning:", "unused for 600000 ms")
    found.about("warning:", "is classic", "quorum")
    assert len(found.err) == 4


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ({"x-queue-type": "quorum", "x-max-length-bytes": 1000}, "x-max-length-bytes 1000"),
        ({"x-queue-type": "quorum", "x-max-length": 7, "x-overflow": "drop-head"}, "length 7"),
        ({"x-queue-type": "quorum", "x-max-length": 7, "x-overflow": "reject-publish"}, None),
        ({"x-queue-type": "quorum"}, None),
        ({"x-queue-type": "stream", "x-max-length-bytes": 10**9}, None),
    ],
)
def test_a_queue_that_drops_its_head_is_warned_of_and_no_other(
    check: Check,
    channel: BlockingChannel,
    name: str,
    arguments: dict[str, object],
    limit: str | None,
) -> None:
    channel.queue_declare(name, durable=True, arguments=arguments)
    result = check(f'[routes.default]\nrouting_key = "{name}"\n')
    assert result.code == 0
    if limit is None:
        assert result.err == []
    else:
        assert limit in result.about("warning:", "drop-head", 'x-overflow "reject-publish"')
        assert len(result.err) == 1


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "found"])
@pytest.mark.parametrize("limit", [None, -1, 5])
def test_a_queue_that_drops_what_is_delivered_too_often_is_told_of(
    check: Check,
    channel: BlockingChannel,
    rabbitmq: RabbitMQNode,
    name: str,
    limit: int | None,
    is_declared: bool,
) -> None:
    arguments = {} if limit is None else {"x-delivery-limit": limit}
    channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum", **arguments})
    declaration = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    result = check(
        default(name, f"{{ {declaration} }}")
        if is_declared
        else f'[routes.default]\nrouting_key = "{name}"\n'
    )
    assert result.code == 0
    by_default = "delivered 20 times" in result.out
    is_4 = int(rabbitmq.ctl("version").partition(".")[0]) >= 4
    # To RabbitMQ 3, -1 is a limit like any other; to RabbitMQ 4, it is none.
    warned = limit == 5 or (limit == -1 and not is_4)
    assert by_default == (limit is None and is_4)
    assert len(result.err) == warned
    if warned:
        result.about("warning: route default", f"x-delivery-limit {limit}:")


def test_classic_queues_are_warned_of_and_worse_without_persistence(
    check: Check, name: str
) -> None:
    queue = f'queue.name = "{name}"\nqueue.type = "classic"\nqueue.arguments = {{}}\n'
    result = check(
        f'[routes.default]\nrouting_key = "{name}"\n{queue}'
        f'[routes.b]\nrouting_key = "{name}"\npersistent = false\n{queue}'
    )
    assert result.code == 0
    result.about("warning: route default", "classic", "one node")
    result.about("warning: route b", "before they are on disk", "routes.b.persistent = true")
    assert len(result.err) == 2


def test_arguments_that_the_broker_does_not_take_are_told_in_its_words(
    check: Check, name: str
) -> None:
    result = check(default(name, '{ x-overflow = "nonsense" }'))
    assert result.code == 1
    result.about("error: route default", "invalid arg 'x-overflow'", "[routes.default.queue]")
    assert len(result.err) == 1


def test_a_missing_exchange_is_an_error(check: Check) -> None:
    result = check(by_exchange("no-such-exchange"))
    assert result.code == 1
    result.about("error: route default", "'no-such-exchange' does not exist", "declare it")
    assert len(result.err) == 1


def test_an_exchange_without_a_binding_is_an_error_if_the_route_is_mandatory(
    check: Check, channel: BlockingChannel, name: str
) -> None:
    channel.exchange_declare(name, "topic")
    result = check(
        by_exchange(name)
        + f'[routes.b]\nexchange = "{name}"\nmandatory = false\n'
        + f'[routes.c]\nexchange = "{name}"\nrouting_key = "{{route}}.{{transfer}}"\n'
    )
    assert result.code == 1
    result.about("error: route default", "nothing is bound", "'key'", "502", "bind a queue")
    result.about("warning: route b", "nothing is bound", "confirmed and gone")
    result.about("warning: route c", "nothing is bound", "'c.", "only a probe")
    assert len(result.err) == 3


def test_a_bound_exchange_passes_with_what_cannot_be_seen_and_its_probe_is_ignored(
    check: Check, channel: BlockingChannel, name: str
) -> None:
    channel.exchange_declare(name, "fanout")
    channel.queue_declare(name, durable=True)
    channel.queue_bind(name, name)
    result = check(by_exchange(name))
    assert (result.code, result.err) == (0, [])
    assert "cannot be seen over AMQP" in result.out
    method, properties, body = channel.basic_get(name, auto_ack=True)
    assert method is not None
    assert properties is not None
    assert method.message_count == 0
    abort = decode(
        app_id=properties.app_id,
        type=properties.type,
        correlation_id=properties.correlation_id,
        timestamp=properties.timestamp,
        headers=properties.headers,
        body=body or b"",
    )
    assert isinstance(abort, Abort)
    assert Reassembler().feed(abort, 0) == [Aborted(abort.transfer_id, "probe", 0)]


def test_a_full_queue_is_an_error(check: Check, channel: BlockingChannel, name: str) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    channel.exchange_declare(name, "fanout")
    channel.queue_declare(name, durable=True, arguments=arguments)
    channel.queue_bind(name, name)
    channel.confirm_delivery()
    channel.basic_publish(name, "", b"x")
    result = check(by_exchange(name))
    assert result.code == 1
    result.about("error: route default", "full", "507")


def test_a_queue_that_the_default_exchange_leads_to_must_exist(check: Check) -> None:
    result = check(
        '[routes.default]\nrouting_key = "no-such-queue"\n'
        '[routes.b]\nrouting_key = "no-such-queue"\nmandatory = false\n'
    )
    assert result.code == 1
    result.about("error: route default", "no queue 'no-such-queue'", "502")
    result.about("warning: route b", "no queue 'no-such-queue'", "confirmed and gone")


def test_asking_for_a_queue_creates_none(check: Check, rabbitmq: RabbitMQNode) -> None:
    check('[routes.default]\nrouting_key = "asked-for"\n')
    assert "asked-for" not in rabbitmq.ctl("list_queues", "name")


def test_what_a_user_may_not_do_is_named(
    check: Check, rabbitmq: RabbitMQNode, channel: BlockingChannel, name: str
) -> None:
    channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
    user = f"user-{uuid.uuid4()}"
    rabbitmq.ctl("add_user", user, "sesame")
    rabbitmq.ctl("set_permissions", user, "^$", "^$", "^$")
    url = rabbitmq.url.replace("guest:guest", f"{user}:sesame")
    result = check(f'[routes.b]\nrouting_key = "{name}"\n', urls=[url])
    rabbitmq.ctl("delete_user", user)
    assert result.code == 1
    result.about("error: route default", "cannot be declared", "403", "permit the user")
    result.about("error: route b", "publishing to exchange ''", "403", "permit the user")
    assert f"the properties of queue '{name}' cannot be seen over AMQP" in result.out
    assert "sesame" not in result.out + "".join(result.err)


def test_a_broker_that_is_down_is_one_line_and_the_others_are_verified(
    check: Check, rabbitmq: RabbitMQNode, name: str
) -> None:
    down = "amqp://guest:sesame@127.0.0.1:9/%2f"
    alone = check(default(name), urls=[down])
    assert alone.code == 1
    assert "error: broker 127.0.0.1:9: cannot connect" in alone.about("see that it runs")
    assert len(alone.err) == 1
    both = check(by_exchange("no-such-exchange"), urls=[down, rabbitmq.url])
    assert both.code == 1
    both.about("error: broker 127.0.0.1:9: cannot connect")
    both.about(f"error: broker 127.0.0.1:{rabbitmq.port}: route default", "does not exist")
    assert "sesame" not in "".join(alone.err + both.err) + alone.out + both.out


def test_brokers_with_and_without_tls_are_verified_each_in_its_way(
    check: Check, rabbitmq: RabbitMQNode, name: str, tmp_path: Path
) -> None:
    ca_file = save_ca(trustme.CA(), tmp_path)
    urls = [rabbitmq.url, rabbitmq.url.replace("amqp:", "amqps:")]
    result = check(f'ca_file = "{ca_file}"\n{default(name)}', urls=urls)
    assert result.code == 1
    result.about("error: broker", "does not speak TLS")
    assert len(result.err) == 1


def test_tls_files_that_cannot_be_used_are_an_error_of_configuration(check: Check) -> None:
    result = check('ca_file = "/nowhere"\n', urls=["amqps://127.0.0.1:9"])
    assert result.code == 2
    assert len(result.err) == 1
    result.about("amqp.ca_file")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [("guest:guest", "guest:sesame", "user name or password"), ("%2f", "nowhere", "virtual host")],
)
def test_a_broker_that_lets_nobody_in_is_one_line_without_secrets(
    check: Check, rabbitmq: RabbitMQNode, old: str, new: str, reason: str
) -> None:
    result = check("", urls=[rabbitmq.url.replace(old, new)])
    assert result.code == 1
    assert len(result.err) == 1
    result.about("error: broker", reason)
    assert "sesame" not in result.out + result.err[0]


def test_what_show_prints_is_checked_likewise(
    check: Check, rabbitmq: RabbitMQNode, name: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("guest")
    toml = f'password_file = "{secret}"\n{default(name)}'
    url = rabbitmq.url.replace("guest:guest", "guest")
    first = check(toml, "--show", urls=[url])
    assert (first.code, first.err) == (0, [])
    again = tmp_path / "again.toml"
    again.write_text(first.out)
    second = subprocess.run(
        [sys.executable, "-m", "relay", "check", "--config", str(again), "--show"],
        env=os.environ | {"PYTHONPATH": str(Path(relay.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert (second.returncode, second.stderr, second.stdout) == (0, "", first.out)


def test_the_daemon_logs_what_check_finds_and_is_ready_all_the_same(
    check: Check, rabbitmq: RabbitMQNode, channel: BlockingChannel, name: str, tmp_path: Path
) -> None:
    channel.queue_declare(name, durable=True, arguments={"x-max-length": 10})
    toml = default(name) + '[routes.b]\nexchange = "no-such-exchange"\n'
    result = check(toml)
    expected = [line.partition(": ")[2] for line in result.err]
    assert len(expected) == 6

    def is_logged(daemon: Daemon, finding: str) -> bool:
        text = finding.replace('"', '\\"')
        return any(text in line and "level=warning" in line for line in daemon.log)

    with Daemon(rabbitmq.url, toml, directory=tmp_path) as daemon:
        for finding in expected:
            daemon.wait_until(lambda f=finding: is_logged(daemon, f), finding)  # type: ignore[misc]
        assert daemon.ready()[0] == 200
