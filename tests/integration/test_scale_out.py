"""The recipe for scaling out, with its own files: several queues, each transfer whole in one."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests

import relay
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.uploading import RawConnection, content, request_head

ROOT = Path(relay.__file__).parents[1]
PATIENCE = 60.0
"""Seconds for anything; a test that waits longer has failed."""

PLUGIN = "rabbitmq_consistent_hash_exchange"
UPLOADS = 60
SIZES = (0, 1, 131_064, 131_065, 300_000, 2_000_000)


def fenced(language: str) -> str:
    """The block in that language in the README's section."""
    section = (ROOT / "relay/receiver/README.md").read_text().partition("\n## Scaling out\n")[2]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll: another process's files do not tell when they change."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE} s: {what}")
        time.sleep(0.05)


class Consumers:
    """``relay receive`` for each of some queues, and what they have delivered."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url = url
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, queue: str) -> None:
        command = [sys.executable, "-m", "relay", "receive", "--amqp", self._url, "--queue", queue]
        with (self._directory / f"{queue}.err").open("wb") as err:
            self._processes.append(
                subprocess.Popen(
                    [*command, "--output", str(self._directory / queue)],
                    stdout=subprocess.DEVNULL,
                    stderr=err,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                )
            )

    def close(self) -> None:
        for process in self._processes:
            process.terminate()  # acks what it has
            process.wait(PATIENCE)

    def delivered(self) -> dict[str, list[str]]:
        """The transfers of each queue."""
        outputs = (path for path in self._directory.iterdir() if path.is_dir())
        return {output.name: [t for t in os.listdir(output) if t[0] != "."] for output in outputs}

    def digests(self, queue: str) -> dict[str, str]:
        """SHA-256 of each transfer's only file."""
        found = {}
        for transfer in self.delivered()[queue]:
            (file,) = (self._directory / queue / transfer).glob("0-*")
            found[transfer] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found

    def problems(self) -> str:
        return "".join(path.read_text() for path in self._directory.glob("*.err"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQNode]:
    with RabbitMQNode(plugins=[PLUGIN]) as node:
        path = tmp_path_factory.mktemp("definitions") / "uploads.json"
        import_definitions(node, path, json.loads(fenced("json")))
        yield node


@pytest.fixture
def consumers(node: RabbitMQNode, tmp_path: Path) -> Iterator[Consumers]:
    directory = tmp_path / "consumers"
    directory.mkdir()
    consumers = Consumers(node.url, directory)
    yield consumers
    consumers.close()


def import_definitions(node: RabbitMQNode, path: Path, definitions: dict[str, Any]) -> None:
    path.write_text(json.dumps(definitions))
    node.ctl("import_definitions", str(path))


def put(daemon: Daemon, body: bytes) -> tuple[str, str]:
    answer = requests.put(f"{daemon.url}/upload/x.bin", data=body, timeout=PATIENCE)
    assert answer.status_code == 201, answer.text
    return answer.json()["transfer"], hashlib.sha256(body).hexdigest()


def with_a_fourth_queue() -> dict[str, Any]:
    """The README's definitions, with another exchange and another queue."""
    definitions: dict[str, Any] = json.loads(fenced("json"))
    definitions["exchanges"][0]["name"] = "uploads-2"
    for kind, key in (("queues", "name"), ("bindings", "destination")):
        first = next(entry for entry in definitions[kind] if entry[key] == "uploads.0")
        definitions[kind].append(first | {key: "uploads.3"})
    for binding in definitions["bindings"]:
        binding["source"] = "uploads-2"
    return definitions


def test_three_consumers_share_the_transfers_and_each_is_whole_at_one(
    node: RabbitMQNode, consumers: Consumers, tmp_path: Path
) -> None:
    queues = [f"uploads.{n}" for n in range(3)]
    random = Random(1)
    bodies = [random.randbytes(random.choice(SIZES)) for _ in range(UPLOADS)]
    with Daemon(node.url, fenced("toml"), directory=tmp_path) as daemon:
        for queue in queues:
            consumers.start(queue)
        with ThreadPoolExecutor(8) as pool:
            expected = dict(pool.map(lambda body: put(daemon, body), bodies))
        eventually(
            lambda: sum(map(len, consumers.delivered().values())) == UPLOADS,
            f"all delivered; {consumers.problems()}",
        )
    found = [consumers.digests(queue) for queue in queues]
    assert all(found)
    assert sum(map(len, found)) == UPLOADS
    assert found[0] | found[1] | found[2] == expected
    assert consumers.problems() == ""


def test_a_queue_is_added_with_another_exchange_while_uploads_are_in_progress(
    node: RabbitMQNode, consumers: Consumers, tmp_path: Path
) -> None:
    for n in range(3):
        consumers.start(f"uploads.{n}")
    body = content(1_000_000)
    directories = [tmp_path / name for name in ("old", "new")]
    for directory in directories:
        directory.mkdir()
    config = fenced("toml")
    with ExitStack() as stack:
        old = stack.enter_context(Daemon(node.url, config, directory=directories[0]))
        uploads = [stack.enter_context(RawConnection(old.address)) for _ in range(12)]
        for upload in uploads:
            upload.send(request_head("/upload/x.bin", len(body), method="PUT"))
            upload.send(body[:600_000])
        old.wait_until(lambda: len(old.transfers()) == len(uploads), "all uploads are in progress")

        import_definitions(node, tmp_path / "uploads-2.json", with_a_fourth_queue())
        consumers.start("uploads.3")
        config = config.replace('"uploads"', '"uploads-2"')
        new = stack.enter_context(Daemon(node.url, config, directory=directories[1]))
        further = [put(new, b"%d" % n)[0] for n in range(24)]
        for upload in uploads:
            upload.send(body[600_000:])
        answers = [upload.answer() for upload in uploads]
        assert {answer.status for answer in answers} == {201}
        transfers = {answer.json()["transfer"] for answer in answers}
        eventually(
            lambda: sum(map(len, consumers.delivered().values())) == 36,
            f"all delivered; {consumers.problems()}",
        )
    delivered = consumers.delivered()
    assert transfers | set(further) == {t for of in delivered.values() for t in of}
    assert transfers.isdisjoint(delivered["uploads.3"])
    assert delivered["uploads.3"]
    assert consumers.problems() == ""
