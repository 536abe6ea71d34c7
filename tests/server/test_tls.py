"""TLS on the upload port: who gets in, and how those who do not are told."""

import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
import trustme

from relay.config import ConfigError, HttpConfig, TlsConfig
from relay.server.identity import Peer
from relay.server.listeners import address_of, open_listeners, serve
from relay.server.tls import TlsServer
from relay.tls import end_of, server_context
from tests.certificates import LONG_AGO, Pair, expired, save, save_ca
from tests.memory_broker import MemoryClient

HOST: Final = "localhost"
Tcp = trio.SSLStream[trio.SocketStream]


class Site:
    """A CA and a server with its certificate, which echoes, and says whose connection it is."""

    def __init__(self, directory: Path, *, client_ca: bool = False, timeout: float = 30.0) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self.ca_file = save_ca(self.ca, directory)
        self.pair = save(self.ca.issue_cert(HOST), directory, "server")
        files = TlsConfig(
            certificate_file=str(self.pair.certificate),
            key_file=str(self.pair.key),
            client_ca_file=str(self.ca_file) if client_ca else "",
        )
        config = HttpConfig(tls=files, header_timeout=timeout)
        self.server = TlsServer(config, self.echo)
        self.address = ""

    async def echo(self, stream: trio.abc.HalfCloseableStream, peer: Peer) -> None:
        try:
            while data := await stream.receive_some():
                await stream.send_all(f"{peer.client} ".encode() + data)
        except trio.BrokenResourceError:
            return

    @asynccontextmanager
    async def serving(self, address: str = "127.0.0.1:0") -> AsyncGenerator[None, None]:
        listeners = await open_listeners([address])
        self.address = address_of(listeners[0])
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: serve(listeners, self.server.serve, limit=10, nursery=nursery)
                )
                yield
                nursery.cancel_scope.cancel()

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", int(self.address.rpartition(":")[2]))

    def context(self, pair: Pair | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cafile=self.ca_file)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        return context

    def client(self, *names: str, common_name: str | None = None) -> Pair:
        leaf = self.ca.issue_cert(*names, common_name=common_name)
        return save(leaf, self.directory, "client")

    async def echoed(self, context: ssl.SSLContext) -> bytes:
        async with await self.connect() as stream:
            secured = trio.SSLStream(stream, context, server_hostname=HOST)
            await secured.send_all(b"x")
            return bytes(await secured.receive_some())

    async def refusal(self, context: ssl.SSLContext) -> str:
        """What ssl says of why it is not let in."""
        with pytest.raises(trio.BrokenResourceError) as caught:
            await self.echoed(context)
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        return caught.value.__cause__.reason or ""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_what_is_served_is_served_over_tls(tmp_path: Path, version: ssl.TLSVersion) -> None:
    site = Site(tmp_path)
    context = site.context()
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with site.serving(), await site.connect() as stream:
        secured = trio.SSLStream(stream, context, server_hostname=HOST)
        await secured.do_handshake()
        assert secured.selected_alpn_protocol() == "http/1.1"
        assert "ECDHE" in secured.cipher()[0] or version is ssl.TLSVersion.TLSv1_3
        for _ in range(2):
            await secured.send_all(b"x")
            assert await secured.receive_some() == b"None x"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_what_is_older_than_tls_1_2_is_refused_with_an_alert(tmp_path: Path) -> None:
    site = Site(tmp_path)
    context = site.context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with site.serving():
        assert await site.refusal(context) == "TLSV1_ALERT_PROTOCOL_VERSION"


# --- what is not TLS ----------------------------------------------------------------------------


async def test_plain_http_is_answered_in_plain_http(tmp_path: Path) -> None:
    site = Site(tmp_path)
    async with site.serving(), await site.connect() as stream:
        client = MemoryClient(stream)
        answer = await client.exchange(b"POST /upload HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (answer.status, answer.json()["code"]) == (400, "bad-request")
        assert "https" in answer.json()["detail"]
        assert answer.closes
        assert await client.ends()


@pytest.mark.parametrize("data", [b"", b"\x16", b"\x16\x03\x01\x00\x05hello"])
async def test_what_ends_or_is_broken_is_ended_and_the_next_one_is_served(
    tmp_path: Path, data: bytes
) -> None:
    site = Site(tmp_path)
    async with site.serving():
        async with await site.connect() as stream:
            if data:
                await stream.send_all(data)
            await stream.send_eof()
            while await stream.receive_some():
                pass
        assert await site.echoed(site.context()) == b"None x"


@pytest.mark.parametrize("data", [b"", b"\x16\x03\x01\x02\x00"])
async def test_a_handshake_has_a_deadline(tmp_path: Path, data: bytes) -> None:
    site = Site(tmp_path, timeout=0.05)
    async with site.serving(), await site.connect() as stream:
        if data:
            await stream.send_all(data)
        assert await stream.receive_some() == b""


async def test_unix_sockets_stay_plain(tmp_path: Path) -> None:
    site = Site(tmp_path, client_ca=True)
    async with site.serving(f"unix:{tmp_path}/relay.sock"):
        path = site.address.removeprefix("unix:")
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b"x")
            assert (await stream.receive_some()).startswith(b"uid:")


