"""What reassembly promises: the bytes that went in come out, or nothing does."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model import Abort, Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.framing import Framer
from relay.protocol.reassembly import (
    Aborted,
    Committed,
    Dropped,
    Event,
    Expired,
    Failed,
    Fault,
    Ignored,
    Parked,
    PartData,
    PartEnded,
    PartStarted,
    Past,
    Position,
    Reassembler,
    Repeated,
    Stray,
    TransferStarted,
    key_digest,
)


def transfer_id(number: int) -> str:
    return f"0199c0de-0000-7000-8000-{number:012x}"


def cut(
    parts: Sequence[bytes],
    number: int = 0,
    *,
    frame_size: int = 4,
    digests: Sequence[str] = (),
    key: str | None = None,
    client: str | None = None,
    route: str = "default",
) -> list[Frame]:
    """The frames of one transfer, as the daemon makes them."""
    framer = Framer(
        Transfer(id=transfer_id(number), began=1, route=route, client=client, idempotency_key=key),
        frame_size=frame_size,
        digests=digests,
    )
    frames: list[Frame] = []
    for index, part in enumerate(parts):
        frames += framer.start_part(PartHead(name=f"part {index}"))
        frames += framer.feed(part)
        framer.end_part()
    return [*frames, framer.finish()[0]]


class Output:
    """A consumer that believes every event, and checks that they come in a sensible order."""

    def __init__(self) -> None:
        self.parts: dict[str, list[bytearray]] = {}
        self.committed: dict[str, list[bytes]] = {}
        self.failed: dict[str, Fault] = {}
        self.unchecked: set[str] = set()

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case TransferStarted(transfer):
                    assert transfer.id not in self.parts
                    self.parts[transfer.id] = []
                case PartStarted(of, part, head):
                    assert head == PartHead(name=f"part {part}")
                    assert part == len(self.parts[of])
                    self.parts[of].append(bytearray())
                case PartData(of, part, offset, body):
                    assert (part, offset) == (len(self.parts[of]) - 1, len(self.parts[of][-1]))
                    self.parts[of][-1] += body
                case PartEnded(of, part, tail, _, unchecked):
                    assert tail.size == len(self.parts[of][part])
                    self.unchecked |= set(unchecked)
                case Committed(transfer, totals):
                    assert transfer.id not in self.committed
                    done = [bytes(part) for part in self.parts.pop(transfer.id)]
                    assert totals.bytes == sum(map(len, done))
                    self.committed[transfer.id] = done
                case Repeated(transfer, first):
                    assert first in self.committed
                    del self.parts[transfer.id]
                case Aborted(of) | Expired(of):
                    self.parts.pop(of, None)
                case Failed(of, _, fault):
                    self.parts.pop(of, None)
                    self.failed[of] = fault


def feed(items: Iterable[Frame | Abort], reassembler: Reassembler | None = None) -> Output:
    reassembler = reassembler or Reassembler()
    output = Output()
    for item in items:
        output.take(reassembler.feed(item, now=0.0))
    return output


# --- what goes in comes out ----------------------------------------------------------------------

bodies = st.lists(st.binary(max_size=40), min_size=1, max_size=4)


@st.composite
def uploads(draw: st.DrawFn, number: int = 0) -> tuple[list[bytes], list[Frame]]:
    parts = draw(bodies)
    digests = draw(st.lists(st.sampled_from(["sha-256", "sha-512"]), unique=True))
    size = draw(st.integers(1, 16))
    return parts, cut(parts, number, frame_size=size, digests=digests)


@st.composite
def redelivered(draw: st.DrawFn, frames: list[Frame]) -> list[Frame]:
    """The frames as a broker may deliver them: at any point it may start again further back."""
    deliveries: list[Frame] = []
    for end in [*sorted(draw(st.lists(st.integers(0, len(frames)), max_size=4))), len(frames)]:
        start = draw(st.integers(0, end))
        seen = 1 + max((frame.seq for frame in deliveries), default=-1)
        deliveries += frames[min(start, seen) : end]
    return deliveries


@given(st.data())
def test_what_goes_in_comes_out_whatever_is_redelivered_interleaved_or_aborted(
    data: st.DataObject,
) -> None:
    lines: list[list[Frame | Abort]] = []
    expected: dict[str, list[bytes]] = {}
    for number in range(data.draw(st.integers(1, 4), label="transfers")):
        parts, frames = data.draw(uploads(number))
        deliveries: list[Frame | Abort] = [*data.draw(redelivered(frames))]
        if data.draw(st.booleans(), label="aborted"):
            first_commit = next(i for i, f in enumerate(deliveries) if f == frames[-1])
            at = data.draw(st.integers(0, first_commit))
            # What comes behind the abort is what a broker delivers twice.
            deliveries.insert(at, Abort(transfer_id(number), at, "client-gone"))
        else:
            expected[transfer_id(number)] = parts
        lines.append(deliveries)
    order = data.draw(st.permutations([n for n, line in enumerate(lines) for _ in line]))
    queues = [iter(line) for line in lines]

    output = feed(next(queues[number]) for number in order)

    assert output.committed == expected
    assert not output.failed
    assert not output.unchecked


@given(uploads(), st.data())
def test_a_transfer_goes_on_from_its_position_in_another_process(
    upload: tuple[list[bytes], list[Frame]], data: st.DataObject
) -> None:
    parts, frames = upload
    output = Output()
    reassembler = Reassembler()
    stops = data.draw(st.lists(st.integers(1, len(frames)), max_size=3))
    for start, end in pairwise([0, *sorted(stops), len(frames)]):
        replay = data.draw(st.integers(0, start))
        for frame in frames[start - replay : end]:
            output.take(reassembler.feed(frame, 0.0))
        position = reassembler.position(transfer_id(0))
        if position is not None:
            reassembler = Reassembler()
            assert reassembler.restore(transfer_id(0), position, 0.0) == []
            assert reassembler.position(transfer_id(0)) == position
    assert output.committed == {transfer_id(0): parts}


def test_the_end_of_a_part_restored_in_its_middle_names_every_known_digest_as_unchecked() -> None:
    frames = cut([b"12345678", b"x"], digests=["sha-256"])
    first = Reassembler(digests=())
    first.feed(frames[0], 0.0)
    position = first.position(transfer_id(0))
    assert position == Position(seq=1, part=0, offset=4, part_frames=1, bytes=4)
    second = Reassembler()
    second.restore(transfer_id(0), position, 0.0)

    ended = [e for f in frames[1:] for e in second.feed(f, 0.0) if isinstance(e, PartEnded)]

    assert set(ended[0].unchecked) == {"crc32c", "sha-256"}
    assert ended[0].frames == 2
    assert ended[1].unchecked == {}


def test_digests_that_were_not_computed_are_named_unless_unknown() -> None:
    (frame,) = cut([b"abc"], digests=["sha-256"])
    assert frame.tail is not None
    tail = PartTail(3, {**frame.tail.digest, "blake3": "00"})
    events = Reassembler(digests=()).feed(frame._replace(tail=tail), 0.0)
    assert [set(e.unchecked) for e in events if isinstance(e, PartEnded)] == [{"sha-256"}]


def test_a_transfer_of_one_frame_tells_everything_at_once() -> None:
    (frame,) = cut([b"ab"])
    assert frame.tail is not None
    assert Reassembler().feed(frame, 0.0) == [
        TransferStarted(frame.transfer),
        PartStarted(frame.transfer.id, 0, PartHead(name="part 0")),
        PartData(frame.transfer.id, 0, 0, b"ab"),
        PartEnded(frame.transfer.id, 0, frame.tail, 1, {}),
        Committed(frame.transfer, Totals(1, 1, 2)),
    ]


def test_an_empty_part_has_a_beginning_and_an_end_and_no_data() -> None:
    events = Reassembler().feed(cut([b""])[0], 0.0)
    assert [type(event) for event in events] == [
        TransferStarted,
        PartStarted,
        PartEnded,
        Committed,
    ]


# --- nothing wrong is ever committed -------------------------------------------------------------


def flipped(data: bytes, bit: int) -> bytes:
    return (int.from_bytes(data) ^ 1 << bit % (8 * len(data))).to_bytes(len(data))


def _with_digest(frame: Frame, algorithm: str, value: str) -> Frame:
    assert frame.tail is not None
    return frame._replace(tail=replace(frame.tail, digest={**frame.tail.digest, algorithm: value}))


def _with_body(frame: Frame, body: bytes) -> Frame:
    return frame._replace(body=body, crc32c=crc32c(body))


# Each of these is applied to the middle frame (1) or to the last one (2) of a transfer of three
# frames and two parts: "aaaa", "b" and "cc".
FAULTS: list[tuple[str, int, Callable[[Frame], Frame], Fault]] = [
    ("a flipped bit", 1, lambda f: f._replace(body=flipped(f.body, 3)), Fault.CHECKSUM),
    ("a wrong checksum", 1, lambda f: f._replace(crc32c=f.crc32c ^ 1), Fault.CHECKSUM),
    ("a later number", 1, lambda f: f._replace(seq=2), Fault.GAP),
    ("a huge number", 1, lambda f: f._replace(seq=2**63 - 1), Fault.GAP),
    ("another part", 1, lambda f: f._replace(part=1), Fault.POSITION),
    ("an earlier offset", 1, lambda f: f._replace(offset=0), Fault.POSITION),
    ("a later offset", 1, lambda f: f._replace(offset=5), Fault.POSITION),
    ("an empty frame", 1, lambda f: _with_body(f, b"")._replace(tail=None), Fault.POSITION),
    ("an empty last frame", 1, lambda f: _with_body(f, b""), Fault.POSITION),
    ("a part that goes on", 1, lambda f: f._replace(tail=None), Fault.POSITION),
    ("a byte too few", 2, lambda f: _with_body(f, b"c"), Fault.SIZE),
    ("a byte too many", 2, lambda f: _with_body(f, b"ccc"), Fault.SIZE),
    ("another byte", 2, lambda f: _with_body(f, b"cd"), Fault.DIGEST),
    ("a wrong size", 2, lambda f: f._replace(tail=PartTail(3, {})), Fault.SIZE),
    ("no crc32c", 2, lambda f: f._replace(tail=PartTail(2, {})), Fault.DIGEST),
    ("a wrong crc32c", 2, lambda f: _with_digest(f, "crc32c", "00000000"), Fault.DIGEST),
    ("a wrong sha-256", 2, lambda f: _with_digest(f, "sha-256", "00"), Fault.DIGEST),
    ("an unasked sha-512", 2, lambda f: _with_digest(f, "sha-512", "00"), Fault.DIGEST),
    ("a part too early", 2, lambda f: f._replace(part=2), Fault.POSITION),
    ("a commit without an end", 2, lambda f: f._replace(tail=None), Fault.POSITION),
    ("too few frames", 2, lambda f: f._replace(commit=Totals(2, 2, 7)), Fault.TOTALS),
    ("too many parts", 2, lambda f: f._replace(commit=Totals(3, 3, 7)), Fault.TOTALS),
    ("too many bytes", 2, lambda f: f._replace(commit=Totals(3, 2, 8)), Fault.TOTALS),
]


@pytest.mark.parametrize(
    ("index", "spoil", "fault"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS]
)
def test_a_faulty_frame_dooms_its_transfer(
    index: int, spoil: Callable[[Frame], Frame], fault: Fault
) -> None:
    frames = cut([b"aaaab", b"cc"], digests=["sha-256"])
    assert len(frames) == 3
    spoilt = [*frames[:index], spoil(frames[index]), *frames[index + 1 :]]

    output = feed([*spoilt, *frames])

    # A part that goes on is noticed at the frame after it.
    assert output.failed == {transfer_id(0): fault}
    assert output.committed == {}


def test_a_faulty_frame_tells_nothing_of_its_content() -> None:
    (frame,) = cut([b"good"])
    spoilt = frame._replace(commit=Totals(1, 1, 5))
    (failed,) = Reassembler().feed(spoilt, 0.0)
    assert isinstance(failed, Failed)
    assert failed.fault is Fault.TOTALS


@given(uploads(), st.data())
def test_no_single_corruption_is_ever_committed(
    upload: tuple[list[bytes], list[Frame]], data: st.DataObject
) -> None:
    _, frames = upload
    index = data.draw(st.integers(0, len(frames) - 1), label="index")
    frame = frames[index]
    spoilt = [
        frame._replace(crc32c=frame.crc32c ^ 1 << data.draw(st.integers(0, 31))),
        frame._replace(part=frame.part + 1),
        frame._replace(offset=frame.offset + data.draw(st.integers(1, 100))),
        frame._replace(seq=frame.seq + data.draw(st.integers(1, 100))),
    ]
    if frame.body:
        body = flipped(frame.body, data.draw(st.integers(min_value=0)))
        # The second is a forger's: with a checksum that matches, the part's digest must tell.
        spoilt += [frame._replace(body=body), _with_body(frame, body)]
        spoilt.append(_with_body(frame, frame.body[:-1]))
    if frame.tail is not None:
        algorithm = data.draw(st.sampled_from(sorted(frame.tail.digest)))
        value = flipped(bytes.fromhex(frame.tail.digest[algorithm]), data.draw(st.integers(0, 31)))
        spoilt.append(_with_digest(frame, algorithm, value.hex()))
        spoilt.append(frame._replace(tail=replace(frame.tail, size=frame.tail.size + 1)))
    if frame.commit is not None:
        spoilt.append(frame._replace(commit=replace(frame.commit, bytes=frame.commit.bytes + 1)))
        spoilt.append(frame._replace(commit=None))
    corrupt = data.draw(st.sampled_from(spoilt))

    assert feed([*frames[:index], corrupt, *frames[index + 1 :]]).committed == {}


@given(uploads(), st.data())
def test_no_dropped_frame_goes_unnoticed(
    upload: tuple[list[bytes], list[Frame]], data: st.DataObject
) -> None:
    _, frames = upload
    index = data.draw(st.integers(0, len(frames) - 1))
    assert feed([*frames[:index], *frames[index + 1 :]]).committed == {}


_numbers = st.one_of(st.integers(0, 3), st.integers(0, 2**63 - 1))


@given(
    st.lists(
        st.one_of(
            st.builds(Abort, st.sampled_from("ab"), _numbers, st.text()),
            st.builds(
                Frame,
                st.builds(Transfer, id=st.sampled_from("ab"), began=_numbers, route=st.text()),
                _numbers,
                _numbers,
                _numbers,
                st.just(b""),
                st.just(0),
                st.none() | st.builds(PartHead),
                st.none()
                | st.builds(
                    PartTail, _numbers, st.dictionaries(st.sampled_from(["crc32c", "x"]), st.text())
                ),
                st.none() | st.builds(Totals, _numbers, _numbers, _numbers),
            ),
        )
    )
)
def test_nothing_that_can_be_decoded_raises(items: list[Frame | Abort]) -> None:
    feed(items, Reassembler(max_open=1, max_remembered=1))


# --- ends ----------------------------------------------------------------------------------------


def test_duplicates_of_an_open_and_of_a_committed_transfer_are_dropped() -> None:
    frames = cut([b"12345678"])
    reassembler = Reassembler()
    reassembler.feed(frames[0], 0.0)
    assert reassembler.feed(frames[0], 0.0) == [Dropped(transfer_id(0), 0)]
    reassembler.feed(frames[1], 0.0)
    assert reassembler.feed(frames[0], 0.0) == [Dropped(transfer_id(0), 0)]
    assert reassembler.feed(frames[1], 0.0) == [Dropped(transfer_id(0), 1)]
    assert len(reassembler) == 0


def test_an_abort_drops_the_transfer_and_what_is_redelivered_of_it() -> None:
    frames = cut([b"12345678"])
    reassembler = Reassembler()
    reassembler.feed(frames[0], 0.0)
    abort = Abort(transfer_id(0), 1, "client-gone")
    assert reassembler.feed(abort, 0.0) == [Aborted(transfer_id(0), "client-gone", 1)]
    assert reassembler.feed(frames[0], 0.0) == [Dropped(transfer_id(0), 0)]
    assert reassembler.feed(abort, 0.0) == [Dropped(transfer_id(0), 1)]


def test_an_abort_of_an_unknown_transfer_is_no_fault() -> None:
    reassembler = Reassembler()
    assert reassembler.feed(Abort(transfer_id(0), 0, "too-large"), 0.0) == [
        Aborted(transfer_id(0), "too-large", 0)
    ]


def test_an_abort_does_not_undo_a_commit() -> None:
    (frame,) = cut([b"x"])
    reassembler = Reassembler()
    reassembler.feed(frame, 0.0)
    assert reassembler.feed(Abort(transfer_id(0), 1, "outcome-unknown"), 0.0) == [
        Dropped(transfer_id(0), 1)
    ]


def test_a_transfer_joined_in_its_middle_is_told_once_and_then_ignored() -> None:
    frames = cut([b"123456789"])
    reassembler = Reassembler()
    assert reassembler.feed(frames[1], 0.0) == [Stray(transfer_id(0), 1)]
    assert reassembler.feed(frames[2], 0.0) == [Ignored(transfer_id(0), 2)]


def test_a_stray_transfer_that_is_redelivered_whole_is_taken() -> None:
    frames = cut([b"123456789"])
    output = feed([frames[1], *frames])
    assert output.committed == {transfer_id(0): [b"123456789"]}


def test_a_fault_in_one_transfer_leaves_the_others_alone() -> None:
    good, bad = cut([b"12345678"], 0), cut([b"12345678"], 1)
    output = feed([good[0], bad[0], bad[1]._replace(crc32c=0), good[1], bad[1]])
    assert output.committed == {transfer_id(0): [b"12345678"]}
    assert output.failed == {transfer_id(1): Fault.CHECKSUM}


def test_frames_of_a_doomed_transfer_are_ignored_even_its_first() -> None:
    frames = cut([b"12345678"])
    reassembler = Reassembler()
    assert isinstance(reassembler.feed(frames[0]._replace(crc32c=0), 0.0)[0], Failed)
    for frame in frames:
        assert reassembler.feed(frame, 0.0) == [Ignored(transfer_id(0), frame.seq)]


def test_a_transfer_refused_after_its_commit_is_doomed_all_the_same() -> None:
    (frame,) = cut([b"x"])
    reassembler = Reassembler()
    reassembler.feed(frame, 0.0)
    failed = reassembler.doom(transfer_id(0), 0, Fault.REFUSED, "no")
    assert failed == Failed(transfer_id(0), 0, Fault.REFUSED, "no")
    assert reassembler.feed(frame, 0.0) == [Ignored(transfer_id(0), 0)]


# --- the same upload, sent twice -----------------------------------------------------------------


@given(st.data())
def test_of_transfers_with_the_same_key_the_first_that_is_complete_counts(
    data: st.DataObject,
) -> None:
    lines = [
        cut([b"123456789"], number, key=data.draw(st.sampled_from([None, "k", "l"])))
        for number in range(data.draw(st.integers(1, 5)))
    ]
    keys = {line[0].transfer.id: line[0].transfer.idempotency_key for line in lines}
    deliveries: list[Frame] = []
    left = [data.draw(redelivered(line)) for line in lines]
    while any(left):
        line = data.draw(st.sampled_from([line for line in left if line]))
        deliveries.append(line.pop(0))
    output = feed(deliveries)
    first: dict[str | None, str] = {}
    for frame in deliveries:
        if frame.commit is not None:
            first.setdefault(keys[frame.transfer.id], frame.transfer.id)
    expected = {of for of, key in keys.items() if key is None or first[key] == of}
    assert set(output.committed) == expected
    assert output.parts == {}


def test_a_repeated_transfer_is_told_with_what_it_repeats_and_its_frames_are_duplicates() -> None:
    reassembler = Reassembler()
    reassembler.feed(cut([b"x"], 0, key="k")[0], 0.0)
    (again,) = cut([b"x"], 1, key="k")
    assert reassembler.feed(again, 0.0)[-1] == Repeated(again.transfer, transfer_id(0))
    assert reassembler.feed(again, 0.0) == [Dropped(transfer_id(1), 0)]
    assert reassembler.feed(Abort(transfer_id(1), 1, "outcome-unknown"), 0.0) == [
        Dropped(transfer_id(1), 1)
    ]


def test_keys_of_other_clients_and_routes_are_other_keys() -> None:
    reassembler = Reassembler()
    lines = [
        cut([b"x"], 0, key="k"),
        cut([b"x"], 1, key="k", client="ann"),
        cut([b"x"], 2, key="k", client="ann", route="other"),
        # Nothing is told apart by where one text ends and the next begins.
        cut([b"x"], 3, key="k", client="an", route="nother"),
        cut([b"x"], 4, key="null"),
    ]
    for (frame,) in lines:
        assert isinstance(reassembler.feed(frame, 0.0)[-1], Committed)


def test_a_transfer_that_failed_or_was_aborted_leaves_its_key_free() -> None:
    reassembler = Reassembler()
    failed, aborted, good = (cut([b"12345678"], n, key="k") for n in range(3))
    reassembler.feed(failed[0], 0.0)
    reassembler.feed(failed[1]._replace(crc32c=0), 0.0)
    reassembler.feed(aborted[0], 0.0)
    reassembler.feed(Abort(transfer_id(1), 1, "queue-full"), 0.0)
    assert isinstance([reassembler.feed(frame, 0.0) for frame in good][-1][-1], Committed)


def test_a_transfer_refused_after_its_commit_gives_its_key_back() -> None:
    reassembler = Reassembler()
    reassembler.feed(cut([b"x"], 0, key="k")[0], 0.0)
    reassembler.doom(transfer_id(0), 0, Fault.REFUSED, "no")
    assert isinstance(reassembler.feed(cut([b"x"], 1, key="k")[0], 0.0)[-1], Committed)


def test_a_repeated_transfer_that_is_refused_does_not_free_the_key_of_the_first() -> None:
    reassembler = Reassembler()
    reassembler.feed(cut([b"x"], 0, key="k")[0], 0.0)
    reassembler.feed(cut([b"x"], 1, key="k")[0], 0.0)
    reassembler.doom(transfer_id(1), 0, Fault.REFUSED, "no")
    assert isinstance(reassembler.feed(cut([b"x"], 2, key="k")[0], 0.0)[-1], Repeated)


def test_a_key_known_from_elsewhere_makes_repeated_transfers_but_not_of_its_own() -> None:
    reassembler = Reassembler()
    (frame,) = cut([b"x"], 0, key="k")
    key = key_digest(frame.transfer)
    assert key is not None
    reassembler.remember_key(key, transfer_id(0))
    assert isinstance(reassembler.feed(cut([b"x"], 1, key="k")[0], 0.0)[-1], Repeated)
    # Its end was noted, and then the process died before its frames were acked.
    assert isinstance(reassembler.feed(frame, 0.0)[-1], Committed)


def test_only_so_many_keys_are_remembered_those_in_use_longest() -> None:
    reassembler = Reassembler(max_remembered=2)
    for number, key in enumerate("abac"):
        reassembler.feed(cut([b"x"], number, key=key)[0], 0.0)
    assert isinstance(reassembler.feed(cut([b"x"], 4, key="a")[0], 0.0)[-1], Repeated)
    assert isinstance(reassembler.feed(cut([b"x"], 5, key="b")[0], 0.0)[-1], Committed)


# --- silence, and bounds -------------------------------------------------------------------------


def test_a_silent_transfer_expires_and_an_active_one_does_not() -> None:
    silent, active = cut([b"123456789"], 0), cut([b"123456789"], 1)
    reassembler = Reassembler(expire_after=10.0)
    reassembler.feed(silent[0], 0.0)
    reassembler.feed(active[0], 0.0)
    reassembler.feed(active[1], 5.0)
    assert reassembler.expire(9.9) == []
    (expired,) = reassembler.expire(10.0)
    assert expired == Expired(transfer_id(0), Position(1, 0, 4, 1, 4))
    assert reassembler.feed(silent[1], 11.0) == [Stray(transfer_id(0), 1)]
    assert len(reassembler) == 1


def test_a_duplicate_is_a_sign_of_life() -> None:
    frames = cut([b"123456789"])
    reassembler = Reassembler(expire_after=10.0)
    reassembler.feed(frames[0], 0.0)
    reassembler.feed(frames[0], 5.0)
    assert reassembler.expire(10.0) == []


def test_one_transfer_too_many_parks_the_one_that_was_silent_longest() -> None:
    first, second, third = (cut([b"12345678"], n) for n in range(3))
    reassembler = Reassembler(max_open=2)
    reassembler.feed(first[0], 0.0)
    reassembler.feed(second[0], 1.0)
    reassembler.feed(first[0], 2.0)
    events = reassembler.feed(third[0], 3.0)
    assert events[0] == Parked(transfer_id(1), Position(1, 0, 4, 1, 4))
    assert isinstance(events[1], TransferStarted)
    assert len(reassembler) == 2

    parked = reassembler.restore(transfer_id(1), events[0].position, 4.0)
    assert parked == [Parked(transfer_id(0), Position(1, 0, 4, 1, 4))]
    assert isinstance(reassembler.feed(second[1], 5.0)[-1], Committed)


def test_a_transfer_of_one_frame_parks_nobody() -> None:
    reassembler = Reassembler(max_open=1)
    reassembler.feed(cut([b"12345678"], 0)[0], 0.0)
    assert isinstance(reassembler.feed(cut([b"x"], 1)[0], 0.0)[-1], Committed)
    assert reassembler.knows(transfer_id(0))


def test_only_so_many_ends_are_remembered() -> None:
    reassembler = Reassembler(max_remembered=3)
    for number in range(5):
        reassembler.feed(cut([b"x"], number)[0], 0.0)
    assert [reassembler.knows(transfer_id(n)) for n in range(5)] == [False, False, True, True, True]


def test_an_end_known_from_elsewhere_makes_duplicates_of_its_frames() -> None:
    reassembler = Reassembler()
    reassembler.remember(transfer_id(0), Past.COMMITTED)
    assert reassembler.feed(cut([b"x"])[0], 0.0) == [Dropped(transfer_id(0), 0)]


def test_no_body_is_kept() -> None:
    body = bytes(range(200))
    frame = cut([body + b"end"], frame_size=200)[0]
    before = sys.getrefcount(frame.body)
    reassembler = Reassembler()
    reassembler.feed(frame, 0.0)
    after = sys.getrefcount(frame.body)
    assert len(reassembler) == 1
    assert after == before
