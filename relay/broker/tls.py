"""TLS to a broker: certificate files to a context, ssl's errors to words for its operator.

The broker is always verified: its certificate's CA, its dates, and its name against the URL's
host. There is no switch to turn that off. This module knows no stream, no URL and no AMQP.
"""

import ssl
from collections.abc import Callable
from typing import Final

from relay.config import AmqpConfig, ConfigError

Naming = Callable[[str], str]
"""Takes a key of AmqpConfig; returns what whoever set it calls it: ``amqp.ca_file``."""

FILES: Final = ("ca_file", "certificate_file", "key_file")

# Codes of x509_vfy.h that ssl passes on in ``verify_code``.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_UNKNOWN_CA: Final = (2, 18, 19, 20, 21)
_WRONG_HOST: Final = (62, 63, 64)

_REASONS: Final = {
    "WRONG_VERSION_NUMBER": "its port does not speak TLS",
    "PACKET_LENGTH_TOO_LONG": "its port does not speak TLS",
    "UNSUPPORTED_PROTOCOL": "it does not offer TLS 1.2 or later",
}

_ALERTS: Final = {
    "BAD_CERTIFICATE": "it does not accept relay's certificate",
    "CERTIFICATE_EXPIRED": "it finds that relay's certificate has expired",
    "CERTIFICATE_REQUIRED": "the broker asked for a client certificate, and none is configured",
    "CERTIFICATE_REVOKED": "it finds that relay's certificate was revoked",
    "CERTIFICATE_UNKNOWN": "it does not accept relay's certificate",
    "HANDSHAKE_FAILURE": (
        "it refused the handshake: it asked for a client certificate, or has no cipher in common"
    ),
    "PROTOCOL_VERSION": "it does not offer TLS 1.2 or later",
    "UNKNOWN_CA": "relay's certificate is from a CA unknown to the broker",
    "UNSUPPORTED_CERTIFICATE": "relay's certificate is not one for clients",
}
"""What the broker's alerts (RFC 8446, section 6.2) mean here, by the end of OpenSSL's names."""


def client_context(config: AmqpConfig, naming: Naming) -> ssl.SSLContext:
    """What to connect with: TLS 1.2 or later, verifying, with relay's certificate if it has one.

    Without ``ca_file`` the system's CAs are trusted. Reads the files each time, so that a renewed
    certificate counts from the next connection on.

    Raises:
        ConfigError: naming the key whose file cannot be used.
    """
    # Not create_default_context(): that writes keys to a file if SSLKEYLOGFILE says so.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.ca_file:
        _check_certificates(config.ca_file, naming("ca_file"))
        context.load_verify_locations(cafile=config.ca_file)
    else:
        context.load_default_certs()
    if config.certificate_file:
        _check_certificates(config.certificate_file, naming("certificate_file"))
        _load_own(context, config, naming)
    elif config.key_file:
        raise ConfigError(f"{naming('key_file')}: goes with {naming('certificate_file')}")
    return context


def explain(error: Exception) -> str:
    """Why TLS failed, for an operator: what ssl, or the stream below it, raised."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_verification(error)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the broker closed the connection"
    if not isinstance(error, ssl.SSLError):
        return str(error) or "the stream broke"
    reason = error.reason or ""
    before, alert, name = reason.partition("_ALERT_")
    words = _ALERTS.get(name) if alert else _REASONS.get(before)
    return words or f"TLS failed: {reason.replace('_', ' ').lower() or error}"


def _explain_verification(error: ssl.SSLCertVerificationError) -> str:
    code, message = error.verify_code, error.verify_message.rstrip(".")
    if code == _EXPIRED:
        return "the broker's certificate has expired"
    if code == _NOT_YET_VALID:
        return "the broker's certificate is not valid yet"
    if code in _UNKNOWN_CA:
        return f"the broker's certificate is from an unknown CA ({message})"
    if code in _WRONG_HOST:
        return f"host name mismatch: the broker's certificate is for another host ({message})"
    return f"the broker's certificate is not valid: {message}"


def _load_own(context: ssl.SSLContext, config: AmqpConfig, naming: Naming) -> None:
    path = config.key_file or config.certificate_file
    key = naming("key_file" if config.key_file else "certificate_file")
    _check_readable(path, key)
    try:
        context.load_cert_chain(config.certificate_file, path, password=_no_password)
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
