"""What ``relay check`` prints: lines for people, and a configuration that loads again."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.broker.routes import Finding, Severity
from relay.check import effective, summary
from relay.cli import main
from relay.config import (
    AmqpConfig,
    AuthConfig,
    Config,
    HttpConfig,
    QueueConfig,
    RouteConfig,
    TlsConfig,
    load,
)
from relay.values import is_client_name

NO_PASSWORD = AmqpConfig(urls=("amqp://broker",))

texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=60)
argument_values = texts | st.booleans() | st.integers(-(2**63), 2**63 - 1)
queues = st.builds(
    QueueConfig,
    name=texts.filter(bool),
    type=st.sampled_from(["quorum", "classic", "stream"]),
    arguments=st.dictionaries(texts, argument_values, max_size=4),
)
route_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@st.composite
def routes(draw: st.DrawFn) -> dict[str, RouteConfig]:
    made = {
        name: RouteConfig(
            name=name,
            exchange=draw(texts),
            routing_key=draw(st.sampled_from(["", "uploads", "a.{transfer}.ü\x7f", "{{}}"])),
            mandatory=draw(st.booleans()),
            frame_size=draw(st.integers(4096, 8 * 1024 * 1024)),
            digests=tuple(draw(st.lists(st.sampled_from(["crc32c", "sha-256"]), max_size=2))),
            max_bytes=draw(st.integers(0, 2**50)),
            clients=tuple(draw(st.lists(texts.filter(is_client_name), max_size=2))),
            queue=draw(st.none() | queues),
        )
        for name in draw(st.lists(route_names, max_size=3, unique=True))
    }
    return {"default": Config().routes["default"]} | made


@given(
    routes=routes(),
    grace=st.floats(0, 366 * 86400),
    window=st.integers(16 * 1024 * 1024, 2**50),
    header_bytes=st.integers(1, 2**40),
)
def test_any_configuration_that_is_shown_loads_as_the_same(
    routes: dict[str, RouteConfig],
    grace: float,
    window: int,
    header_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = Config(
        http=HttpConfig(
            max_header_bytes=header_bytes,
            min_body_rate_grace=grace,
            tls=TlsConfig(certificate_file="c.pem", client_ca_file="ca.pem"),
        ),
        auth=AuthConfig(tokens_file="tokens"),
        amqp=replace(NO_PASSWORD, reconnect_grace=grace, window=window),
        routes=routes,
    )
    path = tmp_path_factory.getbasetemp() / "shown.toml"
    path.write_text(effective(config), encoding="utf-8")
    assert load(path) == config


def test_shown_values_have_the_units_that_people_write() -> None:
    shown = effective(Config())
    assert 'window = "64 MiB"' in shown
    assert 'reconnect_grace = "30 s"' in shown
    assert "frame_size = 131064" in shown
    assert "max_connections = 1024" in shown


def test_no_password_is_shown_and_the_rest_of_the_url_is() -> None:
    urls = ("amqp://me:se@cret@one:5671/v", "amqp://you@two", "amqp://:secret@three/%2f")
    shown = effective(Config(amqp=AmqpConfig(urls=urls)))
    assert tomllib.loads(shown)["amqp"]["urls"] == [
        "amqp://me:***@one:5671/v",
        "amqp://you@two",
        "amqp://:***@three/%2f",
    ]
    assert "cret" not in shown


def test_with_a_password_file_the_shown_configuration_is_the_same_in_effect(
    tmp_path: Path,
) -> None:
    secret, first, second = (tmp_path / name for name in ("secret", "1.toml", "2.toml"))
    secret.write_text("s3cret/@\n")
    first.write_text(f'[amqp]\nurls = ["amqp://me@broker/v"]\npassword_file = "{secret}"\n')
    config = load(first)
    second.write_text(effective(config))
    assert "s3cret" not in second.read_text()
    assert load(second) == config


def test_a_finding_is_one_line_whatever_names_it_has() -> None:
    finding = Finding(
        severity=Severity.ERROR, subject="route a", what="it's\nbroken\x1b[2J", remedy="mend it"
    )
    assert str(finding) == "route a: it's?broken?[2J; mend it"


def test_the_summary_counts_errors_and_warnings() -> None:
    def finding(severity: Severity) -> Finding:
        return Finding(severity=severity, subject="s", what="w", remedy="r")

    assert summary([], 1) == "1 route, 0 errors, 0 warnings"
    found = [finding(s) for s in (Severity.ERROR, *[Severity.WARNING] * 2, Severity.NOTE)]
    assert summary(found, 2) == "2 routes, 1 error, 2 warnings"


@pytest.mark.parametrize(
    "text",
    [
        "[routes.x]\nexchnage = ''\n",
        "[routes.x.queue]\narguments = { x-max-length = 9223372036854775808 }\n",
        f"[routes.x]\nexchange = '{'é' * 128}'\n",
        f"[routes.x.queue]\nname = '{'q' * 256}'\n",
        f"[routes.x.queue.arguments]\n'{'q' * 256}' = 1\n",
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_code_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "relay.toml"
    path.write_text(text)
    assert main(["check", "--config", str(path), "--show"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "routes.x" in err
