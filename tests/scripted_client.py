"""A client in memory that says what it has to say, piece by piece, and then hangs up.

Each piece is one read of the server's, so that a test decides how the bytes of a request are cut.
"""

import json
from collections.abc import Iterable

import trio


class ScriptedClient(trio.abc.HalfCloseableStream):
    """The server's end of the connection: reads are scripted, what is sent is kept.

    Attributes:
        sent: all that the server has sent.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.sent = b""
        self._pieces = iter(pieces)
        self._rest = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next piece, or of a long one as much as is asked for."""
        await trio.lowlevel.checkpoint()
        data = self._rest or next(self._pieces, b"")
        size = len(data) if max_bytes is None else max_bytes
        self._rest = data[size:]
        return data[:size]

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        await trio.lowlevel.checkpoint()
        self.sent += bytes(data)

    async def wait_send_all_might_not_block(self) -> None:
        """It never does."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """Nothing more will be sent."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Nothing to close."""
        await trio.lowlevel.checkpoint()


def responses(sent: bytes) -> tuple[list[str], bool]:
    """The final responses as status and error code, and whether the last one closes.

    Whatever is not a response is an AssertionError. One to HEAD has a length and no body; other
    bodies are JSON objects.
    """
    answers: list[str] = []
    closes = False
    while sent:
        assert not closes, "something was sent after a last response"
        top, empty_line, sent = sent.partition(b"\r\n\r\n")
        line, *fields = top.decode("ascii").split("\r\n")
        assert line.startswith("HTTP/1.1 ")
        assert empty_line
        if line.startswith("HTTP/1.1 100 "):
            continue
        values = dict(field.lower().split(": ", 1) for field in fields)
        length = int(values["content-length"]) if sent.startswith(b"{") else 0
        body, sent = sent[:length], sent[length:]
        assert len(body) == length
        code = json.loads(body).get("code", "") if body else ""
        answers.append(f"{line.split()[1]} {code}".rstrip())
        closes = values.get("connection") == "close"
    return answers, closes
