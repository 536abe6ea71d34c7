"""The lock files agree with each other, and tell nobody where to download from."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def versions(lock: str) -> dict[str, str]:
    pinned = re.findall(r"^([a-z0-9.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE)
    return dict(pinned)


def test_what_the_peers_share_with_relay_has_one_version() -> None:
    ours, theirs = versions("requirements.lock"), versions("requirements-bench.lock")
    shared = ours.keys() & theirs.keys()
    assert {"pika", "aio-pika", "flask"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_npm_takes_packages_from_whichever_registry_is_configured() -> None:
    lock = json.loads((ROOT / "tests/bench/peers/node/package-lock.json").read_text())
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
