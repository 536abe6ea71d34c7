"""The consumers in the documentation, run as they stand there, through lost connections and kills.

Uploads go through the real daemon and a real broker; the consumer is behind a proxy that breaks.
"""

import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import requests
import trio

import relay
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.fault_proxy import Direction, Fault, FaultProxy, Kind
from tests.uploading import content

ROOT = Path(relay.__file__).parents[1]
README = ROOT / "relay/receiver/README.md"
PATIENCE = 60.0
"""Seconds for any one thing; a test that waits longer has failed."""

EXAMPLES = ("pika, blocking", "pika on trio", "aio-pika")
SHORTEST = "A consumer of your own"
ROUTES = {heading: re.sub("[^a-z]+", "-", heading.lower()) for heading in (*EXAMPLES, SHORTEST)}

Digests = dict[str, list[str]]
"""Of each part of each transfer, SHA-256."""


def block(heading: str) -> str:
    """The first fenced Python below a heading of the README."""
    pattern = rf"^##+ {re.escape(heading)}$.*?^```python$\n(.*?)^```$"
    found = re.search(pattern, README.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, f"no example {heading!r}"
    return found[1]


class Example:
    """A consumer out of the README, in a directory of its own, as a process."""

    def __init__(self, heading: str, directory: Path) -> None:
        self.heading = heading
        self.directory = directory
        (directory / "consumer.py").write_text(block(heading))
        (directory / "database.py").write_text(block("A sink that resumes"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, url: str) -> None:
        last = {"pika on trio": ["transfers.sqlite"], "aio-pika": ["."]}
        command = [sys.executable, "consumer.py", url, ROUTES[self.heading]]
        with (self.directory / "out").open("ab") as out, (self.directory / "err").open("ab") as err:
            self._process = subprocess.Popen(
                [*command, *last.get(self.heading, [])],
                cwd=self.directory,
                stdout=out,
                stderr=err,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def told(self) -> dict[str, str]:
        """What it has printed: transfers, and where they went."""
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "err").read_text()
        lines = (self.directory / "out").read_text().splitlines()
        return dict(line.split(" ", 1) for line in lines if " " in line)

    @property
    def problems(self) -> list[str]:
        """The receiver's, among what it has printed to standard error."""
        lines = (self.directory / "err").read_text().splitlines()
        return [line for line in lines if line.startswith(("transfer", "a message"))]

    def digests(self) -> Digests:
        """Of what it made of the transfers."""
        match self.heading:
            case "pika, blocking":
                return {of: re.findall("=([0-9a-f]{64})", where) for of, where in self.told.items()}
            case "pika on trio":
                return stored(self.directory / "transfers.sqlite")
            case "aio-pika":
                return {path.stem: zipped(path) for path in self.directory.glob("*.zip")}
        return {of: written(self.directory / "received" / of) for of in self.told}


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def stored(path: Path) -> Digests:
    with closing(sqlite3.connect(path)) as database:
        found: Digests = {}
        for of, number in database.execute(
            "SELECT transfer, number FROM part JOIN transfer ON transfer = id"
            " WHERE state = 'complete' ORDER BY transfer, number"
        ):
            rows = database.execute(
                "SELECT body FROM data WHERE transfer = ? AND part = ? ORDER BY n", (of, number)
            )
            found.setdefault(of, []).append(sha256(b"".join(body for (body,) in rows)))
        return found


def zipped(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [sha256(archive.read(name)) for name in archive.namelist()]


def written(directory: Path) -> list[str]:
    files = sorted(set(os.listdir(directory)) - {"receipt.json"})
    return [sha256((directory / name).read_bytes()) for name in files]


@pytest.fixture(scope="module")
def daemon(rabbitmq: RabbitMQNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    config = "".join(
        f'[routes.{route}]\nrouting_key = "{route}"\n[routes.{route}.queue]\nname = "{route}"\n'
        for route in ROUTES.values()
    )
    with Daemon(rabbitmq.url, config, directory=tmp_path_factory.mktemp("daemon")) as running:
        yield running


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Example]:
    example = Example(request.param, tmp_path)
    yield example
    example.kill()


def upload(daemon: Daemon, heading: str, *bodies: bytes) -> Digests:
    """A form with these parts; returns what must come of it."""
    files = [("file", (f"{n}.bin", body)) for n, body in enumerate(bodies)]
    answer = requests.post(f"{daemon.url}/upload/{ROUTES[heading]}", files=files, timeout=PATIENCE)
    assert answer.status_code == 201, answer.text
    return {answer.json()["transfer"]: [sha256(body) for body in bodies]}


def uploads(daemon: Daemon, heading: str) -> Digests:
    small = upload(daemon, heading, b"", b"x", content(300_000))
    return small | upload(daemon, heading, content(9_000_000)) | upload(daemon, heading, b"last")


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll: neither files nor queues tell when they change."""
    for _ in range(int(PATIENCE / 0.05)):
        if condition():
            return
        await trio.sleep(0.05)
    pytest.fail(f"not within {PATIENCE} s: {what}")


async def all_told(example: Example, expected: Digests) -> None:
    """Wait until it has told of all these; for each one there is as much time."""
    while missing := expected.keys() - example.told.keys():
        await eventually(partial(any_told, example, missing), f"any of {missing} told")


def any_told(example: Example, transfers: Collection[str]) -> bool:
    return any(transfer in example.told for transfer in transfers)


async def emptied(node: RabbitMQNode, queue: str) -> None:
    """Wait until nothing is left in the queue, unacked deliveries included."""
    for _ in range(60):
        listed = await trio.to_thread.run_sync(partial(node.ctl, "list_queues", "name", "messages"))
        if f"{queue}\t0" in listed.splitlines():
            return
    pytest.fail(f"{queue} is not empty:\n{listed}")


@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
async def test_a_documented_consumer_delivers_all_through_a_lost_connection_and_a_kill(
    rabbitmq: RabbitMQNode, daemon: Daemon, example: Example, nursery: trio.Nursery
) -> None:
    proxy = FaultProxy(rabbitmq.port)
    await nursery.start(proxy.serve)
    upload_all = partial(trio.to_thread.run_sync, uploads, daemon, example.heading)

    expected = await upload_all()
    proxy.arm(Fault(kind=Kind.RESET, direction=Direction.TO_DAEMON, after=3_000_000))
    example.start(proxy.url)
    await all_told(example, expected)
    assert proxy.hit.is_set()
    assert proxy.connections == 2

    # Killed in the middle of a transfer, with deliveries under way.
    proxy.arm(Fault(kind=Kind.STALL, direction=Direction.TO_DAEMON, after=4_000_000))
    expected |= await upload_all()
    await eventually(proxy.hit.is_set, "deliveries stalled")
    example.kill()
    proxy.heal()
    example.start(proxy.url)
    await all_told(example, expected)

    assert example.digests() == expected
    assert example.problems == []
    await emptied(rabbitmq, ROUTES[example.heading])
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("example", [SHORTEST], indirect=True)
async def test_the_consumer_in_the_readme_works(
    rabbitmq: RabbitMQNode, daemon: Daemon, example: Example
) -> None:
    expected = await trio.to_thread.run_sync(uploads, daemon, example.heading)
    example.start(rabbitmq.url)
    await all_told(example, expected)
    assert example.digests() == expected
    await emptied(rabbitmq, ROUTES[example.heading])
