"""Who may upload, as ``relay check`` sees it: files that expire, that leak, that let nobody in.

Reads the files as the daemon would. What the broker has is ``check.py``'s business.
"""

import ssl
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from relay.broker.routes import Finding, Severity
from relay.config import Config, TlsConfig, exposed
from relay.server import tokens
from relay.server.tokens import Tokens
from relay.tls import end_of, server_context

SOON: Final = 14 * 86400
"""Seconds before a certificate's end from which on it is told."""

_OTHERS: Final = 0o004


def check_access(config: Config) -> list[Finding]:
    """What is found.

    Raises:
        ConfigError: a file cannot be used, so that the daemon would not start.
    """
    findings: list[Finding] = []
    valid = None
    if path := config.auth.tokens_file:
        valid = tokens.load(path)
        findings += _check_tokens(path, valid, config)
    if config.http.tls.certificate_file:
        findings += _check_tls(config.http.tls)
    findings += _check_routes(config, valid)
    return findings


def _check_tokens(path: str, valid: Tokens, config: Config) -> Iterator[Finding]:
    subject = "auth.tokens_file"
    if not valid.clients:
        yield _warning(subject, f"{path} has no token", "add a line that relay token makes")
    yield from _check_mode(subject, path)
    addresses = exposed(config)
    if addresses and not config.http.tls.certificate_file:
        what = f"tokens cross the network in the clear to {addresses[0]}"
        yield _warning(subject, what, "set [http.tls], or have TLS end in front of relay")


def _check_tls(files: TlsConfig) -> Iterator[Finding]:
    context = server_context(files, lambda key: f"http.tls.{key}")
    key = "key_file" if files.key_file else "certificate_file"
    yield from _check_mode(f"http.tls.{key}", getattr(files, key))
    subject = f"http.tls.certificate_file: {files.certificate_file}"
    try:
        yield from _check_end(subject, end_of(files.certificate_file, context))
    except ssl.SSLError as exc:
        words = (exc.reason or "").replace("_", " ").lower()
        yield _warning(subject, f"is no certificate of a server ({words})", "have one issued")
    for ca in context.get_ca_certs():
        subject = f"http.tls.client_ca_file: CA {_subject(ca)}"
        yield from _check_end(subject, ssl.cert_time_to_seconds(str(ca["notAfter"])))


def _check_mode(subject: str, path: str) -> Iterator[Finding]:
    if Path(path).stat().st_mode & _OTHERS:
        yield _warning(subject, f"{path} can be read by everybody", f"chmod o-r {path}")


def _check_end(subject: str, end: float) -> Iterator[Finding]:
    left, day = end - time.time(), datetime.fromtimestamp(end, UTC).date()
    remedy = "renew it; relay serve takes it over on SIGHUP"
    if left < 0:
        yield Finding(
            severity=Severity.ERROR, subject=subject, what=f"expired on {day}", remedy=remedy
        )
    elif left < SOON:
        yield _warning(subject, f"expires on {day}", remedy)


def _check_routes(config: Config, valid: Tokens | None) -> Iterator[Finding]:
    """Names that nobody can have. Those in certificates and of users are not known here."""
    if config.http.tls.client_ca_file:
        return
    known = valid.clients if valid is not None else frozenset()
    for name, route in config.routes.items():
        for client in route.clients:
            if client not in known and not client.startswith("uid:"):
                yield _warning(
                    f"route {name}", f"client '{client}' has no token", "correct routes.*.clients"
                )


def _warning(subject: str, what: str, remedy: str) -> Finding:
    return Finding(severity=Severity.WARNING, subject=subject, what=what, remedy=remedy)


def _subject(certificate: Mapping[str, Any]) -> str:
    return ", ".join(value for names in certificate["subject"] for _, value in names)
