"""Imports point down only: the table below is the architecture, and the code is held to it.

A module may import any module further down, except what its row says it must not know, and of
third-party packages those in its row. Imports inside functions and those for type checkers count
too. A package without a row of its own holds a docstring and imports nothing, so that importing
one module never brings in its neighbours.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import relay

TABLE = """
    module                 | third party             | must not know, of what is further down
    -----------------------|-------------------------|------------------------------------------
    __main__               |                         | all but cli
    cli                    |                         | broker transfer protocol
    demo.run               | tqdm                    | server broker transfer protocol
    demo.daemon            |                         | all
    demo.rabbitmq          |                         | all
    client.send            | trio                    | daemon receiver server broker transfer
    client.report          | tqdm                    | all
    client.answers         |                         | all but client.exchange model
    client.source          | trio google_crc32c      | daemon receiver server broker transfer
    client.endpoint        | trio                    | all but client.exchange tls config
    client.exchange        | trio h11                | all but tls
    daemon                 | trio                    | receiver
    figures                | trio prometheus_client  | receiver transfer
    check                  | trio                    | receiver server protocol
    check_access           |                         | receiver server protocol but server.tokens
    allocator              |                         | all
    pulse                  | trio prometheus_client  | all
    memory                 |                         | all but config
                           |                         |
    receiver.receive       | trio                    | server transfer
    receiver.consumer      | trio pika               | server transfer
    receiver.intake        |                         | server broker transfer protocol
    receiver.stream_offset | trio                    | server broker transfer protocol
    receiver.dead_letters  | trio pika               | server transfer
    receiver.operations    | trio                    | server broker transfer protocol
    receiver.admin         | trio                    | broker transfer protocol server.uploads
    receiver.console       | tqdm                    | server broker transfer protocol
    receiver.commands      | trio                    | server broker transfer protocol
    receiver.options       |                         | server broker transfer protocol
    receiver.figures       | prometheus_client       | all
    receiver.link          | trio pika               | server transfer protocol
    receiver.room          | trio                    | all
    receiver.problems      |                         | all but receiver
    receiver.files         |                         | server broker transfer
    receiver.handover      |                         | server broker transfer protocol
    receiver.places        |                         | server broker transfer protocol
    receiver.quarantine    |                         | server broker transfer protocol
    receiver.pending       |                         | server broker transfer protocol
    receiver.ledger        |                         | server broker transfer protocol
    receiver.staging       |                         | server broker transfer
    receiver.receipts      |                         | server broker transfer protocol
    receiver.names         |                         | server broker transfer protocol
    receiver.offsets       |                         | all
    receiver.disk          |                         | all
    receiver               |                         | server broker transfer
    receiver.sink          |                         | server broker transfer protocol.wire
    receiver.settlement    |                         | all but model
                           |                         |
    server.listeners       | trio                    | broker transfer protocol
    server.admin           | trio prometheus_client  | broker transfer protocol
    server.handler         | trio                    | broker
    server.pages           | trio prometheus_client  | broker transfer protocol server.uploads
    server.overflow        | trio                    | broker transfer protocol server.uploads
    server.tls             | trio                    | broker transfer protocol
    server.connection      | trio h11                | broker transfer
    server.tls_stream      | trio                    | all
    server.uploads         | trio                    | broker transfer protocol
    server.idle            | trio                    | all
    server.status          |                         | all but server.responses
    server.pace            | trio                    | all
    server.idempotency     |                         | broker transfer
    server.responses       |                         | broker transfer protocol
    server.identity        |                         | all but server.tokens config values errors
    server.tokens          |                         | all but config values
                           |                         |
    broker.pool            | trio                    | transfer protocol
    broker.publisher       | trio pika               | transfer
    broker.publication     | trio                    | transfer
    broker.abort           | trio                    | transfer
    broker.rejection       | trio                    | transfer protocol
    broker.routes          | trio                    | transfer
    broker.queues          |                         | transfer protocol
    broker.session         | trio pika               | transfer
    broker.connect         | trio pika               | all but tls backoff config errors
    broker.adapter         | trio pika               | all but tls
    broker.content_header  | pika                    | all but protocol.wire
    broker.figures         | prometheus_client       | all but protocol.confirms
    broker.window          |                         | all
                           |                         |
    transfer               | trio                    | logs config
    tls                    | trio                    | all but config
    systemd                | trio                    | all
    waits                  | trio                    | all
    logs                   |                         | all but journal config
    journal                |                         | all
    config                 |                         | all but values
    values                 |                         | all
    backoff                |                         | all
                           |                         |
    protocol.request       | http_sf                 | protocol.wire protocol.confirms
    protocol.digest_fields | http_sf                 | protocol.wire protocol.confirms
    protocol.form_data     | multipart               | protocol.wire protocol.confirms
    protocol.disposition   | multipart               | all but protocol.head errors
    protocol.chunked       |                         | all but protocol.head errors
    protocol.target        |                         | all but protocol.head errors
    protocol.trace_context |                         | all
    protocol.head          |                         | all but errors
    protocol.reassembly    |                         | all but protocol.framing protocol.crc model
    protocol.framing       |                         | all but protocol.crc model
    protocol.crc           | google_crc32c           | all
    protocol.wire          |                         | all but model
    protocol.confirms      |                         | all
                           |                         |
    errors                 |                         | all
    model                  |                         | all
