"""Transfers tried until they are safe or hopeless, against servers that do what the test says."""

import io
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from relay.client.answers import RETRY_AFTER_LAST
from relay.client.endpoint import Endpoint
from relay.client.exchange import EXPECT_FROM
from relay.client.report import Report
from relay.client.send import BACKOFF_FIRST, BACKOFF_LAST, Job, Options, Sender, plan
from relay.client.source import find
from relay.config import ConfigError, HttpConfig, RouteConfig
from relay.protocol.crc import crc32c
from relay.server.handler import UploadHandler
from relay.server.uploads import Uploads
from tests.http_server import ScriptedServer
from tests.memory_broker import PEER, MemoryBroker

Script = Callable[[ScriptedServer], Awaitable[None]]
HOUR = 3600.0


def endpoint(**changes: Any) -> Endpoint:
    given: dict[str, Any] = {"host": "relay.test", "port": 80, "target": "/upload"}
    return Endpoint(**{**given, "authority": "relay.test", "is_secure": False, **changes})


def receipt(body: bytes, **changes: object) -> dict[str, object]:
    part = {"part": 0, "bytes": len(body), "digest": {"crc32c": f"{crc32c(body):08x}"}}
    return {"transfer": "t-1", "bytes": len(body), "parts": [part], **changes}


def jobs_for(*paths: Path | str, **options: Any) -> list[Job]:
    names = [str(path) for path in paths]
    return plan(find(names), Options(files=names, to="", **options))


async def accept(server: ScriptedServer) -> None:
    """Take the request and answer with its receipt."""
    await server.receive_head()
    if "expect" in server.fields:
        await server.go_on()
    while await server.receive_block():
        pass
    await server.answer(201, receipt(server.body))


def refuse(status: int, code: str = "some-code", **fields: str) -> Script:
    async def script(server: ScriptedServer) -> None:
        await server.receive()
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        await server.answer(status, {"code": code, "detail": f"said {status}"}, named)

    return script


async def hang_up(server: ScriptedServer) -> None:
    await server.receive_head()
    await trio.aclose_forcefully(server.stream)


