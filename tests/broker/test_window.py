from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from relay.broker.window import KEPT, Request, Window

SIZE = 100
ROUTE = "a"


class Asker:
    """Who asks a window for room, and counts how often it is told that there is some."""

    def __init__(self, window: Window, size: int, route: str = ROUTE) -> None:
        self.told = 0
        self.request = window.request(route, size, self._tell)

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
    window.release(ROUTE, 29)
    assert not waiting.is_granted()
    window.release(ROUTE, 1)
    assert waiting.is_granted()
    assert waiting.told == 1
    assert window.taken == SIZE


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    window = Window(SIZE)
    Asker(window, 80)
    large, small, nothing = Asker(window, 50), Asker(window, 1), Asker(window, 0)
    assert [large.is_granted(), small.is_granted(), nothing.is_granted()] == [False, False, False]
    window.release(ROUTE, 30)
    assert [large.is_granted(), small.is_granted(), nothing.is_granted()] == [True, False, False]
    window.release(ROUTE, 1)
    assert [large.is_granted(), small.is_granted(), nothing.is_granted()] == [True, True, True]


def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    window = Window(SIZE)
    Asker(window, SIZE)
    waiting = [Asker(window, SIZE // 4) for _ in range(8)]
    for served in range(1, 9):
        window.release(ROUTE, SIZE // 4)
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
        window.release(ROUTE, 11)


# --- routes ---------------------------------------------------------------------------------------

ROUTES = ("a", "b", "c", "d")
LARGE = 800
PART = LARGE // KEPT // len(ROUTES)


def taken_whole(window: Window, route: str) -> list[Request]:
    """The route has all that it can have, byte by byte, and waits for more."""
    requests = [Asker(window, 1, route).request]
    while requests[-1].granted:
        requests.append(Asker(window, 1, route).request)
    return requests


def test_a_route_alone_may_have_all_but_what_is_kept_for_others() -> None:
    for routes in ([], [ROUTE], ROUTES):
        window = Window(LARGE, routes)
        taken_whole(window, ROUTE)
        assert window.taken == LARGE - PART * len(set(routes) - {ROUTE})
        assert window.taken >= window.largest


def test_the_largest_request_is_granted_once_the_others_have_given_back_what_they_had() -> None:
    window = Window(LARGE, ROUTES)
    first = Asker(window, window.largest, "b")
    assert first.is_granted()
    second = Asker(window, window.largest, "a")
    window.release("b", window.largest)
    assert second.is_granted()


def test_whatever_other_routes_hold_and_wait_for_a_route_has_its_part() -> None:
    window = Window(LARGE, ROUTES)
    for route in ROUTES[1:]:
        taken_whole(window, route)
    for _ in range(3):
        assert Asker(window, PART, "a").is_granted()
        more = Asker(window, 1, "a")
        assert not more.is_granted()
        # What it gives back is its own again, though others have waited for longer.
        window.release("a", PART)
        assert more.is_granted()
        window.release("a", 1)


def test_beyond_its_part_a_route_waits_its_turn() -> None:
    window = Window(LARGE, ROUTES)
    held = taken_whole(window, "b")
    one = Asker(window, PART + 1, "a")
    assert not one.is_granted()
    # That of "b" is first, and gets what "b" gives back.
    window.release("b", 1)
    assert held[-1].granted
    assert not one.is_granted()
    window.release("b", 1)
    assert one.is_granted()


def test_within_a_route_nobody_overtakes() -> None:
    window = Window(LARGE, ROUTES)
    taken_whole(window, "b")
    large, small = Asker(window, PART + 1, "a"), Asker(window, 1, "a")
    assert not large.is_granted()
    assert not small.is_granted()
    window.withdraw(large.request)
    assert small.is_granted()


def test_routes_of_another_configuration_have_their_parts_once_there_is_room() -> None:
    window = Window(LARGE, ["b"])
    held = taken_whole(window, "b")
    assert window.taken == LARGE
    window.configure(ROUTES)
    newcomer = Asker(window, PART, "a")
    assert not newcomer.is_granted()
    window.withdraw(held.pop())
    window.release("b", PART)
    assert newcomer.is_granted()
    # Who is configured no more keeps what it has, and gives it back; it has no part.
    window.configure(["a"])
    window.release("b", LARGE - PART)
    assert window.taken == PART
    assert Asker(window, LARGE - PART, "a").is_granted()
    assert not Asker(window, 1, "b").is_granted()


@given(
    others=st.lists(st.tuples(st.sampled_from(ROUTES[1:]), st.integers(0, LARGE))),
    good=st.lists(st.integers(0, PART), min_size=1),
)
def test_routes_that_give_nothing_back_never_stop_one_that_does(
    others: Sequence[tuple[str, int]], good: Sequence[int]
) -> None:
    window = Window(LARGE, ROUTES)
    for route, size in others:
        window.request(route, size, lambda: None)
    for size in good:
        assert window.request("a", size, lambda: None).granted
        window.release("a", size)


class Windows(RuleBasedStateMachine):
    """Any order of requests, releases and withdrawals of any routes: what holds all the time."""

    asked = Bundle("asked")
    routes = st.sampled_from([*ROUTES, "unknown"])

    def __init__(self) -> None:
        super().__init__()
        self.window = Window(LARGE, ROUTES)
        self.waiting: list[Request] = []
        self.granted: list[Request] = []

    @rule(target=asked, route=routes, size=st.integers(1, LARGE))
    def request(self, route: str, size: int) -> Request:
        request = self.window.request(route, size, lambda: self._note(request))
        if request.granted:
            self._check_turn(request, self.waiting)
            self.granted.append(request)
        else:
            self.waiting.append(request)
        return request

    def _note(self, request: Request) -> None:
        """It is told, once, of being granted after a wait."""
        assert request.granted
        position = self.waiting.index(request)
        self._check_turn(request, self.waiting[:position])
        self.waiting.remove(request)
        self.granted.append(request)

    def _check_turn(self, request: Request, before: Sequence[Request]) -> None:
        """Past others it goes only for its part, and never past one of its route."""
        assert all(other.route != request.route for other in before)
        assert not before or self._held(request.route) + request.size <= self._part(request.route)

    @rule(request=consumes(asked))
    def end(self, request: Request) -> None:
        if request.granted:
            self.granted.remove(request)
            self.window.release(request.route, request.size)
        else:
            self.waiting.remove(request)
            self.window.withdraw(request)

    @rule(request=consumes(asked))
    def withdraw(self, request: Request) -> None:
        (self.granted if request.granted else self.waiting).remove(request)
        self.window.withdraw(request)

    def _held(self, route: str) -> int:
        return sum(request.size for request in self.granted if request.route == route)

    def _part(self, route: str) -> int:
        return PART if route in ROUTES else 0

    def _kept_from(self, route: str) -> int:
        return sum(max(0, PART - self._held(other)) for other in ROUTES if other != route)

    @invariant()
    def is_bounded(self) -> None:
        assert self.window.taken == sum(request.size for request in self.granted) <= LARGE
        assert self.window.waiting == len(self.waiting)

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        free = LARGE - self.window.taken
        seen: set[str] = set()
        for number, request in enumerate(self.waiting):
            if request.route not in seen:
                assert self._held(request.route) + request.size > self._part(request.route)
            if not number:
                assert request.size > free - self._kept_from(request.route)
            seen.add(request.route)


TestWindows = Windows.TestCase
