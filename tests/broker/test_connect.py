"""Connecting, with TLS between two ends of a memory stream: the ssl module is the real one."""

import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pika
import pika.credentials
import pytest
import trio
import trustme
from pika.spec import Connection
from trio.testing import (
    MemoryReceiveStream,
    MemorySendStream,
    MockClock,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from relay.broker import connect as connecting
from relay.broker.adapter import TrioConnection
from relay.broker.connect import UNSENT_SIZE, Connector
from relay.broker.publisher import Publisher
from relay.broker.session import Session
from relay.config import AmqpConfig, ConfigError
from relay.errors import BrokerUnavailable
from tests.broker.attempt import ROUTE
from tests.certificates import expired, save, save_ca
from tests.scripted_broker import ScriptedBroker

HOST = "broker.example"
URL = f"amqps://guest:guest@{HOST}/%2f"
PATIENCE = 60.0

MemoryStream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]

ALERT = bytes([21, 3, 3, 0, 2, 2])
"""A fatal alert of TLS 1.2, without its code."""


class Site:
    """A CA, its files, and what stands at the other end of a connection."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self.config: dict[str, Any] = {"ca_file": str(save_ca(self.ca, directory))}
        self.asked_for: list[tuple[str, int]] = []
        self._send, self._receive = trio.open_memory_channel[MemoryStream](10)

    def connector(self, *urls: str, **keys: str) -> Connector:
        config = AmqpConfig(urls=urls or (URL,), heartbeat=0, **{**self.config, **keys})
        return Connector(config, name="test", connect=self.connect)

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        self.asked_for.append((host, port))
        await trio.lowlevel.checkpoint()
        ours, theirs = memory_stream_pair()
        self._send.send_nowait(theirs)
        return ours

    async def accept(self) -> MemoryStream:
        """The other end of the next connection, without TLS."""
        return await self._receive.receive()

    def server(self, leaf: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """A broker's context; by default one that relay may trust."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (leaf or self.ca.issue_cert(HOST)).configure_cert(context)
        return context

    async def serve(self, context: ssl.SSLContext) -> trio.SSLStream[MemoryStream]:
        """The other end of the next connection, with TLS."""
        stream = trio.SSLStream(await self.accept(), context, server_side=True)
        await stream.do_handshake()
        return stream

    def remove_ca_file(self) -> None:
        Path(self.config["ca_file"]).unlink()

    def client_files(self, leaf: trustme.LeafCert) -> dict[str, str]:
        pair = save(leaf, self.directory, "client")
        return {"certificate_file": str(pair.certificate), "key_file": str(pair.key)}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def both_ends(
    connector: Connector, answer: Callable[[], Awaitable[trio.abc.Stream | None]]
) -> tuple[trio.abc.Stream | BrokerUnavailable, trio.abc.Stream | None]:
    """Connect, while ``answer`` plays the broker; what became of either."""
    ends: dict[str, Any] = {}

    async def play() -> None:
        try:
            ends["theirs"] = await answer()
        except trio.BrokenResourceError:
            ends["theirs"] = None

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(play)
            try:
                ends["ours"] = await connector.open(connector.brokers[0])
            except BrokerUnavailable as exc:
                ends["ours"] = exc
                nursery.cancel_scope.cancel()
    return ends["ours"], ends.get("theirs")


async def refusal(connector: Connector, answer: Callable[[], Awaitable[Any]]) -> str:
    """Why connecting failed, as it must."""
    ours, _ = await both_ends(connector, answer)
    assert isinstance(ours, BrokerUnavailable)
    return ours.detail


# --- what works --------------------------------------------------------------------------------


async def test_bytes_go_both_ways_under_tls(site: Site) -> None:
    ours, theirs = await both_ends(site.connector(), lambda: site.serve(site.server()))
    assert isinstance(ours, trio.SSLStream)
    assert isinstance(theirs, trio.SSLStream)
    await ours.send_all(b"AMQP")
    assert await theirs.receive_some() == b"AMQP"
    await theirs.send_all(b"start")
    assert await ours.receive_some() == b"start"


async def test_the_urls_host_goes_out_as_server_name(site: Site) -> None:
    names: list[str | None] = []
    server = site.server()
    server.sni_callback = lambda _socket, name, _context: names.append(name)
    await both_ends(site.connector(), lambda: site.serve(server))
    assert names == [HOST]


async def test_an_amqp_url_beside_an_amqps_url_stays_without_tls(site: Site) -> None:
    connector = site.connector(f"amqp://u:p@{HOST}", URL)
    ours, theirs = await both_ends(connector, site.accept)
    assert not isinstance(ours, trio.SSLStream | BrokerUnavailable)
    await ours.send_all(b"AMQP")
    assert theirs is not None
    assert await theirs.receive_some() == b"AMQP"