# --- client certificates ------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_certificate_says_who_it_is(tmp_path: Path, version: ssl.TLSVersion) -> None:
    site = Site(tmp_path, client_ca=True)
    context = site.context(site.client("uploader.example", common_name="other"))
    context.minimum_version = context.maximum_version = version
    async with site.serving():
        assert await site.echoed(context) == b"uploader.example x"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("kind", "alert"),
    [
        ("none", {"TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_HANDSHAKE_FAILURE"}),
        ("stranger", {"TLSV1_ALERT_UNKNOWN_CA"}),
        ("expired", {"SSLV3_ALERT_CERTIFICATE_EXPIRED"}),
    ],
)
async def test_who_has_no_good_certificate_is_told_by_an_alert(
    tmp_path: Path, kind: str, alert: set[str], version: ssl.TLSVersion
) -> None:
    site = Site(tmp_path, client_ca=True)
    leaves = {
        "stranger": trustme.CA().issue_cert("a.example"),
        "expired": expired(site.ca, "a.example"),
    }
    pair = None if kind == "none" else save(leaves[kind], tmp_path, "client")
    context = site.context(pair)
    context.minimum_version = context.maximum_version = version
    async with site.serving():
        assert await site.refusal(context) in alert


async def test_with_tls_1_3_the_alert_is_seen_by_a_client_that_sends_at_once(
    tmp_path: Path,
) -> None:
    """It believes the handshake done; what it sent must not make a reset of the alert."""
    site = Site(tmp_path, client_ca=True)
    async with site.serving(), await site.connect() as stream:
        secured = trio.SSLStream(stream, site.context(), server_hostname=HOST)
        await secured.send_all(b"x" * 100_000)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await secured.receive_some()
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert caught.value.__cause__.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "content", "reason"),
    [
        ("certificate_file", None, "cannot be read: No such file"),
        ("certificate_file", "x", "holds no certificate in PEM form"),
        ("key_file", None, "cannot be read: No such file"),
        ("key_file", "x", "holds no private key in PEM form"),
        ("client_ca_file", None, "cannot be read: No such file"),
        ("client_ca_file", "x", "holds no certificate in PEM form"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_its_key(
    key: str, content: str | None, reason: str, tmp_path: Path
) -> None:
    site = Site(tmp_path, client_ca=True)
    path = tmp_path / "wrong"
    if content is not None:
        path.write_text(content)
    files = {"certificate_file": str(site.pair.certificate), "key_file": str(site.pair.key)}
    config = HttpConfig(tls=TlsConfig(**(files | {key: str(path)})))
    with pytest.raises(ConfigError) as caught:
        TlsServer(config, site.echo)
    assert str(caught.value).startswith(f"http.tls.{key}: {path} {reason}")


def test_anothers_key_is_an_error(tmp_path: Path) -> None:
    site = Site(tmp_path)
    other = save(site.ca.issue_cert(HOST), tmp_path, "other")
    files = TlsConfig(certificate_file=str(site.pair.certificate), key_file=str(other.key))
    with pytest.raises(ConfigError, match=r"^http\.tls\.key_file: .* is not the key of the"):
        TlsServer(HttpConfig(tls=files), site.echo)


@pytest.mark.parametrize("client_ca", [True, False])
def test_the_end_of_a_certificate_is_known_also_when_it_is_over(
    tmp_path: Path, client_ca: bool
) -> None:
    site = Site(tmp_path, client_ca=client_ca)
    save(expired(site.ca, HOST), tmp_path, "server")
    files = TlsConfig(
        certificate_file=str(site.pair.certificate),
        key_file=str(site.pair.key),
        client_ca_file=str(site.ca_file) if client_ca else "",
    )
    context = server_context(files, str)
    assert end_of(files.certificate_file, context) == LONG_AGO.timestamp()


def test_no_key_is_written_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ssl.create_default_context() would have it; the daemon writes no file."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    site = Site(tmp_path)
    files = TlsConfig(certificate_file=str(site.pair.certificate), key_file=str(site.pair.key))
    assert server_context(files, str).keylog_filename is None
