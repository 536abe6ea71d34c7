"""What answers mean: whose receipts are believed, and after what it is worth trying again."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.client.answers import RETRY_AFTER_LAST, Trouble, check, receipt_of, trouble_of
from relay.client.exchange import Answer
from relay.model import PartTail

SENT = [PartTail(3, {"crc32c": "00000003", "sha-256": "aa"}), PartTail(0, {"crc32c": "00000000"})]


def answer(status: int, document: object = None, **fields: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return Answer(status=status, fields=named, body=json.dumps(document).encode())


def receipt() -> dict[str, Any]:
    parts = [
        {"part": number, "bytes": tail.size, "digest": dict(tail.digest)}
        for number, tail in enumerate(SENT)
    ]
    return {"transfer": "t", "bytes": 3, "parts": parts}


def test_a_receipt_of_what_was_sent_is_believed() -> None:
    found = receipt_of(answer(201, receipt()))
    check(found, SENT, [])
    assert found == receipt()


def test_parts_that_are_only_counted_are_in_the_sum() -> None:
    short = receipt() | {"parts": receipt()["parts"][:1], "parts_omitted": 1}
    check(receipt_of(answer(201, short)), SENT, [])


CHANGES: list[Callable[[dict[str, Any]], object]] = [
    lambda r: r.update(bytes=4),
    lambda r: r.update(parts_omitted=1),
    lambda r: r["parts"].pop(),
    lambda r: r["parts"][0].update(bytes=4),
    lambda r: r["parts"][0].pop("digest"),
    lambda r: r["parts"][0].update(digest="00000003"),
    lambda r: r["parts"][0]["digest"].pop("crc32c"),
    lambda r: r["parts"][1]["digest"].update(crc32c="00000001"),
    lambda r: r["parts"].reverse(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_receipt_of_anything_else_says_that_it_is_committed_but_differs(
    change: Callable[[dict[str, Any]], object],
) -> None:
    other = receipt()
    change(other)
    with pytest.raises(Trouble, match="the transfer t is committed, but") as caught:
        check(receipt_of(answer(201, other)), SENT, [])
    assert (caught.value.code, caught.value.is_final) == ("differs", True)
    assert caught.value.problem["transfer"] == "t"


def test_a_digest_that_was_asked_for_must_be_there_and_equal() -> None:
    check(receipt(), SENT[:1] * 1 + SENT[1:], [])
    one = receipt() | {"parts": receipt()["parts"][:1], "parts_omitted": 1}
    check(one, SENT, ["sha-256"])
    del one["parts"][0]["digest"]["sha-256"]
    with pytest.raises(Trouble, match="sha-256"):
        check(one, SENT, ["sha-256"])


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"transfer": "t"},
        {"transfer": 1, "bytes": 1, "parts": []},
        {"transfer": "t", "bytes": True, "parts": []},
        {"transfer": "t", "bytes": 1, "parts": [1]},
        {"transfer": "t", "bytes": 1, "parts": [], "parts_omitted": "1"},
    ],
)
def test_what_is_no_receipt_is_none(document: object) -> None:
    with pytest.raises(Trouble, match="no receipt"):
        receipt_of(answer(201, document))


@given(st.binary())
def test_any_bytes_are_a_receipt_or_none(body: bytes) -> None:
    with pytest.raises(Trouble):
        receipt_of(Answer(status=201, fields={}, body=body))


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 507])
def test_what_may_be_otherwise_later_is_tried_again(status: int) -> None:
    assert not trouble_of(answer(status)).is_final


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 403, 404, 413, 422, 501, 505, 999])
def test_what_stays_as_it_is_is_not_tried_again(status: int) -> None:
    assert trouble_of(answer(status)).is_final


def test_a_problem_is_told_in_the_servers_words() -> None:
    problem = {"status": 503, "code": "broker-blocked", "detail": "an alarm", "transfer": "t"}
    trouble = trouble_of(answer(503, problem, retry_after="30"))
    assert trouble.problem == problem
    assert trouble.retry_after == 30


def test_an_answer_of_another_server_is_told_as_well() -> None:
    trouble = trouble_of(Answer(status=502, fields={}, body=b"<html>"))
    assert trouble.problem == {
        "status": 502,
        "code": "http-status",
        "detail": "the server answered Bad Gateway",
    }
    moved = trouble_of(answer(301, location="https://elsewhere/"))
    assert moved.detail == "the server answered Moved Permanently to https://elsewhere/"


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("0", 0, 0),
        ("7", 7, 7),
        ("9" * 50, RETRY_AFTER_LAST, RETRY_AFTER_LAST),
        ("soon", 0, 0),
        ("-1", 0, 0),
        ("²", 0, 0),
        ("Tue, 01 Jan 2030 00:00:00 -0000", 300, 300),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_bounded(value: str, low: float, high: float) -> None:
    assert low <= trouble_of(answer(503, retry_after=value)).retry_after <= high


def test_retry_after_counts_from_now() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 1 <= trouble_of(answer(503, retry_after=soon)).retry_after <= 100
