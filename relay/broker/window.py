"""The bytes that may be out at the broker and not yet confirmed: counted, bounded, fair.

This is where backpressure begins: an upload that gets no room stops reading its socket. Pure: it
tells who waits, and leaves the waiting to them, because they have more than one thing to wait for.
It knows nothing of frames or AMQP.
"""

from collections import deque
from collections.abc import Callable


class Window:
    """A budget in bytes, handed out first come, first served."""

    def __init__(self, size: int) -> None:
        """``size`` in bytes; no single request may be larger."""
        self.size = size
        self._free = size
        self._waiting: deque[Request] = deque()

    @property
    def taken(self) -> int:
        """Bytes handed out."""
        return self.size - self._free

    @property
    def waiting(self) -> int:
        """Number of requests that wait for room."""
        return len(self._waiting)

    def request(self, size: int, on_granted: Callable[[], object]) -> "Request":
        """Ask for ``size`` bytes, behind whoever asked before.

        They are taken once ``granted``, possibly at once; ``on_granted`` is called if it happens
        later. A request is served only when it is first, however little it wants: a small frame
        that could always slip in would starve the large one before it.
        """
        request = Request(size, on_granted)
        request.granted = self.take(size)
        if not request.granted:
            self._waiting.append(request)
        return request

    def take(self, size: int) -> bool:
        """Take ``size`` bytes, if that is possible without waiting."""
        if self._waiting or self._free < size:
            return False
        self._free -= size
        return True

    def withdraw(self, request: "Request") -> None:
        """Take a request back, granted or not."""
        if request.granted:
            self.release(request.size)
        else:
            self._waiting.remove(request)
            self._serve()

    def release(self, size: int) -> None:
        """Give ``size`` bytes back."""
        self._free += size
        assert self._free <= self.size, "released more than was taken"
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._free >= self._waiting[0].size:
            request = self._waiting.popleft()
            self._free -= request.size
            request.granted = True
            request.on_granted()


class Request:
    """Bytes asked of a window: ``granted``, or waiting for it."""

    __slots__ = ("granted", "on_granted", "size")

    def __init__(self, size: int, on_granted: Callable[[], object]) -> None:
        self.size = size
        self.on_granted = on_granted
        self.granted = False
