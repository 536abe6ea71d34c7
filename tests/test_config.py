"""Configuration: the contract's keys and defaults, and one line about whatever is wrong."""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pika
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config import (
    AdminConfig,
    AmqpConfig,
    AuthConfig,
    Config,
    ConfigError,
    HttpConfig,
    LogConfig,
    QueueConfig,
    RouteConfig,
    TlsConfig,
    from_document,
    keep_fixed,
    load,
)
from relay.values import CLIENT_MAX, parse_address, parse_amqp_url, parse_duration, parse_size

CONTRACT = """
[http]
listen = ["127.0.0.1:8480"]        # host:port or unix:PATH; sockets from systemd take their place
anonymous = false                  # must be true to listen beyond loopback without authentication
max_connections = 1024
max_uploads = 256
max_uploads_per_client = 0         # 0: no limit of its own
max_header_bytes = "16 KiB"
max_headers = 100
header_timeout = "10 s"            # the whole request head
body_idle_timeout = "30 s"         # runs only while the daemon is reading
min_body_rate = "1 KiB"            # per second, after the grace; likewise
min_body_rate_grace = "10 s"
max_client_rate = 0                # bytes per second of one client, in all its uploads
keep_alive_timeout = "60 s"
keep_alive_requests = 1000
drain_timeout = "30 s"
receipt_parts = 100

[http.tls]                         # absent: plain HTTP
certificate_file = ""
key_file = ""
client_ca_file = ""                # present: client certificates required

[auth]
tokens_file = ""                   # lines "name: hash"

[amqp]
urls = ["amqp://guest:guest@127.0.0.1:5672/%2f"]
password_file = ""                 # replaces the password in urls
ca_file = ""
certificate_file = ""
key_file = ""
connections = 1
window = "64 MiB"                  # unconfirmed bytes, the whole process
upload_window = "8 MiB"            # unconfirmed bytes, one upload
heartbeat = "30 s"
reconnect_grace = "30 s"
blocked_grace = "30 s"
confirm_timeout = "60 s"

[admin]
listen = "127.0.0.1:8481"          # "" turns it off

[log]
level = "info"
format = "auto"                    # journald fields under systemd, logfmt on a terminal, or "json"

[routes.NAME]                      # "default" exists by itself
exchange = ""
routing_key = "uploads"
mandatory = true
persistent = true
frame_size = 131064
digests = []                       # besides crc32c
max_bytes = 0                      # 0: no limit
max_part_bytes = 0
max_parts = 1000
max_part_header_bytes = "8 KiB"
clients = []                       # empty: every authenticated client

[routes.NAME.queue]                # declared at start if present
name = "uploads"
type = "quorum"
arguments = { x-overflow = "reject-publish", x-single-active-consumer = true }
"""
"""The contract's table of keys, word for word."""