async def test_the_ports_are_those_of_the_schemes(site: Site) -> None:
    plain, secure = site.connector(f"amqp://u:p@{HOST}", URL).brokers
    assert (plain.port, secure.port) == (5672, 5671)


async def test_the_kernel_takes_several_frames_at_once() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        config = AmqpConfig(urls=(f"amqp://u:p@127.0.0.1:{port}",))
        connector = Connector(config, name="test")
        async with await connector.open(connector.brokers[0]) as stream:
            assert isinstance(stream, trio.SocketStream)
            unsent = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            assert unsent == UNSENT_SIZE


async def test_files_are_read_again_for_each_connection(site: Site) -> None:
    connector = site.connector()
    another = Site(site.directory)  # writes another CA over the first one's
    ours, _ = await both_ends(connector, lambda: site.serve(another.server()))
    assert isinstance(ours, trio.SSLStream)


# --- who logs in -------------------------------------------------------------------------------


def test_a_certificate_logs_in_where_the_url_has_no_user(site: Site) -> None:
    files = site.client_files(site.ca.issue_cert("relay.example"))
    urls = (f"amqps://{HOST}", URL, f"amqp://{HOST}")
    external, named, plain = (b.credentials for b in site.connector(*urls, **files).brokers)
    assert external == pika.credentials.ExternalCredentials()
    assert named == pika.PlainCredentials("guest", "guest")
    assert plain == pika.PlainCredentials("guest", "guest")


@pytest.mark.parametrize("offered", ["EXTERNAL PLAIN", "PLAIN"])
async def test_a_certificate_logs_in_only_where_the_broker_offers_it(
    site: Site, offered: str
) -> None:
    files = site.client_files(site.ca.issue_cert("relay.example"))
    connector = site.connector(f"amqps://{HOST}", **files)
    ours, theirs = await both_ends(connector, lambda: site.serve(site.server()))
    assert isinstance(ours, trio.SSLStream)
    assert isinstance(theirs, trio.SSLStream)
    session = Session(connector.brokers[0], ours)
    broker = ScriptedBroker(theirs)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            await theirs.receive_some()  # the protocol header
            await broker.send(Connection.Start(server_properties={}, mechanisms=offered))
            if "EXTERNAL" in offered:
                _, start_ok = await broker.expect(Connection.StartOk)
                assert (start_ok.mechanism, start_ok.response) == ("EXTERNAL", b"")
                session.abort("that is all")
            else:
                await session.closed.wait()
                assert str(session.error) == "the broker does not offer EXTERNAL logins"


# --- what is refused ---------------------------------------------------------------------------


async def test_an_expired_certificate_is_refused(site: Site) -> None:
    server = site.server(expired(site.ca, HOST))
    detail = await refusal(site.connector(), lambda: site.serve(server))
    assert detail == "no TLS with the broker: the broker's certificate has expired"


async def test_a_certificate_for_another_host_is_refused(site: Site) -> None:
    server = site.server(site.ca.issue_cert("other.example"))
    detail = await refusal(site.connector(), lambda: site.serve(server))
    assert "host name mismatch" in detail
    assert HOST in detail


async def test_a_certificate_for_another_address_is_refused(site: Site) -> None:
    connector = site.connector("amqps://u:p@127.0.0.1")
    detail = await refusal(connector, lambda: site.serve(site.server()))
    assert "host name mismatch" in detail
    assert "127.0.0.1" in detail


async def test_a_certificate_of_an_unknown_ca_is_refused(site: Site) -> None:
    server = site.server(trustme.CA().issue_cert(HOST))
    detail = await refusal(site.connector(), lambda: site.serve(server))
    assert "is from an unknown CA" in detail


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (40, "asked for a client certificate, or has no cipher in common"),
        (42, "does not accept relay's certificate"),
        (43, "is not one for clients"),
        (44, "was revoked"),
        (45, "relay's certificate has expired"),
        (46, "does not accept relay's certificate"),
        (48, "a CA unknown to the broker"),
        (70, "does not offer TLS 1.2 or later"),
        (80, "internal error"),
        (116, "asked for a client certificate, and none is configured"),
    ],
)
async def test_the_brokers_alert_becomes_words(site: Site, code: int, words: str) -> None:
    async def answer() -> None:
        await (await site.accept()).send_all(ALERT + bytes([code]))
        await trio.sleep_forever()

    assert words in await refusal(site.connector(), answer)


