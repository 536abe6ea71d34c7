"""What the daemon may cost: memory under the formula of the README, and no file, ever.

Peaks are those that the kernel keeps (VmHWM). Where a peak depends on how far the broker is
behind, the broker is stopped until the windows are full, so that it is the same peak every time.
The broker is a node of these tests' own, because they stop it.
"""

import itertools
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pika
import pytest

from relay.broker.window import KEPT
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from relay.server.uploads import READ_SIZE_MAX
from tests.incident.observe import open_files
from tests.queue_reader import messages_now
from tests.uploading import (
    CONNECTION_COST,
    FRAME_SIZE,
    WEBKIT_BOUNDARY,
    Answer,
    Part,
    RawConnection,
    browser_form,
    chunked,
    content,
    memory_ceiling,
    request,
    request_head,
)

MIB: Final = 1 << 20
UPLOAD_WINDOW: Final = 8 * MIB
FULL_QUEUE: Final = "resources.full"
FULL_QUEUE_BYTES: Final = 4 * MIB

# An exchange without bindings that takes everything and keeps nothing: the broker stores no byte.
CONFIG: Final = f"""
[http]
header_timeout = "10 min"
keep_alive_timeout = "10 min"

[amqp]
window = "WINDOW MiB"
upload_window = "{UPLOAD_WINDOW // MIB} MiB"

[routes.nowhere]
exchange = "resources.nowhere"
mandatory = false
"""
BOUNDED_QUEUE: Final = f"""
[routes.full]
routing_key = "{FULL_QUEUE}"
[routes.full.queue]
name = "{FULL_QUEUE}"
type = "classic"
arguments = {{ x-max-length-bytes = {FULL_QUEUE_BYTES}, x-overflow = "reject-publish" }}
"""
FORM_TYPE: Final = f"multipart/form-data; boundary={WEBKIT_BOUNDARY}"


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQNode]:
    """A node that these tests may stop, with the exchange that keeps nothing."""
    with RabbitMQNode() as running:
        connection = pika.BlockingConnection(pika.URLParameters(running.url))
        connection.channel().exchange_declare("resources.nowhere", durable=True)
        connection.close()
        yield running


