"""Who may upload, as clients and operators meet it: curl, the real daemon, a real broker."""

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

import relay
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.certificates import Pair, save, save_ca
from tests.queue_reader import messages_in, transfers_in
from tests.uploading import RawConnection

NO_FILES: Final = ("prlimit", "--fsize=0")
CURL_PEER_FAILED: Final = (35, 56)
"""curl's codes for a failed handshake, and for an alert after what it took for its end."""


@dataclass(frozen=True)
class Answer:
    """What a run of curl came to; status 0: there was no answer."""

    exit_code: int
    status: int
    document: dict[str, Any]
    error: str

    @property
    def problem(self) -> tuple[int, str]:
        return self.status, self.document["code"]


def curl(url: str, *arguments: str, data: str = "hello") -> Answer:
    """Upload with curl."""
    command = ["curl", "-sS", "--max-time", "60", "--data-binary", data]
    command += ["-H", "Content-Type: text/plain", "-w", "\n%{http_code}", *arguments, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    body, _, status = done.stdout.rpartition("\n")
    return Answer(done.returncode, int(status), json.loads(body or "{}"), done.stderr)


def bearer(token: str) -> tuple[str, str]:
    return "-H", f"Authorization: Bearer {token}"


def run_relay(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(relay.__file__).parents[1])}
    command = [sys.executable, "-m", "relay", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def make_token(name: str, path: Path) -> str:
    done = run_relay("token", name, "--append", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def wait_for_log(daemon: Daemon, text: str, times: int = 1) -> None:
    daemon.wait_until(
        lambda: sum(text in line for line in daemon.log) >= times, f"its log says {text!r}"
    )


def route(queue: str) -> str:
    """The default route, into a queue of the test's own."""
    return (
        f'[routes.default]\nrouting_key = "{queue}"\n'
        f'[routes.default.queue]\nname = "{queue}"\ntype = "classic"\narguments = {{}}\n'
    )


@dataclass(frozen=True)
class Site:
    """A CA, the certificate of a server for 127.0.0.1, and that of a client."""

    ca: trustme.CA
    ca_file: Path
    server: Pair
    client: Pair

    def config(self, *, client_ca: bool) -> str:
        """``[http.tls]``."""
        lines = [f'certificate_file = "{self.server.certificate}"']
        lines += [f'key_file = "{self.server.key}"']
        lines += [f'client_ca_file = "{self.ca_file}"'] * client_ca
        return "\n".join(["[http.tls]", *lines, ""])

    def flags(self, client: Pair | None = None) -> Sequence[str]:
        """curl's."""
        trust = ["--cacert", str(self.ca_file)]
        if client is None:
            return trust
        return [*trust, "--cert", str(client.certificate), "--key", str(client.key)]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    ca = trustme.CA()
    server = save(ca.issue_cert("127.0.0.1"), tmp_path, "server")
    client = save(ca.issue_cert("uploader.example"), tmp_path, "client")
    return Site(ca, save_ca(ca, tmp_path), server, client)


def https(daemon: Daemon, path: str = "/upload") -> str:
    return daemon.url.replace("http:", "https:") + path


# --- tokens -------------------------------------------------------------------------------------


def test_tokens_from_the_first_to_the_last(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    """Made, used, refused, renewed and withdrawn, and never told."""
    tokens = tmp_path / "tokens"
    alice, bob = make_token("alice", tokens), make_token("bob", tokens)
    config = (
        f'[auth]\ntokens_file = "{tokens}"\n{route("auth.tokens.alice")}'
        '[routes.named]\nrouting_key = "auth.tokens.{client}"\nclients = ["alice"]\n'
    )
    with Daemon(rabbitmq.url, config, directory=tmp_path, prefix=NO_FILES) as daemon:
        url = f"{daemon.url}/upload/named"
        assert curl(url).problem == (401, "unauthorized")
        assert curl(url, *bearer("relay_wrong")).problem == (401, "unauthorized")
        assert curl(url, *bearer(bob)).problem == (403, "forbidden")
        assert curl(url, *bearer(alice)).status == 201
        # A new token for alice, while the old one is still valid; then without the old one.
        new = make_token("alice", tokens)
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for_log(daemon, "reloaded configuration, tokens and certificates")
        assert [curl(url, *bearer(token)).status for token in (alice, new)] == [201, 201]
        tokens.write_text("".join(tokens.read_text().splitlines(keepends=True)[1:]))
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for_log(daemon, "reloaded configuration, tokens and certificates", times=2)
        assert [curl(url, *bearer(token)).status for token in (alice, new)] == [401, 201]
        # A file that cannot be used changes nothing.
        tokens.write_text("alice: not-a-hash\n")
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for_log(daemon, "not reloaded, nothing has changed: auth.tokens_file")
        assert curl(url, *bearer(new)).status == 201
        log = "\n".join(daemon.log)
    assert 'msg="who may upload: bearers of a token (2 clients)"' in log
    assert not any(token in log for token in (alice, bob, new, "relay_wrong", "not-a-hash"))
    received = transfers_in(rabbitmq.url, "auth.tokens.alice", ended=4)
    assert {transfer.transfer.client for transfer in received.values()} == {"alice"}


def test_the_name_is_in_the_frames_headers(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    token = make_token("alice", tokens)
    config = f'[auth]\ntokens_file = "{tokens}"\n{route("auth.header")}'
    with Daemon(rabbitmq.url, config, directory=tmp_path) as daemon:
        assert curl(f"{daemon.url}/upload", *bearer(token)).status == 201
    (message,) = messages_in(rabbitmq.url, "auth.header", ended=1)
    assert message.properties.headers is not None
    assert message.properties.headers["client"] == "alice"


def test_with_tokens_relay_may_listen_beyond_loopback(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    make_token("alice", tokens)
    config = f'[auth]\ntokens_file = "{tokens}"\n{route("auth.beyond")}'
    beyond = ["0.0.0.0:0"]
    with Daemon(rabbitmq.url, config, directory=tmp_path, also=beyond) as daemon:
        assert curl(f"{daemon.url}/upload").problem == (401, "unauthorized")
    config += "[http]\nanonymous = true\n"
    with Daemon(rabbitmq.url, config, directory=tmp_path, also=beyond) as daemon:
        assert curl(f"{daemon.url}/upload").status == 201
        (line,) = (line for line in daemon.log if "who may upload" in line)
    assert "level=warning" in line
    assert line.endswith('bearers of a token (1 client), anonymous clients"')


def test_a_client_has_its_own_limit(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    alice, bob = make_token("alice", tokens), make_token("bob", tokens)
    config = f'[auth]\ntokens_file = "{tokens}"\n{route("auth.limit")}'
    config += "[http]\nmax_uploads_per_client = 1\n"
    with Daemon(rabbitmq.url, config, directory=tmp_path) as daemon:
        head = f"PUT /upload/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice}\r\n"
        with RawConnection(daemon.address) as connection:
            connection.send(f"{head}Content-Length: 1\r\nExpect: 100-continue\r\n\r\n".encode())
            assert connection.interim() == 100
            assert curl(f"{daemon.url}/upload", *bearer(alice)).problem == (429, "too-many-uploads")
            assert curl(f"{daemon.url}/upload", *bearer(bob)).status == 201
            assert [transfer["client"] for transfer in daemon.transfers()] == ["alice"]
            connection.send(b"x")
            assert connection.answer().status == 201
        assert curl(f"{daemon.url}/upload", *bearer(alice)).status == 201


# --- TLS ----------------------------------------------------------------------------------------


def test_uploads_over_tls_and_what_is_not_tls(
    rabbitmq: RabbitMQNode, tmp_path: Path, site: Site
) -> None:
    config = site.config(client_ca=False) + route("auth.tls")
    with Daemon(rabbitmq.url, config, directory=tmp_path, prefix=NO_FILES) as daemon:
        data = "x" * 3_000_000
        path = tmp_path / "data"
        path.write_text(data)
        answer = curl(https(daemon), *site.flags(), data=f"@{path}")
        assert (answer.status, answer.document["bytes"]) == (201, len(data))
        assert daemon.metric("relay_tls_handshakes_failed_total") == 0
        for _ in range(5):
            plain = curl(f"{daemon.url}/upload")
            assert plain.problem == (400, "bad-request")
            assert "https" in plain.document["detail"]
        # All are counted, and one is told.
        assert daemon.metric("relay_tls_handshakes_failed_total") == 5
        (line,) = (line for line in daemon.log if "no TLS with a client" in line)
        assert "outcome=no-tls" in line
        # Another certificate, from another CA, without a restart.
        ca = trustme.CA()
        save(ca.issue_cert("127.0.0.1"), tmp_path, "server")
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for_log(daemon, "reloaded configuration, tokens and certificates")
        assert curl(https(daemon), *site.flags()).exit_code == 60
        save_ca(ca, tmp_path)
        assert curl(https(daemon), *site.flags()).status == 201


def test_tls_on_a_plain_port_ends_at_once(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    with Daemon(rabbitmq.url, route("auth.plain"), directory=tmp_path) as daemon:
        assert curl(https(daemon)).exit_code == 35
        with RawConnection(daemon.address) as connection:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            hello = context.wrap_bio(incoming, outgoing)
            with pytest.raises(ssl.SSLWantReadError):
                hello.do_handshake()
            connection.send(outgoing.read())
            answer = connection.answer()
            assert answer.status == 400
            assert "TLS" in answer.json()["detail"]


def test_a_certificate_is_a_name_and_without_one_nobody_gets_in(
    rabbitmq: RabbitMQNode, tmp_path: Path, site: Site
) -> None:
    tokens = tmp_path / "tokens"
    token = make_token("alice", tokens)
    config = site.config(client_ca=True) + f'[auth]\ntokens_file = "{tokens}"\n'
    config += route("auth.mutual")
    stranger = save(trustme.CA().issue_cert("a.example"), tmp_path, "stranger")
    with Daemon(rabbitmq.url, config, directory=tmp_path, prefix=NO_FILES) as daemon:
        assert curl(https(daemon), *site.flags(site.client)).status == 201
        assert curl(https(daemon), *site.flags(site.client), *bearer(token)).status == 201
        wrong = curl(https(daemon), *site.flags(site.client), *bearer("relay_wrong"))
        assert wrong.problem == (401, "unauthorized")
        for client in (None, stranger):
            refused = curl(https(daemon), *site.flags(client), *bearer(token))
            assert refused.status == 0
            assert refused.exit_code in CURL_PEER_FAILED
            assert "alert" in refused.error
        wait_for_log(daemon, "no TLS with a client: ", times=2)
        assert daemon.metric("relay_tls_handshakes_failed_total") == 2
        assert any("holders of a client certificate" in line for line in daemon.log)
    received = transfers_in(rabbitmq.url, "auth.mutual", ended=2)
    names = [transfer.transfer.client for transfer in received.values()]
    assert names == ["uploader.example", "alice"]


def test_a_certificate_is_revoked_by_its_name(
    rabbitmq: RabbitMQNode, tmp_path: Path, site: Site
) -> None:
    """As the README says to do it: out of the list, and SIGHUP."""
    config = site.config(client_ca=True) + route("auth.revoked")
    lists = [f'clients = ["{names}"]' for names in ('uploader.example", "other.example', "other")]
    first, second = (
        config.replace("[routes.default]", f"[routes.default]\n{names}") for names in lists
    )
    with Daemon(rabbitmq.url, first, directory=tmp_path) as daemon:
        assert curl(https(daemon), *site.flags(site.client)).status == 201
        (tmp_path / "relay.toml").write_text(second)
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for_log(daemon, "reloaded configuration, tokens and certificates")
        assert curl(https(daemon), *site.flags(site.client)).problem == (403, "forbidden")


def test_relay_send_gets_in_with_its_token_and_with_its_certificate(
    rabbitmq: RabbitMQNode, tmp_path: Path, site: Site
) -> None:
    tokens, secret = tmp_path / "tokens", tmp_path / "alice.token"
    secret.write_text(make_token("alice", tokens) + "\n")
    config = site.config(client_ca=True) + f'[auth]\ntokens_file = "{tokens}"\n'
    with Daemon(rabbitmq.url, config + route("auth.send"), directory=tmp_path) as daemon:
        to = ("send", str(secret), "--to", https(daemon), "--ca-file", str(site.ca_file))
        certificate = ("--certificate-file", str(site.client.certificate))
        key = ("--key-file", str(site.client.key))
        for token in ((), ("--token-file", str(secret))):
            done = run_relay(*to, *certificate, *key, *token)
            assert (done.returncode, done.stderr) == (0, "")
        done = run_relay(*to, "--token-file", str(secret))
        assert done.returncode == 1
        assert "asked for a client certificate" in done.stderr
    received = transfers_in(rabbitmq.url, "auth.send", ended=2)
    names = [transfer.transfer.client for transfer in received.values()]
    assert names == ["uploader.example", "alice"]


# --- Unix sockets -------------------------------------------------------------------------------


def test_a_user_on_a_unix_socket_is_known_and_needs_no_token(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    token = make_token("alice", tokens)
    path = tmp_path / "relay.sock"
    config = f'[auth]\ntokens_file = "{tokens}"\n{route("auth.unix")}'
    with Daemon(rabbitmq.url, config, directory=tmp_path, also=[f"unix:{path}"]) as daemon:
        to_socket = ("--unix-socket", str(path))
        assert curl("http://relay/upload", *to_socket).status == 201
        assert curl("http://relay/upload", *to_socket, *bearer(token)).status == 201
        assert curl("http://relay/upload", *to_socket, *bearer("x")).status == 401
        assert curl(f"{daemon.url}/upload").status == 401
        assert any("users on Unix sockets" in line for line in daemon.log)
    received = transfers_in(rabbitmq.url, "auth.unix", ended=2)
    names = [transfer.transfer.client for transfer in received.values()]
    assert names == [f"uid:{os.getuid()}", "alice"]


# --- before the start ---------------------------------------------------------------------------


def test_check_tells_of_who_may_upload_beside_what_the_broker_has(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    tokens, config = tmp_path / "tokens", tmp_path / "relay.toml"
    make_token("alice", tokens)
    tokens.chmod(0o644)
    config.write_text(
        f'[amqp]\nurls = ["{rabbitmq.url}"]\n[auth]\ntokens_file = "{tokens}"\n'
        + route("auth.check")
    )
    done = run_relay("check", "--config", str(config))
    assert done.returncode == 0
    assert f"warning: auth.tokens_file: {tokens} can be read by everybody" in done.stderr


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("auth", "tokens_file"),
        ("http.tls", "certificate_file"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_file_that_is_missing_is_one_line_and_status_2(
    section: str, key: str, command: str, tmp_path: Path
) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(f'[{section}]\n{key} = "{tmp_path}/missing"\n')
    done = run_relay(command, "--config", str(config))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"relay: {config}: {section}.{key}: {tmp_path}/missing cannot be read")
