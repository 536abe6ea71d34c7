"""Whatever clients call things, only the operator's template decides where files go."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.model import PartHead, Transfer
from relay.receiver.names import DEFAULT_TEMPLATE, NAME_MAX, Template

ID = "0199c0de-0000-7000-8000-000000000000"
TRANSFER = Transfer(id=ID, began=1_795_500_000, route="scans", client="ann")


def path(template: str, part: int, head: PartHead, transfer: Transfer = TRANSFER) -> str:
    return "/".join(Template(template).path(transfer, part, head))


def part_filename(part: int, head: PartHead) -> str:
    directory, name = Template(DEFAULT_TEMPLATE).path(TRANSFER, part, head)
    assert directory == ID
    return name


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("report.pdf", "3-report.pdf"),
        ("größe 日本.txt", "3-größe 日本.txt"),
        ("../../etc/passwd", "3-passwd"),
        ("/etc/passwd", "3-passwd"),
        ("C:\\fakepath\\x.doc", "3-x.doc"),
        ("a/b/", "3-b"),
        ("..", "3-field"),
        (".", "3-field"),
        ("/", "3-field"),
        ("", "3-field"),
        ("   ", "3-field"),
        (".bashrc", "3-bashrc"),
        ("receipt.json", "3-receipt.json"),
        ("a\0b\n\x1b[31mc", "3-a_b__[31mc"),
        ("invoice\u202efdp.exe", "3-invoice_fdp.exe"),
        ("lone \ud800", "3-lone _"),
        ('what<is>:"this|?*', "3-what_is___this___"),
        ("trailing. . .", "3-trailing"),
        ("x" * 300 + ".tar.gz", "3-" + "x" * 246 + ".tar.gz"),
        ("é" * 200 + ".txt", "3-" + "é" * 124 + ".txt"),
        ("." + "y" * 300, "3-" + "y" * 253),
        ("a." + "y" * 300, "3-a." + "y" * 251),
    ],
)
def test_file_names_from_clients_are_never_paths(filename: str, expected: str) -> None:
    assert part_filename(3, PartHead(name="field", filename=filename)) == expected


def test_a_part_without_a_file_name_is_named_after_its_field_or_not_at_all() -> None:
    assert part_filename(0, PartHead(name="title")) == "0-title"
    assert part_filename(0, PartHead()) == "0-body"
    assert part_filename(0, PartHead(name="..", filename="/")) == "0-body"


@given(st.text(st.characters(), max_size=400), st.integers(0, 10**6))
@example("/" * 300, 0)
@example("\u202e", 0)
@example("é" * 126 + ".", 0)
def test_any_name_becomes_a_harmless_one(filename: str, part: int) -> None:
    name = part_filename(part, PartHead(filename=filename))
    assert name.startswith(f"{part}-")
    assert len(name) > len(f"{part}-")
    assert len(name.encode()) <= NAME_MAX
    assert not set(name) & set('/\\\0<>:"|?*')
    assert not any(unicodedata.category(c)[0] == "C" for c in name)
    assert name[-1] not in ". "