"""

PURE = ("protocol", "errors", "model")
"""No I/O, no clock, no chance, no thread, no log: all that these do follows from their input."""

IMPURE = (
    *("asyncio", "concurrent", "http.client", "http.server", "io", "logging", "multiprocessing"),
    *("os", "pathlib", "queue", "random", "secrets", "select", "selectors", "shutil", "signal"),
    *("socket", "socketserver", "ssl", "subprocess", "sys", "tempfile", "threading", "time"),
    *("datetime", "urllib.request", "warnings"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table: the greater its depth, the further down it stands."""

    depth: int
    third_party: tuple[str, ...]
    unknown: tuple[str, ...]
    exceptions: tuple[str, ...]

    def must_not_know(self, module: str) -> bool:
        hit = self.unknown == ("all",) or within(module, self.unknown)
        return hit and not within(module, self.exceptions)


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the packages, or in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def parse_table() -> dict[str, Row]:
    rows = {}
    for depth, line in enumerate(TABLE.strip().splitlines()[2:]):
        module, third_party, unknown = (cell.strip() for cell in line.split("|"))
        if module:
            refused, _, exceptions = unknown.partition(" but ")
            rows[module] = Row(
                depth,
                tuple(third_party.split()),
                tuple(refused.split()),
                tuple(exceptions.split()),
            )
    return rows


ROWS = parse_table()


def module_files() -> dict[str, Path]:
    """Every module by its name below ``relay``, the root itself left out."""
    root = Path(relay.__file__).parent
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del files[""]
    return files


FILES = module_files()


def imports(module: str, source: str) -> Iterator[str]:
    """Absolute dotted names of what a module imports: ``relay.broker.session``, ``trio``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relay/{module}: relative imports hide where they point"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("relay.") in ROWS.keys() | FILES.keys()
                yield full if is_module else str(node.module)


def offences(module: str, source: str) -> list[str]:
    """What a module's imports do against the table, one sentence each."""
    return [
        f"{module} imports {name}: {reason}"
        for name in imports(module, source)
        if (reason := offence(module, name)) is not None
    ]


def offence(module: str, name: str) -> str | None:
    row = ROWS.get(module)
    if row is None:
        return "a package without a row imports nothing"
    top, _, below = name.partition(".")
    if top == "relay":
        return inner_offence(row, below) if below else None
    if top not in sys.stdlib_module_names:
        return None if top in row.third_party else "that package is not in its row"
    impure = within(module, PURE) and within(name, IMPURE)
    return "protocol code has neither I/O nor a clock" if impure else None


def inner_offence(row: Row, target: str) -> str | None:
    if target not in ROWS:
        return "that has no row; import the module that is meant"
    if ROWS[target].depth <= row.depth:
        return "imports point down only"
    return "that it must not know" if row.must_not_know(target) else None


def is_package(module: str) -> bool:
    return FILES[module].name == "__init__.py"


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    assert module in ROWS or is_package(module), (
        f"relay/{module} is new: give it a row in this file's table, where its imports point down"
    )
    assert offences(module, FILES[module].read_text()) == []


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_has_the_name_of_one_that_is_not_ours(module: str) -> None:
    name = module.rpartition(".")[2]
    third_party = {package for row in ROWS.values() for package in row.third_party}
    assert name == "__main__" or name not in sys.stdlib_module_names | third_party


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("protocol.framing", "import trio"),
        ("protocol.wire", "from pika.spec import BasicProperties"),
        ("protocol.request", "import h11"),
        ("protocol.confirms", "from time import monotonic"),
        ("protocol.confirms", "import socket"),
        ("protocol.reassembly", "import logging"),
        ("protocol.framing", "from relay.errors import TooLarge"),
        ("protocol.request", "from relay import transfer"),
        ("transfer", "import h11"),
        ("transfer", "from relay.broker.publisher import Publisher"),
        ("server.handler", "from relay.broker import publisher"),
        ("server.connection", "def late():\n    import relay.server.handler"),
        ("server.handler", "import pika"),
        ("broker.session", "import h11"),
        ("broker.session", "from relay.broker import Publisher"),
        ("receiver.consumer", "from relay.server.responses import problem"),
        ("daemon", "import pika"),
        ("client.exchange", "from relay.daemon import serve"),
        ("config", "from relay.errors import RelayError"),
        ("broker", "from relay.broker.session import Session"),
    ],
)
def test_an_import_against_the_table_is_found(module: str, source: str) -> None:
    assert len(offences(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli", "from relay import __version__, daemon"),
        ("daemon", "import trio\nfrom relay.server import handler, listeners"),
        ("server.connection", "import h11\nfrom http import HTTPStatus"),
        ("broker.publisher", "from relay.protocol.wire import Message"),
        ("protocol.disposition", "from urllib.parse import unquote_to_bytes"),
    ],
)
def test_an_import_within_the_table_is_left_alone(module: str, source: str) -> None:
    assert offences(module, source) == []
