"""Digests given and wanted: RFC 9530 on the structured fields of RFC 9651."""

import base64
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BadRequest
from relay.protocol.crc import crc32c
from relay.protocol.digest_fields import DIGEST_SIZES, given_digests, wanted_digests
from relay.protocol.framing import ALGORITHMS

BODY = b'{"hello": "world"}'  # the example of RFC 9530, appendix D
SHA_256 = b"sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"
CRC32C = b"crc32c=:Q3lHIA==:"
VALUES = st.binary(max_size=12) | st.text('ab=:;,?1@%"( ').map(str.encode)
FIELDS = st.sampled_from([b"repr-digest", b"content-digest", b"want-repr-digest"])


def test_the_examples_of_the_rfc_are_understood() -> None:
    fields = [(b"repr-digest", SHA_256), (b"content-digest", CRC32C)]
    assert given_digests(fields) == {
        "sha-256": hashlib.sha256(BODY).hexdigest(),
        "crc32c": f"{crc32c(BODY):08x}",
    }


def test_every_algorithm_that_relay_computes_can_be_verified() -> None:
    sizes = {name: len(algorithm().hexdigest()) // 2 for name, algorithm in ALGORITHMS.items()}
    assert sizes | {"crc32c": 4} == DIGEST_SIZES


@pytest.mark.parametrize(
    ("fields", "algorithms"),
    [
        ([], set()),
        ([(b"repr-digest", b"")], set()),
        ([(b"repr-digest", b""), (b"repr-digest", CRC32C)], {"crc32c"}),
        ([(b"repr-digest", b"md5=:AAAA:, sha=:AAAA:, blake3=1")], set()),
        ([(b"repr-digest", SHA_256 + b";note=x, " + CRC32C)], {"sha-256", "crc32c"}),
        ([(b"repr-digest", SHA_256), (b"repr-digest", CRC32C)], {"sha-256", "crc32c"}),
        ([(b"repr-digest", SHA_256), (b"content-digest", SHA_256)], {"sha-256"}),
        ([(b"digest", b"sha-256=X48E")], set()),
    ],
)
def test_known_algorithms_are_taken_and_others_left(
    fields: list[tuple[bytes, bytes]], algorithms: set[str]
) -> None:
    assert given_digests(fields).keys() == algorithms


@pytest.mark.parametrize(
    "value",
    [
        b"sha-256",
        b"sha-256=X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=",  # RFC 3230's form
        b"sha-256=:X48E:",
        b"sha-256=1",
        b'sha-256="44aff4"',
        b"sha-256=(:AAAA:)",
        b"sha-512=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:",
        b"crc32c=:Q3lHIAA=:",
        b"crc32c=:!!!!:",
        b"crc32c=:Q3lHIA==:,",
        b"SHA-256=:AAAA:",
        b"=",
        b"\xff",
    ],
)
def test_a_malformed_digest_is_refused_not_ignored(value: bytes) -> None:
    with pytest.raises(BadRequest):
        given_digests([(b"repr-digest", value)])


def test_digests_that_contradict_each_other_are_refused() -> None:
    fields = [(b"repr-digest", CRC32C), (b"content-digest", b"crc32c=:AAAAAA==:")]
    with pytest.raises(BadRequest):
        given_digests(fields)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (b"sha-256=1", ("sha-256",)),
        (b"sha-512=3, sha-256=10, unixsum=0", ("sha-512", "sha-256")),
        (b"sha-256=0, sha-512=1", ("sha-512",)),
        (b"md5=5, crc32c=9", ()),
    ],
)
def test_wanted_algorithms_are_those_with_a_weight(value: bytes, wanted: tuple[str, ...]) -> None:
    assert wanted_digests([(b"want-repr-digest", value)]) == wanted


@pytest.mark.parametrize(
    "value", [b"sha-256", b"sha-256=11", b"sha-256=-1", b"sha-256=1.0", b"sha-256=?1", b"sha-256="]
)
def test_a_malformed_wish_is_refused(value: bytes) -> None:
    """RFC 9530, section 4."""
    with pytest.raises(BadRequest):
        wanted_digests([(b"want-repr-digest", value)])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(FIELDS, st.binary(max_size=12) | st.text('ab=:;,?1@%"( ').map(str.encode)))
)
def test_any_bytes_are_digests_or_the_clients_error(fields: list[tuple[bytes, bytes]]) -> None:
    for parse in (given_digests, wanted_digests):
        try:
            parse(fields)
        except BadRequest as exc:
            assert exc.detail  # noqa: PT017  there need be no error


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_a_digest_comes_out_as_hex(digest: bytes) -> None:
    value = b"sha-256=:" + base64.b64encode(digest) + b":"
    assert given_digests([(b"content-digest", value)]) == {"sha-256": digest.hex()}
