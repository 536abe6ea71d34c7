"""A machine of its own, with a real systemd as PID 1, for units to run on: ``Lab``.

It is made of namespaces (PID, mount, network, UTS, IPC, cgroup) over a throw-away overlay of this
machine's file system: what is installed here is there, and what is written there is gone with it.
Its network is a loopback interface. Needs root; no container program and no image.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

BOOT_TIMEOUT = 60.0
"""Seconds for the machine to boot (it takes 1), and to power off."""

PAUSE = 0.1
"""Seconds between two looks at what is waited for."""

_CLONE_NEWNET = 0x40000000

_ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "container": "lab", "LANG": "C.UTF-8"}

# Installed here, perhaps, and nothing to start there: what would look for hardware, or take a port.
_MASKED = (
    *("getty.target", "systemd-logind.service", "systemd-timesyncd.service", "cron.service"),
    *("rabbitmq-server.service", "epmd.socket", "epmd.service", "postgresql.service"),
    *("prometheus.service", "prometheus-node-exporter.service", "redis-server.service"),
    *("nginx.service", "apache2.service", "ssh.service", "apt-daily.timer", "dpkg-db-backup.timer"),
)

# $1: the directory for the overlay. The other arguments: "TYPE OPTIONS PATH" of each control group
# hierarchy. It is run as the first process in the new namespaces, and becomes systemd.
_BOOT = """
set -eu
base=$1 root=$1/root
shift
mount -t tmpfs -o mode=755 tmpfs "$base"
mkdir "$base/upper" "$base/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
for directory in dev run tmp var/tmp; do mount -t tmpfs -o mode=1755 tmpfs "$root/$directory"; done
chmod 1777 "$root/tmp" "$root/var/tmp"
for device in null zero full random urandom tty; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
[ -e "$root/sys/fs/cgroup/cgroup.procs" ] || mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
for hierarchy; do
    read -r type options path <<END
$hierarchy
END
    mkdir -p "$root$path"
    mount -t "$type" -o "$options" cgroup "$root$path"
