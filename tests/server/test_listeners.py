"""Listening sockets: addresses, limits, and the one place where unexpected exceptions stop."""

import logging
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from relay.config import ConfigError, HttpConfig, RouteConfig
from relay.logs import fields_of
from relay.server.handler import UploadHandler
from relay.server.identity import Peer
from relay.server.listeners import (
    ADMIN,
    HTTP,
    ListenError,
    Serve,
    address_of,
    adopt,
    inherited_sockets,
    open_listeners,
    serve,
)
from relay.server.uploads import Uploads
from tests.memory_broker import MemoryBroker, MemoryClient
from tests.uploading import request

LOOPBACK = "127.0.0.1:0"


@asynccontextmanager
async def listening(
    serve_one: Serve, *addresses: str, limit: int = 10
) -> AsyncGenerator[list[str], None]:
    """Serve on ``addresses`` for the length of the block; gives the addresses listened on."""
    listeners = await open_listeners(addresses or [LOOPBACK])
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve(listeners, serve_one, limit=limit, nursery=nursery))
            yield [address_of(listener) for listener in listeners]
            nursery.cancel_scope.cancel()


async def connect(address: str) -> trio.SocketStream:
    if address.startswith("unix:"):
        return await trio.open_unix_socket(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await trio.open_tcp_stream(host.strip("[]"), int(port))


async def echo(stream: trio.SocketStream, peer: Peer) -> None:
    while data := await stream.receive_some():
        await stream.send_all(peer.address.encode() + b" " + data)


async def echoed(address: str) -> bytes:
    async with await connect(address) as stream:
        await stream.send_all(b"x")
        return bytes(await stream.receive_some())


# --- sockets from systemd ----------------------------------------------------------------------


def handed_over(*sockets: socket.socket, names: str, pid: int | None = None) -> dict[str, str]:
    """Hand ``sockets`` over as systemd does, but for where numbering begins."""
    for index, each in enumerate(sockets):
        os.dup2(each.fileno(), FIRST + index)
        each.close()
    return {
        "LISTEN_PID": str(os.getpid() if pid is None else pid),
        "LISTEN_FDS": str(len(sockets)),
        "LISTEN_FDNAMES": names,
        "LISTEN_PIDFDID": "1",
        "HOME": "/root",
    }


FIRST = 200
"""A descriptor that nothing else has in this process, nor the next few."""


async def test_sockets_from_systemd_are_listened_on_by_their_names(tmp_path: Path) -> None:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind("\0relay-test-" + str(os.getpid()))
    unix.listen()
    tcp = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    environ = handed_over(tcp[0], unix, tcp[1], names="http:admin:http")
    inherited = inherited_sockets(environ, FIRST)
    assert environ == {"HOME": "/root"}
    assert [address_of(each) for each in inherited[ADMIN]] == [f"unix:@relay-test-{os.getpid()}"]
    assert not any(each.get_inheritable() for each in inherited[HTTP])
    listeners = adopt(inherited[HTTP])
    assert len(listeners) == 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(listeners, echo, limit=10, nursery=nursery))
        for listener in listeners:
            assert (await echoed(address_of(listener))).startswith(b"127.0.0.1:")
        nursery.cancel_scope.cancel()
    inherited[ADMIN][0].close()


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}])
def test_sockets_for_another_process_or_none_are_left_alone(environ: dict[str, str]) -> None:
    assert inherited_sockets(environ) == {HTTP: [], ADMIN: []}
    assert environ == {}


@pytest.mark.parametrize(
    ("names", "kind", "listens", "error"),
    [
        ("relay.socket", socket.SOCK_STREAM, True, "'relay.socket': FileDescriptorName="),
        ("", socket.SOCK_STREAM, True, "'': FileDescriptorName="),
        ("http", socket.SOCK_STREAM, False, "'http': must be of ListenStream= and Accept=no"),
        ("admin", socket.SOCK_DGRAM, False, "'admin': must be of ListenStream="),
    ],
)
def test_a_socket_that_is_not_as_it_must_be_is_a_configuration_error(
    names: str, kind: socket.SocketKind, listens: bool, error: str
) -> None:
    with socket.socket(socket.AF_INET, kind) as made:
        made.bind(("127.0.0.1", 0))
        if listens:
            made.listen()
        environ = handed_over(made, names=names)
    with pytest.raises(ConfigError, match=f"^systemd's socket {error}"):
        inherited_sockets(environ, FIRST)
    with suppress(OSError):
        os.close(FIRST)


