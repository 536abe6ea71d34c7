"""``relay check``: whether the daemon would find all it needs, before it is started.

Goes the daemon's own way to each broker in turn, and tells what that and the verification of the
routes find, and what there is to say about who may upload. What can be wrong with a route or a
certificate, this module does not know.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

import trio

from relay.broker.publisher import Publisher, Refusals
from relay.broker.routes import Finding, Severity, verify_routes
from relay.broker.session import Session
from relay.check_access import check_access
from relay.config import AmqpConfig, Config
from relay.errors import BrokerError
from relay.transfer import new_transfer_id

MASK: Final = "***"

GOODBYE: Final = 2.0
"""Seconds for the AMQP goodbye: nothing depends on it."""

Parse = Callable[[object], object]
"""Takes what a file says and returns the value, or raises ValueError."""

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_UNITS: Final = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))


def check(config: Config, *, show: bool = False) -> int:
    """Verify every route on every broker: a line on standard error for each error and warning.

    Args:
        config: valid in itself.
        show: print ``effective(config)`` on standard output, and there nothing else.

    Returns:
        0 if there is no error, else 1.

    Raises:
        ConfigError: the daemon would not start with it.
    """
    Publisher(config.amqp, config.routes)
    findings = check_access(config)
    # The publisher logs what is told here in other words.
    logging.getLogger().addHandler(logging.NullHandler())
    if show:
        sys.stdout.write(effective(config))
    for url in config.amqp.urls:
        findings += trio.run(_check_broker, config, url, len(config.amqp.urls) > 1)
    for finding in findings:
        if finding.severity is not Severity.NOTE:
            print(f"{finding.severity.value}: {finding}", file=sys.stderr)
        elif not show:
            print(f"{finding.severity.value}: {finding}")
    if not show:
        print(summary(findings, len(config.routes)))
    return int(any(finding.severity is Severity.ERROR for finding in findings))


def summary(findings: list[Finding], routes: int) -> str:
    """How many of what, in one line."""
    of = [finding.severity for finding in findings]
    counts = [(routes, "route")]
    counts += [
        (of.count(severity), severity.value) for severity in (Severity.ERROR, Severity.WARNING)
    ]
    return ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in counts)


# --- the brokers -------------------------------------------------------------------------------


async def _check_broker(config: Config, url: str, name_it: bool) -> list[Finding]:
    """What is found at one broker; ``name_it``: say each time which one it is."""
    broker = _broker(url)
    try:
        findings = await _verify(config, url)
    except BrokerError as exc:
        return [
            Finding(
                severity=Severity.ERROR,
                subject=broker,
                what=exc.detail,
                remedy="see that it runs and that [amqp] is right",
            )
        ]
    if name_it:
        findings = [replace(f, subject=f"{broker}: {f.subject}") for f in findings]
    return findings


async def _verify(config: Config, url: str) -> list[Finding]:
    """Connect once.

    Raises:
        BrokerError: there is no connection, or it was lost.
    """
    findings: list[Finding] = []
    errors: list[BrokerError] = []
    over = trio.Event()

    async def verify(session: Session, refusals: Refusals) -> None:
        try:
            routes = config.routes.values()
            findings.extend(await verify_routes(session, routes, refusals, new_transfer_id()))
        except BrokerError as exc:
            errors.append(exc)
        over.set()

    def on_down(error: BrokerError) -> None:
        errors.append(error)
        over.set()

    publisher = Publisher(_alone(config.amqp, url), config.routes, verify=verify)
    publisher.on_down = on_down
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publisher.run)
        await over.wait()
        errors_before_goodbye = errors.copy()
        with trio.move_on_after(GOODBYE):
            await publisher.close()
        nursery.cancel_scope.cancel()
    if errors_before_goodbye:
        raise errors_before_goodbye[0]
    return findings


def _alone(amqp: AmqpConfig, url: str) -> AmqpConfig:
    """The configuration with one of its URLs. TLS files are refused where nothing needs them."""
    alone = replace(amqp, urls=(url,))
    if urlsplit(url).scheme == "amqps":
        return alone
    return replace(alone, ca_file="", certificate_file="", key_file="")


def _broker(url: str) -> str:
    parts = urlsplit(url)
    return f"broker {parts.netloc.rpartition('@')[2]}"


# --- the effective configuration ---------------------------------------------------------------


def effective(config: Config) -> str:
    """The configuration with all its defaults, as TOML that means the same when it is loaded.

    Except for passwords in URLs, which are masked.
    """
    return "\n".join(_sections("", config)).lstrip("\n") + "\n"


def _sections(path: str, section: Any) -> Iterator[str]:
    """A slice of the configuration as TOML's lines, its keys before its tables."""
    below = []
    if path and is_dataclass(section):
        yield f"\n[{path}]"
    for name, value, parse in _items(section):
        key = f"{path}.{_key(name)}" if path else _key(name)
        if is_dataclass(value) or (isinstance(value, Mapping) and parse is None):
            below.append((key, value))
        elif parse is not None:
            yield f"{_key(name)} = {_value(value, parse)}"
    for key, value in below:
        yield from _sections(key, value)


def _items(section: Any) -> Iterator[tuple[str, Any, Parse | None]]:
    """Keys, values and parsers. What is no key of the file has no parser, nor has a section."""
    if isinstance(section, Mapping):
        for name, value in section.items():
            yield name, value, None
    else:
        for field in fields(section):
            yield field.name, getattr(section, field.name), field.metadata.get("parse")


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _value(value: Any, parse: Parse) -> str:
    """With a unit, where the key takes one and the value is the same with it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        for text in _with_units(value):
            try:
                if parse(text) == value:
                    return _text(text)
            except ValueError:
                continue
    return _plain(value)


def _with_units(value: int | float) -> Iterator[str]:
    if isinstance(value, float):
        yield f"{value:g} s"
    else:
        yield from (
            f"{value >> bits} {unit}" for unit, bits in _UNITS if value and not value % (1 << bits)
        )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(name)} = {_plain(item)}" for name, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return _text(_masked(str(value)))


def _text(value: str) -> str:
    # JSON's escapes are TOML's, but for one character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _masked(text: str) -> str:
    if not text.startswith(("amqp://", "amqps://")):
        return text
    parts = urlsplit(text)
    credentials, at, host = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return parts._replace(netloc=f"{user}{colon}{MASK if colon else ''}{at}{host}").geturl()
