"""Listening sockets, and no more connections served than allowed.

Accepts all the same while the limit is reached, and hands what is too many to whoever refuses it: a
client that is told at once can go elsewhere, and one in the kernel's backlog waits without a word.
Sockets may come from systemd (sd_listen_fds(3)), which keeps them open when the daemon is
restarted. Its own few lines, as for sd_notify: three variables.
"""

import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Final

import trio

from relay.config import ConfigError
from relay.logs import fields
from relay.server.identity import Peer
from relay.server.overflow import Overflow

log = logging.getLogger(__name__)

Serve = Callable[[trio.SocketStream, Peer], Awaitable[None]]
"""Serves one connection to its end, or refuses it."""

_CREDENTIALS: Final = struct.Struct("iII")
"""pid, uid and gid of the process that connected (unix(7), SO_PEERCRED)."""

BACKLOG: Final = 1024

HTTP: Final = "http"
ADMIN: Final = "admin"
"""What systemd must call its sockets (FileDescriptorName=)."""

_FIRST_FD: Final = 3


class ListenError(Exception):
    """An address cannot be listened on. One line: which, and why."""


def inherited_sockets(
    environ: MutableMapping[str, str] = os.environ, first: int = _FIRST_FD
) -> dict[str, list[socket.socket]]:
    """The listening sockets that systemd has handed over, by their names; none is usual, too.

    Args:
        environ: whose variables are taken out of it: what is run later has other descriptors.
        first: the descriptor that numbering begins with.

    Raises:
        ConfigError: a socket unit says something else than relay needs.
    """
    pid = environ.pop("LISTEN_PID", "")
    number = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    environ.pop("LISTEN_PIDFDID", None)
    sockets: dict[str, list[socket.socket]] = {HTTP: [], ADMIN: []}
    if pid != str(os.getpid()) or not number.isdecimal():
        return sockets
    for index in range(int(number)):
        os.set_inheritable(first + index, False)
        name = names[index] if index < len(names) else ""
        if name not in sockets:
            raise ConfigError(
                f"systemd's socket {name!r}: FileDescriptorName= must be http or admin"
            )
        sockets[name].append(_listening(first + index, name))
    return sockets


def _listening(descriptor: int, name: str) -> socket.socket:
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    try:
        inherited = socket.socket(fileno=descriptor)
        # A connection (Accept=yes), a datagram socket and a FIFO are none of it.
        if inherited.family in families and inherited.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            return inherited
        inherited.close()
    except OSError as exc:
        raise ConfigError(f"systemd's socket {name!r}: cannot be used: {exc.strerror}") from exc
    raise ConfigError(f"systemd's socket {name!r}: must be of ListenStream= and Accept=no")


def adopt(sockets: Sequence[socket.socket]) -> list[trio.SocketListener]:
    """Listen on sockets that are listening already."""
    return [trio.SocketListener(trio.socket.from_stdlib_socket(each)) for each in sockets]


async def open_listeners(addresses: Sequence[str]) -> list[trio.SocketListener]:
    """Listen on every ``host:port`` or ``unix:PATH``.

    Raises:
        ListenError: an address cannot be used.
    """
    listeners: list[trio.SocketListener] = []
    for address in addresses:
        try:
            if address.startswith("unix:"):
                listeners.append(_open_unix(address.removeprefix("unix:")))
            else:
                host, _, port = address.rpartition(":")
                listeners += await trio.open_tcp_listeners(
                    int(port), host=host.strip("[]"), backlog=BACKLOG
                )
        # UnicodeError: a host name that cannot be one (IDNA).
        except (OSError, UnicodeError) as exc:
            for listener in listeners:
                await listener.aclose()
            number = exc.errno if isinstance(exc, OSError) else None
            reason = os.strerror(number) if number and number > 0 else str(exc)
            raise ListenError(f"cannot listen on {address}: {reason}") from exc
    return listeners


def _open_unix(path: str) -> trio.SocketListener:
    # A socket file outlives the process that made it. Only a dead one may be replaced.
    if Path(path).exists() and stat.S_ISSOCK(Path(path).stat().st_mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            # A live one may refuse in other ways: no permission, another type, a full backlog.
            probe.setblocking(False)
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))


def address_of(listening: trio.SocketListener | socket.socket) -> str:
    """The address as it was given, with the port that the system chose."""
    bound = listening.socket if isinstance(listening, trio.SocketListener) else listening
    name = bound.getsockname()
    if isinstance(name, bytes):
        # An abstract one begins with a zero byte, for which an "@" stands (unix(7)).
        name = os.fsdecode(name).replace("\0", "@")
    return f"unix:{name}" if isinstance(name, str) else _host_port(name)


async def serve(
    listeners: Sequence[trio.SocketListener],
    serve_one: Serve,
    *,
    limit: int,
    refuse: Serve | None = None,
    nursery: trio.Nursery,
) -> None:
    """Accept connections until cancelled; each is served in ``nursery``, at most ``limit``.

    Those beyond are for ``refuse``, which bounds for itself how many it keeps, and how long; if
    none is given, for an ``Overflow``.
    This is the one place where an unexpected exception stops: it costs its connection and is
    logged, and the daemon lives on.
    """
    slots = trio.Semaphore(limit)
    refuse = refuse or Overflow(limit).refuse

    async def handle(stream: trio.SocketStream) -> None:
        peer = _peer(stream)
        if has_slot := slots.value > 0:
            slots.acquire_nowait()
        try:
            await (serve_one if has_slot else refuse)(stream, peer)
        except Exception:
            log.exception(
                "bug: unexpected exception on a connection", extra=fields(peer=peer.address)
            )
        finally:
            # Before its client can see the end and come again.
            if has_slot:
                slots.release()
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(handle, list(listeners), handler_nursery=nursery)


def _peer(stream: trio.SocketStream) -> Peer:
    try:
        if stream.socket.family == socket.AF_UNIX:
            # Not the user's name: looking that up may ask the network, and wait for it.
            raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return Peer(address="unix", client=f"uid:{_CREDENTIALS.unpack(raw)[1]}")
        return Peer(address=_host_port(stream.socket.getpeername()))
    except OSError:
        return Peer(address="gone")


def _host_port(name: tuple[str, int]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
