"""What is sent: from paths to parts, and from parts to the bytes of a request's body.

A body is the same bytes each time it is read, or it is an error: a file that changes while it is
sent must not pass for a whole one. One block is in memory at a time. What becomes of the bytes,
this module does not know.
"""

import mimetypes
import os
import secrets
import stat
from base64 import b64encode
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO, Final
from urllib.parse import quote

import trio

from relay.client.exchange import Unsendable
from relay.config import ConfigError
from relay.model import PartTail
from relay.protocol.crc import extend
from relay.protocol.disposition import disposition_params
from relay.protocol.framing import ALGORITHMS

BLOCK: Final = 256 * 1024
"""Bytes read and sent at once."""

STDIN: Final = "-"

_ATTR_CHARS: Final = "!#$&+^`|"
"""What RFC 8187 leaves as it is, beside letters, digits and what ``quote`` never touches."""

# Not the system's tables: the same file has the same type wherever it is sent from.
_TYPES: Final = mimetypes.MimeTypes()
_ANY_TYPE: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One part, as the command line names it.

    Attributes:
        path: of a regular file, or STDIN.
        filename: what consumers are told; None for nothing.
        size: bytes when it was found; None for standard input.
    """

    path: str
    filename: str | None
    size: int | None


def find(paths: Sequence[str], *, stdin_name: str | None = None) -> list[Item]:
    """The regular files that paths name, directories walked in order of names.

    Symbolic links are followed where a path itself is one, and nowhere below.

    Raises:
        ConfigError: naming a path that is missing or cannot be read, or holds nothing.
    """
    items: list[Item] = []
    for path in paths:
        if path == STDIN:
            if any(item.path == STDIN for item in items):
                raise ConfigError("standard input (-) can be sent once")
            items.append(Item(path=STDIN, filename=stdin_name, size=None))
        elif os.path.isdir(path):
            items += _walk(path)
        else:
            items.append(_item(path, os.path.basename(path)))
    return items


def _walk(top: str) -> Iterator[Item]:
    def fail(error: OSError) -> None:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error

    is_empty = True
    for directory, names, files in os.walk(top, onerror=fail):
        names.sort()
        for name in sorted(files):
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                is_empty = False
                yield _item(path, PurePath(path).relative_to(top).as_posix())
    if is_empty:
        raise ConfigError(f"{top}: holds no regular file")


def _item(path: str, name: str) -> Item:
    try:
        found = os.stat(path)
        is_regular = stat.S_ISREG(found.st_mode)
        if is_regular:
            with open(path, "rb"):
                pass
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"{path}: {reason}") from exc
    if not is_regular:
        raise ConfigError(f"{path}: neither a regular file nor a directory; - is standard input")
    # Names are UTF-8 in frames, whatever they are on this disk.
    filename = os.fsencode(name).decode("utf-8", "replace")
    return Item(path=path, filename=filename, size=found.st_size)


class Reading:
    """One reading of a payload.

    Attributes:
        size: bytes of parts read so far.
        tails: of the parts that have been read, in order.
        blocks: what is still to be read; an empty one means that standard input comes next.
    """

    def __init__(self) -> None:
        self.size = 0
        self.tails: list[PartTail] = []
        self.blocks: Generator[bytes, None, None] = _nothing()
        self._waits = False

    async def read(self) -> bytes:
        """The next block; empty at the end.

        Cancelling it loses nothing. Files are read in the event loop's own thread: another costs
        more than the page cache does, and a disk that hangs would hang both.

        Raises:
            Unsendable: a file cannot be read, or is not what it was.
        """
        while True:
            if self._waits:
                await _wait_stdin()
                self._waits = False
            block = next(self.blocks, None)
            if block is None:
                return b""
            if block:
                return block
            self._waits = True

    def close(self) -> None:
        """Close what is open."""
        self.blocks.close()


class Payload:
    """The body of one transfer: a raw part, or a form.

    Attributes:
        length: bytes; None if standard input is in it, and before ``prepare``.
        wanted: digests of each part beside crc32c.
        given: of a raw part from a file, after ``prepare``: algorithm to lower-case hex.
        is_spent: standard input has been read from, which nobody can do again.
    """

    def __init__(
        self, items: Sequence[Item], *, form_field: str | None, wanted: Sequence[str] = ()
    ) -> None:
        """``form_field`` None: the one item is a raw part. ``wanted``: keys of ALGORITHMS."""
        self.items = items
        self.length: int | None = None
        self.wanted = tuple(wanted)
        self.given: dict[str, str] = {}
        self.is_spent = False
        self._is_form = form_field is not None
        self._boundary = f"relay-{secrets.token_hex(16)}"
        self._stats: dict[str, os.stat_result] = {}
        self._heads = [self._part_head(form_field, item) for item in items]
        self._has_stdin = any(item.path == STDIN for item in items)

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Header fields that describe the body."""
        fields = [("Want-Repr-Digest", f"{name}=1") for name in self.wanted]
        if self._is_form:
            return [("Content-Type", f"multipart/form-data; boundary={self._boundary}"), *fields]
        (item,) = self.items
        fields.append(("Content-Type", _media_type(item.filename)))
        if item.filename is not None:
            fields.append(("Content-Disposition", f"attachment{_extended(item.filename)}"))
        for name, digest in self.given.items():
            encoded = b64encode(bytes.fromhex(digest)).decode("ascii")
            fields.append(("Repr-Digest", f"{name}=:{encoded}:"))
        return fields

    async def prepare(self) -> None:
        """Note sizes, from when on a change is an error; digest a raw part from a file.

        Raises:
            Unsendable: a file cannot be read.
        """
        try:
            for item in self.items:
                if item.path != STDIN:
                    self._stats[item.path] = os.stat(item.path)
        except OSError as exc:
            raise Unsendable(f"cannot be read: {exc.strerror}") from exc
        if self._has_stdin:
            return
        self.length = sum(self._stats[item.path].st_size for item in self.items)
        if self._is_form:
            self.length += sum(map(len, self._heads)) + 2 * len(self.items) + len(self._closing)
        elif self.wanted:
            with closing(self.open()) as reading:
                while await reading.read():
                    await trio.lowlevel.checkpoint()
            (tail,) = reading.tails
            self.given = {name: tail.digest[name] for name in self.wanted}

    def open(self) -> Reading:
        """Begin to read the body."""
        reading = Reading()
        # What was digested before need not be digested again: the server compares.
        algorithms = () if self.given else self.wanted
        reading.blocks = self._blocks(reading, algorithms)
        return reading

    def sent(self, reading: Reading) -> list[PartTail]:
        """Sizes and digests of the parts, after their end."""
        return [PartTail(tail.size, {**tail.digest, **self.given}) for tail in reading.tails]

    # --- bytes ---------------------------------------------------------------------------------

    def _blocks(self, reading: Reading, algorithms: Sequence[str]) -> Generator[bytes, None, None]:
        for item, head in zip(self.items, self._heads, strict=True):
            if head:
                yield head
            try:
                yield from self._part(item, reading, algorithms)
            except OSError as exc:
                raise Unsendable(f"cannot be read: {exc.strerror}") from exc
            if self._is_form:
                yield b"\r\n"
        if self._is_form:
            yield self._closing

    def _part(self, item: Item, reading: Reading, algorithms: Sequence[str]) -> Iterator[bytes]:
        size = crc = 0
        hashes = {name: ALGORITHMS[name]() for name in algorithms}
        for block in self._stdin() if item.path == STDIN else self._file(item.path):
            if not block:
                yield b""
                continue
            size += len(block)
            reading.size += len(block)
            crc = extend(crc, block)
            for hash_ in hashes.values():
                hash_.update(block)
            yield block
        digest = {"crc32c": f"{crc:08x}"}
        digest.update((name, hash_.hexdigest()) for name, hash_ in hashes.items())
        reading.tails.append(PartTail(size, digest))

    def _stdin(self) -> Iterator[bytes]:
        while True:
            yield b""
            self.is_spent = True
            try:
                block = os.read(0, BLOCK)
            except BlockingIOError:
                continue
            if not block:
                return
            yield block

    def _file(self, path: str) -> Iterator[bytes]:
        """A file's blocks, the last one only if the file is still what it was."""
        then = self._stats[path]
        left = then.st_size
        with open(path, "rb", buffering=0) as file:
            _check_same(file, then)
            while left:
                block = file.read(min(BLOCK, left))
                left -= len(block)
                if not left or not block:
                    _check_same(file, then, at_end=True)
                yield block
            if not then.st_size:
                _check_same(file, then, at_end=True)

    @property
    def _closing(self) -> bytes:
        return f"--{self._boundary}--\r\n".encode("ascii")

    def _part_head(self, form_field: str | None, item: Item) -> bytes:
        if form_field is None:
            return b""
        disposition = "form-data" + _parameter("name", form_field)
        if item.filename is not None:
            disposition += _parameter("filename", item.filename)
        lines = [f"--{self._boundary}", f"Content-Disposition: {disposition}"]
        lines.append(f"Content-Type: {_media_type(item.filename)}")
        return "\r\n".join([*lines, "", ""]).encode()


