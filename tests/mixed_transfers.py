"""Transfers of every shape, made up from a seed, and what must come of each.

Sizes from nothing to 64 MiB, one part or many, empty parts; interleaved, given up, published again
as after a lost connection, sent twice under one Idempotency-Key. Bodies are slices of one block of
random bytes, made while they are published, so that GiB of them take no memory.
"""

import hashlib
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Final

from relay.model import PartHead, Transfer
from relay.protocol.framing import Framer
from relay.protocol.wire import Message, encode_abort, encode_frame

MIB: Final = 1 << 20
FRAME_SIZES: Final = (65_536, 131_064, 131_064, 524_288)
SMALL_FRAME: Final = 4096
PIECE: Final = MIB
"""Bytes given to the framer at once."""

AT_ONCE: Final = 8
"""Transfers whose frames are interleaved."""

REPEATED_FRAMES: Final = 6
"""Frames that are published again, at most: what was unconfirmed when the connection was lost."""


@dataclass(frozen=True)
class PlannedPart:
    """A part: a slice of the block."""

    filename: str
    start: int
    size: int


@dataclass(frozen=True)
class Planned:
    """A transfer to be published.

    Attributes:
        abort_after: frames after which its sender gives up; None if it commits.
        again: some of its frames come twice.
    """

    transfer: Transfer
    frame_size: int
    parts: tuple[PlannedPart, ...]
    digests: tuple[str, ...] = ()
    abort_after: int | None = None
    again: bool = False

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)


@dataclass
class Mix:
    """Many transfers, and the block that their bytes are from."""

    plans: list[Planned]
    block: bytes
    chance: Random = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all that is to be delivered; of two with the same key, one counts."""
        return sum(max(plan.size for plan in group) for group in self.groups)

    @cached_property
    def groups(self) -> list[list[Planned]]:
        """What must be delivered: of each group exactly one."""
        groups: dict[str, list[Planned]] = {}
        for plan in self.plans:
            if plan.abort_after is None:
                name = plan.transfer.idempotency_key or plan.transfer.id
                groups.setdefault(name, []).append(plan)
        return list(groups.values())

    def digest(self, part: PlannedPart) -> str:
        """The sha-256 of a part's bytes."""
        view = memoryview(self.block)[part.start : part.start + part.size]
        return hashlib.sha256(view).hexdigest()

    def messages(self) -> Iterator[Message]:
        """All that is published, some transfers at once, in one order."""
        waiting = deque(self.plans)
        active: list[Iterator[Message]] = []
        while waiting or active:
            while waiting and len(active) < AT_ONCE:
                active.append(_messages(waiting.popleft(), self.block, self.chance))
            turn = self.chance.choice(active)
            # Some frames of one in a row, as from a window; then another's.
            for _ in range(self.chance.choice((1, 1, 4, 16))):
                if (message := next(turn, None)) is None:
                    active.remove(turn)
                    break
                yield message


def make_mix(seed: int, size: int, *, largest: int = 64 * MIB) -> Mix:
    """About ``size`` bytes of transfers, none with a part of more than ``largest``."""
    chance = Random(f"mix {seed}")
    mix = Mix([], chance.randbytes(largest + MIB), chance)
    total = 0
    while total < size:
        plan = _plan(chance, min(largest, size - total))
        mix.plans.append(plan)
        total += 0 if plan.abort_after is not None else plan.size
        if plan.transfer.idempotency_key is not None and chance.random() < 0.8:
            again = Transfer(
                id=_uuid(chance),
                began=plan.transfer.began,
                route=plan.transfer.route,
                idempotency_key=plan.transfer.idempotency_key,
            )
            mix.plans.append(Planned(again, plan.frame_size, plan.parts, plan.digests))
    chance.shuffle(mix.plans)
    return mix


def _plan(chance: Random, limit: int) -> Planned:
    shape = chance.random()
    if shape < 0.15:
        count, frame_size = chance.randrange(2, 40), SMALL_FRAME
        sizes = [min(_small(chance, frame_size), limit) for _ in range(count)]
    else:
        frame_size = chance.choice(FRAME_SIZES)
        sizes = [_size(chance, frame_size, limit) for _ in range(chance.choice((1, 1, 1, 2, 4)))]
    given_up = chance.random() < 0.1
    keyed = not given_up and chance.random() < 0.2
    frames = sum(max(1, -(-size // frame_size)) for size in sizes)
    return Planned(
        Transfer(
            id=_uuid(chance),
            began=1_700_000_000,
            route="default",
            idempotency_key=_uuid(chance) if keyed else None,
        ),
        frame_size,
        tuple(
            PlannedPart(f"{number}.bin", chance.randrange(MIB), size)
            for number, size in enumerate(sizes)
        ),
        chance.choice(((), (), ("sha-256",), ("sha-256", "sha-512"))),
        abort_after=chance.randrange(frames) if given_up else None,
        again=chance.random() < 0.2,
    )


def _small(chance: Random, frame_size: int) -> int:
    return chance.choice((0, 1, 17, frame_size - 1, frame_size, frame_size + 1, 3 * frame_size))


def _size(chance: Random, frame_size: int, limit: int) -> int:
    kind = chance.random()
    if kind < 0.35:
        return min(limit, _small(chance, frame_size))
    if kind < 0.75:
        return min(limit, chance.randrange(MIB))
    return min(limit, chance.randrange(MIB, 16 * MIB) if kind < 0.97 else 64 * MIB)


def _uuid(chance: Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128)))


def _messages(plan: Planned, block: bytes, chance: Random) -> Iterator[Message]:
    latest: deque[Message] = deque(maxlen=REPEATED_FRAMES)
    for number, message in enumerate(_frames(plan, block)):
        if number == plan.abort_after:
            yield encode_abort(plan.transfer, number, "client-gone")
            return
        yield message
        latest.append(message)
        if plan.again and chance.random() < 0.05:
            yield from latest
    # Also after the commit frame: one whose confirm was lost is published again, too.
    if plan.again:
        yield from latest


def _frames(plan: Planned, block: bytes) -> Iterator[Message]:
    framer = Framer(plan.transfer, frame_size=plan.frame_size, digests=plan.digests)
    view = memoryview(block)
    for part in plan.parts:
        for frame in framer.start_part(PartHead(name="file", filename=part.filename)):
            yield encode_frame(frame)
        for start in range(0, part.size, PIECE):
            piece = view[part.start + start : part.start + min(start + PIECE, part.size)]
            for frame in framer.feed(bytes(piece)):
                yield encode_frame(frame)
        framer.end_part()
    yield encode_frame(framer.finish()[0])


def ids(plans: Sequence[Planned]) -> str:
    """The plans' ids, for people."""
    return " or ".join(plan.transfer.id for plan in plans)
