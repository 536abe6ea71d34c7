"""What the framer promises: the same frames however bytes arrive, checked by other means."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model import Frame, PartHead, PartTail, Receipt, Totals, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.framing import RECEIPT_TEXT, Framer, PartDigest

N = 8
"""A frame size at which every boundary is near."""

TRANSFER = Transfer(id="0199c0de-0000-7000-8000-000000000001", began=1_700_000_000, route="r")
SIZES = st.sampled_from([0, 1, N - 1, N, N + 1, 2 * N - 1, 2 * N, 2 * N + 1, 5 * N]) | st.integers(
    0, 6 * N
)
PARTS = st.lists(SIZES.flatmap(lambda n: st.binary(min_size=n, max_size=n)), min_size=1, max_size=5)
CUTS = st.lists(st.integers(0, 6 * N), max_size=8)


@dataclass
class Run:
    """One transfer, driven as ``transfer.py`` drives it."""

    framer: Framer
    frames: list[Frame] = field(default_factory=list)
    fed: int = 0
    receipt: Receipt | None = None

    def take(self, frames: Iterator[Frame]) -> list[Frame]:
        new = list(frames)
        self.frames += new
        return new

    def part(self, pieces: Sequence[bytes], head: PartHead | None = None) -> None:
        self.take(self.framer.start_part(head or PartHead(name="f")))
        for piece in pieces:
            self.fed += len(piece)
            self.take(self.framer.feed(piece))
            assert self.held <= N
        self.framer.end_part()
        assert self.held <= N

    @property
    def held(self) -> int:
        """Bytes that went in and have not come out."""
        return self.fed - sum(len(frame.body) for frame in self.frames)

    def finish(self) -> list[Frame]:
        frame, self.receipt = self.framer.finish()
        self.frames.append(frame)
        return self.frames


def new_run(digests: Sequence[str] = (), receipt_parts: int = 100) -> Run:
    return Run(
        Framer(TRANSFER, frame_size=N, digests=digests, receipt_parts=receipt_parts),
    )


def cut(data: bytes, points: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(min(point, len(data)) for point in points), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def frames_of(parts: Sequence[bytes], cuts: Sequence[Sequence[int]] = ()) -> list[Frame]:
    run = new_run(["sha-256"])
    for index, part in enumerate(parts):
        run.part(cut(part, cuts[index % len(cuts)] if cuts else []), PartHead(name=f"{index}"))
    return run.finish()


def castagnoli(data: bytes) -> int:
    """CRC-32C bit by bit, from its polynomial (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(PARTS, st.lists(CUTS, min_size=1, max_size=5))
def test_any_split_gives_the_same_frames(parts: list[bytes], cuts: list[list[int]]) -> None:
    whole = frames_of(parts)
    assert frames_of(parts, cuts) == whole
    assert frames_of(parts, [list(range(6 * N))]) == whole


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (0, [0]),
        (1, [1]),
        (N - 1, [N - 1]),
        (N, [N]),
        (N + 1, [N, 1]),
        (2 * N - 1, [N, N - 1]),
        (2 * N, [N, N]),
        (2 * N + 1, [N, N, 1]),
    ],
)
def test_every_frame_is_full_but_the_last_of_a_part(size: int, sizes: list[int]) -> None:
    frames = frames_of([b"x" * size, b"", b"y" * size])
    assert [len(frame.body) for frame in frames] == [*sizes, 0, *sizes]


@given(PARTS)
def test_the_frames_of_a_part_are_the_part(parts: list[bytes]) -> None:
    bodies = [bytearray() for _ in parts]
    for frame in frames_of(parts):
        assert frame.offset == len(bodies[frame.part])
        bodies[frame.part] += frame.body
    assert bodies == parts


@given(PARTS)
def test_frames_are_numbered_without_gaps_and_parts_in_order(parts: list[bytes]) -> None:
    frames = frames_of(parts)
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    numbers = [frame.part for frame in frames]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(parts)))
    assert all(frame.transfer is TRANSFER for frame in frames)


@given(PARTS)
def test_a_part_is_described_where_it_begins_and_summed_up_where_it_ends(
    parts: list[bytes],
) -> None:
    frames = frames_of(parts)
    for index, data in enumerate(parts):
        mine = [frame for frame in frames if frame.part == index]
        assert [frame.head for frame in mine] == [
            PartHead(name=f"{index}") if frame.offset == 0 else None for frame in mine
        ]
        assert sum(frame.offset == 0 for frame in mine) == 1
        assert [frame.tail for frame in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].tail == PartTail(
            len(data),
            {"crc32c": f"{castagnoli(data):08x}", "sha-256": hashlib.sha256(data).hexdigest()},
        )


@given(PARTS)
def test_only_the_very_last_frame_commits(parts: list[bytes]) -> None:
    *others, last = frames_of(parts)
    assert [frame.commit for frame in others] == [None] * len(others)
    assert last.commit == Totals(len(others) + 1, len(parts), sum(map(len, parts)))
    assert last.tail is not None


