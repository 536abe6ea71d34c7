"""Both ways to marshal a content header give the same bytes."""

from hypothesis import given
from hypothesis import strategies as st
from pika.frame import Header

from relay.broker.content_header import HeaderMarshaller
from relay.model import Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol.wire import Message, encode_abort, encode_frame
from tests.observed_receiver import properties_of

channel_numbers = st.integers(1, 65535)
modes = st.sampled_from([1, 2])
longs = st.integers(0, 2**63 - 1)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    transfer = Transfer(
        id=draw(st.uuids()).__str__(),
        began=draw(st.integers(0, 2**40)),
        route="default",
        client=draw(st.none() | st.just("Zoë")),
    )
    kind = draw(st.sampled_from(["plain", "plain", "first", "last", "commit", "abort"]))
    if kind == "abort":
        return encode_abort(transfer, draw(longs), "client-gone")
    return encode_frame(
        Frame(
            transfer,
            draw(st.integers(1, 2**63 - 1)),
            draw(st.integers(0, 2**31 - 1)),
            draw(longs),
            draw(st.binary(max_size=40)),
            draw(st.integers(0, 2**32 - 1)),
            PartHead(name="näme", filename="f") if kind == "first" else None,
            PartTail(7, {"crc32c": "00000000"}) if kind in {"last", "commit"} else None,
            Totals(1, 1, 7) if kind == "commit" else None,
        )
    )


@given(channel_numbers, modes, st.lists(messages(), min_size=1, max_size=4))
def test_the_short_way_gives_what_pika_gives(
    channel: int, mode: int, several: list[Message]
) -> None:
    marshaller = HeaderMarshaller(channel, mode)
    for message in several:
        expected = Header(
            channel, len(message.body), properties_of(message, delivery_mode=mode)
        ).marshal()
        assert marshaller.marshal(message) == expected