async def test_a_port_without_tls_gets_no_amqp(site: Site) -> None:
    received = b""

    async def answer() -> None:
        nonlocal received
        stream = await site.accept()
        received += await stream.receive_some()
        await stream.send_all(b"AMQP\x00\x00\x09\x01")
        await trio.sleep_forever()

    detail = await refusal(site.connector(), answer)
    assert detail == "no TLS with the broker: its port does not speak TLS"
    assert b"AMQP" not in received


async def test_a_broker_that_hangs_up_in_the_handshake_is_named_as_such(site: Site) -> None:
    async def answer() -> None:
        theirs = await site.accept()
        await theirs.receive_some()
        await theirs.send_eof()
        await trio.sleep_forever()

    detail = await refusal(site.connector(), answer)
    assert detail == "no TLS with the broker: the broker closed the connection"


async def test_a_handshake_without_end_has_a_deadline_and_is_closed(
    site: Site, mock_clock: MockClock
) -> None:
    async def answer() -> None:
        theirs = await site.accept()
        await theirs.receive_some()
        await wait_all_tasks_blocked()
        mock_clock.jump(connecting.CONNECT_TIMEOUT + 1)
        closed.append(await theirs.receive_some() == b"")

    closed: list[bool] = []
    detail = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        connector = site.connector()
        try:
            await connector.open(connector.brokers[0])
        except BrokerUnavailable as exc:
            detail = exc.detail
    assert detail == "cannot connect to the broker: no end of the TLS handshake within 10 s"
    assert closed == [True]


async def test_a_file_that_went_away_is_named_as_the_reason(site: Site) -> None:
    connector = site.connector()
    site.remove_ca_file()
    detail = await refusal(connector, trio.sleep_forever)
    assert detail.startswith("cannot connect to the broker: amqp.ca_file: ")
    assert site.asked_for == []


# --- what TLS 1.3 refuses late -----------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_missing_client_certificate_is_said_in_every_version(
    site: Site, version: ssl.TLSVersion
) -> None:
    server = site.server()
    server.maximum_version = version
    server.verify_mode = ssl.CERT_REQUIRED
    site.ca.configure_trust(server)
    reasons = await ends_of(site, server, site.connector())
    assert "asked for a client certificate" in reasons


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_certificate_that_the_broker_does_not_know_is_said(
    site: Site, version: ssl.TLSVersion
) -> None:
    server = site.server()
    server.maximum_version = version
    server.verify_mode = ssl.CERT_REQUIRED
    site.ca.configure_trust(server)
    files = site.client_files(trustme.CA().issue_cert("relay.example"))
    reasons = await ends_of(site, server, site.connector(**files))
    assert "a CA unknown to the broker" in reasons


async def ends_of(site: Site, server: ssl.SSLContext, connector: Connector) -> str:
    """Connect and speak AMQP until it fails; returns how."""
    reasons: list[str] = []

    async def serve() -> None:
        stream = trio.SSLStream(await site.accept(), server, server_side=True)
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()
        # The alert is what openssl has left to say; trio does not say it.
        alert = stream._outgoing.read()
        await stream.transport_stream.send_all(alert)
        await stream.transport_stream.aclose()

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            broker = connector.brokers[0]
            try:
                stream = await connector.open(broker)
            except BrokerUnavailable as exc:
                return exc.detail
            connection = TrioConnection(
                broker,
                stream,
                on_open=lambda _: None,
                on_closed=lambda _, reason: reasons.append(str(reason)),
            )
            await connection.run()
    (reason,) = reasons
    return reason


# --- what is no configuration ------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/",
        "amqp:///x",
        "amqp://guest:sesame/x@localhost/",
        "amqps://guest@localhost/",
        "amqps://guest:sesame@a..b/",
        "amqps://guest:sesame@localhost/?heartbeat=often",
        "amqps://guest:sesame@localhost/?verify=verify_none",
        "amqps://guest:sesame@localhost/?ssl_options={'verify_mode':0}",
        "x",
    ],
)
def test_a_url_that_cannot_be_used_is_an_error_that_does_not_quote_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^amqp\.urls: ") as caught:
        Connector(AmqpConfig(urls=(url,)), name="test")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("key", ["ca_file", "certificate_file", "key_file"])
def test_files_for_tls_and_no_url_with_tls_is_an_error(key: str) -> None:
    config = AmqpConfig(urls=("amqp://u:p@localhost",), **{key: "/nowhere"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^amqp\.{key}: no URL in amqp\.urls is amqps$"):
        Connector(config, name="test")


def test_the_publisher_does_not_start_with_a_file_it_cannot_use(tmp_path: Path) -> None:
    config = AmqpConfig(urls=(URL,), ca_file=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"^amqp\.ca_file: "):
        Publisher(config, {"default": ROUTE})
