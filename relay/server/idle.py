"""Connections that wait for a request to begin, and for how long they still may.

When the daemon stops, nobody is to wait for a client that has nothing to say. Knows no HTTP.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Idle:
    """The connections that are idle now."""

    def __init__(self) -> None:
        self._end = math.inf
        self._scopes: set[trio.CancelScope] = set()

    @contextmanager
    def until(self, deadline: float) -> Iterator[trio.CancelScope]:
        """Be idle for the block's length, until ``deadline`` or the end for all of them."""
        with trio.CancelScope(deadline=min(deadline, self._end)) as scope:
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    def end_at(self, time: float) -> None:
        """From ``time`` on, in trio's clock, no connection may be idle."""
        self._end = time
        for scope in self._scopes:
            scope.deadline = min(scope.deadline, time)
