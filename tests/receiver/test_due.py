"""Due commands, between the storage and who runs them: counted once, and never lost."""

from pathlib import Path

import pytest
from pika.spec import BasicProperties

from relay.model import Frame
from relay.protocol.wire import APP_ID, encode_frame
from relay.receiver.files import FileSink
from relay.receiver.intake import Intake
from relay.receiver.link import Delivery
from tests.receiving import cut


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def opened(output: Path, *, count: int | None = None) -> Intake:
    intake = Intake(lambda: FileSink(output, pending=True), count=count)
    intake.open()
    return intake


def a_transfer() -> list[Frame]:
    return cut(("x", b"x" * 5000))


def deliveries(*transfers: list[Frame]) -> list[Delivery]:
    found: list[Delivery] = []
    for frame in [frame for frames in transfers for frame in frames]:
        message = encode_frame(frame)
        properties = BasicProperties(
            app_id=APP_ID,
            type=message.type,
            correlation_id=message.correlation_id,
            timestamp=message.timestamp,
            headers=dict(message.headers),
        )
        found.append(Delivery(len(found) + 1, properties, message.body))
    return found


def work(intake: Intake, *transfers: list[Frame]) -> list[str]:
    """Have it take all that it wants, as the consumer does; returns whom it told of."""
    batch = deliveries(*transfers)
    told: list[str] = []
    while batch and not intake.is_complete:
        done = intake.work(batch)
        batch = batch[done.fed :]
        told += [delivered.transfer.id for delivered in done.settlement.delivered]
    return told


def due(intake: Intake) -> list[str]:
    return [pending.transfer_id for pending in intake.pending()]


def identify(*transfers: list[Frame]) -> list[str]:
    return [frames[0].transfer.id for frames in transfers]


def the_id(frames: list[Frame]) -> str:
    return frames[0].transfer.id


def test_what_is_delivered_is_due_until_it_is_done_or_given_up(output: Path) -> None:
    first, second, third = a_transfer(), a_transfer(), a_transfer()
    intake = opened(output)
    work(intake, first, second, third)
    assert due(intake) == identify(first, second, third)
    intake.done(the_id(first))
    intake.note_try(the_id(second))
    intake.give_up(the_id(third), "for a reason")
    (left,) = intake.pending()
    assert (left.transfer_id, left.tries) == (the_id(second), 1)
    assert (output / the_id(first)).exists()
    assert not (output / the_id(third)).exists()
    intake.discard()


def test_what_an_earlier_process_left_due_counts_once_though_it_is_delivered_again(
    output: Path,
) -> None:
    first, second, third = a_transfer(), a_transfer(), a_transfer()
    earlier = opened(output)
    work(earlier, first, second)
    earlier.discard()

    intake = opened(output, count=3)
    assert not intake.is_complete
    # Its acks were lost, so all of it comes once more.
    assert work(intake, first, second) == identify(first, second)
    assert not intake.is_complete
    assert due(intake) == identify(first, second)
    work(intake, third)
    assert intake.is_complete
    assert due(intake) == identify(first, second, third)
    intake.discard()


def test_as_many_as_are_wanted_may_be_due_already(output: Path) -> None:
    earlier = opened(output)
    work(earlier, a_transfer(), a_transfer())
    earlier.discard()
    intake = opened(output, count=2)
    assert intake.is_complete
    intake.discard()


def test_while_the_output_is_not_open_nothing_is_noted_and_nothing_lost(output: Path) -> None:
    frames = a_transfer()
    intake = opened(output)
    work(intake, frames)
    intake.discard()
    assert due(intake) == []
    with pytest.raises(OSError, match="not open"):
        intake.done(the_id(frames))
    intake.open()
    assert due(intake) == identify(frames)
    intake.done(the_id(frames))
    assert due(intake) == []
    intake.discard()


def test_what_another_process_has_done_meanwhile_is_done(output: Path) -> None:
    frames = a_transfer()
    intake = opened(output)
    work(intake, frames)
    intake.discard()
    other = opened(output)
    other.done(the_id(frames))
    other.discard()
    intake.open()
    intake.note_try(the_id(frames))
    intake.give_up(the_id(frames), "for a reason")
    intake.done(the_id(frames))
    assert (output / the_id(frames)).exists()
    intake.discard()
