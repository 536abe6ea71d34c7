"""What the receiver promises of its files and its acks, whatever comes and wherever it crashes."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from relay.model import Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.wire import APP_ID, encode_abort, encode_frame
from relay.receiver import Receiver, Sink, staging
from relay.receiver.files import STAGING, FileSink, OutputInUse
from relay.receiver.ledger import NAME as LEDGER
from tests.fed_receiver import (
    cut,
    give,
    give_frames,
    one,
    receive,
    receiving,
    staged,
    told,
    transfer,
    transfer_id,
    visible,
)

# --- a transfer as files -------------------------------------------------------------------------


def test_a_transfer_becomes_a_directory_with_its_parts_and_a_receipt(tmp_path: Path) -> None:
    frames = cut(
        [
            (PartHead(name="f", filename="größe.txt", content_type="text/plain"), b"123456789"),
            (PartHead(name="empty"), b""),
        ],
        digests=["sha-256"],
    )
    settlement = receive(tmp_path, frames)

    directory = tmp_path / transfer_id(0)
    assert (directory / "0-größe.txt").read_bytes() == b"123456789"
    assert (directory / "1-empty").read_bytes() == b""
    assert json.loads((directory / "receipt.json").read_text()) == {
        "transfer": transfer_id(0),
        "route": "default",
        "client": "ann",
        "idempotency_key": None,
        "began": 1,
        "frames": 4,
        "bytes": 9,
        "parts": [
            {
                "part": 0,
                "file": "0-größe.txt",
                "name": "f",
                "filename": "größe.txt",
                "content_type": "text/plain",
                "bytes": 9,
                "frames": 3,
                "digest": {
                    "crc32c": f"{crc32c(b'123456789'):08x}",
                    "sha-256": hashlib.sha256(b"123456789").hexdigest(),
                },
            },
            {
                "part": 1,
                "file": "1-empty",
                "name": "empty",
                "filename": None,
                "content_type": None,
                "bytes": 0,
                "frames": 1,
                "digest": {"crc32c": "00000000", "sha-256": hashlib.sha256().hexdigest()},
            },
        ],
    }
    assert settlement.ack == (1, 2, 3, 4)
    assert [d.where for d in settlement.delivered] == [str(directory)]
    assert staged(tmp_path) == []


def test_nothing_of_a_transfer_is_visible_before_its_commit(tmp_path: Path) -> None:
    frames = one(b"123456789")
    with receiving(tmp_path) as receiver:
        give_frames(receiver, frames[:-1])
        assert receiver.settle().ack == (1, 2)
        assert os.listdir(tmp_path) == [STAGING]
        give_frames(receiver, frames[-1:], first_tag=3)
        assert receiver.settle().ack == (3,)
    assert transfer_id(0) in os.listdir(tmp_path)


def test_an_abort_leaves_nothing(tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        give_frames(receiver, one(b"123456789")[:2])
        receiver.settle()
        give(receiver, 3, encode_abort(transfer(0), 2, "client-gone"))
        settlement = receiver.settle()
    assert settlement.ack == (3,)
    assert told(settlement) == (f"transfer {transfer_id(0)} aborted: client-gone",)
    assert os.listdir(tmp_path) == [STAGING]
    assert staged(tmp_path) == []


def test_what_comes_again_of_an_aborted_transfer_after_a_crash_is_dropped(tmp_path: Path) -> None:
    frames, abort = one(b"123456789"), encode_abort(transfer(0), 2, "client-gone")
    with receiving(tmp_path) as receiver:
        give_frames(receiver, frames[:1])
        receiver.settle()
        give_frames(receiver, frames[1:2], first_tag=2)
        give(receiver, 3, abort)
        receiver.settle()
    with receiving(tmp_path) as receiver:
        give_frames(receiver, frames[1:2])
        give(receiver, 2, abort)
        settlement = receiver.settle()
    assert (settlement.ack, settlement.reject, settlement.problems) == ((1, 2), {}, ())
    assert staged(tmp_path) == []


def test_an_abort_that_was_not_settled_before_a_crash_is_told_and_done_after_it(
    tmp_path: Path,
) -> None:
    frames, abort = one(b"123456789"), encode_abort(transfer(0), 2, "client-gone")
    with receiving(tmp_path) as receiver:
        give_frames(receiver, frames[:1])
        receiver.settle()
        give_frames(receiver, frames[1:2], first_tag=2)
        give(receiver, 3, abort)
    with receiving(tmp_path) as receiver:
        give_frames(receiver, frames[1:2])
        give(receiver, 2, abort)
        settlement = receiver.settle()
    assert (settlement.ack, settlement.reject) == ((1, 2), {})
    assert told(settlement) == (f"transfer {transfer_id(0)} aborted: client-gone",)
    assert staged(tmp_path) == []


def test_what_an_abort_left_because_of_a_crash_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving(tmp_path) as receiver, monkeypatch.context() as patch:
        patch.setattr(staging, "remove", lambda *_: None)
        give_frames(receiver, one(b"123456789")[:2])
        give(receiver, 3, encode_abort(transfer(0), 2, "client-gone"))
        receiver.settle()
    assert staged(tmp_path) != []
    with receiving(tmp_path):
        assert staged(tmp_path) == []


def test_aborts_of_transfers_that_nobody_knows_are_not_noted(tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        give(receiver, 1, encode_abort(transfer(0), 0, "probe"))
        assert receiver.settle().ack == (1,)
    assert (tmp_path / STAGING / LEDGER).read_bytes() == b""


def test_frames_of_an_expired_transfer_are_rejected_as_its_sender_may_think_it_whole(
    tmp_path: Path,
) -> None:
    now = 0.0
    frames = one(b"123456789")
    with closing(FileSink(tmp_path)) as sink:
        receiver = Receiver(sink, expire_after=10.0, clock=lambda: now)
        give_frames(receiver, frames[:1])
        receiver.settle()
        now = 10.0
        receiver.settle()
        give_frames(receiver, frames[1:], first_tag=2)
        assert [*receiver.settle().reject] == [2, 3]


def test_the_reason_of_an_abort_is_shown_only_if_it_looks_like_one(tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        give_frames(receiver, one(b"123456789")[:2])
        give(receiver, 3, encode_abort(transfer(0), 2, "\x1b[31mlook here"))
        assert told(receiver.settle()) == (f"transfer {transfer_id(0)} aborted: unknown",)


def test_many_parts_are_all_in_the_receipt(tmp_path: Path) -> None:
    receive(tmp_path, cut([(PartHead(name="f"), bytes([n])) for n in range(150)]))
    receipt = json.loads((tmp_path / transfer_id(0) / "receipt.json").read_text())
    assert [part["part"] for part in receipt["parts"]] == list(range(150))


# --- what is wrong -------------------------------------------------------------------------------


def test_a_failed_transfer_leaves_nothing_and_all_its_unsettled_frames_are_rejected(
    tmp_path: Path,
) -> None:
    bad, good = one(b"123456789", 0), one(b"abcdefghi", 1)
    with receiving(tmp_path) as receiver:
        give_frames(receiver, [bad[0], good[0], good[1], bad[2], bad[1], good[2]])
        settlement = receiver.settle()
    assert settlement.ack == (2, 3, 6)
    assert sorted(settlement.reject) == [1, 4, 5]
    assert told(settlement) == (
        f"transfer {transfer_id(0)} failed: frame 2 came where 1 was due (gap)",
    )
    assert visible(tmp_path) == {
        f"{transfer_id(1)}/0-x.bin",
        f"{transfer_id(1)}/receipt.json",
    }
    assert staged(tmp_path) == []


def _tail(frame: Frame, algorithm: str, value: str) -> Frame:
    assert frame.tail is not None
    return frame._replace(tail=PartTail(frame.tail.size, {**frame.tail.digest, algorithm: value}))


@pytest.mark.parametrize("algorithm", ["crc32c", "sha-256", "sha-512"])
def test_every_known_digest_is_verified(tmp_path: Path, algorithm: str) -> None:
    frames = one(b"123456789")
    settlement = receive(tmp_path, [*frames[:-1], _tail(frames[-1], algorithm, "00")])
    assert not settlement.ack
    assert sorted(settlement.reject) == [1, 2, 3]
    assert f"{algorithm} of part 0 does not match" in str(settlement.problems[0])
    assert visible(tmp_path) == set()
    assert staged(tmp_path) == []


def test_an_unknown_digest_is_ignored(tmp_path: Path) -> None:
    frames = one(b"123456789")
    assert receive(tmp_path, [*frames[:-1], _tail(frames[-1], "blake3", "00")]).delivered


@pytest.mark.parametrize("correlation_id", ["../../etc", "", "A" * 36, "x" * 300, None, 7])
def test_an_id_that_is_no_uuid_is_rejected(tmp_path: Path, correlation_id: object) -> None:
    message = encode_frame(one(b"x")[0])
    with receiving(tmp_path) as receiver:
        receiver.feed(
            1,
            app_id=APP_ID,
            type=message.type,
            correlation_id=correlation_id,
            timestamp=message.timestamp,
            headers=dict(message.headers),
            body=message.body,
        )
        settlement = receiver.settle()
    assert [*settlement.reject] == [1]
    assert len(settlement.problems) == 1
    assert os.listdir(tmp_path) == [STAGING]


def test_a_message_of_somebody_else_is_rejected_and_the_next_one_taken(tmp_path: Path) -> None:
    message = encode_frame(one(b"x")[0])
    with receiving(tmp_path) as receiver:
        give(receiver, 1, message, app_id="billing")
        give(receiver, 2, message)
        settlement = receiver.settle()
    assert (settlement.ack, [*settlement.reject]) == ((2,), [1])


def test_frames_of_a_missed_beginning_are_rejected_with_one_word_about_it(tmp_path: Path) -> None:
    settlement = receive(tmp_path, one(b"123456789")[1:])
    assert [*settlement.reject] == [1, 2]
    assert len(settlement.problems) == 1


def test_a_silent_transfer_expires(tmp_path: Path) -> None:
    now = 0.0
    with closing(FileSink(tmp_path)) as sink:
        receiver = Receiver(sink, expire_after=100.0, clock=lambda: now)
        give_frames(receiver, one(b"123456789")[:2])
        assert receiver.settle().ack == (1, 2)
        now = 100.0
        settlement = receiver.settle()
    assert "expired" in str(settlement.problems[0])
    assert staged(tmp_path) == []


def test_what_an_earlier_process_staged_expires_by_the_age_of_its_files(tmp_path: Path) -> None:
    for number in (0, 1):
        with receiving(tmp_path) as receiver:
            give_frames(receiver, one(b"123456789", number)[:2])
            receiver.settle()
    for path in (tmp_path / STAGING).glob(f"{transfer_id(0)}*"):
        os.utime(path, (0, 0))
    with receiving(tmp_path) as receiver:
        assert "expired" in str(receiver.settle().problems[0])
    assert staged(tmp_path) == [transfer_id(1), f"{transfer_id(1)}.journal"]


# --- names ---------------------------------------------------------------------------------------


def test_hostile_names_stay_in_their_directory(tmp_path: Path) -> None:
    output = tmp_path / "out"
    names = [
        "../../../escape",
        f"{tmp_path}/escape",
        "a/../../b",
        "x\0y",
        "é" * 500,
        "same",
        "same",
        ".",
    ]
    receive(output, cut([(PartHead(filename=n), b"x") for n in names]))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    files = {p.name for p in (output / transfer_id(0)).iterdir()}
    assert len(files) == len(names) + 1
    assert {"5-same", "6-same"} < files


# --- nothing is overwritten or followed ----------------------------------------------------------


@pytest.mark.parametrize("content", [[], ["precious"]])
def test_a_directory_that_exists_is_not_touched(tmp_path: Path, content: list[str]) -> None:
    directory = tmp_path / transfer_id(0)
    directory.mkdir()
    for name in content:
        (directory / name).write_text("mine")
    settlement = receive(tmp_path, one(b"123456789"))
    second = tmp_path / f"{transfer_id(0)}-2"
    assert [d.where for d in settlement.delivered] == [str(second)]
    assert (second / "0-x.bin").read_bytes() == b"123456789"
    assert os.listdir(directory) == content
    assert staged(tmp_path) == []


def test_a_staging_directory_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    output = tmp_path / "out"
    output.mkdir()
    (output / STAGING).symlink_to(elsewhere)
    with pytest.raises(NotADirectoryError):
        FileSink(output)
    assert os.listdir(elsewhere) == []


def test_a_staged_file_that_became_a_link_is_not_followed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    victim = tmp_path / "victim"
    victim.write_bytes(b"a long and precious text")
    frames = one(b"123456789")
    receive(output, frames[:2])
    part = output / STAGING / transfer_id(0) / "0-x.bin"
    part.unlink()
    part.symlink_to(victim)
    settlement = receive(output, frames[2:])
    assert [*settlement.reject] == [1]
    assert victim.read_bytes() == b"a long and precious text"


def test_two_receivers_do_not_share_a_directory(tmp_path: Path) -> None:
    with receiving(tmp_path), pytest.raises(OutputInUse):
        FileSink(tmp_path)
    FileSink(tmp_path).close()


# --- the same upload, sent twice -----------------------------------------------------------------


def test_a_second_transfer_with_the_same_key_is_dropped_and_told(tmp_path: Path) -> None:
    first, second = one(b"123456789", 0, key="k"), one(b"123456789", 1, key="k")
    with receiving(tmp_path) as receiver:
        # Interleaved: the one that is complete first is the one that counts.
        give_frames(receiver, [second[0], *first, *second[1:], *second])
        settlement = receiver.settle()
        assert receiver.delivered == 1
    assert settlement.ack == tuple(range(1, 10))
    assert [d.transfer.id for d in settlement.delivered] == [transfer_id(0)]
    assert told(settlement) == (
        f"transfer {transfer_id(1)} dropped: {transfer_id(0)}, with the same Idempotency-Key, "
        "was delivered before",
    )
    assert visible(tmp_path) == {
        f"{transfer_id(0)}/0-x.bin",
        f"{transfer_id(0)}/receipt.json",
    }
    receipt = json.loads((tmp_path / transfer_id(0) / "receipt.json").read_text())
    assert receipt["idempotency_key"] == "k"


def test_keys_are_known_after_a_restart(tmp_path: Path) -> None:
    receive(tmp_path, one(b"123456789", 0, key="k"))
    for number in (1, 2):
        settlement = receive(tmp_path, one(b"123456789", number, key="k"))
        assert (settlement.ack, settlement.delivered) == ((1, 2, 3), ())
        assert transfer_id(0) in str(settlement.problems[0])
    # Its frames may come again even then: the acks were lost.
    assert receive(tmp_path, one(b"123456789", 2, key="k")[1:]).ack == (1, 2)
    assert receive(tmp_path, one(b"123456789", 3, key="other")).delivered


def test_a_transfer_that_could_not_be_delivered_does_not_keep_its_retry_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "default").touch()
    with receiving(tmp_path, name="{route}/{transfer}/{part}") as receiver:
        give_frames(receiver, one(b"123456789", 0, key="k"))
        (tmp_path / "default").unlink()
        give_frames(receiver, one(b"123456789", 1, key="k"), first_tag=4)
        settlement = receiver.settle()
    assert [d.transfer.id for d in settlement.delivered] == [transfer_id(1)]
    assert sorted(settlement.reject) == [1, 2, 3]
    assert "default in the output is not a directory" in str(settlement.problems[0])


def test_the_ledger_is_not_swept_away(tmp_path: Path) -> None:
    receive(tmp_path, one(b"123456789", 0, key="k"))
    ledger = tmp_path / STAGING / LEDGER
    os.utime(ledger, (0, 0))
    with closing(FileSink(tmp_path)) as sink:
        assert sink.sweep(1.0) == []
    assert ledger.exists()


# --- going on after a crash ----------------------------------------------------------------------


def test_a_transfer_goes_on_where_it_was_saved_though_its_first_frames_are_gone(
    tmp_path: Path,
) -> None:
    frames = cut([(PartHead(name="a"), b"123456789"), (PartHead(name="b"), b"abcdef")])
    for frame in frames:
        assert receive(tmp_path, [frame]).ack == (1,)
    directory = tmp_path / transfer_id(0)
    assert (directory / "0-a").read_bytes() == b"123456789"
    assert (directory / "1-b").read_bytes() == b"abcdef"
    receipt = json.loads((directory / "receipt.json").read_text())
    assert [part["frames"] for part in receipt["parts"]] == [3, 2]


def test_what_was_written_but_not_saved_is_dropped_and_comes_again(tmp_path: Path) -> None:
    frames = cut([(PartHead(name="a"), b"123456789"), (PartHead(name="b"), b"abcdef")])
    with receiving(tmp_path) as receiver:
        give_frames(receiver, frames[:1])
        receiver.settle()
        give_frames(receiver, frames[1:-1], first_tag=2)
        # Never settled, as in a crash: none of these was acked.
    settlement = receive(tmp_path, frames[1:])
    assert settlement.ack == (1, 2, 3, 4)
    assert (tmp_path / transfer_id(0) / "0-a").read_bytes() == b"123456789"
    assert (tmp_path / transfer_id(0) / "1-b").read_bytes() == b"abcdef"


@pytest.mark.parametrize(
    "harm", [lambda tail: tail[:-1], lambda tail: tail[:5], lambda tail: bytes(len(tail))]
)
def test_a_journal_that_a_crash_cut_short_counts_up_to_there(
    tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    frames = one(b"123456789")
    receive(tmp_path, frames[:1])
    journal = tmp_path / STAGING / f"{transfer_id(0)}.journal"
    size = journal.stat().st_size
    receive(tmp_path, frames[1:2])
    text = journal.read_bytes()
    journal.write_bytes(text[:size] + harm(text[size:]))
    settlement = receive(tmp_path, frames[1:])
    assert settlement.ack == (1, 2)
    assert (tmp_path / transfer_id(0) / "0-x.bin").read_bytes() == b"123456789"


def test_bytes_that_rotted_on_disk_are_noticed(tmp_path: Path) -> None:
    frames = one(b"123456789")
    receive(tmp_path, frames[:2])
    part = tmp_path / STAGING / transfer_id(0) / "0-x.bin"
    part.write_bytes(b"12X45678")
    settlement = receive(tmp_path, frames[2:])
    assert [*settlement.reject] == [1]
    assert "crc32c of part 0 does not match" in str(settlement.problems[0])
    assert staged(tmp_path) == []


@pytest.mark.parametrize("loss", [lambda part: os.truncate(part, 3), os.unlink])
def test_bytes_lost_from_disk_are_noticed(tmp_path: Path, loss: Callable[[Path], None]) -> None:
    frames = cut([(PartHead(name="a"), b"12345678"), (PartHead(name="b"), b"123456789")])
    for name in ("0-a", "1-b"):
        output = tmp_path / name
        receive(output, frames[:3])
        loss(output / STAGING / transfer_id(0) / name)
        settlement = receive(output, frames[3:])
        assert len(settlement.reject) == 2
        assert "what was staged of it has" in str(settlement.problems[0])
        assert staged(output) == []


def test_a_transfer_delivered_before_a_crash_is_told_again_but_not_written_again(
    tmp_path: Path,
) -> None:
    frames = one(b"123456789")
    receive(tmp_path, frames)
    before = (tmp_path / transfer_id(0)).stat()
    with receiving(tmp_path) as receiver:
        give_frames(receiver, [*frames[1:], *frames[1:]])
        settlement = receiver.settle()
        assert receiver.delivered == 1
    assert settlement.ack == (1, 2, 3, 4)
    assert [d.totals for d in settlement.delivered] == [Totals(3, 1, 9)]
    assert (tmp_path / transfer_id(0)).stat() == before


def test_transfers_beyond_the_limit_are_parked_and_come_back(tmp_path: Path) -> None:
    lines = [one(bytes([48 + n]) * 9, n) for n in range(4)]
    order = [frames[i] for i in range(3) for frames in lines]
    with receiving(tmp_path, max_open=2) as receiver:
        give_frames(receiver, order)
        settlement = receiver.settle()
    assert settlement.ack == tuple(range(1, 13))
    for n in range(4):
        path = tmp_path / transfer_id(n) / "0-x.bin"
        assert path.read_bytes() == bytes([48 + n]) * 9
    assert staged(tmp_path) == []


# --- a sink of somebody else's -------------------------------------------------------------------


class Memory(Sink):
    """The least that is a sink."""

    def __init__(self) -> None:
        self.open: dict[str, list[bytearray]] = {}
        self.done: dict[str, list[bytes]] = {}

    def open_part(self, transfer_id: str, part: int, head: PartHead) -> None:
        self.open.setdefault(transfer_id, []).append(bytearray())

    def write(self, transfer_id: str, body: bytes) -> None:
        self.open[transfer_id][-1] += body

    def commit(self, transfer: Transfer, totals: Totals) -> str:
        self.done[transfer.id] = [bytes(part) for part in self.open.pop(transfer.id)]
        return "memory"

    def abort(self, transfer_id: str) -> None:
        self.open.pop(transfer_id, None)


def test_four_methods_are_a_sink_and_digests_are_verified_for_it() -> None:
    sink = Memory()
    receiver = Receiver(sink)
    bad = one(b"abcdef", 1)
    give_frames(receiver, [*one(b"123456789", digests=["sha-256"]), bad[0]])
    give(receiver, 5, encode_frame(_tail(bad[1], "sha-512", "00")))
    settlement = receiver.settle()
    assert sink.done == {transfer_id(0): [b"123456789"]}
    assert sink.open == {}
    assert (settlement.ack, sorted(settlement.reject)) == ((1, 2, 3), [4, 5])


def test_a_sink_without_memory_fails_the_transfer_that_does_not_fit() -> None:
    sink = Memory()
    receiver = Receiver(sink, max_open=1)
    first, second = one(b"12345678", 0), one(b"abcdefgh", 1)
    give_frames(receiver, [first[0], second[0], first[1], second[1]])
    settlement = receiver.settle()
    assert sink.done == {transfer_id(1): [b"abcdefgh"]}
    assert (settlement.ack, sorted(settlement.reject)) == ((2, 4), [1, 3])


def test_deliveries_of_a_lost_channel_are_not_answered() -> None:
    receiver = Receiver(Memory())
    frames = one(b"123456789")
    give_frames(receiver, frames[:2])
    receiver.disconnected()
    give_frames(receiver, frames, first_tag=1)
    assert receiver.settle().ack == (1, 2, 3)
