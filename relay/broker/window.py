"""The bytes that may be out at the broker and not yet confirmed: counted, bounded, fair.

This is where backpressure begins: an upload that gets no room stops reading its socket. Uploads
are served first come, first served; but each route has a part of the budget that no other route
can take, so that one whose queue stands still, and gives nothing back, stops no other. Pure: it
tells who waits, and leaves the waiting to them, because they have more than one thing to wait for.
It knows nothing of frames or AMQP.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

KEPT: Final = 8
"""One in so many bytes of a window is kept for the routes, in equal parts; the others are for all.
What a route can have, when it is alone, is less by the other routes' parts."""


class Window:
    """A budget in bytes, handed out first come, first served, a part of it by routes.

    Whatever the other routes hold, a request for what is left of its route's part is granted at
    once, unless an earlier one of that route waits.

    Attributes:
        largest: what a single request may ask for, if it is to be granted ever.
    """

    def __init__(self, size: int, routes: Iterable[str] = ()) -> None:
        """``size`` in bytes; each of ``routes`` has a part."""
        self.size = size
        self.largest = size - size // KEPT
        self._free = size
        # What is left of all parts.
        self._kept = 0
        self._shares: dict[str, _Share] = {}
        self._waiting: list[_Share] = []
        self._number = 0
        self.configure(routes)

    def configure(self, routes: Iterable[str]) -> None:
        """Have parts for these routes from now on.

        What is held stays as it is: where that is more than would be granted now, the parts are
        whole again once it has been given back.
        """
        names = set(routes)
        self._shares |= {name: _Share() for name in names if name not in self._shares}
        for name, share in self._shares.items():
            share.part = self.size // KEPT // len(names) if name in names else 0
        self._kept = sum(share.left for share in self._shares.values())
        self._serve()

    @property
    def taken(self) -> int:
        """Bytes handed out."""
        return self.size - self._free

    @property
    def waiting(self) -> int:
        """Number of requests that wait for room."""
        return sum(len(share.queue) for share in self._waiting)

    def request(self, route: str, size: int, on_granted: Callable[[], object]) -> "Request":
        """Ask for ``size`` bytes, behind whoever asked before.

        They are taken once ``granted``, possibly at once; ``on_granted`` is called if it happens
        later. Beyond its route's part a request is served only when it is first, however little it
        wants: a small frame that could always slip in would starve the large one before it.
        """
        self._number += 1
        request = Request(route, size, on_granted, self._number)
        request.granted = self.take(route, size)
        if not request.granted:
            share = self._shares[route]
            if not share.queue:
                self._waiting.append(share)
            share.queue.append(request)
        return request

    def take(self, route: str, size: int) -> bool:
        """Take ``size`` bytes, if that is possible without waiting."""
        share = self._shares.get(route)
        if share is None:
            share = self._shares[route] = _Share()
        if share.queue or not self._fits(share, size, is_first=not self._waiting):
            return False
        self._change(share, size)
        return True

    def withdraw(self, request: "Request") -> None:
        """Take a request back, granted or not."""
        if request.granted:
            self.release(request.route, request.size)
        else:
            self._forget(self._shares[request.route], request)
            self._serve()

    def release(self, route: str, size: int) -> None:
        """Give ``size`` bytes of a route's back."""
        self._change(self._shares[route], -size)
        if self._waiting:
            self._serve()

    def _serve(self) -> None:
        while self._waiting:
            self._waiting.sort(key=_number_of_first)
            for share in self._waiting:
                request = share.queue[0]
                if self._fits(share, request.size, is_first=share is self._waiting[0]):
                    break
            else:
                return
            self._forget(share, request)
            self._change(share, request.size)
            request.granted = True
            request.on_granted()

    def _fits(self, share: "_Share", size: int, *, is_first: bool) -> bool:
        left = share.left
        if size <= left and size <= self._free:
            return True
        return is_first and size <= self._free - (self._kept - left)

    def _change(self, share: "_Share", size: int) -> None:
        before = share.left
        share.held += size
        assert share.held >= 0, "released more than was taken"
        self._kept += share.left - before
        self._free -= size

    def _forget(self, share: "_Share", request: "Request") -> None:
        share.queue.remove(request)
        if not share.queue:
            self._waiting.remove(share)


class Request:
    """Bytes asked of a window: ``granted``, or waiting for it."""

    __slots__ = ("granted", "number", "on_granted", "route", "size")

    def __init__(
        self, route: str, size: int, on_granted: Callable[[], object], number: int
    ) -> None:
        self.route = route
        self.size = size
        self.on_granted = on_granted
        self.number = number
        self.granted = False


class _Share:
    """What a route has, and what it waits for."""

    __slots__ = ("held", "part", "queue")

    def __init__(self) -> None:
        self.part = 0
        self.held = 0
        self.queue: deque[Request] = deque()

    @property
    def left(self) -> int:
        """Bytes of its part that it does not have yet."""
        left = self.part - self.held
        return left if left > 0 else 0


def _number_of_first(share: _Share) -> int:
    return share.queue[0].number