def paths(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of nested tables with its dotted path; arguments are a value."""
    for key, value in table.items():
        path = f"{where}{key}"
        if isinstance(value, dict) and key != "arguments":
            yield from paths(value, f"{path}.")
        else:
            yield path, value


def document(path: str, value: object) -> dict[str, Any]:
    """A document in which only the key at ``path`` is given."""
    result: dict[str, Any] = {}
    *tables, key = path.split(".")
    table = result
    for name in tables:
        table = table.setdefault(name, {})
    table[key] = value
    return result


KEYS = dict(paths(tomllib.loads(CONTRACT)))


def reason(document: dict[str, Any]) -> str:
    """What is wrong with a document."""
    with pytest.raises(ConfigError) as caught:
        from_document(document)
    text = str(caught.value)
    assert "\n" not in text
    return text


def value_at(config: Config, path: str) -> object:
    value: Any = config
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


# --- the contract's keys -----------------------------------------------------------------------


@pytest.mark.parametrize("path", KEYS)
def test_each_key_has_the_default_of_the_contract(path: str) -> None:
    given = from_document(document(path, KEYS[path]))
    if path.startswith("routes"):
        # As far as a route of one's own has defaults, they are those of the default route.
        default = Config().routes["default"]
        if ".queue." not in path:
            assert value_at(given, path) == getattr(default, path.rpartition(".")[2])
        assert default.queue == QueueConfig()
        assert value_at(given, path) == value_at(
            from_document({"routes": {"NAME": {"queue": {}}}}), path
        )
    else:
        assert given == Config()


def test_there_is_no_key_that_the_contract_does_not_have() -> None:
    sections = {
        "http": HttpConfig,
        "http.tls": TlsConfig,
        "auth": AuthConfig,
        "amqp": AmqpConfig,
        "admin": AdminConfig,
        "log": LogConfig,
        "routes.NAME": RouteConfig,
        "routes.NAME.queue": QueueConfig,
    }
    ours = {
        f"{section}.{field.name}"
        for section, slice_ in sections.items()
        for field in fields(slice_)
        if "parse" in field.metadata
    }
    assert ours == KEYS.keys()


def test_every_slice_can_be_made_without_any_argument_but_a_routes_name() -> None:
    for slice_ in (
        HttpConfig,
        TlsConfig,
        AuthConfig,
        AmqpConfig,
        AdminConfig,
        LogConfig,
        QueueConfig,
        RouteConfig,
    ):
        missing = [
            field.name
            for field in fields(slice_)
            if field.default is MISSING and field.default_factory is MISSING
        ]
        assert missing == (["name"] if slice_ is RouteConfig else [])


CHANGED: dict[str, tuple[object, object]] = {
    "http.listen": (["[::1]:80", "unix:/run/x"], ("[::1]:80", "unix:/run/x")),
    "http.anonymous": (True, True),
    "http.max_connections": (1, 1),
    "http.max_uploads": (2, 2),
    "http.max_uploads_per_client": (2, 2),
    "http.max_header_bytes": ("1 KiB", 1024),
    "http.max_headers": (3, 3),
    "http.header_timeout": ("1.5 s", 1.5),
    "http.body_idle_timeout": (2, 2.0),
    "http.min_body_rate": (0, 0),
    "http.min_body_rate_grace": ("0 s", 0.0),
    "http.max_client_rate": ("10 MiB", 10 << 20),
    "http.keep_alive_timeout": ("1 min", 60.0),
    "http.keep_alive_requests": (1, 1),
    "http.drain_timeout": (0, 0.0),
    "http.receipt_parts": (0, 0),
    "amqp.urls": (["amqp://a", "amqp://b:1/x"], ("amqp://a", "amqp://b:1/x")),
    "amqp.connections": (3, 3),
    "amqp.window": ("1 GiB", 1 << 30),
    "amqp.upload_window": ("1 MiB", 1 << 20),
    "amqp.heartbeat": ("0 s", 0.0),
    "amqp.reconnect_grace": ("0 s", 0.0),
    "amqp.blocked_grace": ("1 h", 3600.0),
    "amqp.confirm_timeout": ("100 ms", 0.1),
    "admin.listen": ("", ""),
    "log.level": ("debug", "debug"),
    "log.format": ("json", "json"),
    "routes.NAME.exchange": ("ex", "ex"),
    "routes.NAME.routing_key": ("{route}.{transfer}", "{route}.{transfer}"),
    "routes.NAME.mandatory": (False, False),
    "routes.NAME.persistent": (False, False),
    "routes.NAME.frame_size": ("64 KiB", 65536),
    "routes.NAME.digests": (["sha-256", "sha-512"], ("sha-256", "sha-512")),
    "routes.NAME.max_bytes": ("1 TiB", 1 << 40),
    "routes.NAME.max_part_bytes": (5, 5),
    "routes.NAME.max_parts": (1, 1),
    "routes.NAME.max_part_header_bytes": (100, 100),
    "routes.NAME.clients": (["me", "uid:0"], ("me", "uid:0")),
    "routes.NAME.queue.name": ("q", "q"),
    "routes.NAME.queue.type": ("stream", "stream"),
    "routes.NAME.queue.arguments": ({"a": 1, "b": "c", "d": True}, {"a": 1, "b": "c", "d": True}),
}


@pytest.mark.parametrize("path", [path for path in KEYS if not path.endswith("_file")])
def test_each_key_is_understood(path: str) -> None:
    written, expected = CHANGED[path]
    value = value_at(from_document(document(path, written)), path)
    assert value == expected
    assert type(value) is type(expected)


# --- what is wrong with it ---------------------------------------------------------------------

WRONG_OF_KIND: dict[str, list[object]] = {
    "flag": [None, "true", 0, 1, [], {}],
    "integer": [None, True, -1, 1.5, "1", [], {}, 10**30],
    "size": [None, True, -1, 1.5, "", "x", [], {}],
    "duration": [None, True, -1, "", "x", [], {}, float("nan"), 10**30, 10**400],
    "choice": [None, True, 1, "", "x", [], {}],
    "text": [None, True, 1, 1.5, [], {}, "\0", "a\0b"],
    "list": [None, True, 1, "x", {}, [1], [[]], ["\0"]],
    "table": [None, True, 1, "x", [], {"a": []}, {"a": 1.5}, {"a": {}}],
}


def kind_of(path: str) -> str:
    """The kind of a key's values, from how the contract writes its default."""
    default = KEYS[path]
    if path in {"log.level", "log.format", "routes.NAME.queue.type"}:
        return "choice"
    if path.endswith(("_bytes", "frame_size", "_rate")) or str(default).endswith("iB"):
        return "size"
    if str(default).endswith(" s"):
        return "duration"
    kinds = ((bool, "flag"), (int, "integer"), (str, "text"), (list, "list"), (dict, "table"))
    return next(kind for type_, kind in kinds if isinstance(default, type_))


@pytest.mark.parametrize("path", KEYS)
def test_a_value_of_the_wrong_type_is_an_error_that_names_the_key(path: str) -> None:
    for value in WRONG_OF_KIND[kind_of(path)]:
        assert reason(document(path, value)).startswith(f"{path}: must "), value


WRONG: list[tuple[str, object, str]] = [
    ("http.listen", [], "http.listen: must name at least one address"),
    ("http.listen", "127.0.0.1:1", "http.listen: must be a list"),
    ("http.listen", ["127.0.0.1"], "http.listen: must be host:port, [v6]:port or unix:PATH"),
    ("http.listen", ["::1:80"], "http.listen: must be [v6]:port, such as [::1]:8480"),
    ("http.listen", ["unix:"], "http.listen: must be unix: and a path"),
    ("http.max_uploads", 0, "http.max_uploads: must be an integer between 1 and 2147483647"),
    ("http.max_headers", 2**31, "http.max_headers: must be an integer between 1 and 2147483647"),
    ("http.header_timeout", 0, "http.header_timeout: must be a duration above 0"),
    ("http.header_timeout", -1, "http.header_timeout: must be between 0 s and a year"),
    ("http.drain_timeout", "2 d", 'http.drain_timeout: must be seconds or text such as "30 s"'),
    ("http.max_header_bytes", 0, "http.max_header_bytes: must be a size above 0"),
    ("http.min_body_rate", -1, "http.min_body_rate: must be 0 bytes or more"),
    ("amqp.urls", [], "amqp.urls: must name at least one broker"),
    (
        "amqp.urls",
        ["amqp://h", "http://h"],
        "amqp.urls: must be amqp://user:password@host:port/vhost, or amqps",
    ),
    ("amqp.window", "64 MB", 'amqp.window: must be bytes or text such as "64 MiB"'),
    ("amqp.heartbeat", "0.4 s", "amqp.heartbeat: must be 0 for none, or 1 s to 65535 s"),
    ("amqp.heartbeat", "20 h", "amqp.heartbeat: must be 0 for none, or 1 s to 65535 s"),
    ("amqp.confirm_timeout", "0 s", "amqp.confirm_timeout: must be a duration above 0"),
    ("log.level", "INFO", "log.level: must be one of debug, info, warning, error"),
    ("log.format", "xml", "log.format: must be one of auto, logfmt, json"),
    ("routes.a.digests", ["md5"], "routes.a.digests: must be one of crc32c, sha-256, sha-512"),
    ("routes.a.exchange", "x" * 256, "routes.a.exchange: must be at most 255 bytes of text"),
    ("routes.a.exchange", "ä" * 128, "routes.a.exchange: must be at most 255 bytes of text"),
    ("routes.a.frame_size", 4095, "routes.a.frame_size: must be 4096 to 16777216 bytes"),
    ("routes.a.frame_size", 2**24 + 1, "routes.a.frame_size: must be 4096 to 16777216 bytes"),
    (
        "routes.a.frame_size",
        "9 MiB",
        "routes.a.frame_size: must not be above amqp.upload_window",
    ),
    ("routes.a.max_parts", 0, "routes.a.max_parts: must be an integer between 1 and 2147483647"),
    (
        "routes.a.queue.type",
        "mirrored",
        "routes.a.queue.type: must be one of quorum, classic, stream",
    ),
    ("routes.a.queue.name", "", "routes.a.queue.name: must be a name"),
    ("routes.a.queue", 5, "routes.a.queue: must be a table, [routes.a.queue]"),
    ("routes.a", 5, "routes.a: must be a table, [routes.a]"),
    ("routes", 5, "routes: must be a table, [routes]"),
    ("http", [], "http: must be a table, [http]"),
    (
        "routes.a.queue.arguments",
        {"x-max-length": 1.5},
        "routes.a.queue.arguments: must be a table of text, 64-bit integers and booleans",
    ),
    (
        "routes.a.queue.arguments",
        {"x-max-length": 2**63},
        "routes.a.queue.arguments: must be a table of text, 64-bit integers and booleans",
    ),
    (
        "routes.a.queue.arguments",
        {"x" * 256: 1},
        "routes.a.queue.arguments: must be at most 255 bytes of text",
    ),
    ("http.colour", 1, "http.colour: unknown key"),
    ("routes.a.colour", 1, "routes.a.colour: unknown key"),
    ("routes.a.name", "b", "routes.a.name: unknown key"),
    ("routes.a.queue.colour", 1, "routes.a.queue.colour: unknown key"),
    ("colour", 1, "colour: unknown section"),
    (
        "amqp.upload_window",
        "65 MiB",
        "amqp.upload_window: must not be above amqp.window / amqp.connections",
    ),
    (
        "amqp.upload_window",
        "4 KiB",
        "routes.default.frame_size: must not be above amqp.upload_window",
    ),
]


@pytest.mark.parametrize(("path", "value", "text"), WRONG)
def test_an_error_names_the_key_and_the_reason(path: str, value: object, text: str) -> None:
    assert reason(document(path, value)) == text


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a\nb", "x" * 65])
def test_a_route_that_no_path_can_name_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="a route's name is 1 to 64"):
        from_document({"routes": {name: {}}})


