"""What ``relay receive`` may be asked for. Values only; nothing is checked here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from relay.receiver.names import DEFAULT_TEMPLATE
from relay.receiver.quarantine import KEEP

PREFETCH: Final = 128
"""Unacked deliveries: 16 MiB of frames of the default size. Half of it is one batch on disk."""

PREFETCH_MAX: Final = 2000
"""What RabbitMQ allows on quorum queues."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """How ``relay receive`` keeps what it gets.

    Attributes:
        name: a template of the files' paths.
        overwrite: replace what exists, instead of choosing another name.
        stdout: write the parts to standard output, instead of files.
        expire: seconds of silence after which a transfer is dropped.
        quarantine_keep: seconds for which to keep what failed; 0 keeps nothing.
    """

    name: str = DEFAULT_TEMPLATE
    overwrite: bool = False
    stdout: bool = False
    expire: float = 86_400.0
    quarantine_keep: float = KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationOptions:
    """How ``relay receive`` is operated.

    Attributes:
        admin: the admin listener's address; None for none.
        command: a command line for each delivered transfer; None for none.
        command_tries: failures after which it is given up; 0 for never.
        command_jobs: how many run at a time.
        as_json: the lines on standard output.
        quiet: neither lines on standard output nor progress.
    """

    admin: str | None = None
    command: str | None = None
    command_tries: int = 5
    command_jobs: int = 1
    as_json: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``relay receive`` is asked for.

    Attributes:
        url: of the broker, amqp or amqps.
        queue: must exist.
        output: a directory, made if it is missing; one receiver at a time.
        count: transfers after which it is done; None for no end.
        prefetch: deliveries to hold unacked, 2 to PREFETCH_MAX.
        begin: where in a stream to begin that was never received: ``first``, ``next``, an offset.
        dead_letter: a queue for what is rejected, with the reason; None: the broker's own way.
        idle_exit: seconds without a delivery after which it is done; None: it waits.
        wait: for a directory that another receiver has.
        ca_file: as ``[amqp]`` has it, and so the next two.
        certificate_file: a client certificate.
        key_file: its key.
        storage: how what comes is kept.
        operation: how it is operated.
    """

    url: str
    queue: str
    output: Path
    count: int | None = None
    prefetch: int = PREFETCH
    begin: str | int = "first"
    dead_letter: str | None = None
    idle_exit: float | None = None
    wait: bool = False
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    storage: StorageOptions = field(default_factory=StorageOptions)
    operation: OperationOptions = field(default_factory=OperationOptions)
