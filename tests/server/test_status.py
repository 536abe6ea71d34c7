"""The status page: whole without JavaScript, and deaf to what is written into it."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from relay.server.status import POLICY, status_page
from tests.server.a_status import a_status

TRANSFER = {
    "transfer": "0199aa",
    "route": "default",
    "client": None,
    "peer": "192.0.2.1:5000",
    "bytes": 3 * 2**20,
    "frames": 24,
    "age_seconds": 2.5,
    "bytes_per_second": 1_258_291,
    "waits_for": "window",
}


class Tables(HTMLParser):
    """The cells of each table by its id, and everything the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.meters: list[float] = []
        self.fetched: list[str] = []
        self._table = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [str(values[name]) for name in ("src", "href") if name in values]
        if tag == "table":
            self._table = str(values["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag == "meter":
            self.meters.append(float(str(values["value"])))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self._table][-1][-1] += data.strip()


def read(transfers: list[dict[str, Any]], **others: object) -> Tables:
    status = {"ready": True, "reason": None, **a_status(**others)}
    page = status_page(status, transfers).body.decode()
    tables = Tables()
    tables.feed(page)
    tables.close()
    assert tables.open == []
    return tables


def test_everything_is_in_the_page_as_it_comes() -> None:
    page = read([TRANSFER])
    assert page.tables["figures"] == [
        ["up for", "1 d 2 h"],
        ["uploads", "1 of 256"],
        ["connections", "2 of 1024"],
        ["receiving", "112.5 MiB/s"],
        ["received", "5.0 GiB"],
        ["memory", "48.0 MiB of 494.0 MiB at the very worst"],
        ["window", "16.0 MiB of 64.0 MiB unconfirmed, 3 uploads waiting"],
        ["event loop", "1.2 ms late at most"],
        ["outcomes", "9 client-gone, 7 committed"],
    ]
    assert page.meters == [0.004, 0.002, 0.097, 0.25]
    assert page.tables["transfers"][1] == [
        *("0199aa", "default", "anonymous", "192.0.2.1:5000"),
        *("3.0 MiB", "1.2 MiB/s", "2.5 s", "window"),
    ]
    assert page.tables["broker"][1:] == [
        ["0", "up", "localhost:5672", ""],
        ["1", "down", "", "refused the login"],
    ]


def test_where_there_is_nothing_it_says_so() -> None:
    page = read([], outcomes={})
    assert page.tables["transfers"][1:] == page.tables["errors"][1:] == [["none"]]
    assert page.tables["figures"][-1] == ["outcomes", "none yet"]


def test_errors_are_told_with_how_often() -> None:
    error = {"time": "2026-11-24T12:00:00Z", "level": "warning", "msg": "lost", "repeated": 4}
    other = {**error, "transfer": "0199", "repeated": 0}
    del other["repeated"]
    assert read([], errors=[error, other]).tables["errors"][1:] == [
        ["2026-11-24T12:00:00Z", "warning", "lost (and 4 more like it)", ""],
        ["2026-11-24T12:00:00Z", "warning", "lost", "0199"],
    ]


def test_what_is_not_ready_says_why() -> None:
    status = {"ready": False, "reason": "broker <away>", **a_status()}
    assert '<span class="bad">broker &lt;away&gt;</span>' in status_page(status, []).body.decode()


@pytest.mark.parametrize("key", ["transfer", "route", "client", "peer"])
def test_no_text_becomes_markup(key: str) -> None:
    evil = '<script>alert(1)</script><b class="x">&amp;'
    page = read([{**TRANSFER, key: evil}])
    assert evil in page.tables["transfers"][1]


def test_it_fetches_nothing_and_lets_nothing_else_run() -> None:
    status = {"ready": True, "reason": None, **a_status()}
    response = status_page(status, [])
    page = response.body.decode()
    assert read([]).fetched == ["data:,"]
    assert response.headers["Content-Security-Policy"] == POLICY
    assert POLICY.startswith("default-src 'none'; ")
    assert "unsafe" not in POLICY
    for tag in ("script", "style"):
        ((found),) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in POLICY
    assert not re.search(r"\son\w+=|\sstyle=", page)


def test_without_javascript_it_comes_again_by_itself() -> None:
    status = {"ready": True, "reason": None, **a_status()}
    page = status_page(status, []).body.decode()
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in page
