"""``./dev fuzz [TARGET] --minutes N``: atheris over the targets, one after the other.

What it has learnt is kept in ``~/.cache/relay/fuzz/TARGET`` (below ``$XDG_CACHE_HOME`` if that is
set), so that the next run goes on from there. A find ends its target's run with exit code 1, and is
left there as ``find-…``; give it as argument to see it again.
"""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

MAX_LEN = 4096
"""Bytes of an input: ten times the limits on heads."""

TIMEOUT = 10
"""Seconds for one input; more is a find."""


def main() -> int:
    """Run what the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(prog="./dev fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS), help="default: each of them")
    parser.add_argument("find", nargs="?", type=Path, help="an input: run it, and nothing else")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each target (default: 5)")
    arguments = parser.parse_args()
    if arguments.find is not None:
        TARGETS[arguments.target](arguments.find.read_bytes())
        return 0
    names = [arguments.target] if arguments.target else list(TARGETS)
    return max(run(name, arguments.minutes) for name in names)


def run(name: str, minutes: float) -> int:
    """Fuzz one target in a process of its own, which atheris does not return from."""
    corpus = cache() / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(SEEDS[name]()):
        (corpus / f"seed-{number:03}").write_bytes(data)
    print(f"--- {name}", flush=True)
    options = [f"-max_total_time={round(minutes * 60)}", f"-max_len={MAX_LEN}"]
    options += [f"-timeout={TIMEOUT}", "-rss_limit_mb=1024", "-print_final_stats=1"]
    options += [f"-artifact_prefix={corpus}/find-", str(corpus)]
    command = [sys.executable, "-m", "tests.fuzz.child", name, *options]
    return min(subprocess.run(command, check=False).returncode, 1)


def cache() -> Path:
    """Where corpora are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "relay" / "fuzz"


if __name__ == "__main__":
    logging.disable()
    sys.exit(main())
