"""The pump of one upload: order, the commit, and that no failure is ever committed."""

import uuid
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import BadMultipart, ClientGone, DigestMismatch, QueueFull, RelayError
from relay.model import Frame, PartHead, Receipt, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.form_data import FormData, RawBody
from relay.protocol.framing import Framer
from relay.transfer import Upload, new_transfer_id
from tests.uploading import Part, browser_form

TRANSFER = Transfer(id="0199c0de-0000-7000-8000-000000000001", began=1, route="default")


class Sink:
    """Keeps frames; fails with ``error`` at frame number ``fails_at``."""

    def __init__(self, error: RelayError | None = None, fails_at: int = 0) -> None:
        self.sent: list[Frame] = []
        self.committed: list[Frame] = []
        self._error = error
        self._fails_at = fails_at

    async def send(self, frame: Frame) -> None:
        assert not self.committed
        if self._error is not None and frame.seq == self._fails_at:
            raise self._error
        self.sent.append(frame)

    async def commit(self, frame: Frame) -> None:
        if self._error is not None and frame.seq == self._fails_at:
            raise self._error
        self.committed.append(frame)


class Body:
    """A body that arrives in pieces, and then ends or breaks off."""

    def __init__(self, pieces: Sequence[bytes], error: RelayError | None = None) -> None:
        self._pieces = list(pieces)
        self._error = error

    async def receive(self) -> bytes:
        if self._pieces:
            return self._pieces.pop(0)
        if self._error is not None:
            raise self._error
        return b""


def framer() -> Framer:
    return Framer(TRANSFER, frame_size=4, digests=["sha-256"])


def raw_upload(sink: Sink, **expected: str) -> Upload:
    digests = {name.replace("_", "-"): value for name, value in expected.items()}
    return Upload(RawBody(PartHead()), framer(), sink, expected_digests=digests)


async def test_frames_go_out_in_order_and_the_commit_frame_last() -> None:
    sink = Sink()
    receipt = await raw_upload(sink).run(Body([b"01234", b"5", b"6789"]).receive)
    assert [frame.body for frame in sink.sent] == [b"0123", b"4567"]
    assert [frame.body for frame in sink.committed] == [b"89"]
    assert [frame.seq for frame in (*sink.sent, *sink.committed)] == [0, 1, 2]
    assert receipt.totals == sink.committed[0].commit
    assert receipt.transfer is TRANSFER


async def test_each_frame_leaves_before_more_is_read() -> None:
    sink = Sink()
    seen = []

    async def receive() -> bytes:
        seen.append(len(sink.sent))
        return b"x" * 4 if len(seen) < 5 else b""

    await raw_upload(sink).run(receive)
    assert seen == [0, 0, 1, 2, 3]


async def test_a_form_becomes_the_frames_of_its_parts() -> None:
    content_type, body = browser_form([Part(b"01234", name="a"), Part(b"", name="b")])
    parser = FormData(
        content_type.partition("boundary=")[2],
        max_parts=9,
        max_part_bytes=0,
        max_part_header_bytes=999,
    )
    sink = Sink()
    upload = Upload(parser, framer(), sink)
    receipt = await upload.run(Body([body[i : i + 7] for i in range(0, len(body), 7)]).receive)
    assert [(frame.part, frame.body) for frame in sink.sent] == [(0, b"0123"), (0, b"4")]
    assert [(frame.part, frame.body) for frame in sink.committed] == [(1, b"")]
    assert [part.head.name for part in receipt.parts] == ["a", "b"]


@pytest.mark.parametrize("error", [ClientGone("gone"), BadMultipart("bad")])
async def test_a_body_that_fails_is_never_committed(error: RelayError) -> None:
    sink = Sink()
    with pytest.raises(type(error)):
        await raw_upload(sink).run(Body([b"0123456789"], error).receive)
    assert sink.committed == []


@pytest.mark.parametrize("fails_at", [0, 1, 2])
async def test_an_error_of_the_sink_ends_the_upload(fails_at: int) -> None:
    sink = Sink(QueueFull("nacked"), fails_at)
    with pytest.raises(QueueFull):
        await raw_upload(sink).run(Body([b"0123456789"]).receive)
    assert sink.committed == []
    assert len(sink.sent) == fails_at


async def run_with(**expected: str) -> tuple[Sink, Receipt]:
    sink = Sink()
    return sink, await raw_upload(sink, **expected).run(Body([b"abc"]).receive)


SHA_256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


async def test_a_body_that_is_what_its_sender_digested_is_committed() -> None:
    sink, _ = await run_with(sha_256=SHA_256_OF_ABC, crc32c=f"{crc32c(b'abc'):08x}")
    assert sink.committed


@pytest.mark.parametrize(
    "expected",
    [{"sha_256": "0" * 64}, {"crc32c": "0" * 8}, {"sha_256": SHA_256_OF_ABC, "crc32c": "0" * 8}],
)
async def test_a_body_that_is_not_is_refused(expected: dict[str, str]) -> None:
    with pytest.raises(DigestMismatch):
        await run_with(**expected)


async def test_a_digest_that_was_given_and_not_made_is_no_match() -> None:
    with pytest.raises(DigestMismatch):
        await run_with(sha_512="0" * 128)


# --- transfer ids ------------------------------------------------------------------------------


def test_ids_are_time_ordered_uuids_in_lower_case() -> None:
    ids = [new_transfer_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    for text in ids:
        value = uuid.UUID(text)
        assert (value.version, value.variant) == (7, uuid.RFC_4122)
        assert str(value) == text
    milliseconds = [uuid.UUID(text).int >> 80 for text in ids]
    assert milliseconds == sorted(milliseconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(nanoseconds: int) -> None:
        monkeypatch.setattr("time.time_ns", lambda: nanoseconds)

    return set_to


def test_an_id_begins_with_the_time_of_its_making(clock: Callable[[int], None]) -> None:
    # The example of RFC 9562, appendix A.6: 22 February 2022, 19:22:22 UTC.
    clock(1_645_557_742_000 * 1_000_000 + 999_999)
    assert new_transfer_id().startswith("017f22e2-79b0-7")


@given(st.integers(0, 2**48 - 2))
def test_a_later_id_sorts_behind_an_earlier_one(milliseconds: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time_ns", lambda: milliseconds * 1_000_000)
        earlier = new_transfer_id()
        patch.setattr("time.time_ns", lambda: (milliseconds + 1) * 1_000_000)
        assert earlier < new_transfer_id()
