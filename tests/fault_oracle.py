"""The oracle: what clients were answered, against what a consumer finds, and what may not differ.

As in the Jepsen tests: many clients upload what a seed makes, each answer is recorded, and when
all faults are over, the queue is read to its end and held against the answers. It knows nothing of
faults: whatever was done to broker and network, the same must hold.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import google_crc32c
import h11
import trio

from relay.model import Abort, Frame
from relay.protocol import reassembly
from relay.protocol.crc import crc32c
from tests.uploading import FRAME_SIZE, Part, browser_form

PIECE: Final = 64 * 1024
"""Bytes that a client sends at once."""

EDGES: Final = (0, 1, FRAME_SIZE - 1, FRAME_SIZE, FRAME_SIZE + 1, 2 * FRAME_SIZE)
MIB: Final = 1 << 20

LEFT: Final = "(client left)"
"""Instead of a code: the client went away before the end of its body."""

BROKEN: Final = "(no answer)"
"""Instead of a code: the daemon ended the connection without an answer. It never may."""

KILLED: Final = "(daemon killed)"
"""Instead of a code: no answer, because the daemon was killed meanwhile, or not there. It may be
committed all the same."""

HUNG: Final = "(hung)"
"""Instead of a code: nothing moved for longer than all deadlines together."""

COMMITTED: Final = "committed"
UNKNOWN: Final = "outcome-unknown"


@dataclass(frozen=True, slots=True)
class Plan:
    """One upload, all of it made from a seed and a number.

    Attributes:
        sizes: of its parts, in bytes; a single one if it is raw.
        is_form: multipart/form-data rather than a raw body.
        key: its Idempotency-Key, if it may be retried.
        pause: seconds between two pieces.
        leaves: part of the body after which the client goes away; None for the usual one.
        seed: of the contents.
    """

    name: str
    sizes: tuple[int, ...]
    is_form: bool
    key: str | None
    pause: float
    leaves: float | None
    seed: str

    def parts(self) -> list[Part]:
        """Its contents: the same each time."""
        chance = Random(self.seed)
        return [
            Part(chance.randbytes(size), f"f{number}", f"{self.name}.{number}")
            for number, size in enumerate(self.sizes)
        ]

    def digests(self) -> tuple[str, ...]:
        """crc32c of each part, as receipts have it."""
        return tuple(f"{crc32c(part.data):08x}" for part in self.parts())


def make_plan(seed: int, client: int, number: int) -> Plan:
    """The upload that ``client`` sends as its ``number``-th."""
    name = f"{seed}-{client}-{number}"
    chance = Random(f"plan {name}")
    is_form = chance.random() < 0.5
    sizes = tuple(_size(chance) for _ in range(chance.randint(1, 3) if is_form else 1))
    return Plan(
        name=name,
        sizes=sizes,
        is_form=is_form,
        key=f"key-{name}" if chance.random() < 0.5 else None,
        pause=chance.choice([0, 0, 0.02, 0.05, 0.2]),
        leaves=chance.random() if chance.random() < 0.05 else None,
        seed=f"content {name}",
    )


def _size(chance: Random) -> int:
    kind = chance.random()
    if kind < 0.3:
        return chance.choice(EDGES)
    if kind < 0.5:
        return chance.randrange(64 * 1024)
    return chance.randrange(3 * MIB)


@dataclass(slots=True)
class Outage:
    """A time, by trio's clock, in which the daemon was killed, and until it was ready again."""

    began: float
    ended: float = math.inf


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of one attempt at an upload.

    Attributes:
        code: ``committed``, the problem's code, or one of the words in parentheses above.
        transfer: the id that the answer named.
        digests: crc32c of each part, from the receipt.
        pause: the longest time, in seconds, in which the client could neither send nor was
            answered.
    """

    plan: Plan
    status: int | None
    code: str
    transfer: str | None = None
    digests: tuple[str, ...] = ()
    is_replay: bool = False
    began: float = 0.0
    seconds: float = 0.0
    pause: float = 0.0

    def __str__(self) -> str:
        return (
            f"upload {self.plan.name}: {self.status} {self.code}, transfer {self.transfer}, "
            f"after {self.seconds:.1f} s, longest pause {self.pause:.1f} s"
        )


class Client:
    """Uploads plans to one daemon.

    Attributes:
        attempts: what became of them.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        patience: float,
        outages: Sequence[Outage] = (),
    ) -> None:
        """Prepare to upload.

        Args:
            address: the daemon's.
            patience: seconds without progress after which an upload counts as hung.
            outages: the daemon's, as they come.
        """
        self.attempts: list[Attempt] = []
        self._outages = outages
        self._address = address
        self._patience = patience

    async def upload(self, plan: Plan, route: str) -> Attempt:
        """One attempt; noted, whatever becomes of it."""
        attempt = await self._attempt(plan, route)
        self.attempts.append(attempt)
        return attempt

    async def _attempt(self, plan: Plan, route: str) -> Attempt:
        exchange = _Exchange(plan, route)
        began = exchange.moved = trio.current_time()
        status: int | None = None
        code, answer = BROKEN, dict[str, Any]()
        try:
            async with await trio.open_tcp_stream(*self._address) as stream:
                status, answer = await exchange.run(stream, self._patience)
        except (OSError, _Broken):
            pass
        except trio.TooSlowError:
            code = HUNG
        except _Left:
            code = LEFT
        exchange.move()
        if code == BROKEN and self._was_killed(began, exchange.moved):
            code = KILLED
        if status is not None:
            code = COMMITTED if status == 201 else str(answer.get("code"))
        return Attempt(
            plan=plan,
            status=status,
            code=code,
            transfer=answer.get("transfer"),
            digests=tuple(part["digest"]["crc32c"] for part in answer.get("parts", [])),
            is_replay=exchange.is_replay,
            began=began,
            seconds=exchange.moved - began,
            pause=exchange.pause,
        )

    def _was_killed(self, began: float, ended: float) -> bool:
        return any(outage.began <= ended and began <= outage.ended for outage in self._outages)


