"""``relay send`` as a process, against the real daemon and a real broker.

What fails in between is the fault proxy's doing: its broker is the daemon here.
"""

import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import relay
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import HOST, RabbitMQNode, free_ports
from relay.model import Abort, Frame
from relay.protocol.reassembly import Committed, Reassembler, Repeated
from tests.certificates import Pair, expired, save, save_ca
from tests.fault_proxy import Direction, Fault, FaultProxy, Kind
from tests.queue_reader import Received, frames_in, messages_left, transfers_in
from tests.uploading import content

QUEUE = "send"
CONFIG = f"""
[routes.default]
routing_key = "{QUEUE}"
[routes.default.queue]
name = "{QUEUE}"
"""
PATIENCE = 60.0
"""Seconds for anything; a test that waits longer has failed."""

SIZE = 3_000_000


class Client:
    """``relay send`` as a process."""

    def __init__(self, directory: Path, *arguments: str, stdin: bytes | None = None) -> None:
        self._streams = [open(directory / f"client.{n}", "w+b") for n in range(3)]  # noqa: SIM115
        self._streams[0].write(stdin or b"")
        self._streams[0].seek(0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "relay", "send", *arguments],
            stdin=self._streams[0],
            stdout=self._streams[1],
            stderr=self._streams[2],
            env=os.environ | {"PYTHONPATH": str(Path(relay.__file__).parents[1])},
        )

    @property
    def out(self) -> str:
        return Path(self._streams[1].name).read_text()

    @property
    def err(self) -> str:
        return Path(self._streams[2].name).read_text()

    def documents(self) -> list[dict[str, Any]]:
        """What ``--json`` has put out."""
        return [json.loads(line) for line in self.out.splitlines()]

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in self._streams:
            stream.close()


Send = Callable[..., Client]


