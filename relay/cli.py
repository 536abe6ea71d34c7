"""Commands, arguments and exit codes.

0: success; 1: the operation failed; 2: usage or configuration error, in one line.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from relay import __version__
from relay.config import Config, ConfigError, load, naming
from relay.values import parse_address, parse_duration


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as exc:
        print(f"relay: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(arguments: argparse.Namespace) -> int:
    # The daemon writes no file, compiled modules included.
    sys.dont_write_bytecode = True
    # Imported here: each command starts without what only the others need.
    from relay import daemon, logs
    from relay.server.listeners import ADMIN, HTTP, ListenError, address_of, inherited_sockets

    inherited = inherited_sockets()
    admin = [address_of(listening) for listening in inherited[ADMIN]]

    def read() -> Config:
        return load(
            arguments.config,
            listen=[address_of(listening) for listening in inherited[HTTP]] or arguments.listen,
            amqp=arguments.amqp,
            admin=admin[0] if admin else arguments.admin,
        )

    config = read()
    logs.configure(config.log)
    try:
        with naming(arguments.config):
            daemon.run(config, inherited, read)
    except ListenError as exc:
        print(f"relay: {exc}", file=sys.stderr)
        return 1
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from relay.check import check

    config = load(arguments.config)
    with naming(arguments.config):
        return check(config, show=arguments.show)


def _token(arguments: argparse.Namespace) -> int:
    from relay.server.tokens import append, line_of, new_token

    token = new_token()
    line = line_of(arguments.name, token)
    if arguments.append is None:
        print(line, file=sys.stderr)
    else:
        try:
            append(arguments.append, line)
        except OSError as exc:
            print(f"relay: {arguments.append} cannot be written: {exc.strerror}", file=sys.stderr)
            return 1
    print(token)
    return 0


def _receive(arguments: argparse.Namespace) -> int:
    from relay.receiver.options import OperationOptions, Options, StorageOptions
    from relay.receiver.receive import receive
    from relay.server.listeners import ListenError

    options = Options(
        url=arguments.amqp,
        ca_file=arguments.ca_file,
        certificate_file=arguments.certificate_file,
        key_file=arguments.key_file,
        queue=arguments.queue,
        output=arguments.output,
        count=arguments.count,
        prefetch=arguments.prefetch,
        begin=arguments.begin,
        dead_letter=arguments.dead_letter,
        idle_exit=arguments.idle_exit,
        wait=arguments.wait,
        storage=StorageOptions(
            name=arguments.name,
            overwrite=arguments.overwrite,
            stdout=arguments.stdout,
            expire=arguments.expire,
            quarantine_keep=arguments.quarantine_keep,
        ),
        operation=OperationOptions(
            admin=arguments.admin,
            as_json=arguments.json,
            quiet=arguments.quiet,
            command=arguments.exec,
            command_tries=arguments.exec_tries,
            command_jobs=arguments.exec_jobs,
        ),
    )
    try:
        return receive(options)
    except ListenError as exc:
        print(f"relay receive: {exc}", file=sys.stderr)
        return 1


def _send(arguments: argparse.Namespace) -> int:
    from relay.client.send import Options, send

    given = vars(arguments)
    # Names of files may have anything in them.
    with naming(None):
        return send(Options(**{field.name: given[field.name] for field in fields(Options)}))


def _demo(arguments: argparse.Namespace) -> int:
    from relay.demo.run import demo

    return demo(arguments.file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relay",
        description="Streams HTTP uploads into RabbitMQ in frames: bounded memory, no file.",
        epilog="Exit codes: 0 success, 1 failed, 2 usage or configuration error.",
    )
    parser.add_argument("--version", action="version", version=f"relay {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve", help="run the daemon", description="Run the daemon. Flags override the file."
    )
    serve.add_argument("--config", metavar="FILE", type=Path, help="TOML; default: no file")
    serve.add_argument(
        "--listen",
        metavar="ADDR",
        type=_address,
        action="append",
        help="host:port or unix:PATH for uploads; repeatable (default 127.0.0.1:8480)",
    )
    serve.add_argument(
        "--amqp",
        metavar="URL",
        action="append",
        help="broker; repeatable (default amqp://guest:guest@127.0.0.1:5672/%%2f)",
    )
    serve.add_argument(
        "--admin",
        metavar="ADDR",
        help='health and metrics; "" turns them off (default 127.0.0.1:8481)',
    )
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check",
        help="verify the configuration and the broker's side of each route",
        description="Validate the file, connect to each broker as the daemon would, and verify"
        " each route: exchange, queue (declared, as the daemon does), bindings (by an abort frame"
        " of no transfer, which consumers ignore), permissions, and what could lose confirmed"
        " frames. One line for each problem, with what to do.",
        epilog="Exit codes: 0 no error (there may be warnings), 1 an error, 2 the configuration"
        " is wrong. Not visible over AMQP: what policies set, and the queues behind an exchange.",
    )
    check.add_argument("--config", metavar="FILE", type=Path, help="TOML; default: no file")
    check.add_argument(
        "--show",
        action="store_true",
        help="print the effective configuration as TOML, passwords masked",
    )
    check.set_defaults(run=_check)

    token = commands.add_parser(
        "token",
        help="make a bearer token for a client",
        description="Print a new token, once, on standard output, and its line for"
        " auth.tokens_file on standard error. The line has a hash of it: whoever reads that file"
        " has no token. Several lines of one name are valid at once; SIGHUP makes the daemon read"
        " them.",
    )
    token.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        type=_token_name,
        default="client",
        help='the client whose it is (default "client")',
    )
    token.add_argument(
        "--append", metavar="FILE", type=Path, help="add the line to FILE (0600 if it is made)"
    )
    token.set_defaults(run=_token)

    receive = commands.add_parser(
        "receive",
        help="reassemble transfers from a queue into files",
        description="Consume a queue, verify every frame, and write each transfer to a directory. "
        "Of transfers with the same client, route and Idempotency-Key the first counts.",
    )
    receive.add_argument(
        "--amqp",
        metavar="URL",
        default="amqp://guest:guest@127.0.0.1:5672/%2f",
        help="broker (default amqp://guest:guest@127.0.0.1:5672/%%2f)",
    )
    for flag, text in (
        ("--ca-file", "PEM, for amqps: CAs to trust (default: the system's)"),
        ("--certificate-file", "PEM, for amqps: a client certificate; logs in if URL has no user"),
        ("--key-file", "PEM: its key (default: in the same file)"),
    ):
        receive.add_argument(flag, metavar="FILE", default="", help=text)
    receive.add_argument("--queue", metavar="NAME", required=True, help="the queue to consume")
    receive.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="where files go; made if missing"
    )
    receive.add_argument(
        "--count", metavar="N", type=_positive, help="stop after N transfers (default: never)"
    )
    receive.add_argument(
        "--name",
        metavar="TEMPLATE",
        default="{transfer}/{part}-{filename}",
        help="path of each part's file below DIR (default {transfer}/{part}-{filename}); also"
        " {name} of the form field, {route}, {client}, and the {date} the transfer began. If its"
        " directory has {transfer}, and nothing that differs between parts, a transfer appears all"
        " at once; otherwise file by file, and last its receipt, DIR/TRANSFER.receipt.json",
    )
    receive.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that exist (default: report.csv becomes report-2.csv)",
    )
    receive.add_argument(
        "--stdout",
        action="store_true",
        help="write the bytes of complete transfers to standard output, at least once each, and"
        " what there is to tell to standard error; DIR is for staging only",
    )
    receive.add_argument(
        "--expire",
        metavar="DURATION",
        type=_duration_above_zero,
        default=86_400.0,
        help='drop transfers that are silent for so long, such as "30 min" (default 24 h)',
    )
    receive.add_argument(
        "--quarantine-keep",
        metavar="DURATION",
        type=_duration,
        default=7 * 86_400.0,
        help="how long DIR/.relay-quarantine keeps what came of transfers that failed; 0: nothing"
        " (default 168 h)",
    )
    receive.add_argument(
        "--idle-exit",
        metavar="DURATION",
        type=_duration_above_zero,
        help='stop when nothing came for so long, such as "30 s" (default: never)',
    )
    receive.add_argument(
        "--dead-letter",
        metavar="QUEUE",
        help="put what is rejected into QUEUE, with the reason (default: reject it, so that it"
        " goes where the queue's own dead-letter exchange sends it, without the reason)",
    )
    receive.add_argument(
        "--from",
        dest="begin",
        metavar="WHERE",
        type=_begin,
        default="first",
        help="where to begin in a stream that DIR has nothing of yet: first, next, or an offset"
        " (default first)",
    )
    receive.add_argument(
        "--prefetch",
        metavar="N",
        type=_prefetch,
        default=128,
        help="messages to hold unacked, 2 to 2000 (default 128); never more than 64 MiB of them",
    )
    receive.add_argument(
        "--wait",
        action="store_true",
        help="if another receiver has DIR, wait until it ends (default: fail)",
    )
    receive.add_argument(
        "--exec",
        metavar="CMD",
        help="run CMD in DIR for each delivered transfer, at least once, without a shell:"
        " RELAY_WHERE, RELAY_RECEIPT, RELAY_TRANSFER, RELAY_ROUTE and RELAY_CLIENT are set, the"
        " receipt is on standard input; --count counts a transfer when its CMD is through",
    )
    receive.add_argument(
        "--exec-tries",
        metavar="N",
        type=_not_negative,
        default=5,
        help="after N failures of CMD the transfer goes into quarantine; 0: never (default 5)",
    )
    receive.add_argument(
        "--exec-jobs",
        metavar="N",
        type=_positive,
        default=1,
        help="how many of CMD run at a time (default 1)",
    )
    receive.add_argument(
        "--admin",
        metavar="ADDR",
        type=_address,
        help="host:port or unix:PATH for /healthz, /readyz and /metrics (default: none)",
    )
    told = receive.add_mutually_exclusive_group()
    told.add_argument(
        "--json", action="store_true", help="a JSON object a line for each delivered transfer"
    )
    told.add_argument(
        "--quiet",
        action="store_true",
        help="tell only of problems: no line for each transfer, no progress on a terminal",
    )
    receive.set_defaults(run=_receive)

    _add_send(commands.add_parser("send", help="send files to the daemon until they are safe"))

    demo = commands.add_parser(
        "demo",
        help="show the whole path on this machine",
        description="Start a private RabbitMQ node and a daemon, upload, receive, report.",
    )
    demo.add_argument("file", metavar="FILE", nargs="?", type=Path, help="default: 256 MiB made up")
    demo.set_defaults(run=_demo)
    return parser


def _add_send(send: argparse.ArgumentParser) -> None:
    send.description = (
        "Send files, each a transfer of its own, and try again until the daemon has answered that"
        " they are safe. Directories are walked: regular files, in order of their names, called by"
        " their paths within the directory. The receipt is compared with what was read."
    )
    send.epilog = (
        "A line for each transfer on standard output. Exit codes: 0 all sent, 1 any failed (the"
        " others are sent all the same), 2 usage error, 130 interrupted."
    )
    send.add_argument("files", metavar="FILE", nargs="+", help="or directory; - is standard input")
    add = send.add_argument
    add(
        "--to",
        metavar="URL",
        default="http://127.0.0.1:8480/upload",
        help="http or https; /upload/ROUTE names a route (default http://127.0.0.1:8480/upload)",
    )
    add("--unix-socket", metavar="PATH", default="", help="connect to this instead of URL's host")
    add("--together", action="store_true", help="all files as one transfer, a form")
    add("--name", help='form field (default with --together "file"; else each file is a raw body)')
    add("--filename", metavar="NAME", help="what standard input is called (default: nothing)")
    add(
        "--digest",
        choices=("sha-256", "sha-512"),
        help="compute it and compare it with the receipt's; a file's (not a form's) is sent"
        " along, so that nothing else is committed",
    )
    add("--key", help="Idempotency-Key of the one transfer (default: a random UUID for each)")
    add(
        "--retry-for",
        metavar="DURATION",
        type=_duration,
        default=3600.0,
        help='"30 s", "5 min": go on for so long while nothing succeeds; 0: one try (default 1 h)',
    )
    add("--token-file", metavar="FILE", default="", help="a bearer token; read for each try")
    for flag, text in (
        ("--ca-file", "PEM, for https: CAs to trust (default: the system's)"),
        ("--certificate-file", "PEM, for https: a client certificate"),
        ("--key-file", "PEM: its key (default: in the same file)"),
    ):
        add(flag, metavar="FILE", default="", help=text)
    add("--json", dest="as_json", action="store_true", help="a JSON object for each transfer")
    add(
        "--quiet",
        dest="is_quiet",
        action="store_true",
        help="neither progress nor lines on what goes well or is tried again",
    )
    send.set_defaults(run=_send)


def _duration(value: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"must be {exc}") from exc


def _address(value: str) -> str:
    try:
        return parse_address(value)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"must be {exc}") from exc


def _not_negative(value: str) -> int:
    if not value.isdecimal():
        raise argparse.ArgumentTypeError("must be an integer of 0 or more")
    return int(value)


def _token_name(value: str) -> str:
    from relay.server.tokens import is_token_name

    if not is_token_name(value):
        raise argparse.ArgumentTypeError("must be 1 to 128 bytes of printable text without colons")
    return value


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError("must be a positive integer")
    return int(value)


def _duration_above_zero(value: str) -> float:
    seconds = _duration(value)
    if not seconds:
        raise argparse.ArgumentTypeError("must be a duration above 0")
    return seconds


def _begin(value: str) -> str | int:
    if value in ("first", "next"):
        return value
    if not value.isdecimal() or int(value) >= 2**63:
        raise argparse.ArgumentTypeError("must be first, next, or an offset")
    return int(value)


def _prefetch(value: str) -> int:
    if not value.isdecimal() or not 2 <= int(value) <= 2000:
        raise argparse.ArgumentTypeError("must be an integer between 2 and 2000")
    return int(value)
