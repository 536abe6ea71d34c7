"""relay on a machine of its own, as its operators and its clients see it."""

import http.client
import json
import socket
from collections.abc import Iterable
from typing import Any

from tests.systemd.lab import Lab

QUEUE = "lab"
ROUTE = """
[routes.default]
exchange = "amq.fanout"
mandatory = false
"""
CONFIG = f"""
[http]
drain_timeout = "20 s"
{ROUTE}
[routes.kept]
routing_key = "{QUEUE}"
[routes.kept.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}
"""
"""Uploads to the default route are confirmed and gone; those to ``kept`` are in a queue."""

UNITS = ("relay.socket", "relay-admin.socket", "relay.service")


class Client(http.client.HTTPConnection):
    """A client on that machine."""

    def __init__(self, lab: Lab, port: int = 8480) -> None:
        super().__init__("127.0.0.1", port, timeout=60)
        self._lab = lab

    def connect(self) -> None:
        """Connect from there."""
        with self._lab.network():
            self.sock = socket.create_connection((self.host, self.port), self.timeout)

    def upload(self, body: bytes | Iterable[bytes], size: int, route: str = "") -> int:
        """Upload ``size`` bytes; returns the status."""
        path = f"/upload/{route}/file" if route else "/upload/file"
        self.request("PUT", path, body, {"Content-Length": str(size)})
        response = self.getresponse()
        response.read()
        return response.status

    def begin(self, size: int) -> None:
        """Send the head of an upload of ``size`` bytes, for ``send`` and ``getresponse``."""
        self.putrequest("PUT", "/upload/file")
        self.putheader("Content-Length", str(size))
        self.endheaders()


class Machine:
    """The machine, and relay's units on it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.run = lab.run
        self._changed: set[str] = set()
        self._clients: list[Client] = []

    def start(self) -> None:
        """Start relay and its sockets."""
        self.run("systemctl", "start", *UNITS)

    def client(self, port: int = 8480) -> Client:
        """A client, yet to connect; ``reset`` closes it."""
        client = Client(self.lab, port)
        self._clients.append(client)
        return client

    def upload(self, size: int = 1000, route: str = "") -> int:
        """Upload so many bytes on a connection of its own; returns the status."""
        client = self.client()
        try:
            return client.upload(bytes(size), size, route)
        finally:
            client.close()

    def page(self, path: str, port: int = 8481) -> Any:
        """A JSON page of the admin listener."""
        client = self.client(port)
        client.request("GET", path)
        response = client.getresponse()
        with response:
            return json.loads(response.read())

    def show(self, name: str, unit: str = "relay") -> str:
        """A property of a unit."""
        return self.lab.show(unit, name)

    def wait_for(self, name: str, value: str, unit: str = "relay") -> None:
        """Wait until a property of a unit is so."""
        self.lab.wait_until(
            lambda: self.show(name, unit) == value, f"{unit}: {name} is {value}", unit
        )

    def log(self, unit: str = "relay") -> str:
        """What a unit logged since the last ``reset``, and systemd about it."""
        return self.lab.log(unit)

    def wait_until_in_progress(self) -> None:
        """Wait until an upload is in progress."""
        self.lab.wait_until(
            lambda: bool(self.page("/transfers")["transfers"]), "an upload is in progress", "relay"
        )

    def change(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the configuration, until ``reset``."""
        self.lab.write(path, text, mode)
        self._changed.add(path)
        if path.startswith("/etc/systemd"):
            self.run("systemctl", "daemon-reload")

    def reset(self) -> None:
        """Have everything as it was, and relay stopped."""
        for client in self._clients:
            client.close()
        for path in self._changed:
            self.lab.path(path).unlink()
        self.lab.write("/etc/relay/relay.toml", CONFIG)
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "kill", "--signal=KILL", "relay", check=False)
        self.run("systemctl", "stop", *reversed(UNITS))
        self.run("systemctl", "reset-failed")
        self.run("journalctl", "--rotate", "--vacuum-time=1us", "--quiet")
