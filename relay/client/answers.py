"""What an answer means: a receipt for the bytes that were sent, or trouble, to try again or not.

A server's words are believed as far as they can be checked. How often and when is tried again is
for others to decide.
"""

import json
import time
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

from relay.client.exchange import Answer
from relay.model import PartTail

RETRIED: Final = frozenset({408, 409, 429, 500, 502, 503, 504, 507})
"""What may be otherwise the next time; with 409 the server still has an earlier try."""

RETRY_AFTER_LAST: Final = 300.0
"""Seconds that a server may ask for (Retry-After)."""


class Trouble(Exception):
    """A try that did not end in a receipt.

    Attributes:
        code: the server's, or one of relay send's own where ``status`` is None or 201.
        status: of the answer; None if there was none.
        transfer: its id, if the server told.
        is_final: another try would end likewise.
        retry_after: seconds that the server wants to be left alone.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int | None = None,
        transfer: str | None = None,
        is_final: bool = True,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.status = status
        self.transfer = transfer
        self.is_final = is_final
        self.retry_after = retry_after

    @property
    def problem(self) -> dict[str, object]:
        """For people and programs, with the names of RFC 9457."""
        problem: dict[str, object] = {"status": self.status, "code": self.code}
        problem["detail"] = self.detail
        return problem if self.transfer is None else problem | {"transfer": self.transfer}

    @property
    def reason(self) -> tuple[object, ...]:
        """What is the same if it is the same trouble again; a server's words may differ."""
        return (self.status, self.code, self.detail if self.status is None else "")


def trouble_of(answer: Answer) -> Trouble:
    """What an answer other than 201 says (RFC 9457), also if it is not from relay."""
    document = _object(answer.body)
    try:
        phrase = HTTPStatus(answer.status).phrase
    except ValueError:
        phrase = "unknown"
    location = f" to {answer.fields['location']}" if "location" in answer.fields else ""
    return Trouble(
        _text(document.get("code")) or "http-status",
        _text(document.get("detail")) or f"the server answered {phrase}{location}",
        status=answer.status,
        transfer=_text(document.get("transfer")) or None,
        is_final=answer.status not in RETRIED,
        retry_after=_retry_after(answer.fields.get("retry-after", "")),
    )


def receipt_of(answer: Answer) -> dict[str, Any]:
    """The receipt in a 201.

    Raises:
        Trouble: it holds none.
    """
    receipt = _object(answer.body)
    parts, omitted = receipt.get("parts"), receipt.get("parts_omitted", 0)
    if (
        not _text(receipt.get("transfer"))
        or type(receipt.get("bytes")) is not int
        or type(omitted) is not int
        or not isinstance(parts, list)
        or not all(isinstance(part, dict) for part in parts)
    ):
        raise Trouble("no-receipt", "the server's answer is no receipt", status=answer.status)
    return receipt


def check(receipt: dict[str, Any], sent: Sequence[PartTail], wanted: Sequence[str]) -> None:
    """Compare a receipt with what was sent: sizes, crc32c, and the digests that were asked for.

    Parts that the receipt only counts are in the total.

    Raises:
        Trouble: it is about other bytes.
    """
    transfer, parts = str(receipt["transfer"]), receipt["parts"]
    differs = f"the transfer {transfer} is committed, but"

    def fail(text: str) -> Trouble:
        return Trouble("differs", f"{differs} {text}", status=201, transfer=transfer)

    if len(parts) + receipt.get("parts_omitted", 0) != len(sent):
        raise fail(f"does not have the {len(sent)} parts that were sent")
    if receipt["bytes"] != sum(tail.size for tail in sent):
        raise fail("does not have the bytes that were sent")
    for number, (part, tail) in enumerate(zip(parts, sent, strict=False)):
        digest = part.get("digest")
        theirs = digest if isinstance(digest, dict) else {}
        for name in ("crc32c", *wanted):
            if part.get("bytes") != tail.size or theirs.get(name) != tail.digest[name]:
                raise fail(f"the {name} or size of part {number} is not that of what was sent")


def _object(body: bytes) -> dict[str, Any]:
    """JSON's object, empty if it is none."""
    try:
        document = json.loads(body)
    # RecursionError: arrays nested by the thousand.
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _retry_after(value: str) -> float:
    """Seconds, from a number of them or a date (RFC 9110, section 10.2.3); 0 if it is neither."""
    if value.isdecimal() and value.isascii():
        seconds = float(value[:9])
    else:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
    return min(max(seconds, 0.0), RETRY_AFTER_LAST)
