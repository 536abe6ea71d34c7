"""A form as a whole request: Content-Type and body, as far as parts or a refusal."""

from relay.config import RouteConfig
from relay.errors import ClientError
from relay.model import PartHead
from relay.protocol.form_data import FormData
from relay.protocol.request import parse_request
from tests.form_reading import BOUNDARY, cut, every_byte, parse

ROUTE = RouteConfig(name="default")
PLAIN_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
Parts = list[tuple[PartHead, bytes]]


def form_parser(content_type: str | bytes = PLAIN_TYPE) -> FormData:
    """The parser that the daemon makes for a request of that Content-Type, with default limits.

    Raises:
        ClientError: the request is refused for its head.
    """
    value = content_type.encode() if isinstance(content_type, str) else content_type
    fields = [(b"host", b"relay.test"), (b"content-type", value)]
    boundary = parse_request(b"POST", b"/upload", fields, b"1.1").boundary
    assert boundary is not None
    return FormData(
        boundary,
        max_parts=ROUTE.max_parts,
        max_part_bytes=ROUTE.max_part_bytes,
        max_part_header_bytes=ROUTE.max_part_header_bytes,
    )


def outcome(body: bytes, content_type: str | bytes = PLAIN_TYPE) -> Parts | type[ClientError]:
    """The parts, or why there are none: the same whole, byte by byte, and in small pieces."""
    try:
        form_parser(content_type)
    except ClientError as exc:
        return type(exc)

    def new() -> FormData:
        return form_parser(content_type)

    whole = parse(new(), cut(body, []))
    for pieces in (every_byte(body), *in_pieces(body)):
        assert parse(new(), pieces) == whole
    return whole.parts if whole.error is None else whole.error


def in_pieces(body: bytes) -> list[list[bytes]]:
    """The body in pieces of 7, of 64 and of 4,096 bytes."""
    return [cut(body, range(0, len(body), size)) for size in (7, 64, 4096)]
