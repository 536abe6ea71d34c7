"""The book of confirms against a naive model, under every interleaving of what a broker does."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from relay.protocol.confirms import Confirms, Outcome, UnknownDeliveryTag

Settled = list[tuple[str, Outcome]]


def publish(confirms: Confirms[str], items: str) -> None:
    for item in items:
        confirms.register(item)


def one(confirms: Confirms[str], tag: int, *, acked: bool = True) -> Settled:
    return confirms.settle(tag, multiple=False, acked=acked)


def multiple(confirms: Confirms[str], tag: int, *, acked: bool = True) -> Settled:
    return confirms.settle(tag, multiple=True, acked=acked)


def test_tags_count_from_one() -> None:
    confirms: Confirms[str] = Confirms()
    assert [confirms.register(item) for item in "abc"] == [1, 2, 3]
    assert one(confirms, 2) == [("b", Outcome.ACKED)]
    assert confirms.register("d") == 4
    assert list(confirms) == ["a", "c", "d"]


def test_multiple_settles_up_to_its_tag_what_is_not_yet_settled() -> None:
    confirms: Confirms[str] = Confirms()
    publish(confirms, "abcde")
    one(confirms, 3)
    assert multiple(confirms, 4) == [(item, Outcome.ACKED) for item in "abd"]
    assert list(confirms) == ["e"]


def test_multiple_with_tag_zero_settles_everything() -> None:
    confirms: Confirms[str] = Confirms()
    publish(confirms, "abc")
    assert multiple(confirms, 0, acked=False) == [(item, Outcome.NACKED) for item in "abc"]
    assert multiple(confirms, 0) == []


def test_an_ack_after_a_return_is_not_a_success() -> None:
    confirms: Confirms[str] = Confirms()
    publish(confirms, "abc")
    assert confirms.mark_returned("b".__eq__)
    assert len(confirms) == 3
    assert multiple(confirms, 3) == [
        ("a", Outcome.ACKED),
        ("b", Outcome.RETURNED),
        ("c", Outcome.ACKED),
    ]


def test_a_return_is_for_the_oldest_that_matches_and_has_not_been_returned() -> None:
    confirms: Confirms[str] = Confirms()
    publish(confirms, "aab")
    assert confirms.mark_returned("a".__eq__)
    assert one(confirms, 2) == [("a", Outcome.ACKED)]
    assert not confirms.mark_returned("a".__eq__)
    assert one(confirms, 1) == [("a", Outcome.RETURNED)]
    assert not confirms.mark_returned("x".__eq__)


def test_what_is_lost_is_neither_acked_nor_nacked_and_comes_back_in_order() -> None:
    confirms: Confirms[str] = Confirms()
    publish(confirms, "abcd")
    confirms.mark_returned("d".__eq__)
    one(confirms, 2)
    assert confirms.lost() == ["a", "c", "d"]
    assert confirms.lost() == []
    assert len(confirms) == 0


@pytest.mark.parametrize(("tag", "is_multiple"), [(0, False), (1, False), (3, False), (3, True)])
def test_a_tag_that_is_not_outstanding_is_an_error_and_changes_nothing(
    tag: int, is_multiple: bool
) -> None:
    confirms: Confirms[str] = Confirms()
    publish(confirms, "ab")
    one(confirms, 1)
    with pytest.raises(UnknownDeliveryTag):
        confirms.settle(tag, multiple=is_multiple, acked=True)
    assert list(confirms) == ["b"]


@dataclass
class Entry:
    """What the model knows of one published item."""

    item: str
    returned: bool = False
    fate: str | None = None


class ConfirmsAndModel(RuleBasedStateMachine):
    """The model keeps every item ever published and looks through all of them each time."""

    @initialize()
    def begin(self) -> None:
        self.confirms: Confirms[str] = Confirms()
        self.entries: dict[int, Entry] = {}

    def outstanding(self, up_to: int | None = None) -> dict[int, Entry]:
        return {
            tag: entry
            for tag, entry in sorted(self.entries.items())
            if entry.fate is None and (up_to is None or tag <= up_to)
        }

    def expect_settled(self, tags: list[int], *, acked: bool) -> Settled:
        expected = []
        for tag in tags:
            entry = self.entries[tag]
            assert entry.fate is None, "settled twice"
            outcome = Outcome.NACKED
            if acked:
                outcome = Outcome.RETURNED if entry.returned else Outcome.ACKED
            entry.fate = outcome.value
            expected.append((entry.item, outcome))
        return expected

    # Few names, so that the same item is often outstanding twice.
    @rule(item=st.sampled_from("abc"))
    def publish(self, item: str) -> None:
        tag = self.confirms.register(item)
        assert tag == len(self.entries) + 1
        self.entries[tag] = Entry(item)

    @precondition(lambda self: self.outstanding())
    @rule(data=st.data(), acked=st.booleans())
    def settle_one(self, data: st.DataObject, acked: bool) -> None:
        tag = data.draw(st.sampled_from(list(self.outstanding())))
        settled = self.confirms.settle(tag, multiple=False, acked=acked)
        assert settled == self.expect_settled([tag], acked=acked)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), acked=st.booleans())
    def settle_multiple(self, data: st.DataObject, acked: bool) -> None:
        tag = data.draw(st.integers(1, len(self.entries)))
        settled = self.confirms.settle(tag, multiple=True, acked=acked)
        assert settled == self.expect_settled(list(self.outstanding(tag)), acked=acked)

    @rule(acked=st.booleans())
    def settle_everything(self, acked: bool) -> None:
        settled = self.confirms.settle(0, multiple=True, acked=acked)
        assert settled == self.expect_settled(list(self.outstanding()), acked=acked)

    @rule(item=st.sampled_from("abcd"))
    def return_one(self, item: str) -> None:
        candidates = [
            entry
            for entry in self.outstanding().values()
            if entry.item == item and not entry.returned
        ]
        assert self.confirms.mark_returned(item.__eq__) == bool(candidates)
        if candidates:
            candidates[0].returned = True

    @rule(ahead=st.integers(1, 3), is_multiple=st.booleans(), acked=st.booleans())
    def settle_what_was_never_published(self, ahead: int, is_multiple: bool, acked: bool) -> None:
        with pytest.raises(UnknownDeliveryTag):
            self.confirms.settle(len(self.entries) + ahead, multiple=is_multiple, acked=acked)

    @rule(data=st.data(), acked=st.booleans())
    def settle_again(self, data: st.DataObject, acked: bool) -> None:
        gone = [0, *(tag for tag, entry in self.entries.items() if entry.fate is not None)]
        with pytest.raises(UnknownDeliveryTag):
            self.confirms.settle(data.draw(st.sampled_from(gone)), multiple=False, acked=acked)

    @rule()
    def lose_the_channel(self) -> None:
        unknown = self.outstanding().values()
        assert self.confirms.lost() == [entry.item for entry in unknown]
        for entry in unknown:
            entry.fate = "unknown"

    @invariant()
    def the_book_lists_what_is_outstanding_oldest_first(self) -> None:
        expected = [entry.item for entry in self.outstanding().values()]
        assert list(self.confirms) == expected
        assert len(self.confirms) == len(expected)


ConfirmsAndModel.TestCase.settings = settings(max_examples=60)
TestEveryInterleaving = ConfirmsAndModel.TestCase
