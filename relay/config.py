"""Configuration: TOML and flags in, frozen and validated slices out.

Every key has a default, so that no file is needed. Each module of relay gets the slice it needs
and no more. Unknown keys are errors, and so is every value out of range: a daemon that starts
understood its whole configuration. This module knows no other of relay but ``values``.

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

from relay import values
from relay.values import CLIENT_MAX, SHORT_TEXT_MAX

Slice = TypeVar("Slice")

FRAME_SIZE_MIN: Final = 4096
FRAME_SIZE_MAX: Final = 16 * 1024 * 1024
"""RabbitMQ 4's default limit on a message's size (``max_message_size``)."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class ConfigError(ValueError):
    """The configuration cannot be used. One line: which key, and why."""


def _key(default: Any, parse: Callable[[object], Any]) -> Any:
    """A configuration key with its default (as a file would say it) and its parser."""
    return field(default=parse(default), metadata={"parse": parse})


# --- the slices --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """TLS on the upload listener's TCP sockets; ``[http.tls]``. Without a certificate: none."""

    certificate_file: str = _key("", values.any_text)
    key_file: str = _key("", values.any_text)
    client_ca_file: str = _key("", values.any_text)


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The upload listener; ``[http]``. Timeouts in seconds, sizes in bytes."""

    listen: tuple[str, ...] = _key(["127.0.0.1:8480"], values.list_of(values.parse_address))
    anonymous: bool = _key(False, values.flag)
    max_connections: int = _key(1024, values.integer(1))
    max_uploads: int = _key(256, values.integer(1))
    max_uploads_per_client: int = _key(0, values.integer(0))
    max_header_bytes: int = _key("16 KiB", values.positive_size)
    max_headers: int = _key(100, values.integer(1))
    header_timeout: float = _key("10 s", values.positive_duration)
    body_idle_timeout: float = _key("30 s", values.positive_duration)
    min_body_rate: int = _key("1 KiB", values.parse_size)
    min_body_rate_grace: float = _key("10 s", values.parse_duration)
    max_client_rate: int = _key(0, values.parse_size)
    keep_alive_timeout: float = _key("60 s", values.positive_duration)
    keep_alive_requests: int = _key(1000, values.integer(1))
    drain_timeout: float = _key("30 s", values.parse_duration)
    receipt_parts: int = _key(100, values.integer(0))
    tls: TlsConfig = field(default_factory=TlsConfig)


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """Who clients are, beside what ``[http.tls]`` tells; ``[auth]``."""

    tokens_file: str = _key("", values.any_text)


@dataclass(frozen=True, kw_only=True)
class AmqpConfig:
    """The broker; ``[amqp]``. Windows are bytes published and not yet confirmed."""

    urls: tuple[str, ...] = _key(
        ["amqp://guest:guest@127.0.0.1:5672/%2f"], values.list_of(values.parse_amqp_url)
    )
    password_file: str = _key("", values.any_text)
    ca_file: str = _key("", values.any_text)
    certificate_file: str = _key("", values.any_text)
    key_file: str = _key("", values.any_text)
    connections: int = _key(1, values.integer(1, 64))
    window: int = _key("64 MiB", values.positive_size)
    upload_window: int = _key("8 MiB", values.positive_size)
    heartbeat: float = _key("30 s", values.heartbeat)
    reconnect_grace: float = _key("30 s", values.parse_duration)
    blocked_grace: float = _key("30 s", values.parse_duration)
    confirm_timeout: float = _key("60 s", values.positive_duration)


@dataclass(frozen=True, kw_only=True)
class AdminConfig:
    """The admin listener; ``[admin]``. An empty address turns it off."""

    listen: str = _key("127.0.0.1:8481", values.admin_address)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """``[log]``. ``auto`` is logfmt, with syslog levels where journald reads them."""

    level: str = _key("info", values.one_of("debug", "info", "warning", "error"))
    format: str = _key("auto", values.one_of("auto", "logfmt", "json"))


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """A queue to declare, durable, when the daemon connects; ``[routes.NAME.queue]``."""

    name: str = _key("uploads", values.name)
    type: str = _key("quorum", values.one_of("quorum", "classic", "stream"))
    arguments: Mapping[str, str | int | bool] = field(
        default_factory=lambda: {"x-overflow": "reject-publish", "x-single-active-consumer": True},
        metadata={"parse": values.arguments},
    )


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """Where transfers go; ``[routes.NAME]``. 0 means no limit."""

    name: str
    exchange: str = _key("", values.short_text)
    routing_key: str = _key("uploads", values.routing_key)
    mandatory: bool = _key(True, values.flag)
    persistent: bool = _key(True, values.flag)
    frame_size: int = _key(131064, values.parse_size)
    digests: tuple[str, ...] = _key(
        [], values.list_of(values.one_of("crc32c", "sha-256", "sha-512"))
    )
    max_bytes: int = _key(0, values.parse_size)
    max_part_bytes: int = _key(0, values.parse_size)
    max_parts: int = _key(1000, values.integer(1))
    max_part_header_bytes: int = _key("8 KiB", values.positive_size)
    clients: tuple[str, ...] = _key([], values.list_of(values.client))
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
    changed = {}
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"{where}.{key}: unknown key")
        try:
            changed[key] = known[key].metadata["parse"](value)
        except ValueError as exc:
            raise ConfigError(f"{where}.{key}: must be {exc}") from exc
    return replace(defaults, **changed)  # type: ignore[type-var]


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
        if route.frame_size > config.amqp.window // config.amqp.connections * 7 // 8:
            # What is kept for the other routes (broker/window.py) must leave room for it.
            raise ConfigError(
                f"routes.{name}.frame_size: must not be above 7/8 of amqp.window / amqp.connections"
            )
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
