"""Configuration: TOML and flags in, frozen and validated slices out.

Every key has a default, so that no file is needed. Each module of relay gets the slice it needs
and no more. Unknown keys are errors, and so is every value out of range: a daemon that starts
understood its whole configuration. This module knows no other module of relay.

Sizes are in bytes and durations in seconds once parsed; files may say ``"64 MiB"`` and ``"30 s"``.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

Slice = TypeVar("Slice")

FRAME_SIZE_MIN: Final = 4096
FRAME_SIZE_MAX: Final = 16 * 1024 * 1024
"""RabbitMQ 4's default limit on a message's size (``max_message_size``)."""

SHORT_TEXT_MAX: Final = 255
"""Bytes of UTF-8 in a name or routing key (AMQP 0-9-1, section 4.2.5.3)."""

CLIENT_MAX: Final = 128
"""Bytes of UTF-8 in a client's name: beside a transfer's id and a route's name it fits into a
routing key."""

_ROUTING_KEY = re.compile(r"(?:[^{}]|\{\{|\}\}|\{(?:transfer|route|client)\})*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class ConfigError(ValueError):
    """The configuration cannot be used. One line: which key, and why."""


# --- parsers of single values ------------------------------------------------------------------
# Each takes the TOML value and returns the value to keep, or raises ValueError with what it must
# be.


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


def _integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise ValueError(f"an integer between {minimum} and {maximum}")
        return value

    return parse


def _positive_size(value: object) -> int:
    if (size := parse_size(value)) == 0:
        raise ValueError("a size above 0")
    return size


def _positive_duration(value: object) -> float:
    if (seconds := parse_duration(value)) == 0:
        raise ValueError("a duration above 0")
    return seconds


def _heartbeat(value: object) -> float:
    seconds = parse_duration(value)
    # Whole seconds in 16 bits (AMQP 0-9-1, connection.tune).
    if seconds and not 1 <= seconds <= 65535:
        raise ValueError("0 for none, or 1 s to 65535 s")
    return seconds


def _text(value: object) -> str:
    # Neither AMQP nor the operating system can have a NUL in a name.
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("text")
    return value


def _short_text(value: object) -> str:
    text = _text(value)
    if len(text.encode()) > SHORT_TEXT_MAX:
        raise ValueError(f"at most {SHORT_TEXT_MAX} bytes of text")
    return text


def _name(value: object) -> str:
    # An empty name makes the broker invent another one at each declaration.
    if not (name := _short_text(value)):
        raise ValueError("a name")
    return name


def _client(value: object) -> str:
    if not is_client_name(text := _text(value)):
        raise ValueError(f"1 to {CLIENT_MAX} bytes of printable text")
    return text


def is_client_name(text: str) -> bool:
    """Whether text can be a client's name: in a log line, an AMQP header and a routing key."""
    # isprintable: no control, no invisible and no unassigned characters, and of spaces only " ".
    fits = 1 <= len(text) <= CLIENT_MAX and text.isprintable() and text == text.strip()
    return fits and len(text.encode()) <= CLIENT_MAX


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _one_of(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return str(value)

    return parse


def _list_of(parse_item: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    def parse(value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError("a list")
        return tuple(parse_item(item) for item in value)

    return parse


def parse_address(value: object) -> str:
    """``host:port``, ``[v6]:port`` or ``unix:PATH``; port 0 lets the system choose."""
    text = _text(value)
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


def _admin_address(value: object) -> str:
    return "" if value == "" else parse_address(value)


def parse_amqp_url(value: object) -> str:
    """``amqp://user:password@host:port/vhost``; relay has keys of its own for a URL's query."""
    try:
        parts = urlsplit(_text(value))
        valid = parts.scheme in ("amqp", "amqps") and bool(parts.hostname) and parts.port != 0
        # A name that cannot be one is an error here rather than at each attempt to connect.
        (parts.hostname or "").encode("idna")
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError("amqp://user:password@host:port/vhost, or amqps")
    return str(value)


def _routing_key(value: object) -> str:
    template = _text(value)
    if not _ROUTING_KEY.fullmatch(template):
        raise ValueError("text with {transfer}, {route} and {client}, and other braces doubled")
    return template


def _arguments(value: object) -> Mapping[str, str | int | bool]:
    if not isinstance(value, dict) or not all(
        isinstance(v, str) or (isinstance(v, int) and -(2**63) <= v < 2**63) for v in value.values()
    ):
        raise ValueError("a table of text, 64-bit integers and booleans")
    return {_short_text(key): argument for key, argument in value.items()}


def _key(default: Any, parse: Callable[[object], Any]) -> Any:
    """A configuration key with its default (as a file would say it) and its parser."""
    return field(default=parse(default), metadata={"parse": parse})


# --- the slices --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """TLS on the upload listener's TCP sockets; ``[http.tls]``. Without a certificate: none."""

    certificate_file: str = _key("", _text)
    key_file: str = _key("", _text)
    client_ca_file: str = _key("", _text)


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The upload listener; ``[http]``. Timeouts in seconds, sizes in bytes."""

    listen: tuple[str, ...] = _key(["127.0.0.1:8480"], _list_of(parse_address))
    anonymous: bool = _key(False, _flag)
    max_connections: int = _key(1024, _integer(1))
    max_uploads: int = _key(256, _integer(1))
    max_uploads_per_client: int = _key(0, _integer(0))
    max_header_bytes: int = _key("16 KiB", _positive_size)
    max_headers: int = _key(100, _integer(1))
    header_timeout: float = _key("10 s", _positive_duration)
    body_idle_timeout: float = _key("30 s", _positive_duration)
    min_body_rate: int = _key("1 KiB", parse_size)
    min_body_rate_grace: float = _key("10 s", parse_duration)
    max_client_rate: int = _key(0, parse_size)
    keep_alive_timeout: float = _key("60 s", _positive_duration)
    keep_alive_requests: int = _key(1000, _integer(1))
    drain_timeout: float = _key("30 s", parse_duration)
    receipt_parts: int = _key(100, _integer(0))
    tls: TlsConfig = field(default_factory=TlsConfig)


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """Who clients are, beside what ``[http.tls]`` tells; ``[auth]``."""

    tokens_file: str = _key("", _text)


@dataclass(frozen=True, kw_only=True)
class AmqpConfig:
    """The broker; ``[amqp]``. Windows are bytes published and not yet confirmed."""

    urls: tuple[str, ...] = _key(
        ["amqp://guest:guest@127.0.0.1:5672/%2f"], _list_of(parse_amqp_url)
    )
    password_file: str = _key("", _text)
    ca_file: str = _key("", _text)
    certificate_file: str = _key("", _text)
    key_file: str = _key("", _text)
    connections: int = _key(1, _integer(1, 64))
    window: int = _key("64 MiB", _positive_size)
    upload_window: int = _key("8 MiB", _positive_size)
    heartbeat: float = _key("30 s", _heartbeat)
    reconnect_grace: float = _key("30 s", parse_duration)
    blocked_grace: float = _key("30 s", parse_duration)
    confirm_timeout: float = _key("60 s", _positive_duration)


@dataclass(frozen=True, kw_only=True)
class AdminConfig:
    """The admin listener; ``[admin]``. An empty address turns it off."""

    listen: str = _key("127.0.0.1:8481", _admin_address)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """``[log]``. ``auto`` is logfmt, with syslog levels where journald reads them."""

    level: str = _key("info", _one_of("debug", "info", "warning", "error"))
    format: str = _key("auto", _one_of("auto", "logfmt", "json"))


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """A queue to declare, durable, when the daemon connects; ``[routes.NAME.queue]``."""

    name: str = _key("uploads", _name)
    type: str = _key("quorum", _one_of("quorum", "classic", "stream"))
    arguments: Mapping[str, str | int | bool] = field(
        default_factory=lambda: {"x-overflow": "reject-publish", "x-single-active-consumer": True},
        metadata={"parse": _arguments},
    )


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """Where transfers go; ``[routes.NAME]``. 0 means no limit."""

    name: str
    exchange: str = _key("", _short_text)
    routing_key: str = _key("uploads", _routing_key)
    mandatory: bool = _key(True, _flag)
    persistent: bool = _key(True, _flag)
    frame_size: int = _key(131064, parse_size)
    digests: tuple[str, ...] = _key([], _list_of(_one_of("crc32c", "sha-256", "sha-512")))
    max_bytes: int = _key(0, parse_size)
    max_part_bytes: int = _key(0, parse_size)
    max_parts: int = _key(1000, _integer(1))
    max_part_header_bytes: int = _key("8 KiB", _positive_size)
    clients: tuple[str, ...] = _key([], _list_of(_client))
    queue: QueueConfig | None = None


DEFAULT_ROUTE: Final = RouteConfig(name="default", queue=QueueConfig())
"""The route that exists without any configuration."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration, by section."""

    http: HttpConfig = field(default_factory=HttpConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    amqp: AmqpConfig = field(default_factory=AmqpConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)
    log: LogConfig = field(default_factory=LogConfig)
    routes: Mapping[str, RouteConfig] = field(default_factory=lambda: {"default": DEFAULT_ROUTE})


# --- loading -----------------------------------------------------------------------------------


def load(
    path: Path | None = None,
    *,
    listen: list[str] | None = None,
    amqp: list[str] | None = None,
    admin: str | None = None,
) -> Config:
    """Read ``path`` (none: defaults), let flags override it, validate the whole.

    Raises:
        ConfigError: naming the file, the key and the reason.
    """
    with naming(path):
        document = _read(path)
        if listen:
            _section(document, "http")["listen"] = listen
        if amqp:
            _section(document, "amqp")["urls"] = amqp
        if admin is not None:
            _section(document, "admin")["listen"] = admin
        return from_document(document)


@contextmanager
def naming(path: Path | None) -> Iterator[None]:
    """Have ConfigErrors raised in the block name the file that the configuration is from."""
    try:
        yield
    except ConfigError as exc:
        text = f"{path}: {exc}" if path else str(exc)
        # Keys and file names may have anything in them; this is to be one line.
        raise ConfigError(_CONTROL.sub(" ", text)) from exc


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"cannot be read: {reason}") from exc


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    return _table(document.setdefault(name, {}), name)


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a table, [{where}]")
    return value


def from_document(document: dict[str, Any]) -> Config:
    """Validate a parsed TOML document.

    Raises:
        ConfigError: naming the key and the reason.
    """
    sections = {"http", "auth", "amqp", "admin", "log", "routes"}
    if unknown := sorted(set(document) - sections):
        raise ConfigError(f"{unknown[0]}: unknown section")
    config = Config(
        http=_http(_section(document, "http")),
        auth=_slice(AuthConfig(), "auth", _section(document, "auth")),
        amqp=_with_password(_slice(AmqpConfig(), "amqp", _section(document, "amqp"))),
        admin=_slice(AdminConfig(), "admin", _section(document, "admin")),
        log=_slice(LogConfig(), "log", _section(document, "log")),
        routes=_routes(_section(document, "routes")),
    )
    _check_together(config)
    return config


def _slice(defaults: Slice, where: str, section: Mapping[str, Any]) -> Slice:
    """``defaults`` with what ``section`` says in place; unknown keys are errors."""
    known = {f.name: f for f in fields(defaults) if "parse" in f.metadata}  # type: ignore[arg-type]
    values = {}
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"{where}.{key}: unknown key")
        try:
            values[key] = known[key].metadata["parse"](value)
        except ValueError as exc:
            raise ConfigError(f"{where}.{key}: must be {exc}") from exc
    return replace(defaults, **values)  # type: ignore[type-var]


def _http(section: Mapping[str, Any]) -> HttpConfig:
    keys = {key: value for key, value in section.items() if key != "tls"}
    tls = _slice(TlsConfig(), "http.tls", _table(section.get("tls", {}), "http.tls"))
    return replace(_slice(HttpConfig(), "http", keys), tls=tls)


def _routes(section: Mapping[str, Any]) -> Mapping[str, RouteConfig]:
    routes = {"default": DEFAULT_ROUTE}
    for name, table in section.items():
        where = f"routes.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ConfigError(f"{where}: a route's name is 1 to 64 letters, digits, '.', '_', '-'")
        keys = {key: value for key, value in _table(table, where).items() if key != "queue"}
        route = _slice(routes.get(name, RouteConfig(name=name)), where, keys)
        if "queue" in table:
            queue = _table(table["queue"], f"{where}.queue")
            # A stream cannot have the arguments that other queues have by default.
            defaults = QueueConfig(arguments={}) if queue.get("type") == "stream" else QueueConfig()
            route = replace(route, queue=_slice(defaults, f"{where}.queue", queue))
        elif keys.keys() & {"exchange", "routing_key"}:
            # A route sent elsewhere does not want the default route's queue.
            route = replace(route, queue=None)
        routes[name] = route
    return routes


def logs_in_by_certificate(url: str, amqp: AmqpConfig) -> bool:
    """Whether a broker is to take relay's certificate for its user and password (EXTERNAL)."""
    parts = urlsplit(url)
    return parts.scheme == "amqps" and parts.username is None and bool(amqp.certificate_file)


def _with_password(amqp: AmqpConfig) -> AmqpConfig:
    if not amqp.password_file:
        return amqp
    try:
        password = Path(amqp.password_file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "is not UTF-8"
        raise ConfigError(f"amqp.password_file: cannot be read: {reason}") from exc
    urls = []
    for url in amqp.urls:
        if logs_in_by_certificate(url, amqp):
            urls.append(url)
            continue
        parts = urlsplit(url)
        user = parts.username or "guest"
        host = parts.netloc.rpartition("@")[2]
        urls.append(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl())
    return replace(amqp, urls=tuple(urls))


def _check_together(config: Config) -> None:
    """What no single key can tell."""
    if not config.http.listen:
        raise ConfigError("http.listen: must name at least one address")
    if not config.amqp.urls:
        raise ConfigError("amqp.urls: must name at least one broker")
    _check_access(config)
    if config.amqp.upload_window > config.amqp.window // config.amqp.connections:
        raise ConfigError("amqp.upload_window: must not be above amqp.window / amqp.connections")
    for name, route in config.routes.items():
        if not FRAME_SIZE_MIN <= route.frame_size <= FRAME_SIZE_MAX:
            raise ConfigError(f"routes.{name}.frame_size: must be 4096 to 16777216 bytes")
        if route.frame_size > config.amqp.upload_window:
            raise ConfigError(f"routes.{name}.frame_size: must not be above amqp.upload_window")
        key = route.routing_key.format(transfer="x" * 36, route=name, client="x" * CLIENT_MAX)
        if len(key.encode()) > SHORT_TEXT_MAX:
            raise ConfigError(f"routes.{name}.routing_key: must be at most {SHORT_TEXT_MAX} bytes")


_FIXED: Final = (
    ("http", "listen"),
    ("http", "max_connections"),
    ("amqp", "connections"),
    ("amqp", "window"),
    ("admin", "listen"),
)
"""What a running daemon cannot change: its sockets, and what its memory is divided into."""


def keep_fixed(running: Config, read: Config) -> tuple[Config, list[str]]:
    """``read`` as far as it can take effect without a restart, and the keys that cannot.

    Raises:
        ConfigError: it does not go with what cannot change.
    """
    kept = []
    for section, key in _FIXED:
        value = getattr(getattr(running, section), key)
        if getattr(getattr(read, section), key) != value:
            kept.append(f"{section}.{key}")
            changed = replace(getattr(read, section), **{key: value})
            read = replace(read, **{section: changed})
    _check_together(read)
    return read, kept


def authenticates(config: Config) -> bool:
    """Whether TCP clients can show who they are."""
    return bool(config.auth.tokens_file or config.http.tls.client_ca_file)


def exposed(config: Config) -> list[str]:
    """The addresses that may be reached from other machines."""
    return [address for address in config.http.listen if not _is_loopback(address)]


def _check_access(config: Config) -> None:
    tls = config.http.tls
    for key in ("key_file", "client_ca_file"):
        if getattr(tls, key) and not tls.certificate_file:
            raise ConfigError(f"http.tls.{key}: must go with http.tls.certificate_file")
    addresses = exposed(config)
    if addresses and not authenticates(config) and not config.http.anonymous:
        raise ConfigError(
            f"http.listen: {addresses[0]} is not loopback and uploads are not authenticated; set"
            " auth.tokens_file or http.tls.client_ca_file, or http.anonymous = true if the network"
            " alone decides who may upload"
        )


def _is_loopback(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    return is_loopback_host(address.rpartition(":")[0].strip("[]"))


def is_loopback_host(host: str) -> bool:
    """Whether a host's name or address, without brackets, certainly means this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        # Any other name is whatever a resolver says, today.
        return host.lower() == "localhost"
