"""URLs, tokens and certificate files: what they are read as, and which are refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from relay.client import endpoint as connecting
from relay.client.endpoint import Endpoint, parse_url, read_token
from relay.client.exchange import Lost
from relay.config import ConfigError
from tests.certificates import save_ca


@pytest.mark.parametrize(
    ("url", "host", "port", "target", "authority", "is_secure"),
    [
        ("http://127.0.0.1:8480/upload", "127.0.0.1", 8480, "/upload", "127.0.0.1:8480", False),
        ("http://relay.test", "relay.test", 80, "/upload", "relay.test", False),
        ("http://relay.test:80/", "relay.test", 80, "/upload", "relay.test", False),
        ("HTTPS://Relay.Test/upload/r", "relay.test", 443, "/upload/r", "relay.test", True),
        ("https://[::1]:1/a/upload/", "::1", 1, "/a/upload/", "[::1]:1", True),
        (
            "http://bücher.test/upload/ü%20",
            "xn--bcher-kva.test",
            80,
            "/upload/%C3%BC%20",
            "",
            False,
        ),
    ],
)
def test_a_url_is_a_host_and_a_place_on_it(
    url: str, host: str, port: int, target: str, authority: str, is_secure: bool
) -> None:
    found = parse_url(url)
    assert (found.host, found.port, found.target) == (host, port, target)
    assert (found.authority, found.is_secure) == (authority or host, is_secure)


@pytest.mark.parametrize(
    "url",
    [
        *("", "upload", "ftp://relay.test/", "http://", "http:///upload", "http://h:x/"),
        *("http://h:99999/", "http://a..b/", "http://h/?q", "http://h/#f", "http://h/a b"),
        *("http://h/a\nb", "http://[::1/", "//h/upload", "http://h/\udcff"),
    ],
)
def test_what_is_no_url_is_an_error_of_usage(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--to: must be a URL such as https://"):
        parse_url(url)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    for url in ("http://me:sesame@h/upload", "ftp://me:sesame@h/upload"):
        with pytest.raises(ConfigError, match=r"^--to: ") as caught:
            parse_url(url)
        assert "sesame" not in str(caught.value)


def test_a_token_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for content in (b"sesame", b"sesame\n", b"sesame\r\n"):
        path.write_bytes(content)
        assert read_token(str(path)) == "sesame"
    for content in (b"", b"\n", b"ses ame", b"sesame\nopen", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"^--token-file: .* one line of visible ASCII$"):
            read_token(str(path))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_token(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("url", "changes", "is_allowed"),
    [
        ("https://relay.test/", {}, True),
        ("http://127.0.0.1:8480/", {}, True),
        ("http://[::1]/", {}, True),
        ("http://localhost/", {}, True),
        ("http://relay.test/", {"unix_socket": "/run/relay.sock"}, True),
        ("http://relay.test/", {}, False),
        ("http://192.0.2.1/", {}, False),
        ("http://localhost.relay.test/", {}, False),
    ],
)
def test_a_token_never_crosses_a_network_in_the_clear(
    tmp_path: Path, url: str, changes: dict[str, Any], is_allowed: bool
) -> None:
    (tmp_path / "token").write_text("sesame")
    endpoint = replace(parse_url(url), token_file=str(tmp_path / "token"), **changes)
    if is_allowed:
        endpoint.check()
    else:
        with pytest.raises(ConfigError, match=r"^--token-file: --to is neither https nor"):
            endpoint.check()


def test_certificates_for_a_url_without_tls_are_an_error(tmp_path: Path) -> None:
    ca = str(save_ca(trustme.CA(), tmp_path))
    replace(parse_url("https://h/"), ca_file=ca).check()
    with pytest.raises(ConfigError, match=r"^--ca-file: --to is not https$"):
        replace(parse_url("http://h/"), ca_file=ca).check()
    with pytest.raises(ConfigError, match=r"^--certificate-file: .* cannot be read"):
        replace(parse_url("https://h/"), certificate_file="/nonexistent").check()


def nowhere(**changes: Any) -> Endpoint:
    return replace(parse_url("http://127.0.0.1:1/upload"), **changes)


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        (nowhere(), "cannot connect to 127.0.0.1:1: Connection refused"),
        (nowhere(unix_socket="/nonexistent"), "cannot connect to /nonexistent: No such file"),
        (nowhere(is_secure=True, ca_file="/nonexistent"), "--ca-file: /nonexistent cannot be read"),
    ],
)
async def test_why_there_is_no_connection_is_told_in_one_line(
    endpoint: Endpoint, reason: str
) -> None:
    with pytest.raises(Lost, match=re.escape(reason)):
        await endpoint.open()


async def test_a_connection_that_never_comes_is_given_up(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(_host: str, _port: int) -> trio.SocketStream:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(trio, "open_tcp_stream", connect)
    with pytest.raises(Lost, match="no answer within 10 s"):
        await nowhere().open()
    assert trio.current_time() == pytest.approx(connecting.CONNECT_TIMEOUT)
