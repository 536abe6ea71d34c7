"""From an AMQP URL to a stream that pika's parameters go with: TCP, or TLS over it.

``amqps`` means TLS to that broker, or no connection: nothing here falls back to plaintext. What
is said over the stream is for others to know.
"""

import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import parse_qs, urlsplit

import pika
import pika.credentials
import trio
from pika.connection import Parameters

from relay import tls
from relay.backoff import delay
from relay.config import AmqpConfig, ConfigError, logs_in_by_certificate
from relay.errors import BrokerUnavailable

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for name resolution and the handshakes of TCP and TLS."""

UNSENT_SIZE: Final = 512 * 1024
"""Bytes that the kernel takes before it can send them. trio's 16 KiB keep what is queued in the
program, where an order can still be changed, at the price of a system call and a turn of trio's
for every two frames: a seventh of the daemon's CPU. These are the four frames that the adapter
puts in order at once."""

BACKOFF_FIRST: Final = 0.25
BACKOFF_LAST: Final = 10.0
"""Seconds between attempts to connect: doubled each time, then jittered by half."""

Connect = Callable[[str, int], Awaitable[trio.abc.Stream]]
"""Opens a stream to a host and port, or raises OSError."""


def backoff(attempt: int, jitter: float) -> float:
    """Seconds to wait before attempt number ``attempt`` to connect; as ``relay.backoff``."""
    return delay(attempt, jitter, first=BACKOFF_FIRST, last=BACKOFF_LAST)


class Connector:
    """Opens streams to the brokers of one configuration.

    Attributes:
        brokers: pika's parameters for each URL, in order; ``ssl_options`` is set for amqps.
    """

    def __init__(
        self,
        config: AmqpConfig,
        *,
        name: str,
        connect: Connect = trio.open_tcp_stream,
        naming: tls.Naming = "amqp.{}".format,
    ) -> None:
        """Understand the URLs and try the files.

        Args:
            config: URLs, heartbeat and TLS files count.
            name: what the broker shows the connection as.
            connect: opens what is below TLS.
            naming: what errors call a key.

        Raises:
            ConfigError: naming the key, and never quoting a URL, for the password in it.
        """
        self._config = config
        self._connect = connect
        self._naming = naming
        self.brokers = tuple(self._parameters(url, name) for url in config.urls)
        if any(broker.ssl_options for broker in self.brokers):
            tls.client_context(config, naming)
        else:
            # Whoever gives certificates believes that the connection is secure.
            for key in tls.FILES:
                if getattr(config, key):
                    raise ConfigError(f"{naming(key)}: no URL in {naming('urls')} is amqps")

    async def open(self, broker: Parameters) -> trio.abc.Stream:
        """A stream to one of ``brokers``, ready for AMQP; with TLS, the broker is verified.

        Raises:
            BrokerUnavailable: saying what an operator must know.
        """
        step = "no answer"
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                if broker.ssl_options is None:
                    return await self._connected(broker)
                context = await self._context()
                stream = await self._connected(broker)
                step = "no end of the TLS handshake"
                return await tls.secured(stream, context, broker.host, peer="the broker")
        except trio.TooSlowError as exc:
            reason = f"{step} within {CONNECT_TIMEOUT:g} s"
            raise BrokerUnavailable(f"cannot connect to the broker: {reason}") from exc
        except tls.TlsFailed as exc:
            raise BrokerUnavailable(f"no TLS with the broker: {exc}") from exc
        except (OSError, ConfigError) as exc:
            raise BrokerUnavailable(f"cannot connect to the broker: {exc}") from exc

    async def _connected(self, broker: Parameters) -> trio.abc.Stream:
        stream = await self._connect(broker.host, broker.port)
        if isinstance(stream, trio.SocketStream):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_SIZE)
        return stream

    async def _context(self) -> ssl.SSLContext:
        # In a thread, because parsing the system's CAs takes 50 ms.
        return await trio.to_thread.run_sync(
            tls.client_context, self._config, self._naming, abandon_on_cancel=True
        )

    def _parameters(self, url: str, name: str) -> Parameters:
        key = self._naming("urls")
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("amqp", "amqps") or not parts.hostname:
                raise ValueError
            parts.hostname.encode("idna")
            parameters = pika.URLParameters(url)
        except (LookupError, TypeError, ValueError) as exc:
            # Their words may quote a password.
            example = "amqps://user:password@host:port/vhost"
            raise ConfigError(f"{key}: not an AMQP URL (amqp or {example})") from exc
        if "ssl_options" in parse_qs(parts.query):
            # pika takes it, among others, as leave not to verify.
            raise ConfigError(f"{key}: no ssl_options in a URL; {self._naming('ca_file')} and such")
        if logs_in_by_certificate(url, self._config):
            parameters.credentials = pika.credentials.ExternalCredentials()
        parameters.heartbeat = round(self._config.heartbeat)
        parameters.client_properties = {"connection_name": name, "product": "relay"}
        return parameters
