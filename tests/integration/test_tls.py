"""TLS to a real RabbitMQ: what is trusted, what is refused, and that nothing leaks past it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests
import trustme

import relay
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import HOST, RabbitMQNode, free_ports
from tests.certificates import Pair, expired, save, save_ca
from tests.queue_reader import transfers_in

CLIENT = "uploader"
PLUGIN = "rabbitmq_auth_mechanism_ssl"
PATIENCE = 60.0


@dataclass
class Site:
    """A CA, a node whose certificate it issued for ``localhost``, and a client of it.

    The node's certificate is not for 127.0.0.1, where it listens, too.
    """

    directory: Path
    ca: trustme.CA
    ca_file: Path
    port: int
    node: RabbitMQNode
    client: Pair

    def url(self, user: str = "guest:guest@", host: str = "localhost") -> str:
        return f"amqps://{user}{host}:{self.port}/%2f"

    def install(self, leaf: trustme.LeafCert) -> None:
        """Give the node another certificate, from the next connection on."""
        save(leaf, self.directory, "server")
        self.node.ctl("eval", "ssl:clear_pem_cache().")

    def connections(self, *columns: str) -> list[list[str]]:
        """What the broker says of its connections."""
        table = self.node.ctl("list_connections", *columns)
        return [line.split("\t") for line in table.splitlines()[1:]]


def make_site(directory: Path, make: Callable[..., RabbitMQNode], *, required: bool) -> Site:
    """``required``: the node refuses clients without a certificate."""
    ca = trustme.CA()
    ca_file = save_ca(ca, directory)
    server = save(ca.issue_cert("localhost"), directory, "server")
    client = save(ca.issue_cert("relay.example", common_name=CLIENT), directory, "client")
    (port,) = free_ports(1)
    node = make(
        config={
            "listeners.ssl.default": f"{HOST}:{port}",
            "ssl_options.cacertfile": str(ca_file),
            "ssl_options.certfile": str(server.certificate),
            "ssl_options.keyfile": str(server.key),
            "ssl_options.verify": "verify_peer",
            "ssl_options.fail_if_no_peer_cert": str(required).lower(),
            "ssl_cert_login_from": "common_name",
            "auth_mechanisms.1": "PLAIN",
            "auth_mechanisms.2": "EXTERNAL",
        },
        plugins=[PLUGIN],
    )
    return Site(directory, ca, ca_file, port, node, client)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A broker that takes clients with and without a certificate."""
    made = make_site(tmp_path_factory.mktemp("site"), RabbitMQNode, required=False)
    with made.node:
        yield made


def tls(ca_file: Path, client: Pair | None = None) -> str:
    """The keys of ``[amqp]``."""
    files = {"ca_file": ca_file}
    if client is not None:
        files |= {"certificate_file": client.certificate, "key_file": client.key}
    return "[amqp]\n" + "".join(f'{key} = "{path}"\n' for key, path in files.items())


def upload(daemon: Daemon, data: bytes = b"x") -> requests.Response:
    return requests.put(f"{daemon.url}/upload/f", data=data, timeout=PATIENCE)


def problem(answer: requests.Response) -> tuple[int, Any]:
    return answer.status_code, answer.json()["code"]


def is_part(path: Path) -> bool:
    """Of what ``relay receive`` writes: the bytes of a part, not the receipt."""
    return path.is_file() and path.suffix != ".json"


def wait_for_log(daemon: Daemon, text: str) -> None:
    daemon.wait_until(lambda: any(text in line for line in daemon.log), f"its log says {text!r}")


def run_relay(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(relay.__file__).parents[1])}
    command = [sys.executable, "-m", "relay", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_an_upload_over_tls_arrives_byte_for_byte(site: Site, tmp_path: Path) -> None:
    data = Random(1).randbytes(20_000_000)
    with Daemon(site.url(), tls(site.ca_file), directory=tmp_path) as daemon:
        assert site.connections("ssl", "ssl_protocol", "user", "peer_cert_subject") == [
            ["true", "tlsv1.3", "guest", ""]
        ]
        answer = upload(daemon, data)
    assert answer.status_code == 201
    transfers = transfers_in(site.node.url, "uploads", ended=1)
    (part,) = transfers[answer.json()["transfer"]].parts
    assert part.data == data


def test_what_is_uploaded_over_tls_is_received_over_tls(site: Site, tmp_path: Path) -> None:
    data = Random(2).randbytes(1_000_000)
    with Daemon(site.url(), tls(site.ca_file), directory=tmp_path) as daemon:
        assert upload(daemon, data).status_code == 201
    output = tmp_path / "output"
    flags = ["--queue", "uploads", "--output", str(output), "--count", "1"]
    files = ["--ca-file", str(site.ca_file), "--certificate-file", str(site.client.certificate)]
    files += ["--key-file", str(site.client.key)]
    done = run_relay("receive", "--amqp", site.url(), *flags, *files)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.read_bytes() for path in output.glob("[!.]*/*") if is_part(path)] == [data]