def test_a_descriptor_that_is_no_socket_is_a_configuration_error() -> None:
    os.dup2(os.open("/dev/null", os.O_RDONLY), FIRST)
    environ = handed_over(names="http") | {"LISTEN_FDS": "1"}
    with pytest.raises(ConfigError, match="cannot be used: Socket operation on non-socket"):
        inherited_sockets(environ, FIRST)


# --- addresses ---------------------------------------------------------------------------------


async def test_every_address_is_listened_on_and_the_port_is_the_one_the_system_chose(
    tmp_path: Path,
) -> None:
    path = f"unix:{tmp_path}/relay.sock"
    async with listening(echo, LOOPBACK, LOOPBACK, path) as addresses:
        assert len(set(addresses)) == 3
        assert addresses[2] == path
        assert not any(address.endswith(":0") for address in addresses)
        for address in addresses[:2]:
            assert (await echoed(address)).startswith(b"127.0.0.1:")
        assert await echoed(path) == b"unix x"


async def test_ipv6_addresses_are_written_in_brackets() -> None:
    try:
        async with listening(echo, "[::1]:0") as (address,):
            assert address.startswith("[::1]:")
            assert (await echoed(address)).startswith(b"[::1]:")
    except ListenError as exc:
        pytest.skip(str(exc))


async def test_an_address_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    async with listening(echo) as (address,):
        with pytest.raises(ListenError, match=rf"^cannot listen on {address}: Address already"):
            await open_listeners([LOOPBACK, address])


@pytest.mark.parametrize(
    "address",
    [
        "192.0.2.1:0",
        "[fe80::1%nosuch]:0",
        "a..b:0",
        f"{'x' * 70}.invalid:0",
        "unix:/nonexistent/relay.sock",
        f"unix:/tmp/{'x' * 200}",
    ],
)
async def test_an_address_that_cannot_be_used_is_one_line(address: str) -> None:
    with pytest.raises(ListenError) as caught:
        await open_listeners([address])
    text = str(caught.value)
    assert text.startswith(f"cannot listen on {address}: ")
    assert "\n" not in text


async def test_what_was_opened_before_an_error_is_closed_again(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    with pytest.raises(ListenError):
        await open_listeners([f"unix:{path}", "unix:/nonexistent/relay.sock"])
    with socket.socket(socket.AF_UNIX) as probe:
        assert probe.connect_ex(str(path)) != 0


async def test_a_socket_file_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with listening(echo, f"unix:{path}") as (address,):
        assert await echoed(address) == b"unix x"
    assert path.is_socket()
    async with listening(echo, f"unix:{path}") as (address,):
        assert await echoed(address) == b"unix x"


async def test_a_socket_that_somebody_listens_on_is_left_alone(tmp_path: Path) -> None:
    async with listening(echo, f"unix:{tmp_path}/relay.sock") as (address,):
        with pytest.raises(ListenError, match="Address already in use"):
            await open_listeners([address])
        assert await echoed(address) == b"unix x"


async def test_a_live_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(ListenError, match="Address already in use"):
            await open_listeners([f"unix:{path}"])
        assert path.is_socket()


async def test_a_socket_whose_backlog_is_full_is_left_alone_and_not_waited_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "busy.sock"
    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        result = 0
        while result == 0:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            result = client.connect_ex(str(path))
        with pytest.raises(ListenError, match="Address already in use"):
            await open_listeners([f"unix:{path}"])
        assert path.is_socket()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ListenError, match="Address already in use"):
        await open_listeners([f"unix:{path}"])
    assert path.read_text() == "data"


# --- limits ------------------------------------------------------------------------------------


