"""HTTP/1.1 as the RFCs have it: one reading or none, however the bytes come.

Each row of the tables goes through the daemon's own connection and handler: at once, byte by byte,
and both again with a further request behind it, which must be answered exactly once, or, where the
connection ends before it, not at all.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import trio

from relay.config import HttpConfig, RouteConfig
from relay.server.handler import UploadHandler
from relay.server.uploads import Uploads
from tests.memory_broker import PEER, MemoryBroker
from tests.scripted_client import ScriptedClient, responses
from tests.strict.cases import LENGTH, Case, head
from tests.strict.framing import FRAMING
from tests.strict.heads import HEADS

NEXT = head(LENGTH, line=b"PUT /upload/next HTTP/1.1") + b"after"
CASES = {
    f"{section}: {name}": case
    for table in (HEADS, FRAMING)
    for section, cases in table.items()
    for name, case in cases.items()
}


def every_byte(data: bytes) -> list[bytes]:
    """Byte by byte; of very long data the middle in small pieces."""
    middle = range(1000, max(1000, len(data) - 1000), 61)
    edges = [*range(min(1000, len(data))), *middle, *range(max(1000, len(data) - 1000), len(data))]
    return [data[a:b] for a, b in pairwise([*sorted(set(edges)), len(data)])]


def serve(pieces: Sequence[bytes]) -> tuple[list[str], list[bytes], bool]:
    """What a client gets that sends ``pieces``: answers, committed bodies, whether it is closed."""
    broker = MemoryBroker()
    config = HttpConfig()
    routes = {"default": RouteConfig(name="default")}
    handler = UploadHandler(config, routes, broker, Uploads(config.max_uploads))
    client = ScriptedClient(pieces)
    trio.run(handler.serve, client, PEER)
    answers, is_closed = responses(client.sent)
    return answers, [sink.body for sink in broker.sinks if sink.committed], is_closed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_request_has_one_reading_or_none(case: Case) -> None:
    expected = (list(case.answers), list(case.bodies), case.closes)
    followed = expected
    if not case.closes:
        followed = ([*case.answers, "201"], [*case.bodies, b"after"], False)
    assert serve([case.data]) == expected
    assert serve(every_byte(case.data)) == expected
    assert serve([case.data + NEXT]) == followed
    assert serve(every_byte(case.data + NEXT)) == followed


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 150


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_very_long_field_is_taken_or_not_wherever_it_is_cut(extra: int) -> None:
    """CVE-2026-54277 (aiohttp): in several segments it was not limited."""
    limit = HttpConfig().max_header_bytes
    room = limit - len(head(b"X: ", LENGTH)) + extra
    data = head(b"X: " + b"x" * room, LENGTH) + b"hello" + NEXT
    expected = (["201", "201"], [b"hello", b"after"], False)
    if extra > 0:
        expected = (["431 headers-too-large"], [], True)
    edges = [*range(1, 40), *range(40, limit - 30, 1999), *range(limit - 20, limit + 20)]
    for edge in edges:
        assert serve([data[:edge], data[edge:]]) == expected, f"cut at {edge}"