@pytest.mark.parametrize("size", [4096, 131064, 8 * 2**20])
def test_frames_may_be_as_small_and_as_large_as_the_contract_says(size: int) -> None:
    config = from_document({"routes": {"a": {"frame_size": size}}})
    assert config.routes["a"].frame_size == size
    amqp = {"window": "64 MiB", "upload_window": "16 MiB"}
    routes = {"a": {"frame_size": "16 MiB"}}
    from_document({"amqp": amqp, "routes": routes})
    # A frame that does not fit beside what is kept for other routes would wait for ever.
    with pytest.raises(ConfigError, match=r"a\.frame_size: must not be above 7/8 of amqp\.window"):
        from_document({"amqp": amqp | {"window": "18 MiB"}, "routes": routes})


# --- what no single key can tell ---------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:80",
        "127.9.9.9:80",
        "[::1]:80",
        "[0:0:0:0:0:0:0:1]:80",
        "localhost:80",
        "LocalHost:80",
        "unix:/run/relay.sock",
    ],
)
def test_loopback_needs_no_permission_for_anonymous_uploads(address: str) -> None:
    from_document({"http": {"listen": [address]}})


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:80",
        "[::]:80",
        "192.0.2.1:80",
        "relay.example:80",
        "127.relay.example:80",
        "localhost.relay.example:80",
    ],
)
def test_anything_else_does(address: str) -> None:
    listen = ["127.0.0.1:80", address]
    text = reason({"http": {"listen": listen}})
    assert text.startswith(f"http.listen: {address} is not loopback")
    from_document({"http": {"listen": listen, "anonymous": True}})
    from_document({"http": {"listen": listen}, "auth": {"tokens_file": "t"}})
    tls = {"certificate_file": "c"}
    assert reason({"http": {"listen": listen, "tls": tls}}) == text
    from_document({"http": {"listen": listen, "tls": {**tls, "client_ca_file": "ca"}}})


