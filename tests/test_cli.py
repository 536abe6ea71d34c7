"""The commands: help, exit codes, and one line about what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from relay import __version__
from relay.cli import main
from relay.server.tokens import Tokens

COMMANDS = ["serve", "receive", "send", "token", "demo"]


@pytest.fixture(autouse=True)
def _bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    # The daemon's command turns it off for its process, which here is that of the tests.
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a process."""
    program = [sys.executable, "-m", "relay", *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)


def exit_code(*arguments: str) -> int:
    """The command in this process."""
    try:
        return main(arguments)
    except SystemExit as exc:
        code = exc.code
    assert isinstance(code, int)
    return code


def test_the_version_is_the_packages() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"relay {__version__}\n")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text
    assert "Exit codes: 0 success, 1 failed, 2 usage or configuration error." in text


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("serve", ["--config", "--listen", "--amqp", "--admin"]),
        ("receive", ["--amqp", "--queue", "--output", "--count"]),
        (
            "send",
            [
                *("FILE", "--to", "--unix-socket", "--together", "--name", "--filename"),
                *("--digest", "--key", "--retry-for", "--token-file", "--ca-file"),
                *("--certificate-file", "--key-file", "--json", "--quiet"),
            ],
        ),
        ("token", ["NAME", "--append"]),
        ("demo", ["FILE"]),
    ],
)
def test_each_command_has_help_on_what_it_takes(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(command, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: relay {command} ")
    for option in options:
        assert option in text
    assert "%%" not in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["serve", "--colour"], "--colour"),
        (["serve", "extra"], "extra"),
        (["serve", "--listen", "nonsense"], "--listen: must be host:port"),
        (["serve", "--listen", "::1:80"], "--listen: must be [v6]:port"),
        (["send"], "FILE"),
        (["send", "x", "--digest", "md5"], "--digest: invalid choice"),
        (["send", "x", "--retry-for", "soon"], '--retry-for: must be seconds or text such as "30'),
        (["token", "uid:1"], "NAME: must be 1 to 128 bytes of printable text without colons"),
        (["token", "#x"], "NAME: must be"),
        (["receive"], "--queue, --output"),
        (["receive", "--queue", "q"], "--output"),
        (
            ["receive", "--queue", "q", "--output", "d", "--count", "0"],
            "--count: must be a positive",
        ),
        (
            ["receive", "--queue", "q", "--output", "d", "--count", "x"],
            "--count: must be a positive",
        ),
    ],
)
def test_wrong_usage_is_told_and_exits_with_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[http]\nmax_uploads = 0\n", "http.max_uploads: must be an integer between"),
        ("[http]\ncolour = 1\n", "http.colour: unknown key"),
        ("[http\n", "cannot be read: "),
        ('[http]\nlisten = ["0.0.0.0:80"]\n', "http.listen: 0.0.0.0:80 is not loopback"),
    ],
)
def test_a_configuration_error_is_one_line_and_exits_with_2(
    content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "relay.toml"
    path.write_text(content)
    assert exit_code("serve", "--config", str(path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"relay: {path}: {text}")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--config", "/nonexistent/relay.toml"],
            "/nonexistent/relay.toml: cannot be read: No such",
        ),
        (["--amqp", "nonsense"], "amqp.urls: must be amqp://"),
        (["--amqp", "amqp://a..b"], "amqp.urls: must be amqp://"),
        (["--admin", "nonsense"], "admin.listen: must be host:port"),
        (["--listen", "0.0.0.0:0"], "http.listen: 0.0.0.0:0 is not loopback"),
    ],
)
def test_flags_are_held_to_what_the_file_is(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("serve", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"relay: {text}")


def test_an_address_that_cannot_be_listened_on_is_one_line_and_exits_with_1(
    tmp_path: Path,
) -> None:
    address = f"unix:{tmp_path}/absent/relay.sock"
    result = run("serve", "--listen", address, "--admin", "", "--amqp", "amqp://127.0.0.1:1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"relay: cannot listen on {address}: No such file or directory\n"


@pytest.mark.parametrize("url", ["nonsense", "http://h", "amqp://h:99999/", "amqp://a..b/"])
def test_a_broker_that_cannot_be_one_is_an_error_of_usage_to_receive(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert exit_code("receive", "--amqp", url, "--queue", "q", "--output", str(output)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--amqp" in line
    assert not output.exists()


def test_a_token_is_printed_apart_from_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("token", "alice") == 0
    out, err = capsys.readouterr()
    assert Tokens(err).client_of(out.removesuffix("\n").encode()) == "alice"
    assert out.strip() not in err


def test_a_tokens_line_is_added_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens"
    for name in (["alice"], []):
        assert exit_code("token", *name, "--append", str(path)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    tokens = Tokens(path.read_text())
    assert [tokens.client_of(line.encode()) for line in out.split()] == ["alice", "client"]


def test_no_token_is_printed_that_is_not_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "absent" / "tokens"
    assert exit_code("token", "--append", str(path)) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"relay: {path} cannot be written: No such file or directory\n")


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("relay.demo.run.demo", interrupted)
    assert main(["demo"]) == 130


def test_the_command_line_alone_imports_neither_event_loop_nor_client_library() -> None:
    code = (
        "import sys, relay.cli\n"
        "try:\n    relay.cli.main(['serve', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'trio', 'pika', 'h11', 'multipart'} & set(sys.modules), sys.modules.keys()\n"
    )
    program = [sys.executable, "-c", code]
    subprocess.run(program, capture_output=True, timeout=60, check=True)
