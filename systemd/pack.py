"""Packs relay for machines without a network: ``./dev package``.

One archive with relay's wheel, the wheels of what it depends on, as requirements.lock has them, the
units and the script that installs it all. It is for this machine's architecture and Python: one of
the wheels is compiled.
"""

import gzip
import io
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

_LOCKED = re.compile(r"^([a-z0-9-]+)==.*(?:\n .*)*", re.MULTILINE)
"""A package's lines in requirements.lock: what, for which platforms, and its hashes."""


def pack(output: Path) -> Path:
    """Make the archive, and the wheel beside it, in ``output``. Returns the archive's path."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _build(Path(scratch))
        version = wheel.name.split("-")[1]
        python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        platform = re.sub("[-.]", "_", sysconfig.get_platform())
        tree = Path(scratch) / f"relay-{version}-{python}-{platform}"
        shutil.copytree(
            ROOT / "systemd", tree, ignore=shutil.ignore_patterns("pack.py", "__pycache__")
        )
        shutil.copy(ROOT / "LICENSE", tree)
        wheels = tree / "wheels"
        _collect(wheels)
        shutil.copy(wheel, wheels)
        shutil.copy(wheel, output)
        archive = output / f"{tree.name}.tar.gz"
        archive.write_bytes(_compressed(tree))
    return archive


def _build(directory: Path) -> Path:
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(directory), ROOT)
    (wheel,) = directory.glob("relay-*.whl")
    return wheel


def _collect(wheels: Path) -> None:
    """The locked wheels of what relay needs to run; each is downloaded once and then kept."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = _needed_for(project["dependencies"])
    locked = _LOCKED.finditer((ROOT / "requirements.lock").read_text())
    requirements = "\n".join(match[0] for match in locked if match[1] in wanted)
    wheels.mkdir()
    listed = wheels / "requirements.txt"
    listed.write_text(requirements + "\n")
    kept = Path(sys.prefix) / "wheels"
    kept.mkdir(exist_ok=True)
    download = ["download", "--require-hashes", "--no-deps", "--only-binary", ":all:"]
    download += ["--find-links", str(kept), "--requirement", str(listed)]
    if not _pip(*download, "--no-index", "--dest", str(wheels), check=False):
        _pip(*download, "--dest", str(kept))
        _pip(*download, "--no-index", "--dest", str(wheels))


def _needed_for(requirements: list[str]) -> set[str]:
    """Names of what they name and of what that needs here, as requirements.lock has them."""
    found: set[str] = set()
    todo = [*requirements]
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        is_for_here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_for_here and name not in found:
            found.add(name)
            todo += metadata.requires(name) or ()
    return found


def _compressed(tree: Path) -> bytes:
    """The same bytes for the same files: no times, no owners."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for path in sorted(tree.rglob("*")):
            archive.add(path, f"{tree.name}/{path.relative_to(tree)}", False, filter=_anonymous)
    return packed.getvalue()


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member


def _pip(*arguments: object, check: bool = True) -> bool:
    """Run pip; returns whether it succeeded. Without ``check``, failing is silent."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        check=check,
        stdout=subprocess.DEVNULL,
        stderr=None if check else subprocess.DEVNULL,
    )
    return not done.returncode


if __name__ == "__main__":
    print(pack(Path(sys.argv[1])))
