"""What ``relay check`` says of who may upload; no broker is asked."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from relay.check_access import check_access
from relay.config import AuthConfig, Config, ConfigError, HttpConfig, RouteConfig, TlsConfig
from relay.server.tokens import append, line_of
from tests.certificates import save, save_ca

BEYOND = ("0.0.0.0:80",)


def said(config: Config) -> list[str]:
    """Each finding with its severity."""
    return [f"{finding.severity.value}: {finding}" for finding in check_access(config)]


def with_tokens(path: Path, *lines: str, listen: Sequence[str] = ("127.0.0.1:80",)) -> Config:
    path.touch()
    path.chmod(0o600)
    for line in lines:
        append(path, line)
    http = HttpConfig(listen=tuple(listen))
    return Config(http=http, auth=AuthConfig(tokens_file=str(path)))


def with_certificate(directory: Path, days: float) -> TlsConfig:
    """A certificate that ends in so many days."""
    ca = trustme.CA()
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    leaf = ca.issue_cert("relay.example", not_before=now - timedelta(days=99), not_after=end)
    pair = save(leaf, directory, "server")
    pair.key.chmod(0o600)
    return TlsConfig(certificate_file=str(pair.certificate), key_file=str(pair.key))


def test_nothing_is_said_where_all_is_well(tmp_path: Path) -> None:
    config = with_tokens(tmp_path / "tokens", line_of("alice", "1"))
    tls = with_certificate(tmp_path, 15)
    assert said(Config()) == []
    assert said(config) == []
    assert said(Config(http=HttpConfig(listen=BEYOND, tls=tls), auth=config.auth)) == []


def test_a_tokens_file_that_everybody_can_read_or_that_is_empty_is_told(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    config = with_tokens(path)
    (empty,) = said(config)
    assert empty.startswith(f"warning: auth.tokens_file: {path} has no token; ")
    append(path, line_of("alice", "1"))
    path.chmod(0o604)
    (readable,) = said(config)
    assert (
        readable == f"warning: auth.tokens_file: {path} can be read by everybody; chmod o-r {path}"
    )


def test_tokens_in_the_clear_are_told(tmp_path: Path) -> None:
    (line,) = said(with_tokens(tmp_path / "tokens", line_of("a", "1"), listen=BEYOND))
    assert line.startswith("warning: auth.tokens_file: tokens cross the network in the clear")


@pytest.mark.parametrize(
    ("days", "what"),
    [(-1.0, "error: {}: expired on "), (1.0, "warning: {}: expires on "), (13.9, "warning: {}: ")],
)
def test_certificates_are_told_of_before_they_end(tmp_path: Path, days: float, what: str) -> None:
    tls = with_certificate(tmp_path, days)
    (line,) = said(Config(http=HttpConfig(tls=tls)))
    assert line.startswith(what.format(f"http.tls.certificate_file: {tls.certificate_file}"))
    assert "SIGHUP" in line


def test_cas_of_clients_are_told_of_likewise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = with_certificate(tmp_path, 90)
    ca_file = save_ca(trustme.CA(organization_name="Uploaders"), tmp_path)
    config = Config(
        http=HttpConfig(
            tls=TlsConfig(
                certificate_file=tls.certificate_file,
                key_file=tls.key_file,
                client_ca_file=str(ca_file),
            )
        )
    )
    assert said(config) == []
    # A CA of trustme's lives until 3000.
    monkeypatch.setattr("relay.check_access.time.time", lambda: 32503679999.0 - 86400)
    assert any("http.tls.client_ca_file: CA Uploaders" in line for line in said(config))


def test_a_key_that_everybody_can_read_is_told(tmp_path: Path) -> None:
    tls = with_certificate(tmp_path, 90)
    Path(tls.key_file).chmod(0o644)
    (line,) = said(Config(http=HttpConfig(tls=tls)))
    assert line.startswith(f"warning: http.tls.key_file: {tls.key_file} can be read by everybody")


def test_a_route_for_a_client_that_cannot_be_is_told(tmp_path: Path) -> None:
    route = RouteConfig(name="r", clients=("alice", "bob", "uid:1000"))
    config = with_tokens(tmp_path / "tokens", line_of("alice", "1"))
    (line,) = said(Config(auth=config.auth, routes={"r": route}))
    assert line.startswith("warning: route r: client 'bob' has no token; ")
    # Which names certificates have is not known.
    tls = with_certificate(tmp_path, 90)
    ca_file = str(save_ca(trustme.CA(), tmp_path))
    files = TlsConfig(
        certificate_file=tls.certificate_file, key_file=tls.key_file, client_ca_file=ca_file
    )
    assert said(Config(http=HttpConfig(tls=files), routes={"r": route})) == []


def test_a_file_that_cannot_be_used_is_an_error_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^auth\.tokens_file: "):
        check_access(Config(auth=AuthConfig(tokens_file=str(tmp_path / "x"))))
    with pytest.raises(ConfigError, match=r"^http\.tls\.certificate_file: "):
        check_access(Config(http=HttpConfig(tls=TlsConfig(certificate_file=str(tmp_path / "x")))))
