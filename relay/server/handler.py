"""Upload requests: from a request head to a receipt or a problem.

Decides whether an upload is admitted, ties the connection's body to the broker's sink, and sees
to it that every request gets exactly one truthful response. It knows the broker only as the
interface below.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from relay.config import HttpConfig, RouteConfig
from relay.errors import (
    BUG,
    ClientError,
    ClientGone,
    NotFound,
    OutcomeUnknown,
    RelayError,
    ShuttingDown,
    TooLarge,
)
from relay.logs import fields
from relay.model import Receipt, Transfer
from relay.protocol.form_data import BodyParser, FormData, RawBody
from relay.protocol.framing import ALGORITHMS, Framer
from relay.protocol.request import RequestHead, parse_request
from relay.protocol.trace_context import trace_id
from relay.server.connection import HttpConnection
from relay.server.idempotency import KeyMemory, key_of
from relay.server.identity import Access, Peer
from relay.server.responses import Response, created, problem
from relay.server.uploads import UploadRecord, Uploads
from relay.transfer import FrameSink, Upload, new_transfer_id
from relay.waits import Wait, Waits

log = logging.getLogger(__name__)


class Sink(FrameSink, Protocol):
    """A frame sink that can tell consumers of a failure."""

    @property
    def may_be_committed(self) -> bool:
        """Whether the commit frame is out, so that no abort frame can be true any more."""

    def abort(self, reason: str) -> None:
        """Publish an abort frame, if frames were published. Must not block."""


class Broker(Protocol):
    """What the handler needs of the broker."""

    def refusal(self) -> RelayError | None:
        """Why an upload cannot be admitted now, or None."""

    def open(
        self, transfer: Transfer, route: RouteConfig, waits: Waits
    ) -> AbstractAsyncContextManager[Sink]:
        """A sink for one transfer, which tells ``waits`` what it waits for."""


class UploadHandler:
    """Serves upload connections."""

    def __init__(
        self,
        config: HttpConfig,
        routes: Mapping[str, RouteConfig],
        broker: Broker,
        uploads: Uploads,
        access: Access | None = None,
    ) -> None:
        """Without ``access``, anybody may upload."""
        self.configure(config, routes)
        self._broker = broker
        self._uploads = uploads
        self._access = access or Access()
        self.keys = KeyMemory()

    def configure(self, config: HttpConfig, routes: Mapping[str, RouteConfig]) -> None:
        """Have it serve so from now on: ``config`` new connections, ``routes`` new uploads."""
        self._config = config
        self._routes = routes

    async def serve(self, stream: trio.abc.HalfCloseableStream, peer: Peer) -> None:
        """Answer requests until the connection ends.

        What is raised is a bug; its client has been told so, if it could be.
        """
        connection = HttpConnection(stream, self._config, self._uploads.idle)
        try:
            while await self._serve_request(connection, peer):
                pass
        except ClientGone:
            log.debug("client gone", extra=fields(peer=peer.address))
        except Exception:
            if connection.awaits_response:
                self._uploads.count(RelayError.code)
            await self._confess(connection, RelayError(BUG))
            raise  # to be logged where it stops

    async def _serve_request(self, connection: HttpConnection, peer: Peer) -> bool:
        """Answer one request. Returns whether another can follow on this connection."""
        refusal = None
        try:
            head = await connection.next_request(parse_request)
        except ClientError as exc:
            extra = _About(peer=peer.address).fields(exc.code, status=exc.status)
            log.info("refused: %s", exc.detail, extra=extra)
            self._uploads.count(exc.code)
            refusal = problem(exc)
        if refusal is not None:
            # Where the body ends is in doubt, or was never looked at. The exception is gone by now:
            # its traceback would keep what was read for as long as the connection lingers.
            await connection.respond(refusal, close=True)
            return False
        if head is None:
            return False
        response = await self._upload(connection, head, peer)
        keep = head.keep_alive and connection.reusable and not self._uploads.draining
        await connection.respond(response, close=not keep)
        return keep

    async def _upload(self, connection: HttpConnection, head: RequestHead, peer: Peer) -> Response:
        """Relay the request's body. Returns the response, whatever it is.

        Raises:
            ClientGone: nobody is left to respond to.
        """
        # What is no route's name is the client's own words, which no log repeats.
        known = head.route if head.route in self._routes else None
        about = _About(route=known, peer=peer.address, trace=trace_id(head.trace.parent))
        record = None
        try:
            about.client = self._access.identify(head.authorization, peer)
            route = self._route(head, about.client)
            transfer = _transfer(head, about.client)
            key = key_of(transfer)
            # Before it is asked for room: an answer that is known needs neither room nor broker.
            if (replay := self.keys.recall(key, head)) is not None:
                await self._replay(connection, head, about)
                return replay
            self._check_room(transfer, peer)
            with self.keys.hold(key), self._uploads.enter(transfer, peer.address) as record:
                about.record = record
                receipt = await self._relay(connection, head, transfer, route, record)
                response = created(receipt)
                self.keys.remember(key, head, record.bytes_received, receipt, response)
        except RelayError as exc:
            self._failed(about, exc)
            if isinstance(exc, ClientGone):
                raise
            return problem(exc, transfer_id=transfer.id if record is not None else None)
        except Exception:
            may_be_committed = record is not None and record.may_be_committed
            error = OutcomeUnknown(BUG) if may_be_committed else RelayError(BUG)
            self._failed(about, error)
            await self._confess(connection, error)
            raise
        log.info("upload committed", extra=about.fields("committed"))
        self._uploads.count("committed", about.route, receipt.totals.bytes)
        return response

    def _failed(self, about: "_About", error: RelayError) -> None:
        # Whoever is gone gets no answer.
        status = None if isinstance(error, ClientGone) else error.status
        extra = about.fields(error.code, status=status)
        log.warning("upload failed: %s", error.detail, extra=extra)
        self._uploads.count(error.code, about.route)

    async def _confess(self, connection: HttpConnection, error: RelayError) -> None:
        """Tell the client of a bug, unless it has been told something already."""
        if connection.awaits_response:
            with suppress(ClientGone):
                await connection.respond(problem(error), close=True)

    async def _replay(self, connection: HttpConnection, head: RequestHead, about: "_About") -> None:
        """Take in a retry of what has succeeded. Its body is no longer of interest.

        Raises:
            ClientGone: the client left before the end of its body.
        """
        if not head.expect_continue:
            # Most clients do not look for an answer before they have sent everything, however
            # long that takes; if they are cut off they never see it, and retry for ever.
            with suppress(ClientError):
                while await connection.receive():
                    pass
        log.info("upload replayed", extra=about.fields("replayed"))
        self._uploads.count("replayed", about.route)

    def _route(self, head: RequestHead, client: str | None) -> RouteConfig:
        """The upload's route, if there is one, and it takes that client's and a body of that size.

        Raises:
            NotFound, Unauthorized, Forbidden, TooLarge: otherwise.
        """
        route = self._routes.get(head.route)
        if route is None:
            raise NotFound("there is no such route")
        self._access.check(client, route)
        size = head.content_length or 0
        # A multipart body is larger than its parts; only a raw one is known to be too large.
        limits = [route.max_bytes] if head.boundary else [route.max_bytes, route.max_part_bytes]
        for limit in limits:
            if limit and size > limit:
                raise TooLarge(f"the route takes at most {limit} bytes")
        return route

    def _check_room(self, transfer: Transfer, peer: Peer) -> None:
        """Admit an upload, if what can be known before its body allows that.

        Raises:
            RelayError: otherwise.
        """
        self._uploads.check(transfer.client, peer.address)
        if (refusal := self._broker.refusal()) is not None:
            raise refusal

    async def _relay(
        self,
        connection: HttpConnection,
        head: RequestHead,
        transfer: Transfer,
        route: RouteConfig,
        record: UploadRecord,
    ) -> Receipt:
        asked = [name for name in (*route.digests, *head.digests) if name in ALGORITHMS]
        framer = Framer(
            transfer,
            frame_size=route.frame_size,
            digests=tuple(dict.fromkeys(asked)),
            receipt_parts=self._config.receipt_parts,
        )
        waits, pace, who = record.waits, self._uploads.pace, record.who

        async def receive() -> bytes:
            waits.begin(Wait.CLIENT)
            # While its rate is used up nobody reads it, and no clock runs against it.
            if not connection.body_read:
                await pace.wait(who)
            data = await connection.receive(pace.read_size(record.read_size))
            waits.end()
            pace.count(who, len(data))
            if connection.read_was_full:
                self._uploads.widen(record)
            record.bytes_received += len(data)
            record.frames = framer.frames
            if route.max_bytes and record.bytes_received > route.max_bytes:
                raise TooLarge(f"the route takes at most {route.max_bytes} bytes")
            return data

        with record.scope:
            async with self._broker.open(transfer, route, waits) as sink:
                parser = _parser(head, route)
                upload = Upload(parser, framer, sink, expected_digests=head.given_digests)
                try:
                    await connection.send_continue()
                    return await upload.run(receive)
                except BaseException as exc:
                    sink.abort(_reason(exc))
                    raise
                finally:
                    record.frames = framer.frames
                    record.may_be_committed = sink.may_be_committed
        raise _ended_by_drain(record.may_be_committed)


@dataclass(slots=True, kw_only=True)
class _About:
    """What is known of a request, for the log.

    Attributes:
        route: its name, if there is one of that name.
        trace: the id of the trace that it belongs to.
        record: once it is admitted.
        began: in trio's clock, seconds.
    """

    peer: str
    route: str | None = None
    client: str | None = None
    trace: str | None = None
    record: UploadRecord | None = None
    began: float = field(default_factory=trio.current_time)

    def fields(self, outcome: str, *, status: int | None = None) -> dict[str, Any]:
        """A log record's ``extra``."""
        seconds = trio.current_time() - self.began
        record = self.record
        return fields(
            transfer=None if record is None else record.transfer.id,
            route=self.route,
            client=self.client,
            peer=self.peer,
            trace=self.trace,
            outcome=outcome,
            status=status,
            seconds=seconds,
            **({} if record is None else _progress(record, seconds)),
        )


