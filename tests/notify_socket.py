"""What systemd is to a service that notifies: a datagram socket, and what was said to it."""

import socket


class Manager:
    """What systemd is to a service: the other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def heard(self) -> list[list[str]]:
        """The lines of each datagram since the last call."""
        datagrams = []
        while True:
            try:
                datagrams.append(self._socket.recv(4096).decode().splitlines())
            except BlockingIOError:
                return datagrams

    def close(self) -> None:
        self._socket.close()
