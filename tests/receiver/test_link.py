"""One consuming connection against a scripted broker: what it holds, asks for and answers."""

import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pika
import pytest
import trio
from pika import frame as amqp
from pika.spec import Basic, BasicProperties, Channel
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from relay.broker.adapter import READ_SIZE
from relay.receiver import Settlement, link
from relay.receiver.link import Delivery, Link, footprint
from tests.scripted_broker import ScriptedBroker, patience

CEILING = 1024 * 1024
BODY = 100_000


class Script(ScriptedBroker):
    """A broker with one queue."""

    consuming = 0
    consumer_tag = ""

    async def accept_consumer(self, prefetch: int) -> tuple[int, Basic.Consume]:
        """Answer what makes a consumer, up to its own request."""
        channel = await self.accept_open()
        _, qos = await self.expect(Basic.Qos)
        assert qos.prefetch_count == prefetch
        await self.send(Basic.QosOk(), channel=channel)
        _, consume = await self.expect(Basic.Consume)
        return channel, consume

    async def deliver(self, tag: int, size: int) -> None:
        """Send a message of so many bytes."""
        channel = self.consuming
        frames: list[amqp.Frame] = [
            amqp.Method(channel, Basic.Deliver(self.consumer_tag, tag, False, "", "q")),
            amqp.Header(channel, size, BasicProperties(headers={"x-stream-offset": tag + 10})),
            amqp.Body(channel, bytes(size)),
        ]
        await self.send_bytes(b"".join(frame.marshal() for frame in frames))


@asynccontextmanager
async def consuming(*, stream: bool) -> AsyncGenerator[tuple[Link, Script], None]:
    """A link that consumes a queue of that kind."""
    ours, theirs = memory_stream_pair()
    it = Link(pika.ConnectionParameters(heartbeat=0), ours, "q", 50, offset=7)
    broker = Script(theirs)
    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.run)
            try:
                await broker.handshake()
                await _accept(broker, stream=stream)
                await it.wait_until(lambda: it.consuming)
                assert it.is_stream == stream
                yield it, broker
            finally:
                # It is shielded: nothing else ends it.
                it.drop("the test is over")


async def _accept(broker: Script, *, stream: bool) -> None:
    channel, consume = await broker.accept_consumer(50)
    assert consume.arguments == {"x-stream-offset": 7}
    if not stream:
        text = "PRECONDITION_FAILED - invalid arg 'x-stream-offset' for queue 'q'"
        await broker.send(Channel.Close(406, text, 60, 20), channel=channel)
        await broker.expect(Channel.CloseOk)
        channel, consume = await broker.accept_consumer(50)
        assert not consume.arguments
    broker.consuming, broker.consumer_tag = channel, consume.consumer_tag
    await broker.send(Basic.ConsumeOk(consume.consumer_tag), channel=channel)


def answer(deliveries: list[Delivery], *, reject: tuple[int, ...] = ()) -> Settlement:
    tags = tuple(d.tag for d in deliveries if d.tag not in reject)
    return Settlement(tags, dict.fromkeys(reject, "why"), (), ())


async def test_it_reads_no_more_than_it_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "HELD_MAX", CEILING)
    async with consuming(stream=True) as (it, broker):
        for tag in range(1, 101):
            await broker.deliver(tag, BODY)
        for _ in range(30):
            await wait_all_tasks_blocked()
            held = sum(len(delivery.body) for delivery in it.deliveries)
            assert held <= CEILING + BODY + READ_SIZE
            batch = it.take(50)
            assert sum(len(delivery.body) for delivery in batch) <= CEILING // 2
            it.settle(batch, answer(batch))
            if batch and batch[-1].tag == 100:
                return
    pytest.fail("not all was delivered")


async def test_a_single_message_larger_than_all_it_may_hold_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "HELD_MAX", 1000)
    async with consuming(stream=True) as (it, broker):
        await broker.deliver(1, BODY)
        await broker.deliver(2, BODY)
        await wait_all_tasks_blocked()
        assert it.is_paused
        for tag in (1, 2):
            await wait_all_tasks_blocked()
            batch = it.take(50)
            assert [delivery.tag for delivery in batch] == [tag]
            it.settle(batch, answer(batch))


async def test_what_is_put_back_comes_first_and_is_not_acked() -> None:
    async with consuming(stream=True) as (it, broker):
        for tag in range(1, 6):
            await broker.deliver(tag, 10)
        await wait_all_tasks_blocked()
        batch = it.take(4)
        it.put_back(batch[2:])
        it.settle(batch[:2], answer(batch[:2]))
        _, ack = await broker.expect(Basic.Ack)
        assert (ack.delivery_tag, ack.multiple) == (2, True)
        assert [delivery.tag for delivery in it.take(9)] == [3, 4, 5]


async def test_of_a_stream_each_delivery_has_its_offset_and_none_is_rejected() -> None:
    async with consuming(stream=True) as (it, broker):
        for tag in (1, 2):
            await broker.deliver(tag, 10)
        await wait_all_tasks_blocked()
        batch = it.take(2)
        assert [delivery.offset for delivery in batch] == [11, 12]
        it.settle(batch, answer(batch, reject=(2,)))
        _, ack = await broker.expect(Basic.Ack)
        assert (ack.delivery_tag, ack.multiple) == (2, True)


async def test_of_another_queue_the_header_says_nothing_and_rejects_are_rejects() -> None:
    async with consuming(stream=False) as (it, broker):
        for tag in (1, 2):
            await broker.deliver(tag, 10)
        await wait_all_tasks_blocked()
        batch = it.take(2)
        assert [delivery.offset for delivery in batch] == [None, None]
        it.settle(batch, answer(batch, reject=(2,)))
        _, reject = await broker.expect(Basic.Reject)
        assert (reject.delivery_tag, reject.requeue) == (2, False)
        _, ack = await broker.expect(Basic.Ack)
        assert ack.delivery_tag == 1


def test_headers_count_as_what_they_take_in_memory() -> None:
    headers = {"seq": 1, "relay": 1}
    assert 200 < footprint(headers) < 500
    assert footprint(headers | {"name": "x" * 10_000}) > 10_000
    fields = {f"{number:x}": True for number in range(20_000)}
    tables = {"table": fields, "list": [dict(fields), ["x" * 1000]]}
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    made = {f"{number:x}": True for number in range(20_000)}
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken <= 1.1 * footprint(made)
    assert footprint(tables) > 2 * footprint(fields)
