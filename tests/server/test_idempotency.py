"""What is remembered of keys: never too much, never for the wrong request, never for ever."""

from base64 import b64encode
from collections.abc import Sequence
from contextlib import AbstractContextManager
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.errors import DigestMismatch, KeyInUse
from relay.model import Transfer
from relay.protocol.framing import Framer
from relay.protocol.request import RequestHead, parse_request
from relay.server.idempotency import ENTRY_OVERHEAD, Key, KeyMemory, key_of
from relay.server.responses import created

KEY = Key("ann", "default", "k")


def head(
    *fields: str, target: str = "/upload", method: str = "POST", size: int | None = 10
) -> RequestHead:
    framing = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    lines = ["Host: relay.test", framing, *fields]
    headers = []
    for line in lines:
        name, _, value = line.partition(": ")
        headers.append((name.lower().encode(), value.encode()))
    return parse_request(method.encode(), target.encode(), headers, b"1.1")


def form(boundary: str, size: int | None) -> RequestHead:
    return head(f"Content-Type: multipart/form-data; boundary={boundary}", size=size)


def succeed(
    memory: KeyMemory,
    key: Key | None,
    request: RequestHead,
    body: bytes = b"0123456789",
    *,
    digests: Sequence[str] = (),
    overhead: int = 0,
) -> bytes:
    """Remember what a request with this body is answered with. Returns the answer's body."""
    framer = Framer(
        Transfer(id="0199c0de-0000-7000-8000-000000000000", began=1, route="default"),
        frame_size=4096,
        digests=digests,
    )
    list(framer.start_part(request.part))
    list(framer.feed(body))
    framer.end_part()
    _, receipt = framer.finish()
    answer = created(receipt)
    memory.remember(key, request, len(body) + overhead, receipt, answer)
    return answer.body


def test_a_key_is_unknown_until_its_upload_has_succeeded() -> None:
    memory = KeyMemory()
    assert memory.recall(KEY, head()) is None
    with memory.hold(KEY):
        pass
    assert memory.recall(KEY, head()) is None


def test_a_retry_after_success_gets_the_same_answer_marked_as_replayed() -> None:
    memory = KeyMemory()
    body = succeed(memory, KEY, head())
    for _ in range(2):
        replay = memory.recall(KEY, head())
        assert replay is not None
        assert (replay.status, replay.body) == (201, body)
        assert replay.headers == {"Idempotency-Replayed": "true"}


def test_while_a_key_is_held_nobody_else_gets_anywhere_with_it() -> None:
    memory = KeyMemory()
    with memory.hold(KEY):
        with pytest.raises(KeyInUse):
            memory.recall(KEY, head())
        with pytest.raises(KeyInUse), memory.hold(KEY):
            pass
        # The one who came too late has not let go of what was not theirs.
        assert memory.held == 1
    assert memory.held == 0


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_key_is_free_again_however_its_upload_ends(end: type[BaseException]) -> None:
    memory = KeyMemory()
    with pytest.raises(end), memory.hold(KEY):
        raise end
    assert memory.held == 0
    assert memory.recall(KEY, head()) is None


def test_clients_and_routes_do_not_share_keys() -> None:
    memory = KeyMemory()
    succeed(memory, KEY, head())
    others = [Key("bob", "default", "k"), Key(None, "default", "k"), Key("ann", "other", "k")]
    with memory.hold(KEY):
        assert [memory.recall(key, head()) for key in others] == [None] * 3


def test_anonymous_clients_are_one_client() -> None:
    transfers = [
        Transfer(id=str(n), began=n, route="default", idempotency_key="k") for n in range(2)
    ]
    assert key_of(transfers[0]) == key_of(transfers[1]) == Key(None, "default", "k")


def test_without_a_key_nothing_is_held_or_remembered() -> None:
    memory = KeyMemory()
    with memory.hold(None), memory.hold(None):
        assert memory.recall(None, head()) is None
    succeed(memory, None, head())
    assert (len(memory), memory.bytes, memory.held) == (0, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        head(size=11),
        head("Content-Type: text/plain"),
        head('Content-Disposition: attachment; filename="x"'),
        head(target="/upload/x", method="PUT"),
        form("b", 10),
        form("b", None),
        head("Repr-Digest: sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:"),
    ],
)
def test_a_key_is_not_for_another_request(other: RequestHead) -> None:
    memory = KeyMemory()
    succeed(memory, KEY, head(), digests=["sha-256"])
    with pytest.raises(DigestMismatch):
        memory.recall(KEY, other)
    assert memory.recall(KEY, head()) is not None


