"""Part bytes to frames: cuts, numbers, checks and digests what a transfer consists of.

Pure: a loop feeds it and sends what comes out. It holds at most one frame's bytes. Two rules
shape it. A frame goes out only when it is known whether it is the last of its part, so a full
frame waits for the next byte or the part's end. And the last frame of a part waits for the next
part or the transfer's end, because the very last one is the commit frame, which must go out
after all others are confirmed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Protocol

from relay.model import Frame, PartHead, PartReceipt, PartTail, Receipt, Totals, Transfer
from relay.protocol.crc import crc32c, extend, join


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


ALGORITHMS: Final[Mapping[str, Callable[[], _Hash]]] = {
    "sha-256": hashlib.sha256,
    "sha-512": hashlib.sha512,
}
"""Digests that may be asked for, by their names in the HTTP registry (RFC 9530, section 5)."""

RECEIPT_TEXT: Final = 16 * 1024
"""Characters of names and types in a receipt. It is kept until the upload ends, and each of the
parts it lists may have names of some KiB."""


class PartDigest:
    """Size and digests of one part, fed frame by frame; used by both ends."""

    def __init__(self, algorithms: Sequence[str] = ()) -> None:
        """``algorithms`` are keys of ALGORITHMS; crc32c is always computed."""
        self.size = 0
        self._crc = 0
        self._frame_size = 0
        self._hashes = {name: ALGORITHMS[name]() for name in algorithms}

    def update(self, body: bytes, crc: int) -> None:
        """Add a frame's body, whose crc32c the caller knows already."""
        size = len(body)
        if self.size == 0:
            self._crc, self._frame_size = crc, size
        elif size == self._frame_size:
            self._crc = join(self._crc, crc, size)
        else:  # a last frame: its size is too rare to be worth a table
            self._crc = extend(self._crc, body)
        self.size += size
        for hash_ in self._hashes.values():
            hash_.update(body)

    def tail(self) -> PartTail:
        """Size and digests so far."""
        digest = {"crc32c": f"{self._crc:08x}"}
        digest.update((name, hash_.hexdigest()) for name, hash_ in self._hashes.items())
        return PartTail(self.size, digest)


class Framer:
    """Turns the parts of one transfer into its frames.

    Call ``start_part``, ``feed`` any number of times and ``end_part`` for each part, then
    ``finish``. The iterators must be consumed before the next call.
    """

    def __init__(
        self,
        transfer: Transfer,
        *,
        frame_size: int,
        digests: Sequence[str] = (),
        receipt_parts: int = 100,
    ) -> None:
        """Frames of ``frame_size`` bytes; ``digests`` beside crc32c, keys of ALGORITHMS.

        The receipt lists the first ``receipt_parts`` parts, fewer if their names are longer than
        RECEIPT_TEXT together, and counts the rest.
        """
        self.transfer = transfer
        self._frame_size = frame_size
        self._digests = tuple(digests)
        self._receipt_parts = receipt_parts
        self._seq = 0
        self._size = 0
        self._parts = 0
        self._receipts: list[PartReceipt] = []
        self._receipt_text = RECEIPT_TEXT
        # Of the part in progress:
        self._carry = bytearray()
        self._head: PartHead | None = None
        self._digest = PartDigest()
        self._first_seq = 0
        # The last frame of the part before, until it is known whether it is the commit frame:
        self._held: Frame | None = None

    @property
    def size(self) -> int:
        """Bytes of all frames cut so far."""
        return self._size

    @property
    def frames(self) -> int:
        """Number of frames cut so far, the one held back included."""
        return self._seq

    def start_part(self, head: PartHead) -> Iterator[Frame]:
        """Begin a part. Yields the last frame of the part before, if there was one."""
        if self._held is not None:
            held, self._held = self._held, None
            yield held
        self._head = head
        self._digest = PartDigest(self._digests)
        self._first_seq = self._seq

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add bytes to the part. Yields each frame that is full and not the part's last."""
        size = self._frame_size
        carry = self._carry
        if len(carry) + len(data) <= size:
            carry += data
            return
        # Joining the carry and the slice that completes it copies each byte once, and gives
        # the immutable object of exact size that the checksum and the send queue want.
        cut = size - len(carry)
        view = memoryview(data)
        yield self._cut(b"".join((carry, view[:cut])))
        while len(data) - cut > size:
            yield self._cut(data[cut : cut + size])
            cut += size
        self._carry = bytearray(view[cut:])

    def end_part(self) -> PartReceipt:
        """End the part; its last frame is held back. Returns what the receipt says of it."""
        assert self._head is not None
        head = self._head
        body, self._carry = bytes(self._carry), bytearray()
        self._held = self._cut(body, last=True)
        assert self._held.tail is not None
        receipt = PartReceipt(
            part=self._parts, head=head, tail=self._held.tail, frames=self._seq - self._first_seq
        )
        self._list(receipt)
        return receipt

    def finish(self) -> tuple[Frame, Receipt]:
        """The commit frame, and the receipt that is true once it is confirmed.

        At least one part must have ended.
        """
        assert self._held is not None, "a transfer has at least one part"
        held, self._held = self._held, None
        totals = Totals(self._seq, self._parts, self._size)
        frame = Frame(
            held.transfer,
            held.seq,
            held.part,
            held.offset,
            held.body,
            held.crc32c,
            held.head,
            held.tail,
            totals,
        )
        parts = tuple(self._receipts)
        return frame, Receipt(
            transfer=self.transfer,
            totals=totals,
            parts=parts,
            parts_omitted=self._parts - len(parts),
        )

    def _list(self, receipt: PartReceipt) -> None:
        head = receipt.head
        texts = (head.name, head.filename, head.content_type)
        self._receipt_text -= sum(len(text) for text in texts if text)
        # Once one was left out, all that follow are: a receipt lists the first parts.
        if self._receipt_text >= 0 and self._parts < self._receipt_parts:
            self._receipts.append(receipt)
        self._parts += 1

    def _cut(self, body: bytes, *, last: bool = False) -> Frame:
        crc = crc32c(body)
        offset = self._digest.size
        self._digest.update(body, crc)
        head = self._head if offset == 0 else None
        tail = self._digest.tail() if last else None
        frame = Frame(self.transfer, self._seq, self._parts, offset, body, crc, head, tail)
        self._seq += 1
        self._size += len(body)
        return frame