class Site:
    """A place to send to: each connection is served by the next script, the last one for ever."""

    def __init__(self, nursery: trio.Nursery, scripts: Sequence[Script]) -> None:
        self.servers: list[ScriptedServer] = []
        self.times: list[float] = []
        self._nursery = nursery
        self._scripts = list(scripts)

    async def connect(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.times.append(trio.current_time())
        ours, theirs = memory_stream_pair()
        server = ScriptedServer(theirs)
        self.servers.append(server)
        script = self._scripts[min(len(self.times), len(self._scripts)) - 1]
        self._nursery.start_soon(script, server)
        return ours

    @property
    def pauses(self) -> list[float]:
        """Seconds between tries."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def keys(self) -> list[str]:
        return [server.fields["idempotency-key"] for server in self.servers]


@asynccontextmanager
async def sender_to(
    *scripts: Script,
    retry_for: float = HOUR,
    as_json: bool = False,
    is_quiet: bool = False,
    to: Mapping[str, Any] | None = None,
) -> AsyncGenerator[tuple[Sender, Site], None]:
    async with trio.open_nursery() as nursery:
        site = Site(nursery, scripts)
        with Report(total=None, as_json=as_json, is_quiet=is_quiet) as report:
            yield (
                Sender(endpoint(**(to or {})), report, retry_for=retry_for, connect=site.connect),
                site,
            )
        nursery.cancel_scope.cancel()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(b"hello")
    return path


async def test_a_file_is_sent_and_its_line_says_so(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with sender_to(accept) as (sender, site):
        assert await sender.run(jobs_for(file)) == 0
    assert site.servers[0].body == b"hello"
    captured = capsys.readouterr()
    assert captured.out == f"transfer t-1  parts 1  bytes 5  {file}\n"
    assert captured.err == ""


async def test_all_tries_of_a_transfer_have_its_key_and_no_other_has(
    file: Path, autojump_clock: MockClock
) -> None:
    scripts = [refuse(503), hang_up, refuse(409), accept, accept]
    async with sender_to(*scripts) as (sender, site):
        assert await sender.run(jobs_for(file, file)) == 0
    first, second = site.keys[0], site.keys[-1]
    assert site.keys == [first] * 4 + [second]
    assert first != second


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 507])
async def test_what_may_pass_is_tried_again(
    file: Path, status: int, autojump_clock: MockClock
) -> None:
    async with sender_to(refuse(status), accept) as (sender, site):
        assert await sender.run(jobs_for(file)) == 0
    assert len(site.times) == 2


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 417, 422, 501])
async def test_what_does_not_pass_is_tried_once_and_the_others_are_sent(
    file: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async with sender_to(refuse(status), accept) as (sender, site):
        assert await sender.run(jobs_for(file, file)) == 1
    assert len(site.times) == 2
    captured = capsys.readouterr()
    assert captured.err == f"relay send: {file}: {status} some-code: said {status}\n"
    assert captured.out.startswith("transfer t-1")


async def test_pauses_grow_and_are_bounded(file: Path, autojump_clock: MockClock) -> None:
    async with sender_to(*[hang_up] * 20, accept) as (sender, site):
        assert await sender.run(jobs_for(file)) == 0
    assert BACKOFF_FIRST / 2 <= site.pauses[0] <= BACKOFF_FIRST
    assert all(BACKOFF_LAST / 2 <= pause <= BACKOFF_LAST for pause in site.pauses[8:])


async def test_retry_after_is_the_least_pause_and_not_for_ever(
    file: Path, autojump_clock: MockClock
) -> None:
    scripts = [refuse(503, retry_after="100"), refuse(429, retry_after="999999"), accept]
    async with sender_to(*scripts) as (sender, site):
        assert await sender.run(jobs_for(file)) == 0
    assert site.pauses == pytest.approx([100, RETRY_AFTER_LAST])


async def test_it_gives_up_after_the_time_it_was_given(
    file: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with sender_to(hang_up, retry_for=600) as (sender, site):
        assert await sender.run(jobs_for(file)) == 1
    assert 600 - BACKOFF_LAST <= site.times[-1] - site.times[0] <= 600
    told, given_up = capsys.readouterr().err.splitlines()
    assert told.endswith("without an answer; trying again for up to 10 min")
    assert given_up.endswith(f"without an answer (tries: {len(site.times)})")


async def test_a_server_that_is_away_costs_its_time_once_and_not_for_each_transfer(
    file: Path, autojump_clock: MockClock
) -> None:
    async with sender_to(hang_up, retry_for=600) as (sender, site):
        assert await sender.run(jobs_for(file, file, file)) == 1
    assert site.times[-1] - site.times[0] <= 600
    assert len(set(site.keys)) == 3


async def test_a_success_gives_the_time_anew(file: Path, autojump_clock: MockClock) -> None:
    slow = refuse(503, retry_after="300")
    scripts = [slow, slow, accept] * 3
    async with sender_to(*scripts, retry_for=900) as (sender, site):
        assert await sender.run(jobs_for(file, file, file)) == 0
    assert len(site.times) == 9


async def test_without_time_there_is_one_try(file: Path) -> None:
    async with sender_to(hang_up, retry_for=0) as (sender, site):
        assert await sender.run(jobs_for(file)) == 1
    assert len(site.times) == 1


async def test_a_reason_is_told_once_and_again_when_it_changes(
    file: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = refuse(503, "broker-blocked")
    async with sender_to(*[hang_up] * 3, *[busy] * 3, accept) as (sender, _):
        assert await sender.run(jobs_for(file)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert ["connection-lost" in lines[0], "503 broker-blocked" in lines[1]] == [True, True]
    assert len(lines) == 2


async def test_an_early_refusal_leaves_the_body_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse_at_once(server: ScriptedServer) -> None:
        await server.receive_head()
        await server.answer(413, {"code": "too-large", "detail": "no"})

    large = tmp_path / "large"
    large.write_bytes(b"x" * EXPECT_FROM)
    async with sender_to(refuse_at_once) as (sender, site):
        assert await sender.run(jobs_for(large)) == 1
    assert site.servers[0].body == b""
    assert "413 too-large: no" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"bytes": 4}, {"parts": [{"bytes": 5, "digest": {"crc32c": "00000000"}}]}, {"parts": []}],
)
async def test_a_receipt_for_other_bytes_is_a_failure_that_says_committed(
    file: Path, change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    async def differ(server: ScriptedServer) -> None:
        await server.receive()
        await server.answer(201, receipt(server.body, **change))

    async with sender_to(differ, as_json=True) as (sender, site):
        assert await sender.run(jobs_for(file)) == 1
    assert len(site.times) == 1
    captured = capsys.readouterr()
    assert "201 differs: the transfer t-1 is committed, but" in captured.err
    document = json.loads(captured.out)
    assert (document["code"], document["transfer"], document["tries"]) == ("differs", "t-1", 1)


async def test_a_replayed_receipt_is_a_success_that_is_compared_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b"x" * EXPECT_FROM
    large = tmp_path / "large"
    large.write_bytes(body)

    def replay(of: bytes) -> Script:
        async def script(server: ScriptedServer) -> None:
            await server.receive_head()
            await server.answer(201, receipt(of), {"Idempotency-Replayed": "true"})

        return script

    async with sender_to(replay(body), replay(b"y" * EXPECT_FROM), as_json=True) as (sender, site):
        assert await sender.run(jobs_for(large)) == 0
        assert site.servers[0].body == b""
        assert json.loads(capsys.readouterr().out)["replayed"] is True
        assert await sender.run(jobs_for(large)) == 1


async def test_a_file_that_changes_between_tries_is_not_sent_again(
    file: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async def change(server: ScriptedServer) -> None:
        await server.receive()
        os.utime(file, (1, 1))
        await server.answer(503)

    async def watch(server: ScriptedServer) -> None:
        await server.receive_head()
        with pytest.raises(h11.RemoteProtocolError, match="without sending complete"):
            await server.receive_block()

    async with sender_to(change, watch) as (sender, site):
        assert await sender.run(jobs_for(file)) == 1
        await wait_all_tasks_blocked()
    assert len(site.times) == 2
    assert "unsendable: changed while it was sent" in capsys.readouterr().err


# --- standard input ----------------------------------------------------------------------------


@asynccontextmanager
async def stdin_of(data: bytes) -> AsyncGenerator[None, None]:
    saved = os.dup(0)
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    os.dup2(reader, 0)
    os.close(reader)
    try:
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


async def test_standard_input_is_tried_again_while_none_of_it_was_read(
    autojump_clock: MockClock,
) -> None:
    async def refuse_at_once(server: ScriptedServer) -> None:
        await server.receive_head()
        await server.answer(503)

    async with stdin_of(b"hello"), sender_to(refuse_at_once, accept) as (sender, site):
        assert await sender.run(jobs_for("-")) == 0
    assert site.servers[1].body == b"hello"
    assert site.keys[0] == site.keys[1]


async def test_standard_input_is_not_tried_again_after_that(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def lose(server: ScriptedServer) -> None:
        await server.receive_head()
        await server.go_on()
        await server.receive_block()
        await trio.aclose_forcefully(server.stream)

    async with stdin_of(b"hello"), sender_to(lose, accept) as (sender, site):
        assert await sender.run(jobs_for("-")) == 1
    assert len(site.times) == 1
    assert "standard input cannot be read again" in capsys.readouterr().err


# --- tokens ------------------------------------------------------------------------------------


async def test_a_token_is_read_for_each_try_and_told_nobody_else(
    file: Path, tmp_path: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("first-secret\n")

    async def rotate(server: ScriptedServer) -> None:
        await server.receive()
        token.write_text("second-secret\n")
        await server.answer(503)

    to = {"token_file": str(token)}
    async with sender_to(rotate, accept, to=to, as_json=True) as (sender, site):
        assert await sender.run(jobs_for(file)) == 0
    shown = [server.fields["authorization"] for server in site.servers]
    assert shown == ["Bearer first-secret", "Bearer second-secret"]
    captured = capsys.readouterr()
    assert "secret" not in captured.out + captured.err


# --- what is told ------------------------------------------------------------------------------


async def test_nothing_reaches_the_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = tmp_path / "a\x1b[2J\n\u202e\udcff"
    nasty.write_bytes(b"x")

    async def lie(server: ScriptedServer) -> None:
        await server.receive()
        await server.answer(403, {"code": "\x1b]0;x\x07", "detail": "a\r\nrelay send: b"})

    async with sender_to(accept, lie) as (sender, _):
        assert await sender.run(jobs_for(nasty, nasty)) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == len(captured.err.splitlines()) == 1
    for text in (captured.out, captured.err):
        assert text.rstrip("\n").isprintable()
        assert r"a\x1b[2J\n\u202e\udcff" in text


async def test_json_has_a_line_for_each_transfer_whatever_came_of_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with sender_to(accept, refuse(404, "not-found"), as_json=True) as (sender, site):
        assert await sender.run(jobs_for(file, file)) == 1
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    expected = {"file": str(file), "key": site.keys[0], "tries": 1, "replayed": False}
    assert good == {**receipt(b"hello"), **expected}
    assert bad == {
        "status": 404,
        "code": "not-found",
        "detail": "said 404",
        "file": str(file),
        "key": site.keys[1],
        "tries": 1,
    }


async def test_quiet_says_nothing_of_what_goes_well_in_the_end(
    file: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with sender_to(refuse(503), accept, is_quiet=True) as (sender, _):
        assert await sender.run(jobs_for(file)) == 0
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_quiet", [False, True])
async def test_progress_is_shown_on_a_terminal_and_leaves_no_trace(
    file: Path, monkeypatch: pytest.MonkeyPatch, is_quiet: bool
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    async with sender_to(accept, is_quiet=is_quiet) as (sender, _):
        assert await sender.run(jobs_for(file)) == 0
    shown = terminal.getvalue()
    assert ("B/s" in shown) is not is_quiet
    assert shown.rpartition("\r")[0].endswith(" ") or is_quiet


async def test_parts_that_the_receipt_only_counts_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"hello")

    async def omit(server: ScriptedServer) -> None:
        await server.receive()
        await server.answer(201, receipt(b"hello", bytes=10, parts_omitted=1))

    async with sender_to(omit) as (sender, _):
        assert await sender.run(jobs_for(tmp_path, together=True)) == 0
    captured = capsys.readouterr()
    assert f"parts 2  bytes 10  {tmp_path}/a and 1 more\n" in captured.out
    assert "the receipt lists 1 parts; the others were compared by their sum" in captured.err


# --- plans -------------------------------------------------------------------------------------


def test_a_key_is_for_one_transfer(file: Path) -> None:
    assert jobs_for(file, key="k")[0].key == "k"
    assert jobs_for(file, file, key="k", together=True)[0].key == "k"
    with pytest.raises(ConfigError, match="one transfer"):
        jobs_for(file, file, key="k")
    for key in ("", "a b", "ä", 'a"', "a\n", "x" * 256):
        with pytest.raises(ConfigError, match="visible ASCII"):
            jobs_for(file, key=key)


# --- the daemon's own code at the other end ----------------------------------------------------

# The directory is the function's, and each example writes its files anew.
relaxed = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=20)


@relaxed
@given(
    files=st.dictionaries(
        NAMES.filter(lambda name: name not in ("", ".", "..")).filter(
            lambda name: len(name.encode()) < 200
        ),
        st.binary(max_size=10_000),
        min_size=1,
        max_size=4,
    ),
    is_together=st.booleans(),
)
def test_any_files_arrive_at_the_daemon(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], is_together: bool
) -> None:
    top = tmp_path_factory.mktemp("files")
    for name, body in files.items():
        (top / name).write_bytes(body)
    route = RouteConfig(name="default", frame_size=4096)
    broker = MemoryBroker()

    async def main() -> int:
        handler = UploadHandler(HttpConfig(), {"default": route}, broker, Uploads(4))
        async with trio.open_nursery() as nursery:

            async def connect() -> trio.abc.Stream:
                await trio.lowlevel.checkpoint()
                ours, theirs = memory_stream_pair()
                nursery.start_soon(handler.serve, theirs, PEER)
                return ours

            with Report(total=None, as_json=False, is_quiet=True) as report:
                sender = Sender(endpoint(), report, retry_for=0, connect=connect)
                code = await sender.run(jobs_for(top, together=is_together, digest="sha-256"))
            nursery.cancel_scope.cancel()
        return code

    assert trio.run(main) == 0
    assert all(sink.committed for sink in broker.sinks)
    arrived: dict[str, bytes] = {}
    for sink in broker.sinks:
        for frame in sink.frames:
            if frame.head is not None:
                current = str(frame.head.filename)
                arrived[current] = b""
            arrived[current] += frame.body
    assert arrived == files
