"""The allocator is told to keep what it has, where there is one that listens."""

import ctypes
import platform
import subprocess
import sys
import textwrap

import pytest

from relay import allocator

IS_GLIBC = platform.libc_ver()[0] == "glibc"

FAULTS = """
    import resource, sys
    from relay.allocator import tune

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            # As many frames as a small window has, and all of them freed.
            blocks = [b"x" * (128 * 1024) for _ in range(64)]
            blocks.clear()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    untuned = faults()
    assert tune()
    faults()
    print(untuned, faults())
"""


@pytest.mark.skipif(not IS_GLIBC, reason="only glibc has mallopt")
def test_large_blocks_no_longer_cost_page_faults() -> None:
    program = [sys.executable, "-c", textwrap.dedent(FAULTS)]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    untuned, tuned = map(int, result.stdout.split())
    # 20 times 8 MiB in pages of 4 KiB, against a few pages of whatever else runs.
    assert untuned > 20 * 1000
    assert tuned < 200


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_another_c_library_is_no_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def __init__(self, _: None) -> None:
            if error is OSError:
                raise OSError

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert allocator.tune() is False
