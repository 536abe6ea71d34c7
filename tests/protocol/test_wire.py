"""The wire format as the contract with consumers has it, on the wire itself and back."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pika.compat import long
from pika.spec import BasicProperties

from relay.model import Abort, Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol.framing import Framer
from relay.protocol.wire import (
    HeaderValue,
    Message,
    NotRelay,
    WireError,
    decode,
    encode_abort,
    encode_frame,
)
from tests.observed_receiver import properties_of

ID = "0199c0de-0000-7000-8000-000000000001"
TRANSFER = Transfer(
    id=ID, began=1_700_000_000, route="photos", client="zoë", idempotency_key="key-1"
)
ANONYMOUS = Transfer(id=ID, began=1_700_000_000, route="default")
CRC_OF_A = 0xC1D04330
CRC_OF_B = 0x364B3FB7

# The header tables of the contract: name to type letter of AMQP 0-9-1 as RabbitMQ has them.
# "I" is a signed 32-bit integer, "l" a signed 64-bit one, "S" text, "t" a boolean, "F" a table.
ON_EVERY_FRAME = {"relay": "I", "seq": "l", "part": "I", "offset": "l", "crc32c": "l"}
ON_THE_FIRST_OF_A_PART = {"name": "S", "filename": "S", "content-type": "S"}
ON_THE_FIRST_OF_THE_TRANSFER = {"route": "S", "client": "S", "idempotency-key": "S"}
ON_THE_LAST_OF_A_PART = {"last": "t", "size": "l", "digest": "F"}
ON_THE_COMMIT_FRAME = {
    "commit": "t",
    "frames": "l",
    "parts": "l",
    "bytes": "l",
    **ON_THE_FIRST_OF_THE_TRANSFER,
}
ON_AN_ABORT = {"relay": "I", "seq": "l", "reason": "S"}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
longs = st.integers(0, 2**63 - 1)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """Any frame, with what the format does not carry on it left out of its transfer."""
    seq = draw(st.just(0) | longs)
    commit = draw(st.none() | st.builds(Totals, longs, longs, longs))
    transfer = Transfer(id=draw(st.uuids()).__str__(), began=draw(st.integers(0, 2**40)), route="")
    if seq == 0 or commit is not None:
        transfer = replace(
            transfer,
            route=draw(texts),
            client=draw(st.none() | texts),
            idempotency_key=draw(st.none() | texts),
        )
    offset = draw(st.just(0) | longs)
    optional = st.none() | texts
    heads = st.builds(PartHead, name=optional, filename=optional, content_type=optional)
    keys = st.sampled_from(["crc32c", "sha-256", "sha-512", "new"])
    tails = st.builds(PartTail, longs, st.dictionaries(keys, texts))
    return Frame(
        transfer,
        seq,
        draw(st.integers(0, 2**31 - 1)),
        offset,
        draw(st.binary(max_size=40)),
        draw(st.integers(0, 2**32 - 1)),
        draw(heads) if offset == 0 else None,
        draw(tails if commit else st.none() | tails),
        commit,
    )


def on_the_wire(message: Message, delivery_mode: int = 2) -> bytes:
    """The message's properties, marshalled by pika."""
    return b"".join(properties_of(message, delivery_mode=delivery_mode).encode())


def received(wire: bytes) -> BasicProperties:
    properties = BasicProperties()
    properties.decode(wire)
    return properties


def decoded(properties: BasicProperties, body: bytes) -> Frame | Abort:
    return decode(
        app_id=properties.app_id,
        type=properties.type,
        correlation_id=properties.correlation_id,
        timestamp=properties.timestamp,
        headers=properties.headers,
        body=body,
    )


def letter_of(value: object) -> str:
    """The type letter that a value had on the wire, by what pika makes of it."""
    kinds = ((bool, "t"), (long, "l"), (int, "I"), (str, "S"), (dict, "F"))
    return next(letter for kind, letter in kinds if isinstance(value, kind))


# --- golden examples: one of each kind of frame ------------------------------------------------