@pytest.mark.parametrize("key", ["key_file", "client_ca_file"])
def test_nothing_of_tls_goes_without_a_certificate(key: str) -> None:
    """A server that is to know its clients must not fall back to plain HTTP."""
    text = reason({"http": {"tls": {key: "x"}}})
    assert text == f"http.tls.{key}: must go with http.tls.certificate_file"
    from_document({"http": {"tls": {key: "x", "certificate_file": "y"}}})


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a", True),
        ("spiffe://example.org/uploader", True),
        ("Zoë O'Hara <z@example.org>", True),
        ("x" * CLIENT_MAX, True),
        ("x" * (CLIENT_MAX + 1), False),
        ("é" * 65, False),
        ("", False),
        (" a", False),
        ("a\n", False),
        ("a\u202eb", False),
        ("a\u00a0b", False),
    ],
)
def test_what_a_client_can_be_called(name: str, is_one: bool) -> None:
    clients = {"routes": {"a": {"clients": [name]}}}
    if is_one:
        assert from_document(clients).routes["a"].clients == (name,)
    else:
        assert reason(clients).startswith("routes.a.clients: must be 1 to 128 bytes of printable")


def test_a_routing_key_must_fit_whoever_uploads() -> None:
    route = {"routing_key": "{transfer}.{client}." + "x" * (255 - 36 - 1 - CLIENT_MAX - 1)}
    from_document({"routes": {"a": route}})
    route["routing_key"] += "x"
    assert reason({"routes": {"a": route}}) == "routes.a.routing_key: must be at most 255 bytes"


