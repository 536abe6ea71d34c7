"""Log lines: one per record, whatever is in it, for people and for programs."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.config import LogConfig
from relay.journal import Journal
from relay.logs import (
    GATHERED_MAX,
    JournalHandler,
    JsonFormatter,
    LogfmtFormatter,
    Recent,
    Unrepeated,
    configure,
    fields,
    fields_of,
    lines,
)

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


def test_gathered_lines_are_written_together_and_in_order(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(LogConfig(format="logfmt"), {})
    root.info("first")
    assert "msg=first" in capsys.readouterr().err
    lines.gathering = True
    try:
        root.info("second")
        root.warning("third")
        assert capsys.readouterr().err == ""
        lines.write_out()
        written = capsys.readouterr().err.splitlines()
        assert [line.partition(" msg=")[2] for line in written] == ["second", "third"]
        for number in range(GATHERED_MAX):
            root.info("%d", number)
        assert len(capsys.readouterr().err.splitlines()) == GATHERED_MAX
    finally:
        lines.gathering = False


def test_where_nobody_can_read_lines_they_are_lost_and_nothing_else(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(LogConfig(format="logfmt"), {})
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        root.info("lost")
        lines.write_out()
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.close()


def test_logfmt_is_time_level_message_and_fields() -> None:
    record = a_record("upload %s", "committed", transfer="0199", bytes=5, seconds=1.23456)
    assert LogfmtFormatter().format(record) == (
        f'time={TIME} level=info msg="upload committed" transfer=0199 bytes=5 seconds=1.235'
    )


def test_a_time_is_rounded_to_milliseconds_over_the_second_too() -> None:
    record = a_record()
    record.created += 0.2106
    assert LogfmtFormatter().format(record).startswith("time=2024-02-29T12:34:57.000Z ")


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
        # Inherited, but standard error is another file by now.
        ("auto", {"JOURNAL_STREAM": "8:1"}, "time="),
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


# --- journald ------------------------------------------------------------------------------------


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "socket"))
        server.setblocking(False)
        yield server


def entry_of(record: logging.LogRecord, journald: socket.socket) -> dict[str, str]:
    """What journald gets of a record whose values have no line breaks."""
    handler = JournalHandler(Journal(journald.getsockname()), otherwise=logging.NullHandler())
    handler.handle(record)
    handler.close()
    data = journald.recv(10_000).decode()
    return dict(line.split("=", 1) for line in data.splitlines())


def test_journald_gets_fields_and_people_get_them_too(journald: socket.socket) -> None:
    record = a_record("upload committed", transfer="0199", client="a b", bytes=5, seconds=1.25)
    entry = entry_of(record, journald)
    assert entry == {
        "MESSAGE": 'upload committed transfer=0199 client="a b" bytes=5 seconds=1.250',
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "relay",
        "LOGGER": "relay.test",
        "CODE_FILE": __file__,
        "CODE_LINE": "1",
        "CODE_FUNC": "",
        "RELAY_TRANSFER": "0199",
        "RELAY_CLIENT": "a b",
        "RELAY_BYTES": "5",
        "RELAY_SECONDS": "1.250",
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, "7"), (logging.INFO, "6"), (logging.WARNING, "4"), (logging.ERROR, "3")],
)
def test_journald_gets_priorities(level: int, priority: str, journald: socket.socket) -> None:
    assert entry_of(a_record(level=level), journald)["PRIORITY"] == priority


def test_a_traceback_is_a_field_and_in_the_message(journald: socket.socket) -> None:
    handler = JournalHandler(Journal(journald.getsockname()), otherwise=logging.NullHandler())
    handler.handle(a_record(exc_info=ZeroDivisionError("x")))
    handler.close()
    data = journald.recv(10_000)
    assert data.startswith(b"MESSAGE\n")
    assert b"\nTRACEBACK=ZeroDivisionError: x\n" in data


def test_what_journald_does_not_take_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    otherwise = logging.StreamHandler(sys.stderr)
    otherwise.setFormatter(LogfmtFormatter(journald=True))
    handler = JournalHandler(Journal(str(tmp_path / "nobody")), otherwise=otherwise)
    handler.handle(a_record(port=1))
    handler.close()
    assert capsys.readouterr().err == "<6>level=info msg=stopped port=1\n"


def test_under_systemd_the_journal_is_written_to_by_its_own_protocol(
    root: logging.Logger, tmp_path: Path
) -> None:
    """Standard error is the journal if it is the very file that JOURNAL_STREAM names."""
    with (tmp_path / "stream").open("w") as stream:
        status = os.fstat(stream.fileno())
        script = (
            "import logging; from relay.config import LogConfig; from relay import logs;"
            "logs.configure(LogConfig(format={!r}));"
            "print(type(logging.getLogger().handlers[0]._handler).__name__)"
        )
        found = [
            subprocess.run(
                [sys.executable, "-c", script.format(format_)],
                env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
                stderr=stream,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout.strip()
            for format_ in ("auto", "logfmt", "json")
        ]
    assert found == ["JournalHandler", "StreamHandler", "StreamHandler"]


# --- what is repeated ----------------------------------------------------------------------------


class Kept(logging.Handler):
    """Keeps the text of what it gets, and how often it was held back."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        repeated = fields_of(record).get("repeated")
        self.lines.append(record.getMessage() + (f" x{repeated}" if repeated else ""))


