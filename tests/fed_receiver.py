"""Transfers cut into frames, and fed to a receiver that writes files."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from relay.model import Frame, PartHead, Transfer
from relay.protocol.framing import Framer
from relay.protocol.wire import APP_ID, Message, encode_frame
from relay.receiver import Receiver, Settlement
from relay.receiver.files import STAGING, FileSink
from relay.receiver.names import DEFAULT_TEMPLATE, Template

Part = tuple[PartHead, bytes]


def transfer_id(number: int) -> str:
    return f"0199c0de-0000-7000-8000-{number:012x}"


def transfer(number: int, key: str | None = None) -> Transfer:
    return Transfer(
        id=transfer_id(number), began=1, route="default", client="ann", idempotency_key=key
    )


def cut(
    parts: Sequence[Part],
    number: int = 0,
    *,
    frame_size: int = 4,
    digests: Sequence[str] = (),
    key: str | None = None,
) -> list[Frame]:
    framer = Framer(transfer(number, key), frame_size=frame_size, digests=digests)
    frames: list[Frame] = []
    for head, body in parts:
        frames += framer.start_part(head)
        frames += framer.feed(body)
        framer.end_part()
    return [*frames, framer.finish()[0]]


def one(
    body: bytes, number: int = 0, *, digests: Sequence[str] = (), key: str | None = None
) -> list[Frame]:
    return cut([(PartHead(name="f", filename="x.bin"), body)], number, digests=digests, key=key)


def give(receiver: Receiver, tag: int, message: Message, app_id: object = APP_ID) -> None:
    receiver.feed(
        tag,
        app_id=app_id,
        type=message.type,
        correlation_id=message.correlation_id,
        timestamp=message.timestamp,
        headers=dict(message.headers),
        body=message.body,
    )


def give_frames(receiver: Receiver, frames: Sequence[Frame], first_tag: int = 1) -> None:
    for tag, frame in enumerate(frames, first_tag):
        give(receiver, tag, encode_frame(frame))


def open_sink(output: Path, name: str = DEFAULT_TEMPLATE, **options: Any) -> FileSink:
    return FileSink(output, template=Template(name), **options)


@contextmanager
def receiving(output: Path, *, max_open: int = 256, **options: Any) -> Iterator[Receiver]:
    with closing(open_sink(output, **options)) as sink:
        yield Receiver(sink, max_open=max_open)


def told(settlement: Settlement) -> tuple[str, ...]:
    """The problems, as people see them."""
    return tuple(map(str, settlement.problems))


def receive(output: Path, frames: Sequence[Frame], **options: Any) -> Settlement:
    """In a process of its own, so to speak."""
    with receiving(output, **options) as receiver:
        give_frames(receiver, frames)
        return receiver.settle()


def visible(output: Path) -> set[str]:
    """The files that are not relay's own."""
    files = (p.relative_to(output) for p in output.rglob("*") if p.is_file())
    return {str(path) for path in files if not path.parts[0].startswith(".relay-")}


def staged(output: Path) -> list[str]:
    """What is in the staging directory of transfers: what is named otherwise is its own."""
    entries = os.listdir(output / STAGING)
    return sorted(entry for entry in entries if entry.startswith("0199c0de-"))
