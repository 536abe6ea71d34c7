"""Which peers relay is measured beside: what was asked for, and what this machine can run."""

import argparse
from dataclasses import dataclass, field
from typing import Final

from tests.bench import peers
from tests.bench.peers import check as checks
from tests.bench.systems import Start

ALL: Final = "all"
NONE: Final = "none"


@dataclass(frozen=True)
class Rivals:
    """Those that can be run, by name, and why the others cannot."""

    starts: dict[str, Start] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def add_option(parser: argparse.ArgumentParser) -> None:
    """``--peers``."""
    parser.add_argument(
        "--peers",
        default=ALL,
        metavar="NAMES",
        help="all that this machine can run (default), none, or some, with commas between",
    )


def chosen(text: str) -> Rivals:
    """What ``--peers`` says."""
    if text == NONE:
        return Rivals()
    wanted = list(peers.PEERS) if text == ALL else text.split(",")
    if strange := set(wanted) - set(peers.PEERS):
        raise SystemExit(f"no peer {', '.join(strange)}; there are: {', '.join(peers.PEERS)}")
    missing = {name: why for name in wanted if (why := peers.available(name)) is not None}
    return Rivals({name: peers.PEERS[name] for name in wanted if name not in missing}, missing)


def check(rivals: Rivals, url: str) -> None:
    """Hold each to what it is meant to do, before it is measured."""
    for name in rivals.starts:
        checks.check(name, url)
