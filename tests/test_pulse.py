"""The event loop's pulse: on a clock that does not run by itself."""

import pytest
import trio
from trio.testing import MockClock

from relay.pulse import INTERVAL, Pulse


@pytest.fixture
def figure() -> list[int]:
    return [0]


async def beats(clock: MockClock, number: int, late: float = 0.0) -> None:
    for _ in range(number):
        clock.jump(INTERVAL + late)
        await trio.testing.wait_all_tasks_blocked()


async def test_what_comes_late_is_measured_and_forgotten_after_a_while(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    pulse = Pulse(lambda: 0)
    assert (pulse.lag, pulse.rate) == (0, 0)
    nursery.start_soon(pulse.run)
    await trio.testing.wait_all_tasks_blocked()
    await beats(mock_clock, 3)
    assert pulse.lag == pytest.approx(0)
    await beats(mock_clock, 1, late=0.3)
    await beats(mock_clock, 5)
    assert pulse.lag == pytest.approx(0.3)
    samples = {(s.name, s.labels.get("le")): s.value for s in _samples(pulse)}
    assert samples["relay_event_loop_lag_seconds_count", None] == 9
    assert samples["relay_event_loop_lag_seconds_bucket", "0.25"] == 8
    await beats(mock_clock, 20)
    assert pulse.lag == pytest.approx(0)


def _samples(pulse: Pulse):  # type: ignore[no-untyped-def]
    (family,) = pulse.lag_seconds.collect()
    return family.samples


async def test_the_rate_is_that_of_the_last_ten_seconds(
    mock_clock: MockClock, nursery: trio.Nursery, figure: list[int]
) -> None:
    pulse = Pulse(lambda: figure[0])
    nursery.start_soon(pulse.run)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(40):
        figure[0] += 500
        await beats(mock_clock, 1)
    assert pulse.rate == pytest.approx(1000, rel=0.1)
    await beats(mock_clock, 40)
    assert pulse.rate == 0
