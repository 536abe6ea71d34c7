"""Everything that can go wrong with an upload, as one tree of exceptions.

Each class carries the HTTP status and the machine-readable ``code`` that the client gets; the
message is the ``detail`` for a person and never quotes bytes that a client sent. The same codes
are the ``reason`` of abort frames. Foreign exceptions (h11's, multipart's, pika's) are translated
into these where the library is called, and nowhere else. This module knows nothing of HTTP
messages or AMQP: ``server/`` turns errors into responses, ``broker/`` into abort frames.

    RelayError
    ├── ClientError      the request is at fault; repeating it unchanged will fail again, except
    │                    for KeyInUse and ClientBusy, where it is only too early
    ├── BrokerError      the broker did not, or may not, have taken the upload
    ├── DaemonError      relay itself has no room or is going away
    └── ClientGone       nobody is left to answer
"""

from typing import ClassVar, Final

BUG: Final = "relay has failed in a way that it did not expect; its log says how"
"""All that a client hears of an exception that nobody expected."""


class RelayError(Exception):
    """Root of the tree; itself what clients are told of a bug, and no more than that.

    Attributes:
        status: HTTP status code of the response.
        code: what programs switch on; part of the public contract.
        retry_after: seconds for the ``Retry-After`` field, or None for no such field.
        detail: what happened, for a person.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal-error"
    retry_after: ClassVar[int | None] = None

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class ClientError(RelayError):
    """The request is at fault."""

    status = 400


class BadRequest(ClientError):
    """Malformed or ambiguous HTTP (RFC 9112)."""

    code = "bad-request"


class BadMultipart(ClientError):
    """Malformed or incomplete multipart/form-data (RFC 7578), or one without any part."""

    code = "bad-multipart"


class Unauthorized(ClientError):
    """No credentials, or wrong ones (RFC 9110, section 15.5.2).

    Attributes:
        challenge: the ``WWW-Authenticate`` field (RFC 6750, section 3).
    """

    status = 401
    code = "unauthorized"

    def __init__(self, detail: str, *, challenge: str = 'Bearer realm="relay"') -> None:
        super().__init__(detail)
        self.challenge = challenge


class Forbidden(ClientError):
    """This client may not upload here."""

    status = 403
    code = "forbidden"


class NotFound(ClientError):
    """No such path or route."""

    status = 404
    code = "not-found"


class MethodNotAllowed(ClientError):
    """The path exists, the method does not apply to it."""

    status = 405
    code = "method-not-allowed"

    def __init__(self, detail: str, *, allow: str) -> None:
        super().__init__(detail)
        self.allow = allow


class TooSlow(ClientError):
    """The client missed a deadline while relay was ready to read."""

    status = 408
    code = "too-slow"


class KeyInUse(ClientError):
    """An upload with the same Idempotency-Key is in progress; what it will come to is not known."""

    status = 409
    code = "key-in-use"
    retry_after = 5


class TooLarge(ClientError):
    """Body, part or number of parts over a limit."""

    status = 413
    code = "too-large"


class UnsupportedMediaType(ClientError):
    """Content-Encoding other than identity, or multipart other than form-data."""

    status = 415
    code = "unsupported-media-type"


class ExpectationFailed(ClientError):
    """An expectation other than 100-continue (RFC 9110, section 10.1.1)."""

    status = 417
    code = "expectation-failed"


class DigestMismatch(ClientError):
    """The body is not the one its sender means: by its digest (RFC 9530) or Idempotency-Key."""

    status = 422
    code = "digest-mismatch"


class HeadersTooLarge(ClientError):
    """Request, trailer or part headers over a limit."""

    status = 431
    code = "headers-too-large"


class ClientBusy(ClientError):
    """The client's own limit of concurrent uploads is reached (RFC 6585, section 4)."""

    status = 429
    code = "too-many-uploads"
    retry_after = 5


class Unimplemented(ClientError):
    """A coding other than chunked (RFC 9112, section 6.1), or an unknown method (9110, 9.1)."""

    status = 501
    code = "not-implemented"


class HttpVersion(ClientError):
    """Not HTTP/1.x."""

    status = 505
    code = "http-version"


class BrokerError(RelayError):
    """The broker did not, or may not, have taken the upload."""

    status = 502


class Unroutable(BrokerError):
    """A mandatory frame was returned: nothing is bound where it went."""

    code = "unroutable"


class BrokerRefused(BrokerError):
    """The broker closed the channel: exchange missing, access refused, message too large.

    Attributes:
        reply_code: AMQP's, such as 404; 0 if relay itself knew that it would be refused.
    """

    code = "broker-refused"

    def __init__(self, detail: str, *, reply_code: int = 0) -> None:
        super().__init__(detail)
        self.reply_code = reply_code


class BrokerUnavailable(BrokerError):
    """There is no connection, or none came back within the grace period."""

    status = 503
    code = "broker-unavailable"
    retry_after = 5


class BrokerBlocked(BrokerError):
    """A memory or disk alarm has kept the broker from reading for too long."""

    status = 503
    code = "broker-blocked"
    retry_after = 30


class ConfirmTimeout(BrokerError):
    """A confirm is overdue. The transfer is not committed."""

    status = 504
    code = "confirm-timeout"


class OutcomeUnknown(BrokerError):
    """The broker was lost between the commit frame and its confirm: it may be committed."""

    status = 504
    code = "outcome-unknown"


class QueueFull(BrokerError):
    """The broker nacked a frame, as a full queue with reject-publish does."""

    status = 507
    code = "queue-full"


class DaemonError(RelayError):
    """Relay itself has no room, or is going away."""

    status = 503


class TooManyUploads(DaemonError):
    """The daemon's limit of concurrent uploads is reached."""

    code = "too-many-uploads"
    retry_after = 5


class ShuttingDown(DaemonError):
    """The daemon is stopping and the time for uploads in progress has run out."""

    code = "shutting-down"


class ClientGone(RelayError):
    """The client closed or broke its connection before the end of its request."""

    code = "client-gone"


def codes(of: type[RelayError] = RelayError) -> frozenset[str]:
    """Every code that there is."""
    return frozenset({of.code}).union(*(codes(kind) for kind in of.__subclasses__()))
