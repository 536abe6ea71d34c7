"""The command line of each peer, its versions, and what it needs on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from relay.demo.rabbitmq import HOST
from tests.bench.peers.process import Program

NODE_SERVER: Final = Path(__file__).parent / "node" / "server.js"

# Where ./dev puts them; see `need_peers` there.
PYTHON: Final = Path(sys.prefix) / "bench" / "python" / "bin" / "python"
NODE_MODULES: Final = Path(sys.prefix) / "bench" / "node" / "node_modules"
GO_PROGRAM: Final = Path(sys.prefix) / "bench" / "go" / "peer"

WORKERS: Final = len(os.sched_getaffinity(0))
"""Of gunicorn: one for each core, as is usual where each has threads."""

THREADS: Final = 8
"""Of each worker; gunicorn's documentation recommends two to four for each core."""


def _python_missing() -> str | None:
    return None if PYTHON.exists() else f"not installed: {PYTHON} (./dev bench makes it)"


def _versions(*packages: str) -> Callable[[], str]:
    return partial(_python_versions, packages)


def _python_versions(packages: Sequence[str]) -> str:
    script = (
        "import platform, sys; from importlib.metadata import version; "
        "print(*(f'{name} {version(name)},' for name in sys.argv[1:]), "
        "'Python', platform.python_version())"
    )
    return _output(str(PYTHON), "-c", script, *packages)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _gunicorn(port: int) -> list[str]:
    options = {
        "--bind": f"{HOST}:{port}",
        "--workers": str(WORKERS),
        "--threads": str(THREADS),
        # Its documentation: on a disk, a worker's sign of life can block.
        "--worker-tmp-dir": "/dev/shm",  # noqa: S108 - gunicorn makes its file there by mkstemp
        "--log-level": "warning",
    }
    arguments = [text for option in options.items() for text in option]
    return [str(PYTHON), "-m", "gunicorn", *arguments, "tests.bench.peers.flask_app:app"]


def _uvicorn(port: int) -> list[str]:
    options = ["--host", HOST, "--port", str(port), "--log-level", "warning", "--no-access-log"]
    return [str(PYTHON), "-m", "uvicorn", *options, "tests.bench.peers.starlette_app:app"]


def _aiohttp(port: int) -> list[str]:
    return [str(PYTHON), "-m", "tests.bench.peers.aiohttp_app", str(port)]


def _node_missing() -> str | None:
    if shutil.which("node") is None:
        return "not installed: node"
    if not NODE_MODULES.is_dir():
        return "not installed: busboy and amqplib (./dev bench installs them if npm is there)"
    return None


def _node_version() -> str:
    packages = [
        f"{name} {json.loads((NODE_MODULES / name / 'package.json').read_text())['version']}"
        for name in ("busboy", "amqplib")
    ]
    return ", ".join([*packages, f"Node {_output('node', '--version').removeprefix('v')}"])


def _go_missing() -> str | None:
    if not GO_PROGRAM.exists():
        return "not built: ./dev bench builds it where Go and Debian's amqp091-go are"
    return None


PROGRAMS: Final[Mapping[str, Program]] = {
    "flask": Program(
        command=_gunicorn,
        version=_versions("flask", "werkzeug", "gunicorn", "pika"),
        missing=_python_missing,
    ),
    "starlette": Program(
        command=_uvicorn,
        version=_versions(
            "starlette", "python-multipart", "uvicorn", "uvloop", "httptools", "aio-pika"
        ),
        missing=_python_missing,
    ),
    "aiohttp": Program(
        command=_aiohttp,
        version=_versions("aiohttp", "uvloop", "aio-pika"),
        missing=_python_missing,
    ),
    "node": Program(
        command=lambda _: ["node", str(NODE_SERVER)],
        version=_node_version,
        missing=_node_missing,
        environment=lambda: {"NODE_PATH": str(NODE_MODULES), "NODE_ENV": "production"},
    ),
    "go": Program(
        command=lambda _: [str(GO_PROGRAM)],
        version=lambda: GO_PROGRAM.with_name("version").read_text().strip(),
        missing=_go_missing,
    ),
}
"""By name."""
