"""Publisher confirms of one channel: which delivery tag is which, and what became of it.

Pure bookkeeping: no socket, no clock. RabbitMQ numbers the messages published on a confirm
channel 1, 2, 3 … and settles each tag exactly once, alone or as part of a range, in any order
(https://www.rabbitmq.com/docs/confirms). A message that no queue took is first returned and then
acked, so an ack alone does not mean stored. When the channel or connection is lost, the outcome
of everything outstanding is *unknown*: neither acked nor nacked.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Outcome(Enum):
    """What the broker said of a message."""

    ACKED = "acked"
    NACKED = "nacked"
    RETURNED = "returned"


class UnknownDeliveryTag(Exception):
    """The broker settled a tag that is not outstanding: the books can no longer be trusted."""


class Confirms(Generic[Item]):
    """The book of one channel's outstanding messages, oldest first."""

    def __init__(self) -> None:
        self._last_tag = 0
        # Insertion order is tag order, which `multiple` and `lost` rely on.
        self._outstanding: dict[int, Item] = {}
        self._returned: set[int] = set()

    def __len__(self) -> int:
        return len(self._outstanding)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._outstanding.values())

    def register(self, item: Item) -> int:
        """Book ``item`` under the next delivery tag, which is returned.

        Call it before the message's bytes can leave: its confirm may arrive at once.
        """
        self._last_tag += 1
        self._outstanding[self._last_tag] = item
        return self._last_tag

    def mark_returned(self, matches: Callable[[Item], bool]) -> bool:
        """Note that the oldest outstanding item that ``matches`` was returned.

        basic.return carries no delivery tag; the item stays outstanding until its ack comes.
        Returns False if nothing matches.
        """
        for tag, item in self._outstanding.items():
            if tag not in self._returned and matches(item):
                self._returned.add(tag)
                return True
        return False

    def settle(self, tag: int, *, multiple: bool, acked: bool) -> list[tuple[Item, Outcome]]:
        """Take an ack or nack; return what it settled, oldest first.

        ``multiple`` settles everything up to and including ``tag``; with tag 0, everything.

        Raises:
            UnknownDeliveryTag: nothing outstanding answers to ``tag``.
        """
        if not multiple:
            if tag not in self._outstanding:
                raise UnknownDeliveryTag(f"delivery tag {tag} is not outstanding")
            return [self._take(tag, acked=acked)]
        if tag > self._last_tag:
            raise UnknownDeliveryTag(f"delivery tag {tag} was never published")
        settled = []
        while self._outstanding:
            oldest = next(iter(self._outstanding))
            if tag and oldest > tag:
                break
            settled.append(self._take(oldest, acked=acked))
        return settled

    def lost(self) -> list[Item]:
        """The channel is gone: forget and return what is outstanding, oldest first."""
        unknown = list(self._outstanding.values())
        self._outstanding.clear()
        self._returned.clear()
        return unknown

    def _take(self, tag: int, *, acked: bool) -> tuple[Item, Outcome]:
        item = self._outstanding.pop(tag)
        returned = tag in self._returned
        self._returned.discard(tag)
        if not acked:
            return item, Outcome.NACKED
        return item, Outcome.RETURNED if returned else Outcome.ACKED
