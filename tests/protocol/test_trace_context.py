"""W3C Trace Context: what is valid is handed on as it came; what is not is as good as absent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.trace_context import NO_TRACE, STATE_MAX, trace_context, trace_id

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_valid_trace_is_handed_on() -> None:
    trace = trace_context([PARENT], [b"rojo=00f067aa0ba902b7, congo=t61rcWkgMzE", b"\ta@b=1 2,,"])
    assert trace.parent == PARENT.decode()
    assert trace.state == "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,a@b=1 2"
    assert trace_id(trace.parent) == "0af7651916cd43dd8448eb211c80319c"
    assert trace_id(None) is None


@pytest.mark.parametrize(
    "parents",
    [
        [],
        [b""],
        [PARENT, PARENT],
        [PARENT.upper()],
        [PARENT + b"-x"],
        [PARENT + b" "],
        [PARENT[:-1]],
        [b"ff" + PARENT[2:]],
        [b"0g" + PARENT[2:]],
        [b"00-" + b"0" * 32 + PARENT[35:]],
        [PARENT[:36] + b"0" * 16 + b"-01"],
    ],
)
def test_an_invalid_parent_is_no_trace_and_its_state_is_nothing(parents: list[bytes]) -> None:
    assert trace_context(parents, [b"a=1"]) == NO_TRACE


@pytest.mark.parametrize("more", [b"", b"-", b"-what-is-yet-to-come"])
def test_of_a_later_version_what_is_known_is_handed_on(more: bytes) -> None:
    assert trace_context([b"cc" + PARENT[2:] + more], []).parent == "cc" + PARENT[2:].decode()
    assert trace_context([b"cc" + PARENT[2:] + b"x"], []) == NO_TRACE


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b" , ,",
        b"a",
        b"A=1",
        b"a=",
        b"=1",
        b"a=1=2",
        b"a=1,a=2",
        b"a=\xc3\xa9",
        b"a=1\x7f",
        b"a" * 257 + b"=1",
        b"a=" + b"1" * 257,
        b",".join(b"k%d=1" % n for n in range(33)),
    ],
)
def test_an_invalid_state_is_left_out_and_the_parent_kept(state: bytes) -> None:
    assert trace_context([PARENT], [state]) == (PARENT.decode(), None)


def test_a_state_is_cut_at_members_large_ones_first_then_the_last() -> None:
    large = b"large=" + b"x" * 200
    small = [b"k%02d=" % number + b"y" * 40 for number in range(12)]
    trace = trace_context([PARENT], [b",".join([large, *small])])
    assert trace.state == b",".join(small[:11]).decode()
    assert trace_context([PARENT], [large]).state == large.decode()


@given(st.lists(st.binary(max_size=60)), st.lists(st.binary(max_size=700)))
def test_whatever_comes_the_result_is_short_and_printable(
    parents: list[bytes], states: list[bytes]
) -> None:
    parent, state = trace_context([PARENT, *parents][:1], states)
    assert parent == PARENT.decode()
    assert state is None or (state.isascii() and state.isprintable() and len(state) <= STATE_MAX)
    trace_context(parents, states)
