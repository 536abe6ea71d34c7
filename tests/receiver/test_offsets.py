"""How far streams have been received: noted atomically, recognised, never guessed."""

import os
from pathlib import Path

import pytest

from relay.receiver.offsets import (
    NAME,
    NEW_NAME,
    Bookmark,
    OffsetFile,
    Resumed,
    message_digest,
    resumed,
)


def test_each_stream_has_its_own_place(tmp_path: Path) -> None:
    file = OffsetFile(tmp_path)
    assert file.load("//a") is None
    file.save("//a", Bookmark(7, "x"))
    file.save("//b", Bookmark(2**62, "y"))
    file.save("//a", Bookmark(8, "z"))
    again = OffsetFile(tmp_path)
    assert again.load("//a") == Bookmark(8, "z")
    assert again.load("//b") == Bookmark(2**62, "y")
    assert again.load("//c") is None
    assert os.listdir(tmp_path) == [NAME]


def test_what_a_crash_left_beside_it_does_not_count(tmp_path: Path) -> None:
    file = OffsetFile(tmp_path)
    file.save("//a", Bookmark(7, "x"))
    (tmp_path / NEW_NAME).write_text("half a li")
    assert file.load("//a") == Bookmark(7, "x")
    file.save("//a", Bookmark(8, "x"))
    assert file.load("//a") == Bookmark(8, "x")


@pytest.mark.parametrize(
    "text", ["", "[]", "nonsense", '{"//a": 7}', '{"//a": {"last": "7", "digest": "x"}}']
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=r"."):
        OffsetFile(tmp_path).load("//a")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Bookmark(7, "x"), Resumed.KNOWN),
        (Bookmark(7, "y"), Resumed.OTHER),
        (Bookmark(6, "x"), Resumed.OTHER),
        (Bookmark(8, "x"), Resumed.CUT),
        (Bookmark(9, "x"), Resumed.CUT),
    ],
)
def test_the_first_delivery_tells_whether_it_is_the_same_stream(
    found: Bookmark, expected: Resumed
) -> None:
    assert resumed(Bookmark(7, "x"), found) is expected


def test_messages_differ_by_id_or_body() -> None:
    messages = [("a", b""), (None, b""), ("null", b""), ("a", b"x"), ("b", b"")]
    assert len({message_digest(*message) for message in messages}) == len(messages)
    assert message_digest("a", b"x") == message_digest("a", b"x")
