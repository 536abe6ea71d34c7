from collections import deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from relay.broker.window import Request, Window

SIZE = 100


class Asker:
    """Who asks a window for room, and counts how often it is told that there is some."""

    def __init__(self, window: Window, size: int) -> None:
        self.told = 0
        self.request = window.request(size, self._tell)

    def _tell(self) -> None:
        self.told += 1

    def is_granted(self) -> bool:
        return self.request.granted


def test_room_is_granted_at_once_while_there_is_some() -> None:
    window = Window(SIZE)
    first, second = Asker(window, 60), Asker(window, 40)
    assert first.is_granted()
    assert second.is_granted()
    assert window.taken == SIZE
    # Only who was kept waiting needs to be told.
    assert first.told == second.told == 0


def test_nothing_still_fits_into_a_full_window() -> None:
    window = Window(SIZE)
    Asker(window, SIZE)
    assert Asker(window, 0).is_granted()


def test_who_waits_is_told_when_there_is_room() -> None:
    window = Window(SIZE)
    Asker(window, SIZE)
    waiting = Asker(window, 30)
    assert not waiting.is_granted()
    window.release(29)
    assert not waiting.is_granted()
    window.release(1)
    assert waiting.is_granted()
    assert waiting.told == 1
    assert window.taken == SIZE


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    window = Window(SIZE)
    Asker(window, 80)
    large, small, nothing = Asker(window, 50), Asker(window, 1), Asker(window, 0)
    assert [large.is_granted(), small.is_granted(), nothing.is_granted()] == [False, False, False]
    window.release(30)
    assert [large.is_granted(), small.is_granted(), nothing.is_granted()] == [True, False, False]
    window.release(1)
    assert [large.is_granted(), small.is_granted(), nothing.is_granted()] == [True, True, True]


def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    window = Window(SIZE)
    Asker(window, SIZE)
    waiting = [Asker(window, SIZE // 4) for _ in range(8)]
    for served in range(1, 9):
        window.release(SIZE // 4)
        assert [asker.is_granted() for asker in waiting] == [n < served for n in range(8)]


def test_a_waiter_that_withdraws_takes_nothing_and_holds_nobody_up() -> None:
    window = Window(SIZE)
    Asker(window, 60)
    large, small = Asker(window, 50), Asker(window, 40)
    window.withdraw(large.request)
    assert not large.is_granted()
    assert small.is_granted()
    assert window.taken == SIZE
    assert window.waiting == 0


def test_a_grant_that_is_withdrawn_goes_to_the_next() -> None:
    window = Window(SIZE)
    first, second = Asker(window, SIZE), Asker(window, SIZE)
    window.withdraw(first.request)
    assert second.is_granted()
    assert window.taken == SIZE


def test_giving_back_more_than_was_taken_is_a_bug() -> None:
    window = Window(SIZE)
    Asker(window, 10)
    with pytest.raises(AssertionError):
        window.release(11)


class Windows(RuleBasedStateMachine):
    """Any order of requests, releases and withdrawals, against a queue kept by hand."""

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.window = Window(SIZE)
        self.free = SIZE
        self.queue: deque[Request] = deque()
        self.granted: set[Request] = set()
        self.told: list[Request] = []

    @rule(target=asked, size=st.integers(0, SIZE))
    def request(self, size: int) -> Request:
        request = self.window.request(size, lambda: self.told.append(request))
        if not self.queue and size <= self.free:
            self.free -= size
            self.granted.add(request)
        else:
            self.queue.append(request)
        return request

    @rule(request=consumes(asked))
    def end(self, request: Request) -> None:
        if request.granted:
            self.window.release(request.size)
        else:
            self.window.withdraw(request)
        self._forget(request)

    @rule(request=consumes(asked))
    def withdraw(self, request: Request) -> None:
        self.window.withdraw(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if request in self.granted:
            self.granted.remove(request)
            self.free += request.size
        else:
            self.queue.remove(request)
        expected = []
        while self.queue and self.queue[0].size <= self.free:
            first = self.queue.popleft()
            self.free -= first.size
            self.granted.add(first)
            expected.append(first)
        assert self.told == expected
        self.told.clear()

    @invariant()
    def agrees(self) -> None:
        assert self.window.taken == SIZE - self.free == sum(r.size for r in self.granted)
        assert self.window.waiting == len(self.queue)
        assert all(request.granted for request in self.granted)
        assert not any(request.granted for request in self.queue)


TestWindows = Windows.TestCase
