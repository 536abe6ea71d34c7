"""CRC-32C (Castagnoli, RFC 3720 appendix B.4): of bytes, and of what checksums alone are known of.

A part's checksum follows from its frames': each byte is summed once, where summing the part as
well would take 4 % of the daemon's CPU. Pure. Checksums are unsigned 32-bit integers.
"""

from functools import lru_cache
from typing import Final

import google_crc32c

_POLYNOMIAL: Final = 0x82F63B78
_ONE: Final = 1 << 31
"""The polynomial 1: in a checksum's bits the highest power of x comes last."""

_Tables = tuple[list[int], list[int], list[int], list[int]]


def crc32c(data: bytes) -> int:
    """The checksum of ``data``."""
    checksum: int = google_crc32c.value(data)
    return checksum


def extend(first: int, data: bytes) -> int:
    """The checksum of bytes that have the checksum ``first``, and ``data`` after them."""
    checksum: int = google_crc32c.extend(first, data)
    return checksum


def join(first: int, second: int, size: int) -> int:
    """The checksum of bytes with the checksum ``first``, and ``size`` bytes with ``second`` after.

    Quick for a size that came lately; half a millisecond for one that did not.
    """
    # A checksum is the remainder of a division, and linear but for its inversions, which cancel
    # out here: bytes that follow multiply what came before by x^8 each.
    low, next_lowest, next_highest, high = _multiplication_by(size)
    return (
        low[first & 0xFF]
        ^ next_lowest[first >> 8 & 0xFF]
        ^ next_highest[first >> 16 & 0xFF]
        ^ high[first >> 24]
        ^ second
    )


@lru_cache(maxsize=16)
def _multiplication_by(size: int) -> _Tables:
    """For each byte of a checksum, what ``size`` further bytes make of its 256 values."""
    factor = _power_of_x(8 * size)
    return (_table(factor, 0), _table(factor, 8), _table(factor, 16), _table(factor, 24))


def _table(factor: int, shift: int) -> list[int]:
    table = [0]
    for bit in range(shift, shift + 8):
        product = _multiply(factor, 1 << bit)
        table += [entry ^ product for entry in table]
    return table


def _power_of_x(exponent: int) -> int:
    power, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the checksum's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
