"""Reading refusals, in the words of RabbitMQ 3.10 and 4.0, which are the same."""

import pytest

from relay.broker.queues import Unreadable, read_refusal

IN = "for queue 'q' in vhost '/': received"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"'durable' {IN} 'true' but current is 'false'", ("durable", False)),
        (f"'auto_delete' {IN} 'false' but current is 'true'", ("auto_delete", True)),
        (f"'x-max-length' {IN} 'relay asks' but current is '10'", ("x-max-length", 10)),
        (f"'x-overflow' {IN} 'a' but current is 'drop-head'", ("x-overflow", "drop-head")),
        (
            f"'x-overflow' {IN} the value 'relay asks' of type 'longstr' but current is none",
            ("x-overflow", None),
        ),
        (
            f"'x-max-length' {IN} none but current is the value '10' of type 'signedint'",
            ("x-max-length", 10),
        ),
        (
            f"'x-single-active-consumer' {IN} none but current is the value 'true' of type 'bool'",
            ("x-single-active-consumer", True),
        ),
        (
            f"'x-dead-letter-exchange' {IN} none but current is the value 'it's' of type 'longstr'",
            ("x-dead-letter-exchange", "it's"),
        ),
        (
            f"'x-dead-letter-routing-key' {IN} none but current is the value '10' of type"
            " 'longstr'",
            ("x-dead-letter-routing-key", "10"),
        ),
    ],
)
def test_a_refusal_tells_what_differs_and_what_the_queue_has(
    text: str, expected: tuple[str, object]
) -> None:
    name, value = read_refusal(f"406 PRECONDITION_FAILED - inequivalent arg {text}")
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize(
    "text",
    [
        "403 ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'",
        "406 PRECONDITION_FAILED - invalid arg 'x-overflow' for queue 'q' in vhost '/': bad",
        "406 PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue 'qqqqqqqqq...",
        f"406 - inequivalent arg 'x-max-length' {IN} none but current is the val...",
        f"406 - inequivalent arg 'x' {IN} none but current is the value 'a' of type 'table'",
    ],
)
def test_what_is_cut_off_or_something_else_is_not_guessed_at(text: str) -> None:
    with pytest.raises(Unreadable):
        read_refusal(text)
