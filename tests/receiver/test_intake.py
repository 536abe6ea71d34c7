"""Batches: settled in time on a slow disk, counted exactly, begun again after a full one."""

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest
from pika.spec import BasicProperties

from relay.model import Frame
from relay.protocol.wire import APP_ID, encode_frame
from relay.receiver.files import FileSink
from relay.receiver.intake import BATCH_TIME, Intake
from relay.receiver.link import Delivery
from tests.receiving import FRAME, check, cut


class SlowDisk(FileSink):
    """A second for each frame, by the clock that it is; full when told so."""

    now = 0.0
    full = False

    def write(self, transfer_id: str, body: bytes) -> None:
        if SlowDisk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        SlowDisk.now += 1.0
        super().write(transfer_id, body)


@pytest.fixture(autouse=True)
def _new_disk() -> None:
    SlowDisk.now, SlowDisk.full = 0.0, False


def deliveries(frames: Sequence[Frame]) -> list[Delivery]:
    return [
        Delivery(
            tag,
            BasicProperties(
                app_id=APP_ID,
                type=message.type,
                correlation_id=message.correlation_id,
                timestamp=message.timestamp,
                headers=dict(message.headers),
            ),
            message.body,
        )
        for tag, message in enumerate(map(encode_frame, frames), 1)
    ]


def make_intake(output: Path, count: int | None = None) -> Intake:
    intake = Intake(lambda: SlowDisk(output), count=count, clock=lambda: SlowDisk.now)
    intake.open()
    return intake


def test_on_a_slow_disk_a_batch_is_settled_in_time(tmp_path: Path) -> None:
    intake = make_intake(tmp_path / "output")
    frames = cut(("x", bytes(20 * FRAME)))
    rest = deliveries(frames)
    while rest:
        began = SlowDisk.now
        work = intake.work(rest)
        assert SlowDisk.now - began <= BATCH_TIME
        assert work.fed > 0
        assert work.settlement.ack == tuple(delivery.tag for delivery in rest[: work.fed])
        rest = rest[work.fed :]
    check(tmp_path / "output", frames, ("0-x", bytes(20 * FRAME)))
    intake.discard()


def test_a_disk_slower_than_the_time_for_a_batch_still_takes_a_frame_at_a_time(
    tmp_path: Path,
) -> None:
    slowness = 10 * BATCH_TIME
    intake = Intake(lambda: SlowDisk(tmp_path / "o"), clock=lambda: SlowDisk.now * slowness)
    intake.open()
    rest = deliveries(cut(("x", bytes(3 * FRAME))))
    assert [intake.work(rest[n:]).fed for n in range(3)] == [1, 1, 1]
    intake.discard()


def test_count_is_exact_whatever_comes_in_one_batch(tmp_path: Path) -> None:
    intake = make_intake(tmp_path / "output", count=2)
    transfers = [cut(("x", b"x")) for _ in range(4)]
    work = intake.work(deliveries([frame for frames in transfers for frame in frames]))
    assert work.fed == 2
    assert len(work.settlement.delivered) == 2
    assert intake.is_complete
    intake.discard()


def test_after_a_full_disk_it_goes_on_from_what_is_safe(tmp_path: Path) -> None:
    output = tmp_path / "output"
    intake = make_intake(output, count=2)
    done, frames = cut(("y", b"y")), cut(("x", bytes(8 * FRAME)))
    intake.work(deliveries([*done, *frames[:2]]))
    SlowDisk.full = True
    with pytest.raises(OSError, match="No space left"):
        intake.work(deliveries(frames[2:4]))
    intake.discard()
    SlowDisk.full = False
    intake.open()
    assert not intake.is_complete

    # The acks of what was settled were lost, too: all of it comes again.
    rest = deliveries([*done, *frames])
    told: list[str] = []
    while rest:
        work = intake.work(rest)
        told += [delivered.transfer.id for delivered in work.settlement.delivered]
        rest = rest[work.fed :]

    assert told == [frames[0].transfer.id]
    assert intake.is_complete
    check(output, done, ("0-y", b"y"))
    check(output, frames, ("0-x", bytes(8 * FRAME)))
    intake.discard()
