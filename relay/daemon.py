"""The daemon: puts the parts together, gives them their lifetimes, and ends them in order.

Starting: listeners first, so that a wrong address is an error at once; the broker may come later.
Stopping (SIGTERM, SIGINT): accept nothing new, let uploads in progress finish within
``drain_timeout``, tell the rest that they failed, say goodbye to the broker. A second signal ends
the waiting, a third one everything.
Reloading (SIGHUP): what can be had without touching an upload in progress is; what cannot is said.
"""

import logging
import math
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress

import trio

from relay import __version__, allocator, logs
from relay.broker.pool import Pool
from relay.broker.publisher import Refusals
from relay.broker.routes import Severity, verify_routes
from relay.broker.session import Session
from relay.config import Config, ConfigError, HttpConfig, authenticates, exposed, keep_fixed
from relay.errors import BrokerError
from relay.figures import Figures
from relay.logs import fields
from relay.pulse import Pulse
from relay.server import listeners, tokens
from relay.server.admin import AdminHandler
from relay.server.handler import UploadHandler
from relay.server.identity import Access, Peer
from relay.server.overflow import LINGERING_MAX, Overflow
from relay.server.pages import CONNECTIONS_MAX
from relay.server.tls import Handshakes, TlsServer
from relay.server.tokens import Tokens
from relay.server.uploads import Uploads
from relay.systemd import Notifier
from relay.transfer import new_transfer_id

log = logging.getLogger(__name__)

VERIFY_PAUSE = 10.0
"""Seconds between two verifications of the routes, at least: a connection that comes and goes must
not fill queues with probes, nor the log with what they find."""

Inherited = Mapping[str, Sequence[socket.socket]]
"""Listening sockets by name, ``http`` and ``admin``."""

START_PATIENCE = 2.0
"""Seconds for which the first clients wait for the broker to be connected, in the kernel's backlog:
those that waited for a restart must not be refused for coming too early."""

FILES_RESERVED = 32
"""File descriptors that are kept from uploads: for the daemon's own, the broker, and probes."""

GOODBYE = 2.0
"""Seconds for last responses, and again for the AMQP goodbye, once no upload is left."""


def run(config: Config, inherited: Inherited, read: Callable[[], Config]) -> None:
    """Run the daemon until it is told to stop.

    Args:
        config: as it is now.
        inherited: sockets, by name, in the place of the addresses in ``config``.
        read: reads the configuration again.

    Raises:
        ListenError: an address cannot be listened on.
        ConfigError: a URL of the broker, a file for TLS, or the tokens file cannot be used.
    """
    allocator.tune()
    _raise_file_limit()
    trio.run(Daemon(config, inherited, read).run, instruments=[_LinesOfATurn()])


class _LinesOfATurn(trio.abc.Instrument):
    """Has the log lines of one turn of the event loop written at once, when the turn is over."""

    def before_run(self) -> None:
        logs.lines.gathering = True

    def before_io_wait(self, timeout: float) -> None:
        logs.lines.write_out()

    def after_run(self) -> None:
        logs.lines.gathering = False
        logs.lines.write_out()