def test_a_client_certificate_logs_in_without_a_password(site: Site, tmp_path: Path) -> None:
    site.node.ctl("add_user", CLIENT, "no password of ours")
    site.node.ctl("clear_password", CLIENT)
    site.node.ctl("set_permissions", CLIENT, ".*", ".*", ".*")
    config = tls(site.ca_file, site.client)
    with Daemon(site.url(user=""), config, directory=tmp_path) as daemon:
        assert site.connections("user", "auth_mechanism") == [[CLIENT, "EXTERNAL"]]
        assert upload(daemon).status_code == 201


def test_a_certificate_without_a_user_is_refused_as_a_login(site: Site, tmp_path: Path) -> None:
    stranger = save(site.ca.issue_cert("x.example", common_name="stranger"), tmp_path, "stranger")
    config = tls(site.ca_file, stranger)
    daemon = Daemon(site.url(user=""), config, directory=tmp_path, wait_ready=False)
    with daemon:
        wait_for_log(daemon, "or a certificate of no user")
        assert problem(upload(daemon)) == (503, "broker-unavailable")


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a broker, and how the daemon says it."""

    says: str
    host: str = "localhost"
    other_ca: bool = False
    is_expired: bool = False
    plain_port: bool = False


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(Wrong("the broker's certificate has expired", is_expired=True), id="expired"),
        pytest.param(Wrong("host name mismatch", host=HOST), id="host"),
        pytest.param(Wrong("is from an unknown CA", other_ca=True), id="CA"),
        pytest.param(Wrong("its port does not speak TLS", plain_port=True), id="plaintext"),
    ],
)
def test_a_broker_that_is_not_the_right_one_gets_nothing(
    site: Site, tmp_path: Path, wrong: Wrong
) -> None:
    ca_file = save_ca(trustme.CA(), tmp_path) if wrong.other_ca else site.ca_file
    url = site.url(host=wrong.host)
    if wrong.plain_port:
        url = url.replace(str(site.port), str(site.node.port))
    if wrong.is_expired:
        site.install(expired(site.ca, "localhost"))
    try:
        with Daemon(url, tls(ca_file), directory=tmp_path, wait_ready=False) as daemon:
            wait_for_log(daemon, wrong.says)
            status, reason = daemon.ready()
            assert status == 503
            assert wrong.says in reason
            assert problem(upload(daemon)) == (503, "broker-unavailable")
            assert site.connections("user") == []
    finally:
        if wrong.is_expired:
            site.install(site.ca.issue_cert("localhost"))


def test_a_renewed_certificate_ends_the_refusal_by_itself(site: Site, tmp_path: Path) -> None:
    site.install(expired(site.ca, "localhost"))
    try:
        daemon = Daemon(site.url(), tls(site.ca_file), directory=tmp_path, wait_ready=False)
        with daemon:
            wait_for_log(daemon, "certificate has expired")
            site.install(site.ca.issue_cert("localhost"))
            daemon.wait_until(lambda: daemon.ready()[0] == 200, "it is ready")
            assert upload(daemon).status_code == 201
    finally:
        site.install(site.ca.issue_cert("localhost"))


def test_with_urls_of_both_kinds_each_is_what_it_says(site: Site, tmp_path: Path) -> None:
    urls = [site.url(host=HOST), site.node.url]
    with Daemon(urls, tls(site.ca_file), directory=tmp_path) as daemon:
        wait_for_log(daemon, "host name mismatch")
        assert site.connections("ssl") == [["false"]]
        assert upload(daemon).status_code == 201


def test_plain_amqp_on_a_port_for_tls_is_told_apart(site: Site, tmp_path: Path) -> None:
    url = site.url().replace("amqps:", "amqp:")
    with Daemon(url, directory=tmp_path, wait_ready=False) as daemon:
        wait_for_log(daemon, "is its port one for TLS?")
        assert problem(upload(daemon)) == (503, "broker-unavailable")


def test_a_broker_that_requires_client_certificates(
    new_node: Callable[..., RabbitMQNode], tmp_path: Path
) -> None:
    strict = make_site(tmp_path, new_node, required=True)
    with Daemon(strict.url(), tls(strict.ca_file), directory=tmp_path, wait_ready=False) as daemon:
        wait_for_log(daemon, "asked for a client certificate")
        assert problem(upload(daemon)) == (503, "broker-unavailable")
    config = tls(strict.ca_file, strict.client)
    with Daemon(strict.url(), config, directory=tmp_path) as daemon:
        ((user, subject),) = strict.connections("user", "peer_cert_subject")
        assert user == "guest"
        assert f"CN={CLIENT}" in subject
        assert upload(daemon).status_code == 201


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["serve", "--config"], "relay.toml: amqp.ca_file: "),
        (["receive", "--queue", "q", "--output", "out", "--ca-file"], "--ca-file: "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_status_2(
    tmp_path: Path, command: Sequence[str], named: str
) -> None:
    missing = tmp_path / "missing.pem"
    config = tmp_path / "relay.toml"
    config.write_text(tls(missing))
    last = config if "serve" in command else missing
    done = run_relay(*command, str(last), "--amqp", "amqps://guest:guest@localhost/")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert named in line
    assert "missing.pem cannot be read: No such file or directory" in line
    assert not (tmp_path / "out").exists()
