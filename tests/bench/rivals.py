"""Which peers relay is measured beside: what was asked for, and what this machine can run."""

import argparse
import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any, Final

from tests.bench.systems import Start

ALL: Final = "all"
NONE: Final = "none"


@dataclass(frozen=True)
class Rivals:
    """Those that can be run, by name, and why the others cannot."""

    starts: dict[str, Start] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def _peers() -> Any:
    if importlib.util.find_spec("tests.bench.peers") is None:
        return None
    return importlib.import_module("tests.bench.peers")


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
    peers = _peers()
    if text == NONE or peers is None:
        return Rivals()
    wanted = list(peers.PEERS) if text == ALL else text.split(",")
    if strange := set(wanted) - set(peers.PEERS):
        raise SystemExit(f"no peer {', '.join(strange)}; there are: {', '.join(peers.PEERS)}")
    missing = {name: why for name in wanted if (why := peers.available(name)) is not None}
    return Rivals({name: peers.PEERS[name] for name in wanted if name not in missing}, missing)


def check(rivals: Rivals, url: str) -> None:
    """Hold each to what it is meant to do, before it is measured."""
    if rivals.starts:
        checks = importlib.import_module("tests.bench.peers.check")
        for name in rivals.starts:
            checks.check(name, url)


ceiling: Any = _peers() and importlib.import_module("tests.bench.peers.ceiling").run
"""Given as ``Start``, and bytes: wall and CPU seconds of pika publishing them from memory."""
