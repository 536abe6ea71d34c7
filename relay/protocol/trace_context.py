"""W3C Trace Context: the trace that a request belongs to, handed on and never a reason to refuse.

What is not valid is as good as absent (https://www.w3.org/TR/trace-context/, section 3). relay
makes no spans of its own, so it hands on what it got. Pure.
"""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

STATE_MAX: Final = 512
"""Characters of tracestate that are handed on: as many as section 3.3.1.5 wants at least."""

_MEMBERS_MAX: Final = 32
_LARGE: Final = 128
"""Characters of a member beyond which it is the first to go where there are too many."""

# A later version may have more behind another hyphen; of what it has, this much is understood.
_PARENT: Final = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?"
)
_PARENT_SIZE: Final = 55
_KEY: Final = rb"[a-z0-9][a-z0-9_\-*/]{0,255}(?:@[a-z][a-z0-9_\-*/]{0,13})?"
_MEMBER: Final = re.compile(_KEY + rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[!-+\--<>-~]")


class TraceContext(NamedTuple):
    """Of a request; both None if it belongs to no trace.

    Attributes:
        parent: the traceparent field, 55 characters.
        state: the tracestate field, at most STATE_MAX characters.
    """

    parent: str | None = None
    state: str | None = None


NO_TRACE: Final = TraceContext()


def trace_context(parents: Sequence[bytes], states: Sequence[bytes]) -> TraceContext:
    """The trace that a request's fields name, as far as they are valid."""
    match = _PARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if match is None or (match[1] == b"00" and match[2] is not None):
        return NO_TRACE
    return TraceContext(match[0][:_PARENT_SIZE].decode("ascii"), _state(states))


def trace_id(parent: str | None) -> str | None:
    """The part of a valid traceparent that is the same wherever the trace is seen."""
    return None if parent is None else parent[3:35]


def _state(values: Sequence[bytes]) -> str | None:
    members = [member for raw in b",".join(values).split(b",") if (member := raw.strip(b" \t"))]
    keys = {member.partition(b"=")[0] for member in members}
    if len(members) > _MEMBERS_MAX or len(keys) < len(members):
        return None
    if not all(map(_MEMBER.fullmatch, members)):
        return None
    if _size(members) > STATE_MAX:
        members = [member for member in members if len(member) <= _LARGE]
    while _size(members) > STATE_MAX:
        members.pop()
    return b",".join(members).decode("ascii") or None


def _size(members: Sequence[bytes]) -> int:
    return sum(len(member) + 1 for member in members) - 1
