"""Idempotency keys: which are in use, and what those that succeeded were answered with.

A client that does not know what became of its upload sends it again under the same key
(draft-ietf-httpapi-idempotency-key-header). While the first is in progress the second is refused;
once it has succeeded, the second gets the first's receipt. A failed upload leaves no trace, so a
retry of it is an upload like any other; so is one whose outcome is unknown, and whose key has
been forgotten: consumers tell such transfers by the key in their frames.

A key belongs to one client and one route. Anonymous clients are one client. What is remembered is
bounded in keys and in bytes, the key that was not asked for longest goes first. Pure: it knows
neither clocks nor I/O, and nothing here waits.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from relay.errors import DigestMismatch, KeyInUse
from relay.model import PartHead, Receipt, Transfer
from relay.protocol.request import RequestHead
from relay.server.responses import Response

MAX_KEYS: Final = 8192
MAX_BYTES: Final = 16 * 1024 * 1024
"""What is remembered at most, in one daemon. A receipt of one part costs 2 KB."""

ENTRY_OVERHEAD: Final = 1280
"""Bytes that a key costs beside its receipt and texts: objects and tables, as tracemalloc sees."""

REPLAYED: Final = {"Idempotency-Replayed": "true"}
"""Tells a receipt of an earlier request from one of this request."""


_NOTHING: Final = nullcontext()


class Key(NamedTuple):
    """What an idempotency key is unique within, and the key."""

    client: str | None
    route: str
    key: str


def key_of(transfer: Transfer) -> Key | None:
    """The transfer's key; None if its client sent none."""
    if transfer.idempotency_key is None:
        return None
    return Key(transfer.client, transfer.route, transfer.idempotency_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """A request that succeeded: its answer, and what a retry of it must agree with.

    Attributes:
        response: as a retry gets it.
        is_form: it was multipart/form-data.
        part: the raw part; empty for a form.
        size: bytes of its body, without boundaries: they are new in each request.
        parts: how many it had.
        digests: of the raw part, algorithm to lower-case hex, as far as they were computed.
        cost: bytes of memory that all this takes, about.
    """

    response: Response
    is_form: bool
    part: PartHead
    size: int
    parts: int
    digests: Mapping[str, str]
    cost: int

    def check(self, head: RequestHead) -> None:
        """Refuse a request that is seen, from its head alone, to be another one.

        Raises:
            DigestMismatch: it is. The draft wants 422 for a key with another payload.
        """
        size = head.content_length
        if (
            (head.boundary is not None) != self.is_form
            or head.part != self.part
            or (size is not None and _content_size(head, size, self.parts) != self.size)
        ):
            raise DigestMismatch("the Idempotency-Key belongs to a request that differs from this")
        for algorithm, digest in head.given_digests.items():
            if self.digests.get(algorithm, digest) != digest:
                raise DigestMismatch(
                    f"the Idempotency-Key belongs to a body whose {algorithm} is another one"
                )


class KeyMemory:
    """The keys of one daemon."""

    def __init__(self, *, max_keys: int = MAX_KEYS, max_bytes: int = MAX_BYTES) -> None:
        """Makes one that remembers nothing yet, and never more than the limits."""
        self._max_keys = max_keys
        self._max_bytes = max_bytes
        self._held: set[Key] = set()
        # In the order in which they were last asked for.
        self._answered: OrderedDict[Key, _Answered] = OrderedDict()
        self.bytes = 0
        """Bytes remembered, about."""

    def __len__(self) -> int:
        """Number of keys whose answer is remembered."""
        return len(self._answered)

    @property
    def held(self) -> int:
        """Number of keys whose upload is in progress."""
        return len(self._held)

    def recall(self, key: Key | None, head: RequestHead) -> Response | None:
        """What the request was answered with when it was first sent; None: go on and upload it.

        Raises:
            KeyInUse: an upload with this key is in progress.
            DigestMismatch: the key belongs to another request.
        """
        if key is None:
            return None
        if key in self._held:
            raise KeyInUse("an upload with this Idempotency-Key is in progress")
        answered = self._answered.get(key)
        if answered is None:
            return None
        answered.check(head)
        self._answered.move_to_end(key)
        return answered.response

    def hold(self, key: Key | None) -> AbstractContextManager[None]:
        """Keep others from uploading with this key for the length of the block.

        Raises:
            KeyInUse: somebody else does.
        """
        return _NOTHING if key is None else self._hold(key)

    @contextmanager
    def _hold(self, key: Key) -> Iterator[None]:
        if key in self._held:
            raise KeyInUse("an upload with this Idempotency-Key is in progress")
        self._held.add(key)
        try:
            yield
        finally:
            self._held.discard(key)

    def remember(
        self, key: Key | None, head: RequestHead, body_size: int, receipt: Receipt, answer: Response
    ) -> None:
        """Note that a request has succeeded.

        Args:
            key: nothing is noted if it is None.
            head: the request.
            body_size: bytes of its body, as sent.
            receipt: of the committed transfer.
            answer: what it is answered with; a retry gets the same, marked as replayed.
        """
        if key is None:
            return
        part, parts = head.part, receipt.totals.parts
        texts = (*key, part.filename, part.content_type)
        cost = ENTRY_OVERHEAD + sum(map(sys.getsizeof, (answer.body, *texts)))
        is_form = head.boundary is not None
        self._forget(key)
        # One receipt that fills the memory is not worth all others.
        if cost > self._max_bytes:
            return
        self._answered[key] = _Answered(
            response=replace(answer, headers={**answer.headers, **REPLAYED}),
            is_form=is_form,
            part=part,
            size=_content_size(head, body_size, parts),
            parts=parts,
            digests={} if is_form or not receipt.parts else receipt.parts[0].tail.digest,
            cost=cost,
        )
        self.bytes += cost
        while len(self._answered) > self._max_keys or self.bytes > self._max_bytes:
            self._forget(next(iter(self._answered)))

    def _forget(self, key: Key) -> None:
        if (answered := self._answered.pop(key, None)) is not None:
            self.bytes -= answered.cost


def _content_size(head: RequestHead, body_size: int, parts: int) -> int:
    """Bytes of a body without its boundaries, of which there is one more than parts.

    Clients make up a new boundary for each request, and some (Firefox) not always of one length.
    """
    return body_size - (parts + 1) * len(head.boundary or "")