done
for unit in $MASKED; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
: >"$root/etc/fstab"
hostname lab
ip link set lo up
mkdir "$root/old"
cd "$root"
pivot_root . old
umount -l /old
# Credentials are mounted by a process of systemd's own, and must reach the unit's.
mount --make-rshared /
exec env -i container=lab PATH="$PATH" /lib/systemd/systemd --system </dev/null
"""


class LabImpossible(Exception):
    """This machine does not let us make namespaces; the text says what it said."""


class LabFailed(Exception):
    """Something inside did not do what it was told."""


class Lab:
    """A machine with systemd; a context manager that boots it and powers it off."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="relay-lab-", dir="/run"))
        self._groups = [
            (kind, options, path, _own_group(path, name) / self._directory.name)
            for kind, options, path, name in _hierarchies()
        ]
        self._outer: subprocess.Popen[str] | None = None
        self._init = 0

    def boot(self) -> None:
        """Boot it and wait until it is up.

        Raises:
            LabImpossible: no namespaces.
            LabFailed: it did not come up.
        """
        try:
            for *_, group in self._groups:
                group.mkdir()
        except OSError as exc:
            raise LabImpossible(f"no control groups of our own: {exc}") from exc
        log = self._directory / "log"
        with log.open("w") as output:
            self._outer = subprocess.Popen(
                [
                    *("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--uts"),
                    *("--propagation", "private", "--ipc", "--net", "--cgroup"),
                    *("sh", "-c", _BOOT, "lab", str(self._directory)),
                    *(f"{kind} {options} {path}" for kind, options, path, _ in self._groups),
                ],
                env={**_ENVIRON, "MASKED": " ".join(_MASKED)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=self._enter_groups,
            )
        try:
            self.wait_until(self._has_init, "systemd runs")
            self.wait_until(self._is_up, "it is up")
        except LabFailed as exc:
            text = log.read_text()
            if "Operation not permitted" in text:
                raise LabImpossible(text) from exc
            raise LabFailed(f"{exc}\n{text}") from exc

    def _enter_groups(self) -> None:
        for *_, group in self._groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def _has_init(self) -> bool:
        assert self._outer is not None
        if self._outer.poll() is not None:
            raise LabFailed("the machine ended while it booted")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text()
        if not children.strip():
            return False
        self._init = int(children)
        return Path(f"/proc/{self._init}/comm").read_text() == "systemd\n"

    def _is_up(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there, and wait for it.

        Raises:
            LabFailed: it failed; with its output. Not if ``check`` is false.
        """
        done = subprocess.run(
            self.command(*command),
            env={**_ENVIRON, **(env or {})},
            input=input,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if check and done.returncode:
            raise LabFailed(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def command(self, *command: str | Path) -> list[str]:
        """What runs ``command`` in there when it is run here."""
        enter = ["nsenter", f"--target={self._init}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        return [*enter, "--cgroup", "--root", "--wdns=/", *map(str, command)]

    @contextmanager
    def network(self) -> Iterator[None]:
        """Have sockets that this thread makes in the block be made on that machine."""
        with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{self._init}/ns/net") as theirs:
            _setns(theirs.fileno())
            try:
                yield
            finally:
                _setns(ours.fileno())

    def path(self, path: str) -> Path:
        """Where a file of that machine is seen from here."""
        return Path(f"/proc/{self._init}/root{path}")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of that machine, and make its directories."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def wait_until(self, condition: Callable[[], bool], what: str, unit: str = "") -> None:
        """Poll ``condition`` until it holds; fail, with ``unit``'s log, after BOOT_TIMEOUT."""
        pause = threading.Event()
        for _ in range(int(BOOT_TIMEOUT / PAUSE)):
            if condition():
                return
            pause.wait(PAUSE)
        raise LabFailed(f"it never got so far that {what}\n{self.log(unit) if unit else ''}")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit, as systemctl show has it."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def log(self, unit: str) -> str:
        """What a unit has logged, and systemd about it."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, check=False).stdout

    def close(self) -> None:
        """Power it off and remove what it was made of."""
        if self._outer is not None:
            if self._init and self._outer.poll() is None:
                # systemd's own signal for an immediate power-off (systemd(1)); then it is killed.
                os.kill(self._init, signal.SIGRTMIN + 14)
                try:
                    self._outer.wait(BOOT_TIMEOUT)
                except subprocess.TimeoutExpired:
                    self._outer.kill()
            self._outer.wait()
        for *_, group in self._groups:
            self._remove(group)
        shutil.rmtree(self._directory)

    def _remove(self, group: Path) -> None:
        def is_gone() -> bool:
            for directory, _, _ in os.walk(group, topdown=False):
                try:
                    os.rmdir(directory)
                except OSError:
                    return False
            return True

        self.wait_until(is_gone, f"{group} is empty")

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _setns(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _hierarchies() -> list[tuple[str, str, str, str]]:
    """Type, options, mount point and name of each control group hierarchy (proc(5))."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split()
        path = mount.split()[4]
        if kind == "cgroup2":
            found.append((kind, "rw", path, ""))
        elif kind == "cgroup" and not path.endswith(("cpuset", "freezer")):
            # Without those two systemd does as well, and groups in the first take more than mkdir.
            names = [option for option in options.split(",") if option not in ("rw", "ro", "xattr")]
            none = ["none"] if names[0].startswith("name=") else []
            # A release agent is the affair of whoever mounted it first.
            names = [name for name in names if "=" not in name or name.startswith("name=")]
            found.append((kind, ",".join(none + names), path, ",".join(names)))
    return found


def _own_group(path: str, name: str) -> Path:
    """The directory of this process's group in the hierarchy mounted at ``path``."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, group = line.split(":", 2)
        if names == name:
            return Path(path + group)
    return Path(path)
