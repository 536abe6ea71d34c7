"""Log lines: one per record, whatever is in it, for people and for programs."""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.config import LogConfig
from relay.logs import JsonFormatter, LogfmtFormatter, configure, fields

TIME = "2024-02-29T12:34:56.789Z"


def a_record(
    message: str = "stopped",
    *args: object,
    level: int = logging.INFO,
    exc_info: BaseException | None = None,
    **values: object,
) -> logging.LogRecord:
    info = None if exc_info is None else (type(exc_info), exc_info, exc_info.__traceback__)
    record = logging.LogRecord("relay.test", level, __file__, 1, message, args, info)
    record.created = datetime(2024, 2, 29, 12, 34, 56, 789_000, UTC).timestamp()
    vars(record).update(fields(**values) if values else {})
    return record


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root, pika = logging.getLogger(), logging.getLogger("pika")
    before = root.handlers[:], root.level, pika.level
    yield root
    root.handlers[:], level, pika_level = before
    root.setLevel(level)
    pika.setLevel(pika_level)


def test_logfmt_is_time_level_message_and_fields() -> None:
    record = a_record("upload %s", "committed", transfer="0199", bytes=5, seconds=1.23456)
    assert LogfmtFormatter().format(record) == (
        f'time={TIME} level=info msg="upload committed" transfer=0199 bytes=5 seconds=1.235'
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("192.0.2.1:5000", "192.0.2.1:5000"),
        ("", '""'),
        ("two words", '"two words"'),
        ('a"b', '"a\\"b"'),
        ("a=b", '"a=b"'),
        ("a\\b", '"a\\\\b"'),
        ("a\nb\r\0", '"a\\nb\\r\\u0000"'),
        ("zoë", '"zoë"'),
        (True, "True"),
    ],
)
def test_logfmt_quotes_what_would_be_read_otherwise(value: object, text: str) -> None:
    assert LogfmtFormatter().format(a_record(key=value)).endswith(f" key={text}")


def test_under_journald_a_line_has_its_level_in_front_and_no_time() -> None:
    formatter = LogfmtFormatter(journald=True)
    levels = {
        logging.DEBUG: (7, "debug"),
        logging.INFO: (6, "info"),
        logging.WARNING: (4, "warning"),
        logging.ERROR: (3, "error"),
        logging.CRITICAL: (3, "critical"),
    }
    for level, (number, name) in levels.items():
        line = formatter.format(a_record(level=level, port=1))
        assert line == f"<{number}>level={name} msg=stopped port=1"


def test_json_is_one_object_with_the_same_fields() -> None:
    line = JsonFormatter().format(a_record("a\nb", transfer="zoë", bytes=5, seconds=0.5))
    assert json.loads(line) == {
        "time": TIME,
        "level": "info",
        "msg": "a\nb",
        "transfer": "zoë",
        "bytes": 5,
        "seconds": 0.5,
    }
    assert "zoë" in line


def test_what_json_has_no_type_for_is_text() -> None:
    line = JsonFormatter().format(a_record(path=Exception("x")))
    assert json.loads(line)["path"] == "x"


@pytest.mark.parametrize("formatter", [LogfmtFormatter(), JsonFormatter()])
def test_a_traceback_is_on_the_same_line(formatter: logging.Formatter) -> None:
    try:
        raise ZeroDivisionError("what\nhappened")
    except ZeroDivisionError as exc:
        line = formatter.format(a_record(exc_info=exc))
    assert "\n" not in line
    assert "Traceback" in line
    assert "ZeroDivisionError" in line


@given(st.text(), st.dictionaries(st.sampled_from("abc"), st.text() | st.integers() | st.floats()))
@example("\x7f\x85\x9b31m\u2028\u202e\U000e0001\udc80", {"a": "\x9b"})
def test_any_record_is_one_line_that_can_be_printed(message: str, values: dict[str, Any]) -> None:
    record = a_record(message.replace("%", "%%"), **values)
    for formatter in (LogfmtFormatter(), LogfmtFormatter(journald=True), JsonFormatter()):
        line = formatter.format(record)
        assert line.isprintable()
    assert json.loads(line)["msg"] == record.getMessage()


def test_fields_without_a_value_are_left_out() -> None:
    assert fields(a=1, b=None, c="", d=0, e=False) == {
        "fields": {"a": 1, "c": "", "d": 0, "e": False}
    }


def test_records_go_to_standard_error_once(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(LogConfig(format="logfmt"))
    configure(LogConfig(format="json"))
    logging.getLogger("relay.test").info("hello", extra=fields(port=1))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["msg"] == "hello"
    assert json.loads(captured.err)["port"] == 1


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)],
)
def test_the_level_is_the_one_configured(
    level: str, shown: int, root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(LogConfig(level=level))
    log = logging.getLogger("relay.test")
    for write in (log.debug, log.info, log.warning, log.error):
        write("x")
    assert len(capsys.readouterr().err.splitlines()) == shown


@pytest.mark.parametrize(
    ("format_", "environment", "beginning"),
    [
        ("auto", {}, "time="),
        ("logfmt", {}, "time="),
        ("auto", {"JOURNAL_STREAM": "8:1"}, "<6>level=info"),
        ("json", {"JOURNAL_STREAM": "8:1"}, "{"),
    ],
)
def test_the_format_is_the_one_configured_or_what_the_reader_understands(
    format_: str,
    environment: dict[str, str],
    beginning: str,
    root: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    configure(LogConfig(format=format_))
    logging.getLogger("relay.test").info("x")
    assert capsys.readouterr().err.startswith(beginning)


def test_pikas_own_log_is_silent(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(level="debug"))
    logging.getLogger("pika.connection").error("AMQPConnector - reporting failure")
    assert capsys.readouterr().err == ""
    assert sys.stderr is not None