class _Left(Exception):
    """The client went away, as planned."""


class _Broken(Exception):
    """The daemon ended the connection without an answer."""


class _Exchange:
    """One request and its response."""

    def __init__(self, plan: Plan, route: str) -> None:
        parts = plan.parts()
        self._plan = plan
        self._h11 = h11.Connection(h11.CLIENT)
        content_type, self._body = "application/octet-stream", parts[0].data
        if plan.is_form:
            content_type, self._body = browser_form(parts)
        headers = [
            ("Host", "relay.test"),
            ("Content-Type", content_type),
            ("Content-Length", str(len(self._body))),
            ("Connection", "close"),
        ]
        if not plan.is_form:
            name = f'attachment; filename="{parts[0].filename}"'
            headers.append(("Content-Disposition", name))
        if plan.key is not None:
            headers.append(("Idempotency-Key", plan.key))
        self._request = h11.Request(method="POST", target=f"/upload/{route}", headers=headers)
        self.is_replay = False
        self.moved = 0.0
        self.pause = 0.0
        self._has_left = False

    def move(self) -> None:
        """Something moved."""
        now = trio.current_time()
        self.pause, self.moved = max(self.pause, now - self.moved), now

    async def run(self, stream: trio.SocketStream, patience: float) -> tuple[int, dict[str, Any]]:
        """Send and receive. Returns status and document."""
        answer: tuple[int, dict[str, Any]] | None = None
        broken = False
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            nursery.start_soon(self._send, stream, scope)
            nursery.start_soon(self._watch, patience, scope)
            try:
                answer = await self._receive(stream)
            except (trio.BrokenResourceError, h11.RemoteProtocolError):
                broken = True
            scope.cancel()
        if answer is not None:
            return answer
        if self._has_left:
            raise _Left
        if broken:
            raise _Broken
        raise trio.TooSlowError

    async def _watch(self, patience: float, scope: trio.CancelScope) -> None:
        # It watches a clock, not a condition that could tell of itself.
        while (left := self.moved + patience - trio.current_time()) > 0:  # noqa: ASYNC110
            await trio.sleep(left)
        scope.cancel()

    async def _send(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        end = len(self._body)
        if self._plan.leaves is not None:
            end = int(end * self._plan.leaves)
        try:
            await stream.send_all(self._h11.send(self._request) or b"")
            for start in range(0, end, PIECE):
                await stream.send_all(self._body[start : min(start + PIECE, end)])
                self.move()
                if self._plan.pause:
                    await trio.sleep(self._plan.pause)
                    self.moved = trio.current_time()  # the pause was the client's own
        except trio.BrokenResourceError:
            return  # the daemon does not want more; what it answers counts
        if end < len(self._body):
            self._has_left = True
            scope.cancel()

    async def _receive(self, stream: trio.SocketStream) -> tuple[int, dict[str, Any]]:
        # What was sent went past h11, which only has to know that a response may come.
        status, body = 0, bytearray()
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(await stream.receive_some(PIECE))
            elif isinstance(event, h11.Response):
                status = event.status_code
                self.is_replay = (b"idempotency-replayed", b"true") in list(event.headers)
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, json.loads(bytes(body))


# --- what a consumer finds ----------------------------------------------------------------------


@dataclass
class Found:
    """What came of the frames in the queue.

    Attributes:
        parts: transfer id to the crc32c of each of its parts, computed here.
        uploads: transfer id to the name of its plan.
        committed: how often each transfer was committed.
        repeats: transfer id to that of the earlier transfer with its key.
        aborted: transfer id to reason.
        duplicates: frames that were there already.
        faults: what no queue may ever hold, in words.
    """

    parts: dict[str, list[int]] = field(default_factory=dict)
    uploads: dict[str, str] = field(default_factory=dict)
    committed: Counter[str] = field(default_factory=Counter)
    repeats: dict[str, str] = field(default_factory=dict)
    aborted: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0
    frames: int = 0
    faults: list[str] = field(default_factory=list)

    def digests(self, transfer: str) -> tuple[str, ...]:
        """crc32c of each part, as receipts have it."""
        return tuple(f"{value:08x}" for value in self.parts.get(transfer, []))


def find(items: Iterable[Frame | Abort]) -> Found:
    """Reassemble what a queue held, in order, as any consumer would."""
    reassembler = reassembly.Reassembler(max_open=1_000_000, max_remembered=1_000_000)
    found = Found()
    for item in items:
        found.frames += 1
        for event in reassembler.feed(item, 0.0):
            _note(found, event)
    return found


def _note(found: Found, event: reassembly.Event) -> None:
    match event:
        case reassembly.PartStarted(transfer, part, head):
            found.parts.setdefault(transfer, []).append(0)
            if part == 0:
                found.uploads[transfer] = str(head.filename).rpartition(".")[0]
        case reassembly.PartData(transfer, _, _, body):
            found.parts[transfer][-1] = google_crc32c.extend(found.parts[transfer][-1], body)
        case reassembly.Committed(transfer):
            found.committed[transfer.id] += 1
        case reassembly.Repeated(transfer, of):
            found.repeats[transfer.id] = of
        case reassembly.Aborted(transfer_id, reason, _):
            found.aborted[transfer_id] = reason
        case reassembly.Dropped():
            found.duplicates += 1
        case reassembly.Failed() | reassembly.Ignored() | reassembly.Stray():
            found.faults.append(f"the frames do not make a transfer: {event}")


# --- the judgement ------------------------------------------------------------------------------


def judge(attempts: Iterable[Attempt], found: Found) -> list[str]:
    """Every way in which answers and queue contradict each other or what is promised."""
    attempts = list(attempts)
    return [
        *found.faults,
        *_judge_answers(attempts),
        *_judge_successes(attempts, found),
        *_judge_commits(attempts, found),
        *_judge_keys(attempts, found),
    ]


def _judge_answers(attempts: list[Attempt]) -> Iterator[str]:
    for attempt in attempts:
        if attempt.code in (BROKEN, HUNG):
            yield f"not answered: {attempt}"
        elif attempt.status is not None and attempt.status != 201 and attempt.status < 500:
            # No client here does anything wrong, but to retry while its key is still held.
            if attempt.code != "key-in-use":
                yield f"blamed on the client: {attempt}"
        elif attempt.status == 500:
            yield f"an internal error: {attempt}"


def _judge_successes(attempts: list[Attempt], found: Found) -> Iterator[str]:
    for attempt in attempts:
        if attempt.status != 201:
            continue
        assert attempt.transfer is not None
        times = found.committed[attempt.transfer] + (attempt.transfer in found.repeats)
        if times != 1:
            yield f"LOST OR DOUBLED, found {times} times: {attempt}"
            continue
        expected = attempt.plan.digests()
        if not expected == attempt.digests == found.digests(attempt.transfer):
            yield (
                f"CORRUPT: {attempt}: sent {expected}, receipt {attempt.digests}, "
                f"queue {found.digests(attempt.transfer)}"
            )


def _judge_commits(attempts: list[Attempt], found: Found) -> Iterator[str]:
    allowed = {attempt.transfer for attempt in attempts if attempt.code in (COMMITTED, UNKNOWN)}
    answers = {attempt.transfer: attempt for attempt in attempts}
    killed = Counter(attempt.plan.name for attempt in attempts if attempt.code == KILLED)
    plans = {attempt.plan.name: attempt.plan for attempt in attempts}
    for transfer in [*found.committed, *found.repeats]:
        name = found.uploads.get(transfer, "")
        if transfer not in answers and killed[name]:
            # Of what a daemon was killed over, nobody was told the transfer's id.
            killed[name] -= 1
            if found.digests(transfer) != plans[name].digests():
                yield f"CORRUPT: transfer {transfer} of upload {name}, that nobody was told of"
        elif transfer not in allowed:
            answer = answers.get(transfer, "no answer named it")
            yield f"COMMITTED WITHOUT A 201: transfer {transfer}: {answer}"
        if transfer in found.aborted:
            yield f"committed and aborted ({found.aborted[transfer]}): transfer {transfer}"


def _judge_keys(attempts: list[Attempt], found: Found) -> Iterator[str]:
    """Each upload that was retried with its key counts once, whoever was told of it."""
    by_key: dict[str, set[str]] = {}
    keys = {attempt.plan.name: attempt.plan.key for attempt in attempts}
    named = {attempt.transfer: attempt.plan.name for attempt in attempts}
    for transfer in found.committed:
        key = keys.get(named.get(transfer) or found.uploads.get(transfer, ""))
        if key is not None:
            by_key.setdefault(key, set()).add(transfer)
    for key, transfers in by_key.items():
        delivered = [transfer for transfer in transfers if found.committed[transfer]]
        if len(delivered) > 1:
            yield f"DELIVERED TWICE under {key}: {delivered}"
