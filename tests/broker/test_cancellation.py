"""An upload may be cancelled at any await. Whatever it held goes back to where it was."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.model import Abort
from tests.broker.attempt import FRAME, Attempt, Relay, running
from tests.scripted_broker import Network, Published, RelayGone, ScriptedBroker

COUNT = 6

Scenario = Callable[[Relay, "Recorder"], Awaitable[None]]


class CancelAt(trio.abc.Instrument):
    """Cancels an upload before the n-th step of its task, thus at the await after that step."""

    def __init__(self, upload: Attempt, step: int) -> None:
        self.struck = False
        self._upload = upload
        self._left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._upload.task and not self._upload.is_over:
            self._left -= 1
            if self._left == 0:
                self._upload.scope.cancel()
                self.struck = True


class Recorder:
    """Serves one connection after the other and notes what was said on them."""

    def __init__(self, relay: Relay) -> None:
        self.messages: list[Published] = []
        self.broker: ScriptedBroker | None = None
        self.cut_at: int | None = None
        self._relay = relay

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            self.broker = await self._relay.broker()
            await self.broker.serve(self._take)

    async def _take(self, message: Published) -> None:
        assert self.broker is not None
        self.messages.append(message)
        if message.seq == self.cut_at:
            self.cut_at = None
            await self.broker.cut()
            raise RelayGone
        # Nobody gets on before the confirm has come.
        await wait_all_tasks_blocked()
        await self.broker.confirm(message)


async def on_a_new_channel(relay: Relay, recorder: Recorder) -> None:
    """Nothing was before."""


async def on_a_used_channel(relay: Relay, recorder: Recorder) -> None:
    assert await relay.attempt(COUNT).outcome() is None


async def with_a_connection_lost_in_between(relay: Relay, recorder: Recorder) -> None:
    recorder.cut_at = 2


async def among_others(relay: Relay, recorder: Recorder) -> None:
    for _ in range(3):
        relay.attempt(COUNT)
    await trio.lowlevel.checkpoint()


SCENARIOS = [
    on_a_new_channel,
    on_a_used_channel,
    with_a_connection_lost_in_between,
    among_others,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_an_upload_cancelled_at_any_await_leaves_no_trace(
    scenario: Scenario, autojump_clock: MockClock
) -> None:
    step, struck = 0, True
    while struck:
        step += 1
        struck = await cancel_at(step, scenario)
    # Each frame waits for room at least once, and the channel is waited for before.
    assert step > COUNT


async def cancel_at(step: int, scenario: Scenario) -> bool:
    """Run an upload that is cancelled at ``step``; whether it came so far."""
    # One frame at a time per upload, and fewer than there are uploads in all.
    async with running(Network(), window=2 * FRAME, upload_window=FRAME) as relay:
        recorder = Recorder(relay)
        relay.nursery.start_soon(recorder.run)
        await wait_all_tasks_blocked()
        await scenario(relay, recorder)
        before = len(recorder.messages)
        upload = relay.attempt(COUNT)
        instrument = CancelAt(upload, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await upload.outcome()
        finally:
            trio.lowlevel.remove_instrument(instrument)
        await settle(relay)
        relay.assert_nothing_is_held()
        check_messages(upload, [m for m in recorder.messages[before:] if upload.is_of(m)])
        await check_channels(relay, recorder.broker)
        return instrument.struck


async def check_channels(relay: Relay, broker: ScriptedBroker | None) -> None:
    """Every channel that is open can be had by an upload."""
    assert broker is not None
    channels = set(broker.channels)
    uploads = [relay.attempt(1) for _ in channels]
    for upload in uploads:
        assert await upload.outcome() is None
    assert broker.channels == channels


async def settle(relay: Relay) -> None:
    """Wait until other uploads have ended and all is confirmed."""
    for upload in relay.attempts:
        await upload.outcome()
    await trio.sleep(1)
    await wait_all_tasks_blocked()


def check_messages(upload: Attempt, messages: list[Published]) -> None:
    """What consumers got to see is a whole transfer, or one that is told to have failed."""
    decoded = [message.decode() for message in messages]
    committed = [not isinstance(item, Abort) and item.commit is not None for item in decoded]
    aborted = [isinstance(item, Abort) for item in decoded]
    if messages and not any(committed):
        # Told again if the connection was lost with it; never followed by anything else.
        assert aborted == sorted(aborted)
        abort = decoded[-1]
        assert isinstance(abort, Abort)
        frames = {item.seq for item in decoded if not isinstance(item, Abort)}
        assert frames <= {*range(abort.seq)}
    else:
        assert not any(aborted)
