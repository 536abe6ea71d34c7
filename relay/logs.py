"""How log lines look, where they go, and that no error fills them.

Entries with fields for journald, where standard error is the journal; logfmt or JSON on standard
error otherwise. Fields of a record are given as ``log.info("text", extra=fields(transfer=…))``.
Only relay's own words and numbers go into a log, never bytes that a client sent. What cannot be
printed is escaped, so that nothing can be taken for another line or for a command to a terminal.
"""

import json
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

from relay.config import LogConfig
from relay.journal import Journal, is_standard_error

REPEAT_PAUSE: Final = 10.0
"""Seconds in which the same text is told once; then again, with how often it was left out."""

GATHERED_MAX: Final = 256
"""Lines that may wait to be written."""

RECENT_MAX: Final = 20
_TEXTS_MAX: Final = 256
"""Texts that are known at a time, so that they cannot fill memory either."""

_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
"""What needs no quotes: visible ASCII but ``"``, ``=`` and a backslash."""

_UNESCAPED: Final = re.compile(r"[ !#-\[\]-~]*")
"""What is the same in a JSON string."""


def fields(**values: object) -> dict[str, Any]:
    """The ``extra`` argument that attaches ``values`` to a log record; None is left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What ``fields`` has attached to a record."""
    return dict(_fields_of(record))


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = getattr(record, "fields", {})
    return found


