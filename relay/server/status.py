"""The status page: what the daemon does now, as one self-contained HTML page.

It works without JavaScript, which only fetches it again. Pure: its figures are given to it. Every
text in it is escaped, and the page's own policy lets nothing run but its own script.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any, Final

from relay.server.responses import Response

Document = Mapping[str, Any]

_TEMPLATE: Final = resources.files("relay.server").joinpath("status.html").read_text("utf-8")
_BEFORE, _, _AFTER = _TEMPLATE.partition("<!--main-->")


def _hash_of(tag: str) -> str:
    """What a content security policy allows: the hash of the page's one script or style."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", _TEMPLATE, re.DOTALL)
    assert match is not None
    digest = hashlib.sha256(match[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        f"script-src {_hash_of('script')}",
        f"style-src {_hash_of('style')}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def status_page(status: Document, transfers: Sequence[Document]) -> Response:
    """The page for what ``/status`` and ``/transfers`` say."""
    main = "\n".join(
        (
            _heading(status),
            f"<table id=figures>{_rows(_figures(status))}</table>",
            "<h2>Uploads in progress</h2>",
            _table("transfers", _TRANSFER_HEADS, map(_transfer, transfers)),
            "<h2>Connections to the broker</h2>",
            _table("broker", ("connection", "state", "broker", ""), map(_broker, status["broker"])),
            "<h2>Last warnings and errors</h2>",
            _table("errors", ("time", "level", "what", "transfer"), map(_error, status["errors"])),
        )
    )
    return Response(
        status=200,
        body=(_BEFORE + main + _AFTER).encode(),
        content_type="text/html; charset=utf-8",
        headers={
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def _heading(status: Document) -> str:
    state = ("good", "ready") if status["ready"] else ("bad", str(status["reason"]))
    text = f'<span class="{state[0]}">{escape(state[1])}</span>'
    return f"<h1>relay {escape(status['version'])}: {text}</h1>"


def _figures(status: Document) -> Iterable[Sequence[str]]:
    uploads, connections = status["uploads"], status["connections"]
    memory, window = status["memory"], status["window"]
    waiting = f", {window['waiting']} uploads waiting" if window["waiting"] else ""
    outcomes = sorted(status["outcomes"].items(), key=lambda item: -item[1])
    for name, text, share in (
        ("up for", _duration(status["uptime_seconds"]), None),
        (
            "uploads",
            f"{uploads['in_progress']} of {uploads['limit']}",
            uploads["in_progress"] / uploads["limit"],
        ),
        (
            "connections",
            f"{connections['open']} of {connections['limit']}",
            connections["open"] / connections["limit"],
        ),
        ("receiving", f"{_size(status['bytes_per_second'])}/s", None),
        ("received", _size(status["bytes_received"]), None),
        (
            "memory",
            f"{_size(memory['resident'])} of {_size(memory['ceiling'])} at the very worst",
            memory["resident"] / memory["ceiling"],
        ),
        (
            "window",
            f"{_size(window['used'])} of {_size(window['size'])} unconfirmed{waiting}",
            window["used"] / window["size"],
        ),
        ("event loop", f"{status['event_loop_lag_seconds'] * 1000:.1f} ms late at most", None),
        (
            "outcomes",
            ", ".join(f"{number} {name}" for name, number in outcomes) or "none yet",
            None,
        ),
    ):
        yield _head(name), _cell(text, more="" if share is None else _meter(share))


_TRANSFER_HEADS: Final = (
    *("transfer", "route", "client", "peer"),
    *("received", "rate", "age", "waits for"),
)


def _transfer(transfer: Document) -> Sequence[str]:
    return (
        _cell(transfer["transfer"], "id"),
        _cell(transfer["route"]),
        _cell(transfer["client"] or "anonymous"),
        _cell(transfer["peer"]),
        _cell(_size(transfer["bytes"]), "number"),
        _cell(f"{_size(transfer['bytes_per_second'])}/s", "number"),
        _cell(_duration(transfer["age_seconds"]), "number"),
        _cell(transfer["waits_for"] or "nothing"),
    )


def _broker(connection: Document) -> Sequence[str]:
    state = connection["state"]
    return (
        _cell(str(connection["connection"])),
        _cell(state, "good" if state == "up" else "bad"),
        _cell(connection["broker"] or ""),
        _cell(connection["detail"] or ""),
    )


def _error(error: Document) -> Sequence[str]:
    repeated = f" (and {error['repeated']} more like it)" if "repeated" in error else ""
    return (
        _cell(str(error["time"])),
        _cell(str(error["level"])),
        _cell(f"{error['msg']}{repeated}"),
        _cell(str(error.get("transfer", "")), "id"),
    )


def _table(name: str, heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    body = _rows(rows) or f"<tr>{_cell('none', 'dim')}</tr>"
    head = "".join(map(_head, heads))
    return f"<table id={name}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)


def _head(text: str) -> str:
    return f"<th>{escape(text)}</th>"


def _cell(text: str, kind: str = "", *, more: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(text)}{more}</td>"


def _meter(share: float) -> str:
    return f' <meter high="0.9" value="{share:.3f}"></meter>'


_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def _size(number: float) -> str:
    """Bytes, in the unit in which people think of so many."""
    if number < 1000:
        return f"{number} B"
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {_UNITS[unit]}"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s"