FIRST = Frame(
    TRANSFER,
    0,
    0,
    0,
    b"a",
    CRC_OF_A,
    PartHead(name="f", filename="C:\\dir\\ä.bin", content_type="image/png"),
)
MIDDLE = Frame(TRANSFER, 1, 0, 131064, b"a", CRC_OF_A)
LAST_OF_PART = Frame(
    TRANSFER, 2, 0, 262128, b"a", CRC_OF_A, None, PartTail(262129, {"crc32c": "0012ab00"})
)
NEXT_PART = Frame(TRANSFER, 3, 1, 0, b"b", CRC_OF_B, PartHead(name="g"))
EMPTY_PART = Frame(
    TRANSFER, 4, 1, 0, b"", 0, PartHead(name=""), PartTail(0, {"crc32c": "00000000"})
)
COMMIT = Frame(
    TRANSFER,
    5,
    2,
    131064,
    b"b",
    CRC_OF_B,
    None,
    PartTail(131065, {"crc32c": "ffffffff", "sha-256": "00ff"}),
    Totals(6, 3, 393194),
)
ALL_AT_ONCE = Frame(
    ANONYMOUS,
    0,
    0,
    0,
    b"a",
    CRC_OF_A,
    PartHead(),
    PartTail(1, {"crc32c": "c1d04330"}),
    Totals(1, 1, 1),
)

EVERY = {"relay": 1, "part": 0, "crc32c": CRC_OF_A}
GOLDEN: list[tuple[str, Frame, Mapping[str, HeaderValue]]] = [
    (
        "first of the transfer",
        FIRST,
        {
            **EVERY,
            "seq": 0,
            "offset": 0,
            "name": "f",
            "filename": "C:\\dir\\ä.bin",
            "content-type": "image/png",
            "route": "photos",
            "client": "zoë",
            "idempotency-key": "key-1",
        },
    ),
    ("in the middle", MIDDLE, {**EVERY, "seq": 1, "offset": 131064}),
    (
        "last of a part",
        LAST_OF_PART,
        {
            **EVERY,
            "seq": 2,
            "offset": 262128,
            "last": True,
            "size": 262129,
            "digest": {"crc32c": "0012ab00"},
            "digest-crc32c": "0012ab00",
        },
    ),
    (
        "first of a later part, a plain field",
        NEXT_PART,
        {"relay": 1, "seq": 3, "part": 1, "offset": 0, "crc32c": CRC_OF_B, "name": "g"},
    ),
    (
        "an empty part",
        EMPTY_PART,
        {
            "relay": 1,
            "seq": 4,
            "part": 1,
            "offset": 0,
            "crc32c": 0,
            "name": "",
            "last": True,
            "size": 0,
            "digest": {"crc32c": "00000000"},
            "digest-crc32c": "00000000",
        },
    ),
    (
        "commit",
        COMMIT,
        {
            "relay": 1,
            "seq": 5,
            "part": 2,
            "offset": 131064,
            "crc32c": CRC_OF_B,
            "last": True,
            "size": 131065,
            "digest": {"crc32c": "ffffffff", "sha-256": "00ff"},
            "digest-crc32c": "ffffffff",
            "digest-sha-256": "00ff",
            "commit": True,
            "frames": 6,
            "parts": 3,
            "bytes": 393194,
            "route": "photos",
            "client": "zoë",
            "idempotency-key": "key-1",
        },
    ),
    (
        "first, last and commit at once, raw and anonymous",
        ALL_AT_ONCE,
        {
            **EVERY,
            "seq": 0,
            "offset": 0,
            "last": True,
            "size": 1,
            "digest": {"crc32c": "c1d04330"},
            "digest-crc32c": "c1d04330",
            "commit": True,
            "frames": 1,
            "parts": 1,
            "bytes": 1,
            "route": "default",
        },
    ),
]


@pytest.mark.parametrize(
    ("frame", "headers"), [(f, h) for _, f, h in GOLDEN], ids=[name for name, _, _ in GOLDEN]
)
def test_a_frame_has_the_headers_of_the_contract_and_no_others(
    frame: Frame, headers: Mapping[str, HeaderValue]
) -> None:
    properties = received(on_the_wire(encode_frame(frame)))
    assert properties.headers == headers


@pytest.mark.parametrize("delivery_mode", [1, 2])
@pytest.mark.parametrize("seq", [0, 7, 2**40])
def test_every_frame_has_the_properties_of_the_contract(seq: int, delivery_mode: int) -> None:
    message = encode_frame(MIDDLE._replace(seq=seq))
    assert message.body == b"a"
    properties = received(on_the_wire(message, delivery_mode))
    assert {key: value for key, value in vars(properties).items() if value is not None} == {
        "app_id": "relay",
        "type": "frame",
        "correlation_id": ID,
        "message_id": f"{ID}.{seq}",
        "content_type": "application/octet-stream",
        "delivery_mode": delivery_mode,
        "timestamp": 1_700_000_000,
        "headers": properties.headers,
    }