def test_how_a_body_is_transferred_or_digested_makes_no_other_request() -> None:
    memory = KeyMemory()
    succeed(memory, KEY, head(), digests=["sha-256"])
    digest = b64encode(sha256(b"0123456789").digest()).decode()
    for retry in [
        head(size=None),
        head("Expect: 100-continue"),
        head(f"Repr-Digest: sha-256=:{digest}:"),
        # What was not computed then cannot be compared now.
        head("Repr-Digest: sha-512=:" + "A" * 86 + "==:"),
    ]:
        assert memory.recall(KEY, retry) is not None


def test_a_form_sent_again_has_another_boundary_and_is_the_same_request() -> None:
    memory = KeyMemory()
    # One part, so two boundaries, and 60 bytes besides.
    succeed(memory, KEY, form("abc", 76), overhead=60 + 2 * 3)
    assert memory.recall(KEY, form("abcdef", 10 + 60 + 2 * 6)) is not None
    assert memory.recall(KEY, form("abcdef", None)) is not None
    with pytest.raises(DigestMismatch):
        memory.recall(KEY, form("abcdef", 10 + 60 + 2 * 6 + 1))
    with pytest.raises(DigestMismatch):
        memory.recall(KEY, head(size=76))


def test_the_key_that_was_not_asked_for_longest_goes_first() -> None:
    memory = KeyMemory(max_keys=2)
    first, second, third = (KEY._replace(key=name) for name in "abc")
    succeed(memory, first, head())
    succeed(memory, second, head())
    assert memory.recall(first, head()) is not None
    succeed(memory, third, head())
    assert [memory.recall(key, head()) is not None for key in (first, second, third)] == [
        True,
        False,
        True,
    ]


def test_an_answer_larger_than_the_memory_is_not_worth_all_others() -> None:
    memory = KeyMemory(max_bytes=ENTRY_OVERHEAD + 2000)
    succeed(memory, KEY, head())
    huge = head(f'Content-Disposition: attachment; filename="{"x" * 2000}"')
    succeed(memory, KEY._replace(key="huge"), huge)
    assert memory.recall(KEY, head()) is not None
    assert memory.recall(KEY._replace(key="huge"), huge) is None


# --- any history -------------------------------------------------------------------------------

KEYS = [Key(client, "default", name) for client in ("ann", None) for name in "abc"]
MAX_KEYS = 3
MAX_BYTES = 4 * ENTRY_OVERHEAD


class Histories(RuleBasedStateMachine):
    """Uploads that begin, succeed, fail and are retried, beside what must be true of them."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = KeyMemory(max_keys=MAX_KEYS, max_bytes=MAX_BYTES)
        self.held: dict[Key, AbstractContextManager[None]] = {}
        self.answers: dict[Key, tuple[RequestHead, bytes]] = {}
        self.latest: Key | None = None

    @rule(key=st.sampled_from(KEYS))
    def begin(self, key: Key) -> None:
        scope = self.memory.hold(key)
        if key in self.held:
            with pytest.raises(KeyInUse):
                scope.__enter__()
        else:
            scope.__enter__()
            self.held[key] = scope

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self._let_go(data)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), size=st.integers(0, 3000))
    def succeed(self, data: st.DataObject, size: int) -> None:
        key = self._let_go(data)
        request = head(f'Content-Disposition: attachment; filename="{"x" * size}"')
        body = succeed(self.memory, key, request)
        self.answers[key] = request, body
        # The name is in the request and in the receipt.
        self.latest = key if ENTRY_OVERHEAD + 2 * size + 1000 < MAX_BYTES else None

    @rule(key=st.sampled_from(KEYS))
    def ask(self, key: Key) -> None:
        request, body = self.answers.get(key, (head(), b""))
        if key in self.held:
            with pytest.raises(KeyInUse):
                self.memory.recall(key, request)
            return
        replay = self.memory.recall(key, request)
        # Others may have been forgotten, but none has the answer to another.
        assert replay.body == body if replay is not None else key != self.latest

    @invariant()
    def it_is_bounded(self) -> None:
        assert self.memory.held == len(self.held)
        assert len(self.memory) <= min(MAX_KEYS, len(self.answers))
        assert self.memory.bytes <= MAX_BYTES
        assert (self.memory.bytes == 0) == (len(self.memory) == 0)

    def _let_go(self, data: st.DataObject) -> Key:
        key = data.draw(st.sampled_from(sorted(self.held, key=str)))
        self.held.pop(key).__exit__(None, None, None)
        return key


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=50, stateful_step_count=30)