def _progress(record: UploadRecord, seconds: float) -> dict[str, object]:
    waited = record.waits.seconds
    most = max(waited, key=waited.__getitem__)
    return {
        "bytes": record.bytes_received,
        "frames": record.frames,
        "rate": round(record.bytes_received / max(seconds, 1e-3)),
        "waited_for": most.value,
        "waited": waited[most],
    }


def _transfer(head: RequestHead, client: str | None) -> Transfer:
    return Transfer(
        id=new_transfer_id(),
        began=int(time.time()),
        route=head.route,
        client=client,
        idempotency_key=head.idempotency_key,
        traceparent=head.trace.parent,
        tracestate=head.trace.state,
    )


def _ended_by_drain(may_be_committed: bool) -> RelayError:
    if may_be_committed:
        return OutcomeUnknown("the daemon is stopping and the commit frame is not confirmed yet")
    return ShuttingDown("the daemon is stopping and the upload took too long")


def _reason(exc: BaseException) -> str:
    """What the abort frame says of a failure."""
    if isinstance(exc, RelayError):
        return exc.code
    return ShuttingDown.code if isinstance(exc, trio.Cancelled) else RelayError.code


def _parser(head: RequestHead, route: RouteConfig) -> BodyParser:
    if head.boundary is None:
        return RawBody(head.part, max_part_bytes=route.max_part_bytes)
    return FormData(
        head.boundary,
        max_parts=route.max_parts,
        max_part_bytes=route.max_part_bytes,
        max_part_header_bytes=route.max_part_header_bytes,
    )
