"""Copies for people: all that the message had, but nothing that a broker obeys."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from pika.frame import Header
from pika.spec import BasicProperties

from relay.receiver.dead_letters import AT, CUT, QUEUE, REASON, Letter, copy_properties
from relay.receiver.link import Delivery

AT_NOON = datetime(2026, 1, 2, 12, 0, 0, 999, tzinfo=UTC)
FRAME_MAX = 4096


def copy(properties: BasicProperties, reason: str = "why") -> BasicProperties:
    letter = Letter(Delivery(1, properties, b"body"), reason)
    return copy_properties(letter, "uploads", AT_NOON, FRAME_MAX)


def test_it_has_all_that_the_message_had_and_the_reason() -> None:
    headers = {"seq": 3, "table": {"a": [1, None, b"x"]}, "money": Decimal("1.5"), REASON: "forged"}
    given = BasicProperties(
        app_id="a",
        type="t",
        message_id="m",
        correlation_id="c",
        timestamp=7,
        priority=1,
        delivery_mode=2,
        content_type="x/y",
        headers=headers,
    )
    made = copy(given)
    ours = {REASON: "why", QUEUE: "uploads", AT: "2026-01-02T12:00:00+00:00"}
    assert vars(made) == vars(given) | {"headers": headers | ours}


def test_what_a_broker_would_obey_or_refuse_is_left_out() -> None:
    given = BasicProperties(
        user_id="them",
        reply_to="amq.rabbitmq.reply-to",
        expiration="0",
        headers={"CC": ["elsewhere"], "BCC": ["elsewhere"], "cc": "harmless"},
    )
    made = copy(given)
    assert (made.user_id, made.reply_to, made.expiration) == (None, None, None)
    assert set(made.headers or {}) == {"cc", REASON, QUEUE, AT}


def nested(depth: int) -> dict[str, object]:
    table: dict[str, object] = {}
    for _ in range(depth):
        table = {"": table}
    return table


@pytest.mark.parametrize(
    "headers",
    [{"large": "x" * FRAME_MAX}, {"x" * 300: "long name"}, nested(10_000), {"huge": 2**80}],
    ids=["large", "long name", "deep", "huge"],
)
def test_headers_that_cannot_be_sent_are_left_out_and_that_is_said(
    headers: dict[str, object],
) -> None:
    made = copy(BasicProperties(message_id="m", headers=headers))
    assert made.message_id == "m"
    assert set(made.headers or {}) == {REASON, QUEUE, AT, CUT}
    assert len(Header(1, 4, made).marshal()) <= FRAME_MAX