def test_an_abort_is_as_the_contract_says() -> None:
    message = encode_abort(TRANSFER, 4, "client-gone")
    assert message.body == b""
    properties = received(on_the_wire(message))
    assert {key: value for key, value in vars(properties).items() if value is not None} == {
        "app_id": "relay",
        "type": "abort",
        "correlation_id": ID,
        "message_id": f"{ID}.4",
        "content_type": "application/octet-stream",
        "delivery_mode": 2,
        "timestamp": 1_700_000_000,
        "headers": {"relay": 1, "seq": 4, "reason": "client-gone"},
    }
    letters = {key: letter_of(value) for key, value in properties.headers.items()}
    assert letters == ON_AN_ABORT
    assert decoded(properties, b"") == Abort(ID, 4, "client-gone")


@given(frames())
def test_each_header_is_on_the_frames_and_of_the_type_that_the_contract_says(frame: Frame) -> None:
    expected = dict(ON_EVERY_FRAME)
    if frame.offset == 0:
        expected |= ON_THE_FIRST_OF_A_PART
    if frame.seq == 0:
        expected |= ON_THE_FIRST_OF_THE_TRANSFER
    if frame.tail is not None:
        expected |= ON_THE_LAST_OF_A_PART
        expected |= {f"digest-{algorithm}": "S" for algorithm in frame.tail.digest}
    if frame.commit is not None:
        expected |= ON_THE_COMMIT_FRAME
    headers = received(on_the_wire(encode_frame(frame))).headers
    assert {key: letter_of(value) for key, value in headers.items()} == {
        key: letter for key, letter in expected.items() if key in headers
    }
    may_be_absent = {*ON_THE_FIRST_OF_A_PART, "client", "idempotency-key"}
    assert expected.keys() - headers.keys() <= may_be_absent


def test_longs_are_64_bits_on_the_wire_however_small() -> None:
    wire = on_the_wire(encode_frame(ALL_AT_ONCE))
    for name in ("seq", "offset", "crc32c", "size", "frames", "parts", "bytes"):
        assert bytes([len(name)]) + name.encode() + b"l" in wire
    for name in ("relay", "part"):
        assert bytes([len(name)]) + name.encode() + b"I" in wire


@given(frames())
def test_what_was_encoded_is_decoded(frame: Frame) -> None:
    wire = on_the_wire(encode_frame(frame))
    assert decoded(received(wire), frame.body) == frame


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=3))
def test_a_whole_transfer_survives_the_wire(parts: list[bytes]) -> None:
    framer = Framer(TRANSFER, frame_size=8, digests=["sha-256"])
    sent: list[Frame] = []
    for part in parts:
        sent += framer.start_part(PartHead(name="f", filename="näme"))
        sent += framer.feed(part)
        framer.end_part()
    sent.append(framer.finish()[0])
    bodies = [bytearray() for _ in parts]
    for frame in sent:
        back = decoded(received(on_the_wire(encode_frame(frame))), frame.body)
        assert isinstance(back, Frame)
        assert back._replace(transfer=frame.transfer) == frame
        bodies[back.part] += back.body
        if back.tail is not None:
            digest = hashlib.sha256(bodies[back.part]).hexdigest()
            assert back.tail.digest["sha-256"] == digest
    assert bodies == parts


# --- what others may have written --------------------------------------------------------------


def a_message() -> dict[str, Any]:
    message = encode_frame(ALL_AT_ONCE)
    return {
        "app_id": "relay",
        "type": "frame",
        "correlation_id": ID,
        "timestamp": message.timestamp,
        "headers": dict(message.headers),
        "body": message.body,
    }


def test_headers_of_later_versions_are_ignored() -> None:
    message = a_message()
    message["headers"] |= {"compression": "zstd", "x-death": [{"count": 1}], "nothing": None}
    assert decode(**message) == ALL_AT_ONCE


@pytest.mark.parametrize(
    "change",
    [
        {"app_id": None},
        {"app_id": "Relay"},
        {"app_id": b"relay"},
        {"type": None},
        {"type": "heartbeat"},
        {"headers": None},
        {"headers": []},
    ],
)
def test_other_peoples_messages_are_told_apart(change: dict[str, object]) -> None:
    with pytest.raises(NotRelay):
        decode(**{**a_message(), **change})