def configure(config: LogConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Send the root logger's records where they are read; may be called again."""
    handler: logging.Handler = logging.StreamHandler(lines)
    if config.format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        # journald sets JOURNAL_STREAM and adds the time itself (systemd.exec(5)).
        in_journal = is_standard_error(environ.get("JOURNAL_STREAM", ""))
        handler.setFormatter(LogfmtFormatter(journald=in_journal))
        if in_journal and config.format == "auto":
            handler = JournalHandler(Journal(), otherwise=handler)
    # There is one thread and one process, and no line says which; asking costs each of them time.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=config.level.upper(), handlers=[Unrepeated(handler)], force=True)
    # pika logs each step of its own, and errors that relay reports in its own words.
    logging.getLogger("pika").setLevel(logging.CRITICAL)


class Lines:
    """Standard error, to which lines may go many at a time.

    A write for each line wakes whoever reads them each time, which takes longer than formatting it.

    Attributes:
        gathering: whether somebody calls ``write_out`` soon after each line.
    """

    def __init__(self) -> None:
        self.gathering = False
        self._lines: list[str] = []

    def write(self, line: str) -> None:
        """Take a line."""
        self._lines.append(line)

    def flush(self) -> None:
        """What a handler calls after each line: write it, unless lines are gathered."""
        if not self.gathering or len(self._lines) >= GATHERED_MAX:
            self.write_out()

    def write_out(self) -> None:
        """Write what there is."""
        if self._lines:
            text = "".join(self._lines)
            self._lines.clear()
            # If nobody can read it any more, nobody can be told.
            with suppress(OSError):
                sys.stderr.write(text)
                sys.stderr.flush()


lines: Final = Lines()
"""Of this process."""


class Recent:
    """The last warnings and errors, for whoever looks at the daemon."""

    def __init__(self) -> None:
        self._records: deque[dict[str, object]] = deque(maxlen=RECENT_MAX)

    def note(self, record: logging.LogRecord) -> None:
        """Keep what it says, if it is a warning or worse."""
        if record.levelno >= logging.WARNING:
            values = _values(record)
            values.pop("traceback", None)
            self._records.append(values)

    def __iter__(self) -> Iterator[dict[str, object]]:
        """The newest first."""
        return reversed(self._records)


recent: Final = Recent()
"""Of this process."""


class Unrepeated(logging.Handler):
    """Holds back what was told a moment ago, and says how often it did.

    Only texts that somebody else can have repeated without end: warnings, errors, and requests
    that came to nothing. What has to do with a transfer is never held back: there are only as many
    as are admitted.
    """

    def __init__(self, handler: logging.Handler) -> None:
        """``handler`` gets what is left."""
        super().__init__()
        self._handler = handler
        # When a text was told, the last record that was held back, and how many were.
        self._told: dict[tuple[int, str], tuple[float, logging.LogRecord | None, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on, or count it."""
        if self._told:
            self._tell_overdue(record.created)
        if self._is_repeatable(record):
            key = (record.levelno, record.getMessage())
            if key in self._told:
                since, _, number = self._told[key]
                # It was told the first time; kept, it would keep an upload's buffers.
                record.exc_info = None
                self._told[key] = since, record, number + 1
                return
            if len(self._told) >= _TEXTS_MAX:
                self._tell(next(iter(self._told)))
            self._told[key] = record.created, None, 0
        self._pass_on(record)

    def close(self) -> None:
        """Tell what is left to be told."""
        for key in list(self._told):
            self._tell(key)
        self._handler.close()
        super().close()

    @staticmethod
    def _is_repeatable(record: logging.LogRecord) -> bool:
        values = _fields_of(record)
        return "transfer" not in values and (
            record.levelno >= logging.WARNING or "outcome" in values
        )

    def _tell_overdue(self, now: float) -> None:
        for key, (since, _, _) in list(self._told.items()):
            # A clock that was set back must not silence anything.
            if not since <= now < since + REPEAT_PAUSE:
                self._tell(key)

    def _tell(self, key: tuple[int, str]) -> None:
        _, record, number = self._told.pop(key)
        if record is not None:
            vars(record).update(fields(**fields_of(record), repeated=number))
            self._pass_on(record)

    def _pass_on(self, record: logging.LogRecord) -> None:
        recent.note(record)
        self._handler.handle(record)


class JournalHandler(logging.Handler):
    """Entries for journald: ``journalctl RELAY_TRANSFER=…`` finds those of a transfer."""

    def __init__(self, journal: Journal, *, otherwise: logging.Handler) -> None:
        """``otherwise`` gets what journald does not take by datagram."""
        super().__init__()
        self._journal = journal
        self._otherwise = otherwise

    def emit(self, record: logging.LogRecord) -> None:
        """Send it."""
        values = _fields_of(record)
        entry = {
            "MESSAGE": " ".join([_printable(record.getMessage()), *_pairs(values)]),
            "PRIORITY": str(_syslog_level(record.levelno)),
            "SYSLOG_IDENTIFIER": "relay",
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
            **{f"RELAY_{key}": _text(value) for key, value in values.items()},
        }
        if record.exc_info:
            entry["TRACEBACK"] = _FORMATTER.formatException(record.exc_info)
            # What people read, and what `journalctl` shows by itself.
            entry["MESSAGE"] += "\n" + entry["TRACEBACK"]
        if not self._journal.send(entry):
            self._otherwise.handle(record)

    def close(self) -> None:
        """Close the socket."""
        self._journal.close()
        super().close()


class LogfmtFormatter(logging.Formatter):
    """``time=… level=info msg="…" key=value``."""

    def __init__(self, *, journald: bool = False) -> None:
        """``journald``: prefix syslog levels (sd-daemon(3)) and leave the time to the journal."""
        super().__init__()
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        """One line per record, tracebacks escaped into it."""
        values = _values(record)
        prefix = ""
        if self._journald:
            del values["time"]
            prefix = f"<{_syslog_level(record.levelno)}>"
        return prefix + " ".join(_pairs(values))


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The same fields as logfmt has."""
        return _json(_values(record))


_FORMATTER: Final = logging.Formatter()


def _values(record: logging.LogRecord) -> dict[str, object]:
    seconds, milliseconds = divmod(round(record.created * 1000), 1000)
    values: dict[str, object] = {
        "time": f"{_second(seconds)}.{milliseconds:03d}Z",
        "level": record.levelname.lower(),
        "msg": record.getMessage(),
        **_fields_of(record),
    }
    if record.exc_info:
        values["traceback"] = _FORMATTER.formatException(record.exc_info)
    return values


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    """A line's time without its fraction: most lines are of the same second as the last one."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _syslog_level(level: int) -> int:
    if level >= logging.ERROR:
        return 3
    if level >= logging.WARNING:
        return 4
    return 6 if level >= logging.INFO else 7


def _pairs(values: dict[str, object]) -> list[str]:
    return [
        # Numbers need no look at their characters, and most fields are numbers.
        f"{key}={value if type(value) is int else _quote(_text(value))}"
        for key, value in values.items()
    ]


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _quote(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    return f'"{text}"' if _UNESCAPED.fullmatch(text) else _json(text)


def _json(value: object) -> str:
    return _printable(json.dumps(value, default=str, ensure_ascii=False))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