class Daemon:
    """All of relay that runs."""

    def __init__(
        self,
        config: Config,
        inherited: Inherited | None = None,
        read: Callable[[], Config] | None = None,
    ) -> None:
        """Prepare to run; the arguments are those of ``run``."""
        self._config = config
        self._inherited = inherited or {}
        self._read = read or (lambda: config)
        self._accepting = trio.CancelScope()
        self._uploads = Uploads(
            config.http.max_uploads,
            per_client=config.http.max_uploads_per_client,
            client_rate=config.http.max_client_rate,
        )
        self._broker = Pool(config.amqp, config.routes, verify=self.verify)
        self._verify_at = -math.inf
        self._access = Access(tokens=_tokens(config), anonymous=_anonymous(config))
        self._handler = UploadHandler(
            config.http, config.routes, self._broker, self._uploads, self._access
        )
        self._handshakes = Handshakes()
        self._tls = self._tls_server(config.http)
        limit, lingering = _connections(config.http.max_connections)
        self._overflow = Overflow(limit, lingering=lingering, has_tls=self._tls is not None)
        self._complaint = ""
        self._pulse = Pulse(lambda: self._uploads.bytes_received)
        self._figures = Figures(
            config,
            self._uploads,
            self._broker,
            self._handler.keys,
            self._pulse,
            self._overflow,
            self._handshakes,
        )
        self._admin = AdminHandler(
            config.http,
            self._uploads,
            self._broker.refusal,
            metrics=self._figures.metrics,
            status=self._figures.status,
        )
        self._systemd = Notifier()

    async def run(self) -> None:
        """Serve until a signal says stop, then drain."""
        config = self._config
        upload_listeners = await self._listen(listeners.HTTP, config.http.listen)
        admin_addresses = [config.admin.listen] if config.admin.listen else []
        admin_listeners = await self._listen(listeners.ADMIN, admin_addresses)
        with (
            trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
            trio.open_signal_receiver(signal.SIGHUP) as hangups,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pulse.run)
                nursery.start_soon(self._broker.run)
                # Admin connections outlive the drain, so that probes can watch it.
                nursery.start_soon(self._serve_admin, admin_listeners, nursery)
                nursery.start_soon(self._serve_uploads, upload_listeners, nursery)
                nursery.start_soon(self._reload_on, hangups)
                _announce(upload_listeners, admin_listeners)
                _announce_access(config, self._access, upload_listeners)
                log.info("started", extra=fields(version=__version__, pid=os.getpid()))
                nursery.start_soon(self._tell_systemd)
                signal_number = await anext(signals)
                log.info("stopping", extra=fields(signal=signal.Signals(signal_number).name))
                self._systemd.stopping(config.http.drain_timeout + 3 * GOODBYE)
                async with trio.open_nursery() as stopping:
                    stopping.start_soon(self._stop, stopping.cancel_scope)
                    await anext(signals)
                    self._uploads.hasten()
                    await anext(signals)
                    stopping.cancel_scope.cancel()
                nursery.cancel_scope.cancel()
        log.info("stopped")

    async def _listen(self, name: str, addresses: Sequence[str]) -> list[trio.SocketListener]:
        if inherited := self._inherited.get(name):
            return listeners.adopt(inherited)
        return await listeners.open_listeners(addresses)

    async def _serve_connection(self, stream: trio.SocketStream, peer: Peer) -> None:
        with self._uploads.connected():
            await (self._tls or self._handler).serve(stream, peer)

    async def _serve_uploads(
        self, upload_listeners: list[trio.SocketListener], nursery: trio.Nursery
    ) -> None:
        with self._accepting:
            with trio.move_on_after(START_PATIENCE):
                await self._broker.wait_up()
            await listeners.serve(
                upload_listeners,
                self._serve_connection,
                limit=self._overflow.limit,
                refuse=self._overflow.refuse,
                nursery=nursery,
            )

    async def _serve_admin(
        self, admin_listeners: list[trio.SocketListener], nursery: trio.Nursery
    ) -> None:
        if admin_listeners:
            await listeners.serve(
                admin_listeners,
                self._admin.serve,
                limit=CONNECTIONS_MAX,
                refuse=Overflow(CONNECTIONS_MAX, lingering=CONNECTIONS_MAX).refuse,
                nursery=nursery,
            )

    async def _tell_systemd(self) -> None:
        await self._systemd.run(ready=lambda: self._broker.refusal() is None, status=self._status)

    def _status(self) -> str:
        refusal = self._broker.refusal()
        return (
            f"{self._complaint}{'draining: ' if self._uploads.draining else ''}"
            f"{len(self._uploads)} uploads, {self._pulse.rate / 2**20:.1f} MiB/s; "
            f"{'broker ready' if refusal is None else refusal.detail}"
        )

    async def _reload_on(self, hangups: AsyncIterator[int]) -> None:
        async for _ in hangups:
            self._systemd.reloading()
            self._complaint = ""
            try:
                kept = await self.reload()
            except (ConfigError, BrokerError) as exc:
                log.error("not reloaded, nothing has changed: %s", exc)
                self._complaint = f"not reloaded: {exc}; "
            else:
                log.info("reloaded configuration, tokens and certificates")
                if kept:
                    log.warning("this needs a restart: %s", ", ".join(kept))
                logs.configure(self._config.log)
            self._systemd.reloaded(self._status())

    async def reload(self) -> list[str]:
        """Read the configuration again, and the files it names. Returns keys that need a restart.

        What is in progress goes on as it began. Tokens count for the next request, routes and
        limits for the next upload, all else for the next connection.

        Raises:
            ConfigError, BrokerError: it cannot be used. Nothing has changed.
        """
        running = self._config
        config, kept, valid, tls = await trio.to_thread.run_sync(self._read_again)
        if (config.amqp, config.routes) != (running.amqp, running.routes):
            await self._broker.renew(config.amqp, config.routes)
        self._config, self._tls = config, tls
        self._overflow.has_tls = tls is not None
        self._access.configure(tokens=valid, anonymous=_anonymous(config))
        self._handler.configure(config.http, config.routes)
        self._figures.configure(config)
        self._uploads.configure(
            config.http.max_uploads,
            per_client=config.http.max_uploads_per_client,
            client_rate=config.http.max_client_rate,
        )
        return kept

    def _read_again(self) -> tuple[Config, list[str], Tokens | None, TlsServer | None]:
        config, kept = keep_fixed(self._config, self._read())
        return config, kept, _tokens(config), self._tls_server(config.http)

    def _tls_server(self, http: HttpConfig) -> TlsServer | None:
        if not http.tls.certificate_file:
            return None
        return TlsServer(http, self._handler.serve, self._handshakes)

    async def verify(self, session: Session, refusals: Refusals) -> None:
        """Log what is wrong with the routes; meanwhile uploads go on, and may well work."""
        await trio.sleep_until(self._verify_at)
        self._verify_at = trio.current_time() + VERIFY_PAUSE
        routes = self._config.routes.values()
        try:
            findings = await verify_routes(session, routes, refusals, new_transfer_id())
        except BrokerError as exc:
            log.info("routes are not verified: %s", exc)
            return
        for finding in findings:
            if finding.severity is not Severity.NOTE:
                log.warning("%s", finding)

    async def _stop(self, scope: trio.CancelScope) -> None:
        self._accepting.cancel()
        await self._uploads.drain(self._config.http.drain_timeout)
        with trio.move_on_after(GOODBYE):
            await self._uploads.wait_disconnected()
        with trio.move_on_after(GOODBYE):
            await self._broker.close()
        scope.cancel()