@pytest.fixture
def start(node: RabbitMQNode, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons with a window of so many MiB, and ends them."""
    with ExitStack() as stack:

        def start_daemon(window: int = 64, config: str = "") -> Daemon:
            text = CONFIG.replace("WINDOW", str(window)) + config
            return stack.enter_context(Daemon(node.url, text, directory=tmp_path))

        yield start_daemon


@contextmanager
def stopped(node: RabbitMQNode) -> Iterator[None]:
    """The broker stands still inside the block."""
    node.suspend()
    try:
        yield
    finally:
        node.resume()


def until_all_wait_for(daemon: Daemon, whom: str, *, count: int, received: int = 0) -> None:
    """Wait until ``count`` uploads wait for client or window, with ``received`` bytes of each."""

    def do_they() -> bool:
        transfers = daemon.transfers()
        return len(transfers) == count and all(
            str(transfer["waits_for"]) in whom.split(" or ")
            and int(str(transfer["bytes"])) >= received
            for transfer in transfers
        )

    daemon.wait_until(do_they, f"{count} uploads wait for the {whom}")


def until_window_has(daemon: Daemon, size: int) -> None:
    """Wait until ``size`` bytes are unconfirmed, as far as they are a multiple of the frames'."""

    def has_it() -> bool:
        return daemon.metric("relay_window_bytes") > size - FRAME_SIZE

    daemon.wait_until(has_it, f"{size} bytes are unconfirmed")


def until_confirmed(daemon: Daemon) -> None:
    """Wait until the broker owes no confirm."""
    daemon.wait_until(lambda: daemon.metric("relay_window_bytes") == 0, "all is confirmed")


# --- one large upload --------------------------------------------------------------------------


def read_only_file_systems() -> list[str]:
    """The beginning of a command that sees no writable directory; empty if that is forbidden."""
    unshare = ["unshare", "--mount", "--map-root-user"]
    script = (
        "mount -o remount,bind,ro / && "
        "for d in /tmp /var/tmp /dev/shm; do "
        "mount --bind $d $d && mount -o remount,bind,ro $d || exit 1; done; "
        'exec "$@"'
    )
    command = [*unshare, "sh", "-c", script, "sh"]
    return command if subprocess.run([*command, "true"], check=False).returncode == 0 else []


@pytest.fixture(scope="module")
def nowhere_to_write() -> list[str]:
    """The beginning of a command that can write no file: not a byte, and not an empty one.

    With the working directory in /proc, where not even root makes files. Containers may forbid
    to mount; the limit on the size of files alone leaves no directory for temporary files, too.
    """
    command = [*read_only_file_systems(), "prlimit", "--fsize=0", "env", "TMPDIR=/proc"]
    probe = [*command, sys.executable, "-c", "import tempfile; tempfile.gettempdir()"]
    done = subprocess.run(probe, cwd="/proc", capture_output=True, check=False)
    assert b"No usable temporary directory" in done.stderr
    return command


def upload_zeros(daemon: Daemon, size: int, *, stop: Callable[[], None]) -> Answer:
    """Upload a file of ``size`` zero bytes in a form, made while it is sent.

    ``stop`` is called after the first MiB has arrived.
    """
    before = (
        f"--{WEBKIT_BOUNDARY}\r\nContent-Disposition: form-data; "
        'name="file"; filename="zeros"\r\n\r\n'
    ).encode()
    after = f"\r\n--{WEBKIT_BOUNDARY}--\r\n".encode()
    piece = memoryview(bytes(MIB))
    with RawConnection(daemon.address) as connection:
        length = len(before) + size + len(after)
        connection.send(request_head("/upload/nowhere", length, FORM_TYPE) + before)
        connection.send(piece)
        until_all_wait_for(daemon, "client", count=1, received=MIB)
        stop()
        for _ in range(size // MIB - 1):
            connection.send(piece)
        connection.send(after)
        return connection.answer()


def peak_after_an_upload(node: RabbitMQNode, daemon: Daemon, size: int) -> int:
    """The daemon's peak, in which an upload of ``size`` bytes had its window full."""
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(upload_zeros, daemon, size, stop=node.suspend)
        try:
            until_window_has(daemon, UPLOAD_WINDOW)
            # The first MiB may be confirmed, and of what the window has no room for, one read is
            # in memory. The rest is the client's to keep.
            (transfer,) = daemon.transfers()
            most = MIB + UPLOAD_WINDOW + READ_SIZE_MAX + FRAME_SIZE
            assert int(str(transfer["bytes"])) <= most
        finally:
            node.resume()
        answer = upload.result()
    assert answer.status == 201, answer.body
    assert answer.json()["bytes"] == size
    return daemon.memory("VmHWM")


def test_4_gib_with_nowhere_to_write_take_the_memory_of_64_mib(
    node: RabbitMQNode, nowhere_to_write: list[str], tmp_path: Path
) -> None:
    config = CONFIG.replace("WINDOW", "64")
    cwd = Path("/proc")
    with Daemon(node.url, config, directory=tmp_path, prefix=nowhere_to_write, cwd=cwd) as daemon:
        base = daemon.memory()
        # More than one: the heap takes a few uploads to find its shape, of whatever size.
        small = [peak_after_an_upload(node, daemon, 64 * MIB) for _ in range(4)][-1]
        large = peak_after_an_upload(node, daemon, 4096 * MIB)
    print(f"base {base / MIB:.1f}, 64 MiB {small / MIB:.1f}, 4 GiB {large / MIB:.1f} MiB")
    assert large - small <= 2 * MIB
    assert large <= memory_ceiling(base, connections=1, uploads=1)


# --- many uploads ------------------------------------------------------------------------------


class Upload:
    """An upload whose bytes leave when the test says so."""

    def __init__(self, daemon: Daemon, whole: bytes) -> None:
        self.connection = RawConnection(daemon.address)
        self._left = memoryview(whole)

    def send(self, size: int) -> None:
        """Send ``size`` further bytes."""
        self.connection.send(self._left[:size])
        self._left = self._left[size:]

    def finish(self) -> int:
        """Send what is left; returns the answer's status."""
        self.connection.send(self._left)
        return self.connection.answer().status


@contextmanager
def uploads(daemon: Daemon, whole: bytes, count: int) -> Iterator[list[Upload]]:
    """The same request ``count`` times, of which nothing is sent yet."""
    with ExitStack() as stack:
        opened = [Upload(daemon, whole) for _ in range(count)]
        for upload in opened:
            stack.enter_context(upload.connection)
        yield opened


def finish(pending: Sequence[Upload]) -> list[int]:
    """Send the rest of all uploads at once; returns the statuses of the answers."""
    with ThreadPoolExecutor(len(pending)) as pool:
        return list(pool.map(Upload.finish, pending))


def form_of(data: bytes) -> bytes:
    """A request that uploads ``data`` as a file in a form."""
    content_type, body = browser_form([Part(data, "file", "x.bin", "application/octet-stream")])
    return request("/upload/nowhere", body, content_type)


def chunked_form_of(data: bytes) -> bytes:
    """Likewise, with chunks of 50,000 bytes."""
    content_type, body = browser_form([Part(data, "file", "x.bin", "application/octet-stream")])
    head = "POST /upload/nowhere HTTP/1.1\r\nHost: relay.test\r\nTransfer-Encoding: chunked\r\n"
    return f"{head}Content-Type: {content_type}\r\n\r\n".encode() + chunked(body, [50_000])


def test_200_uploads_that_wait_for_their_clients_hold_less_than_a_frame_each(
    start: Callable[..., Daemon],
) -> None:
    count, turns, size, group_size = 200, 3, 300_000, 20
    daemon = start(window=8)
    base = daemon.memory()
    with uploads(daemon, form_of(content(MIB)), count) as pending:
        received = [0] * count
        for turn, first in itertools.product(range(turns), range(0, count, group_size)):
            for number in range(first, first + group_size):
                pending[number].send(size)
                # Less the request's head and, at most, what has not arrived when it is looked at.
                received[number] = (turn + 1) * size - 1000
            daemon.wait_until(
                lambda: sum(int(str(t["bytes"])) for t in daemon.transfers()) >= sum(received),
                "all has arrived",
            )
            until_confirmed(daemon)
        until_all_wait_for(daemon, "client", count=count, received=turns * size - 1000)
        held = daemon.memory() - base
        print(f"{count} slow uploads: {held / MIB:.1f} MiB")
        assert held <= count * (FRAME_SIZE + CONNECTION_COST) + 8 * MIB
        assert finish(pending) == [201] * count


@pytest.mark.parametrize(
    "whole",
    [
        pytest.param(form_of(content(3 * MIB // 2)), id="form"),
        # Each of its reads ends in what may be a delimiter, for which the parser makes copies.
        pytest.param(form_of(b"\r" * (3 * MIB // 2)), id="hostile form"),
        pytest.param(chunked_form_of(b"\r" * (3 * MIB // 2)), id="chunked hostile form"),
    ],
)
def test_200_uploads_stay_under_the_ceiling_while_the_broker_stands_still(
    node: RabbitMQNode, start: Callable[..., Daemon], whole: bytes
) -> None:
    count, window = 200, 8 * MIB
    daemon = start(window=8)
    base = daemon.memory()
    with uploads(daemon, whole, count) as pending, ThreadPoolExecutor(count) as pool:
        for upload in pending:
            upload.send(2000)
        until_all_wait_for(daemon, "client", count=count, received=1)
        with stopped(node):
            answers = pool.map(Upload.finish, pending)
            until_all_wait_for(daemon, "window or broker", count=count, received=1)
            until_window_has(daemon, window - window // KEPT)
            assert daemon.metric("relay_window_bytes") <= window
        assert list(answers) == [201] * count
    peak = daemon.memory("VmHWM")
    ceiling = memory_ceiling(base, connections=count, uploads=count, window=window)
    print(f"base {base / MIB:.1f}, peak {peak / MIB:.1f}, ceiling {ceiling / MIB:.1f} MiB")
    assert peak <= ceiling


def test_parts_with_long_names_and_no_content_take_room_in_the_window(
    node: RabbitMQNode, start: Callable[..., Daemon]
) -> None:
    count, window = 10, 8 * MIB
    # One character beyond the basic plane makes Python keep 4 bytes for each.
    content_type, body = browser_form([Part(b"", "n" * 7000 + "\N{GRINNING FACE}")] * 1000)
    whole = request("/upload/nowhere", body, content_type)
    daemon = start(window=8)
    base = daemon.memory()
    with uploads(daemon, whole, count) as pending, ThreadPoolExecutor(count) as pool:
        for upload in pending:
            upload.send(16_000)
        until_all_wait_for(daemon, "client", count=count, received=14_000)
        with stopped(node):
            answers = pool.map(Upload.finish, pending)
            until_all_wait_for(daemon, "window or broker", count=count, received=16_000)
            until_window_has(daemon, window - window // KEPT)
            assert daemon.metric("relay_window_bytes") <= window
        assert list(answers) == [201] * count
    ceiling = memory_ceiling(base, connections=count, uploads=count, window=window)
    assert daemon.memory("VmHWM") <= ceiling


def test_headers_of_a_part_that_mean_nothing_are_not_kept(start: Callable[..., Daemon]) -> None:
    count = 200
    # Within the limit of 8 KiB, and far more as objects than as bytes.
    headers = 'Content-Disposition: form-data; name="x"\r\n' + "a:\r\n" * 1950
    body = f"--{WEBKIT_BOUNDARY}\r\n{headers}\r\n".encode()
    daemon = start()
    base = daemon.memory()
    with uploads(daemon, request_head("/upload/nowhere", 10**6, FORM_TYPE) + body, count) as begun:
        for upload in begun:
            upload.send(10**6)
        until_all_wait_for(daemon, "client", count=count, received=len(body))
        assert daemon.memory() - base <= count * CONNECTION_COST


# --- a full queue ------------------------------------------------------------------------------


def test_a_client_faster_than_a_full_queue_is_refused_and_not_buffered(
    node: RabbitMQNode, start: Callable[..., Daemon]
) -> None:
    daemon = start(window=8, config=BOUNDED_QUEUE)
    base = daemon.memory()
    piece = memoryview(bytes(MIB))
    with RawConnection(daemon.address) as connection:
        connection.send(request_head("/upload/full", 1024 * MIB))
        while not connection.has_answer():
            connection.send(piece)
        answer = connection.answer()
    assert (answer.status, answer.json()["code"]) == (507, "queue-full")
    peak = daemon.memory("VmHWM")
    assert peak <= memory_ceiling(base, connections=1, uploads=1, window=UPLOAD_WINDOW)
    messages = messages_now(node.url, FULL_QUEUE)
    assert messages
    # What was on its way when the queue filled up may still have been taken.
    assert sum(len(message.body) for message in messages) <= FULL_QUEUE_BYTES + UPLOAD_WINDOW
    assert not any("commit" in message.properties.headers for message in messages)
    # There is room again, and the next upload takes it.
    with RawConnection(daemon.address) as connection:
        connection.send(request("/upload/full", bytes(MIB)))
        assert connection.answer().status == 201


# --- connections -------------------------------------------------------------------------------


@pytest.fixture
def many_files() -> Iterator[None]:
    """Allows this process more than a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def connections(daemon: Daemon, count: int) -> Iterator[list[RawConnection]]:
    """So many connections, all of them accepted."""
    with ExitStack() as stack:
        opened = [stack.enter_context(RawConnection(daemon.address)) for _ in range(count)]

        def are_accepted() -> bool:
            return sum(target.startswith("socket:") for target in daemon.open_files()) >= count

        daemon.wait_until(are_accepted, f"{count} connections are accepted")
        yield opened


@pytest.mark.usefixtures("many_files")
def test_1000_connections_of_which_100_upload_stay_under_the_ceiling(
    start: Callable[..., Daemon],
) -> None:
    daemon = start(window=8)
    base = daemon.memory()
    whole = memoryview(form_of(content(MIB)))
    with connections(daemon, 1000) as opened:
        idle, in_head, uploading = opened[:800], opened[800:900], opened[900:]
        for connection in in_head:
            connection.send(b"POST /upload HTTP/1.1\r\nX-Long: " + b"x" * 15_000)
        assert daemon.memory() - base <= 1000 * CONNECTION_COST
        for connection in uploading:
            connection.send(whole[:300_000])
        until_all_wait_for(daemon, "client", count=100, received=299_000)
        for connection in idle:
            connection.send(request("/upload/nowhere", b"small"))
            assert connection.answer().status == 201
        for connection in uploading:
            connection.send(whole[300_000:])
        assert {connection.answer().status for connection in uploading} == {201}
    peak = daemon.memory("VmHWM")
    print(f"1000 connections: {(peak - base) / MIB:.1f} MiB")
    assert peak <= memory_ceiling(base, connections=1000, uploads=101, window=8 * MIB)


@pytest.mark.usefixtures("many_files")
def test_clients_that_go_on_sending_after_a_refusal_cost_no_read_buffer(
    start: Callable[..., Daemon],
) -> None:
    daemon = start()
    base = daemon.memory()
    too_large = b"POST /upload HTTP/1.1\r\nX-Long: " + b"x" * 300_000
    unknown = request("/upload/unknown", b"x" * 300_000)
    with connections(daemon, 1000) as opened:
        for connection, data in zip(opened, itertools.cycle((too_large, unknown)), strict=False):
            connection.send(data)
        assert {connection.answer().status for connection in opened} == {404, 431}
        peak = daemon.memory("VmHWM")
    print(f"1000 refused connections: {(peak - base) / MIB:.1f} MiB")
    assert peak - base <= 1000 * CONNECTION_COST


# --- the disk ----------------------------------------------------------------------------------


def test_no_upload_of_any_kind_writes_to_disk_or_opens_a_file(
    start: Callable[..., Daemon], node: RabbitMQNode
) -> None:
    daemon = start(config=BOUNDED_QUEUE)
    written = daemon.io("write_bytes")
    form = form_of(content(2 * MIB))
    content_type, field = browser_form([Part(content(2 * MIB), "plain field")])
    kinds = {
        "file in a form": (201, form),
        "plain field": (201, request("/upload/nowhere", field, content_type)),
        "chunked form": (201, chunked_form_of(content(2 * MIB))),
        "raw body": (201, request("/upload/nowhere", content(2 * MIB))),
        "malformed form": (400, form.replace(b"Disposition", b"Position")),
        "full queue": (507, request("/upload/full", content(16 * MIB))),
        "no such route": (404, request("/upload/unknown", content(2 * MIB))),
    }
    for kind, (status, whole) in kinds.items():
        view = memoryview(whole)
        with RawConnection(daemon.address) as connection:
            connection.send(view[: len(view) // 2])
            assert not writable_files(daemon), kind
            connection.send(view[len(view) // 2 :])
            assert connection.answer().status == status, kind
    with RawConnection(daemon.address) as connection:
        connection.send(memoryview(form)[: len(form) // 2])
        until_all_wait_for(daemon, "client", count=1, received=MIB)
        assert not writable_files(daemon)
    daemon.wait_until(lambda: not daemon.transfers(), "the client that left is noticed")
    messages_now(node.url, FULL_QUEUE)
    assert not writable_files(daemon)
    assert daemon.io("write_bytes") == written


def writable_files(daemon: Daemon) -> list[str]:
    """The regular files that it could write to, but for what it was started with."""
    return [file.path for file in open_files(daemon.pid) if file.writable and file.descriptor > 2]
