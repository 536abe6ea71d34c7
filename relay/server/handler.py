"""Upload requests: from a request head to a receipt or a problem.

Decides whether an upload is admitted, ties the connection's body to the broker's sink, and sees
to it that every request gets exactly one truthful response. It knows the broker only as the
interface below.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, Protocol

import trio

from relay.config import HttpConfig, RouteConfig
from relay.errors import (
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
from relay.server.connection import HttpConnection
from relay.server.idempotency import KeyMemory, key_of
from relay.server.responses import Response, created, problem
from relay.server.uploads import UploadRecord, Uploads
from relay.transfer import FrameSink, Upload, new_transfer_id

log = logging.getLogger(__name__)

BUG: Final = "relay has failed in a way that it did not expect; its log says how"


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

    def open(self, transfer: Transfer, route: RouteConfig) -> AbstractAsyncContextManager[Sink]:
        """A sink for one transfer."""


class UploadHandler:
    """Serves upload connections."""

    def __init__(
        self,
        config: HttpConfig,
        routes: Mapping[str, RouteConfig],
        broker: Broker,
        uploads: Uploads,
    ) -> None:
        self._config = config
        self._routes = routes
        self._broker = broker
        self._uploads = uploads
        self.keys = KeyMemory()

    async def serve(self, stream: trio.abc.HalfCloseableStream, peer: str) -> None:
        """Answer requests until the connection ends.

        What is raised is a bug; its client has been told so, if it could be.
        """
        connection = HttpConnection(stream, self._config)
        try:
            while await self._serve_request(connection, peer):
                pass
        except ClientGone:
            log.debug("client gone", extra=fields(peer=peer))
        except Exception:
            await self._confess(connection, RelayError(BUG))
            raise  # to be logged where it stops

    async def _serve_request(self, connection: HttpConnection, peer: str) -> bool:
        """Answer one request. Returns whether another can follow on this connection."""
        refusal = None
        try:
            raw = await connection.next_head()
            if raw is None:
                return False
            head = parse_request(*raw)
            connection.begin_body(head.content_length)
        except ClientError as exc:
            log.info("refused", extra=fields(peer=peer, status=exc.status, code=exc.code))
            self._uploads.count(exc.code)
            refusal = problem(exc)
        if refusal is not None:
            # Where the body ends is in doubt, or was never looked at. The exception is gone by now:
            # its traceback would keep what was read for as long as the connection lingers.
            await connection.respond(refusal, close=True)
            return False
        with self._uploads.answering():
            response = await self._upload(connection, head, peer)
            keep = head.keep_alive and connection.body_read and not self._uploads.draining
            await connection.respond(response, close=not keep)
        return keep

    async def _upload(self, connection: HttpConnection, head: RequestHead, peer: str) -> Response:
        """Relay the request's body. Returns the response, whatever it is.

        Raises:
            ClientGone: nobody is left to respond to.
        """
        began = trio.current_time()
        transfer = Transfer(
            id=new_transfer_id(),
            began=int(time.time()),
            route=head.route,
            idempotency_key=head.idempotency_key,
        )
        about = {"transfer": transfer.id, "route": transfer.route, "peer": peer}
        key = key_of(transfer)
        record = None
        try:
            route = self._route(head)
            # Before it is asked for room: an answer that is known needs neither room nor broker.
            if (replay := self.keys.recall(key, head)) is not None:
                return await self._replay(connection, head, replay, peer)
            self._check_room()
            with self.keys.hold(key), self._uploads.enter(transfer, peer) as record:
                receipt = await self._relay(connection, head, transfer, route, record)
                response = created(receipt)
                self.keys.remember(key, head, record.bytes_received, receipt, response)
        except RelayError as exc:
            seconds = trio.current_time() - began
            result = fields(**about, status=exc.status, code=exc.code, seconds=seconds)
            log.warning("upload failed: %s", exc.detail, extra=result)
            self._uploads.count(exc.code)
            if isinstance(exc, ClientGone):
                raise
            return problem(exc, transfer_id=transfer.id if record is not None else None)
        except Exception:
            may_be_committed = record is not None and record.may_be_committed
            await self._confess(
                connection, OutcomeUnknown(BUG) if may_be_committed else RelayError(BUG)
            )
            raise
        seconds = trio.current_time() - began
        totals = receipt.totals
        result = fields(**about, bytes=totals.bytes, frames=totals.frames, seconds=seconds)
        log.info("upload committed", extra=result)
        self._uploads.count("committed", totals.bytes)
        return response

    async def _confess(self, connection: HttpConnection, error: RelayError) -> None:
        """Tell the client of a bug, unless it has been told something already."""
        if connection.awaits_response:
            self._uploads.count(error.code)
            with suppress(ClientGone):
                await connection.respond(problem(error), close=True)

    async def _replay(
        self, connection: HttpConnection, head: RequestHead, replay: Response, peer: str
    ) -> Response:
        """Answer a retry of what has succeeded. Its body is no longer of interest.

        Raises:
            ClientGone: the client left before the end of its body.
        """
        if not head.expect_continue:
            # Most clients do not look for an answer before they have sent everything, however
            # long that takes; if they are cut off they never see it, and retry for ever.
            with suppress(ClientError):
                while await connection.receive():
                    pass
        log.info("upload replayed", extra=fields(route=head.route, peer=peer))
        self._uploads.count("replayed")
        return replay

    def _route(self, head: RequestHead) -> RouteConfig:
        """The upload's route, if there is one and it takes a body of that size.

        Raises:
            NotFound, TooLarge: otherwise.
        """
        route = self._routes.get(head.route)
        if route is None:
            raise NotFound("there is no such route")
        size = head.content_length or 0
        # A multipart body is larger than its parts; only a raw one is known to be too large.
        limits = [route.max_bytes] if head.boundary else [route.max_bytes, route.max_part_bytes]
        for limit in limits:
            if limit and size > limit:
                raise TooLarge(f"the route takes at most {limit} bytes")
        return route

    def _check_room(self) -> None:
        """Admit an upload, if what can be known before its body allows that.

        Raises:
            RelayError: otherwise.
        """
        self._uploads.check()
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

        async def receive() -> bytes:
            record.waits_for = "client"
            data = await connection.receive(record.read_size)
            record.waits_for = "broker"
            record.bytes_received += len(data)
            record.frames = framer.frames
            if route.max_bytes and record.bytes_received > route.max_bytes:
                raise TooLarge(f"the route takes at most {route.max_bytes} bytes")
            return data

        with record.scope:
            async with self._broker.open(transfer, route) as sink:
                parser = _parser(head, route)
                upload = Upload(parser, framer, sink, expected_digests=head.given_digests)
                try:
                    await connection.send_continue()
                    return await upload.run(receive)
                except BaseException as exc:
                    sink.abort(_reason(exc))
                    raise
                finally:
                    record.may_be_committed = sink.may_be_committed
        raise _ended_by_drain(record.may_be_committed)


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
