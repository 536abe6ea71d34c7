"""One of each fault, and the oracle's word; and that the oracle would notice.

The long version with random faults is `./dev bench faults`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from relay.demo.rabbitmq import RabbitMQNode
from relay.model import Abort, Frame, PartHead, Transfer
from relay.protocol.framing import Framer
from tests import fault_injection as faults
from tests.fault_oracle import KILLED, Attempt, Found, Plan, find, judge
from tests.fault_proxy import Direction, Fault, Kind

ONE_OF_EACH: Final = (
    faults.close_connections,
    faults.by_proxy(Fault(kind=Kind.RESET, after=100_000)),
    faults.by_proxy(Fault(kind=Kind.CUT, direction=Direction.TO_DAEMON, after=300, fresh=True)),
    faults.by_proxy(Fault(kind=Kind.HOLD, after=200_001), seconds=3),  # past confirm_timeout
    faults.suspend_briefly,
    faults.suspend_past_confirms,
    faults.alarm_briefly,
    faults.kill,
    faults.restart,
)
SHORT: Final = faults.Deadlines(reconnect_grace=8, confirm_timeout=2, blocked_grace=2, heartbeat=1)


async def test_every_201_is_found_once_and_nothing_else_after_one_of_each_fault(
    new_node: Callable[[], RabbitMQNode],
) -> None:
    outcome = await faults.run_round(
        await faults.in_thread(new_node),
        ONE_OF_EACH,
        seed=3,
        queue_types=("quorum", "classic"),
        deadlines=SHORT,
        clients=8,
        gap=0.3,
    )
    assert not outcome.violations, "\n".join([*outcome.violations, *outcome.log])
    assert outcome.codes["committed"]
    assert outcome.faults.total() == len(ONE_OF_EACH)


# --- the oracle itself --------------------------------------------------------------------------

PLAN: Final = Plan("p", (10, 300_000), True, "key", 0, None, "contents")
ID: Final = "0199d1f0-0000-7000-8000-000000000001"
OTHER_ID: Final = "0199d1f0-0000-7000-8000-000000000002"


def frames_of(plan: Plan, transfer_id: str = ID) -> list[Frame]:
    transfer = Transfer(id=transfer_id, began=0, route="r", idempotency_key=plan.key)
    framer = Framer(transfer, frame_size=131064)
    frames: list[Frame] = []
    for part in plan.parts():
        frames += framer.start_part(PartHead(name=part.name, filename=part.filename))
        frames += framer.feed(part.data)
        framer.end_part()
    commit, _ = framer.finish()
    return [*frames, commit]


def answered(status: int, code: str, transfer: str = ID) -> Attempt:
    digests = PLAN.digests() if status == 201 else ()
    return Attempt(PLAN, status, code, transfer, digests)


COMMITTED: Final = answered(201, "committed")
KILLED_OVER: Final = Attempt(PLAN, None, KILLED)
FRAMES: Final = frames_of(PLAN)


def test_the_oracle_is_content_with_the_truth() -> None:
    assert judge([COMMITTED], find(FRAMES)) == []
    assert judge([COMMITTED], find([*FRAMES[:2], *FRAMES])) == []
    assert judge([answered(504, "outcome-unknown")], find(FRAMES)) == []
    assert judge([answered(503, "broker-unavailable")], find(FRAMES[:-1])) == []
    again = [*FRAMES, *frames_of(PLAN, OTHER_ID)]
    retried = [answered(504, "outcome-unknown"), answered(201, "committed", OTHER_ID)]
    assert judge(retried, find(again)) == []
    for frames in (FRAMES, FRAMES[:-1]):
        assert judge([KILLED_OVER], find(frames)) == []
    assert judge([KILLED_OVER, answered(201, "committed", OTHER_ID)], find(again)) == []


@pytest.mark.parametrize(
    ("attempts", "frames", "verdict"),
    [
        ([COMMITTED], [], "LOST"),
        ([COMMITTED], FRAMES[:-1], "LOST"),
        ([COMMITTED], [FRAMES[0], *FRAMES[2:]], "do not make a transfer"),
        ([replace(COMMITTED, plan=replace(PLAN, seed="other"))], FRAMES, "CORRUPT"),
        ([replace(COMMITTED, digests=("0", "0"))], FRAMES, "CORRUPT"),
        ([answered(503, "broker-unavailable")], FRAMES, "COMMITTED WITHOUT A 201"),
        ([replace(COMMITTED, transfer=OTHER_ID)], FRAMES, "COMMITTED WITHOUT A 201"),
        ([answered(500, "internal-error")], [], "internal error"),
        ([KILLED_OVER], [*FRAMES, *frames_of(PLAN, OTHER_ID)], "COMMITTED WITHOUT A 201"),
        ([KILLED_OVER, COMMITTED], [], "LOST"),
        ([replace(KILLED_OVER, plan=replace(PLAN, seed="other"))], FRAMES, "CORRUPT"),
        ([Attempt(PLAN, None, "(hung)")], [], "not answered"),
        ([Attempt(PLAN, None, "(no answer)")], [], "not answered"),
    ],
)
def test_the_oracle_notices(
    attempts: list[Attempt], frames: list[Frame | Abort], verdict: str
) -> None:
    verdicts = judge(attempts, find(frames))
    assert any(verdict in each for each in verdicts)


def test_the_oracle_notices_an_upload_that_counts_twice() -> None:
    found = Found()
    found.committed.update([ID, OTHER_ID])
    found.parts = {ID: find(FRAMES).parts[ID], OTHER_ID: find(FRAMES).parts[ID]}
    verdicts = judge([COMMITTED, replace(COMMITTED, transfer=OTHER_ID)], found)
    assert any("DELIVERED TWICE" in each for each in verdicts)
