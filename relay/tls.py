"""TLS: certificate files to a context, ssl's errors to words for people.

Whom relay connects to is always verified: its certificate's CA, its dates, and its name against
the URL's host. There is no switch to turn that off. This module knows no URL, no AMQP, no HTTP.
"""

import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, Protocol

import trio

from relay.config import ConfigError

Naming = Callable[[str], str]
"""Takes a key of TlsFiles; returns what whoever set it calls it: ``amqp.ca_file``."""


class OwnFiles(Protocol):
    """Paths of PEM files, each empty if there is none."""

    @property
    def certificate_file(self) -> str:
        """The certificate to show."""

    @property
    def key_file(self) -> str:
        """Its key, if that is not in the same file."""


class TlsFiles(OwnFiles, Protocol):
    """What a client has."""

    @property
    def ca_file(self) -> str:
        """CAs to trust, instead of the system's."""


class ServerFiles(OwnFiles, Protocol):
    """What a server has."""

    @property
    def client_ca_file(self) -> str:
        """CAs from one of which each client must have a certificate."""


class TlsFailed(Exception):
    """There is no TLS with the peer; the text says why.

    Attributes:
        is_refusal: one of the two does not want the other, so that it will fail again.
    """

    def __init__(self, reason: str, *, is_refusal: bool) -> None:
        super().__init__(reason)
        self.is_refusal = is_refusal


FILES: Final = ("ca_file", "certificate_file", "key_file")

# Codes of x509_vfy.h that ssl passes on in ``verify_code``.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_UNKNOWN_CA: Final = (2, 18, 19, 20, 21)
_WRONG_HOST: Final = (62, 63, 64)

_NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME of x509_vfy.h."""

_FLIGHTS: Final = 8
"""More turns than a handshake takes."""

_REASONS: Final = {
    "WRONG_VERSION_NUMBER": "its port does not speak TLS",
    "PACKET_LENGTH_TOO_LONG": "its port does not speak TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "{peer} showed no certificate",
    "UNSUPPORTED_PROTOCOL": "it does not offer TLS 1.2 or later",
}

_ALERTS: Final = {
    "BAD_CERTIFICATE": "it does not accept relay's certificate",
    "CERTIFICATE_EXPIRED": "it finds that relay's certificate has expired",
    "CERTIFICATE_REQUIRED": "{peer} asked for a client certificate, and none is configured",
    "CERTIFICATE_REVOKED": "it finds that relay's certificate was revoked",
    "CERTIFICATE_UNKNOWN": "it does not accept relay's certificate",
    "HANDSHAKE_FAILURE": (
        "it refused the handshake: it asked for a client certificate, or has no cipher in common"
    ),
    "PROTOCOL_VERSION": "it does not offer TLS 1.2 or later",
    "UNKNOWN_CA": "relay's certificate is from a CA unknown to {peer}",
    "UNSUPPORTED_CERTIFICATE": "relay's certificate is not one for clients",
}
"""What the peer's alerts (RFC 8446, section 6.2) mean here, by the end of OpenSSL's names."""


def client_context(files: TlsFiles, naming: Naming) -> ssl.SSLContext:
    """What to connect with: TLS 1.2 or later, verifying, with relay's certificate if it has one.

    Without ``ca_file`` the system's CAs are trusted. Reads the files each time, so that a renewed
    certificate counts from the next connection on.

    Raises:
        ConfigError: naming the key whose file cannot be used.
    """
    # Not create_default_context(): that writes keys to a file if SSLKEYLOGFILE says so.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files.ca_file:
        _check_certificates(files.ca_file, naming("ca_file"))
        context.load_verify_locations(cafile=files.ca_file)
    else:
        context.load_default_certs()
    if files.certificate_file:
        _check_certificates(files.certificate_file, naming("certificate_file"))
        _load_own(context, files, naming)
    elif files.key_file:
        raise ConfigError(f"{naming('key_file')}: goes with {naming('certificate_file')}")
    return context


def server_context(files: ServerFiles, naming: Naming) -> ssl.SSLContext:
    """What to serve with: TLS 1.2 or later, HTTP/1.1, forward secrecy, authenticated ciphers.

    Raises:
        ConfigError: naming the key whose file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Of TLS 1.2, what Mozilla's "intermediate" has and all clients of the last ten years know.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    # No tickets after the handshake: a client that never reads would leave with them unread, which
    # resets the connection under what it sent; and with TLS 1.3 each client is verified anew.
    context.num_tickets = 0
    _check_certificates(files.certificate_file, naming("certificate_file"))
    _load_own(context, files, naming)
    if files.client_ca_file:
        _check_certificates(files.client_ca_file, naming("client_ca_file"))
        context.load_verify_locations(cafile=files.client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def end_of(certificate_file: str, context: ssl.SSLContext) -> float:
    """Unix time at which a server's certificate expires, as its clients see it.

    Raises:
        ssl.SSLError: it does not do for a server.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # ssl tells dates of verified certificates only: this one vouches for itself, at any time.
    client.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    client.load_verify_locations(cafile=certificate_file)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = context.wrap_bio(up, down, server_side=True)
    ours = client.wrap_bio(down, up)
    for _ in range(_FLIGHTS):
        for side in (ours, theirs):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
            if (certificate := _peer_certificate(ours)) is not None:
                return ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    raise AssertionError("a handshake in memory has an end")


def _peer_certificate(side: ssl.SSLObject) -> Mapping[str, object] | None:
    try:
        return side.getpeercert()
    except ValueError:
        # The handshake is not done yet.
        return None


async def secured(
    stream: trio.abc.Stream, context: ssl.SSLContext, host: str, *, peer: str, lenient: bool = False
) -> trio.SSLStream[trio.abc.Stream]:
    """``stream`` with TLS on it; closed if that fails.

    Args:
        stream: connected to the peer.
        context: from ``client_context``.
        host: goes out as server name (SNI), unless it is an address, and is what to verify.
        peer: what errors call the other end.
        lenient: an end without TLS's own goodbye is one, as for HTTP, whose messages tell theirs.

    Raises:
        TlsFailed: the handshake failed.
    """
    secured = trio.SSLStream(stream, context, server_hostname=host, https_compatible=lenient)
    try:
        await secured.do_handshake()
    except trio.BrokenResourceError as exc:
        await trio.aclose_forcefully(stream)
        cause = exc.__cause__ if isinstance(exc.__cause__, Exception) else exc
        raise TlsFailed(explain(cause, peer), is_refusal=is_refusal(cause)) from exc
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secured


def is_refusal(error: BaseException | None) -> bool:
    """Whether ssl itself found fault, or was told of it, rather than that the stream broke."""
    ended = ssl.SSLEOFError | ssl.SSLZeroReturnError
    return isinstance(error, ssl.SSLError) and not isinstance(error, ended)


def explain(error: Exception, peer: str) -> str:
    """Why TLS with ``peer`` failed, for a person: what ssl, or the stream below it, raised."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_verification(error, peer)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return f"{peer} closed the connection"
    if not isinstance(error, ssl.SSLError):
        return str(error) or "the stream broke"
    reason = error.reason or ""
    before, alert, name = reason.partition("_ALERT_")
    words = _ALERTS.get(name) if alert else _REASONS.get(before)
    if words:
        return words.format(peer=peer)
    return f"TLS failed: {reason.replace('_', ' ').lower() or error}"


def _explain_verification(error: ssl.SSLCertVerificationError, peer: str) -> str:
    code, message = error.verify_code, error.verify_message.rstrip(".")
    if code == _EXPIRED:
        return f"{peer}'s certificate has expired"
    if code == _NOT_YET_VALID:
        return f"{peer}'s certificate is not valid yet"
    if code in _UNKNOWN_CA:
        return f"{peer}'s certificate is from an unknown CA ({message})"
    if code in _WRONG_HOST:
        return f"host name mismatch: {peer}'s certificate is for another host ({message})"
    return f"{peer}'s certificate is not valid: {message}"


def _load_own(context: ssl.SSLContext, files: OwnFiles, naming: Naming) -> None:
    path = files.key_file or files.certificate_file
    key = naming("key_file" if files.key_file else "certificate_file")
    _check_readable(path, key)
    try:
        context.load_cert_chain(files.certificate_file, path, password=_no_password)
    except _EncryptedKeyError as exc:
        raise ConfigError(f"{key}: the key is encrypted; relay has nobody to ask") from exc
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            what = f"is not the key of the certificate in {naming('certificate_file')}"
        elif exc.library == "SSL" and exc.reason:
            what = f"cannot be used: {exc.reason.replace('_', ' ').lower()}"
        else:
            what = "holds no private key in PEM form"
        raise ConfigError(f"{key}: {path} {what}") from exc


def _check_certificates(path: str, key: str) -> None:
    _check_readable(path, key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as exc:
        raise ConfigError(f"{key}: {path} holds no certificate in PEM form") from exc


def _check_readable(path: str, key: str) -> None:
    # ssl's own errors tell neither which of its files they are about nor, at times, why.
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"{key}: {path} cannot be read: {reason}") from exc


class _EncryptedKeyError(Exception):
    pass


def _no_password() -> str:
    # Without this, OpenSSL would ask on the terminal.
    raise _EncryptedKeyError
