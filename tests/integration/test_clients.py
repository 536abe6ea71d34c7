"""What real clients send arrives, byte for byte, in frames as the wire format has them.

Each upload is compared three times: the receipt with what was sent, every message in the queue
with what the wire format says it must be, and the bytes that the receiving half puts together.
"""

import base64
import hashlib
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c
import httpx
import pika
import pytest
import requests
from pika.compat import long

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from relay.protocol.framing import RECEIPT_TEXT
from tests.queue_reader import Delivered, messages_in, messages_left, reassemble
from tests.uploading import (
    FRAME_SIZE,
    Answer,
    Part,
    RawConnection,
    browser_form,
    chunked,
    content,
    request,
    request_head,
)

QUEUE = "clients"
SMALL_QUEUE = "clients.small"
SMALL_FRAME_SIZE = 4096
CONFIG = f"""
[routes.clients]
routing_key = "{QUEUE}"
[routes.clients.queue]
name = "{QUEUE}"
type = "classic"
arguments = {{}}

[routes.small]
routing_key = "{SMALL_QUEUE}"
frame_size = {SMALL_FRAME_SIZE}
persistent = false
digests = ["sha-512"]
[routes.small.queue]
name = "{SMALL_QUEUE}"
type = "quorum"
arguments = {{ x-overflow = "reject-publish", x-single-active-consumer = true }}
"""
SIZES = [0, 1, FRAME_SIZE - 1, FRAME_SIZE, FRAME_SIZE + 1]
LARGE = 64 << 20
SEVERAL = [
    Part(b"", "leer"),
    Part("Grüße".encode(), "größe"),
    Part(content(FRAME_SIZE + 1), "文件", "ファイル.bin", "application/x-test"),
    Part(b"", "empty file", "нуль.txt", "text/plain"),
    Part(content(FRAME_SIZE), "a", "one.bin", "application/octet-stream"),
    Part(content(1), "a", "two.bin", "application/octet-stream"),
    Part(content(2 * FRAME_SIZE), "field without a filename"),
    Part(content(70), 'say "hi"', 'a "quoted" name.txt', "text/plain; charset=utf-8"),
    Part(content(71), "😀", "a;b=c, d.txt", "text/plain"),
]
WINDOWS_PATH = "C:\\Users\\Jörg\\bild 1.png"