@pytest.mark.parametrize("version", [0, 2, 2**31])
@pytest.mark.parametrize("kind", ["frame", "abort", "something new"])
def test_another_version_is_refused_whatever_the_message_is(version: int, kind: str) -> None:
    message = a_message()
    message["headers"]["relay"] = version
    message["type"] = kind
    with pytest.raises(NotRelay, match=f"version {version}"):
        decode(**message)


WRONG: dict[str, list[object]] = {
    "integer": [None, -1, True, 1.0, "1", b"1", [1], {}, Decimal(1)],
    "text": [1, True, b"\xff", ["x"], {}],
    "boolean": [1, 0, "true", None, [], {}],
    "table": [None, "x", 1, [], {"crc32c": 1}, {"crc32c": b"\xff"}, {b"\xff": "x"}, {"x": None}],
}
TYPES = {
    "relay": "integer",
    "seq": "integer",
    "part": "integer",
    "offset": "integer",
    "crc32c": "integer",
    "name": "text",
    "filename": "text",
    "content-type": "text",
    "route": "text",
    "client": "text",
    "idempotency-key": "text",
    "last": "boolean",
    "size": "integer",
    "digest": "table",
    "commit": "boolean",
    "frames": "integer",
    "parts": "integer",
    "bytes": "integer",
}


@pytest.mark.parametrize(
    ("header", "value"), [(key, value) for key, kind in TYPES.items() for value in WRONG[kind]]
)
def test_a_header_of_the_wrong_type_is_an_error_that_names_it(header: str, value: object) -> None:
    message = a_message()
    del message["headers"]["digest-crc32c"]
    message["headers"][header] = value
    with pytest.raises(WireError, match=rf"header {header} "):
        decode(**message)


@pytest.mark.parametrize("header", [*ON_EVERY_FRAME, "size", "digest", "frames", "parts", "bytes"])
def test_a_header_that_must_be_there_and_is_not_is_an_error(header: str) -> None:
    message = a_message()
    del message["headers"]["digest-crc32c"]
    del message["headers"][header]
    with pytest.raises(WireError, match=rf"header {header} is missing"):
        decode(**message)


def test_digests_survive_a_stream_that_drops_tables() -> None:
    message = encode_frame(LAST_OF_PART)
    headers: dict[object, object] = dict(message.headers.items())
    del headers["digest"]
    frame = decode(
        app_id="relay",
        type=message.type,
        correlation_id=message.correlation_id,
        timestamp=message.timestamp,
        headers=headers,
        body=message.body,
    )
    assert isinstance(frame, Frame)
    assert frame.tail == LAST_OF_PART.tail


@pytest.mark.parametrize("value", [None, "", "x" * 256, b"\xff", 7])
def test_a_correlation_id_that_is_no_transfer_id_is_an_error(value: object) -> None:
    with pytest.raises(WireError, match="correlation_id"):
        decode(**{**a_message(), "correlation_id": value})


# What pika can deliver in a header, and some more.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([Decimal("1.5"), datetime(2024, 1, 1, tzinfo=UTC), long(1)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
keys = st.sampled_from([*TYPES, "reason", "unknown", b"\xff", ""])


@settings(max_examples=200)
@given(
    st.dictionaries(keys, values),
    st.sets(st.sampled_from(sorted(TYPES))),
    st.sampled_from(["frame", "abort"]) | values,
    st.just("relay") | values,
    st.just(ID) | values,
    values,
)
def test_any_message_is_a_frame_an_abort_or_a_wire_error(
    changes: dict[Any, object],
    missing: set[str],
    kind: object,
    app_id: object,
    correlation_id: object,
    timestamp: object,
) -> None:
    headers = {k: v for k, v in a_message()["headers"].items() if k not in missing} | changes
    try:
        result = decode(
            app_id=app_id,
            type=kind,
            correlation_id=correlation_id,
            timestamp=timestamp,
            headers=headers,
            body=b"",
        )
    except WireError:
        return
    assert isinstance(result, Frame | Abort)
    transfer_id = result.transfer_id if isinstance(result, Abort) else result.transfer.id
    assert transfer_id == correlation_id


@given(values)
def test_headers_that_are_no_table_are_not_relays(headers: Any) -> None:
    if not isinstance(headers, dict):
        with pytest.raises(NotRelay):
            decode(**{**a_message(), "headers": headers})
