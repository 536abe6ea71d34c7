"""What ``/status`` is made of, for tests of whoever shows it."""

from typing import Any


def a_status(**others: object) -> dict[str, Any]:
    """The figures of a daemon at work, JSON as they are."""
    return {
        "version": "0.1.0",
        "uptime_seconds": 93784,
        "uploads": {"in_progress": 1, "limit": 256},
        "connections": {"open": 2, "limit": 1024},
        "bytes_received": 5 * 2**30,
        "bytes_per_second": 117_964_800,
        "memory": {"resident": 48 * 2**20, "ceiling": 494 * 2**20},
        "window": {"used": 16 * 2**20, "size": 64 * 2**20, "waiting": 3},
        "broker": [
            {"connection": 0, "state": "up", "broker": "localhost:5672", "detail": None},
            {"connection": 1, "state": "down", "broker": None, "detail": "refused the login"},
        ],
        "event_loop_lag_seconds": 0.0012,
        "outcomes": {"committed": 7, "client-gone": 9},
        "errors": [],
        **others,
    }