@given(st.binary(max_size=100))
def test_each_frame_carries_its_own_crc32c(data: bytes) -> None:
    for frame in frames_of([data]):
        assert frame.crc32c == castagnoli(frame.body)


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") == castagnoli(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


def test_digests_are_in_lower_case_and_keep_their_leading_zeros() -> None:
    data = next(data for i in range(999) if crc32c(data := b"%d" % i) < 1 << 24)
    assert frames_of([data])[0].tail == PartTail(
        len(data),
        {"crc32c": f"{crc32c(data):08x}", "sha-256": hashlib.sha256(data).hexdigest()},
    )


def test_only_the_digests_asked_for_are_made_and_crc32c_always() -> None:
    data = b"some bytes, more than a frame"
    for digests in ([], ["sha-512"], ["sha-512", "sha-256"]):
        run = new_run(digests)
        run.part([data])
        tail = run.finish()[-1].tail
        assert tail is not None
        assert list(tail.digest) == ["crc32c", *digests]
        for name in digests:
            assert tail.digest[name] == hashlib.new(name.replace("-", ""), data).hexdigest()


@given(st.lists(st.binary(max_size=2 * N), max_size=6))
def test_a_digest_made_frame_by_frame_is_the_parts(bodies: list[bytes]) -> None:
    digest = PartDigest(["sha-256", "sha-512"])
    for body in bodies:
        digest.update(body, crc32c(body))
    data = b"".join(bodies)
    assert digest.tail() == PartTail(
        len(data),
        {
            "crc32c": f"{castagnoli(data):08x}",
            "sha-256": hashlib.sha256(data).hexdigest(),
            "sha-512": hashlib.sha512(data).hexdigest(),
        },
    )


def test_a_full_frame_leaves_with_the_byte_after_it_and_not_before() -> None:
    run = new_run()
    run.part([])
    run.take(run.framer.start_part(PartHead()))
    assert run.take(run.framer.feed(b"x" * N)) == []
    assert [frame.body for frame in run.take(run.framer.feed(b"y"))] == [b"x" * N]
    assert [len(f.body) for f in run.take(run.framer.feed(b"z" * 3 * N))] == [N, N, N]


def test_a_parts_last_frame_leaves_with_the_next_part_and_not_before() -> None:
    run = new_run()
    run.part([b"first"])
    assert run.frames == []
    (frame,) = run.framer.start_part(PartHead())
    assert (frame.body, frame.commit) == (b"first", None)


def test_bodies_are_bytes_of_their_own_and_pin_no_larger_buffer() -> None:
    frames = frames_of([b"x" * 100], [[3, 50]])
    assert {type(frame.body) for frame in frames} == {bytes}


def test_the_framer_counts_what_it_has_cut_the_frame_held_back_included() -> None:
    framer = Framer(TRANSFER, frame_size=N)
    list(framer.start_part(PartHead()))
    assert len(list(framer.feed(b"x" * (N + 1)))) == framer.frames == 1
    assert framer.size == N
    framer.end_part()
    assert (framer.frames, framer.size) == (2, N + 1)


@given(PARTS)
def test_the_receipt_is_the_sum_of_the_frames(parts: list[bytes]) -> None:
    run = new_run()
    for index, part in enumerate(parts):
        run.part([part], PartHead(name=f"{index}"))
    frames = run.finish()
    receipt = run.receipt
    assert receipt is not None
    assert receipt.transfer is TRANSFER
    assert receipt.totals == frames[-1].commit
    assert receipt.parts_omitted == 0
    for index, listed in enumerate(receipt.parts):
        mine = [frame for frame in frames if frame.part == index]
        assert (listed.part, listed.head) == (index, mine[0].head)
        assert (listed.tail, listed.frames) == (mine[-1].tail, len(mine))
    assert len(receipt.parts) == len(parts)


@pytest.mark.parametrize("listed", [0, 1, 2, 3, 4, 100])
def test_a_receipt_lists_the_first_parts_and_counts_the_rest(listed: int) -> None:
    run = new_run(receipt_parts=listed)
    for size in (3, 0, 20):
        run.part([b"x" * size])
    run.finish()
    assert run.receipt is not None
    assert [part.tail.size for part in run.receipt.parts] == [3, 0, 20][:listed]
    assert run.receipt.parts_omitted == max(0, 3 - listed)
    assert run.receipt.totals == Totals(5, 3, 23)


def test_a_receipt_does_not_grow_with_the_names_of_its_parts() -> None:
    run = new_run()
    third = "x" * (RECEIPT_TEXT // 3)
    run.part([b"a"], PartHead(name=third))
    run.part([b"b"], PartHead(name="b", filename=third))
    run.part([b"c"], PartHead(name="c", content_type=third))
    run.part([b"d"], PartHead(name="d"))
    run.finish()
    assert run.receipt is not None
    # Those that are listed are the first ones: a short name does not slip in behind a long one.
    assert [part.part for part in run.receipt.parts] == [0, 1]
    assert run.receipt.parts_omitted == 2
