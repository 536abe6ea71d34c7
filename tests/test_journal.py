"""The journal's native protocol, as journald reads it from its socket."""

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.journal import Journal, is_standard_error


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def journald(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.setblocking(False)
        yield server


@pytest.fixture
def journal(path: str) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def test_an_entry_is_one_datagram_of_fields(journald: socket.socket, journal: Journal) -> None:
    assert journal.send({"MESSAGE": "upload committed", "relay_bytes": "5", "PRIORITY": "6"})
    assert journald.recv(1000) == b"MESSAGE=upload committed\nRELAY_BYTES=5\nPRIORITY=6\n"


def test_a_value_of_several_lines_has_its_length_before_it(
    journald: socket.socket, journal: Journal
) -> None:
    assert journal.send({"TRACEBACK": "one\nPRIORITY=0\nzoë"})
    text = "one\nPRIORITY=0\nzoë".encode()
    assert journald.recv(1000) == b"TRACEBACK\n" + struct.pack("<Q", len(text)) + text + b"\n"


@pytest.mark.parametrize(
    ("name", "field"),
    [("waited_for", b"WAITED_FOR"), ("_x-y.z", b"X_Y_Z"), ("1a", b"A"), ("é" * 3 + "A", b"A")],
)
def test_names_are_what_journald_accepts(
    name: str, field: bytes, journald: socket.socket, journal: Journal
) -> None:
    assert journal.send({name: "v"})
    assert journald.recv(1000) == field + b"=v\n"


def test_what_is_not_taken_is_told_to_the_caller_and_nothing_waits(
    path: str, journal: Journal
) -> None:
    assert not journal.send({"MESSAGE": "nobody listens"})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        assert not journal.send({"MESSAGE": "x" * 10_000_000})
        while journal.send({"MESSAGE": "y" * 1000}):
            pass
        # journald has read again.
        while True:
            server.recv(1000)
            if journal.send({"MESSAGE": "z"}):
                break


def test_standard_error_is_the_journal_only_if_it_is_that_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        status = os.fstat(file.fileno())
        assert is_standard_error(f"{status.st_dev}:{status.st_ino}", file.fileno())
        assert not is_standard_error(f"{status.st_dev}:{status.st_ino + 1}", file.fileno())
        assert not is_standard_error("", file.fileno())
    assert not is_standard_error("1:1", 987)