@pytest.fixture
def kept() -> Kept:
    return Kept()


def at(seconds: float, message: str, level: int = logging.WARNING, **values: str) -> Any:
    record = a_record(message, level=level)
    vars(record).update(fields(**values))
    record.created += seconds
    return record


def test_an_error_is_told_once_in_ten_seconds_and_then_with_a_count(kept: Kept) -> None:
    handler = Unrepeated(kept)
    for tenth in range(300):
        handler.handle(at(tenth / 10, "broker away"))
    assert kept.lines[:3] == ["broker away", "broker away x99", "broker away"]
    handler.close()
    assert sum(int(line.partition(" x")[2] or 1) for line in kept.lines) == 300


def test_what_was_held_back_is_told_with_the_next_line_whatever_it_is(kept: Kept) -> None:
    handler = Unrepeated(kept)
    for _ in range(5):
        handler.handle(at(0, "broker away"))
    handler.handle(at(9, "started", logging.INFO))
    assert kept.lines == ["broker away", "started"]
    handler.handle(at(11, "stopped", logging.INFO))
    assert kept.lines == ["broker away", "started", "broker away x4", "stopped"]


def test_what_is_held_back_keeps_no_traceback_and_with_it_no_buffers(kept: Kept) -> None:
    handler = Unrepeated(kept)
    records = [a_record("bug", level=logging.ERROR, exc_info=ZeroDivisionError()) for _ in "ab"]
    for record in records:
        handler.handle(record)
    assert [record.exc_info is None for record in records] == [False, True]


def test_texts_and_levels_are_counted_apart(kept: Kept) -> None:
    handler = Unrepeated(kept)
    for record in (at(0, "a"), at(0, "b"), at(0, "a", logging.ERROR), at(0, "a")):
        handler.handle(record)
    assert kept.lines == ["a", "b", "a"]


def test_what_strangers_can_repeat_is_held_back_and_transfers_are_not(kept: Kept) -> None:
    handler = Unrepeated(kept)
    for number in range(3):
        handler.handle(at(0, "refused: no", logging.INFO, outcome="bad-request"))
        handler.handle(at(0, "upload failed: gone", transfer=str(number), outcome="client-gone"))
        handler.handle(at(0, "connected", logging.INFO))
    assert sorted(kept.lines) == ["connected"] * 3 + ["refused: no"] + ["upload failed: gone"] * 3


def test_texts_without_end_fill_no_memory_and_are_all_told(kept: Kept) -> None:
    handler = Unrepeated(kept)
    for number in range(1000):
        for _ in range(2):
            handler.handle(at(0, f"error {number}"))
    assert len(handler._told) <= 256
    handler.close()
    assert len(kept.lines) == 2000


def test_a_clock_that_is_set_back_silences_nothing(kept: Kept) -> None:
    handler = Unrepeated(kept)
    handler.handle(at(0, "x"))
    handler.handle(at(-3600, "x"))
    assert kept.lines == ["x", "x"]


def test_the_last_errors_are_remembered_newest_first() -> None:
    recent = Recent()
    for number in range(30):
        recent.note(at(number, f"error {number}", address=str(number)))
        recent.note(at(number, "all is well", logging.INFO))
    assert [error["msg"] for error in recent][:2] == ["error 29", "error 28"]
    assert len(list(recent)) == 20
    assert next(iter(recent))["address"] == "29"
