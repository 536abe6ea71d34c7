"""Where fuzzing begins: the strict tables' requests, and forms and frames made here."""

from collections.abc import Callable, Iterator

from tests.form_reading import BOUNDARY as LONG
from tests.form_reading import form
from tests.fuzz import frames
from tests.fuzz.targets import BOUNDARY, REQUESTS, TOKEN, seed
from tests.strict.cases import CHUNKED
from tests.strict.framing import FRAMING
from tests.strict.heads import HEADS

MAX_SIZE = 1500
"""Bytes of a seed; the tables' requests about limits are longer, and limits here are smaller."""

DISPOSITIONS = (
    'form-data; name="a"; filename="b"',
    "form-data; name=a; filename=\"b\"; filename*=utf-8''%E2%82%AC",
    "form-data; name*=UTF-8'en'%41; x=y",
    'form-data; name="a\\"b\\\\"; filename="C:\\"',
    "attachment; filename*=\"utf-8''x\" ;; ",
    "form-data; name=a; filename*0=b; filename*1*=utf-8''c",
    'multipart/form-data; boundary="a b"; charset=UTF-8',
)
HEADS_OF_PARTS = (
    b'Content-Disposition: form-data; name="f"; filename="x"\r\nContent-Type: text/plain\r\n\r\n',
    b"content-disposition:form-data;name*=utf-8''a\r\nContent-Length: 3\r\nX: y\r\n\r\n",
    b'Content-Disposition: form-data; name="' + b"a" * 90 + b'"\r\n\r\n',
    b"\r\n",
    b" X: y\r\n\r\n",
)


def _requests() -> list[bytes]:
    cases = [case for table in (HEADS, FRAMING) for row in table.values() for case in row.values()]
    return [case.data for case in cases if len(case.data) <= MAX_SIZE]


def _form_bodies() -> Iterator[bytes]:
    for head in HEADS_OF_PARTS:
        for contents in ([b"x"], [b"\r\n--", b"", b"\r"], [b"x" * 301], [b"1", b"2", b"3", b"4"]):
            for end in (b"--\r\n", b"--", b"\r\n", b"--\r\nepilogue"):
                yield form(*contents, head=head, end=end).replace(LONG.encode(), BOUNDARY.encode())


def _form_request(body: bytes) -> bytes:
    head = f"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    return head.encode() + body


FIELDS = (
    (f"Authorization: Bearer {TOKEN}", 'Idempotency-Key: "k"'),
    (f"authorization: bearer  {TOKEN}", "Idempotency-Key: k"),
    ("Authorization: Bearer relay_y",),
    ("Authorization: Basic YTpi",),
    ("Repr-Digest: sha-256=:LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=:",),
    ("Content-Digest: crc32c=:mnG7TA==:, x=:AA==:", "Want-Repr-Digest: sha-512=1, sha-256=0"),
    (
        "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate: a=b,c@d=e",
    ),
    ("traceparent: cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x", "tracestate:"),
)
"""Of requests whose body is ``hello``."""


def _requests_of_somebody() -> Iterator[bytes]:
    """Twice each, as a client may send it again, and more than one connection takes."""
    for fields in FIELDS:
        for path in ("/upload/x", "/upload/alices/x"):
            head = "\r\n".join([f"PUT {path} HTTP/1.1", "Host: a", *fields, "Content-Length: 5"])
            once = head.encode() + b"\r\n\r\nhello"
            for times in (2, REQUESTS + 1):
                yield once * times


def _watched(data: bytes) -> bytes:
    """The input, with its memory watched."""
    return bytes([data[0] | 0x80]) + data[1:]


def _connections() -> Iterator[bytes]:
    for data in _requests_of_somebody():
        yield _watched(seed(data, 30, len(data) // 2))
    for data in [*_requests(), *map(_form_request, _form_bodies())]:
        yield seed(data, len(data) // 2)
    for data in map(_form_request, _form_bodies()):
        yield _watched(seed(data, len(data) // 2))
    requests = _requests()
    for first, second in zip(requests[::9], requests[4::9], strict=False):
        yield seed(first + second, 20, len(first))


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "connection": _connections,
    "head": lambda: (seed(data, 30) for data in _requests()),
    "chunked": lambda: (
        seed(data.partition(b"\r\n\r\n")[2], 5) for data in _requests() if CHUNKED in data
    ),
    "form": lambda: (seed(data, 40, 60) for data in _form_bodies()),
    "disposition": lambda: (text.encode() for text in DISPOSITIONS),
    "frames": frames.seeds,
}
