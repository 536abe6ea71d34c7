"""Bearer tokens: how they are made, what the tokens file keeps of them, whose one is.

The file has a line ``name: sha256:HEX`` for each token; a name may have several, so that a new
token can be handed out before the old one goes. A token is 256 bits of chance: there is no
dictionary to try against its hash, so that a fast hash without a salt hides it well enough, and
costs nothing per request. Passwords must not be put into this file for that reason. This module
knows neither HTTP nor who may do what, and its errors quote no line: one may have a token in it.
"""

import hmac
import os
import re
import secrets
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

from relay.config import ConfigError
from relay.values import is_client_name

PREFIX: Final = "relay_"
"""Begins each token, so that those who scan for leaked secrets can tell what they have found."""

_TOKEN_BYTES: Final = 32
_KEY: Final = "auth.tokens_file"
_HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")


def new_token() -> str:
    """A fresh token: ``relay_`` and 256 random bits in base64url."""
    return PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)


def line_of(name: str, token: str) -> str:
    """The token's line in the file, without a line break."""
    return f"{name}: sha256:{_hash(token.encode())}"


def is_token_name(text: str) -> bool:
    """Whether the file can have such a name. Colons are for others: ``uid:1000``."""
    return is_client_name(text) and ":" not in text and not text.startswith("#")


class Tokens:
    """The tokens that are valid now."""

    def __init__(self, text: str = "") -> None:
        """Parse a tokens file.

        Raises:
            ValueError: which line is wrong, and why.
        """
        self._names = dict(_parse(text))

    @property
    def clients(self) -> frozenset[str]:
        """The names of all who have a token."""
        return frozenset(self._names.values())

    def client_of(self, token: bytes) -> str | None:
        """The name of the client that the token was given to; None if it is not valid.

        Takes the same time whichever token it is, if any, and wherever it differs from others.
        """
        ours, found = _hash(token), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, ours):
                found = name
        return found


def load(path: str) -> Tokens:
    """The tokens in a file.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        return Tokens(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{_KEY}: {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        # Its text would quote what is in the file.
        raise ConfigError(f"{_KEY}: {path} is not UTF-8") from None
    except ValueError as exc:
        raise ConfigError(f"{_KEY}: {path}, {exc}") from None


def append(path: Path, line: str) -> None:
    """Add a line to a tokens file; made for its owner alone if there is none.

    Raises:
        OSError: it cannot be written.
    """
    with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "rb+") as file:
        file.seek(0)
        ends_in_line = file.read()[-1:] in (b"", b"\n")
        file.write(b"" if ends_in_line else b"\n")
        file.write(f"{line}\n".encode())


def _hash(token: bytes) -> str:
    return sha256(token).hexdigest()


def _parse(text: str) -> Iterator[tuple[str, str]]:
    """Hashes and names."""
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        name, colon, value = (item.strip() for item in content.partition(":"))
        if not colon or not is_token_name(name):
            raise ValueError(f"line {number}: must be 'name: sha256:HEX'")
        if value.startswith(PREFIX):
            raise ValueError(f"line {number}: has a token where its hash must be")
        match = _HASH.fullmatch(value)
        if match is None:
            raise ValueError(f"line {number}: the hash must be sha256: and 64 lower-case digits")
        if match[1] in seen:
            raise ValueError(f"line {number}: the token is in the file twice")
        seen.add(match[1])
        yield match[1], name
