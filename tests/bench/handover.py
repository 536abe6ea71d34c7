"""Runs a command with a listening socket handed over, as systemd does for ``relay@.socket``.

``python -m tests.bench.handover PORT COMMAND…``: binds to the port with SO_REUSEPORT, so that
several instances can, and the kernel spreads connections over them. It becomes the command, whose
process it then is. The other settings are those of the unit.
"""

import os
import socket
import sys
from typing import Final

FIRST: Final = 3
"""The descriptor that sd_listen_fds(3) begins with."""


def hand_over(port: int, command: list[str]) -> None:
    """Become the command, with the socket."""
    listening = socket.create_server(("127.0.0.1", port), backlog=1024, reuse_port=True)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    # By way of a copy: dup2 to its own number would leave it to be closed on exec.
    os.dup2(os.dup(listening.fileno()), FIRST)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}
    os.execvp(command[0], command)  # noqa: S606  the caller's own


if __name__ == "__main__":
    hand_over(int(sys.argv[1]), sys.argv[2:])
