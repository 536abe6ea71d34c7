"""The daemon as a process, from where the demo has it, too."""

from relay.demo.daemon import Daemon, DaemonFailed

__all__ = ["Daemon", "DaemonFailed"]
