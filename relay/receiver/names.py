"""Names for files out of what clients call things, by a template of the operator's.

Only the template makes directories. What a client sent becomes, cleaned, a part of one component
of a path, whatever it is. It does not know which names exist.
"""

import re
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import PurePath
from string import Formatter
from typing import Final

from relay.model import PartHead, Transfer

DEFAULT_TEMPLATE: Final = "{transfer}/{part}-{filename}"

RECEIPT: Final = "receipt.json"
PROBLEM: Final = "problem.json"
RESERVED: Final = frozenset({RECEIPT, f".{RECEIPT}", PROBLEM})
"""Names in a transfer's directory that are not for its parts."""

NAME_MAX: Final = 255
"""Bytes of a file name on Linux (NAME_MAX, limits.h)."""

DEPTH_MAX: Final = 8
"""Components of a template. With names as long as they may be, a path is under PATH_MAX."""

LITERAL_MAX: Final = 100
"""Bytes of text of its own in a component of a template: the rest is for its fields."""

FIELDS: Final = ("transfer", "part", "filename", "name", "route", "client", "date")

_OF_PART: Final = frozenset({"part", "filename", "name"})
_CLIENTS: Final = ("filename", "name", "client", "route")
"""What others send: cut, the first one first, where a component would be too long."""

_SUFFIX_MAX: Final = 32
"""Bytes of a suffix, such as ``.tar.gz``, that a name too long keeps."""

_FIELD_MIN: Final = 8
"""Bytes of a field that are left when it is cut."""

# Not allowed in names by Windows, which may well share the directory; "/" by anybody.
_NOT_PORTABLE: Final = frozenset('<>:"|?*/\\')

_LAST_SECOND: Final = 253_402_300_799
"""Of the year 9999, the last that has a date."""


class Template:
    """Where a part's file goes, below the output directory.

    Attributes:
        whole: the directory is the transfer's own: it has ``{transfer}``, and nothing that differs
            between its parts.
    """

    def __init__(self, text: str) -> None:
        """Parse ``text``.

        Raises:
            ValueError: it is no template; says what it must be.
        """
        components = text.split("/")
        if len(components) > DEPTH_MAX:
            raise ValueError(f"at most {DEPTH_MAX} names deep")
        if components[0].startswith("."):
            raise ValueError("a path that does not begin with a dot: such names are relay's own")
        self._components = tuple(map(_Component, components))
        *directories, _ = self._components
        fields = frozenset[str]().union(*(component.fields for component in directories))
        self.whole = "transfer" in fields and not fields & _OF_PART

    def directory(self, transfer: Transfer) -> tuple[str, ...]:
        """The directory of the transfer, if ``whole``."""
        values = _values(transfer, 0, PartHead())
        return tuple(component.fill(values) for component in self._components[:-1])

    def path(self, transfer: Transfer, part: int, head: PartHead) -> tuple[str, ...]:
        """The path of a part's file."""
        values = _values(transfer, part, head)
        path = tuple(component.fill(values) for component in self._components)
        # Files beside the receipts must not pass for one.
        suffix = f".{RECEIPT}"
        if len(path) == 1 and path[0].lower().endswith(suffix):
            return (path[0][: -len(suffix)] + f"_{RECEIPT}",)
        return path


class _Component:
    """One name of a template: literal text and fields."""

    def __init__(self, text: str) -> None:
        if not text or text in (".", ".."):
            raise ValueError("a relative path without empty names, . or ..")
        try:
            pieces = [*Formatter().parse(text)]
        except ValueError as exc:
            raise ValueError(f"a template with fields like {{transfer}}: {exc}") from None
        for _, field, spec, conversion in pieces:
            if field is not None and (field not in FIELDS or spec or conversion):
                known = ", ".join(f"{{{name}}}" for name in FIELDS)
                raise ValueError(f"a template with no other fields than {known}")
        literals = "".join(literal for literal, *_ in pieces)
        if len(literals.encode()) > LITERAL_MAX or any(_harmless(c) != c for c in literals):
            raise ValueError(
                f"a template of at most {LITERAL_MAX} printable bytes between two slashes, "
                "its fields not counted"
            )
        self._text = text
        self.fields = frozenset(field for _, field, *_ in pieces if field is not None)

    def fill(self, values: dict[str, str]) -> str:
        name = self._text.format_map(values)
        for field in _CLIENTS:
            excess = len(name.encode()) - NAME_MAX
            if excess > 0 and field in self.fields:
                room = max(_FIELD_MIN, len(values[field].encode()) - excess)
                values = values | {field: shorten(values[field], room)}
                name = self._text.format_map(values)
        return shorten(name, NAME_MAX)


def numbered(name: str, number: int) -> str:
    """Another name, for where the first is taken: ``report-2.csv``."""
    stem, suffix = _split(name)
    tail = f"-{number}{suffix}"
    return _cut(stem, NAME_MAX - len(tail.encode())) + tail


def alternatives(name: str, first: int = 2) -> Iterator[str]:
    """``name``, and then numbered ones without end."""
    yield name
    while True:
        yield numbered(name, first)
        first += 1


def _values(transfer: Transfer, part: int, head: PartHead) -> dict[str, str]:
    name = _clean(head.name)
    began = min(max(transfer.began, 0), _LAST_SECOND)
    return {
        "transfer": transfer.id,
        "part": str(part),
        "filename": _clean(head.filename) or name or "body",
        "name": name or "body",
        "route": _clean(transfer.route) or "_",
        "client": "anonymous" if transfer.client is None else _clean(transfer.client) or "_",
        "date": datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d"),
    }


def _clean(text: str | None) -> str:
    """What is harmless of the last component of ``text``; empty if nothing is.

    Never hidden, without separators, controls or text-direction overrides, at most NAME_MAX bytes
    of UTF-8.
    """
    components = [c for c in re.split(r"[/\\]", text or "") if c.strip(". ")]
    if not components:
        return ""
    return shorten("".join(map(_harmless, components[-1])).strip(". "), NAME_MAX)


def _harmless(character: str) -> str:
    # Cc, Cf, Cs, Co, Cn (controls, overrides, surrogates, unassigned); Zl, Zp (line separators).
    category = unicodedata.category(character)
    bad = category[0] == "C" or category in ("Zl", "Zp") or character in _NOT_PORTABLE
    return "_" if bad else character


def shorten(name: str, limit: int) -> str:
    """Cut to ``limit`` bytes of UTF-8, between code points, keeping a short suffix."""
    if len(name.encode()) <= limit:
        return name
    stem, suffix = _split(name)
    if len(suffix) > limit // 2:
        stem, suffix = name, ""
    return _cut(stem, limit - len(suffix.encode())).rstrip(". ") + suffix


def _cut(text: str, limit: int) -> str:
    return text.encode()[:limit].decode(errors="ignore")


def _split(name: str) -> tuple[str, str]:
    """Stem and suffix; the suffix is empty if it is too long to be one."""
    path = PurePath(name)
    suffix = path.suffix
    if PurePath(path.stem).suffix == ".tar":
        suffix = ".tar" + suffix
    if not suffix or len(suffix.encode()) > _SUFFIX_MAX:
        return name, ""
    return name[: -len(suffix)], suffix
