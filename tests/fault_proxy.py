"""TCP between daemon and broker that can be told to fail: a network for tests.

It knows bytes and directions, and nothing of AMQP: "inside the handshake" is a small ``after`` on
a ``fresh`` connection. One fault is armed at a time; ``heal`` ends it, and what was held back is
then delivered, late, as a network would.
"""

import socket
import struct
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final

import trio

HOST: Final = "127.0.0.1"
READ_SIZE: Final = 64 * 1024


class Direction(StrEnum):
    """Which way the bytes go that a fault hits."""

    TO_BROKER = "to broker"
    TO_DAEMON = "to daemon"


class Kind(StrEnum):
    """What happens to a connection."""

    CUT = "cut"
    """Both ends see an orderly end."""
    RESET = "reset"
    """Both ends see a reset."""
    STALL = "stall"
    """This direction stands still, on this and all further connections."""
    HOLD = "hold"
    """This direction of this connection alone stands still; others work."""
    DELAY = "delay"
    """Each read of this direction is passed on late, on all connections."""
    REFUSE = "refuse"
    """What is connected is reset, and so is each connection that is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault to arm.

    Attributes:
        after: bytes that still pass in that direction before it happens.
        fresh: reset what is connected, and count from the first byte of the next connection.
        seconds: by which ``DELAY`` delays.
    """

    kind: Kind
    direction: Direction = Direction.TO_BROKER
    after: int = 0
    fresh: bool = False
    seconds: float = 0.05

    def __str__(self) -> str:
        if self.kind is Kind.REFUSE:
            return "proxy: refuse"
        where = " of a new connection" if self.fresh else ""
        return f"proxy: {self.kind} {self.direction} after {self.after}{where}"

    @property
    def summary(self) -> str:
        """The same without numbers, for a table."""
        if self.kind is Kind.REFUSE:
            return "proxy: refuse"
        return f"proxy: {self.kind} {self.direction}" + (", handshake" if self.fresh else "")


class _Severed(Exception):
    """The connection is to end now."""


class _How(Enum):
    ORDERLY = 0
    RESET = 1


class FaultProxy:
    """Passes connections to one broker, until told otherwise.

    Attributes:
        port: where it listens, on 127.0.0.1, from the start of ``serve`` on.
        connections: made so far.
        hit: set when the fault that was armed last has happened.
    """

    def __init__(self, broker_port: int) -> None:
        """Prepare a proxy to ``broker_port`` on 127.0.0.1, which need not listen yet."""
        self.port = 0
        self.connections = 0
        self.hit = trio.Event()
        self._broker_port = broker_port
        self._fault: Fault | None = None
        self._left = 0
        self._held: _Link | None = None
        self._healed = trio.Event()
        self._links: set[_Link] = set()

    @property
    def url(self) -> str:
        """The AMQP URL of the broker behind it."""
        return f"amqp://guest:guest@{HOST}:{self.port}/%2f"

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, report as started, and serve until cancelled."""
        (listener,) = await trio.open_tcp_listeners(0, host=HOST)
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve_connection, [listener])

    def arm(self, fault: Fault) -> None:
        """Have ``fault`` happen, instead of any other."""
        self.heal()
        self.hit = trio.Event()
        self._fault, self._left, self._held = fault, fault.after, None
        if fault.fresh or fault.kind is Kind.REFUSE:
            self.sever()
        if fault.kind is Kind.REFUSE:
            self.hit.set()

    def heal(self) -> None:
        """Pass everything on again, with what was held back first."""
        self._fault = None
        self._healed.set()
        self._healed = trio.Event()

    def sever(self) -> None:
        """Reset all connections that there are."""
        for link in self._links:
            link.end(_How.RESET)

    async def _serve_connection(self, daemon: trio.SocketStream) -> None:
        self.connections += 1
        if self._fault is not None and self._fault.kind is Kind.REFUSE:
            _prepare_reset(daemon)
            await trio.aclose_forcefully(daemon)
            return
        try:
            broker = await trio.open_tcp_stream(HOST, self._broker_port)
        except OSError:
            await trio.aclose_forcefully(daemon)
            return
        link = _Link(daemon, broker)
        self._links.add(link)
        try:
            await self._run(link)
        finally:
            self._links.discard(link)

    async def _run(self, link: "_Link") -> None:
        # Closes both also where the proxy itself is cancelled.
        async with link.daemon, link.broker:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, link, Direction.TO_BROKER)
                    nursery.start_soon(self._pump, link, Direction.TO_DAEMON)
            if link.how is _How.RESET:
                _prepare_reset(link.daemon)
                _prepare_reset(link.broker)

    async def _pump(self, link: "_Link", direction: Direction) -> None:
        ends = link.daemon, link.broker
        source, target = ends if direction is Direction.TO_BROKER else reversed(ends)
        try:
            while data := await source.receive_some(READ_SIZE):
                await self._pass(link, direction, bytes(data), target)
            await target.send_eof()
        except trio.BrokenResourceError:
            # What is held back gets to the other end late, even if its sender is long gone.
            if not link.is_held:
                link.end(_How.RESET)
        except _Severed:
            return

    async def _pass(
        self, link: "_Link", direction: Direction, data: bytes, target: trio.SocketStream
    ) -> None:
        fault = self._fault
        if fault is None or fault.direction is not direction or self._held not in (None, link):
            await target.send_all(data)
            return
        passed, rest = data[: self._left], data[self._left :]
        self._left -= len(passed)
        happens = not self._left
        if happens:
            self.hit.set()
            if fault.kind is Kind.HOLD:
                self._held = link
            elif fault.kind in (Kind.CUT, Kind.RESET):
                self._fault = None  # once
        await target.send_all(passed)
        if happens:
            await self._happen(fault, link)
        await target.send_all(rest)

    async def _happen(self, fault: Fault, link: "_Link") -> None:
        match fault.kind:
            case Kind.CUT | Kind.RESET:
                link.end(_How.ORDERLY if fault.kind is Kind.CUT else _How.RESET)
                raise _Severed
            case Kind.STALL | Kind.HOLD:
                link.is_held = True
                await self._healed.wait()
                link.is_held = False
            case Kind.DELAY:
                await trio.sleep(fault.seconds)
            case Kind.REFUSE:
                raise AssertionError("nothing is connected")


class _Link:
    """One connection: the stream from the daemon and the one to the broker."""

    def __init__(self, daemon: trio.SocketStream, broker: trio.SocketStream) -> None:
        self.daemon = daemon
        self.broker = broker
        self.scope = trio.CancelScope()
        self.how = _How.ORDERLY
        self.is_held = False

    def end(self, how: _How) -> None:
        self.how = how
        self.scope.cancel()


def _prepare_reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
