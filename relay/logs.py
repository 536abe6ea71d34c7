"""How log lines look: logfmt or JSON on standard error, with levels that journald understands.

Fields of a record are given as ``log.info("text", extra=fields(transfer=…))``. Only relay's own
words and numbers go into a log, never bytes that a client sent. What cannot be printed is escaped,
so that nothing can be taken for another line or for a command to a terminal.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

from relay.config import LogConfig


def fields(**values: object) -> dict[str, Any]:
    """The ``extra`` argument that attaches ``values`` to a log record; None is left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


def configure(config: LogConfig) -> None:
    """Send the root logger's records to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    if config.format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        # journald sets JOURNAL_STREAM and adds the time itself (systemd.exec(5)).
        handler.setFormatter(LogfmtFormatter(journald="JOURNAL_STREAM" in os.environ))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    # pika logs each step of its own, and errors that relay reports in its own words.
    logging.getLogger("pika").setLevel(logging.CRITICAL)


class LogfmtFormatter(logging.Formatter):
    """``time=… level=info msg="…" key=value``."""

    def __init__(self, *, journald: bool = False) -> None:
        """``journald``: prefix syslog levels (sd-daemon(3)) and leave the time to the journal."""
        super().__init__()
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        """One line per record, tracebacks escaped into it."""
        values = _values(self, record)
        prefix = ""
        if self._journald:
            del values["time"]
            prefix = f"<{_syslog_level(record.levelno)}>"
        return prefix + " ".join(f"{key}={_quote(value)}" for key, value in values.items())


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The same fields as logfmt has."""
        return _json(_values(self, record))


def _values(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, object]:
    time = datetime.fromtimestamp(record.created, UTC)
    values: dict[str, object] = {
        "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "msg": record.getMessage(),
        **getattr(record, "fields", {}),
    }
    if record.exc_info:
        values["traceback"] = formatter.formatException(record.exc_info)
    return values


def _syslog_level(level: int) -> int:
    if level >= logging.ERROR:
        return 3
    if level >= logging.WARNING:
        return 4
    return 6 if level >= logging.INFO else 7


def _quote(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if text and all(33 <= ord(char) <= 126 and char not in '"=\\' for char in text):
        return text
    return _json(text)


def _json(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
