"""What ``relay receive`` rejects, put where people find it, with the reason."""

from pathlib import Path
from random import Random

import pika
import pytest

from relay.demo.rabbitmq import RabbitMQNode
from relay.protocol.wire import encode_frame
from tests.receiving import FRAME, QUORUM, MakeQueue, Start, check, cut, eventually, messages

STREAM = {"x-queue-type": "stream"}


@pytest.mark.parametrize("arguments", [{}, QUORUM, STREAM], ids=["classic", "quorum", "stream"])
def test_each_dead_letter_says_why_it_is_one(
    make_queue: MakeQueue, start: Start, output: Path, arguments: dict[str, object]
) -> None:
    dead, queue = make_queue(), make_queue(arguments)
    body = Random(1).randbytes(3 * FRAME)
    good, gap, rotten = cut(("good", body)), cut(("gap", body)), cut(("rotten", body))
    message = encode_frame(good[0])
    queue.publish(message, app_id="billing", message_id="foreign")
    queue.publish_frames([gap[0], gap[2]])
    queue.publish_frames([rotten[0]._replace(body=b"x" * FRAME)])
    queue.publish_frames(good)

    receiver = start(queue.name, "--count", "1", "--dead-letter", dead.name)

    assert receiver.wait() == 0
    check(output, good, ("0-good", body))
    letters = dead.drain(4)
    reasons = {str(p.message_id): str((p.headers or {})["relay-reason"]) for p in letters}
    assert "app_id is not relay" in reasons["foreign"]
    assert "frame 2 came where 1 was due (gap)" in reasons[f"{gap[0].transfer.id}.0"]
    assert "frame 2 came where 1 was due (gap)" in reasons[f"{gap[0].transfer.id}.2"]
    assert "crc32c of frame 0" in reasons[f"{rotten[0].transfer.id}.0"]
    for properties in letters:
        headers = properties.headers or {}
        assert headers["relay-queue"] == queue.name
        assert str(headers["relay-at"]).endswith("+00:00")
        assert headers["seq"] == (2 if str(properties.message_id).endswith(".2") else 0)
    if arguments != STREAM:
        queue.wait_for(0)


def test_what_a_producer_wrote_does_not_direct_the_copy(
    make_queue: MakeQueue, start: Start
) -> None:
    dead, queue, elsewhere = make_queue(), make_queue(), make_queue()
    message = encode_frame(cut(("x", b"x"))[0])
    # As much as one AMQP frame takes; no reason fits beside it.
    large = {"large": "x" * 130_800}
    queue.publish(message, app_id="x", headers=large, message_id="large")
    queue.publish(message, app_id="x", user_id="guest", expiration="60000", message_id="properties")
    # The broker itself copies this one, once.
    queue.publish(message, app_id="x", headers={"CC": [elsewhere.name]}, message_id="copied")
    elsewhere.wait_for(1)

    receiver = start(queue.name, "--dead-letter", dead.name, "--idle-exit", "1 s")

    letters = {str(p.message_id): p for p in dead.drain(3)}
    assert receiver.wait() == 0
    elsewhere.wait_for(1)
    assert letters["properties"].user_id is None
    assert letters["properties"].expiration is None
    assert "left out" in str((letters["large"].headers or {})["relay-headers"])
    assert "large" not in (letters["large"].headers or {})
    assert "CC" not in (letters["copied"].headers or {})


def test_a_dead_letter_queue_that_is_missing_is_told_before_anything_is_consumed(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start
) -> None:
    queue = make_queue()
    queue.publish(encode_frame(cut(("x", b"x"))[0]), app_id="x")
    receiver = start(queue.name, "--dead-letter", "nowhere")
    assert receiver.wait() == 1
    assert "nowhere" in receiver.err
    assert len(receiver.err.splitlines()) == 1
    queue.wait_for(1)


def test_the_queue_itself_is_no_place_for_its_dead_letters(start: Start) -> None:
    receiver = start("x", "--dead-letter", "x")
    assert receiver.wait() == 2
    assert len(receiver.err.splitlines()) == 1


def test_a_full_dead_letter_queue_is_waited_for_and_nothing_is_acked(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start
) -> None:
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    dead, queue = make_queue(full), make_queue()
    message = encode_frame(cut(("x", b"x"))[0])
    for n in range(3):
        queue.publish(message, app_id="x", message_id=str(n))

    receiver = start(queue.name, "--dead-letter", dead.name, "--idle-exit", "1 s")

    eventually(lambda: "rejects dead letters" in receiver.err, "a line about it")
    eventually(lambda: messages(rabbitmq, queue) == 3, "3 messages that are not acked")
    found: set[str] = set()
    while len(found) < 3:
        found |= {str(p.message_id) for p in dead.drain(1)}
    assert receiver.wait() == 0
    queue.wait_for(0)


def test_a_deleted_dead_letter_queue_ends_it_and_nothing_is_acked(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    dead, queue = make_queue(), make_queue()
    good = cut(("x", b"x"))
    receiver = start(queue.name, "--dead-letter", dead.name)
    queue.publish_frames(good)
    eventually(lambda: "transfer" in receiver.out, "the receiver is at work")
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        connection.channel().queue_delete(dead.name)
    queue.publish(encode_frame(good[0]), app_id="x")
    assert receiver.wait() == 1
    assert f"--dead-letter: no queue '{dead.name}'" in receiver.err
    queue.wait_for(1)


def test_a_flood_of_bad_messages_does_not_flood_the_log(
    make_queue: MakeQueue, start: Start
) -> None:
    queue = make_queue()
    message = encode_frame(cut(("x", b"x"))[0])
    for _ in range(500):
        queue.publish(message, app_id="x")
    receiver = start(queue.name, "--idle-exit", "1 s")
    assert receiver.wait() == 0
    lines = receiver.err.splitlines()
    assert len(lines) <= 11 * (500 // 10)
    counted = sum(int(line.split()[4]) for line in lines if "… and" in line)
    assert counted + sum("… and" not in line for line in lines) == 500
    queue.wait_for(0)
