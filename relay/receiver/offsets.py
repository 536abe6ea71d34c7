"""How far streams have been received, in a file, so that a restart goes on from there.

A stream keeps its messages whatever is acked: where to begin is the consumer's to know. The file
holds, for each queue, the offset of the last message that is safe, and a digest of it: a queue
that was deleted and declared again has other messages at the same offsets, and an offset that it
has not reached yet would be waited for in silence. It does not know what a message carries.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

NAME: Final = "offset"
NEW_NAME: Final = "offset.new"
"""The file, and what is to replace it."""

_REPLACE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Bookmark:
    """The last message of a stream that is safe.

    Attributes:
        offset: of the message.
        digest: as ``message_digest`` has it.
    """

    offset: int
    digest: str


class Resumed(Enum):
    """What the first delivery says about the place where a stream goes on."""

    KNOWN = "known"
    """It is the message of the bookmark, and to be skipped."""
    CUT = "cut"
    """The message of the bookmark is gone, and perhaps others after it."""
    OTHER = "other"
    """Another message has the bookmark's offset: this is another stream."""


def message_digest(message_id: str | None, body: bytes) -> str:
    """What tells one message from another at the same offset: 32 hex digits."""
    digest = hashlib.blake2b(json.dumps(message_id).encode("ascii"), digest_size=16)
    digest.update(body)
    return digest.hexdigest()


def resumed(bookmark: Bookmark, found: Bookmark) -> Resumed:
    """Compare where it should go on with the first delivery, asked for at ``bookmark``."""
    if found.offset > bookmark.offset:
        return Resumed.CUT
    return Resumed.KNOWN if found == bookmark else Resumed.OTHER


class OffsetFile:
    """The file ``offset`` in a directory; it comes into being with the first ``save``."""

    def __init__(self, directory: Path) -> None:
        """``directory`` must exist when the file is read or written."""
        self._directory = directory

    @property
    def path(self) -> Path:
        """The file."""
        return self._directory / NAME

    def load(self, stream: str) -> Bookmark | None:
        """Where ``stream`` goes on; None if it was never received.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not such a file.
        """
        entry = self._entries().get(stream)
        if entry is None:
            return None
        if not isinstance(entry, dict):
            raise ValueError("an entry is no object")
        offset, digest = entry.get("last"), entry.get("digest")
        if not isinstance(offset, int) or not isinstance(digest, str):
            raise ValueError("an entry has no offset, or no digest")
        return Bookmark(offset, digest)

    def save(self, stream: str, bookmark: Bookmark) -> None:
        """Note where ``stream`` goes on; it survives a crash when this returns.

        Raises:
            OSError: it cannot be written.
        """
        entries = self._entries()
        entries[stream] = {"last": bookmark.offset, "digest": bookmark.digest}
        text = json.dumps(entries, indent=1) + "\n"
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            file = os.open(NEW_NAME, _REPLACE, 0o600, dir_fd=directory)
            with os.fdopen(file, "w", encoding="ascii") as new:
                new.write(text)
                new.flush()
                os.fdatasync(new.fileno())
            os.rename(NEW_NAME, NAME, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        finally:
            os.close(directory)

    def _entries(self) -> dict[str, object]:
        try:
            entries = json.loads((self._directory / NAME).read_text(encoding="ascii"))
        except FileNotFoundError:
            return {}
        if not isinstance(entries, dict):
            raise ValueError("it is no JSON object")
        return entries