async def refusal(stream: trio.SocketStream) -> dict[str, object]:
    """The answer to a connection too many, which nobody has asked for anything."""
    answer = await MemoryClient(stream).answer()
    assert (answer.status, answer.headers["retry-after"], answer.closes) == (503, "5", True)
    assert await stream.receive_some() == b""
    document: dict[str, object] = answer.json()
    return document


async def test_no_more_connections_are_served_at_once_than_allowed_and_others_are_told() -> None:
    async with listening(echo, limit=3) as (address,):
        inside = [await connect(address) for _ in range(3)]
        for stream in inside:
            await stream.send_all(b"x")
            await stream.receive_some()
        for _ in range(10):
            async with await connect(address) as stream:
                document = await refusal(stream)
                assert (document["status"], document["code"]) == (503, "too-many-uploads")
                assert "3 connections" in str(document["detail"])
        # Those inside have noticed nothing, and who leaves makes room.
        for stream in inside:
            await stream.send_all(b"y")
            assert (await stream.receive_some()).endswith(b" y")
        await inside.pop().aclose()
        while not (await echoed(address)).startswith(b"127.0.0.1:"):
            await trio.lowlevel.checkpoint()
        for stream in inside:
            await stream.aclose()


async def test_the_limit_is_for_all_addresses_together(tmp_path: Path) -> None:
    async with listening(echo, LOOPBACK, f"unix:{tmp_path}/relay.sock", limit=1) as addresses:
        for first, second in (addresses, reversed(addresses)):
            async with await connect(first) as inside:
                await inside.send_all(b"x")
                assert (await inside.receive_some()).endswith(b" x")
                async with await connect(second) as stream:
                    await refusal(stream)
            await wait_all_tasks_blocked(0.01)


# --- exceptions --------------------------------------------------------------------------------


async def test_an_unexpected_exception_costs_its_connection_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def serve_one(stream: trio.SocketStream, peer: Peer) -> None:
        if await stream.receive_some() == b"fail":
            raise ZeroDivisionError
        await stream.send_all(b"fine")

    async with listening(serve_one, limit=1) as (address,):
        for _ in range(3):
            caplog.clear()
            async with await connect(address) as stream:
                await stream.send_all(b"fail")
                assert await stream.receive_some() == b""
            (record,) = caplog.records
            assert record.levelno == logging.ERROR
            assert record.exc_info is not None
            assert record.exc_info[0] is ZeroDivisionError
            async with await connect(address) as stream:
                await stream.send_all(b"work")
                assert await stream.receive_some() == b"fine"


@pytest.mark.parametrize(
    ("where", "status", "code"),
    [("before_send", 500, "internal-error"), ("before_commit", 504, "outcome-unknown")],
)
async def test_a_bug_under_an_upload_costs_that_upload_and_no_other(
    where: str, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = MemoryBroker()
    uploads = Uploads(10)
    routes = {"default": RouteConfig(name="default")}
    handler = UploadHandler(HttpConfig(), routes, broker, uploads)

    async def fail(_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("secret")

    async with listening(handler.serve) as (address,):
        before = getattr(broker, where)
        setattr(broker, where, fail)
        async with await connect(address) as stream:
            answer = await MemoryClient(stream).exchange(request("/upload", b"hello"))
            assert (answer.status, answer.json()["code"]) == (status, code)
            assert b"secret" not in answer.body
            assert answer.closes
            assert await stream.receive_some() == b""
        await trio.testing.wait_all_tasks_blocked()
        ended, bug = caplog.records
        assert fields_of(ended)["outcome"] == code
        assert bug.levelno == logging.ERROR
        assert len(uploads) == 0
        assert uploads.finished == {code: 1}
        setattr(broker, where, before)
        async with await connect(address) as stream:
            answer = await MemoryClient(stream).exchange(request("/upload", b"hello"))
        assert answer.status == 201


async def test_connections_are_closed_when_serving_is_cancelled() -> None:
    async with listening(echo) as (address,):
        stream = await connect(address)
        await stream.send_all(b"x")
        assert await stream.receive_some()
    assert await stream.receive_some() == b""
    await stream.aclose()
