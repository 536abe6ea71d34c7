import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from relay.config import AmqpConfig, ConfigError
from relay.tls import client_context
from tests.certificates import Pair, save, save_ca

Make = Callable[..., ssl.SSLContext]


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def pair(ca: trustme.CA, tmp_path: Path) -> Pair:
    return save(ca.issue_cert("relay.example"), tmp_path, "relay")


def context(**files: Path) -> ssl.SSLContext:
    paths = {key: str(path) for key, path in files.items()}
    return client_context(replace(AmqpConfig(), **paths), "amqp.{}".format)  # type: ignore[arg-type]


def test_the_peer_is_always_verified_and_tls_is_at_least_1_2() -> None:
    made = context()
    assert made.verify_mode is ssl.CERT_REQUIRED
    assert made.check_hostname
    assert made.minimum_version is ssl.TLSVersion.TLSv1_2


def test_no_keys_are_logged_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert context().keylog_filename is None
    assert not (tmp_path / "keys").exists()


def test_with_a_ca_file_no_other_ca_is_trusted(ca: trustme.CA, tmp_path: Path) -> None:
    assert len(context(ca_file=save_ca(ca, tmp_path)).get_ca_certs()) == 1


def test_a_key_may_stand_in_the_certificates_file(ca: trustme.CA, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    ca.issue_cert("relay.example").private_key_and_cert_chain_pem.write_to_path(str(both))
    context(certificate_file=both)


def test_a_key_may_have_a_file_of_its_own(pair: Pair) -> None:
    context(certificate_file=pair.certificate, key_file=pair.key)


@pytest.mark.parametrize("key", ["ca_file", "certificate_file", "key_file"])
def test_a_file_that_is_not_there_is_named_with_its_key(
    pair: Pair, tmp_path: Path, key: str
) -> None:
    files = {"certificate_file": pair.certificate, "key_file": pair.key}
    with pytest.raises(ConfigError, match=rf"^amqp\.{key}: .*missing cannot be read: No such file"):
        context(**(files | {key: tmp_path / "missing"}))


@pytest.mark.parametrize("key", ["ca_file", "certificate_file", "key_file"])
@pytest.mark.parametrize("text", ["", "not PEM\n"])
def test_a_file_that_holds_something_else_is_named_with_its_key(
    pair: Pair, tmp_path: Path, key: str, text: str
) -> None:
    (tmp_path / "other").write_text(text)
    files = {"certificate_file": pair.certificate, "key_file": pair.key}
    with pytest.raises(ConfigError, match=rf"^amqp\.{key}: .*other holds no .* in PEM form$"):
        context(**(files | {key: tmp_path / "other"}))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^amqp\.ca_file: .* cannot be read: Is a directory$"):
        context(ca_file=tmp_path)


def test_a_certificate_without_any_key_is_an_error(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"^amqp\.certificate_file: .* holds no private key"):
        context(certificate_file=pair.certificate)


def test_a_key_without_a_certificate_is_an_error(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"^amqp\.key_file: goes with amqp\.certificate_file$"):
        context(key_file=pair.key)


def test_a_key_of_another_certificate_is_an_error(
    ca: trustme.CA, pair: Pair, tmp_path: Path
) -> None:
    other = save(ca.issue_cert("other.example"), tmp_path, "other")
    with pytest.raises(ConfigError, match=r"^amqp\.key_file: .* is not the key of the certificate"):
        context(certificate_file=pair.certificate, key_file=other.key)


def test_an_encrypted_key_is_an_error_and_no_question(pair: Pair) -> None:
    from cryptography.hazmat.primitives import serialization as pem

    key = pem.load_pem_private_key(pair.key.read_bytes(), None)
    secret = pem.BestAvailableEncryption(b"sesame")
    pair.key.write_bytes(
        key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.TraditionalOpenSSL, secret)
    )
    with pytest.raises(ConfigError, match=r"^amqp\.key_file: the key is encrypted"):
        context(certificate_file=pair.certificate, key_file=pair.key)


def test_keys_are_called_what_their_owner_calls_them(tmp_path: Path) -> None:
    config = replace(AmqpConfig(), ca_file=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^--ca_file: "):
        client_context(config, "--{}".format)
