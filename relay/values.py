"""Single values of the configuration: what a file or a flag says, checked, to what relay keeps.

Each parser takes the TOML value and returns the value to keep, or raises ValueError with what it
must be. Which key has which parser, and what values mean together, is for ``config``.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

SHORT_TEXT_MAX: Final = 255
"""Bytes of UTF-8 in a name or routing key (AMQP 0-9-1, section 4.2.5.3)."""

CLIENT_MAX: Final = 128
"""Bytes of UTF-8 in a client's name: beside a transfer's id and a route's name it fits into a
routing key."""

_ROUTING_KEY = re.compile(r"(?:[^{}]|\{\{|\}\}|\{(?:transfer|route|client)\})*")


def parse_size(value: object) -> int:
    """Bytes from an integer or text such as ``"64 MiB"`` (KiB, MiB, GiB, TiB, B)."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and (
        match := re.fullmatch(r"(\d{1,18})\s*([KMGT]iB|B)?", value.strip(), re.ASCII)
    ):
        number = int(match[1]) << {"K": 10, "M": 20, "G": 30, "T": 40}.get((match[2] or "B")[0], 0)
    else:
        raise ValueError('bytes or text such as "64 MiB"')
    if number < 0:
        raise ValueError("0 bytes or more")
    return number


def parse_duration(value: object) -> float:
    """Seconds from a number or text such as ``"30 s"`` (ms, s, min, h)."""
    seconds: float
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    elif isinstance(value, str) and (
        match := re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(ms|s|min|h)?", value.strip(), re.ASCII)
    ):
        seconds = float(match[1]) * {"ms": 0.001, "min": 60, "h": 3600}.get(match[2] or "s", 1)
    else:
        raise ValueError('seconds or text such as "30 s"')
    if not 0 <= seconds <= 366 * 86400:
        raise ValueError("between 0 s and a year")
    return float(seconds)


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[object], int]:
    """A parser of integers within these limits."""

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise ValueError(f"an integer between {minimum} and {maximum}")
        return value

    return parse


def positive_size(value: object) -> int:
    """Bytes, at least one."""
    if (size := parse_size(value)) == 0:
        raise ValueError("a size above 0")
    return size


def positive_duration(value: object) -> float:
    """Seconds, and some."""
    if (seconds := parse_duration(value)) == 0:
        raise ValueError("a duration above 0")
    return seconds


def heartbeat(value: object) -> float:
    """Seconds between heartbeats; 0: none."""
    seconds = parse_duration(value)
    # Whole seconds in 16 bits (AMQP 0-9-1, connection.tune).
    if seconds and not 1 <= seconds <= 65535:
        raise ValueError("0 for none, or 1 s to 65535 s")
    return seconds


def any_text(value: object) -> str:
    """Text that a name may be made of."""
    # Neither AMQP nor the operating system can have a NUL in a name.
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("text")
    return value


def short_text(value: object) -> str:
    """Text that an AMQP short string has room for."""
    text = any_text(value)
    if len(text.encode()) > SHORT_TEXT_MAX:
        raise ValueError(f"at most {SHORT_TEXT_MAX} bytes of text")
    return text


def name(value: object) -> str:
    """A queue's name."""
    # An empty name makes the broker invent another one at each declaration.
    if not (name := short_text(value)):
        raise ValueError("a name")
    return name


def client(value: object) -> str:
    """A client's name."""
    if not is_client_name(text := any_text(value)):
        raise ValueError(f"1 to {CLIENT_MAX} bytes of printable text")
    return text


def is_client_name(text: str) -> bool:
    """Whether text can be a client's name: in a log line, an AMQP header and a routing key."""
    # isprintable: no control, no invisible and no unassigned characters, and of spaces only " ".
    fits = 1 <= len(text) <= CLIENT_MAX and text.isprintable() and text == text.strip()
    return fits and len(text.encode()) <= CLIENT_MAX


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def one_of(*choices: str) -> Callable[[object], str]:
    """A parser of one of these words."""

    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return str(value)

    return parse


def list_of(parse_item: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    """A parser of lists whose items are parsed like that."""

    def parse(value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError("a list")
        return tuple(parse_item(item) for item in value)

    return parse


def parse_address(value: object) -> str:
    """``host:port``, ``[v6]:port`` or ``unix:PATH``; port 0 lets the system choose."""
    text = any_text(value)
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise ValueError("unix: and a path")
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("host:port, [v6]:port or unix:PATH")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("[v6]:port, such as [::1]:8480")
    return text


def admin_address(value: object) -> str:
    """Like ``parse_address``; empty for none."""
    return "" if value == "" else parse_address(value)


def parse_amqp_url(value: object) -> str:
    """``amqp://user:password@host:port/vhost``; relay has keys of its own for a URL's query."""
    try:
        parts = urlsplit(any_text(value))
        valid = parts.scheme in ("amqp", "amqps") and bool(parts.hostname) and parts.port != 0
        # A name that cannot be one is an error here rather than at each attempt to connect.
        (parts.hostname or "").encode("idna")
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError("amqp://user:password@host:port/vhost, or amqps")
    return str(value)


def routing_key(value: object) -> str:
    """A template over ``{transfer}``, ``{route}`` and ``{client}``."""
    template = any_text(value)
    if not _ROUTING_KEY.fullmatch(template):
        raise ValueError("text with {transfer}, {route} and {client}, and other braces doubled")
    return template


def arguments(value: object) -> Mapping[str, str | int | bool]:
    """A queue's arguments."""
    if not isinstance(value, dict) or not all(
        isinstance(v, str) or (isinstance(v, int) and -(2**63) <= v < 2**63) for v in value.values()
    ):
        raise ValueError("a table of text, 64-bit integers and booleans")
    return {short_text(key): argument for key, argument in value.items()}
