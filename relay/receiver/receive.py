"""``relay receive``: what is asked for, checked and put together.

It begins the consuming and knows nothing of how that goes.
"""

import sys

import trio

from relay.broker.connect import Connector
from relay.config import AmqpConfig, ConfigError
from relay.receiver import operations
from relay.receiver.consumer import Consumer
from relay.receiver.files import FileSink
from relay.receiver.intake import Intake
from relay.receiver.names import DEFAULT_TEMPLATE, Template
from relay.receiver.options import Options, StorageOptions
from relay.values import parse_amqp_url


def receive(options: Options) -> int:
    """Write the transfers that come from a queue into directories.

    One line on standard output for each, problems on standard error, or both there if standard
    output gets the transfers. Ends after ``count`` transfers, after silence, or on SIGINT or
    SIGTERM, whose handlers it takes over: call it from the main thread.

    Returns:
        The exit code: 0 for success, also when a signal ended it; 1 if it failed, or was stopped
        before ``count`` was reached.

    Raises:
        ConfigError: the URL, the template or a file for TLS cannot be used.
        ListenError: the admin listener's address cannot be listened on.
    """
    connector = _connector(options)
    if options.dead_letter == options.queue:
        raise ConfigError("--dead-letter: must be another queue than --queue")
    if options.storage.stdout and options.operation.command is not None:
        raise ConfigError("--stdout: writes no files, so it goes without --exec")
    template = _template(options.storage)
    intake = Intake(
        lambda: _sink(options, template), count=options.count, expire_after=options.storage.expire
    )
    commands = operations.commands(options.operation, intake, options.output, limit=options.count)
    try:
        return trio.run(Consumer(connector, intake, options, commands).run)
    finally:
        intake.discard()


def _template(storage: StorageOptions) -> Template:
    if storage.stdout and (storage.overwrite or storage.name != DEFAULT_TEMPLATE):
        raise ConfigError("--stdout: writes no files, so it goes without --name and --overwrite")
    try:
        return Template(storage.name)
    except ValueError as exc:
        raise ConfigError(f"--name: must be {exc}") from exc


def _sink(options: Options, template: Template) -> FileSink:
    storage = options.storage
    return FileSink(
        options.output,
        template=template,
        overwrite=storage.overwrite,
        stdout=sys.stdout.fileno() if storage.stdout else None,
        quarantine_keep=storage.quarantine_keep,
        pending=options.operation.command is not None,
    )


def _connector(options: Options) -> Connector:
    try:
        parse_amqp_url(options.url)
    except ValueError as exc:
        raise ConfigError(f"--amqp: must be {exc}") from exc
    config = AmqpConfig(
        urls=(options.url,),
        ca_file=options.ca_file,
        certificate_file=options.certificate_file,
        key_file=options.key_file,
    )
    return Connector(config, name="relay receive", naming=_flag)


def _flag(key: str) -> str:
    return "--amqp" if key == "urls" else "--" + key.replace("_", "-")
