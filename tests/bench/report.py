"""What every benchmark of the suite says at its end: tables, verdicts, a JSON file, a plot.

Also the options that they share, and the machine and the versions that figures belong to.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench import bars
from tests.bench.measure import Column, Runs, Target, table, verdicts

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("trio", "h11", "pika", "multipart", "google-crc32c")
OK = 0
MISSED = 1


def parser_of(name: str, summary: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with the options of all of them; ``summary`` is the module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"./dev bench {name}",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"of each figure (default {rounds})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run, and what it ran on")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the picture, SVG")
    return parser


def names(text: str) -> list[str]:
    """An argument that is a list, with commas."""
    return [name for name in text.split(",") if name]


def some_of(known: Sequence[str]) -> "_SomeOf":
    """An argument that is a list of some of these."""
    return _SomeOf(known)


class _SomeOf:
    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def __call__(self, text: str) -> list[str]:
        wanted = names(text)
        if not wanted or not set(wanted) <= set(self._known):
            raise argparse.ArgumentTypeError(
                f"{text!r}: must be some of {', '.join(self._known)}, with commas between"
            )
        return wanted


def numbers(text: str) -> list[int]:
    """An argument that is a list of positive numbers."""
    wanted = [int(number) for number in names(text)]
    if not wanted or min(wanted) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be positive numbers, with commas between")
    return wanted


def machine() -> dict[str, object]:
    """What figures depend on first."""
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def versions(node: RabbitMQNode) -> dict[str, str]:
    """Of relay, as its commit, of the broker, and of the libraries in the hot path."""
    return {
        "relay": commit(),
        "rabbitmq": node.ctl("version").strip(),
        **{library: version(library) for library in LIBRARIES},
    }


def commit() -> str:
    """The commit that is checked out, and whether files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git repository"


def package_version(package: str) -> str:
    """Of one of Debian's packages."""
    command = ["dpkg-query", "--show", "--showformat", "${Version}", package]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not Debian's"


@dataclass
class Report:
    """One run of a benchmark, as it comes about."""

    bench: str
    options: argparse.Namespace
    columns: Sequence[Column]
    versions: dict[str, str]
    picture: Column
    """What is drawn."""
    runs: Runs = field(default_factory=Runs)
    notes: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    def finish(self, targets: Sequence[Target]) -> int:
        """Print and write everything. Returns the exit code: 1 if a target was missed."""
        for case in self.runs.cases():
            print("\n" + "\n".join(table(self.runs, case, self.columns)))
        print(f"\n({self._what_it_is()})")
        print(f"({'; '.join(f'{name}: {text}' for name, text in self.versions.items())})")
        for name, why in self.notes.items():
            print(f"({name}: {why})")
        if targets:
            print("\n" + "\n".join(verdicts(targets)))
        if self.options.json:
            self.options.json.write_text(json.dumps(self.document(targets), indent=1) + "\n")
        if self.options.plot:
            self.options.plot.write_text(
                bars.draw(self.runs, self.picture, f"./dev bench {self.bench}", self._what_it_is())
            )
        return MISSED if any(target.met is False for target in targets) else OK

    def document(self, targets: Sequence[Target]) -> dict[str, object]:
        """All of it, for JSON."""
        return {
            "bench": self.bench,
            "began": self.began.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": self.versions,
            "options": {name: _plain(value) for name, value in vars(self.options).items()},
            "notes": self.notes,
            "targets": [
                {
                    "what": target.what,
                    "measured": asdict(target.measured) if target.measured else None,
                    "bound": target.bound,
                    "at_most": target.at_most,
                    "met": target.met,
                }
                for target in targets
            ],
            "runs": [asdict(run) for run in self.runs.kept],
        }

    def _what_it_is(self) -> str:
        on = machine()
        return (
            f"medians of {self.options.rounds}, least and most; {on['cpu']}, {on['cores']} cores, "
            f"{on['kernel']}, {on['python']}, RabbitMQ {self.versions['rabbitmq']}, "
            f"relay {self.versions['relay']}"
        )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def progress(text: str) -> None:
    """One line of what goes on, on standard error, in place of the last one on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr)
