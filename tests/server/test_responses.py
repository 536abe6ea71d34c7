"""What clients are told, field by field."""

import json
from http import HTTPStatus

import pytest

from relay.errors import (
    BrokerUnavailable,
    MethodNotAllowed,
    RelayError,
    TooLarge,
    TooManyUploads,
)
from relay.model import PartHead, PartReceipt, PartTail, Receipt, Totals, Transfer
from relay.server.responses import created, problem, receipt_document

ID = "0199c0de-0000-7000-8000-000000000001"


def receipt(*parts: PartReceipt, omitted: int = 0) -> Receipt:
    return Receipt(
        transfer=Transfer(id=ID, began=1, route="photos", client="zoë", idempotency_key="k"),
        totals=Totals(4097, len(parts) + omitted, 536870912),
        parts=parts,
        parts_omitted=omitted,
    )


PART = PartReceipt(
    part=0,
    head=PartHead(name="f", filename="ä.bin", content_type="application/octet-stream"),
    tail=PartTail(536870912, {"crc32c": "0012ab00", "sha-256": "00ff"}),
    frames=4097,
)


def test_a_receipt_is_as_the_contract_shows_it() -> None:
    response = created(receipt(PART))
    assert (response.status, response.content_type) == (201, "application/json")
    assert dict(response.headers) == {}
    assert json.loads(response.body) == {
        "transfer": ID,
        "route": "photos",
        "frames": 4097,
        "bytes": 536870912,
        "parts": [
            {
                "part": 0,
                "name": "f",
                "filename": "ä.bin",
                "content_type": "application/octet-stream",
                "bytes": 536870912,
                "frames": 4097,
                "digest": {"crc32c": "0012ab00", "sha-256": "00ff"},
            }
        ],
    }
    assert "ä.bin".encode() in response.body
    assert response.body.endswith(b"}\n")


def test_what_the_client_did_not_say_is_left_out_and_what_it_left_empty_is_not() -> None:
    tail = PartTail(0, {"crc32c": "00000000"})
    plain = PartReceipt(part=1, head=PartHead(name=""), tail=tail, frames=1)
    raw = PartReceipt(part=2, head=PartHead(filename=""), tail=tail, frames=1)
    parts = receipt_document(receipt(plain, raw))["parts"]
    assert [set(part) & {"name", "filename", "content_type"} for part in parts] == [
        {"name"},
        {"filename"},
    ]


def test_parts_left_out_are_counted_and_otherwise_not_mentioned() -> None:
    assert receipt_document(receipt(PART, omitted=7))["parts_omitted"] == 7
    assert "parts_omitted" not in receipt_document(receipt(PART))


def test_a_problem_is_as_rfc_9457_has_it() -> None:
    response = problem(TooLarge("a part is larger than 10 bytes"))
    assert (response.status, response.content_type) == (413, "application/problem+json")
    assert json.loads(response.body) == {
        "type": "about:blank",
        "title": HTTPStatus(413).phrase,
        "status": 413,
        "detail": "a part is larger than 10 bytes",
        "code": "too-large",
    }
    assert dict(response.headers) == {}


def test_a_problem_names_the_transfer_if_one_had_begun() -> None:
    assert json.loads(problem(TooLarge("x"), transfer_id=ID).body)["transfer"] == ID


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (TooManyUploads("x"), {"Retry-After": "5"}),
        (BrokerUnavailable("x"), {"Retry-After": "5"}),
        (MethodNotAllowed("x", allow="POST, PUT"), {"Allow": "POST, PUT"}),
    ],
)
def test_a_problem_has_the_fields_that_belong_to_its_status(
    error: RelayError, headers: dict[str, str]
) -> None:
    assert dict(problem(error).headers) == headers
