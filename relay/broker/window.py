"""The bytes that may be out at the broker and not yet confirmed: counted, bounded, fair.

This is where backpressure begins: an upload that gets no room stops reading its socket. It knows
nothing of frames or AMQP.
"""

from collections import deque

import trio


class Window:
    """A budget in bytes, handed out first come, first served."""

    def __init__(self, size: int) -> None:
        """``size`` in bytes; no single request may be larger."""
        self.size = size
        self._free = size
        self._waiting: deque[_Waiter] = deque()

    @property
    def taken(self) -> int:
        """Bytes handed out."""
        return self.size - self._free

    @property
    def waiting(self) -> int:
        """Number of tasks that wait for room."""
        return len(self._waiting)

    async def acquire(self, size: int) -> None:
        """Take ``size`` bytes, waiting behind whoever came before. Cancelled: nothing is taken.

        A waiter is served only when it is first, however little it wants: a small frame that
        could always slip in would starve the large one before it.
        """
        if not self._waiting and self._free >= size:
            self._free -= size
            return
        waiter = _Waiter(size)
        self._waiting.append(waiter)
        try:
            await waiter.granted.wait()
        except trio.Cancelled:
            if waiter.granted.is_set():
                self.release(size)
            else:
                self._waiting.remove(waiter)
                self._serve()
            raise

    def release(self, size: int) -> None:
        """Give ``size`` bytes back. Synchronous: pika's callbacks call it."""
        self._free += size
        assert self._free <= self.size, "released more than was taken"
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._free >= self._waiting[0].size:
            waiter = self._waiting.popleft()
            self._free -= waiter.size
            waiter.granted.set()


class _Waiter:
    __slots__ = ("granted", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.granted = trio.Event()
