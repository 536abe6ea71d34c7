"""Bytes as they come, to pieces of the size of a message."""

from collections.abc import AsyncIterable, AsyncIterator

from tests.bench.peers.destination import MESSAGE_BYTES


async def in_pieces(source: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yields ``MESSAGE_BYTES`` at a time, and what is left; each byte is copied once."""
    held: list[memoryview] = []
    size = 0
    async for data in source:
        view = memoryview(data)
        while size + len(view) >= MESSAGE_BYTES:
            cut = MESSAGE_BYTES - size
            held.append(view[:cut])
            yield b"".join(held)
            view = view[cut:]
            held, size = [], 0
        if view:
            held.append(view)
            size += len(view)
    if held:
        yield b"".join(held)