def test_a_routing_key_must_fit_once_it_is_filled_in() -> None:
    route = {"routing_key": "{transfer}." + "x" * 218}
    from_document({"routes": {"a": route}})
    route["routing_key"] += "x"
    assert reason({"routes": {"a": route}}) == "routes.a.routing_key: must be at most 255 bytes"


@pytest.mark.parametrize("key", ["", "a.b", "{{}}", "{transfer}", "{client}", "a{route}b{{x}}"])
def test_routing_keys_may_use_what_is_known_of_a_transfer(key: str) -> None:
    config = from_document({"routes": {"a": {"routing_key": key}}})
    config.routes["a"].routing_key.format(transfer="t", route="r", client="c")


@pytest.mark.parametrize(
    "key", ["{", "}", "{}", "{0}", "{x}", "{route!r}", "{route:>9}", "{route.x}", "{{route}"]
)
def test_routing_keys_may_use_nothing_else(key: str) -> None:
    assert reason({"routes": {"a": {"routing_key": key}}}) == (
        "routes.a.routing_key: must be text with {transfer}, {route} and {client},"
        " and other braces doubled"
    )


# --- routes ------------------------------------------------------------------------------------


def test_the_default_route_exists_without_any_configuration() -> None:
    for config in (Config(), load(), from_document({}), from_document({"routes": {"a": {}}})):
        route = config.routes["default"]
        assert (route.exchange, route.routing_key) == ("", "uploads")
        assert route.queue == QueueConfig(
            name="uploads",
            type="quorum",
            arguments={"x-overflow": "reject-publish", "x-single-active-consumer": True},
        )


def test_the_default_route_can_be_changed_in_part_and_keeps_its_queue() -> None:
    route = from_document({"routes": {"default": {"max_parts": 5}}}).routes["default"]
    assert route.max_parts == 5
    assert route.queue == QueueConfig()


@pytest.mark.parametrize("key", ["exchange", "routing_key"])
def test_a_default_route_sent_elsewhere_does_not_declare_a_queue_that_it_does_not_use(
    key: str,
) -> None:
    assert from_document({"routes": {"default": {key: "x"}}}).routes["default"].queue is None


def test_a_queue_is_declared_only_where_one_is_asked_for() -> None:
    routes = {"a": {}, "b": {"queue": {}}, "c": {"exchange": "x", "queue": {"name": "q"}}}
    config = from_document({"routes": routes})
    assert config.routes["a"].queue is None
    assert config.routes["b"].queue == QueueConfig()
    assert config.routes["c"].queue == QueueConfig(name="q")
    assert {name: route.name for name, route in config.routes.items()} == {
        name: name for name in ("default", "a", "b", "c")
    }


# --- single values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 0),
        (131064, 131064),
        ("0", 0),
        ("512", 512),
        ("512 B", 512),
        ("64KiB", 65536),
        ("64 KiB", 65536),
        (" 64 MiB ", 64 << 20),
        ("1 GiB", 1 << 30),
        ("1 TiB", 1 << 40),
    ],
)
def test_sizes(value: object, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize(
    "value",
    [
        -1,
        1.0,
        True,
        None,
        "",
        "x",
        "1 kB",
        "1 KB",
        "1 kib",
        "1.5 MiB",
        "-1",
        "1 MiB x",
        "٣",
        "9" * 19,
    ],
)
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match=r"bytes or|0 bytes"):
        parse_size(value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        ("30", 30.0),
        ("30 s", 30.0),
        ("30s", 30.0),
        ("1.5 s", 1.5),
        ("250 ms", 0.25),
        ("2 min", 120.0),
        ("1 h", 3600.0),
        ("8784 h", 366 * 86400.0),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)
    assert type(parse_duration(value)) is float


