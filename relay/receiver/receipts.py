"""Documents about one transfer as JSON text: a head, and its parts, one a line.

The parts may be very many, so they are written and read one by one. It does not know where the
documents are kept.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final

from relay.model import Totals, Transfer

Part = dict[str, Any]

_END: Final = "\n]}\n"


def receipt_head(transfer: Transfer, totals: Totals) -> dict[str, object]:
    """What a receipt says before its parts."""
    return {
        "transfer": transfer.id,
        "route": transfer.route,
        "client": transfer.client,
        "idempotency_key": transfer.idempotency_key,
        "began": transfer.began,
        "frames": totals.frames,
        "bytes": totals.bytes,
    }


def document(head: Mapping[str, object], parts: Iterable[Part]) -> Iterator[bytes]:
    """The document's lines."""
    yield (json.dumps(head)[:-1] + ', "parts": [').encode("ascii")
    separator = "\n  "
    for part in parts:
        yield (separator + json.dumps(part)).encode("ascii")
        separator = ",\n  "
    yield _END.encode("ascii")


def read_head(file: BinaryIO) -> Mapping[str, Any]:
    """What a receipt says before its parts, read from its beginning; its parts are next.

    Raises:
        ValueError: this is no receipt.
    """
    head = json.loads(file.readline() + b"]}")
    if not isinstance(head, dict):
        raise ValueError("its receipt cannot be read")
    return head


def transfer_of(head: Mapping[str, Any]) -> Transfer:
    """The transfer of a receipt.

    Raises:
        ValueError: this is no receipt.
    """
    try:
        return Transfer(
            id=head["transfer"],
            began=head["began"],
            route=head["route"],
            client=head["client"],
            idempotency_key=head["idempotency_key"],
        )
    except LookupError as exc:
        raise ValueError("its receipt cannot be read") from exc


def read_parts(file: BinaryIO) -> Iterator[Part]:
    """The parts of a receipt whose head has been read.

    Raises:
        ValueError: this is no receipt, or not all of it.
    """
    for line in file:
        if line.startswith(b"]"):
            return
        yield json.loads(line.strip().removesuffix(b","))
    raise ValueError("its receipt ends before its end")


def check(file: BinaryIO) -> Transfer:
    """The transfer of a receipt that is read from its beginning to its end.

    Raises:
        ValueError: this is no receipt, or not all of it.
    """
    transfer = transfer_of(read_head(file))
    for _ in read_parts(file):
        pass
    return transfer
