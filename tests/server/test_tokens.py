"""Bearer tokens: what is in the file, what is not, and whose token one is."""

import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config import ConfigError
from relay.server.tokens import Tokens, append, is_token_name, line_of, load, new_token
from relay.values import is_client_name

HASH = "sha256:" + "0" * 64


def test_a_token_has_256_bits_of_chance_and_can_be_told_for_what_it_is() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(re.fullmatch(r"relay_[A-Za-z0-9_-]{43}", token) for token in tokens)


def test_a_line_has_the_hash_of_the_token_and_not_the_token() -> None:
    # printf %s relay_x | sha256sum
    known = "e3373baf48dc79028a6a282479fd3096a43a851c0740f6ca1043b1aa864199f3"
    assert line_of("alice", "relay_x") == f"alice: sha256:{known}"


def test_each_token_is_its_clients_and_several_of_one_client_are_valid_at_once() -> None:
    old, new, other = (new_token() for _ in range(3))
    tokens = Tokens(
        f"# uploaders\n\n{line_of('alice', old)}\n  {line_of('alice', new)}  \r\n"
        f"{line_of('Bob <b@x>', other)}\n"
    )
    assert tokens.client_of(old.encode()) == "alice"
    assert tokens.client_of(new.encode()) == "alice"
    assert tokens.client_of(other.encode()) == "Bob <b@x>"
    assert tokens.clients == {"alice", "Bob <b@x>"}


def test_nothing_but_the_token_itself_is_one() -> None:
    token = new_token()
    tokens = Tokens(line_of("alice", token))
    hash_ = line_of("alice", token).partition(": ")[2]
    for wrong in (b"", b"alice", token[:-1], f"{token}x", token.upper(), new_token(), hash_):
        data = wrong if isinstance(wrong, bytes) else wrong.encode()
        assert tokens.client_of(data) is None
    assert Tokens().client_of(token.encode()) is None


@given(st.dictionaries(st.text().filter(is_token_name), st.binary(), max_size=5))
def test_whatever_was_written_is_read(secrets: dict[str, bytes]) -> None:
    unique = {secret.hex(): name for name, secret in secrets.items()}
    tokens = Tokens("\n".join(line_of(name, secret) for secret, name in unique.items()))
    assert {secret: tokens.client_of(secret.encode()) for secret in unique} == unique


@given(st.text())
def test_any_text_is_a_tokens_file_or_an_error_that_quotes_nothing(text: str) -> None:
    error = "line 0: "
    try:
        clients = Tokens(text).clients
    except ValueError as exc:
        error = str(exc)
    else:
        assert all(map(is_client_name, clients))
    assert re.fullmatch(r"line \d+: [ -~]*", error)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("alice", "must be 'name: sha256:HEX'"),
        (f": {HASH}", "must be 'name: sha256:HEX'"),
        (f"{'x' * 129}: {HASH}", "must be 'name: sha256:HEX'"),
        (f"a\tb: {HASH}", "must be 'name: sha256:HEX'"),
        pytest.param("alice: " + new_token(), "has a token where its hash must be", id="token"),
        ("alice: " + HASH.removeprefix("sha256:"), "the hash must be sha256: and 64 lower-case"),
        (f"alice: {HASH}0", "the hash must be sha256: and 64 lower-case digits"),
        (f"alice: {HASH} # old", "the hash must be sha256: and 64 lower-case digits"),
        (f"bob: {HASH}\nalice: {HASH}", "the token is in the file twice"),
    ],
)
def test_what_is_wrong_is_told_by_its_line_and_never_quoted(
    line: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# comment\n{line}\n")
    number = 1 + len(line.splitlines())
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    text = str(caught.value)
    assert text.startswith(f"auth.tokens_file: {path}, line {number}: {reason}")
    assert "alice" not in text
    assert "relay_" not in text


def test_a_file_that_cannot_be_read_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with pytest.raises(ConfigError, match=r"^auth\.tokens_file: .* cannot be read: No such file"):
        load(str(path))
    path.write_bytes(b"alice: secret\xff")
    with pytest.raises(ConfigError, match=r"^auth\.tokens_file: .*tokens is not UTF-8$"):
        load(str(path))


def test_lines_are_added_whole_to_a_file_of_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    append(path, line_of("a", "1"))
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    path.write_text(path.read_text().rstrip("\n"))
    append(path, line_of("b", "2"))
    append(path, line_of("b", "3"))
    assert len(path.read_text().splitlines()) == 3
    assert load(str(path)).client_of(b"3") == "b"
