"""A private, throw-away RabbitMQ node, for the demo and for tests that need a real broker.

Everything the node has is its own: a temporary directory for data, configuration, cookie and
log; free ports on 127.0.0.1 for AMQP and Erlang distribution; a node name nobody else uses; and an
Erlang port mapper (epmd), because a shared one would outlive the node or already belong to
another. No environment variable of the caller and no file below ``/etc/rabbitmq`` reaches it, and
it runs as the current user, root or not.

Nothing stays behind, however the caller ends. A guard process holds the reading end of a pipe
whose only writer is the caller; when that closes, by ``close()`` or by the caller's death, it
kills what still runs and removes the directory. (The kernel's parent-death signal would not do: it
fires when the *thread* that started the node ends, and trio's worker threads end when idle.)

The interface is synchronous and every method but the two signals blocks; async callers use worker
threads. This module knows nothing of the rest of relay.
"""

import io
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"

START_TIMEOUT = 120.0
"""Seconds for the node to answer; it takes 4 on an idle machine, far more on a crowded one."""

STOP_TIMEOUT = 60.0
"""Seconds for an orderly shutdown."""

CTL_TIMEOUT = 60.0
"""Seconds for one ``rabbitmqctl`` call; each boots an Erlang machine (0.5 s)."""

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"  # AMQP 0-9-1, section 4.2.2
_METHOD_FRAME = b"\x01"  # the broker answers with Connection.Start, or else with its own header

_PORTS = range(20000, 32768)
"""Below Linux's ephemeral ports: a port must not become some connection's own while the node that
is to come back on it is down."""

_LOG_TAIL = 6000
"""Characters; what a failing start has to say comes before 4,000 of Erlang's crash reports."""

_LARGE_FILES = "/var/tmp"  # noqa: S108 - only mkdtemp() creates anything in it

_PACKAGED_SCRIPTS = Path("/usr/lib/rabbitmq/bin")

_TREE_VARIABLE = "RELAY_RABBITMQ_ROOT"
"""Names an environment variable: the root of another Debian system, installed in a directory,
whose RabbitMQ and Erlang the node runs instead of this machine's. Only root can do that."""

# `$0` is the tree. Its /usr takes the place of the machine's for this process alone, in a mount
# namespace that ends with it. All else is the machine's, as a chroot's would not be: paths given
# in the configuration, the node's directory, /proc and /dev mean the same on both sides.
_IN_TREE = 'mount --bind "$0/usr" /usr && exec "$@"'

_CONFIG: Mapping[str, str] = {
    # A nearly full disk must not block the demo: the alarm guards data that nobody wants to keep.
    "disk_free_limit.absolute": "16MB",
    # Quorum queues keep in memory what their log holds, 512 MB by default. With a log of 64 MB the
    # node peaks at 350 MiB for 1 GiB of frames, instead of 930, and is no slower.
    "raft.wal_max_size_bytes": "64000000",
}

# `$1` is the directory. Each line read replaces the list of process groups; at the end of input
# they are killed. A killed process may still be creating a file, hence more than one attempt.
_GUARD = """
while read -r line; do groups=$line; done
for group in $groups; do kill -s KILL -- "-$group"; done
attempts=0
until rm -rf -- "$1"; do
    attempts=$((attempts + 1))
    [ $attempts -lt 100 ] || exit 1
    sleep 0.1
done
"""


class RabbitMQMissing(Exception):
    """RabbitMQ is not installed on this machine."""


class RabbitMQFailed(Exception):
    """The node did not do what it was told; the message ends with what it said."""


