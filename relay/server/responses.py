"""What clients are told: receipts, and errors as problem+json (RFC 9457). Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from relay.errors import MethodNotAllowed, RelayError, Unauthorized
from relay.model import PartReceipt, Receipt

# With arguments of its own, json.dumps makes one each time.
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A response whose body is at hand; framing fields are the connection's business."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def problem(error: RelayError, *, transfer_id: str | None = None) -> Response:
    """The response that reports ``error``; ``transfer_id`` if a transfer had begun."""
    document: dict[str, object] = {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
    }
    if transfer_id is not None:
        document["transfer"] = transfer_id
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = error.challenge
    return Response(
        status=error.status,
        body=_json(document),
        content_type="application/problem+json",
        headers=headers,
    )


def created(receipt: Receipt) -> Response:
    """The 201 that says: this transfer is safe."""
    return Response(status=201, body=_json(receipt_document(receipt)))


def receipt_document(receipt: Receipt) -> dict[str, Any]:
    """A receipt as JSON clients see it; sizes in bytes, fields that say nothing left out."""
    document: dict[str, Any] = {
        "transfer": receipt.transfer.id,
        "route": receipt.transfer.route,
        "frames": receipt.totals.frames,
        "bytes": receipt.totals.bytes,
        "parts": [_part_document(part) for part in receipt.parts],
    }
    if receipt.parts_omitted:
        document["parts_omitted"] = receipt.parts_omitted
    return document


def _part_document(receipt: PartReceipt) -> dict[str, Any]:
    head = receipt.head
    described = {"name": head.name, "filename": head.filename, "content_type": head.content_type}
    return {
        "part": receipt.part,
        **{key: value for key, value in described.items() if value is not None},
        "bytes": receipt.tail.size,
        "frames": receipt.frames,
        "digest": dict(receipt.tail.digest),
    }


def _json(document: Mapping[str, object]) -> bytes:
    return _ENCODER.encode(document).encode() + b"\n"
