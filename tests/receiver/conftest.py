"""Where files go."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory whose syncs cost nothing, for tests of very many."""
    where = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as directory:
        yield Path(directory)
