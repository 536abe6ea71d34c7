"""The peer ``aiohttp``: `MultipartReader`, which streams files and fields alike, and aio-pika.

A program: ``python -m tests.bench.peers.aiohttp_app PORT``. On uvloop, as whoever cares for
speed runs it.
"""

import sys
from collections.abc import AsyncIterator
from typing import Final

import uvloop
from aiohttp import BodyPartReader, web

from tests.bench.peers.aio_publisher import Broker, Upload, connected
from tests.bench.peers.destination import MESSAGE_BYTES, Destination, NotConfirmed
from tests.bench.peers.pieces import in_pieces

BROKER: Final = web.AppKey("broker", Broker)


async def upload(request: web.Request) -> web.Response:
    """Publishes a form's parts as they come, or the body."""
    try:
        async with request.app[BROKER].upload() as upload:
            if request.content_type == "multipart/form-data":
                await publish_form(upload, request)
            else:
                async for piece in in_pieces(request.content.iter_any()):
                    await upload.publish("", piece)
    except NotConfirmed as exc:
        return web.json_response({"error": str(exc)}, status=502)
    return web.json_response({"messages": upload.messages}, status=201)


async def publish_form(upload: Upload, request: web.Request) -> None:
    """Publishes every part of a form."""
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader):
            raise web.HTTPUnsupportedMediaType(text="a form within a form")
        async for piece in in_pieces(data_of(part)):
            await upload.publish(part.name or "", piece)


async def data_of(part: BodyPartReader) -> AsyncIterator[bytes]:
    """Yields the bytes of a part as they come."""
    while data := await part.read_chunk(MESSAGE_BYTES):
        yield data


async def broker_context(app: web.Application) -> AsyncIterator[None]:
    """The connection to the broker is as old as the process."""
    async with connected(Destination.from_environment()) as broker:
        app[BROKER] = broker
        yield


def main() -> None:
    """Serves until it is told to end."""
    app = web.Application()
    app.router.add_post("/", upload)
    app.cleanup_ctx.append(broker_context)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop=uvloop.new_event_loop(),
        access_log=None,
        print=None,
    )


if __name__ == "__main__":
    main()
