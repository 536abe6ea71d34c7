"""The READMEs: every link leads somewhere, and the configuration shown is the default one."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.config import Config, load

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md"] + [
    f"{folder}/README.md"
    for folder in ("relay", "relay/server", "relay/client", "relay/receiver", "systemd", "tests")
]


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """What links may name after ``#``: headings, as GitHub and others make them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)]+)\)", prose(document)):
        if not target.startswith("https://"):
            yield target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    document = ROOT / name
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_readme_is_looked_at() -> None:
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("README.md")}
    assert {name for name in found if not name.startswith(".")} == set(DOCUMENTS)


def test_the_configuration_that_is_shown_is_the_default_one(tmp_path: Path) -> None:
    section = (ROOT / "systemd/README.md").read_text().partition("\n## Configuration\n")[2]
    shown = tmp_path / "relay.toml"
    shown.write_text(section.partition("```toml\n")[2].partition("```")[0])
    assert load(shown) == Config()
