"""The registry of uploads: its limits, and the end of all uploads at shutdown."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.errors import ClientBusy, ShuttingDown, TooManyUploads
from relay.model import Transfer
from relay.server.uploads import READ_BUDGET, READ_SIZE_MAX, READ_SIZE_MIN, UploadRecord, Uploads
from relay.waits import Wait


def a_transfer(number: int = 0) -> Transfer:
    return Transfer(id=f"0199c0de-0000-7000-8000-{number:012x}", began=1, route="default")


async def test_an_upload_is_known_for_the_length_of_its_block() -> None:
    uploads = Uploads(2)
    with uploads.enter(a_transfer(1), "a:1") as first, uploads.enter(a_transfer(2), "b:2"):
        assert len(uploads) == 2
        assert {record.peer for record in uploads} == {"a:1", "b:2"}
        assert first.transfer == a_transfer(1)
        assert first.bytes_received == 0
    assert len(uploads) == 0
    assert list(uploads) == []


async def test_an_upload_that_fails_is_forgotten_too() -> None:
    uploads = Uploads(1)
    with pytest.raises(ZeroDivisionError), uploads.enter(a_transfer(), "a:1"):
        raise ZeroDivisionError
    assert len(uploads) == 0


async def test_as_many_uploads_as_allowed_and_not_one_more() -> None:
    uploads = Uploads(3)
    with ExitStack() as stack:
        for number in range(3):
            uploads.check()
            stack.enter_context(uploads.enter(a_transfer(number), "a:1"))
        with pytest.raises(TooManyUploads):
            uploads.check()
        with pytest.raises(TooManyUploads):
            stack.enter_context(uploads.enter(a_transfer(9), "a:1"))
        assert len(uploads) == 3
    uploads.check()


async def test_each_client_has_a_limit_of_its_own_and_an_anonymous_one_is_its_host() -> None:
    uploads = Uploads(10, per_client=2)
    with ExitStack() as stack:

        def enter(client: str | None, peer: str) -> None:
            transfer = replace(a_transfer(), client=client)
            uploads.check(client, peer)
            stack.enter_context(uploads.enter(transfer, peer))

        for client, peer in (("a", "h:1"), ("a", "i:2"), (None, "h:3"), (None, "h:4")):
            enter(client, peer)
        for client, peer in (("a", "j:1"), (None, "h:5")):
            with pytest.raises(ClientBusy):
                uploads.check(client, peer)
            with pytest.raises(ClientBusy):
                enter(client, peer)
        for client, peer in (("b", "h:1"), (None, "i:1"), ("h", "h:1")):
            enter(client, peer)
        # Whether uploads would be admitted at all is another question.
        uploads.check()
    uploads.check("a", "h:1")


async def test_the_read_sizes_of_all_uploads_stay_within_the_budget() -> None:
    uploads = Uploads(10_000)
    with ExitStack() as stack:
        records = [
            stack.enter_context(uploads.enter(a_transfer(number), "a:1")) for number in range(1000)
        ]
        # Whoever does not fill its reads has the least, and takes nothing from the others.
        assert {record.read_size for record in records} == {READ_SIZE_MIN}
        for record in records:
            uploads.widen(record)
            uploads.widen(record)
        sizes = [record.read_size for record in records]
        assert sizes[0] == READ_SIZE_MAX
        assert min(sizes) == READ_SIZE_MIN
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) <= READ_BUDGET + READ_SIZE_MIN * len(sizes)
    with uploads.enter(a_transfer(), "a:1") as record:
        uploads.widen(record)
        assert record.read_size == READ_SIZE_MAX


async def hold(uploads: Uploads, seconds: float, records: list[UploadRecord]) -> None:
    with uploads.enter(a_transfer(), "a:1") as record:
        records.append(record)
        with record.scope:
            await trio.sleep(seconds)


async def test_a_drain_ends_with_the_last_upload(autojump_clock: MockClock) -> None:
    uploads = Uploads(9)
    records: list[UploadRecord] = []
    async with trio.open_nursery() as nursery:
        for seconds in (1, 5, 3):
            nursery.start_soon(hold, uploads, seconds, records)
        await wait_all_tasks_blocked()
        await uploads.drain(30)
        assert trio.current_time() == 5
    assert not any(record.scope.cancelled_caught for record in records)


async def test_a_drain_with_nothing_to_wait_for_ends_at_once(autojump_clock: MockClock) -> None:
    await Uploads(1).drain(30)
    assert trio.current_time() == 0


@pytest.mark.parametrize("timeout", [0.0, 2.0])
async def test_what_is_not_done_in_time_is_ended_and_waited_for(
    timeout: float, autojump_clock: MockClock
) -> None:
    uploads = Uploads(9)
    records: list[UploadRecord] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, uploads, 1.0, records)
        nursery.start_soon(hold, uploads, 9.0, records)
        await wait_all_tasks_blocked()
        await uploads.drain(timeout)
        assert trio.current_time() == timeout
        assert len(uploads) == 0
    ended = [record.scope.cancelled_caught for record in records]
    assert sum(ended) == (1 if timeout > 1 else 2)


async def test_a_drain_admits_what_is_connected_until_its_end(autojump_clock: MockClock) -> None:
    uploads = Uploads(9)
    async with trio.open_nursery() as nursery:
        with uploads.connected():
            nursery.start_soon(uploads.drain, 30)
            await trio.sleep(29)
            assert uploads.draining
            with uploads.enter(a_transfer(), "a:1") as record, record.scope:
                await trio.sleep(9)
            assert trio.current_time() == 30
            with pytest.raises(ShuttingDown):
                uploads.check()
            with pytest.raises(ShuttingDown), uploads.enter(a_transfer(), "a:1"):
                raise AssertionError


async def test_a_drain_that_is_hastened_ends_at_once(autojump_clock: MockClock) -> None:
    uploads = Uploads(9)
    records: list[UploadRecord] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, uploads, 1e6, records)
        await wait_all_tasks_blocked()
        nursery.start_soon(uploads.drain, 30)
        await trio.sleep(2)
        uploads.hasten()
    assert trio.current_time() == 2
    assert records[0].scope.cancelled_caught


def test_results_are_counted() -> None:
    uploads = Uploads(1)
    uploads.count("committed", "default", 10)
    uploads.count("committed", "other", 5)
    uploads.count("too-slow", "other")
    uploads.count("too-slow")
    assert uploads.finished == {"committed": 2, "too-slow": 2}
    assert uploads.ended["", "too-slow"] == uploads.ended["other", "too-slow"] == 1
    assert uploads.committed_bytes == {"default": 10, "other": 5}


async def test_totals_have_what_is_in_progress_and_what_has_ended(
    autojump_clock: MockClock,
) -> None:
    uploads = Uploads(2)
    with uploads.enter(a_transfer(), "a:1") as ended:
        ended.bytes_received, ended.frames = 10, 1
        ended.waits.begin(Wait.WINDOW)
        await trio.sleep(3)
        ended.waits.end()
    with uploads.enter(a_transfer(), "a:1") as record:
        record.bytes_received, record.frames = 5, 2
        record.waits.begin(Wait.CLIENT)
        await trio.sleep(4)
        totals = uploads.totals
    assert totals.bytes == {"default": 15}
    assert totals.frames == {"default": 3}
    assert totals.seconds == {Wait.CLIENT: 4, Wait.WINDOW: 3, Wait.BROKER: 0}


async def test_connections_are_waited_for_until_they_are_gone() -> None:
    uploads = Uploads(1)
    answered = trio.Event()

    async def answer() -> None:
        with uploads.connected():
            await answered.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        await wait_all_tasks_blocked()
        nursery.start_soon(uploads.wait_disconnected)
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 2
        answered.set()
