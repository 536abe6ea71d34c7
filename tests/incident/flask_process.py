"""The Flask service as a process of its own, in directories that can be watched.

Starts, finds and stops it; what it does with uploads is `flask_service`'s business.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 10


class FlaskService:
    """One run of the Flask service.

    Attributes:
        url: where it listens, `http://127.0.0.1:PORT`.
        pid: its process.
    """

    def __init__(
        self,
        amqp_url: str,
        directory: Path,
        *,
        exchange: str = "",
        routing_key: str = "uploads",
        unlimited_fields: bool = False,
    ) -> None:
        """Starts the service and waits until it listens.

        Args:
            amqp_url: the broker it forwards to.
            directory: its working directory, its HOME and its TMPDIR.
            exchange: where it publishes.
            routing_key: with which routing key.
            unlimited_fields: plain fields of any size, as before Flask 3.1.

        Raises:
            RuntimeError: it ended instead of listening.
        """
        command = [sys.executable, "-m", "tests.incident.flask_service", "--amqp", amqp_url]
        command += ["--exchange", exchange, "--routing-key", routing_key]
        if unlimited_fields:
            command.append("--unlimited-fields")
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(directory),
            "HOME": str(directory),
        }
        self._process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            self.stop()
            raise RuntimeError("the Flask service ended before it listened")

    def stop(self) -> None:
        """Ends the process and waits for its end."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
