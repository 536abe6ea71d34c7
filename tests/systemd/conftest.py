"""One machine for all tests of units: relay is installed on it from its package."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from relay.demo.rabbitmq import RabbitMQNode
from tests.systemd.bridge import Bridge
from tests.systemd.lab import Lab, LabImpossible
from tests.systemd.machine import CONFIG, QUEUE, Machine

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``./dev package`` makes."""
    output = tmp_path_factory.mktemp("dist")
    packed = subprocess.run(
        [sys.executable, ROOT / "systemd/pack.py", output], capture_output=True, text=True
    )
    assert packed.returncode == 0, packed.stderr
    return Path(packed.stdout.strip())


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A machine without anything of relay's."""
    if os.getuid() != 0:
        pytest.skip("namespaces with a systemd of their own need root")
    try:
        with Lab() as lab:
            yield lab
    except LabImpossible as exc:
        pytest.skip(f"no namespaces are to be had here: {exc}")


@pytest.fixture(scope="session")
def installed(lab: Lab, package: Path) -> Lab:
    """relay installed on it, as README.md says; it has no network to install from."""
    with tarfile.open(package) as archive:
        archive.extractall(lab.path("/opt"), filter="data")
    tree = package.name.removesuffix(".tar.gz")
    assert lab.run(f"/opt/{tree}/install").stdout.startswith("relay ")
    return lab


@pytest.fixture(scope="session")
def _bridged(installed: Lab, rabbitmq: RabbitMQNode) -> Iterator[Lab]:
    installed.write("/etc/relay/relay.toml", CONFIG)
    with Bridge(installed, 5672, rabbitmq.port):
        yield installed
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        connection.channel().queue_delete(QUEUE)


@pytest.fixture
def machine(_bridged: Lab) -> Iterator[Machine]:
    """relay runs, as its units have it, and does again when the test is over."""
    machine = Machine(_bridged)
    machine.start()
    yield machine
    machine.reset()
