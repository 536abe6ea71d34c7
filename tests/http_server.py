"""An HTTP server over trio streams that does what the test says: h11's other half."""

import json
from collections.abc import Mapping

import h11
import trio


class ScriptedServer:
    """One connection's server; ``request`` and ``body`` are what came."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.request: h11.Request | None = None
        self.body = b""
        self._h11 = h11.Connection(h11.SERVER, 64 * 1024)

    @property
    def fields(self) -> dict[str, str]:
        """The request's header fields."""
        assert self.request is not None
        fields = {name.decode(): value.decode("latin-1") for name, value in self.request.headers}
        assert len(fields) == len(self.request.headers), "a field is sent twice"
        return fields

    async def receive_head(self) -> None:
        """Receive the request, without its body."""
        event = await self._next_event()
        assert isinstance(event, h11.Request)
        self.request = event

    async def receive_block(self) -> bool:
        """Receive some of the body. Returns whether there may be more."""
        event = await self._next_event()
        if isinstance(event, h11.Data):
            self.body += event.data
            return True
        assert isinstance(event, h11.EndOfMessage)
        return False

    async def receive(self) -> None:
        """Receive a whole request."""
        await self.receive_head()
        while await self.receive_block():
            pass

    async def go_on(self) -> None:
        """Send 100 (Continue)."""
        await self.send_raw(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])))

    async def answer(
        self, status: int, document: object = None, fields: Mapping[str, str] | None = None
    ) -> None:
        """Send a final response."""
        body = b"" if document is None else json.dumps(document).encode()
        headers = [("Content-Length", str(len(body))), *(fields or {}).items()]
        data = self._h11.send(h11.Response(status_code=status, headers=headers))
        assert data is not None
        await self.send_raw(data + (self._h11.send(h11.Data(data=body)) or b""))

    async def send_raw(self, data: bytes | None) -> None:
        """Send bytes, whatever they are."""
        await self.stream.send_all(data or b"")

    async def _next_event(self) -> h11.Event:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(bytes(await self.stream.receive_some(64 * 1024)))
        assert isinstance(event, h11.Event), event
        return event
