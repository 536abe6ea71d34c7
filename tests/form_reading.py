"""Form bodies as tests write them, and all that a body parser says of one, however it is cut."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from relay.errors import ClientError
from relay.model import PartHead
from relay.protocol.form_data import PART_END, BodyParser, Event, FormData

BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW9"
DELIMITER = f"\r\n--{BOUNDARY}".encode()
HEADER_LIMIT = 200
MAX_PARTS = 4
HEAD = b'Content-Disposition: form-data; name="f"\r\n\r\n'


def new_parser(
    boundary: str = BOUNDARY,
    *,
    max_parts: int = MAX_PARTS,
    max_part_bytes: int = 0,
    max_part_header_bytes: int = HEADER_LIMIT,
) -> FormData:
    return FormData(
        boundary,
        max_parts=max_parts,
        max_part_bytes=max_part_bytes,
        max_part_header_bytes=max_part_header_bytes,
    )


@dataclass
class Parsed:
    """Merged events, and the error that ended them if one did."""

    events: list[Event]
    error: type[ClientError] | None = None

    @property
    def parts(self) -> list[tuple[PartHead, bytes]]:
        """The parts of a body that was in order."""
        assert self.error is None
        heads = [event for event in self.events if isinstance(event, PartHead)]
        contents = b"".join(
            event if isinstance(event, bytes) else b"\0|" * (event is PART_END)
            for event in self.events
        ).split(b"\0|")
        assert self.events.count(PART_END) == len(heads)
        return list(zip(heads, contents[:-1], strict=True))


def parse(parser: BodyParser, pieces: Iterable[bytes]) -> Parsed:
    """All that a parser says of a body that arrives in ``pieces``."""
    result = Parsed([])

    def take(events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, bytes) and result.events and isinstance(result.events[-1], bytes):
                result.events[-1] += event
            elif event != b"":
                result.events.append(event)

    try:
        for piece in pieces:
            take(parser.feed(piece))
        take(parser.finish())
    except ClientError as exc:
        result.error = type(exc)
    return result


def cut(data: bytes, points: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({min(point, len(data)) for point in points}), len(data)]
    return [data[start:end] for start, end in pairwise(edges) if end > start]


def every_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def read(data: bytes, new: Callable[[], BodyParser] = new_parser) -> Parsed:
    """The answer to a body, the same whole, byte by byte and cut in two anywhere."""
    whole = parse(new(), cut(data, []))
    assert parse(new(), every_byte(data)) == whole
    for point in range(1, len(data)):
        assert parse(new(), [data[:point], data[point:]]) == whole, f"cut at {point}"
    return whole


def form(*contents: bytes, head: bytes = HEAD, end: bytes = b"--\r\n") -> bytes:
    return b"".join(
        [
            *(b"--" + BOUNDARY.encode() + b"\r\n" + head + data + b"\r\n" for data in contents),
            b"--" + BOUNDARY.encode() + end,
        ]
    )
