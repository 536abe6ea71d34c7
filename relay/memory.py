"""How much memory the daemon takes, and how much it may take at the very worst.

The formula is the README's, where each of its numbers is explained; tests hold the daemon to it.
"""

import os
from pathlib import Path
from typing import Final

from relay.config import Config

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_BASE: Final = round(36.5 * _MIB)
_READ_BUFFERS: Final = 3 * 32 * _MIB
_PER_UPLOAD: Final = 3 * 64 * _KIB + 164 * _KIB
_PER_CONNECTION: Final = 64 * _KIB
_KEYS: Final = 16 * _MIB


def ceiling(config: Config) -> int:
    """Bytes of resident memory that the daemon does not exceed with this configuration."""
    frame = max(route.frame_size for route in config.routes.values())
    return (
        _BASE
        + _READ_BUFFERS
        + config.http.max_uploads * (_PER_UPLOAD + 2 * frame)
        + config.http.max_connections * _PER_CONNECTION
        + 2 * config.amqp.window
        + _KEYS
    )


def resident() -> int:
    """Bytes of resident memory of this process (proc(5))."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
