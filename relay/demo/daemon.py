"""A real relay daemon as a process of its own, for the demo, tests and benchmarks."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT = 30.0
"""Seconds for the daemon to listen, and to be ready where that is asked for."""

_LISTENING = re.compile(r'msg="listening for (uploads|admin)" address=(\S+)')


class DaemonFailed(Exception):
    """The daemon did not start or get ready; the text has its log."""


class Daemon:
    """``relay serve`` on ports of its own choosing; a context manager.

    Attributes:
        log: the lines it has written so far.
    """

    def __init__(
        self,
        amqp: str | Sequence[str],
        config: str = "",
        *,
        directory: Path,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        wait_ready: bool = True,
        listen: str = "127.0.0.1:0",
        also: Sequence[str] = (),
    ) -> None:
        """Prepare, but do not start it.

        Args:
            amqp: the broker's URL, or several.
            config: further TOML.
            directory: where its configuration file goes.
            prefix: a command that runs it, such as ``prlimit --fsize=0``.
            env: instead of this process's environment.
            cwd: its working directory.
            wait_ready: have ``start`` wait for the broker, too.
            listen: the address of the upload listener, on any port unless it names one.
            also: further addresses for uploads.
        """
        path = directory / "relay.toml"
        path.write_text(config)
        urls = [amqp] if isinstance(amqp, str) else amqp
        self._command = [*prefix, sys.executable, "-m", "relay", "serve", "--config", str(path)]
        # Of several addresses, the last one is the one whose port is looked for in the log.
        for address in also:
            self._command += ["--listen", address]
        for url in urls:
            self._command += ["--amqp", url]
        self._env = {**(os.environ if env is None else env)}
        self._cwd = cwd
        self._wait_ready = wait_ready
        self._process: subprocess.Popen[str] | None = None
        self._addresses = {"uploads": listen, "admin": "127.0.0.1:0"}
        self.log: list[str] = []

    def start(self) -> None:
        """Start it and wait until it listens (and is ready, if asked for).

        After ``stop`` or ``kill`` it is started once more, at the same addresses.
        """
        listen = ["--listen", self._addresses["uploads"], "--admin", self._addresses["admin"]]
        self._process = subprocess.Popen(
            [*self._command, *listen],
            env=self._env,
            cwd=self._cwd,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for whoever started the daemon, who then ends it.
            start_new_session=True,
        )
        addresses: dict[str, str] = {}
        all_told = threading.Event()
        reader = threading.Thread(
            target=self._read_log, args=(self._process, addresses, all_told), daemon=True
        )
        reader.start()
        all_told.wait(START_TIMEOUT)
        self._addresses |= addresses
        if len(addresses) < 2:
            self.kill()
            raise DaemonFailed("the daemon did not start:\n" + "\n".join(self.log))
        if self._wait_ready:
            self.wait_until(lambda: self.ready()[0] == 200, "it is ready")

    def _read_log(
        self, process: subprocess.Popen[str], addresses: dict[str, str], all_told: threading.Event
    ) -> None:
        assert process.stderr is not None
        with process.stderr as stderr:
            for line in stderr:
                self.log.append(line.rstrip("\n"))
                if match := _LISTENING.search(line):
                    addresses[match[1]] = match[2]
                    if len(addresses) == 2:
                        all_told.set()
        all_told.set()

    @property
    def pid(self) -> int:
        """Its process id. With a prefix that does not exec, the prefix's."""
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the upload listener."""
        host, _, port = self._addresses["uploads"].rpartition(":")
        return host, int(port)

    @property
    def url(self) -> str:
        """``http://host:port`` of the upload listener."""
        return f"http://{self._addresses['uploads']}"

    @property
    def admin_url(self) -> str:
        """``http://host:port`` of the admin listener."""
        return f"http://{self._addresses['admin']}"

    def ready(self) -> tuple[int, str]:
        """Status and body of ``/readyz``."""
        try:
            with urllib.request.urlopen(f"{self.admin_url}/readyz", timeout=10) as response:  # noqa: S310
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()

    def transfers(self) -> list[dict[str, object]]:
        """The uploads in progress, as ``/transfers`` lists them."""
        with urllib.request.urlopen(f"{self.admin_url}/transfers", timeout=10) as response:  # noqa: S310
            return list(json.load(response)["transfers"])

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        with urllib.request.urlopen(f"{self.admin_url}/metrics", timeout=10) as response:  # noqa: S310
            for line in response.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise KeyError(name)

    def wait_until(
        self, condition: Callable[[], bool], what: str, seconds: float = START_TIMEOUT
    ) -> None:
        """Poll ``condition`` until it holds; fail with the log after so many seconds of pauses."""
        pause = threading.Event()
        for _ in range(int(seconds / 0.05)):
            assert self._process is not None
            if condition():
                return
            if self._process.poll() is not None:
                break
            pause.wait(0.05)
        raise DaemonFailed(f"the daemon never got so far that {what}:\n" + "\n".join(self.log))

    def memory(self, key: str = "VmRSS") -> int:
        """Bytes of resident memory; ``VmHWM`` for the peak."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(key)

    def io(self, key: str) -> int:
        """A counter of /proc/PID/io, such as ``write_bytes``."""
        for line in Path(f"/proc/{self.pid}/io").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
        raise KeyError(key)

    def open_files(self) -> list[str]:
        """What its file descriptors point to."""
        targets = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            # One that is closed while we look is not open.
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(link))
        return targets

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