@pytest.fixture
def send(tmp_path: Path) -> Iterator[Send]:
    clients: list[Client] = []

    def send(*arguments: str | Path, stdin: bytes | None = None) -> Client:
        directory = tmp_path / f"client-{len(clients)}"
        directory.mkdir()
        clients.append(Client(directory, *map(str, arguments), stdin=stdin))
        return clients[-1]

    yield send
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def daemon(rabbitmq: RabbitMQNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(rabbitmq.url, CONFIG, directory=tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with three files, one of them in a directory of its own."""
    top = tmp_path / "files"
    (top / "sub").mkdir(parents=True)
    (top / "a.pdf").write_bytes(content(SIZE))
    (top / "empty").touch()
    (top / "sub" / 'ü "%22".txt').write_bytes(b"hello")
    return top


def received(node: RabbitMQNode, count: int) -> list[Received]:
    """The committed transfers that the queue holds; they must be so many, and all there is."""
    transfers = list(transfers_in(node.url, QUEUE, ended=count).values())
    assert all(transfer.committed for transfer in transfers)
    assert messages_left(node.url, QUEUE) == 0
    return transfers


def test_files_and_directories_are_transfers_of_their_own(
    rabbitmq: RabbitMQNode, daemon: Daemon, files: Path, send: Send
) -> None:
    client = send("--to", f"{daemon.url}/upload", files / "a.pdf", files)
    assert client.wait() == 0
    transfers = received(rabbitmq, 4)
    parts = [part for transfer in transfers for part in transfer.parts]
    names = ["a.pdf", "a.pdf", "empty", 'sub/ü "%22".txt']
    assert [part.head.filename for part in parts] == names
    assert {part.head.name for part in parts} == {None}
    assert [hashlib.sha256(part.data).digest() for part in parts] == [
        hashlib.sha256(data).digest() for data in (content(SIZE), content(SIZE), b"", b"hello")
    ]
    assert len({transfer.transfer.idempotency_key for transfer in transfers}) == 4
    assert client.err == ""
    expected = [
        f"transfer {transfer.transfer.id}  parts 1  bytes {len(part.data)}  {path}"
        for transfer, part, path in zip(
            transfers,
            parts,
            [files / "a.pdf", files / "a.pdf", files / "empty", files / names[3]],
            strict=True,
        )
    ]
    assert client.out.splitlines() == expected


def test_together_they_are_one_transfer(
    rabbitmq: RabbitMQNode, daemon: Daemon, files: Path, send: Send
) -> None:
    arguments = ["--together", "--name", "doc", "--digest", "sha-256", "--json"]
    client = send("--to", f"{daemon.url}/upload", *arguments, files, "-", stdin=b"from stdin")
    assert client.wait() == 0
    (transfer,) = received(rabbitmq, 1)
    heads = [(part.head.name, part.head.filename) for part in transfer.parts]
    names = ["a.pdf", "empty", 'sub/ü "%22".txt', None]
    assert heads == [("doc", name) for name in names]
    assert [bytes(part.data) for part in transfer.parts[1:]] == [b"", b"hello", b"from stdin"]
    (document,) = client.documents()
    assert document["transfer"] == transfer.transfer.id
    assert document["files"] == [*(str(files / str(name)) for name in names[:3]), "-"]
    for part, told in zip(transfer.parts, document["parts"], strict=True):
        assert told["digest"]["sha-256"] == hashlib.sha256(part.data).hexdigest()


@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
def test_a_digest_goes_along_and_is_in_frames_and_receipt(
    rabbitmq: RabbitMQNode, daemon: Daemon, files: Path, send: Send, algorithm: str
) -> None:
    arguments = ["--to", f"{daemon.url}/upload", "--digest", algorithm, "--json"]
    client = send(*arguments, files / "a.pdf", "-", stdin=b"x" * SIZE)
    assert client.wait() == 0
    for document, data in zip(client.documents(), (content(SIZE), b"x" * SIZE), strict=True):
        expected = hashlib.new(algorithm.replace("-", ""), data).hexdigest()
        assert document["parts"][0]["digest"][algorithm] == expected
    for transfer in received(rabbitmq, 2):
        tail = transfer.parts[0].tail
        assert tail is not None
        assert algorithm in tail.digest


def test_standard_input_has_the_name_it_is_given(
    rabbitmq: RabbitMQNode, daemon: Daemon, send: Send
) -> None:
    client = send("--to", f"{daemon.url}/upload", "-", "--filename", "x.txt", stdin=b"hello")
    assert client.wait() == 0
    (transfer,) = received(rabbitmq, 1)
    assert transfer.parts[0].head.filename == "x.txt"
    assert bytes(transfer.parts[0].data) == b"hello"


def test_a_key_of_ones_own_is_replayed_when_it_is_sent_again(
    rabbitmq: RabbitMQNode, daemon: Daemon, files: Path, send: Send
) -> None:
    arguments = ["--to", f"{daemon.url}/upload", "--key", "mine", "--json", str(files / "a.pdf")]
    first, second = send(*arguments), None
    assert first.wait() == 0
    second = send(*arguments)
    assert second.wait() == 0
    (transfer,) = received(rabbitmq, 1)
    assert transfer.transfer.idempotency_key == "mine"
    documents = [*first.documents(), *second.documents()]
    assert [document["replayed"] for document in documents] == [False, True]
    assert {document["transfer"] for document in documents} == {transfer.transfer.id}


def test_an_unknown_route_is_told_once_and_not_tried_again(
    daemon: Daemon, files: Path, send: Send
) -> None:
    client = send("--to", f"{daemon.url}/upload/nowhere", "--json", files / "a.pdf")
    assert client.wait() == 1
    path = files / "a.pdf"
    assert client.err == f"relay send: {path}: 404 not-found: there is no such route\n"
    (document,) = client.documents()
    assert (document["status"], document["code"], document["tries"]) == (404, "not-found", 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["/nonexistent/x"], "/nonexistent/x: No such file or directory"),
        (["/dev/null"], "/dev/null: neither a regular file nor a directory; - is standard input"),
        (["--to", "ftp://x", "/"], "--to: must be a URL such as https://host:port/upload/ROUTE"),
        (["--filename", "x", __file__], "--filename: is for standard input (-)"),
        (["--key", "k", __file__, __file__], "--key: is for one transfer: one file, or --together"),
        (["/nonexistent/\x1b[2J\nx"], "/nonexistent/ [2J x: No such file or directory"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_exits_with_2(
    send: Send, arguments: list[str], text: str
) -> None:
    client = send(*arguments)
    assert client.wait() == 2
    assert (client.out, client.err) == ("", f"relay: {text}\n")


# --- failures in between -----------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Poll: other processes do not tell when they get further."""
    for _ in range(int(PATIENCE / 0.02)):
        if condition():
            return
        await trio.sleep(0.02)
    pytest.fail("it never came to that")


async def exit_code(client: Client) -> int:
    return await trio.to_thread.run_sync(client.wait)


@asynccontextmanager
async def proxied(port: int) -> AsyncGenerator[FaultProxy, None]:
    proxy = FaultProxy(port)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.serve)
        yield proxy
        nursery.cancel_scope.cancel()


async def test_a_daemon_that_comes_later_is_waited_for(
    rabbitmq: RabbitMQNode, files: Path, send: Send, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    client = send("--to", f"http://{HOST}:{port}", files / "a.pdf")
    await until(lambda: "Connection refused; trying again" in client.err)
    late = Daemon(rabbitmq.url, CONFIG, directory=tmp_path, listen=f"{HOST}:{port}")
    try:
        await trio.to_thread.run_sync(late.start)
        assert await exit_code(client) == 0
    finally:
        late.kill()
    (transfer,) = received(rabbitmq, 1)
    assert transfer.parts[0].data == content(SIZE)
    assert "transfer" in client.out


async def test_a_lost_connection_is_mended_by_another(
    rabbitmq: RabbitMQNode, daemon: Daemon, files: Path, send: Send
) -> None:
    async with proxied(daemon.address[1]) as proxy:
        # Not a reset, which takes with it what the daemon has not read yet, and so the abort.
        proxy.arm(Fault(kind=Kind.CUT, after=SIZE // 2))
        client = send("--to", f"http://{HOST}:{proxy.port}/upload", "--json", files / "a.pdf")
        assert await exit_code(client) == 0
    (document,) = client.documents()
    assert document["tries"] >= 2
    transfers = transfers_in(rabbitmq.url, QUEUE, ended=2)
    (committed,) = [transfer for transfer in transfers.values() if transfer.committed]
    assert committed.transfer.id == document["transfer"]
    assert committed.parts[0].data == content(SIZE)
    assert {transfer.aborted for transfer in transfers.values()} == {None, "client-gone"}


def feed(frames: list[Frame | Abort]) -> list[object]:
    reassembler = Reassembler(max_open=10)
    return [event for frame in frames for event in reassembler.feed(frame, 0.0)]


@pytest.mark.parametrize("moment", ["in the middle of the body", "before the answer"])
async def test_a_daemon_killed_leaves_one_transfer_in_the_end(
    rabbitmq: RabbitMQNode, files: Path, send: Send, tmp_path: Path, moment: str
) -> None:
    in_body = moment == "in the middle of the body"
    fault = Fault(kind=Kind.STALL, after=SIZE // 2)
    if not in_body:
        # The daemon's 100 (Continue) passes.
        fault = Fault(kind=Kind.STALL, direction=Direction.TO_DAEMON, after=30)
    (port,) = free_ports(1)
    new = partial(Daemon, rabbitmq.url, CONFIG, directory=tmp_path, listen=f"{HOST}:{port}")
    first, second = new(), new()
    try:
        await trio.to_thread.run_sync(first.start)
        async with proxied(port) as proxy:
            proxy.arm(fault)
            client = send("--to", f"http://{HOST}:{proxy.port}", "--json", files / "a.pdf")
            with trio.fail_after(PATIENCE):
                await proxy.hit.wait()
            told = "upload committed"
            await until(lambda: in_body or any(told in line for line in first.log))
            await trio.to_thread.run_sync(first.kill)
            proxy.sever()
            proxy.heal()
            await until(lambda: "trying again" in client.err)
            await trio.to_thread.run_sync(second.start)
            assert await exit_code(client) == 0
    finally:
        first.kill()
        second.kill()
    frames = frames_in(rabbitmq.url, QUEUE, ended=1 if in_body else 2)
    events = feed(frames)
    assert sum(isinstance(event, Committed) for event in events) == 1
    assert sum(isinstance(event, Repeated) for event in events) == (0 if in_body else 1)
    (document,) = client.documents()
    assert document["replayed"] is False
    firsts = [frame for frame in frames if isinstance(frame, Frame) and frame.seq == 0]
    assert {frame.transfer.idempotency_key for frame in firsts} == {document["key"]}


async def test_a_broker_restarted_in_the_middle_is_waited_out(
    new_node: Callable[..., RabbitMQNode], files: Path, send: Send, tmp_path: Path
) -> None:
    node = await trio.to_thread.run_sync(new_node)
    # However slow the machine is, the upload outlives the restart.
    patient = '[http]\nbody_idle_timeout = "5 min"\n[amqp]\nreconnect_grace = "5 min"\n'
    daemon = Daemon(node.url, patient + CONFIG, directory=tmp_path)
    try:
        await trio.to_thread.run_sync(daemon.start)
        async with proxied(daemon.address[1]) as proxy:
            proxy.arm(Fault(kind=Kind.STALL, after=SIZE // 2))
            client = send("--to", f"http://{HOST}:{proxy.port}", files / "a.pdf")
            with trio.fail_after(PATIENCE):
                await proxy.hit.wait()
            await trio.to_thread.run_sync(node.restart)
            proxy.heal()
            assert await exit_code(client) == 0
    finally:
        daemon.kill()
    transfers = await trio.to_thread.run_sync(partial(transfers_in, node.url, QUEUE, ended=1))
    (committed,) = [transfer for transfer in transfers.values() if transfer.committed]
    assert committed.parts[0].data == content(SIZE)


async def test_interrupted_it_tells_what_is_unfinished_and_nothing_is_committed(
    rabbitmq: RabbitMQNode, daemon: Daemon, files: Path, send: Send
) -> None:
    path = files / "a.pdf"
    async with proxied(daemon.address[1]) as proxy:
        proxy.arm(Fault(kind=Kind.STALL, after=SIZE // 2))
        client = send("--to", f"http://{HOST}:{proxy.port}", "--json", path, files / "empty")
        with trio.fail_after(PATIENCE):
            await proxy.hit.wait()
        await until(lambda: any(upload["frames"] for upload in daemon.transfers()))
        client.process.send_signal(signal.SIGINT)
        assert await exit_code(client) == 130
        proxy.sever()
    begun, other = client.documents()
    assert [begun["code"], begun["tries"], other["tries"]] == ["interrupted", 1, 0]
    first, second = client.err.splitlines()
    assert first.startswith(f"relay send: {path}: interrupted: it may have arrived or not")
    assert begun["key"] in first
    assert second == f"relay send: interrupted: not sent: {files / 'empty'}"
    (aborted,) = transfers_in(rabbitmq.url, QUEUE, ended=1).values()
    assert aborted.aborted == "client-gone"


# --- ways to the daemon ------------------------------------------------------------------------


def test_a_unix_socket_is_connected_to_in_place_of_the_host(
    rabbitmq: RabbitMQNode, files: Path, send: Send, tmp_path: Path
) -> None:
    path = tmp_path / "relay.sock"
    daemon = Daemon(rabbitmq.url, CONFIG, directory=tmp_path, listen=f"unix:{path}")
    with daemon:
        client = send("--to", "http://relay.test/upload", "--unix-socket", path, files / "empty")
        assert client.wait() == 0
    assert len(received(rabbitmq, 1)) == 1


class Front:
    """TLS in front of the daemon, as a reverse proxy would do it."""

    def __init__(self, directory: Path, upstream: int) -> None:
        self.ca = trustme.CA()
        self.ca_file = save_ca(self.ca, directory)
        self.directory = directory
        self._upstream = upstream

    def context(self, leaf: trustme.LeafCert, *, wants_client: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(context)
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self.ca.configure_trust(context)
        return context

    @asynccontextmanager
    async def serving(
        self, leaf: trustme.LeafCert, *, wants_client: bool = False
    ) -> AsyncGenerator[str, None]:
        """Its URL, by name."""
        context = self.context(leaf, wants_client=wants_client)
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_ssl_over_tcp, self._serve, 0, context, host=HOST)
            (listener,) = await nursery.start(partial(serve, https_compatible=True))
            port = listener.transport_listener.socket.getsockname()[1]
            yield f"https://localhost:{port}/upload"
            nursery.cancel_scope.cancel()

    async def _serve(self, client: trio.SSLStream[trio.SocketStream]) -> None:
        # A client that is not wanted, or does not want us, leaves at any point.
        try:
            await client.do_handshake()
        except trio.BrokenResourceError:
            return
        daemon = await trio.open_tcp_stream(HOST, self._upstream)
        async with daemon, trio.open_nursery() as nursery:
            nursery.start_soon(_pump, client, daemon, nursery.cancel_scope)
            nursery.start_soon(_pump, daemon, client, nursery.cancel_scope)


async def _pump(source: trio.abc.Stream, target: trio.abc.Stream, scope: trio.CancelScope) -> None:
    try:
        while data := await source.receive_some(65536):
            await target.send_all(data)
    except trio.BrokenResourceError:
        pass
    scope.cancel()


@pytest.fixture
def front(daemon: Daemon, tmp_path: Path) -> Front:
    return Front(tmp_path, daemon.address[1])


async def test_https_is_verified_and_carries_files(
    rabbitmq: RabbitMQNode, front: Front, files: Path, send: Send
) -> None:
    async with front.serving(front.ca.issue_cert("localhost")) as url:
        client = send("--to", url, "--ca-file", front.ca_file, "--digest", "sha-256", files)
        assert await exit_code(client) == 0
    assert len(received(rabbitmq, 3)) == 3


@pytest.mark.parametrize("what", ["unknown CA", "expired", "host name mismatch"])
async def test_a_server_that_cannot_be_verified_gets_nothing_and_is_not_tried_again(
    front: Front, files: Path, send: Send, what: str
) -> None:
    leaf = front.ca.issue_cert("localhost")
    ca_file = front.ca_file
    if what == "unknown CA":
        ca_file = save_ca(trustme.CA(), front.directory, "other")
    elif what == "expired":
        leaf = expired(front.ca, "localhost")
    else:
        leaf = front.ca.issue_cert("relay.example")
    async with front.serving(leaf) as url:
        client = send("--to", url, "--ca-file", ca_file, "--json", files / "empty")
        assert await exit_code(client) == 1
    assert "no TLS with the server" in client.err
    assert what in client.err
    (document,) = client.documents()
    assert (document["code"], document["tries"]) == ("unusable-server", 1)


async def test_a_client_certificate_is_shown_to_a_server_that_asks(
    rabbitmq: RabbitMQNode, front: Front, files: Path, send: Send
) -> None:
    pair: Pair = save(front.ca.issue_cert("client.example"), front.directory, "client")
    shown = ["--certificate-file", pair.certificate, "--key-file", pair.key]
    async with front.serving(front.ca.issue_cert("localhost"), wants_client=True) as url:
        client = send("--to", url, "--ca-file", front.ca_file, *shown, files / "empty")
        assert await exit_code(client) == 0
    assert len(await trio.to_thread.run_sync(received, rabbitmq, 1)) == 1


def test_a_server_that_misses_a_client_certificate_says_so(
    front: Front, files: Path, send: Send
) -> None:
    context = front.context(front.ca.issue_cert("localhost"), wants_client=True)
    with socket.create_server((HOST, 0)) as listener:
        url = f"https://localhost:{listener.getsockname()[1]}"
        client = send("--to", url, "--ca-file", front.ca_file, files / "empty")
        listener.settimeout(PATIENCE)
        connection, _ = listener.accept()
        with context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ) as secured:
            with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
                secured.do_handshake()
            # Closed at once, the kernel's reset would overtake the alert.
            secured.shutdown(socket.SHUT_WR)
            while secured.recv(1024):
                pass
        assert client.wait() == 1
    assert "the server asked for a client certificate, and none is configured" in client.err