def _announce(
    upload_listeners: list[trio.SocketListener], admin_listeners: list[trio.SocketListener]
) -> None:
    for listener in upload_listeners:
        log.info("listening for uploads", extra=fields(address=listeners.address_of(listener)))
    for listener in admin_listeners:
        log.info("listening for admin", extra=fields(address=listeners.address_of(listener)))


def _tokens(config: Config) -> Tokens | None:
    path = config.auth.tokens_file
    return tokens.load(path) if path else None


def _anonymous(config: Config) -> bool:
    return config.http.anonymous or not authenticates(config)


def _announce_access(
    config: Config, access: Access, upload_listeners: list[trio.SocketListener]
) -> None:
    families = [listener.socket.family for listener in upload_listeners]
    who = access.describe(
        certificates=bool(config.http.tls.client_ca_file),
        unix_sockets=socket.AF_UNIX in families,
    )
    is_open = config.http.anonymous and exposed(config)
    log.log(logging.WARNING if is_open else logging.INFO, "who may upload: %s", who)


def _raise_file_limit() -> None:
    """Every connection takes a file descriptor; the default soft limit (1024) is too low."""
    # A sandbox may forbid even to ask; whoever made it has set the limit (LimitNOFILE=).
    with suppress(PermissionError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _connections(wanted: int) -> tuple[int, int]:
    """How many connections there may be, and how many more that are being refused.

    ``wanted``, unless there are too few file descriptors: without any, a client would wait for its
    refusal, a lost broker could not be connected again, and nobody could ask what is wrong.
    """
    files = resource.RLIM_INFINITY
    with suppress(PermissionError):
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return wanted, LINGERING_MAX
    room = max(2, files - FILES_RESERVED)
    lingering = max(1, min(LINGERING_MAX, room // 5))
    limit = min(wanted, room - lingering)
    if limit < wanted:
        log.warning(
            "only %d connections instead of max_connections = %d: no more than %d files may be"
            " open (LimitNOFILE)",
            limit,
            wanted,
            files,
        )
    return limit, lingering
