"""How fast clients may send: in the long run no faster than their rate, whatever they do."""

import pytest
import trio
from trio.testing import MockClock

from relay.server.pace import FORGET_AT, READ_SIZE_MIN, Pace

KIB = 1024


async def read(pace: Pace, client: str, size: int, *, at_once: int = 64 * KIB) -> None:
    """Read so many bytes of a client that sends without end."""
    while size > 0:
        await pace.wait(client)
        got = min(size, pace.read_size(at_once))
        pace.count(client, got)
        size -= got


async def test_a_client_is_read_no_faster_than_its_rate(autojump_clock: MockClock) -> None:
    pace = Pace(100 * KIB)
    await read(pace, "a", 6400 * KIB)
    # The last read is not paid for by who leaves, but by who comes next of the same name.
    assert 63 <= trio.current_time() <= 64
    await read(pace, "a", 1)
    assert trio.current_time() == pytest.approx(64)


async def test_uploads_of_one_client_share_its_rate_and_others_have_their_own(
    autojump_clock: MockClock,
) -> None:
    pace = Pace(100 * KIB)
    async with trio.open_nursery() as nursery:
        for client in ("a", "a", "a", "a", "b"):
            nursery.start_soon(read, pace, client, 1000 * KIB)

        @nursery.start_soon
        async def look() -> None:
            await trio.sleep(11)
            assert len(nursery.child_tasks) == 5  # "b" is done, and this one is not

    assert trio.current_time() == pytest.approx(40, abs=4)


async def test_many_small_uploads_are_no_way_around_it(autojump_clock: MockClock) -> None:
    pace = Pace(100 * KIB)
    for _ in range(100):
        await read(pace, "a", 10 * KIB)
    assert trio.current_time() == pytest.approx(9.9)


async def test_time_in_which_nothing_came_is_not_saved_up(autojump_clock: MockClock) -> None:
    pace = Pace(100 * KIB)
    await read(pace, "a", 1)
    await trio.sleep(3600)
    began = trio.current_time()
    await read(pace, "a", 1000 * KIB)
    assert trio.current_time() - began >= 9


@pytest.mark.parametrize("rate", [1, 10 * KIB])
async def test_a_read_is_paid_for_within_a_second_or_is_small(
    rate: int, autojump_clock: MockClock
) -> None:
    assert Pace(rate).read_size(1 << 20) == max(rate, READ_SIZE_MIN)


async def test_without_a_rate_nobody_waits_and_nobody_is_noted(autojump_clock: MockClock) -> None:
    pace = Pace(0)
    assert pace.read_size(1 << 20) == 1 << 20
    await read(pace, "a", 1 << 30, at_once=1 << 20)
    assert trio.current_time() == 0
    assert not pace.noted


async def test_clients_who_owe_nothing_are_forgotten(autojump_clock: MockClock) -> None:
    pace = Pace(1000)
    pace.count("debtor", 10**6)
    for number in range(10 * FORGET_AT):
        pace.count(number, 10)
        await trio.sleep(0.02)
        assert pace.noted <= FORGET_AT
    with trio.move_on_after(1) as scope:
        await pace.wait("debtor")
    assert scope.cancelled_caught