class RabbitMQNode:
    """One node with its own directory, ports and name; also a context manager that starts it.

    The ports and the data stay the same from creation to ``close()``, through any number of
    stops, kills and starts.

    Attributes:
        port: the AMQP port on 127.0.0.1.
        name: the Erlang node name.
        directory: what ``close()`` removes.
        log: the file that takes all the node prints.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, str] | None = None,
        plugins: Sequence[str] = (),
        parent: Path | None = None,
        peer: Self | None = None,
    ) -> None:
        """Makes the directory; starts nothing but the guard.

        Args:
            config: lines of ``rabbitmq.conf`` by key, in place of or besides the node's own.
            plugins: to enable, of those that RabbitMQ ships.
            parent: where the directory goes. By default ``$TMPDIR``, else ``/var/tmp``, because
                ``/tmp`` is often memory and the node's data may be large.
            peer: a node whose cluster this one joins at its first start. They share the peer's
                cookie and port mapper, so it must have been started, and be closed last.

        Raises:
            RabbitMQMissing: RabbitMQ or Erlang's port mapper is not installed.
        """
        tree = os.environ.get(_TREE_VARIABLE)
        self._scripts = _scripts_in(Path(tree)) if tree else _find_scripts()
        self._epmd_path = "epmd" if tree else _find_epmd()
        self._run_in_tree = ["unshare", "--mount", "sh", "-c", _IN_TREE, tree] if tree else []
        self.port, self._distribution_port, self._epmd_port = free_ports(3)
        self._cookie = secrets.token_hex(16)
        self._own_epmd = peer is None
        if peer is not None:
            self._epmd_port, self._cookie = peer._epmd_port, peer._cookie
        self.name = f"relay-{secrets.token_hex(6)}@localhost"
        parent = parent or Path(os.environ.get("TMPDIR") or _LARGE_FILES)
        self.directory = Path(tempfile.mkdtemp(prefix="relay-rabbitmq-", dir=parent))
        self.log = self.directory / "node.log"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._guard, self._lifeline = _start_guard(self.directory)
        cluster = {} if peer is None else _join(peer.name, self.name)
        self._write_files({**_CONFIG, **cluster, **(config or {})}, plugins)

    @property
    def url(self) -> str:
        """AMQP URL of the default virtual host, as the default user."""
        return f"amqp://guest:guest@{HOST}:{self.port}/%2f"

    @property
    def pid(self) -> int | None:
        """Process id of the Erlang machine, None while it does not run."""
        node = self._processes.get("node")
        return node.pid if node is not None and node.poll() is None else None

    def start(self) -> None:
        """Starts the node, unless it runs, and waits until it speaks AMQP.

        Raises:
            RabbitMQFailed: it exited or did not answer in time.
        """
        if self.pid is not None:
            return
        deadline = time.monotonic() + START_TIMEOUT
        self._start_epmd(deadline)
        self._spawn("node", [str(self._scripts / "rabbitmq-server")])
        self._wait_for("node", self._speaks_amqp, deadline)

    def stop(self) -> None:
        """Shuts the node down in good order, as a package upgrade or a reboot would.

        Raises:
            RabbitMQFailed: it had to be killed after ``STOP_TIMEOUT``.
        """
        if self.pid is None:
            return
        self.resume()
        node = self._processes["node"]
        node.terminate()
        try:
            node.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RabbitMQFailed(
                f"RabbitMQ did not stop in {STOP_TIMEOUT} s{self._tail()}"
            ) from None
        self._forget("node")

    def kill(self) -> None:
        """Kills the node as a crash would; its data is left as it is at this moment."""
        self._kill("node")

    def restart(self) -> None:
        """Stops the node if it runs, then starts it on the same port and data.

        Raises:
            RabbitMQFailed: as ``start()`` and ``stop()``.
        """
        self.stop()
        self.start()

    def suspend(self) -> None:
        """Freezes the node: its connections stay open, but nothing is read or answered.

        Returns when every thread of it stands still.
        """
        node = self._processes["node"]
        node.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, node.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Ends ``suspend()``; harmless if there was none."""
        self._processes["node"].send_signal(signal.SIGCONT)

    def ctl(self, *args: str) -> str:
        """Runs ``rabbitmqctl`` against this node and returns what it printed.

        Raises:
            RabbitMQFailed: it exited with an error or took longer than ``CTL_TIMEOUT``.
        """
        try:
            done = subprocess.run(
                [*self._run_in_tree, str(self._scripts / "rabbitmqctl"), "--quiet", *args],
                env=self._environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=CTL_TIMEOUT,
                check=True,
            )
        except subprocess.CalledProcessError as exc:
            said = f"{exc.stdout}{exc.stderr}".strip()
            raise RabbitMQFailed(f"rabbitmqctl {' '.join(args)} failed:\n{said}") from exc
        except subprocess.TimeoutExpired as exc:
            raise RabbitMQFailed(
                f"rabbitmqctl {' '.join(args)}: no end in {CTL_TIMEOUT} s"
            ) from exc
        return done.stdout

    def close(self) -> None:
        """Kills what runs and removes the directory. Closing twice is harmless.

        Raises:
            RabbitMQFailed: the directory could not be removed.
        """
        if self._lifeline.closed:
            return
        for role in list(self._processes):
            self._kill(role)
        self._lifeline.close()
        if self._guard.wait() != 0:
            raise RabbitMQFailed(f"{self.directory} could not be removed")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write_files(self, config: Mapping[str, str], plugins: Sequence[str]) -> None:
        directory = self.directory
        for name in ("home", "conf.d", "data", "logs", "generated"):
            (directory / name).mkdir()
        cookie = directory / "home" / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)  # Erlang refuses one that others may read
        (directory / "environment.conf").touch()
        (directory / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
        lines = {"listeners.tcp.default": f"{HOST}:{self.port}", **config}
        (directory / "rabbitmq.conf").write_text(
            "".join(f"{key} = {value}\n" for key, value in lines.items())
        )

    def _environment(self) -> dict[str, str]:
        """All that the node's processes get to see: nothing of the caller's but the path."""
        directory = self.directory
        no_strangers = "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
        schedulers = min(4, len(os.sched_getaffinity(0)))
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(directory / "home"),
            "LANG": "C.UTF-8",
            "ERL_CRASH_DUMP": "/dev/null",
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "environment.conf"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(directory / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "generated"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "logs"),
            "RABBITMQ_LOGS": "-",
            # The start script then becomes the Erlang machine, instead of waiting for it as a
            # parent that signals would hit in its place.
            "RUNNING_UNDER_SYSTEMD": "true",
            # Several nodes on one machine must not all pin their schedulers to the same cores.
            "RABBITMQ_SCHEDULER_BIND_TYPE": "u",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{no_strangers} +S {schedulers}:{schedulers}",
            # 0: any free port, where the default is a range of eleven shared by all nodes.
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
            "RABBITMQ_CTL_ERL_ARGS": no_strangers,
        }

    def _start_epmd(self, deadline: float) -> None:
        """Has the port mapper up before the node looks for one: else it would start its own."""
        epmd = self._processes.get("epmd")
        if self._own_epmd and (epmd is None or epmd.poll() is not None):
            self._spawn("epmd", [self._epmd_path, "-port", str(self._epmd_port), "-address", HOST])
            self._wait_for("epmd", lambda: _accepts(self._epmd_port), deadline)

    def _spawn(self, role: str, command: list[str]) -> None:
        """Starts a process in a session of its own, where no terminal's Ctrl-C reaches it."""
        with self.log.open("ab") as log:
            self._processes[role] = subprocess.Popen(
                [*self._run_in_tree, *command],
                env=self._environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._tell_guard()

    def _kill(self, role: str) -> None:
        process = self._processes.get(role)
        if process is not None:
            process.kill()
            process.wait()
            self._forget(role)

    def _forget(self, role: str) -> None:
        del self._processes[role]
        self._tell_guard()

    def _tell_guard(self) -> None:
        groups = " ".join(str(process.pid) for process in self._processes.values())
        self._lifeline.write(f"{groups}\n".encode())

    def _wait_for(self, role: str, ready: Callable[[], bool], deadline: float) -> None:
        """Polls until ``ready``: neither process tells anyone when it listens."""
        process = self._processes[role]
        while not ready():
            if process.poll() is not None:
                self._forget(role)
                raise RabbitMQFailed(f"{role} exited with {process.returncode}{self._tail()}")
            if time.monotonic() > deadline:
                self._kill(role)
                raise RabbitMQFailed(f"{role} not ready after {START_TIMEOUT} s{self._tail()}")
            time.sleep(0.05)

    def _speaks_amqp(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                connection.sendall(_PROTOCOL_HEADER)
                return connection.recv(1) == _METHOD_FRAME
        except OSError:
            return False

    def _tail(self) -> str:
        return f"; the end of its log:\n{self.log.read_text(errors='replace')[-_LOG_TAIL:]}"


def _join(peer: str, name: str) -> dict[str, str]:
    """Configuration that has the node ``name``, while it has no data, join the cluster of ``peer``.

    A node that joins must be in its own list: it locks the nodes there against others that join.
    """
    return {
        "cluster_formation.peer_discovery_backend": "classic_config",
        "cluster_formation.classic_config.nodes.1": peer,
        "cluster_formation.classic_config.nodes.2": name,
    }


def _start_guard(directory: Path) -> tuple[subprocess.Popen[bytes], io.FileIO]:
    """Starts the guard; returns it and the writing end of its pipe, which no child inherits."""
    reading, writing = os.pipe()
    with io.FileIO(reading) as guards_end:
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "relay-rabbitmq-guard", str(directory)],
            stdin=guards_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    return guard, io.FileIO(writing, "w")


def _scripts_in(tree: Path) -> Path:
    if not tree.joinpath(*_PACKAGED_SCRIPTS.parts[1:], "rabbitmq-server").exists():
        raise RabbitMQMissing(f"{_TREE_VARIABLE}: no rabbitmq-server is installed in {tree}")
    return _PACKAGED_SCRIPTS


def _find_scripts() -> Path:
    """Where RabbitMQ's own scripts are, not the packages' wrappers of the same names.

    Debian's and RPM's packages put wrappers on the path that insist on being root, become the
    ``rabbitmq`` user and take its directories. Other installations have the real ones there.
    """
    directories = [_PACKAGED_SCRIPTS]
    if (found := shutil.which("rabbitmq-server")) is not None:
        directories.append(Path(found).resolve().parent)
    for directory in directories:
        if (directory / "rabbitmq-server").exists():
            return directory
    raise RabbitMQMissing("rabbitmq-server is not installed (Debian: apt install rabbitmq-server)")


def _find_epmd() -> str:
    if (found := shutil.which("epmd")) is None:
        raise RabbitMQMissing("epmd is not on the path; it comes with Erlang (Debian: erlang-base)")
    return found


def free_ports(count: int) -> list[int]:
    """Distinct ports on 127.0.0.1 that nobody listens on now."""
    ports: list[int] = []
    while len(ports) < count:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True