@pytest.mark.parametrize(
    "value",
    [
        -1,
        True,
        None,
        "",
        "x",
        "1 d",
        "1 m",
        "-1 s",
        "1e3 s",
        ".5 s",
        "1. s",
        "8785 h",
        float("nan"),
        float("inf"),
        10**400,
        "9" * 400,
    ],
)
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match=r"seconds or|between"):
        parse_duration(value)


@pytest.mark.parametrize(
    "value", ["h:0", "127.0.0.1:65535", "[::1]:1", "*:1", "unix:x", "unix:/run/a:b"]
)
def test_addresses(value: str) -> None:
    assert parse_address(value) == value


@pytest.mark.parametrize(
    "value",
    ["", ":", ":80", "h", "h:", "h:x", "h:-1", "h:65536", "h:٣", "::1", "[::1]", "[::1", 80],
)
def test_what_is_no_address(value: object) -> None:
    with pytest.raises(ValueError, match=r"port|text"):
        parse_address(value)


@pytest.mark.parametrize(
    "value",
    [
        "amqp://h",
        "amqp://h/",
        "amqp://h:1/%2f",
        "amqp://user:pass%40word@h:5672/v%2fh",
        "amqp://[::1]:5672/",
        "AMQP://h",
        "amqps://h",
    ],
)
def test_amqp_urls(value: str) -> None:
    assert parse_amqp_url(value) == value
    pika.URLParameters(value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "h",
        "amqp:h",
        "amqp://",
        "amqp://:5672",
        "http://h",
        "amqp://h:0",
        "amqp://h:99999",
        "amqp://h:x",
        "amqp://[::1",
        "amqp://a..b",
        f"amqp://{'x' * 64}",
        # pika would take its own options from there, or raise in the middle of things.
        "amqp://h/?heartbeat=x",
        "amqp://h/?heartbeat=1",
        "amqp://h/?colour=1",
        "amqp://h/#x",
        5,
    ],
)
def test_what_is_no_amqp_url(value: object) -> None:
    with pytest.raises(ValueError, match="amqp://user"):
        parse_amqp_url(value)


# --- files and flags ---------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "relay.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_a_file_is_read(write: Callable[[str], Path]) -> None:
    config = load(write('[http]\nmax_uploads = 7\n[routes.a]\nexchange = "x"\n'))
    assert config.http.max_uploads == 7
    assert config.routes["a"].exchange == "x"


def test_flags_override_the_file(write: Callable[[str], Path]) -> None:
    path = write(
        '[http]\nlisten = ["127.0.0.1:1"]\nmax_uploads = 7\n'
        '[amqp]\nurls = ["amqp://file"]\n[admin]\nlisten = "127.0.0.1:2"\n'
    )
    config = load(
        path, listen=["127.0.0.1:3", "unix:x"], amqp=["amqp://a", "amqp://b"], admin="127.0.0.1:4"
    )
    assert config.http.listen == ("127.0.0.1:3", "unix:x")
    assert config.http.max_uploads == 7
    assert config.amqp.urls == ("amqp://a", "amqp://b")
    assert config.admin.listen == "127.0.0.1:4"
    assert load(path, admin="").admin.listen == ""
    unchanged = load(path, listen=None, amqp=None, admin=None)
    assert unchanged.http.listen == ("127.0.0.1:1",)
    assert unchanged.amqp.urls == ("amqp://file",)


