"""Files to bodies: what the daemon's own parsers make of them, and files that change."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from relay.client.exchange import Unsendable
from relay.client.source import BLOCK, Item, Payload, find
from relay.config import ConfigError
from relay.model import PartHead
from relay.protocol.crc import crc32c
from relay.protocol.form_data import BodyParser, FormData, RawBody
from relay.protocol.request import RequestHead, parse_request

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
TRICKY = st.text("ab\"%20AD\r\n\\;='ä ", max_size=12)
BODIES = st.one_of(st.binary(max_size=300), st.sampled_from([b"x" * BLOCK, b"x" * (BLOCK + 1)]))

# The directory is the function's, and each example writes its files anew.
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


async def read_all(payload: Payload) -> bytes:
    await payload.prepare()
    with closing(payload.open()) as reading:
        body = b""
        while block := await reading.read():
            body += block
        payload.sent(reading)
    return body


def head_of(payload: Payload, *, length: int | None) -> RequestHead:
    """What the daemon understands of the request."""
    fields = [(name.lower().encode(), value.encode()) for name, value in payload.fields]
    framing = (b"transfer-encoding", b"chunked")
    if length is not None:
        framing = (b"content-length", str(length).encode())
    return parse_request(b"POST", b"/upload", [(b"host", b"x"), framing, *fields], b"1.1")


def parts_of(payload: Payload, body: bytes) -> list[tuple[PartHead, bytes]]:
    """What the daemon finds in the body."""
    head = head_of(payload, length=len(body))
    parser: BodyParser = RawBody(head.part)
    if head.boundary is not None:
        parser = FormData(
            head.boundary, max_parts=100, max_part_bytes=0, max_part_header_bytes=8192
        )
    parts: list[tuple[PartHead, bytes]] = []
    for event in [*parser.feed(body), *parser.finish()]:
        if isinstance(event, PartHead):
            parts.append((event, b""))
        elif isinstance(event, bytes):
            parts[-1] = (parts[-1][0], parts[-1][1] + event)
    return parts


def item(directory: Path, filename: str | None, body: bytes, number: int = 0) -> Item:
    path = directory / str(number)
    path.write_bytes(body)
    return Item(path=str(path), filename=filename, size=len(body))


@relaxed
@given(name=st.one_of(NAMES, TRICKY), body=BODIES)
def test_a_raw_body_arrives_with_its_name_whatever_that_is(
    tmp_path: Path, name: str, body: bytes
) -> None:
    payload = Payload([item(tmp_path, name, body)], form_field=None)
    assert trio.run(read_all, payload) == body
    assert payload.length == len(body)
    ((head, data),) = parts_of(payload, body)
    assert (head.name, head.filename, data) == (None, name, body)


@relaxed
@given(
    field=st.one_of(NAMES, TRICKY),
    files=st.lists(st.tuples(st.one_of(NAMES, TRICKY), BODIES), min_size=1, max_size=4),
)
def test_a_form_arrives_with_its_names_whatever_they_are(
    tmp_path: Path, field: str, files: Sequence[tuple[str, bytes]]
) -> None:
    items = [item(tmp_path, name, body, number) for number, (name, body) in enumerate(files)]
    payload = Payload(items, form_field=field)
    body = trio.run(read_all, payload)
    assert payload.length == len(body)
    parts = parts_of(payload, body)
    assert [(h.name, h.filename, data) for h, data in parts] == [(field, *file) for file in files]


async def test_names_are_escaped_as_browsers_do(tmp_path: Path) -> None:
    payload = Payload([item(tmp_path, 'ä "x"\r\n.txt', b"")], form_field="f")
    body = await read_all(payload)
    assert 'name="f"; filename="ä %22x%22%0D%0A.txt"\r\nContent-Type: text/plain\r\n' in (
        body.decode()
    )


async def test_each_reading_gives_the_same_bytes(tmp_path: Path) -> None:
    payload = Payload([item(tmp_path, "a", b"1"), item(tmp_path, "b", b"2", 1)], form_field="f")
    assert await read_all(payload) == await read_all(payload)


async def test_digests_are_of_the_file_and_go_along_with_a_raw_body(tmp_path: Path) -> None:
    body = os.urandom(BLOCK + 7)
    payload = Payload([item(tmp_path, "a", body)], form_field=None, wanted=["sha-256"])
    await read_all(payload)
    expected = hashlib.sha256(body).hexdigest()
    head = head_of(payload, length=len(body))
    assert head.given_digests == {"sha-256": expected}
    assert head.wanted_digests == ("sha-256",)
    with closing(payload.open()) as reading:
        while await reading.read():
            pass
        (tail,) = payload.sent(reading)
    assert tail.digest == {"crc32c": f"{crc32c(body):08x}", "sha-256": expected}
    assert reading.size == tail.size == len(body)


async def test_digests_of_a_form_are_those_of_its_parts(tmp_path: Path) -> None:
    payload = Payload(
        [item(tmp_path, "a", b"1"), item(tmp_path, "b", b"", 1)],
        form_field="f",
        wanted=["sha-512"],
    )
    await payload.prepare()
    with closing(payload.open()) as reading:
        while await reading.read():
            pass
        tails = payload.sent(reading)
    assert payload.given == {}
    assert [tail.digest["sha-512"] for tail in tails] == [
        hashlib.sha512(data).hexdigest() for data in (b"1", b"")
    ]


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("a.pdf", "application/pdf"),
        ("a.tar.gz", "application/octet-stream"),
        ("a", "application/octet-stream"),
        ("data:text/html,x", "application/octet-stream"),
        ("data:multipart/mixed,.\r\n", "application/octet-stream"),
        (None, "application/octet-stream"),
    ],
)
async def test_types_follow_from_the_suffix_alone(
    tmp_path: Path, filename: str | None, expected: str
) -> None:
    payload = Payload([item(tmp_path, filename, b"")], form_field=None)
    assert dict(payload.fields)["Content-Type"] == expected


# --- files that change -------------------------------------------------------------------------


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def shrink(path: Path) -> None:
    os.truncate(path, 1)


def rewrite(path: Path) -> None:
    body = path.read_bytes()
    path.write_bytes(body)
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize("change", [grow, shrink, rewrite])
@pytest.mark.parametrize("blocks_before", [0, 1, 2])
@pytest.mark.parametrize("form_field", [None, "f"])
async def test_a_file_that_changes_is_never_sent_as_a_whole(
    tmp_path: Path, change: object, blocks_before: int, form_field: str | None
) -> None:
    assert callable(change)
    one = item(tmp_path, "a", b"y" * (3 * BLOCK))
    payload = Payload([one], form_field=form_field)
    await payload.prepare()
    read = 0
    with closing(payload.open()) as reading:
        for _ in range(blocks_before):
            read += len(await reading.read())
        change(Path(one.path))
        error = None
        try:
            while block := await reading.read():
                read += len(block)
        except Unsendable as exc:
            error = str(exc)
    assert error == "changed while it was sent"
    assert payload.length is not None
    assert read < payload.length


async def test_an_empty_file_that_grows_is_noticed(tmp_path: Path) -> None:
    one = item(tmp_path, "a", b"")
    payload = Payload([one], form_field=None)
    await payload.prepare()
    grow(Path(one.path))
    with closing(payload.open()) as reading, pytest.raises(Unsendable):
        await reading.read()


async def test_a_file_without_a_size_that_has_content_is_refused() -> None:
    payload = Payload([Item(path="/proc/version", filename="v", size=0)], form_field=None)
    await payload.prepare()
    with closing(payload.open()) as reading, pytest.raises(Unsendable):
        await reading.read()


async def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    one = item(tmp_path, "a", b"x")
    payload = Payload([one], form_field=None)
    os.unlink(one.path)
    with pytest.raises(Unsendable, match="cannot be read: No such file"):
        await payload.prepare()


# --- standard input ----------------------------------------------------------------------------


@pytest.fixture
def stdin() -> Iterator[int]:
    """What is written here is standard input; close it for its end."""
    saved = os.dup(0)
    reader, writer = os.pipe()
    os.dup2(reader, 0)
    os.close(reader)
    yield writer
    os.dup2(saved, 0)
    os.close(saved)


async def test_standard_input_is_read_once(stdin: int) -> None:
    payload = Payload([Item(path="-", filename="x", size=None)], form_field=None)
    await payload.prepare()
    assert payload.length is None
    assert not payload.is_spent
    os.write(stdin, b"hello")
    os.close(stdin)
    assert await read_all(payload) == b"hello"
    assert payload.is_spent


async def test_a_form_may_have_standard_input_in_it(stdin: int, tmp_path: Path) -> None:
    items = [item(tmp_path, "a", b"1"), Item(path="-", filename=None, size=None)]
    payload = Payload(items, form_field="f")
    os.write(stdin, b"2")
    os.close(stdin)
    parts = parts_of(payload, await read_all(payload))
    assert [(head.filename, data) for head, data in parts] == [("a", b"1"), (None, b"2")]


async def test_what_is_given_up_while_it_waits_for_standard_input_loses_nothing(
    stdin: int,
) -> None:
    payload = Payload([Item(path="-", filename=None, size=None)], form_field=None)
    await payload.prepare()
    with closing(payload.open()) as reading:
        for _ in range(2):
            with trio.CancelScope() as scope:
                scope.cancel()
                await reading.read()
            assert not payload.is_spent
        os.write(stdin, b"hello")
        assert await reading.read() == b"hello"
        assert payload.is_spent
        os.close(stdin)
        assert await reading.read() == b""


async def test_standard_input_that_does_not_block_is_waited_for(stdin: int) -> None:
    os.set_blocking(0, False)
    payload = Payload([Item(path="-", filename=None, size=None)], form_field=None)
    os.write(stdin, b"hello")
    async with trio.open_nursery() as nursery:
        with closing(payload.open()) as reading:
            assert await reading.read() == b"hello"

            async def end() -> None:
                await wait_all_tasks_blocked()
                os.close(stdin)

            nursery.start_soon(end)
            assert await reading.read() == b""


async def test_standard_input_may_be_a_file(stdin: int, tmp_path: Path) -> None:
    os.close(stdin)
    path = tmp_path / "x"
    path.write_bytes(b"x" * (BLOCK + 1))
    file = os.open(path, os.O_RDONLY)
    os.dup2(file, 0)
    os.close(file)
    payload = Payload([Item(path="-", filename=None, size=None)], form_field=None)
    assert await read_all(payload) == b"x" * (BLOCK + 1)


# --- what paths name ---------------------------------------------------------------------------


def test_directories_are_walked_in_order_and_links_are_not_followed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for name in ("b/z", "b/a", "a", "c"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    (top / "link").symlink_to(top / "a")
    (top / "loop").symlink_to(top)
    os.mkfifo(top / "fifo")
    items = find([str(top)])
    assert [item.filename for item in items] == ["a", "c", "b/a", "b/z"]
    assert [item.size for item in items] == [1, 1, 3, 3]
    assert items[2].path == f"{top}/b/a"


def test_a_path_that_is_a_link_itself_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to("a")
    (item,) = find([str(tmp_path / "link")])
    assert (item.filename, item.size) == ("link", 1)


def test_a_name_that_is_not_utf_8_is_sent_as_near_as_can_be(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.bin"
    Path(os.fsdecode(path)).write_text("x")
    (item,) = find([os.fsdecode(path)])
    assert item.filename == "\ufffd.bin"


def test_paths_that_cannot_be_sent_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (
        ("missing", "No such file"),
        ("empty", "holds no regular file"),
        ("fifo", "neither a regular file"),
        ("nul\0", "null"),
    ):
        with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}: .*{reason}"):
            find([str(tmp_path / name)])
    with pytest.raises(ConfigError, match="once"):
        find(["-", "-"])