@pytest.fixture(scope="module")
def daemon(rabbitmq: RabbitMQNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose routes lead to queues of these tests' own."""
    with Daemon(rabbitmq.url, CONFIG, directory=tmp_path_factory.mktemp("daemon")) as running:
        yield running


@pytest.fixture
def queues(daemon: Daemon, rabbitmq: RabbitMQNode) -> None:
    """Nothing in the queues, whatever an earlier test left there."""
    assert daemon.ready()[0] == 200
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    for queue in (QUEUE, SMALL_QUEUE):
        connection.channel().queue_purge(queue)
    connection.close()


# --- clients -----------------------------------------------------------------------------------
# Each sends parts to a route and returns the answer.


def curl(*arguments: str, stdin: bytes = b"") -> Answer:
    """Run curl; the last line of its output is the status."""
    command = ["curl", "--silent", "--show-error", "--max-time", "60", "--noproxy", "*"]
    done = subprocess.run(
        [*command, "--write-out", "\n%{http_code}", *arguments],
        input=stdin,
        capture_output=True,
        check=True,
    )
    body, _, status = done.stdout.rpartition(b"\n")
    return Answer(int(status), body)


def curl_form(daemon: Daemon, route: str, parts: Sequence[Part], directory: Path) -> Answer:
    """``curl -F``: files with @, fields with <, both read from disk."""
    arguments = []
    for number, part in enumerate(parts):
        path = directory / f"part-{number}"
        path.write_bytes(part.data)
        form = f'{part.name}={"<" if part.filename is None else "@"}"{path}"'
        if part.content_type is not None:
            form += f";type={part.content_type}"
        if part.filename is not None:
            escaped = part.filename.replace("\\", "\\\\").replace('"', '\\"')
            form += f';filename="{escaped}"'
        arguments += ["--form", form]
    return curl(*arguments, f"{daemon.url}/upload/{route}")


def _files(parts: Sequence[Part]) -> Any:
    """As both libraries take them; each types them in a way of its own."""
    return [(part.name or "", (part.filename, part.data, part.content_type)) for part in parts]


def requests_form(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """``requests.post(files=…)``."""
    url = f"{daemon.url}/upload/{route}"
    response = requests.post(url, files=_files(parts), timeout=60)
    return Answer(response.status_code, response.content)


def httpx_form(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """``httpx.post(files=…)``."""
    url = f"{daemon.url}/upload/{route}"
    response = httpx.post(url, files=_files(parts), timeout=60, trust_env=False)
    return Answer(response.status_code, response.content)


def browser(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """A form's body as browsers make it."""
    content_type, body = browser_form(parts)
    with RawConnection(daemon.address) as connection:
        connection.send(request(f"/upload/{route}", body, content_type))
        return connection.answer()


def curl_put(daemon: Daemon, route: str, parts: Sequence[Part], directory: Path) -> Answer:
    """``curl -T FILE URL/upload/ROUTE/``: curl appends the file's name."""
    (part,) = parts
    path = directory / str(part.filename)
    path.write_bytes(part.data)
    return curl("--globoff", "--upload-file", str(path), f"{daemon.url}/upload/{route}/")


def requests_raw(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """``requests.put(data=bytes)``."""
    (part,) = parts
    url = f"{daemon.url}/upload/{route}/{quote(str(part.filename), safe='')}"
    response = requests.put(url, data=part.data, timeout=60)
    return Answer(response.status_code, response.content)


def httpx_raw(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """``httpx.put(content=bytes)``."""
    (part,) = parts
    url = f"{daemon.url}/upload/{route}/{quote(str(part.filename), safe='')}"
    response = httpx.put(url, content=part.data, timeout=60, trust_env=False)
    return Answer(response.status_code, response.content)


def curl_stdin(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """``curl -T -``: chunked, because nobody knows the size."""
    (part,) = parts
    name = quote(str(part.filename), safe="")
    return curl("--upload-file", "-", f"{daemon.url}/upload/{route}/{name}", stdin=part.data)


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 10_007):
        yield data[start : start + 10_007]


def requests_chunked(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """``requests.put(data=generator)``."""
    (part,) = parts
    url = f"{daemon.url}/upload/{route}/{quote(str(part.filename), safe='')}"
    response = requests.put(url, data=_pieces(part.data), timeout=60)
    return Answer(response.status_code, response.content)


def httpx_chunked(daemon: Daemon, route: str, parts: Sequence[Part], _directory: Path) -> Answer:
    """``httpx.put(content=iterator)``."""
    (part,) = parts
    url = f"{daemon.url}/upload/{route}/{quote(str(part.filename), safe='')}"
    response = httpx.put(url, content=_pieces(part.data), timeout=60, trust_env=False)
    return Answer(response.status_code, response.content)


Client = Callable[[Daemon, str, Sequence[Part], Path], Answer]
FORM_CLIENTS: list[Client] = [curl_form, requests_form, httpx_form, browser]
RAW_CLIENTS: list[Client] = [curl_put, requests_raw, httpx_raw]
CHUNKED_CLIENTS: list[Client] = [curl_stdin, requests_chunked, httpx_chunked]


# --- what must have arrived --------------------------------------------------------------------


def digests_of(data: bytes, algorithms: Sequence[str]) -> dict[str, str]:
    """The digests of a part, as receipts and frames give them."""
    digests = {"crc32c": f"{google_crc32c.value(data):08x}"}
    for name in algorithms:
        digests[name] = hashlib.new(name.replace("-", ""), data).hexdigest()
    return digests


def cut(data: bytes, frame_size: int) -> list[bytes]:
    """The bodies of a part's frames."""
    return [data[at : at + frame_size] for at in range(0, len(data), frame_size)] or [b""]


def expected_receipt(
    transfer: str, route: str, parts: Sequence[Part], frame_size: int, digests: Sequence[str]
) -> dict[str, Any]:
    """Section 3 of the contract."""
    listed = []
    for number, part in enumerate(parts):
        entry: dict[str, Any] = {"part": number}
        for key in ("name", "filename", "content_type"):
            if (value := getattr(part, key)) is not None:
                entry[key] = value
        entry["bytes"] = len(part.data)
        entry["frames"] = len(cut(part.data, frame_size))
        entry["digest"] = digests_of(part.data, digests)
        listed.append(entry)
    return {
        "transfer": transfer,
        "route": route,
        "frames": sum(entry["frames"] for entry in listed),
        "bytes": sum(entry["bytes"] for entry in listed),
        "parts": listed,
    }


def expected_messages(
    route: str, parts: Sequence[Part], frame_size: int, digests: Sequence[str]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Headers and body of every frame; integers that AMQP calls long are ``long``."""
    seq = 0
    frames = sum(len(cut(part.data, frame_size)) for part in parts)
    for number, part in enumerate(parts):
        bodies = cut(part.data, frame_size)
        for turn, body in enumerate(bodies):
            headers: dict[str, Any] = {"relay": 1, "seq": long(seq), "part": number}
            headers["offset"] = long(turn * frame_size)
            headers["crc32c"] = long(google_crc32c.value(body))
            if turn == 0:
                described = {"name": part.name, "filename": part.filename}
                described["content-type"] = part.content_type
                headers |= {key: text for key, text in described.items() if text is not None}
            if turn == len(bodies) - 1:
                headers |= {"last": True, "size": long(len(part.data))}
                headers["digest"] = table = digests_of(part.data, digests)
                headers |= {f"digest-{algorithm}": text for algorithm, text in table.items()}
            if seq == frames - 1:
                headers |= {"commit": True, "frames": long(frames), "parts": long(len(parts))}
                headers["bytes"] = long(sum(len(part.data) for part in parts))
            if seq in (0, frames - 1):
                headers["route"] = route
            yield headers, body
            seq += 1


def check_messages(
    messages: Sequence[Delivered],
    transfer: str,
    expected: Iterator[tuple[dict[str, Any], bytes]],
    *,
    delivery_mode: int = 2,
) -> None:
    """Section 1 of the contract, message by message."""
    for seq, (message, (headers, body)) in enumerate(zip(messages, expected, strict=True)):
        properties = message.properties
        assert properties.headers == headers
        assert {k: type(v) for k, v in properties.headers.items()} == {
            k: type(v) for k, v in headers.items()
        }
        assert message.body == body
        assert properties.app_id == "relay"
        assert properties.type == "frame"
        assert properties.correlation_id == transfer
        assert properties.message_id == f"{transfer}.{seq}"
        assert properties.content_type == "application/octet-stream"
        assert properties.delivery_mode == delivery_mode
        assert properties.timestamp == messages[0].properties.timestamp


def check_identity(messages: Sequence[Delivered], transfer: str, began: float) -> None:
    """The transfer's id is a UUID version 7 of the time in which it began, as is the timestamp."""
    identity = uuid.UUID(transfer)
    assert transfer == str(identity)
    assert (identity.version, identity.variant) == (7, uuid.RFC_4122)
    assert int(began * 1000) <= identity.int >> 80 <= int(time.time() * 1000)
    assert int(began) <= (messages[0].properties.timestamp or 0) <= int(time.time())


def check_upload(
    rabbitmq: RabbitMQNode,
    answer: Answer,
    parts: Sequence[Part],
    *,
    began: float,
    digests: Sequence[str] = (),
) -> None:
    """One upload to the route ``clients``, the only one in its queue."""
    assert answer.status == 201, answer.body
    receipt = answer.json()
    transfer = receipt["transfer"]
    assert receipt == expected_receipt(transfer, "clients", parts, FRAME_SIZE, digests)
    messages = messages_in(rabbitmq.url, QUEUE, ended=1)
    check_messages(messages, transfer, expected_messages("clients", parts, FRAME_SIZE, digests))
    check_identity(messages, transfer, began)
    assert messages_left(rabbitmq.url, QUEUE) == 0
    received = reassemble(message.decode() for message in messages)
    assert list(received) == [transfer]
    assert received[transfer].committed
    assert [bytes(part.data) for part in received[transfer].parts] == [p.data for p in parts]


# --- tests -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("client", FORM_CLIENTS)
def test_a_file_in_a_form_arrives_byte_for_byte(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path, client: Client, size: int
) -> None:
    part = Part(content(size), "file", "größe ü.bin", "application/octet-stream")
    began = time.time()
    answer = client(daemon, "clients", [part], tmp_path)
    check_upload(rabbitmq, answer, [part], began=began)


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("client", RAW_CLIENTS + CHUNKED_CLIENTS)
def test_a_raw_body_arrives_byte_for_byte(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path, client: Client, size: int
) -> None:
    part = Part(content(size), filename="100% größe [文件].bin")
    began = time.time()
    answer = client(daemon, "clients", [part], tmp_path)
    check_upload(rabbitmq, answer, [part], began=began)


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("client", [curl_form, requests_form, httpx_form, browser, curl_put])
def test_a_large_file_arrives_byte_for_byte(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path, client: Client
) -> None:
    data = content(LARGE)
    part = Part(data, "file", "large.bin", "application/octet-stream")
    if client is curl_put:
        part = Part(data, filename="large.bin")
    began = time.time()
    answer = client(daemon, "clients", [part], tmp_path)
    check_upload(rabbitmq, answer, [part], began=began)


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("client", FORM_CLIENTS)
def test_fields_and_files_with_any_names_arrive_in_order(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path, client: Client
) -> None:
    began = time.time()
    answer = client(daemon, "clients", SEVERAL, tmp_path)
    check_upload(rabbitmq, answer, SEVERAL, began=began)


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("client", FORM_CLIENTS)
def test_a_windows_path_arrives_as_sent(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path, client: Client
) -> None:
    part = Part(content(10), "file", WINDOWS_PATH, "image/png")
    began = time.time()
    answer = client(daemon, "clients", [part], tmp_path)
    if client is httpx_form:
        # It doubles backslashes, as no browser does; what it sent is what arrives.
        part = Part(part.data, part.name, WINDOWS_PATH.replace("\\", "\\\\"), part.content_type)
    check_upload(rabbitmq, answer, [part], began=began)


@pytest.mark.usefixtures("queues")
def test_line_breaks_in_a_browsers_names_arrive(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    part = Part(content(10), "two\r\nlines", 'x"\r\ny', "text/plain")
    began = time.time()
    answer = browser(daemon, "clients", [part], tmp_path)
    check_upload(rabbitmq, answer, [part], began=began)


@pytest.mark.usefixtures("queues")
def test_a_raw_body_keeps_its_type_and_the_name_in_its_disposition(
    daemon: Daemon, rabbitmq: RabbitMQNode
) -> None:
    began = time.time()
    disposition = "attachment; filename=\"x.bin\"; filename*=UTF-8''gr%C3%B6%C3%9Fe.bin"
    answer = curl(
        *("--data-binary", "@-", "--header", "Content-Type: application/x-test; v=1"),
        *("--header", f"Content-Disposition: {disposition}", f"{daemon.url}/upload/clients"),
        stdin=content(1000),
    )
    part = Part(content(1000), None, "größe.bin", "application/x-test; v=1")
    check_upload(rabbitmq, answer, [part], began=began)


@pytest.mark.usefixtures("queues")
def test_a_body_from_standard_input_needs_no_name(daemon: Daemon, rabbitmq: RabbitMQNode) -> None:
    began = time.time()
    answer = curl("-T", "-", f"{daemon.url}/upload/clients/", stdin=content(FRAME_SIZE))
    check_upload(rabbitmq, answer, [Part(content(FRAME_SIZE))], began=began)


@pytest.mark.usefixtures("queues")
def test_a_form_may_be_chunked(daemon: Daemon, rabbitmq: RabbitMQNode) -> None:
    content_type, body = browser_form(SEVERAL)
    head = "POST /upload/clients HTTP/1.1\r\nHost: relay.test\r\nTransfer-Encoding: chunked\r\n"
    began = time.time()
    with RawConnection(daemon.address) as connection:
        connection.send(f"{head}Content-Type: {content_type}\r\n\r\n".encode())
        connection.send(chunked(body, [1, 8191, 70_001, 3]))
        answer = connection.answer()
    check_upload(rabbitmq, answer, SEVERAL, began=began)


@pytest.mark.usefixtures("queues")
def test_curl_that_waits_for_100_continue_gets_it(daemon: Daemon, rabbitmq: RabbitMQNode) -> None:
    # curl would send the body after a minute without 100, but gives up before.
    patience = ("--expect100-timeout", "120", "--header", "Expect: 100-continue")
    began = time.time()
    answer = curl(*patience, "--data-binary", "@-", f"{daemon.url}/upload/clients", stdin=b"body")
    part = Part(b"body", content_type="application/x-www-form-urlencoded")
    check_upload(rabbitmq, answer, [part], began=began)


@pytest.mark.usefixtures("queues")
def test_100_continue_comes_before_the_body_and_once(
    daemon: Daemon, rabbitmq: RabbitMQNode
) -> None:
    data = content(FRAME_SIZE)
    began = time.time()
    with RawConnection(daemon.address) as connection:
        connection.send(request_head("/upload/clients", len(data), None, "Expect: 100-continue"))
        assert connection.interim() == 100
        connection.send(data)
        answer = connection.answer()
    check_upload(rabbitmq, answer, [Part(data)], began=began)


def test_a_refused_upload_is_not_told_to_continue(daemon: Daemon) -> None:
    with RawConnection(daemon.address) as connection:
        connection.send(request_head("/upload/nowhere", 1000, None, "Expect: 100-continue"))
        answer = connection.answer()
        assert (answer.status, answer.json()["code"]) == (404, "not-found")
        assert connection.at_end()


@pytest.mark.usefixtures("queues")
def test_one_connection_takes_one_upload_after_the_other(
    daemon: Daemon, rabbitmq: RabbitMQNode
) -> None:
    form = Part(content(FRAME_SIZE + 1), "file", "x.bin", "text/plain")
    raw = Part(content(10))
    content_type, body = browser_form([form])
    with RawConnection(daemon.address) as connection:
        for _ in range(2):
            began = time.time()
            connection.send(request("/upload/clients", body, content_type))
            check_upload(rabbitmq, connection.answer(), [form], began=began)
            began = time.time()
            connection.send(request("/upload/clients", raw.data))
            check_upload(rabbitmq, connection.answer(), [raw], began=began)


@pytest.mark.usefixtures("queues")
def test_a_session_of_requests_stays_on_its_connection(daemon: Daemon) -> None:
    with requests.Session() as session:
        url = f"{daemon.url}/upload/clients"
        answers = [session.post(url, data=_pieces(content(20_000)), timeout=60) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [201] * 3
        transfers = [answer.json()["transfer"] for answer in answers]
    peers = {
        line.split("peer=")[1].split()[0]
        for line in daemon.log
        if "peer=" in line and any(transfer in line for transfer in transfers)
    }
    assert len(peers) == 1


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("is_chunked", [False, True])
def test_pipelined_uploads_are_answered_in_order(
    daemon: Daemon, rabbitmq: RabbitMQNode, is_chunked: bool
) -> None:
    form = Part(content(FRAME_SIZE + 7), "file", "größe.bin", "text/plain")
    raw = Part(content(300_000))
    content_type, body = browser_form([form])
    first = request("/upload/clients", body, content_type)
    if is_chunked:
        head = "POST /upload/clients HTTP/1.1\r\nHost: relay.test\r\nTransfer-Encoding: chunked\r\n"
        first = f"{head}Content-Type: {content_type}\r\n\r\n".encode() + chunked(body, [10_000])
    began = time.time()
    with RawConnection(daemon.address) as connection:
        connection.send(first + request("/upload/clients", raw.data))
        answers = [connection.answer(), connection.answer()]
    assert [answer.status for answer in answers] == [201, 201]
    messages = messages_in(rabbitmq.url, QUEUE, ended=2)
    for answer, part in zip(answers, [form, raw], strict=True):
        transfer = answer.json()["transfer"]
        assert answer.json() == expected_receipt(transfer, "clients", [part], FRAME_SIZE, ())
        own = [m for m in messages if m.properties.correlation_id == transfer]
        check_messages(own, transfer, expected_messages("clients", [part], FRAME_SIZE, ()))
        check_identity(own, transfer, began)


@pytest.mark.usefixtures("queues")
def test_a_route_decides_frame_size_digests_and_persistence(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    parts = [Part(content(3 * SMALL_FRAME_SIZE), "a", "a.bin", "text/plain"), Part(b"b", "b")]
    answer = browser(daemon, "small", parts, tmp_path)
    assert answer.status == 201
    transfer = answer.json()["transfer"]
    digests = ["sha-512"]
    expected = expected_receipt(transfer, "small", parts, SMALL_FRAME_SIZE, digests)
    assert answer.json() == expected
    messages = messages_in(rabbitmq.url, SMALL_QUEUE, ended=1)
    check_messages(
        messages,
        transfer,
        expected_messages("small", parts, SMALL_FRAME_SIZE, digests),
        delivery_mode=1,
    )


@pytest.mark.usefixtures("queues")
def test_a_receipt_lists_the_first_parts_and_counts_the_rest(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    parts = [Part(b"%d" % number, f"field {number}") for number in range(150)]
    answer = browser(daemon, "clients", parts, tmp_path)
    assert answer.status == 201
    receipt = answer.json()
    whole = expected_receipt(receipt["transfer"], "clients", parts, FRAME_SIZE, ())
    assert receipt == whole | {"parts": whole["parts"][:100], "parts_omitted": 50}
    messages = messages_in(rabbitmq.url, QUEUE, ended=1)
    expected = expected_messages("clients", parts, FRAME_SIZE, ())
    check_messages(messages, receipt["transfer"], expected)


@pytest.mark.usefixtures("queues")
def test_a_receipt_of_long_names_lists_fewer_parts(
    daemon: Daemon, rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    parts = [Part(b"%d" % number, "n" * 3000) for number in range(20)]
    parts.append(Part(b"short", "short"))
    answer = browser(daemon, "clients", parts, tmp_path)
    assert answer.status == 201
    receipt = answer.json()
    whole = expected_receipt(receipt["transfer"], "clients", parts, FRAME_SIZE, ())
    listed = RECEIPT_TEXT // 3000
    omitted = len(parts) - listed
    assert receipt == whole | {"parts": whole["parts"][:listed], "parts_omitted": omitted}
    messages = messages_in(rabbitmq.url, QUEUE, ended=1)
    expected = expected_messages("clients", parts, FRAME_SIZE, ())
    check_messages(messages, receipt["transfer"], expected)


# --- digests -----------------------------------------------------------------------------------


def _field(name: str, algorithm: str, data: bytes) -> str:
    if algorithm == "crc32c":
        digest = google_crc32c.value(data).to_bytes(4, "big")
    else:
        digest = hashlib.new(algorithm.replace("-", ""), data).digest()
    return f"{name}: {algorithm}=:{base64.b64encode(digest).decode()}:"


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512", "crc32c"])
@pytest.mark.parametrize("name", ["Repr-Digest", "Content-Digest"])
def test_a_body_that_matches_its_digest_is_taken(
    daemon: Daemon, rabbitmq: RabbitMQNode, name: str, algorithm: str
) -> None:
    data = content(FRAME_SIZE + 1)
    began = time.time()
    with RawConnection(daemon.address) as connection:
        connection.send(request("/upload/clients", data, None, _field(name, algorithm, data)))
        answer = connection.answer()
    digests = [] if algorithm == "crc32c" else [algorithm]
    check_upload(rabbitmq, answer, [Part(data)], began=began, digests=digests)


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize("algorithm", ["sha-256", "crc32c"])
@pytest.mark.parametrize("name", ["Repr-Digest", "Content-Digest"])
def test_a_body_that_does_not_match_its_digest_is_never_committed(
    daemon: Daemon, rabbitmq: RabbitMQNode, name: str, algorithm: str
) -> None:
    data = content(2 * FRAME_SIZE + 1)
    wrong = _field(name, algorithm, data[:-1])
    with RawConnection(daemon.address) as connection:
        connection.send(request("/upload/clients", data, None, wrong))
        answer = connection.answer()
        assert (answer.status, answer.json()["code"]) == (422, "digest-mismatch")
        # The body was read to its end, so that the connection goes on.
        connection.send(request("/upload/clients", b"next"))
        assert connection.answer().status == 201
    messages = messages_in(rabbitmq.url, QUEUE, ended=2)
    received = reassemble(message.decode() for message in messages)
    failed = received[answer.json()["transfer"]]
    assert not failed.committed
    assert failed.aborted == "digest-mismatch"


@pytest.mark.usefixtures("queues")
def test_digests_that_a_client_wants_are_in_receipt_and_frames(
    daemon: Daemon, rabbitmq: RabbitMQNode
) -> None:
    content_type, body = browser_form(SEVERAL)
    wanted = "Want-Repr-Digest: sha-256=1, md5=3, sha-512=0"
    began = time.time()
    with RawConnection(daemon.address) as connection:
        connection.send(request("/upload/clients", body, content_type, wanted))
        answer = connection.answer()
    check_upload(rabbitmq, answer, SEVERAL, began=began, digests=["sha-256"])
