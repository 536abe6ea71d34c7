"""Where uploads go: from a URL to a stream to its server, with TLS that is verified or fails.

``https`` means TLS to that server, or no connection. What is said over the stream is for others to
know.
"""

import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, quote, urlsplit

import trio

from relay import tls
from relay.client.exchange import Lost, Unusable
from relay.config import ConfigError, is_loopback_host

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for name resolution and the handshakes of TCP and TLS."""

_PORTS: Final = {"http": 80, "https": 443}
_TOKEN: Final = re.compile(rb"[\x21-\x7e]+")
_SERVER: Final = "the server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server, and a place on it.

    Attributes:
        host: a name or an address, without brackets.
        port: of TCP.
        target: absolute path, percent-encoded.
        authority: for the Host field.
        is_secure: TLS.
        unix_socket: connected to instead of host and port, if not empty.
        token_file: holds what the server is shown as bearer token; empty for none.
        ca_file: PEM; empty for the system's CAs.
        certificate_file: PEM; empty for none.
        key_file: PEM; empty if it is in the same file.
    """

    host: str
    port: int
    target: str
    authority: str
    is_secure: bool
    unix_socket: str = ""
    token_file: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    def check(self) -> None:
        """Try the files, as far as that is possible without the server.

        Raises:
            ConfigError: naming the flag.
        """
        if self.is_secure:
            tls.client_context(self, _flag)
        else:
            # Whoever gives certificates believes that the connection is secure.
            for key in ("ca_file", "certificate_file", "key_file"):
                if getattr(self, key):
                    raise ConfigError(f"{_flag(key)}: --to is not https")
        if self.token_file:
            local = bool(self.unix_socket) or is_loopback_host(self.host)
            if not self.is_secure and not local:
                raise ConfigError("--token-file: --to is neither https nor on this machine")
            read_token(self.token_file)

    async def open(self) -> trio.abc.Stream:
        """A stream to the server, which with TLS is verified.

        Raises:
            Lost: there is none now.
            Unusable: the server is not the one that it should be.
        """
        step = "no answer"
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                # The files are read each time: a renewed certificate counts from then on.
                context = await trio.to_thread.run_sync(self._context) if self.is_secure else None
                stream = await self._connect()
                step = "no end of the TLS handshake"
                if context is None:
                    return stream
                return await tls.secured(stream, context, self.host, peer=_SERVER, lenient=True)
        except trio.TooSlowError as exc:
            raise Lost(f"{self._cannot}: {step} within {CONNECT_TIMEOUT:g} s") from exc
        except tls.TlsFailed as exc:
            kind = Unusable if exc.is_refusal else Lost
            raise kind(f"no TLS with the server: {exc}") from exc
        except OSError as exc:
            raise Lost(f"{self._cannot}: {_reason(exc)}") from exc
        except ConfigError as exc:
            raise Lost(f"{self._cannot}: {exc}") from exc

    @property
    def _cannot(self) -> str:
        return f"cannot connect to {self.unix_socket or f'{self.host}:{self.port}'}"

    async def _connect(self) -> trio.SocketStream:
        if self.unix_socket:
            return await trio.open_unix_socket(self.unix_socket)
        return await trio.open_tcp_stream(self.host, self.port)

    def _context(self) -> ssl.SSLContext:
        return tls.client_context(self, _flag)


def parse_url(url: str) -> Endpoint:
    """The endpoint that ``--to`` names, without the files.

    Raises:
        ConfigError: it is none; the URL is not quoted, for a password may be in it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        host = (parts.hostname or "").encode("idna").decode("ascii")
        valid = bool(host) and not parts.query and not parts.fragment
        target = quote(parts.path, safe="/%!$&'()*+,;=:@~", errors="strict")
    except (KeyError, ValueError):
        valid = False
    if not valid or re.search(r"[\x00-\x20\x7f]", url):
        raise ConfigError("--to: must be a URL such as https://host:port/upload/ROUTE")
    if parts.username is not None:
        raise ConfigError("--to: no user or password in a URL; use --token-file")
    if target in ("", "/"):
        target = "/upload"
    return Endpoint(
        host=host,
        port=port,
        target=target,
        authority=_authority(parts, host),
        is_secure=parts.scheme == "https",
    )


def read_token(path: str) -> str:
    """What the file holds, without line breaks at its end.

    Raises:
        ConfigError: naming the file, never what is in it.
    """
    try:
        token = Path(path).read_bytes().rstrip(b"\r\n")
    except OSError as exc:
        raise ConfigError(f"--token-file: {path} cannot be read: {exc.strerror}") from exc
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"--token-file: {path} must hold one line of visible ASCII")
    return token.decode("ascii")


def _authority(parts: SplitResult, host: str) -> str:
    bracketed = f"[{host}]" if ":" in host else host
    is_default = parts.port in (None, _PORTS[parts.scheme])
    return bracketed if is_default else f"{bracketed}:{parts.port}"


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _reason(error: OSError) -> str:
    """Why a connection cannot be made; of trio's attempts at several addresses, the last counts."""
    if isinstance(error.__cause__, ExceptionGroup):
        last = error.__cause__.exceptions[-1]
        if isinstance(last, OSError) and last.errno is not None:
            return os.strerror(last.errno)
    return error.strerror or str(error)
