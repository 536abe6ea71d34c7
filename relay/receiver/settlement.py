"""What a ``Receiver`` answers: which deliveries to ack and to reject, and what to tell people.

Values only; they know no AMQP library, and no sink.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from relay.model import Totals, Transfer


@dataclass(frozen=True, slots=True)
class Delivered:
    """A transfer that the sink has committed. Told at least once, after a crash perhaps twice."""

    transfer: Transfer
    totals: Totals
    where: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that an operator should know; its text is one line for people.

    Attributes:
        kind: one of a few words, for programs: ``not-a-frame``, ``stray``, ``aborted``,
            ``expired``, ``repeated``, or a ``reassembly.Fault``.
        detail: the line without the transfer.
        transfer_id: None if the message told none.
    """

    kind: str
    detail: str
    transfer_id: str | None = None

    def __str__(self) -> str:
        of = "" if self.transfer_id is None else f"transfer {self.transfer_id} "
        return of + self.detail


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of the deliveries fed so far. Do to the channel what it says: reject, then ack.

    Without ``held``, each delivery that was ever fed is settled by now, so that
    ``basic_ack(max(ack), multiple=True)``, after the rejects, does the same as one ack for each.
    With it, ack one by one. On a channel that is gone it has no effect, and need have none: what
    was not settled comes again, and is acked as a duplicate.

    Attributes:
        ack: delivery tags to acknowledge, ascending.
        reject: delivery tags to reject without requeueing, which dead-letters them, each with
            the reason, one line for people.
        delivered: transfers that are complete.
        problems: what went wrong, each told once.
        rejected: how many of ``reject`` there are of each kind: a ``Problem``'s, or ``late`` for
            frames of a transfer that had failed before.
        held: number of deliveries that must wait for the end of their transfer. Always 0 if the
            sink has a ``save``.
    """

    ack: tuple[int, ...]
    reject: Mapping[int, str]
    delivered: tuple[Delivered, ...]
    problems: tuple[Problem, ...]
    rejected: Mapping[str, int] = field(default_factory=dict)
    held: int = 0
