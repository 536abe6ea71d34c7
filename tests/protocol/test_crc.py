"""CRC-32C: known values, and joining against summing."""

from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.crc import crc32c, extend, join


def test_values_of_rfc_3720_appendix_b_4() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_joining_and_extending_are_as_summing_all(first: bytes, second: bytes) -> None:
    whole = crc32c(first + second)
    assert join(crc32c(first), crc32c(second), len(second)) == whole
    assert extend(crc32c(first), second) == whole


@given(st.integers(0, 2**32 - 1), st.integers(0, 1 << 20))
def test_joining_knows_any_checksum_and_any_size_of_frame(first: int, size: int) -> None:
    zeros = bytes(size)
    assert join(first, crc32c(zeros), size) == extend(first, zeros)
