"""Where in a stream to go on, found when a connection begins and noted as it goes.

It knows deliveries and offsets, and neither what they carry nor where that goes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from relay.receiver.link import Delivery, Link
from relay.receiver.offsets import Bookmark, OffsetFile, Resumed, message_digest, resumed


class AnotherStream(Exception):
    """The queue is not the stream that was received before; the text says what to do."""


class StreamOffset:
    """How far one consumer has come in one stream."""

    def __init__(
        self, file: OffsetFile, stream: str, begin: str | int, say: Callable[[str], None]
    ) -> None:
        """Makes one that has read nothing yet.

        Args:
            file: where places are noted.
            stream: what this one is noted under.
            begin: where to begin if the file has no place: ``first``, ``next`` or an offset.
            say: tells people.
        """
        self._file = file
        self._stream = stream
        self._begin = begin
        self._say = say
        self._bookmark: Bookmark | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    async def load(self) -> str | int:
        """Returns what to ask for: the last message that is safe, so that it can be recognised.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is another file.
        """
        self._bookmark = await trio.to_thread.run_sync(self._file.load, self._stream)
        return self._begin if self._bookmark is None else self._bookmark.offset

    async def find(self, link: Link, timeout: float) -> None:
        """See that the stream goes on where it is expected to, and drop the link if it does not.

        Raises:
            AnotherStream: other messages are there.
        """
        bookmark = self._bookmark
        if bookmark is None:
            return
        with trio.move_on_after(timeout):
            await link.wait_until(lambda: bool(link.deliveries))
        if not link.deliveries:
            link.drop(
                f"nothing comes from offset {bookmark.offset} of stream {self._stream}, up to which"
                f" it was received; if it was deleted and made anew, remove {self.path}"
            )
            return
        found = await trio.to_thread.run_sync(_bookmark, link.deliveries[0])
        match resumed(bookmark, found):
            case Resumed.KNOWN:
                link.skip(link.take(1)[0])
            case Resumed.CUT:
                # Offsets may have small gaps of their own; here a message is known to be gone.
                self._say(
                    f"stream {self._stream} begins at offset {found.offset}, and was received up"
                    f" to {bookmark.offset}: retention may have removed what is in between"
                )
            case Resumed.OTHER:
                raise AnotherStream(
                    f"stream {self._stream} is not the one that was received before: another"
                    f" message is at offset {bookmark.offset}; remove {self.path} to receive it"
                )

    def see(self, delivery: Delivery) -> None:
        """Begin there, no longer at the end, should the first place never be noted."""
        if self._begin == "next" and delivery.offset is not None:
            self._begin = delivery.offset

    async def note(self, safe: Sequence[Delivery]) -> None:
        """Note that these, and all before them, are safe.

        Raises:
            OSError: the file cannot be written.
        """
        # One without an offset has headers that cannot be read; it comes again after a restart.
        known = next((delivery for delivery in reversed(safe) if delivery.offset is not None), None)
        if known is not None:
            bookmark = await trio.to_thread.run_sync(_bookmark, known)
            await trio.to_thread.run_sync(self._file.save, self._stream, bookmark)


def _bookmark(delivery: Delivery) -> Bookmark:
    offset = -1 if delivery.offset is None else delivery.offset
    return Bookmark(offset, message_digest(delivery.properties.message_id, delivery.body))
