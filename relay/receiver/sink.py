"""What a ``Receiver`` needs of whoever takes the bytes: the ``Sink``, and what the two exchange.

What is here are promises, not doings. It knows no AMQP, and no acknowledgements.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from relay.model import PartHead, Totals, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.framing import PartDigest
from relay.protocol.reassembly import PartEnded, Past, Position


class Refused(Exception):
    """The sink cannot take this transfer: only it fails, with this text as the reason."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """The sink's answer about a transfer that it has delivered already.

    Attributes:
        where: for people.
        key: its ``reassembly.key_digest``.
    """

    where: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class KnownKey:
    """The idempotency key of a transfer that was complete.

    Attributes:
        key: its ``reassembly.key_digest``.
        transfer_id: the transfer.
    """

    key: str
    transfer_id: str


class Sink(ABC):
    """Where the bytes of transfers go. Called by one thread at a time.

    What it is told of one transfer comes in this order; several transfers are interleaved:

        begin, unless it was recalled
        open_part, write any number of times, end_part: for each part, in turn
        commit, or abort, or aborted, or fail, or repeated: once, at any moment

    **What four methods promise.** A sink of ``open_part``, ``write``, ``commit`` and ``abort`` need
    not survive anything: deliveries are held back from acknowledging until their transfer has
    ended, and a crash makes them all come again, to a sink that starts from nothing. ``commit``
    must then be safe when it returns, and may be called for the same transfer again, once, if the
    crash came before the acks: let its effect be the same (key it by the transfer's id), or answer
    ``Earlier`` from ``recall``. The price: prefetch bounds what can be held, see ``max_held``.

    **What a sink that resumes promises.** Who overrides ``save`` gets transfers of any size, for
    deliveries are then acked as soon as ``save`` and ``flush`` have returned. So what was written
    must then survive a crash, with the position, and ``recall`` must bring both back: all in one
    database transaction, or the bytes synced before the position. ``end_part`` must ``verify`` what
    it has, for a digest cannot be continued from a part's middle. Such a sink may ``park``, too.

    All that are told a transfer's progress may raise ``Refused``, which fails that transfer. Other
    exceptions, such as OSError on a full disk, end the receiver: nothing is acked then whose bytes
    are not safe, and a new receiver, with a new sink, goes on from what comes again.
    """

    rereads: ClassVar[bool] = False
    """Whether ``end_part`` verifies, from the sink's own copy, digests left unchecked."""

    def begin(self, transfer: Transfer) -> None:  # noqa: B027  optional
        """A transfer begins, of which ``recall`` knew nothing. Its first part is next."""

    @abstractmethod
    def open_part(self, transfer_id: str, part: int, head: PartHead) -> None:
        """A part begins. The first part of a transfer makes the transfer known.

        Names in ``head`` are as the client sent them: never a path. Parts come in turn, so the one
        before, if any, has had its end.
        """

    @abstractmethod
    def write(self, transfer_id: str, body: bytes) -> None:
        """The next bytes of the part that is open: verified, in order, without gaps, never empty.

        They count for nothing before ``commit``: the client may yet give the upload up.
        """

    def end_part(self, ended: PartEnded) -> None:
        """The part that is open is complete. ``verify`` is what a sink that resumes does here.

        Raises:
            Refused: a digest does not match, or cannot be verified.
        """
        if ended.unchecked:
            raise Refused(f"digests of part {ended.part} cannot be verified")

    @abstractmethod
    def commit(self, transfer: Transfer, totals: Totals) -> str:
        """The transfer is complete: deliver it, all or nothing. Returns where to, for people.

        It may put off making this safe until ``flush``, if it has one.
        """

    @abstractmethod
    def abort(self, transfer_id: str) -> None:
        """Drop all that there is of the transfer, which may be nothing, or not known at all."""

    def aborted(self, transfer_id: str) -> None:
        """Its sender gave the transfer up: drop it.

        With ``flush``, who has a ``recall`` should make safe that it was: the acks come later, and
        the last frames of a transfer that nobody knows any more would be rejected.
        """
        self.abort(transfer_id)

    def fail(self, transfer_id: str, reason: str) -> None:
        """The transfer cannot be completed: drop it, or keep what there is of it for people."""
        self.abort(transfer_id)

    def repeated(self, transfer: Transfer) -> None:
        """The transfer is complete, but the same upload was delivered before: drop it.

        What there is of it may be needed until ``flush``, if the earlier one is not safe yet.
        """
        self.abort(transfer.id)

    def known_keys(self) -> Sequence[KnownKey]:
        """Keys of transfers that earlier processes delivered or dropped, oldest first."""
        return ()

    def save(self, transfer_id: str, position: Position) -> None:  # noqa: B027  optional
        """Make what was written of the transfer so far, and the position, safe from a crash.

        To override it is a promise, see above: the deliveries up to ``position`` are acked then.
        """

    def flush(self) -> None:  # noqa: B027  optional
        """Make what has ended since the last call safe from a crash."""

    def recall(self, transfer_id: str) -> Position | Earlier | Past | None:
        """What there is of a transfer that is not open: perhaps a crash's remains.

        Asked before the first frame of any transfer is looked at. The position must be one that
        was saved, with exactly the bytes before it; ``write`` goes on behind them. None also drops
        what may have been written without having been saved. ``Past.ABORTED`` and ``Past.REPEATED``
        have what comes of it dropped, and acked.
        """
        return None

    def park(self, transfer_id: str, position: Position) -> None:
        """Save the transfer and close it: the most silent one, to make room for another.

        Raises:
            Refused: this sink has no ``recall`` to bring it back.
        """
        raise Refused("too many transfers at once")

    def sweep(self, expire_after: float) -> list[str]:
        """Drop what is not open and was not touched for so many seconds.

        Called by each ``settle``. Returns the ids of those, and of others that the sink has dropped
        since the last call, because it had no room.
        """
        return []


def verify(ended: PartEnded, blocks: Iterable[bytes]) -> None:
    """Check a part's unchecked digests against the sink's own copy, given in blocks of any size.

    Reads no block if there is nothing to check.

    Raises:
        Refused: one does not match.
    """
    if not ended.unchecked:
        return
    digest = PartDigest([name for name in ended.unchecked if name != "crc32c"])
    for block in blocks:
        digest.update(block, crc32c(block))
    found = digest.tail().digest
    for name, expected in ended.unchecked.items():
        if found[name] != expected:
            raise Refused(f"{name} of part {ended.part} does not match")
