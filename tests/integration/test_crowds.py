"""Too many clients, slow ones and greedy ones: those who behave are served, and nothing breaks.

What counts is answers, bytes, files and CPU seconds; how fast it is, ``./dev bench slow`` tells.
"""

import resource
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pika
import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.bench.pump import cpu_seconds
from tests.slow_clients import SlowClients
from tests.uploading import RawConnection, content, memory_ceiling, request, request_head, upload

MIB: Final = 1 << 20
EXCHANGE: Final = "crowds.nowhere"
ROUTES: Final = f"""
[routes.plain]
exchange = "{EXCHANGE}"
mandatory = false
"""


@pytest.fixture(scope="module")
def url(rabbitmq: RabbitMQNode) -> str:
    """A broker with an exchange that takes everything and keeps nothing."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    connection.channel().exchange_declare(EXCHANGE, durable=True)
    connection.close()
    return rabbitmq.url


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Allows this process more than a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_slow_clients_keep_no_good_one_out(url: str, tmp_path: Path) -> None:
    config = ROUTES + '[http]\nmax_uploads = 600\nheader_timeout = "10 min"\n'
    slow, good, size = 1000, 10, 4 * MIB
    with Daemon(url, config, directory=tmp_path) as daemon:
        base = daemon.memory()
        with SlowClients(daemon.address, slow), ThreadPoolExecutor(good) as pool:
            daemon.wait_until(
                lambda: daemon.metric("relay_uploads_in_progress") == slow // 2,
                "they are all inside",
            )
            body = content(size)
            answers = pool.map(lambda _: upload(daemon, body=body), range(2 * good))
            assert [answer.status for answer in answers] == [201] * 2 * good
            assert daemon.metric("relay_uploads_in_progress") == slow // 2
            uploads = slow // 2 + good
            ceiling = memory_ceiling(base, connections=slow + good, uploads=uploads)
            peak = daemon.memory("VmHWM")
        print(f"base {base / MIB:.1f}, peak {peak / MIB:.1f}, ceiling {ceiling / MIB:.1f} MiB")
        assert peak <= ceiling
        daemon.wait_until(lambda: daemon.metric("relay_uploads_in_progress") == 0, "they are gone")


def test_slow_clients_are_shaken_off_and_told(url: str, tmp_path: Path) -> None:
    config = ROUTES + (
        '[http]\nheader_timeout = "1 s"\nmin_body_rate_grace = "1 s"\nmin_body_rate = "10 KiB"\n'
    )
    with Daemon(url, config, directory=tmp_path) as daemon:
        with SlowClients(daemon.address, 100, pause=0.2) as clients:
            daemon.wait_until(lambda: clients.reconnects >= 200, "all were shaken off twice")
            assert upload(daemon).status == 201
        daemon.wait_until(lambda: daemon.metric("relay_uploads_in_progress") == 0, "they are gone")


def test_a_storm_of_uploads_is_answered_to_the_last(url: str, tmp_path: Path) -> None:
    connections, each, threads = 500, 10, 20
    config = ROUTES + "[http]\nmax_uploads = 600\n"
    with Daemon(url, config, directory=tmp_path) as daemon:
        files = len(daemon.open_files())
        statuses = storm(daemon, connections, each, threads)
        assert statuses == {201: connections * each}
        daemon.wait_until(lambda: len(daemon.open_files()) <= files, "all connections have ended")


def test_a_storm_against_limits_meets_those_limits_and_nothing_else(
    url: str, tmp_path: Path
) -> None:
    connections, each, threads, served = 200, 5, 10, 150
    config = ROUTES + f"[http]\nmax_uploads = 20\nmax_connections = {served}\n"
    with Daemon(url, config, directory=tmp_path) as daemon:
        files = len(daemon.open_files())
        statuses = storm(daemon, connections, each, threads, refused=connections - served)
        assert set(statuses) == {201, 503}
        assert statuses[201] == connections * each
        daemon.wait_until(lambda: len(daemon.open_files()) <= files, "all connections have ended")
        assert upload(daemon).status == 201


def storm(
    daemon: Daemon, connections: int, each: int, threads: int, refused: int = 0
) -> Counter[int]:
    """That many connections, all open at once, with ``each`` uploads one after the other.

    Each thread sends on all its connections before it looks for an answer. An upload is sent until
    it is answered with 201, on a new connection each time; all statuses are counted. It begins when
    ``refused`` connections have been refused, before one of the others can end.
    """
    data = request("/upload/plain", b"x" * 1000)

    def run(opened: list[RawConnection]) -> Counter[int]:
        statuses: Counter[int] = Counter()
        left = [each] * len(opened)
        while waiting := [number for number, count in enumerate(left) if count]:
            for number in waiting:
                if not opened[number].has_answer():  # as one has that is refused
                    opened[number].send(data)
            for number in waiting:
                status = opened[number].answer().status
                statuses[status] += 1
                if status == 201:
                    left[number] -= 1
                else:
                    opened[number].close()
                    opened[number] = RawConnection(daemon.address)
        for connection in opened:
            connection.close()
        return statuses

    opened = [RawConnection(daemon.address) for _ in range(connections)]
    daemon.wait_until(
        lambda: daemon.metric("relay_connections_refused_total") >= refused, "some are refused"
    )
    with ThreadPoolExecutor(threads) as pool:
        shares = [opened[start::threads] for start in range(threads)]
        return sum(pool.map(run, shares), Counter[int]())


# --- few file descriptors ----------------------------------------------------------------------


@contextmanager
def clients(address: tuple[str, int], count: int) -> Iterator[list[RawConnection]]:
    with ExitStack() as stack:
        yield [stack.enter_context(RawConnection(address)) for _ in range(count)]


FEW_FILES: Final = ("prlimit", "--nofile=64:64")


def test_with_few_files_200_clients_are_served_or_refused(url: str, tmp_path: Path) -> None:
    with Daemon(url, ROUTES, directory=tmp_path, prefix=FEW_FILES) as daemon:
        assert any("LimitNOFILE" in line for line in daemon.log)
        files = len(daemon.open_files())
        with clients(daemon.address, 200) as opened:
            for connection in opened:
                connection.send(request_head("/upload/plain", 5, None, "Connection: close"))
            daemon.wait_until(
                lambda: daemon.metric("relay_connections_refused_total") > 100, "many are refused"
            )
            # Those inside can finish, and pages and the broker have descriptors of their own.
            assert daemon.ready()[0] == 200
            check_idle(daemon)
            answers = Counter(finish(connection) for connection in opened)
        assert set(answers) == {201, 503}
        assert answers[201] >= 20
        daemon.wait_until(lambda: len(daemon.open_files()) <= files, "all connections have ended")
        assert upload(daemon).status == 201


def finish(connection: RawConnection) -> int:
    """Send the body unless there is an answer already; returns its status."""
    if not connection.has_answer():
        connection.send(b"hello")
    return connection.answer().status


def test_without_a_single_file_left_nothing_spins_and_it_recovers_by_itself(
    url: str, tmp_path: Path
) -> None:
    with Daemon(url, ROUTES, directory=tmp_path, prefix=FEW_FILES) as daemon:
        host, _, port = daemon.admin_url.removeprefix("http://").rpartition(":")
        with ExitStack() as stack:
            stack.enter_context(clients((host, int(port)), 40))
            opened = stack.enter_context(clients(daemon.address, 200))
            daemon.wait_until(lambda: len(daemon.open_files()) == 64, "there is none left")
            check_idle(daemon)
            for connection in opened[:5]:
                connection.send(request("/upload/plain", b"hello"))
                assert connection.answer().status == 201
        daemon.wait_until(lambda: upload_works(daemon), "it serves again")
        assert daemon.ready()[0] == 200


def upload_works(daemon: Daemon) -> bool:
    try:
        return upload(daemon).status == 201
    except (ConnectionError, AssertionError):
        return False


def check_idle(daemon: Daemon) -> None:
    """While many things are asked of the machine, the daemon has next to no use for its CPU."""
    before = cpu_seconds(daemon.pid)
    polls = 40  # of 50 ms each
    daemon.wait_until(iter([False] * polls + [True]).__next__, "time has passed")
    assert cpu_seconds(daemon.pid) - before <= 0.5
