"""The services that relay is compared with: whether each of them does its work.

Each takes ``multipart/form-data``, files and plain fields, and any other body as it is, by
``POST /``; publishes it in persistent messages of 131064 bytes, at most 64 of an upload
unconfirmed; and answers 201 when all are confirmed. They are written as well as their users would,
and ``check`` holds each of them to the above: ``./dev bench peers [NAME]…``. ``ceiling`` is what no
service that publishes with pika exceeds.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from tests.bench.peers.process import PeerProcess
from tests.bench.peers.programs import PROGRAMS

PEERS: Final[Mapping[str, Callable[..., PeerProcess]]] = {
    name: partial(PeerProcess, program) for name, program in PROGRAMS.items()
}
"""By name: what makes a PeerProcess, given a broker's URL, an exchange and a routing key."""


def available(name: str) -> str | None:
    """None if the peer can be run on this machine, else one line that says what is missing."""
    return PROGRAMS[name].missing()


def main(argv: list[str]) -> int:
    """Checks the peers named, or all."""
    # The peers' own processes come by here, too, and have none of what a check needs.
    from tests.bench.peers import check

    return check.main(argv)