def test_flags_are_checked_as_the_file_is(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"^amqp\.urls: must be amqp://"):
        load(amqp=["nonsense"])
    with pytest.raises(ConfigError, match=r"^admin\.listen: must be host:port"):
        load(admin="nonsense")
    with pytest.raises(ConfigError, match=r"^http\.listen: 0\.0\.0\.0:80 is not loopback"):
        load(listen=["0.0.0.0:80"])
    load(write("[http]\nanonymous = true\n"), listen=["0.0.0.0:80"])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[http]\ncolour = 1\n", "http.colour: unknown key"),
        (b"[http\n", "cannot be read: "),
        (b"a = 1\na = 2\n", "cannot be read: "),
        (b"\xff", "cannot be read: "),
        (b'"a\\nb" = 1\n', "a b: unknown section"),
        (b'[http]\n"a\\u2028b\\u0000" = 1\n', "http.a b : unknown key"),
    ],
)
def test_an_error_is_one_line_that_names_the_file(
    content: bytes, text: str, write: Callable[[bytes], Path]
) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {text}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://user:old@h:5672/v", "amqp://user:p%40ss%2F%3A%20w@h:5672/v"),
        ("amqp://user@h", "amqp://user:p%40ss%2F%3A%20w@h"),
        ("amqp://h/%2f", "amqp://guest:p%40ss%2F%3A%20w@h/%2f"),
        ("amqp://us%40er:old@[::1]:1", "amqp://us%40er:p%40ss%2F%3A%20w@[::1]:1"),
    ],
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_password_from_a_file_replaces_the_ones_in_urls(
    url: str, expected: str, end: str, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(f"p@ss/: w{end}")
    amqp = {"urls": [url, url], "password_file": str(tmp_path / "password")}
    config = from_document({"amqp": amqp})
    assert config.amqp.urls == (expected, expected)
    credentials = pika.URLParameters(config.amqp.urls[0]).credentials
    assert isinstance(credentials, pika.PlainCredentials)
    assert credentials.password == "p@ss/: w"


def test_a_password_file_that_cannot_be_read_is_an_error_that_does_not_quote_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "password"
    text = reason(document("amqp.password_file", str(path)))
    assert text == "amqp.password_file: cannot be read: No such file or directory"
    path.write_bytes(b"secret\xff")
    text = reason(document("amqp.password_file", str(path)))
    assert text == "amqp.password_file: cannot be read: is not UTF-8"


# --- the invariant -----------------------------------------------------------------------------

VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["64 MiB", "30 s", "127.0.0.1:0", "amqp://h", "{route}", "quorum", "unix:x", "sha-256"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
KEY_NAMES = st.sampled_from(sorted(KEYS)) | st.text(max_size=8)


@settings(max_examples=300)
@given(st.lists(st.tuples(KEY_NAMES, VALUES), max_size=4))
def test_any_document_is_a_configuration_or_one_line(keys: list[tuple[str, object]]) -> None:
    merged: dict[str, Any] = {}
    for path, value in keys:
        if path == "amqp.password_file":
            continue
        *tables, key = path.split(".")
        table = merged
        for name in tables:
            child = table.setdefault(name, {})
            if not isinstance(child, dict):
                child = table[name] = {}
            table = child
        table[key] = value
    error = None
    try:
        config = from_document(merged)
    except ConfigError as exc:
        error = str(exc)
    if error is not None:
        assert re.search(": (must|unknown|a route's|.* is not loopback)", error)
        return
    assert set(config.routes) >= {"default"}
    for route in config.routes.values():
        route.routing_key.format(transfer="", route=route.name, client="")


def test_a_stream_has_no_arguments_by_default() -> None:
    """RabbitMQ refuses to declare a stream with those of the other types."""
    given = from_document({"routes": {"r": {"queue": {"type": "stream"}}}})
    queue = given.routes["r"].queue
    assert queue is not None
    assert queue.arguments == {}


# --- what a running daemon takes over -------------------------------------------------------------


def test_what_needs_a_restart_stays_and_is_named() -> None:
    running = from_document({})
    read = from_document(
        {
            "http": {"listen": ["127.0.0.1:1"], "max_connections": 9, "max_uploads": 9},
            "amqp": {"connections": 2, "window": "128 MiB", "heartbeat": 9},
            "admin": {"listen": ""},
            "log": {"level": "debug"},
        }
    )
    config, kept = keep_fixed(running, read)
    assert kept == [
        *("http.listen", "http.max_connections"),
        *("amqp.connections", "amqp.window", "admin.listen"),
    ]
    assert config.http == replace(running.http, max_uploads=9)
    assert config.amqp == replace(running.amqp, heartbeat=9.0)
    assert config.admin == running.admin
    assert config.log.level == "debug"


def test_what_does_not_go_with_what_stays_is_refused() -> None:
    running = from_document({"http": {"listen": ["0.0.0.0:1"], "anonymous": True}})
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:1 is not loopback and uploads are not"):
        keep_fixed(running, from_document({}))
    with pytest.raises(ConfigError, match=r"upload_window: must not be above"):
        keep_fixed(
            from_document({"amqp": {"window": "8 MiB"}}),
            from_document({"amqp": {"upload_window": "9 MiB"}}),
        )
