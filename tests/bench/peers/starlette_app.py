"""The peer ``starlette``: `request.form()`, which spools files, and aio-pika.

Run by uvicorn: ``uvicorn tests.bench.peers.starlette_app:app``. Forms are what FastAPI's
`UploadFile` has underneath; a raw body is streamed, as Starlette lets an application do.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.bench.peers.aio_publisher import Broker, Upload, connected
from tests.bench.peers.destination import MESSAGE_BYTES, Destination, NotConfirmed
from tests.bench.peers.pieces import in_pieces

MAX_FIELD_BYTES: Final = 1 << 32
"""Starlette's own limit is 1 MiB; here fields are uploads, too."""


async def upload(request: Request) -> Response:
    """Publishes a form's files and fields, or the body."""
    broker: Broker = request.state.broker
    kind = request.headers.get("content-type", "")
    try:
        if kind.startswith("multipart/form-data"):
            messages = await publish_form(broker, request)
        else:
            async with broker.upload() as upload:
                async for piece in in_pieces(request.stream()):
                    await upload.publish("", piece)
            messages = upload.messages
    except NotConfirmed as exc:
        return JSONResponse({"error": str(exc)}, 502)
    return JSONResponse({"messages": messages}, 201)


async def publish_form(broker: Broker, request: Request) -> int:
    """Publishes every part of a form; returns how many messages that were."""
    async with request.form(max_part_size=MAX_FIELD_BYTES) as form, broker.upload() as upload:
        for name, value in form.multi_items():
            if isinstance(value, str):
                await publish_field(upload, name, value.encode())
            else:
                while piece := await value.read(MESSAGE_BYTES):
                    await upload.publish(name, piece)
    return upload.messages


async def publish_field(upload: Upload, name: str, value: bytes) -> None:
    """Publishes a field, which is in memory."""
    for start in range(0, len(value), MESSAGE_BYTES):
        await upload.publish(name, value[start : start + MESSAGE_BYTES])


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[Mapping[str, Broker]]:
    """The connection to the broker is as old as the process."""
    async with connected(Destination.from_environment()) as broker:
        yield {"broker": broker}


app = Starlette(routes=[Route("/", upload, methods=["POST"])], lifespan=lifespan)