def _nothing() -> Generator[bytes, None, None]:
    yield from ()


async def _wait_stdin() -> None:
    try:
        await trio.lowlevel.wait_readable(0)
    except PermissionError:
        # A regular file, or a device like /dev/null: always ready, says epoll(7).
        return
    except OSError as exc:
        raise Unsendable(f"cannot be read: {exc.strerror}") from exc


def _check_same(file: BinaryIO, then: os.stat_result, *, at_end: bool = False) -> None:
    """Refuse a file that was written to, or that does not end where it did."""
    now = os.fstat(file.fileno())
    same = (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
    if not same or (at_end and (file.tell() != then.st_size or file.read(1))):
        raise Unsendable("changed while it was sent")


def _media_type(filename: str | None) -> str:
    # Of the suffix alone: a whole name is taken for a URL.
    suffix = PurePath(filename or "").suffix
    kind, encoding = _TYPES.guess_type(f"x{suffix}")
    return _ANY_TYPE if kind is None or encoding else kind


def _parameter(key: str, text: str) -> str:
    """``; key="text"`` as browsers write it.

    They escape quotes and line breaks as %22, %0D and %0A, but not the percent sign: what would be
    read otherwise goes in the extended form of RFC 8187.
    """
    escaped = text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    plain = f'; {key}="{escaped}"'
    try:
        is_clear = getattr(disposition_params(f"form-data{plain}"), key) == text
    except ValueError:
        is_clear = False
    return plain if is_clear else _extended(text, key)


def _extended(text: str, key: str = "filename") -> str:
    return f"; {key}*=UTF-8''{quote(text, safe=_ATTR_CHARS)}"
