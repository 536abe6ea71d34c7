"""Digests that a client gives or asks for: the integrity fields of RFC 9530. Pure."""

from collections.abc import Mapping, Sequence
from typing import Final

import http_sf

from relay.errors import BadRequest
from relay.protocol.framing import ALGORITHMS
from relay.protocol.head import Field

DIGEST_SIZES: Final[Mapping[str, int]] = {"crc32c": 4, "sha-256": 32, "sha-512": 64}
"""The algorithms relay can verify, and the bytes of their digests; crc32c is big-endian."""

_GIVEN: Final = (b"repr-digest", b"content-digest")
_WANTED: Final = b"want-repr-digest"


def given_digests(fields: Sequence[Field]) -> dict[str, str]:
    """The digests in Repr-Digest and Content-Digest, algorithm to lower-case hex.

    The two mean the same bytes, as relay takes no content coding (RFC 9530, section 3).
    Algorithms it does not know are left out. ``fields`` may be headers or trailers.

    Raises:
        BadRequest: malformed, of the wrong size, or one digest contradicts the other.
    """
    given: dict[str, str] = {}
    for name in _GIVEN:
        for algorithm, value in _dictionary(fields, name).items():
            if algorithm not in DIGEST_SIZES:
                continue
            if not isinstance(value, bytes) or len(value) != DIGEST_SIZES[algorithm]:
                raise BadRequest(f"the given {algorithm} digest is malformed")
            if given.setdefault(algorithm, value.hex()) != value.hex():
                raise BadRequest(f"two different {algorithm} digests are given")
    return given


def wanted_digests(fields: Sequence[Field]) -> tuple[str, ...]:
    """The algorithms in Want-Repr-Digest of a weight over 0, those that relay computes on request.

    Raises:
        BadRequest: malformed, or a weight not from 0 to 10 (RFC 9530, section 4).
    """
    wanted = []
    for algorithm, weight in _dictionary(fields, _WANTED).items():
        if type(weight) is not int or not 0 <= weight <= 10:
            raise BadRequest("a weight in Want-Repr-Digest is not an integer from 0 to 10")
        if weight > 0 and algorithm in ALGORITHMS:
            wanted.append(algorithm)
    return tuple(wanted)


def _dictionary(fields: Sequence[Field], name: bytes) -> dict[str, object]:
    """The members of a Dictionary field (RFC 9651), without their parameters."""
    values = [value for key, value in fields if key == name and value]
    if not values:
        return {}
    try:
        parsed = http_sf.parse(b", ".join(values), tltype="dictionary")
    except http_sf.StructuredFieldError:
        raise BadRequest(f"{name.decode('ascii').title()} is malformed") from None
    assert isinstance(parsed, dict)
    return {key: item[0] if isinstance(item, tuple) else item for key, item in parsed.items()}
