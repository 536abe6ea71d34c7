"""The fuzzer's targets, for a few seconds: its seeds, and what hypothesis makes of them."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

PIECES = [
    *(b"\r\n", b"\r", b"\n", b"\r\n\r\n", b" ", b"\t", b":", b";", b",", b'"', b"\\", b"=", b"*"),
    *(b"%", b"0", b"--", b"--b0", b"\r\n--b0", b"\r\n--b0--", b"\0", b"\xff", b"utf-8''", b"5\r\n"),
]
EXAMPLES = {"connection": 150}
"""Inputs that hypothesis makes; a whole connection takes the longest."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of refused uploads are not worth a line each."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_keeps_the_promises(name: str) -> None:
    for data in SEEDS[name]():
        TARGETS[name](data)


@st.composite
def spoilt(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with up to four places spoilt, or anything at all."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(
            st.sampled_from(PIECES) | st.binary(max_size=4) | st.sampled_from(seeds)
        )
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_keep_the_promises(name: str) -> None:
    seeds = list(SEEDS[name]())

    @settings(max_examples=EXAMPLES.get(name, 400))
    @given(spoilt(seeds) | st.binary(max_size=60))
    def check(data: bytes) -> None:
        TARGETS[name](data)

    check()
